"""What a step costs.

Comes in: a target, and heads where they matter. Goes out: milliseconds and shares, as Markdown and figures.
Read ``generate`` first, then ``profile``. What was measured: ``README.md`` here.
"""
