"""A target spread over several cards by accelerate, for passes over whole dialogues; decoding stays on one card."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from koala_bench.engine.devices import pick_device, pick_dtype
from koala_bench.engine.loading.generation import set_aside
from koala_bench.engine.loading.targets import read_model
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError


@dataclass(frozen=True)
class Spread(Target):
    """A target whose layers lie on several devices; ``device`` is that of its embedding, to which states are moved."""

    def _gathered(self, state: torch.Tensor) -> torch.Tensor:
        return state.to(self.device)


def load_spread(
    name: str, device: str = "auto", dtype: str = "auto", revision: str | None = None, attention: str = "sdpa",
    engine: str = "eager", threads: int | None = None, *, device_map: Any = "auto",
) -> Spread:  # fmt: skip
    """Load a target over all cards; arguments as for ``load_target``.

    Args:
        device_map: of transformers' ``from_pretrained``.

    Raises:
        KoalaBenchError: not found or not readable, or several processes of this machine would share its cards.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise KoalaBenchError(
            "--device-map takes all cards for one process.", "Start one process a machine, or leave --device-map out."
        )
    picked = pick_dtype(dtype, pick_device(device))
    model, tokenizer, context, _ = read_model(name, revision, picked, attention, None, device_map=device_map)
    where = model.get_input_embeddings().weight.device
    return Spread(name, model, tokenizer, where, picked, context, threads=threads, ignored=set_aside(model))
