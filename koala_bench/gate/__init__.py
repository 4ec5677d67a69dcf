"""Verdicts on records: regression, comparison of heads, losslessness.

In: accepted and new records. Out: a verdict with an exit code, as text, Markdown and JUnit.
Read ``regression`` first. How often it fires: ``README.md`` here.
"""
