"""Shared by all rooms: atomic writes, progress, process groups, bundled files, provenance of a run.

Comes in: paths and text. Goes out: files that are never half written, and what a record says of machine, versions and code.
Read ``files`` first.
"""
