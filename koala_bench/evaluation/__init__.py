"""All methods on all questions, into one run record.

In: a preset, trained heads, questions. Out: ``records.jsonl``, continued after any interruption.
Read ``loop`` first, then ``answering``.
"""
