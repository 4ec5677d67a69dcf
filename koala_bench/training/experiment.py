"""From a preset to trained heads: loads the target, reads the dialogues, and trains what is not trained yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from koala_bench.common.draft_vocabulary import by_count
from koala_bench.common.files import make_folder
from koala_bench.common.process_group import find_process_group
from koala_bench.common.progress import log_line
from koala_bench.dialogues.conversations import (
    Conversations,
    bundled_answers,
    content_of,
    encode_all,
    files_of,
    read_conversations,
)
from koala_bench.dialogues.distilling.manifest import answering_target
from koala_bench.dialogues.encoding import ChatTemplate, EncodedDialogue, chat_template, encode_prompt
from koala_bench.dialogues.hub import HUB
from koala_bench.dialogues.streams import Stream, TokenBatch, make_stream
from koala_bench.dialogues.templates import AUTO, stops_of
from koala_bench.engine.loading.fingerprints import computation_sha256
from koala_bench.engine.loading.generation import in_words
from koala_bench.engine.loading.gguf import check_pin
from koala_bench.engine.loading.outer_layers import OuterLayers, fingerprint_of
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.loading.token_ids import refuse_unknown_ids
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import DataPreset, MethodPreset, Preset
from koala_bench.registry import HEADS, load
from koala_bench.training.checkpoints import first_difference, identity_of, read_manifest
from koala_bench.training.held_out import HeldOut, can_probe
from koala_bench.training.loop import build_head, make_trainer, train
from koala_bench.training.precision import settle_precision
from koala_bench.training.shared_states import stored_states_of
from koala_bench.training.states import remove_states
from koala_bench.training.tracking import check_service
from koala_bench.tree import load_template

VANILLA = "vanilla"
_READING = 2  # of rows and templates: one more whenever the same file becomes other tokens
STATES = "states"  # the folder of stored states, beside the heads that are trained on them
_OF_DECODING = {"tree", "head_of", "first", "typical", "usual"}  # what a trained head does not depend on


def load_preset_target(preset: Preset, load: Callable[..., Target] = load_target) -> tuple[Target, ChatTemplate]:
    """The preset's target, which knows everything that ends its answers, and the chat template.

    Args:
        load: with the arguments of ``load_target``.

    Raises:
        KoalaBenchError: as ``load_target``, ``chat_template`` and ``stops_of``, or the target is not the file that the
            preset pins.
    """
    wanted = preset.target
    check_pin(wanted.name, wanted.weights_sha256)
    disable_progress_bar()  # transformers draws one for every tensor of a checkpoint
    place = wanted.name, wanted.device, wanted.dtype, wanted.revision, wanted.attention
    target = load(*place, engine=wanted.engine, threads=wanted.threads)
    if target.tokenizer is None:
        raise KoalaBenchError(f"{target.name} has no tokenizer.", "Use a checkpoint with a tokenizer.")
    template = chat_template(wanted.chat_template, target.tokenizer, wanted.template_options, wanted.template_date)
    if wanted.chat_template == AUTO:
        log_line(
            f"Prompts are made with the chat template that {target.name} brings."
            if template.own
            else f"{target.name} has no chat template of its own: prompts are made with fschat's {template.name}."
            " Name another with --set target.chat_template=NAME."
        )
    if template.date is not None:
        log_line(f"The chat template asks for today's date and is told {template.date} (target.template_date).")
    if target.ignored:
        log_line(f"Ignored by all methods: the checkpoint's own generation settings, {in_words(target.ignored)}.")
    said = encode_prompt(template, target.tokenizer, ["a", "b", "c"])
    refuse_unknown_ids(
        target.name, target.tokenizer, said, target.config.vocab_size, f"The chat template '{template.name}'"
    )
    ids, texts = stops_of(template, target.tokenizer, target.stop_ids, preset.evaluation.stop, target.name)
    return replace(target, more_stop_ids=ids, stop_texts=texts), template


def methods_with_heads(preset: Preset, methods: Sequence[str]) -> list[str]:
    """The methods that have a head, in the order given, each checked against the preset."""
    names = [name for name in methods if name != VANILLA]
    for name in names:
        preset.method(name)
    return names


def free_head(preset: MethodPreset, target: Target) -> Any | None:
    """The head of a method that has nothing to train, ready to decode; None for any other. Raises KoalaBenchError where
    there is no such head, an option is not its own, or it is no module."""
    if preset.objective is not None or hasattr(load(HEADS, preset.head), "loss"):
        return None
    head = build_head(target, preset, seed=0)
    return head if next(head.parameters(), None) is None else None


def first_head(preset: MethodPreset, target: Target) -> Any | None:
    """The head that is asked before a method's own, ready to decode; None where there is none. Raises KoalaBenchError
    as ``free_head``, or where it has to be trained."""
    if preset.first is None:
        return None
    first = MethodPreset(head=preset.first.head, options=preset.first.options, tree=preset.first.tree)
    head = free_head(first, target)
    if head is None:
        raise KoalaBenchError(
            f"The head '{first.head}' must be trained, so it cannot draft before another one.",
            "Let first name a head with nothing to train, such as a lookup.",
        )
    load_template(first.tree).check(depth=head.max_depth, candidates=target.model.config.vocab_size)
    return head


def train_heads(
    preset: Preset,
    methods: Sequence[str],
    target: Target,
    template: ChatTemplate,
    out: Path,
    begin: Callable[[], None] = lambda: None,
    states: Path | None = None,
    log_with: str | None = None,
    also: Sequence[tuple[int, ...]] = (),
) -> None:
    """Train the heads of ``methods`` together on identical data into ``out/<method>/``; finished ones are reused.

    If any head is missing or was trained otherwise, all are trained, in one run: heads of a table share their batches.
    Methods whose heads have nothing to train are passed over.

    Args:
        begin: called once everything is checked that can be, before the first thing is written.
        states: folder for the target's states where the preset stores them; other trainings on the same dialogues may
            share it, and it is the caller's to delete. None: a folder in ``out``, which is deleted in the end.
        also: ``features`` of heads of those other trainings, for the states to hold what they read too.
        log_with: where curves go beside the log, out of ``tracking.SERVICES``.

    Raises:
        KoalaBenchError: whatever is wrong with the preset, the data or a checkpoint.
    """
    check_service(log_with)
    for name in methods_with_heads(preset, methods):
        first_head(preset.method(name), target)  # not used before evaluation; a mistake in it should be told now
    names = trained_methods(preset, methods, target)
    if not names:
        begin()
        return
    preset = settle_precision(preset, names, out, target.device)
    settings = _settings(preset, names, target, template)
    finished = {name: read_manifest(out / name) for name in names}
    if _finished(finished, settings, preset.data):
        begin()
        log_line(f"Reusing the trained heads in {out}: {', '.join(names)}.")
        return
    # Before the data, which takes a while: a mistake in heads or trees should be told at once.
    target = replace(target, engine="eager")  # recordings of weights that change would be made again at each evaluation
    group = find_process_group(target.device)
    if preset.training.micro_batches % group.size:
        raise KoalaBenchError(
            f"A step of {preset.training.micro_batches} micro-batches cannot be shared out to {group.size} processes.",
            f"Set training.micro_batches to a multiple of {group.size}.",
        )
    trainers = [make_trainer(target, name, preset.method(name), preset.training) for name in names]
    for trainer in trainers:
        load_template(trainer.preset.tree).check(
            depth=trainer.head.max_depth, candidates=trainer.preset.draft_vocabulary or target.config.vocab_size
        )
    _check_answers(target, preset.data.source)
    conversations = read_conversations(preset.data.source, template)
    stream, labels, held_out, lengths = training_streams(preset, conversations, target, template)
    order = token_order(stream, target)
    # Which tokens a cut head drafts is known with the data only; until here it stood for one, to find mistakes early.
    for place, trainer in enumerate(trainers):
        if trainer.preset.draft_vocabulary is not None:
            trainers[place] = make_trainer(target, trainer.name, trainer.preset, preset.training, order)
    rows = {"rows": conversations.rows} if conversations.rows else {}
    manifest = {
        **settings,
        "provenance": {**conversations.provenance, **rows, "dialogues": lengths},
        "stream_sha256": stream.sha256,
        "order_sha256": stream.order_sha256(preset.training.steps * preset.training.micro_batches),
        "dialogues": len(stream.dialogues),
    }
    if isinstance(target, OuterLayers):
        held_out = replace(held_out, prompts=())  # nothing can be decoded
    begin()
    if _same(finished, manifest):
        log_line(f"Reusing the trained heads in {out}, of the same dialogues: {', '.join(names)}.")
        return
    make_folder(out)
    for trainer in trainers:
        log_line(f"  {trainer.name}: {trainer.parameters / 1e6:.2f} M trained parameters")
    stored = None
    if preset.training.stored_states:
        features = [*(trainer.head.features for trainer in trainers), *also]
        stored = stored_states_of(target, stream, held_out, features, states or out / STATES, group)
        manifest["states_sha256"] = stored.sha256
    train(target, trainers, stream, labels, held_out, preset.training, out, manifest, group, stored, log_with, order)
    if states is None and group.first:
        remove_states(out / STATES)


def token_order(stream: Stream, target: Target) -> torch.Tensor:
    """The order in which draft vocabularies take the target's tokens: by their counts in the answers of a training
    stream.
    """
    answers = (
        [token for token, said in zip(each.ids, each.supervised, strict=True) if said] for each in stream.dialogues
    )
    special = [] if target.tokenizer is None else target.tokenizer.all_special_ids
    return by_count(answers, target.config.vocab_size, [*special, *target.stop_ids])


def trained_methods(preset: Preset, methods: Sequence[str], target: Target) -> list[str]:
    """The methods whose heads have to be trained so that ``methods`` can decode, each once. Raises KoalaBenchError
    where there is a mistake in the methods or their options."""
    owners = dict.fromkeys(preset.trained_as(name) for name in methods_with_heads(preset, methods))
    return [name for name in owners if free_head(preset.method(name), target) is None]


def heads_finished(preset: Preset, methods: Sequence[str], target: Target, template: ChatTemplate, out: Path) -> bool:
    """Whether ``train_heads`` would reuse what lies in ``out``, as far as files tell before they are read."""
    names = trained_methods(preset, methods, target)
    preset = settle_precision(preset, names, out, target.device)
    finished = {name: read_manifest(out / name) for name in names}
    return not names or _finished(finished, _settings(preset, names, target, template), preset.data)


def _settings(preset: Preset, names: Sequence[str], target: Target, template: ChatTemplate) -> dict[str, Any]:
    """What trained heads depend on, but for the data."""
    return {
        "target": {**fingerprint_of(target), "computation_sha256": computation_sha256(target.model.config)},
        "data": preset.data.model_dump(mode="json"),
        "training": preset.training.model_dump(mode="json"),
        "chat_template": template.sha256,
        "methods": {name: preset.method(name).model_dump(mode="json", exclude=_OF_DECODING) for name in names},
        "reading": _READING,
    }


def _finished(finished: Mapping[str, dict[str, Any] | None], settings: dict[str, Any], data: DataPreset) -> bool:
    """Whether heads with these manifests are what would be trained, as the files' bytes tell at once; where they are
    others, what becomes of them may still be the same.
    """
    return all(_unread_data_of(manifest, data) for manifest in finished.values()) and _same(finished, settings)


def _check_answers(target: Target, source: str) -> None:
    """Refuse the bundled answers for heads of another target; of other answers say it if they are another target's."""
    bundled = bundled_answers(source)
    for path in [bundled] if bundled else [] if source.startswith(HUB) else files_of(Path(source)):
        answering = answering_target(path)
        if answering is None or answering["weights_sha256"] == fingerprint_of(target)["weights_sha256"]:
            continue
        if bundled:
            raise KoalaBenchError(
                f"The bundled answers are not those of {target.name}.",
                "Name conversations with --set data.source=FILE, or let the target answer: koala-bench distill.",
            )
        log_line(
            f"These answers are those of another target, {answering['name']}: for heads of {target.name} let it"
            " answer itself with koala-bench distill."
        )


def _same(finished: Mapping[str, dict[str, Any] | None], wanted: dict[str, Any]) -> bool:
    """Whether finished heads were trained as ``wanted`` says, in whatever company. Fields of the stream
    that it lacks were compared by their files before.
    """
    for name, manifest in finished.items():
        if manifest is None:
            return False
        if first_difference(identity_of({**manifest, **wanted}), identity_of(manifest)) is not None:
            return False
        methods = manifest.get("methods")
        if not isinstance(methods, dict) or methods.get(name) != wanted["methods"][name]:
            return False
    return True


def _unread_data_of(manifest: dict[str, Any] | None, data: DataPreset) -> bool:
    """Whether a head was trained on the data of these settings, judged by files: same bytes, read and cut alike."""
    if manifest is None or manifest.get("reading") != _READING:
        return False
    own, provenance = manifest.get("data", {}), manifest.get("provenance", {})
    files = provenance.get("files_sha256") or {"": provenance.get("file_sha256")}
    alike = all(own.get(name) == getattr(data, name) for name in ("max_tokens", "limit"))
    return alike and list(files.values()) == content_of(data.source)


def longest_dialogue(preset: Preset, target: Target) -> int:
    """Tokens of the longest dialogue to train on: no more than the target has positions for, and decodes with."""
    return min(preset.data.max_tokens, target.longest)


def training_streams(
    preset: Preset, conversations: Conversations, target: Target, template: ChatTemplate
) -> tuple[Stream, list[str], HeldOut, dict[str, dict[str, int]]]:
    """What heads are trained on, the name of each dialogue, what is held out, and how many dialogues of both were too
    long. Raises KoalaBenchError where no dialogue has an answer within the preset's length."""
    limit = preset.data.limit or len(conversations.train)
    log_line(f"Encoding {min(limit, len(conversations.train)):,} of {len(conversations.train):,} dialogues ...")
    longest = longest_dialogue(preset, target)
    encoded, names, lengths = _answered(
        encode_all(target, template, conversations.train[:limit]), conversations.train_names[:limit], longest, ""
    )
    stream = make_stream(encoded, names, preset.training.batch_tokens, longest, preset.training.seed)
    apart = conversations.held_out[: preset.data.held_out]
    encoded, held_names, apart_lengths = _answered(
        encode_all(target, template, apart), [f"held-out:{i}" for i in range(len(apart))], longest, " held-out"
    )
    held = make_stream(encoded, held_names, preset.training.batch_tokens, longest, 0)
    batches: list[TokenBatch] = []
    covered = 0
    while covered < len(held.dialogues):
        batch = held.batch(len(batches))
        covered += len(batch.samples)
        batches.append(replace(batch, samples=tuple(len(stream.dialogues) + index for index in batch.samples)))
    assert target.tokenizer is not None
    prompts = [
        encode_prompt(template, target.tokenizer, turns[:1]) for turns in conversations.held_out[: preset.data.probes]
    ]
    probes = [prompt for prompt in prompts if len(prompt) < longest and can_probe(target, prompt)]
    counts = {
        "train": {**lengths, "not_taken": len(conversations.train[limit:])},
        "held_out": {**apart_lengths, "probes_left_out": len(prompts) - len(probes)},
    }
    return stream, names, HeldOut(batches, probes, held.dialogues, held.sha256), counts


def _answered(
    dialogues: Sequence[EncodedDialogue], names: Sequence[str], max_tokens: int, which: str
) -> tuple[list[EncodedDialogue], list[str], dict[str, int]]:
    """The dialogues with something to learn once they are cut, and counts; in real conversations a question alone may
    be longer.
    """
    kept = [index for index, dialogue in enumerate(dialogues) if any(dialogue.supervised[: max_tokens - 1])]
    if not kept:
        raise KoalaBenchError(
            f"None of {len(dialogues):,} dialogues has an answer token within its first {max_tokens} tokens.",
            "Raise --set data.max_tokens, or use a target that takes longer sequences where this one is the limit.",
        )
    left_out = sorted(set(range(len(dialogues))) - set(kept))
    over = [len(dialogues[index].ids) - max_tokens for index in kept if len(dialogues[index].ids) > max_tokens]
    if over or left_out:
        parts = [f"{len(over):,} are cut there, which loses {sum(over):,} tokens"] if over else []
        parts += (
            [f"{len(left_out):,} are left out, having no answer token before, such as {names[left_out[0]]}"]
            if left_out
            else []
        )
        log_line(f"Of {len(dialogues):,}{which} dialogues, at most {max_tokens:,} tokens each: {'; '.join(parts)}.")
    last_only = sum(dialogues[index].last_only for index in kept)
    if last_only:
        log_line(
            f"Only the last answer of {last_only:,}{which} dialogues is trained on, after the prompt used in"
            " evaluation: the chat template changes answers."
        )
    counts = {
        "last_answer_only": last_only,
        "whole": len(kept) - len(over),
        "over_long_and_cut": len(over),
        "over_long_and_left_out": sum(len(dialogues[index].ids) > max_tokens for index in left_out),
        "without_answer_token": sum(len(dialogues[index].ids) <= max_tokens for index in left_out),
        "tokens": sum(min(len(dialogues[index].ids), max_tokens) for index in kept),
        "tokens_cut_off": sum(over),
    }
    return [dialogues[index] for index in kept], [names[index] for index in kept], counts
