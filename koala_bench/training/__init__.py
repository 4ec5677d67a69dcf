"""From dialogues and a target to trained heads.

Comes in: a preset, a target, the training stream. Goes out: a folder per head (weights, configuration, manifest) and a log.
Read ``loop`` first: one pass of the target feeds the loss of every head.
"""
