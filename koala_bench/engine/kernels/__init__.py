"""Triton kernels for half-precision decoding, which is bound by launches and memory traffic between the matrix
products. Read ``products`` first.

In: tensors in half precision. Out: what torch's operations give, up to rounding: they accumulate in float32 and round
once, where separate operations round at each step. ``koala_bench.engine.graphs`` inserts them into traces.

Without a GPU Triton interprets them if TRITON_INTERPRET=1 is set before its first import.
"""

from koala_bench.engine.kernels.attention import WIDTHS, attend, attend_row, rotate
from koala_bench.engine.kernels.drafts import MOST_RANKS, paired, topk
from koala_bench.engine.kernels.launching import DTYPES
from koala_bench.engine.kernels.products import gate, product, product_, rms_norm, row_product

__all__ = [
    "DTYPES", "MOST_RANKS", "WIDTHS", "attend", "attend_row", "gate", "paired", "product", "product_", "rms_norm",
    "rotate", "row_product", "topk",
]  # fmt: skip
