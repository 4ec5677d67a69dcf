"""Many trainings of one method compared, over several seeds.

Comes in: a grid file. Goes out: append-only lines of what each trial reached, and a table with intervals.
Read ``grid`` first.
"""
