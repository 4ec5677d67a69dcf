"""Verdicts on records: regression, comparison of heads, losslessness.

Comes in: accepted and new records. Goes out: a verdict with an exit code, as text, Markdown and JUnit.
Read ``regression`` first. How often it fires: ``README.md`` here.
"""
