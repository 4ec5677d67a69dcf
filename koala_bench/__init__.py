"""koala-bench: a benchmark and reproducibility suite for speculative-decoding draft heads.

Third parties import ``heads`` (the contract), ``tree``, ``registry``, ``presets``, ``testing``, ``errors`` and
``contract.check_head``. In: a head, a preset. Out: records, tables, figures. Read ``heads`` first; ``README.md`` here
lists the rooms.
"""
