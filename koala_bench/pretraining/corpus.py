"""What a target is pretrained on: the documentation of installed packages as dialogues, or files of conversations.

Every documented function, class and module becomes a few two-turn dialogues: what does it do, which arguments does it
take, show an example, show its source. Under ``constraints.txt`` the text is the same everywhere, and its hash is kept
in the manifest of what was trained on it.
"""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from collections.abc import Sequence
from dataclasses import replace

from koala_bench.common.progress import log_line
from koala_bench.dialogues.conversations import Conversations, read_conversations
from koala_bench.dialogues.templates import ChatTemplate
from koala_bench.pretraining.documentation import PACKAGES, Entry, read_entries

DOCUMENTATION = "documentation"
# A small target learns to end answers only if they are short; longer ones it loops on.
_ANSWER_CHARACTERS = 400
_LISTED_METHODS = 8
# Answers that compress below this ratio are tables of equal lines, which teach a small model to loop.
_SMALLEST_COMPRESSED_SHARE = 0.4


def _cut(text: str) -> str:
    """Whole paragraphs, else whole lines, up to about the length of an answer."""
    limit = _ANSWER_CHARACTERS
    if len(text) <= limit:
        return text
    head = text[:limit]
    for separator in ("\n\n", "\n", ". "):
        position = head.rfind(separator)
        if position > limit // 3:
            return head[: position + (1 if separator == ". " else 0)].rstrip()
    return head


def _fenced(code: str) -> str:
    return f"```python\n{_cut(code)}\n```"


_WHAT = (
    "What does `{n}` do in {p}?",
    "What is `{n}` in {p}?",
    "Explain `{n}` from {p}.",
    "Tell me about `{n}` in {p}.",
)
_FIRST = {
    "Parameters": ("Which arguments does `{n}` of {p} take?", "Explain the parameters of `{n}` from {p}.",
        "How do I call `{n}` in {p}?"),
    "Returns": ("What does `{n}` from {p} return?", "Which value do I get from `{n}` in {p}?"),
    "Examples": ("Show me an example of `{n}` from {p}.", "How do I use `{n}` in {p}?"),
    "Raises": ("Which errors does `{n}` from {p} raise?", "When does `{n}` in {p} fail?"),
    "Notes": ("What should I know about `{n}` in {p}?", "Are there notes on `{n}` from {p}?"),
    "Attributes": ("Which attributes does `{n}` from {p} have?",),
    "Shape": ("Which shapes does `{n}` from {p} expect?",),
    "source": ("Show the source of `{n}` from {p}.", "How is `{n}` implemented in {p}?"),
    "methods": ("Which methods does `{n}` of {p} have?", "List the methods of `{n}` from {p}."),
}  # fmt: skip
_SECOND = {
    "summary": ("What does it do?", "And what is it for?"),
    "Parameters": ("Which arguments does it take?", "What are its parameters?"),
    "Returns": ("What does it return?",),
    "Examples": ("Show an example.", "Can you show me an example?"),
    "Raises": ("Which errors does it raise?",),
    "Notes": ("Is there anything else to know?", "Any notes?"),
    "Attributes": ("Which attributes does it have?",),
    "Shape": ("Which shapes does it expect?",),
    "source": ("Show its source.", "How is it implemented?", "Show the code."),
    "methods": ("Which methods does it have?",),
}


def _repeats_itself(text: str) -> bool:
    data = text.encode()
    return len(zlib.compress(data)) < _SMALLEST_COMPRESSED_SHARE * len(data)


def answers_of(entry: Entry) -> dict[str, str]:
    """The answers about an entry by topic, without those that mostly repeat themselves."""
    answers = {"summary": _cut(entry.sections["summary"])}
    for name, text in entry.sections.items():
        if name != "summary":
            answers[name] = _fenced(text) if name == "Examples" and "```" not in text else f"{name}:\n\n{_cut(text)}"
    if entry.source:
        answers["source"] = _fenced(entry.source)
    if entry.methods:
        answers["methods"] = f"The methods of `{entry.name}`:\n\n" + "\n".join(
            f"- `{name}`" for name in entry.methods[:_LISTED_METHODS]
        )
    return {topic: answer for topic, answer in answers.items() if topic == "summary" or not _repeats_itself(answer)}


def dialogues_of(entry: Entry) -> list[list[str]]:
    """Two-turn dialogues that cover every topic once, worded by a generator that the entry's name seeds."""
    draw = random.Random(f"{entry.package}:{entry.name}")
    answers = answers_of(entry)
    names = {"n": entry.name, "p": entry.package}
    others = [topic for topic in answers if topic != "summary"]
    draw.shuffle(others)
    first = [draw.choice(_WHAT).format(**names), answers["summary"]]
    if others:
        first += [draw.choice(_SECOND[others[0]]), answers[others[0]]]
    dialogues, rest = [first], others[1:]
    while rest:
        topic = rest.pop(0)
        dialogue = [draw.choice(_FIRST[topic]).format(**names), answers[topic]]
        follow = rest.pop(0) if rest else "summary"
        dialogues.append([*dialogue, draw.choice(_SECOND[follow]), answers[follow]])
    return dialogues


def read_documentation(packages: Sequence[str] = tuple(PACKAGES)) -> Conversations:
    """Dialogues about the installed packages, shuffled, in about half a minute: all sources are 100 MB. Raises
    KoalaBenchError where a package is not installed."""
    log_line("Reading the documentation of the installed packages ...")
    entries, versions = read_entries(packages)
    train: list[list[str]] = []
    held_out: list[list[str]] = []
    for entry in entries:
        (held_out if entry.held_out else train).extend(dialogues_of(entry))
    for part in (train, held_out):
        random.Random(0).shuffle(part)
    found = Conversations(train, [f"{DOCUMENTATION}:{i}" for i in range(len(train))], held_out, {})
    return replace(
        found, provenance={"source": DOCUMENTATION, "versions": versions, "corpus_sha256": corpus_sha256(found)}
    )


def read_source(source: str, template: ChatTemplate | None = None) -> Conversations:
    """``documentation``, or conversations as ``read_conversations`` takes them."""
    return read_documentation() if source == DOCUMENTATION else read_conversations(source, template)


def read_corpus(source: str) -> Conversations:
    """A source to pretrain on, its dialogues shuffled."""
    found = read_source(source)
    if source == DOCUMENTATION:
        return found
    for part in (found.train, found.held_out):
        random.Random(0).shuffle(part)
    return replace(found, provenance={**found.provenance, "source": source, "rows": found.rows})


def corpus_sha256(corpus: Conversations) -> str:
    """Hash of all dialogues in their order, those to train on apart from the held-out ones."""
    digest = hashlib.sha256()
    for part in (corpus.train, corpus.held_out):
        digest.update("".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in part).encode() + b"\x00")
    return digest.hexdigest()
