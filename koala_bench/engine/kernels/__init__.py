"""Triton kernels for passes in half precision on a GPU: what lies between the products costs a decoding step more than
its arithmetic. Read ``products`` first.

Sums are made in float32; results are rounded once, where the plain operations round at each step.
``koala_bench.engine.fusing`` puts them into recorded passes. Without a GPU Triton interprets them if TRITON_INTERPRET=1
is set before it is first imported.
"""

from koala_bench.engine.kernels.attention import WIDTHS, attend, attend_row, rotate
from koala_bench.engine.kernels.drafts import MOST_RANKS, paired, topk
from koala_bench.engine.kernels.launching import DTYPES
from koala_bench.engine.kernels.products import gate, product, product_, rms_norm, row_product

__all__ = [
    "DTYPES", "MOST_RANKS", "WIDTHS", "attend", "attend_row", "gate", "paired", "product", "product_", "rms_norm", "rotate", "row_product", "topk",
]  # fmt: skip
