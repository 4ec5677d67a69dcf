"""From a name to a target: files, weights, ignored generation settings, and whether draft trees work with it.

Read ``targets`` first.
"""
