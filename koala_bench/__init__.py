"""koala-bench: a benchmark and reproducibility suite for speculative-decoding draft heads.

Third parties import from here: ``heads`` (the contract), ``tree``, ``registry``, ``presets``, ``testing``, ``errors``, and
``contract.check_head``. Comes in: a head, a preset. Goes out: records, tables, figures. Read ``heads`` first; the rooms are in
``README.md`` here.
"""
