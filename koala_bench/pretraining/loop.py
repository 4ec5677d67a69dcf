"""Train a small target model on a corpus of dialogues, from nothing or from an earlier target, or a draft model for
one.

Matrices are trained with Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), which needs
about half the tokens of AdamW at this size, embeddings and norms with AdamW. The learning rate is constant after
a warm-up and falls linearly to zero over the last part.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from koala_bench.common.files import continue_log, make_folder, readable_as_others, sha256_of, write_text
from koala_bench.common.progress import log_line, progress
from koala_bench.common.provenance import code_state
from koala_bench.dialogues.conversations import Conversations
from koala_bench.errors import KoalaBenchError
from koala_bench.pretraining.corpus import DOCUMENTATION, corpus_sha256
from koala_bench.pretraining.imitation import Imitated
from koala_bench.pretraining.options import SHAPE, PretrainOptions
from koala_bench.pretraining.text import TEMPLATE, make_text, tokenizer_in
from koala_bench.training.checkpoints import read_state, write_state

_EVALUATE_EVERY = 200
_CHECKPOINT = "checkpoint.pt"


def _loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def _earlier(start: Path) -> dict[str, Any]:
    """The manifest of an earlier target and a hash of its weights."""
    try:
        manifest = json.loads((start / "pretraining.json").read_text(encoding="utf-8"))
        shape = {**asdict(PretrainOptions()), **manifest["options"]}
        return {**manifest, "options": shape, "weights_sha256": sha256_of(start / "model.safetensors")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KoalaBenchError(
            f"{start} is no target of `koala-bench pretrain`: {error}.", "Give a folder that command has written."
        ) from error


def pretrain(
    corpus: Conversations,
    options: PretrainOptions,
    out: Path,
    device: torch.device,
    checkpoint_every: int = 50,
    start: Path | None = None,
    imitate: Imitated | None = None,
) -> Path:
    """Train a Llama model and its tokenizer on the corpus; returns the folder of the finished target.

    Weights are stored in bfloat16. The folder ``out/work`` holds the log and the checkpoint from which an
    interrupted run goes on.

    Args:
        checkpoint_every: steps between two checkpoints.
        start: folder of an earlier target whose weights, shape and tokenizer this one begins with.
        imitate: a target to make a draft model for: it brings tokenizer, vocabulary and labels.

    Raises:
        KoalaBenchError: the checkpoint in ``out/work`` is of another corpus or other options, or is damaged;
            ``start`` holds no target of this command; the loss is not finite; or the answers do not fill a row.
    """
    if imitate is not None:
        known = imitate.target.model.config
        options = replace(options, vocabulary=known.vocab_size, positions=known.max_position_embeddings)
    earlier = _earlier(start) if start is not None else None
    if earlier is not None:
        options = replace(options, **{name: earlier["options"][name] for name in SHAPE})
    work = out / "work"
    make_folder(work)
    torch.manual_seed(options.seed)
    tokenizer = tokenizer_in(work / "tokenizer", corpus, options.vocabulary, start, imitate)
    text = make_text(corpus, tokenizer, options, imitate)
    held_out, compared = text.held_out.to(device), text.compared.to(device)
    model = _model(options, start).to(device)  # type: ignore[arg-type]
    optimisers = _optimisers(model, options)
    rates = [options.rate * options.matrix_rate, options.rate * options.vector_rate]
    loss_of = _loss if imitate is None else imitate.loss
    identity = {
        "corpus": corpus_sha256(corpus),
        "start": earlier and earlier["weights_sha256"],
        "imitates": None if imitate is None else imitate.identity,
        **asdict(options),
    }
    first = _resume(work, identity, model, optimisers, device)

    def evaluate() -> dict[str, float]:
        model.eval()
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            losses = [_loss(model, part).item() for part in held_out.split(8)]
            agreement = {} if imitate is None else {"agreement": round(imitate.agreement(model, compared), 4)}
        model.train()
        return {"held_out_loss": round(sum(losses) / len(losses), 4), **agreement}

    with (
        continue_log(work / "log.jsonl", first) as log,
        progress("pretrain", options.steps * options.step_tokens, "tokens", first * options.step_tokens) as advance,
    ):
        for step in range(first, options.steps):
            done, left = step + 1, options.steps - step
            ids = text.batch(step, options.step_tokens, decaying=left <= options.decay_steps).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                loss = loss_of(model, ids)
            value = loss.item()
            if not math.isfinite(value):
                raise KoalaBenchError(
                    f"The loss is {value} at step {step}.",
                    "Start again in another --out with another --seed; the last checkpoint is kept.",
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            factor = min(1.0, done / options.warmup_steps, left / options.decay_steps)
            for optimiser, rate in zip(optimisers, rates, strict=True):
                for group in optimiser.param_groups:
                    group["lr"] = rate * factor
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            line = {"step": done, "loss": round(value, 4), "rate": round(factor, 4)}
            if done % _EVALUATE_EVERY == 0 or done == options.steps:
                line |= evaluate()
            log.write(json.dumps(line) + "\n")
            log.flush()
            if done % checkpoint_every == 0 or done == options.steps:
                states = [optimiser.state_dict() for optimiser in optimisers]
                state = {"identity": identity, "step": done, "model": model.state_dict(), "optimisers": states}
                write_state(work / _CHECKPOINT, state)
            advance(options.step_tokens, f"loss {value:.3f}")
        final = evaluate()

    model.to(torch.bfloat16).save_pretrained(out)
    for weights in out.glob("*.safetensors"):
        readable_as_others(weights)
    tokenizer.save_pretrained(out)
    manifest = {
        "options": asdict(options),
        "chat_template": TEMPLATE,
        "corpus_sha256": identity["corpus"],
        "corpus_versions": corpus.provenance.get("versions", {}),
        "tokens_seen": options.steps * options.step_tokens,
        "corpus_tokens": text.stable.per_epoch * options.row_tokens,
        "held_out_loss": final["held_out_loss"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "commit": code_state()["commit"],
        "started_from": earlier,
        **({} if imitate is None else {"imitates": {**imitate.identity, "agreement": final["agreement"]}}),
        **({} if corpus.provenance["source"] == DOCUMENTATION else {"conversations": corpus.provenance}),
    }
    write_text(out / "pretraining.json", json.dumps(manifest, indent=2) + "\n")
    write_text(out / "README.md", _card(manifest))
    return out


def _card(manifest: dict[str, Any]) -> str:
    """The model card, with the hub's front matter; everything else is in the manifest."""
    options, imitated, others = manifest["options"], manifest.get("imitates"), "conversations" in manifest
    kind = f"draft model for {imitated['name']}" if imitated else "small target model"
    text = "conversations of others, which have licences of their own" if others else "docstrings of installed packages"
    agreement = f", {imitated['agreement']:.1%} of its best guesses are the target's" if imitated else ""
    return f"""---
license: {"other" if others else "apache-2.0"}
library_name: transformers
---

# A {kind}, made by `koala-bench pretrain`

A Llama of {options["layers"]} layers, width {options["width"]} and {manifest["parameters"] / 1e6:.2f} M parameters,
trained on {manifest["tokens_seen"]:,} tokens of {text}: held-out loss {manifest["held_out_loss"]} nats per
token{agreement}. What it says is not reliable. `pretraining.json` has every option, the corpus and the commit.
"""


def _model(options: PretrainOptions, start: Path | None) -> LlamaForCausalLM:
    """A model with the weights of an earlier one, or with random ones."""
    if start is not None:
        earlier: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
        return earlier
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.width,
            intermediate_size=options.intermediate,
            num_hidden_layers=options.layers,
            num_attention_heads=options.attention_heads,
            num_key_value_heads=options.attention_heads,
            max_position_embeddings=options.positions,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=None,
        )
    )


def _optimisers(model: LlamaForCausalLM, options: PretrainOptions) -> list[torch.optim.Optimizer]:
    """Muon for the matrices but embeddings, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=options.matrix_rate, weight_decay=options.weight_decay),
        torch.optim.AdamW(others, lr=options.vector_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _resume(
    work: Path,
    identity: dict[str, Any],
    model: LlamaForCausalLM,
    optimisers: list[torch.optim.Optimizer],
    device: torch.device,
) -> int:
    """Load the checkpoint in ``work``, if there is one; returns the number of steps that are done."""
    state = read_state(work / _CHECKPOINT, device)
    if state is None:
        return 0
    if state["identity"] != identity:
        raise KoalaBenchError(
            f"The checkpoint in {work} was made from another corpus or with other options.",
            "Choose another --out, or delete the folder to start again.",
        )
    model.load_state_dict(state["model"])
    for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    log_line(f"Resuming after step {int(state['step']):,}.")
    return int(state["step"])
