"""Tables as pure functions of run records: Markdown, LaTeX and CSV, the same bytes for the same record.

In: runs, the table's file in ``reproduce/`` and the published values. Out: the table with its notes.
Read ``building`` first, then ``frame`` (the numbers), ``columns`` (the columns shown) and ``rendering``.
"""
