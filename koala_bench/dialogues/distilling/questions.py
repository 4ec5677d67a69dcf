"""Questions that a chat model writes itself: how some are steered, and which are discarded.

Given nothing but its template up to the user's turn, an instruction-tuned model goes on with what a user might ask
(Magpie, Xu et al. 2024, arXiv 2406.08464). Most of that is advice; code, mathematics and translation are rare, so a
share of the questions begins with given words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from koala_bench.common.files import sha256_of
from koala_bench.dialogues.questions import read_questions
from koala_bench.errors import KoalaBenchError

NGRAM = 8  # words; a question that shares as many in a row with one of an evaluation is left out
FREE = "free"
# Kind, share, and the words that questions of this kind begin with, one of them each.
STEERED: tuple[tuple[str, float, tuple[str, ...]], ...] = (
    ("code", 0.14, (
        "Write a Python function", "Write a Python program", "Write a SQL query", "Write a JavaScript function",
        "Write a C++ program", "Implement",
        "Fix the bug in this Python code:", "Explain what this code does:", "How do I use Python to",
        "Write a regular expression", "Write an HTML page",
    )),
    ("math", 0.12, (
        "Solve", "Solve the equation", "Calculate", "How many", "What is the probability", "Find the value of",
        "If a", "A train", "A store", "A rectangle",
        "The sum of", "Simplify the expression", "John has",
    )),
    ("translation", 0.06, (
        "Translate the following sentence into French:", "Translate this text to Spanish:",
        "Translate German to English:", "Translate into Italian:",
        "Translate the following paragraph from French to English:", "How do you say",
    )),
    ("writing", 0.12, (
        "Write a short story about", "Write a poem about", "Write an email", "Compose", "Draft", "Write a blog post",
        "Write a product description",
        "Describe a vivid scene", "Edit the following paragraph", "Rewrite the following sentence",
    )),
    ("roleplay", 0.05, (
        "Pretend you are", "Act as", "Imagine you are", "You are a", "Take on the role of", "Speak like",
    )),
    ("extraction", 0.08, (
        "Summarize the following text:", "Summarize", "Extract all the names from the following text:",
        "Read the following passage and answer:",
        "Given the following data:", "Identify", "Classify the following", "List the main points of",
    )),
    ("knowledge", 0.13, (
        "Explain", "What is", "What are", "Why do", "How does", "Who was", "When did", "Where is",
        "Describe the process of", "Which",
    )),
)  # fmt: skip
# Second questions: half of them begin so, which keeps them with the answer before.
_FOLLOWING = (
    "Can you", "Now", "Rewrite your", "Explain", "Give an example", "Summarize your", "How does", "How would",
    "What is", "What if", "Why is", "Which", "Make it",
    "Translate your answer", "List", "Describe", "Could you",
)  # fmt: skip
_WORD = re.compile(r"\w+")
_REFUSAL = re.compile(r"\s*(?:I'm|I am) (?:really |very |so )?(?:sorry|afraid)|\s*(?:Sorry|I apologi[sz]e|As an AI)")
_AS_ASSISTANT = re.compile(
    r"SmolLM|Hugging Face|\b(?:I am|I'm|As) an? (?:helpful )?AI\b|How can I (?:help|assist) you", re.IGNORECASE
)


def draw_kind(rng: random.Random) -> tuple[str, str]:
    """A kind of question and the words it begins with, none where it is not steered."""
    at = rng.random()
    for kind, share, beginnings in STEERED:
        if at < share:
            return kind, rng.choice(beginnings)
        at -= share
    return FREE, ""


def draw_following(rng: random.Random) -> str:
    """The words that a later question begins with, none for half of them."""
    return rng.choice(_FOLLOWING) if rng.random() < 0.5 else ""


def mix() -> dict[str, float]:
    """The share of each kind among first questions."""
    shares = {kind: share for kind, share, _ in STEERED}
    return {FREE: round(1 - sum(shares.values()), 4), **shares}


def words_of(text: str) -> list[str]:
    """Words of a text as they are compared: lower case, without punctuation."""
    return _WORD.findall(text.lower())


class EvaluationText:
    """What questions must not repeat: word n-grams of evaluation files, and their shorter texts as a whole.

    Attributes:
        files: name and hash of each file, for the manifest.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.files: dict[str, str] = {}
        self._known: set[tuple[str, ...]] = set()
        for path in sorted(paths):
            self.files[f"{path.parent.name}/{path.name}"] = sha256_of(path)
            for question in read_questions(path):
                for turn in question.turns:
                    self._known |= set(_grams(words_of(turn)))

    def has(self, text: str) -> bool:
        """Whether a text shares ``NGRAM`` words in a row with an evaluation's turn, or equals a shorter one."""
        return not self._known.isdisjoint(_grams(words_of(text)))


def evaluation_files(data_dir: Path | None) -> list[Path]:
    """The question files of a data folder; none where there is no folder. Raises KoalaBenchError where a folder is
    named and is not there."""
    if data_dir is None:
        return []
    if not data_dir.is_dir():
        raise KoalaBenchError(f"There is no data folder {data_dir}.", "Correct --data-dir or KOALA_BENCH_DATA.")
    return [*data_dir.glob("eval/*/question.jsonl"), *data_dir.glob("*/question.jsonl")]


def why_useless(text: str, special: bool) -> str | None:
    """Why a question is left out, judged by itself; None if it may stay.

    Args:
        special: whether it has a special token in it.
    """
    words = words_of(text)
    if special:
        return "special token"
    if len(words) < 3:
        return "empty"
    if _AS_ASSISTANT.search(text):
        return "speaks as the assistant"
    if len(words) >= 12 and len(set(_grams(words, 3))) < 0.6 * (len(words) - 2):
        return "repeats itself"
    return None


def refuses(beginning: str) -> bool:
    """Whether an answer that begins so declines or apologises."""
    return _REFUSAL.match(beginning) is not None


def _grams(words: Sequence[str], count: int = NGRAM) -> list[tuple[str, ...]]:
    """All runs of ``count`` words; of fewer words the one there is."""
    return [tuple(words[at : at + count]) for at in range(max(1, len(words) - count + 1))] if words else []
