"""Shared by all rooms: atomic writes, progress, process groups, bundled files, provenance of a run.

In: paths and text. Out: files that are never half written; machine, versions and code for a run's record.
Read ``files`` first.
"""
