"""What a run takes, said before anything is downloaded or trained.

Comes in: a preset and this machine. Goes out: memory, disk, tokens, hours, and what is missing.
Read ``requirements`` first.
"""
