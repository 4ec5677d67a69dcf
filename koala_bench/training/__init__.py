"""From dialogues and a target to trained heads.

In: a preset, a target, the training stream. Out: a folder per head (weights, configuration, manifest) and a log.
Read ``loop`` first: one pass of the target feeds the loss of every head.
"""
