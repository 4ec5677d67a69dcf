"""Many trainings of one method compared, over several seeds.

Comes in: a grid file. Goes out: append-only records of each trial, and a table with intervals.
Read ``grid`` first.
"""
