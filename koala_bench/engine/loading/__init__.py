"""From a name to a target: files, weights, what of a checkpoint is set aside, and whether trees work with it."""
