"""What a run takes, said before anything is downloaded or trained.

In: a preset and this machine. Out: memory, disk, tokens, hours, and what is missing.
Read ``requirements`` first.
"""
