"""Whole experiments, from a preset to pages: what ``reproduce``, ``compare`` and ``audit`` do.

In: a resolved preset, methods and a folder. Out: trained heads, records, tables and verdicts in that folder. Only the
command line imports this room. Read ``reproduce`` first.
"""
