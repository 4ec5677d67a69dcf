"""``python -m koala_bench.cli``: the same as ``koala-bench``."""

from koala_bench.cli import main

main()
