"""Run records and the numbers that follow from them. Needs no torch.

In: ``records.jsonl``, one line per answer. Out: speedups, acceptance lengths and rates with their intervals.
Read ``schema`` first, then ``statistics``. What each number means: ``README.md`` here.
"""
