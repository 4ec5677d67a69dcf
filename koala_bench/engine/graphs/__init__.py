"""Recorded passes, which ``--engine graph`` replays: traces, graph passes over them, and CUDA graphs.

In: a function of tensors. Out: one that returns the same, up to rounding, without the Python of the modules in it.
Read ``replay`` first, then ``lowering``.
"""
