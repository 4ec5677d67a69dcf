"""Loads a target from the hub, a folder, a GGUF file or the package, and checks once what decoding assumes."""

from __future__ import annotations

import hashlib
import os
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from koala_bench.common.bundled import PACKAGE
from koala_bench.common.hub_errors import CHECKPOINT_ERRORS, first_line
from koala_bench.common.progress import log_line
from koala_bench.engine.devices import pick_device, pick_dtype, pick_engine, pick_threads
from koala_bench.engine.graphs.replay import Recorded
from koala_bench.engine.loading.conformance import check_trees
from koala_bench.engine.loading.fingerprints import checkpoint_folder, weights_sha256
from koala_bench.engine.loading.generation import set_aside
from koala_bench.engine.loading.gguf import gguf_file, hash_of, unpacked
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.tree import DraftTree, TreeShape


def _refuse_unsupported(name: str, config: Any) -> None:
    remedy = (
        "Use a decoder-only causal LM with ordinary attention in every layer, such as Llama, Vicuna, Qwen or Mistral."
    )
    if getattr(config, "is_encoder_decoder", False):
        raise KoalaBenchError(f"{name} is an encoder-decoder model.", remedy)
    kinds = set(getattr(config, "layer_types", None) or ())
    if other := kinds - {"full_attention", "sliding_attention"}:
        raise KoalaBenchError(
            f"{name} has layers of kind {', '.join(sorted(other))}, which keep no rows that a tree could share.", remedy
        )


def bundled_target(name: str) -> Path | None:
    """Folder of a target that ships with the project, or None."""
    # Looked for among their names: a name may be too long to ask the file system for.
    return next((path.parent for path in (PACKAGE / "targets").glob("*/config.json") if path.parent.name == name), None)


def load_target(
    name: str, device: str = "auto", dtype: str = "auto", revision: str | None = None, attention: str = "sdpa",
    tokenizer: bool = True,
    engine: str = "eager", threads: int | None = None,
) -> Target:  # fmt: skip
    """Load a target from the hub, a folder, a GGUF file (see ``gguf_file``), or the bundled ones by name (``tiny``).
    Raises KoalaBenchError where not found, no access, damaged, of an unsupported kind, or too large for the memory."""
    where = pick_device(device)
    picked, driven = pick_dtype(dtype, where), pick_engine(engine, where)
    model, found, context = read_model(name, revision, picked, attention, where, tokenizer=tokenizer)[:3]
    fixed, ignored = where.type == "cuda", set_aside(model)
    cores = pick_threads(threads, where, sum(p.numel() * p.element_size() for p in model.parameters()))
    target = Target(name, model, found, where, picked, context, driven, fixed, cores, ignored=ignored)
    _check_target(target)
    return _recordable(target)


def read_model(
    name: str,
    revision: str | None,
    dtype: torch.dtype,
    attention: str,
    device: torch.device | None,
    *,
    layers: bool = True,
    tokenizer: bool = True,
    **options: Any,
) -> tuple[Any, Any, int, Any]:
    """The model in evaluation mode, the tokenizer, the length of the context, and the whole model's configuration.

    Args:
        device: where the model is brought; where transformers puts it if None.
        layers: whether the model gets its layers; without them only the embedding and output layer are read.
        options: more of transformers' ``from_pretrained``.

    Raises:
        KoalaBenchError: as ``load_target``.
    """
    packed = None if bundled_target(name) else gguf_file(name)
    source = str(unpacked(packed) if packed else bundled_target(name) or name)
    if packed is None and os.sep in name and name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise KoalaBenchError(f"There is no folder {name}.", "Check --target.")
    reader: Any = AutoModelForCausalLM  # whose annotation does not know that it can return two things
    verbosity = logging.get_verbosity()
    if not layers:
        logging.set_verbosity_error()  # it would list all tensors of the layers
    try:
        whole = AutoConfig.from_pretrained(source, revision=revision)
        text = whole.get_text_config(decoder=True)
        _refuse_unsupported(name, text)
        if attention == "sdpa" and getattr(text, "attn_logit_softcapping", None):
            raise _no_attention(name, attention)  # some versions of transformers leave the cap out without a word
        if dtype == torch.float64 and _experts(text):
            options["experts_implementation"] = "eager"  # the grouped products of the others know no float64
        options |= {"dtype": dtype, "attn_implementation": attention, "revision": revision}
        options |= {} if layers else {"config": _without_layers(whole)}
        model, loaded = reader.from_pretrained(source, output_loading_info=True, **options)
        found = _load_tokenizer(source, revision) if tokenizer else None
        model = model if device is None else model.to(device)
    except torch.cuda.OutOfMemoryError as error:
        raise KoalaBenchError(
            f"{name} does not fit into the memory of {device or 'all cards'}.",
            "Use a smaller target, --dtype float16, or another --device.",
        ) from error
    except CHECKPOINT_ERRORS as error:
        raise _refusal(name, attention, error) from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(loaded["missing_keys"]):  # transformers would draw them at random and go on
        raise KoalaBenchError(
            f"The weights of {name} lack {missing[0]}{' and others' if len(missing) > 1 else ''}.",
            "Use a complete checkpoint.",
        )
    model.eval().requires_grad_(False)
    return model, found, int(getattr(text, "max_position_embeddings", None) or 1 << 30), whole


def _without_layers(whole: Any) -> Any:
    config = deepcopy(whole)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = []
    return config


def _experts(config: Any) -> int:
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return next((int(count) for name in names if (count := getattr(config, name, None))), 0)


def _no_attention(name: str, attention: str) -> KoalaBenchError:
    remedy = "Use --attention eager." if attention == "sdpa" else "Use --attention sdpa or eager."
    return KoalaBenchError(f"transformers has no attention '{attention}' for {name}.", remedy)


def _refusal(name: str, attention: str, error: Exception) -> KoalaBenchError:
    """A loading error as one line with its remedy; most come from the hub."""
    if attention != "eager" and "attn_implementation" in str(error):
        return _no_attention(name, attention)
    remedy = "Check --target, log in with HF_TOKEN for gated models, or give the path of a downloaded copy."
    if isinstance(error, ImportError):
        remedy = "Install the package that it names, or use a copy of the target that is not quantised."
    return KoalaBenchError(f"Cannot load the target {name}: {first_line(error)}", remedy)


def _load_tokenizer(source: str, revision: str | None) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision)
    except Exception as error:  # the tokenizers library knows no other kind
        raise ValueError(f"its tokenizer cannot be read: {error}") from error


def _check_target(target: Target) -> None:
    """Check once what decoding assumes: decoder and output layer make up the model, and trees work. Raises
    KoalaBenchError if not."""
    limit = target.limit
    try:
        _check_output(target)
    except torch.cuda.OutOfMemoryError as error:
        raise KoalaBenchError(
            f"There is no memory left for a pass of {target.name}.", "Use another --device."
        ) from error
    except CHECKPOINT_ERRORS as error:
        raise KoalaBenchError(f"A pass of {target.name} fails: {first_line(error)}", "Use another target.") from error
    check_trees(target, target.unrecorded, limit.rows if limit else target.max_positions)
    if limit is not None:
        log_line(f"koala-bench: {target.name} {limit.reason}: answers that need more rows than that are refused.")


def _recordable(target: Target) -> Target:
    """The target, with the engine ``eager`` if its passes cannot be recorded, as those of most mixtures of experts.

    The recording made for this check is the one that verifies trees later. Captured graphs fit only their own shapes
    and are not tried here.
    """
    if target.engine == "eager" or target.fixed:
        return target
    tree, cache = DraftTree(torch.tensor([1, 2, 3], device=target.device), TreeShape((-1, 0, 0))), target.new_cache(8)
    with torch.inference_mode():
        target.prefill(tree.tokens[:2], cache)
        target.verify(tree, cache)
    recorded = target.pass_of((-1,))
    if not isinstance(recorded, Recorded) or recorded.refusal is None:
        return target
    log_line(f"koala-bench: {target.name} is decoded with the engine eager.")
    return replace(target, engine="eager")


def _check_output(target: Target) -> None:
    """Make sure that decoder and output layer together are the model: some families post-process their logits."""
    ids = torch.arange(4, device=target.device)[None] % target.config.vocab_size
    with torch.inference_mode():
        whole = target.model(input_ids=ids, use_cache=False).logits
        parts = target.output(target.states(ids)[:, :, -1])
    if whole.shape != parts.shape or not torch.allclose(whole.float(), parts.float(), atol=1e-3, rtol=1e-3):
        raise KoalaBenchError(
            f"{target.name} changes its logits in a way that is not known here.",
            "Use another target, or teach koala_bench/engine/target.py what this family does after the output layer.",
        )


def fingerprint(target: Target) -> dict[str, str]:
    """Hashes of configuration, weights and tokenizer. Weights are hashed by file if possible, else by tensor; a GGUF
    file is hashed itself."""
    bundled = bundled_target(target.name)
    config = hashlib.sha256(target.model.config.to_json_string().encode()).hexdigest()
    if packed := None if bundled else gguf_file(target.name):
        weights = hash_of(packed)
    else:
        weights = weights_sha256(bundled or checkpoint_folder(target.name, target.model.config), target.model)
    found = {"config_sha256": config, "weights_sha256": weights}
    if target.tokenizer is not None:
        found["tokenizer_sha256"] = hashlib.sha256(
            repr(sorted(target.tokenizer.get_vocab().items())).encode()
        ).hexdigest()
    return found
