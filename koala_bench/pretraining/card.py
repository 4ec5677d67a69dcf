"""The model card of a pretrained target, and the measure of loops in its answers that stands there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from koala_bench.decoding.answering import greedy_answers
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.dialogues.encoding import chat_template, encode_prompt
from koala_bench.engine.target import load_target
from koala_bench.pretraining.corpus import Corpus
from koala_bench.pretraining.options import SHAPE, PretrainOptions, deviations

_PROMPTS = 40
_TOKENS = 128


def repeated_ngrams(answers: Sequence[Sequence[int]], n: int = 8) -> float:
    """Share of the n-grams of the answers that stood in the same answer before: 0 for fresh text, towards 1 for loops."""
    total = repeated = 0
    for answer in answers:
        grams = [tuple(answer[i : i + n]) for i in range(len(answer) - n + 1)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else 0.0


def held_out_answers(folder: Path, corpus: Corpus, template_name: str, device: torch.device) -> list[list[int]]:
    """Greedy answers of the finished target to the first questions of held-out dialogues, but for questions that leave
    no room for one.

    On the CPU one by one, so that they are the same whatever else is asked; on a GPU at once, where that takes a
    fortieth of the time.
    """
    target = load_target(str(folder), str(device), "float32")
    assert target.tokenizer is not None
    tokenizer, template = target.tokenizer, chat_template(template_name, target.tokenizer)
    asked = (encode_prompt(template, tokenizer, turns[:1]) for turns in corpus.held_out)
    prompts = list(islice((prompt for prompt in asked if len(prompt) + _TOKENS <= target.max_positions), _PROMPTS))
    if device.type != "cpu" and prompts:
        return greedy_answers(target.model, prompts, _TOKENS, target.stop_ids)
    return [decode(target, Vanilla(), VANILLA_TREE, prompt, _TOKENS, target.stop_ids).tokens for prompt in prompts]


def _command(manifest: dict[str, Any]) -> str:
    """The command that made a target, from the manifest it left."""
    options = manifest["options"]
    said = [f"--steps {options['steps']}", f"--seed {options['seed']}"]
    # Targets made before an option was there did without it.
    said += [
        f"--{name} {options[name]:g}"
        for name, usual in (("rate", 1.0), ("unlikelihood", 0.0))
        if options.get(name, usual) != usual
    ]
    imitated, started = manifest.get("imitates"), manifest.get("started_from") is not None
    if (conversations := manifest.get("conversations")) is not None:
        said += [f"--source {conversations['source']}"]
    if not started and (imitated is not None or options["layers"] != PretrainOptions.layers):
        said += [f"--layers {options['layers']}"]
    if imitated is not None:
        said += [
            f"--imitate {imitated['name']}",
            *([f"--answers {imitated['answers']['source']}"] if imitated["answers"] else []),
        ]
    said += [
        f"--set {setting}"
        for setting in deviations(
            options, without=SHAPE if started else ("vocabulary", "positions") if imitated else ()
        )
    ]
    return " ".join(["koala-bench pretrain", *said, *(["--start EARLIER"] if started else [])])


def _unlikelihood(options: dict[str, Any]) -> str:
    if not options["unlikelihood"]:
        return ""
    return (
        "| against loops | beside likelihood, unlikelihood of what its own greedy answers repeat (Welleck et al. 2020,"
        " arXiv 1908.04319) |\n"
    )


def _subject(manifest: dict[str, Any]) -> tuple[str, str]:
    """Title and first sentences: what such a model is for."""
    if (imitated := manifest.get("imitates")) is None and manifest.get("conversations") is not None:
        return (
            "A small target model for koala-bench",
            (
                "trained on conversations\nof others. It exists so that draft heads can be trained and measured without"
                " a model hub. What it says is not reliable."
            ),
        )
    if imitated is None:
        return (
            "A small target model for koala-bench",
            (
                "that answers questions about Python\nlibraries in the style of their documentation. It exists so that"
                " draft heads can be trained and measured on a CPU without a\nmodel hub: deep and thin, so that a"
                " forward pass costs many times a one-layer draft step. What it says is not reliable."
            ),
        )
    return (
        "A draft model for koala-bench",
        (
            f"that guesses what the target\n`{imitated['name']}` (weights `{imitated['weights_sha256'][:12]}`) says"
            " next, with the same tokenizer, for speculative decoding. Its labels are the target's\ndistributions, not"
            " the text. It is of no use by itself."
        ),
    )


def _imitated(manifest: dict[str, Any]) -> str:
    if (imitated := manifest.get("imitates")) is None:
        return ""
    place = "the target's answers to held-out questions" if imitated["answers"] else "held-out text"
    return (
        f"| agreement | {imitated['agreement']:.1%} of the tokens of {place}: its best guess of the next one is the"
        " target's |\n"
    )


def _text(manifest: dict[str, Any]) -> str:
    """What the corpus is, and what of it was held out."""
    if (conversations := manifest.get("conversations")) is not None:
        files = conversations.get("files_sha256") or {conversations["source"]: conversations.get("file_sha256", "")}
        named = ", ".join(f"{name} (`{sha256[:12]}`)" for name, sha256 in sorted(files.items()))
        return f"""The corpus is conversations that others wrote, not part of this folder: {named}.
Each file has its own licence, some of which forbid to pass on what was trained on it.

Held out is one conversation in forty, chosen by the hash of its text. Files hold variants of the same question, so "held out" means that
a conversation was never seen as it stands, not that every sentence of it is new.
"""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest["corpus_versions"].items()))
    return f"""The corpus is the docstrings and sources of installed packages, read at run time and not part of this folder: {versions}.
Each package has its own licence; the weights hold no text of theirs beyond what such a small model remembers.

Held out are whole entries, chosen by a hash of their names. Entries of one library share text, so "held out" means that a
name was never seen, not that every sentence of its answer is new.
"""


def model_card(manifest: dict[str, Any]) -> str:
    """The card, Markdown with the hub's front matter, of a target with this manifest."""
    options = manifest["options"]
    stages = [manifest]
    while stages[-1].get("started_from") is not None:  # targets made before `--start` was there have none
        stages.append(stages[-1]["started_from"])
    before = "".join(
        f"| began with | the target of `{_command(earlier)}`: {earlier['tokens_seen']:,} tokens of corpus"
        f" `{earlier['corpus_sha256'][:12]}`, weights `{earlier['weights_sha256'][:12]}` |\n"
        for earlier in stages[1:]
    )
    apart, licence = ("entries", "apache-2.0") if manifest.get("conversations") is None else ("conversations", "other")
    title, purpose = _subject(manifest)
    return f"""---
license: {licence}
library_name: transformers
---

# {title}

A Llama of {options["layers"]} layers and width {options["width"]}, {manifest["parameters"] / 1e6:.2f} M parameters, {purpose}

| | |
|---|---|
| command | `{_command(manifest)}` |
{before}| tokens seen{" by this command" if before else ""} | {manifest["tokens_seen"]:,} (corpus: {manifest["corpus_tokens"]:,}) |
| held-out loss | {manifest["held_out_loss"]} nats per token, {apart} never trained on |
| repeated 8-grams | {manifest["repeated_8grams"]:.1%} of those in {_PROMPTS} greedy answers of at most {_TOKENS} tokens to held-out questions |
{_imitated(manifest)}{_unlikelihood(options)}| corpus sha256 | `{manifest["corpus_sha256"]}` |
| optimiser | Muon for matrices, AdamW for the rest, in bfloat16 autocast; torch {manifest["torch"]} |
| chat template | `{manifest["chat_template"]}` of fschat |
| weights | bfloat16, safetensors |

{_text(manifest)}"""
