"""Numbers from answer files of other projects.

In: traces (``koala_bench.interop.traces``). Out: a row per system, as Markdown and CSV.
Read ``numbers`` first.
"""
