"""The model card of a pretrained target or draft model."""

from __future__ import annotations

from typing import Any

from koala_bench.pretraining.options import SHAPE, PretrainOptions, deviations


def _command(manifest: dict[str, Any]) -> str:
    """The command that made a target, from the manifest it left."""
    options, imitated = manifest["options"], manifest.get("imitates")
    started, conversations = manifest.get("started_from") is not None, manifest.get("conversations")
    words = ["koala-bench pretrain", f"--steps {options['steps']}", f"--seed {options['seed']}"]
    words += [f"--rate {options['rate']:g}"] if options.get("rate", 1.0) != 1.0 else []
    words += [f"--source {conversations['source']}"] if conversations else []
    if not started and (imitated or options["layers"] != PretrainOptions.layers):
        words.append(f"--layers {options['layers']}")
    if imitated:
        words.append(f"--imitate {imitated['name']}")
        words += [f"--answers {imitated['answers']['source']}"] if imitated["answers"] else []
    given = SHAPE if started else ("vocabulary", "positions") if imitated else ()
    words += [f"--set {setting}" for setting in deviations(options, without=given)]
    return " ".join(words + ["--start EARLIER"] * started)


def _title(manifest: dict[str, Any]) -> tuple[str, str]:
    """Title, and what such a model is for."""
    if imitated := manifest.get("imitates"):
        return "A draft model for koala-bench", (
            f"that guesses what the target\n`{imitated['name']}` (weights `{imitated['weights_sha256'][:12]}`) says next,"
            " with the same tokenizer, for speculative decoding. Its labels are the target's\ndistributions, not the"
            " text. It is of no use by itself."
        )
    subject = (
        "trained on conversations\nof others."
        if manifest.get("conversations")
        else "that answers questions about Python\nlibraries in the style of their documentation."
    )
    return "A small target model for koala-bench", (
        f"{subject} It exists so that draft heads can be trained and measured without a model hub. What it says is not"
        " reliable."
    )


def _text(manifest: dict[str, Any]) -> str:
    """What the corpus is, and what of it was held out."""
    if conversations := manifest.get("conversations"):
        files = conversations.get("files_sha256") or {conversations["source"]: conversations.get("file_sha256", "")}
        named = ", ".join(f"{name} (`{sha256[:12]}`)" for name, sha256 in sorted(files.items()))
        return f"""The corpus is conversations that others wrote, not part of this folder: {named}.
Each file has its own licence, some of which forbid to pass on what was trained on it.

Held out is one conversation in forty, chosen by the hash of its text. Files hold variants of the same question, so
"held out" means that a conversation was never seen as it stands, not that every sentence of it is new.
"""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest["corpus_versions"].items()))
    return f"""The corpus is the docstrings and sources of installed packages, not part of this folder: {versions}.
Each package has its own licence; the weights hold no text of theirs beyond what such a small model remembers.

Held out are whole entries, chosen by a hash of their names. Entries of one library share text, so "held out" means that
a name was never seen, not that every sentence of its answer is new.
"""


def model_card(manifest: dict[str, Any]) -> str:
    """The card, Markdown with the hub's front matter, of a target with this manifest."""
    options, conversations, imitated = manifest["options"], manifest.get("conversations"), manifest.get("imitates")
    title, purpose = _title(manifest)
    rows = {"command": f"`{_command(manifest)}`", "commit": f"`{manifest.get('commit') or 'unknown'}`"}
    stages = [manifest]
    while stages[-1].get("started_from") is not None:
        stages.append(stages[-1]["started_from"])
    began = [
        f"| began with | the target of `{_command(earlier)}`: {earlier['tokens_seen']:,} tokens of corpus"
        f" `{earlier['corpus_sha256'][:12]}`, weights `{earlier['weights_sha256'][:12]}` |\n"
        for earlier in stages[1:]
    ]
    rows["tokens seen by this command"] = f"{manifest['tokens_seen']:,} (corpus: {manifest['corpus_tokens']:,})"
    apart = "conversations" if conversations else "entries"
    rows["held-out loss"] = f"{manifest['held_out_loss']} nats per token, {apart} never trained on"
    if imitated:
        place = "the target's answers to held-out questions" if imitated["answers"] else "held-out text"
        rows["agreement"] = (
            f"{imitated['agreement']:.1%} of the tokens of {place}: its best guess of the next one is the target's"
        )
    rows["corpus sha256"] = f"`{manifest['corpus_sha256']}`"
    rows["optimiser"] = f"Muon for matrices, AdamW for the rest, in bfloat16 autocast; torch {manifest['torch']}"
    rows["chat template"] = f"`{manifest['chat_template']}` of fschat"
    rows["weights"] = "bfloat16, safetensors"
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"""---
license: {"other" if conversations else "apache-2.0"}
library_name: transformers
---

# {title}

A Llama of {options["layers"]} layers and width {options["width"]}, {manifest["parameters"] / 1e6:.2f} M parameters, {purpose}

| | |
|---|---|
{table}{"".join(began)}
{_text(manifest)}"""
