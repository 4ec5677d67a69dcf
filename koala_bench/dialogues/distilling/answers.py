"""Self-distillation: the target answers the questions of conversations itself, for heads to be trained on its answers.

Heads are accepted where they guess the target's own greedy tokens, which other people's answers show them only as far
as the target fits those (Cai et al. 2024, arXiv 2401.10774, "self-distillation"). The result is a file of conversations
in ShareGPT's form, with a manifest beside it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from koala_bench.common.files import doing, make_folder, write_text
from koala_bench.common.progress import log_line, progress
from koala_bench.common.reading import complete_lines
from koala_bench.decoding.answering import greedy_answers
from koala_bench.decoding.stops import without_end
from koala_bench.dialogues.conversations import Conversations
from koala_bench.dialogues.distilling.manifest import identity_for, is_made, messages_of, write_answers
from koala_bench.dialogues.encoding import ChatTemplate, encode_prompt
from koala_bench.dialogues.turns import Dialogue, as_dialogue
from koala_bench.engine.loading.token_ids import refuse_unknown_ids
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError


@dataclass(frozen=True)
class DistillOptions:
    """How much is answered. ``train`` and ``held_out`` count dialogues; ``rows`` are answered at once; ``turns`` of a
    dialogue, all where None."""

    train: int
    held_out: int
    max_new_tokens: int
    rows: int
    turns: int | None = None


@dataclass(frozen=True)
class _Source:
    """One dialogue to answer: its place in the source, its split, and the user's turns."""

    name: str
    split: str
    questions: list[str]
    system: str | None


def distill(
    target: Target, template: ChatTemplate, conversations: Conversations, out: Path, options: DistillOptions
) -> Path:
    """Answer the first dialogues of both splits into ``out``, JSON lines, gzip-compressed if its name ends in ``.gz``.

    Second questions see the target's own first answers. An answer that reaches ``max_new_tokens`` is kept as it is and
    counted; a dialogue ends where an answer is empty or there is no room for one, see ``Target.longest``. What is done
    lies in ``out`` + ``.partial`` until all is: the same command goes on from there, and ends in the same bytes. Raises
    KoalaBenchError where ``out`` is there and was made otherwise, cannot be written, or the target answered nothing."""
    given = {name: value for name, value in asdict(options).items() if value is not None}
    identity = identity_for(target, template, conversations.provenance, given)
    if is_made(out, identity):
        return out
    sources = [
        _Source(f"{split}:{index}", split, turns[::2][: options.turns], as_dialogue(turns).system)
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
        log_line(f"Resuming after {len(rows):,} of {len(sources):,} dialogues.")
    with (
        doing("write", partial, "Free space and repeat the command: it goes on."),
        open(partial, "a", encoding="utf-8") as handle,
        progress("distill", len(sources), "dialogues", len(rows)) as advance,
    ):
        for first in range(len(rows), len(sources), options.rows):
            group = sources[first : first + options.rows]
            answered = _answer(target, template, group, options.max_new_tokens)
            handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in answered)
            handle.flush()
            rows += answered
            advance(len(group))
    kept = [row for row in rows if row["conversations"]]
    if not kept:
        raise KoalaBenchError(
            f"{target.name} answered none of {len(sources):,} questions.",
            "Check the chat template: --set target.chat_template.",
        )
    write_answers(out, kept, identity, {"unanswered": len(rows) - len(kept)})
    partial.unlink()
    return out


def _answer(
    target: Target, template: ChatTemplate, group: Sequence[_Source], max_new_tokens: int
) -> list[dict[str, Any]]:
    """One row for each dialogue of the group, turn by turn."""
    tokenizer, texts = target.tokenizer, target.stop_texts
    assert tokenizer is not None
    turns: list[list[str]] = [[] for _ in group]
    cut: list[set[int]] = [set() for _ in group]
    for number in range(max(len(one.questions) for one in group)):
        active, prompts = [], []
        for index, one in enumerate(group):
            if len(one.questions) > number and len(turns[index]) == 2 * number:
                dialogue = Dialogue([*turns[index], one.questions[number]], one.system)
                prompt = encode_prompt(template, tokenizer, dialogue)
                refuse_unknown_ids(target.name, tokenizer, prompt, target.config.vocab_size, f"Row {one.name}")
                if len(prompt) + max_new_tokens <= target.longest:
                    active.append(index)
                    prompts.append(prompt)
        if not active:
            break
        answers = greedy_answers(target.model, prompts, max_new_tokens, target.stop_ids, texts, tokenizer)
        for index, answer in zip(active, answers, strict=True):
            ended = answer[-1] in target.stop_ids
            said = str(tokenizer.decode(answer[:-1] if ended else answer, skip_special_tokens=True))
            text = without_end(said, texts)
            ended = ended or text != said
            if text := text.strip():
                cut[index] |= set() if ended else {len(turns[index]) + 1}
                turns[index] += [group[index].questions[number], text]
    return [
        {
            "id": one.name,
            "split": one.split,
            **({"system": one.system} if one.system is not None else {}),
            "conversations": messages_of(said, ended),
        }
        for one, said, ended in zip(group, turns, cut, strict=True)
    ]


def _finished_rows(partial: Path, identity: dict[str, Any], rows: int) -> list[dict[str, Any]]:
    """Rows of the whole groups that an interrupted run has left; the file is cut to them, or begun."""
    found: list[dict[str, Any]] = []
    if partial.exists():
        # A kill or a full disk may have cut the last line, in the middle of a character too.
        values = complete_lines(partial, partial.read_bytes(), "Delete it to start again.")[0]
        if values and values[0] != identity:
            raise KoalaBenchError(
                f"{partial} belongs to another run.", "Choose another --out, or delete it to start again."
            )
        # Groups, not rows: padding may change answers, and a resumed run shall end in the same bytes.
        found = values[1 : 1 + (len(values) - 1) // rows * rows]
    write_text(partial, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in [identity, *found]))
    return found
