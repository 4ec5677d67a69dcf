"""The ends of a target, its embedding and its output layer: all of it that a training from stored states needs.

The layers are neither built nor read: the model is made from its configuration with no layer, so that of a checkpoint
only the tensors are read that are left. What heads learn of the target, its number of layers too, is the whole one's.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from koala_bench.common.hub_errors import CHECKPOINT_ERRORS
from koala_bench.engine.devices import pick_device, pick_dtype
from koala_bench.engine.loading.generation import set_aside
from koala_bench.engine.loading.gguf import gguf_file, unpacked
from koala_bench.engine.loading.targets import bundled_target, fingerprint, refusal
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError


@dataclass(frozen=True)
class Ends(Target):
    """A target without its layers, which can embed tokens and score states, and nothing else.

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
    """``fingerprint`` of a target, also where only its ends are here."""
    return dict(target.known) if isinstance(target, Ends) else fingerprint(target)


def load_ends(
    name: str, device: str = "auto", dtype: str = "auto", revision: str | None = None, attention: str = "sdpa",
    engine: str = "eager", threads: int | None = None, *, known: Mapping[str, str],
) -> Ends:  # fmt: skip
    """Load the ends of a target; arguments as for ``load_target``.

    Args:
        known: see ``Ends``.

    Raises:
        KoalaBenchError: not found or not readable, or its family cannot be made without layers.
    """
    where = pick_device(device)
    picked = pick_dtype(dtype, where)
    whole, model, tokenizer = read_model(name, revision, layers=False, dtype=picked, attn_implementation=attention)
    model = model.to(where)
    ends = Ends(name, model, tokenizer, where, picked, 1, ignored=set_aside(model), known=known)
    if any(part in f".{key}" for key in ends.decoder.state_dict() for part in (".layers.", ".h.", ".blocks.")):
        raise KoalaBenchError(f"{name} cannot be made without its layers.", "Train without --states.")
    model.config = whole  # what a head asks for is the whole target's
    context = int(getattr(whole.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 30)
    return replace(ends, max_positions=context, threads=threads)


def read_model(name: str, revision: str | None, layers: bool, **options: Any) -> tuple[Any, Any, Any]:
    """Configuration of the whole target, the model as transformers reads it, and the tokenizer.

    Args:
        layers: whether the model gets its layers.
        options: of ``from_pretrained``.

    Raises:
        KoalaBenchError: the checkpoint cannot be read, or tensors are missing in it.
    """
    packed = None if bundled_target(name) else gguf_file(name)
    source = str(unpacked(packed) if packed else bundled_target(name) or name)
    reader: Any = AutoModelForCausalLM  # whose annotation does not know that it can return two things
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list all tensors of the layers, which nobody wants
    try:
        whole = AutoConfig.from_pretrained(source, revision=revision)
        config = whole if layers else _without_layers(whole)
        model, loaded = reader.from_pretrained(
            source, revision=revision, config=config, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except torch.cuda.OutOfMemoryError as error:
        raise KoalaBenchError(f"{name} does not fit into the memory.", "Use more cards or a half precision.") from error
    except CHECKPOINT_ERRORS as error:
        raise refusal(name, options["attn_implementation"], error) from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(loaded["missing_keys"]):
        raise KoalaBenchError(f"The weights of {name} lack {missing[0]}.", "Use a complete checkpoint.")
    model.eval().requires_grad_(False)
    return whole, model, tokenizer


def _without_layers(whole: Any) -> Any:
    config = deepcopy(whole)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = []
    return config
