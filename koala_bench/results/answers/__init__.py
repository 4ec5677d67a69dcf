"""Answer files of others in numbers.

Comes in: traces (``koala_bench.interop.traces``). Goes out: a row per system, as Markdown and CSV.
Read ``numbers`` first.
"""
