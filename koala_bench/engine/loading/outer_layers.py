"""A target's embedding and output layer only, all that training from stored states needs.

The model is built from its configuration without layers, so only the remaining tensors of the checkpoint are read. What
heads learn of the target, such as its number of layers, is that of the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from koala_bench.engine.devices import pick_device, pick_dtype
from koala_bench.engine.loading.generation import set_aside
from koala_bench.engine.loading.targets import fingerprint, read_model
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError


@dataclass(frozen=True)
class OuterLayers(Target):
    """A target's embedding and output layer, without the layers between: it can only embed tokens and score states.

    Attributes:
        known: the whole target's hashes, as ``fingerprint`` made them where its states were written.
    """

    known: Mapping[str, str] = field(default_factory=dict)

    def _forward(self, *arguments: Any) -> NoReturn:
        raise KoalaBenchError(
            f"Of {self.name} only the embedding and the output layer are loaded, and a pass is asked for.",
            "Train without --states.",
        )


def fingerprint_of(target: Target) -> dict[str, str]:
    """``fingerprint`` of a target, also of one without layers."""
    return dict(target.known) if isinstance(target, OuterLayers) else fingerprint(target)


def load_outer_layers(
    name: str, device: str = "auto", dtype: str = "auto", revision: str | None = None, attention: str = "sdpa",
    engine: str = "eager", threads: int | None = None, *, known: Mapping[str, str],
) -> OuterLayers:  # fmt: skip
    """Load the outer layers of a target; arguments as for ``load_target``.

    Args:
        known: see ``OuterLayers``.

    Raises:
        KoalaBenchError: not found or not readable, or its family cannot be made without layers.
    """
    where = pick_device(device)
    picked = pick_dtype(dtype, where)
    model, tokenizer, context, whole = read_model(name, revision, picked, attention, where, layers=False)
    ignored = set_aside(model)
    target = OuterLayers(name, model, tokenizer, where, picked, context, threads=threads, ignored=ignored, known=known)
    if any(part in f".{key}" for key in target.decoder.state_dict() for part in (".layers.", ".h.", ".blocks.")):
        raise KoalaBenchError(f"{name} cannot be made without its layers.", "Train without --states.")
    model.config = whole  # what a head asks for is the whole target's
    return target
