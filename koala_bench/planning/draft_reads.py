"""Weights that a draft reads in its matrix products, in units of one step of the target.

For one sequence both are bound by memory, so the ratio estimates the cost of a draft without a measurement. It is
counted on fake tensors, for several sizes of the draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from koala_bench.common.markdown import table
from koala_bench.engine.target import Target
from koala_bench.heads import Committed
from koala_bench.presets import MethodPreset, Preset
from koala_bench.registry import HEADS, load
from koala_bench.training.experiment import VANILLA
from koala_bench.training.loop import build_head
from koala_bench.tree import load_template

SIZES = (32768, 16384, 8192, 4096)
# Products, and the index of the operand that holds weights.
_PRODUCTS = {torch.ops.aten.mm: 1, torch.ops.aten.addmm: 2, torch.ops.aten.bmm: 1, torch.ops.aten.baddbmm: 2}


@dataclass(frozen=True)
class DraftReads:
    """Weights that one draft of a method reads, over those of one step of the target.

    Attributes:
        depth: of its tree.
        by_size: by the size of the draft vocabulary, the whole one first.
    """

    method: str
    depth: int
    by_size: dict[int, float]


class _Weights(TorchDispatchMode):
    """Counts the numbers in the weights of all products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (place := _PRODUCTS.get(func.overloadpacket)) is not None:
            self.count += args[place].numel()
        return func(*args, **(kwargs or {}))


def draft_reads(preset: Preset, names: Sequence[str], config: Any) -> list[DraftReads]:
    """Draft reads of each method with a trained head; ``config`` is the target's."""
    found = []
    with FakeTensorMode(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config)
        target = Target(preset.target.name, model, None, torch.device("cpu"), torch.float32, 2048)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        step = target.parameters - (0 if tied else model.get_input_embeddings().weight.numel())
        for name in names:
            if name == VANILLA or not hasattr(load(HEADS, preset.method(name).head), "loss"):
                continue
            method, depth = preset.method(name), load_template(preset.method(name).tree).depth
            whole = target.config.vocab_size
            sizes = [None, *(size for size in SIZES if size < whole)]
            counts = {size or whole: _read(target, method, depth, size) / step for size in sizes}
            found.append(DraftReads(name, depth, counts))
    return found


def _read(target: Target, method: MethodPreset, depth: int, size: int | None) -> int:
    head: Any = build_head(target, method.model_copy(update={"draft_vocabulary": size}), 0)
    head.eval()
    head.begin(load_template(f"chain-{depth}"), 256)  # a wide level reads no more weights than one node
    token, width = torch.zeros(1, dtype=torch.int64), target.spec().hidden_size
    with _Weights() as weights:
        head.draft(Committed(token, torch.zeros(1, len(head.features), width), 0))
    return weights.count


def reads_in_words(found: Sequence[DraftReads]) -> str:
    """A table in Markdown; nothing where nothing was counted."""
    if not found:
        return ""
    headings = ["Head", "Depth", *(f"{size:,}" for size in found[0].by_size)]
    rows = ([each.method, each.depth, *(f"{share:.2f}" for share in each.by_size.values())] for each in found)
    what = "Weights that a draft reads, in steps of the target, by the number of tokens that it can draft:"
    return f"{what}\n\n{table(headings, rows)}"
