"""Many trainings of one method compared, over several seeds.

In: a grid file. Out: append-only records of each trial, and a table with intervals.
Read ``grid`` first.
"""
