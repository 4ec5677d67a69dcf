"""Figures as pure functions of run records: PDF for papers, PNG for pages, the same bytes for the same record.

In: runs, or a training log. Out: two files per figure. Read ``depth`` first, then ``style``.

Each function draws ``methods`` in their order, passing over those that are not there, returns the paths of its PDF and
PNG, and raises ``KoalaBenchError`` where there is nothing to draw or the folder cannot be written.
"""
