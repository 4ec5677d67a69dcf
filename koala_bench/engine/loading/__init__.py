"""From a name to a target: files, weights, what of a checkpoint is set aside, and whether draft trees work with it.

Read ``targets`` first.
"""
