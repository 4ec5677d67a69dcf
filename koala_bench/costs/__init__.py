"""What a step costs.

In: a target, and heads where they matter. Out: milliseconds and shares, as Markdown and figures.
Read ``generate`` first, then ``profile``. What was measured: ``README.md`` here.
"""
