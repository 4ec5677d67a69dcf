"""The fastest draft tree for a head on this machine.

In: a trained head, held-out prompts, step times. Out: a tree template with the speedup expected of it.
Read ``search`` first.
"""
