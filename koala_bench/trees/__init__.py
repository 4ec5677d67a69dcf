"""Which draft tree suits a head on this machine.

Comes in: a trained head, held-out prompts, step times. Goes out: a tree template with the speedup expected of it.
Read ``search`` first.
"""
