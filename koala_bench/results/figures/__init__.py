"""Figures as pure functions of run records: PDF for papers, PNG for pages, the same bytes for the same record.

In: runs, or a training log. Out: two files per figure. Read ``depth`` first, then ``style``.

Each function draws ``methods`` in their order, passing over those that are not there, returns the paths of its PDF and
PNG, and raises ``KoalaBenchError`` where there is nothing to draw or the folder cannot be written.
"""

from koala_bench.results.figures.bars import write_figure1
from koala_bench.results.figures.categories import write_categories
from koala_bench.results.figures.cost import write_cost
from koala_bench.results.figures.depth import write_depth
from koala_bench.results.figures.layers import write_layers
from koala_bench.results.figures.oracle import write_oracle
from koala_bench.results.figures.training import write_training

__all__ = [
    "write_categories",
    "write_cost",
    "write_depth",
    "write_figure1",
    "write_layers",
    "write_oracle",
    "write_training",
]
