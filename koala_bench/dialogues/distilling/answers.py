"""Self-distillation: the target answers the questions of conversations itself, for heads to be trained on what it says.

Heads are accepted where they guess the target's own greedy tokens, which other people's answers show them only as far
as the target fits those (Cai et al. 2024, arXiv 2401.10774, "self-distillation"). The result is a file of conversations
in ShareGPT's form, with a manifest beside it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from koala_bench.common.files import make_folder, replacing, write_text
from koala_bench.common.progress import progress, say
from koala_bench.common.reading import complete_lines
from koala_bench.decoding.answering import greedy_answers
from koala_bench.decoding.stops import without_end
from koala_bench.dialogues.conversations import MANIFEST, Conversations
from koala_bench.dialogues.dialogue import Dialogue, as_dialogue
from koala_bench.dialogues.encoding import ChatTemplate, encode_prompt
from koala_bench.engine.loading.targets import fingerprint
from koala_bench.engine.loading.token_ids import refuse_unknown_ids
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError


@dataclass(frozen=True)
class DistillOptions:
    """How much is answered. ``train`` and ``held_out`` count dialogues; ``rows`` are answered at once; ``turns`` of a
    dialogue, all where None.
    """

    train: int
    held_out: int
    max_new_tokens: int
    rows: int
    turns: int | None = None


@dataclass(frozen=True)
class _Asked:
    """One dialogue to answer: its place in the source, its split, and the user's turns."""

    name: str
    split: str
    questions: list[str]
    system: str | None


def manifest_of(answers: Path) -> Path:
    """Where the manifest of a file of answers lies."""
    return answers.with_name(f"{answers.name.removesuffix('.gz').removesuffix('.jsonl')}{MANIFEST}")


def answering_target(source: Path) -> dict[str, str] | None:
    """Name and hashes of the target whose answers a file of conversations holds; None if no manifest of ``distill``
    lies beside it.

    Raises:
        KoalaBenchError: the manifest is damaged.
    """
    manifest = manifest_of(source)
    try:
        found = json.loads(manifest.read_bytes())
        if isinstance(found, dict) and "identity" not in found:
            return None  # somebody else's
        target = found["identity"]["target"]
        if not all(isinstance(target[key], str) for key in ("name", "weights_sha256")):
            raise TypeError
    except (OSError, UnicodeEncodeError):  # there is none
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise KoalaBenchError(
            f"{manifest} does not say whose answers {source.name} holds: it is damaged.",
            "Delete it, or make the answers again with koala-bench distill.",
        ) from error
    return dict(target)


def distill(
    target: Target, template: ChatTemplate, conversations: Conversations, out: Path, options: DistillOptions
) -> Path:
    """Answer the first dialogues of both splits into ``out``, JSON lines, gzip-compressed if its name ends in ``.gz``.

    Second questions see the target's own first answers. An answer that reaches ``max_new_tokens`` is kept as it is and
    counted; a dialogue ends where an answer is empty or the context is full. What is done lies in ``out`` +
    ``.partial`` until all is: the same command goes on from there, and ends in the same bytes.

    Raises:
        KoalaBenchError: ``out`` is there and was made otherwise, cannot be written, or the target answered nothing.
    """
    identity = {
        "target": {"name": target.name, **fingerprint(target)},
        "source": conversations.provenance,
        "chat_template": template.sha256,
        "dtype": str(target.dtype).removeprefix("torch."),
        "options": {name: value for name, value in asdict(options).items() if value is not None},
    }
    if out.exists():
        if identity_of(out) != identity:
            raise KoalaBenchError(f"{out} is there and was made otherwise.", "Choose another --out, or delete it.")
        say(f"Reusing {out}: it was made by the same command.")
        return out
    asked = [
        _Asked(f"{split}:{index}", split, turns[::2][: options.turns], as_dialogue(turns).system)
        for split, dialogues, count in (
            ("train", conversations.train, options.train),
            ("held_out", conversations.held_out, options.held_out),
        )
        for index, turns in enumerate(dialogues[:count])
    ]
    partial = out.with_name(out.name + ".partial")
    make_folder(out.parent)
    rows = _finished_rows(partial, identity, options.rows)
    if rows:
        say(f"Resuming after {len(rows):,} of {len(asked):,} dialogues.")
    try:
        with (
            open(partial, "a", encoding="utf-8") as handle,
            progress("distill", len(asked), "dialogues", len(rows)) as advance,
        ):
            for first in range(len(rows), len(asked), options.rows):
                group = asked[first : first + options.rows]
                answered = _answer(target, template, group, options.max_new_tokens)
                handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in answered)
                handle.flush()
                rows += answered
                advance(len(group))
    except OSError as error:
        raise KoalaBenchError(
            f"Cannot write {partial}: {error.strerror or error}.", "Free space and repeat the command: it goes on."
        ) from error
    kept = [row for row in rows if row["conversations"]]
    if not kept:
        raise KoalaBenchError(
            f"{target.name} answered none of {len(asked):,} questions.",
            "Check the chat template: --set target.chat_template.",
        )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode()
    data = gzip.compress(text, mtime=0) if out.name.endswith(".gz") else text
    answers = [message for row in kept for message in row["conversations"] if message["from"] == "gpt"]
    counts = {
        "dialogues": len(kept),
        "unanswered": len(rows) - len(kept),
        "answers": len(answers),
        "cut_answers": sum("cut" in one for one in answers),
    }
    # First the manifest: killed in between, the same command goes on from what is partial and writes both again.
    write_text(
        manifest_of(out),
        json.dumps({"identity": identity, "counts": counts, "sha256": hashlib.sha256(data).hexdigest()}, indent=2)
        + "\n",
    )
    with replacing(out) as temporary:
        temporary.write_bytes(data)
    partial.unlink()
    return out


def _answer(
    target: Target, template: ChatTemplate, group: Sequence[_Asked], max_new_tokens: int
) -> list[dict[str, Any]]:
    """One row for each dialogue of the group, turn by turn."""
    assert target.tokenizer is not None
    texts = target.stop_texts
    turns: list[list[str]] = [[] for _ in group]
    cut: list[set[int]] = [set() for _ in group]
    for number in range(max(len(one.questions) for one in group)):
        active, prompts = [], []
        for index, one in enumerate(group):
            if len(one.questions) > number and len(turns[index]) == 2 * number:
                prompt = encode_prompt(
                    template, target.tokenizer, Dialogue([*turns[index], one.questions[number]], one.system)
                )
                refuse_unknown_ids(target.name, target.tokenizer, prompt, target.config.vocab_size, f"Row {one.name}")
                if len(prompt) + max_new_tokens <= target.max_positions:
                    active.append(index)
                    prompts.append(prompt)
        if not active:
            break
        for index, answer in zip(
            active,
            greedy_answers(target.model, prompts, max_new_tokens, target.stop_ids, texts, target.tokenizer),
            strict=True,
        ):
            ended = answer[-1] in target.stop_ids
            said = str(target.tokenizer.decode(answer[:-1] if ended else answer, skip_special_tokens=True))
            text = without_end(said, texts).strip()
            ended = ended or without_end(said, texts) != said
            if text:
                cut[index] |= set() if ended else {len(turns[index]) + 1}
                turns[index] += [group[index].questions[number], text]
    return [
        {
            "id": one.name,
            "split": one.split,
            **({"system": one.system} if one.system is not None else {}),
            "conversations": [
                {"from": ("human", "gpt")[place % 2], "value": text, **({"cut": True} if place in ended else {})}
                for place, text in enumerate(said)
            ],
        }
        for one, said, ended in zip(group, turns, cut, strict=True)
    ]


def identity_of(out: Path) -> Any:
    """What the manifest beside a file says it was made from; None where there is none that can be read."""
    try:
        found = json.loads(manifest_of(out).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found.get("identity") if isinstance(found, dict) else None


def _finished_rows(partial: Path, identity: dict[str, Any], rows: int) -> list[dict[str, Any]]:
    """Rows of the whole groups that an interrupted run has left; the file is cut to them. A new file gets its first
    line.

    Groups, not rows: what a batch answers may depend on its padding, and a resumed run shall end in the same bytes.
    """
    found: list[dict[str, Any]] = []
    if partial.exists():
        # A kill or a full disk may have cut the last line, in the middle of a character too.
        values = complete_lines(partial, partial.read_bytes(), "Delete it to start again.")[0]
        if values and values[0] != identity:
            raise KoalaBenchError(
                f"{partial} belongs to another run.", "Choose another --out, or delete it to start again."
            )
        found = values[1 : 1 + (len(values) - 1) // rows * rows]
    write_text(partial, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in [identity, *found]))
    return found
