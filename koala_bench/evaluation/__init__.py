"""All methods on all questions, into one run record.

Comes in: a preset, trained heads, questions. Goes out: ``records.jsonl``, continued after any interruption.
Read ``loop`` first, then ``answering``.
"""
