"""Dialogues that a target writes alone: it asks as the user, sampled, and answers as itself, greedily.

Every dialogue is one row of a batch that grows by a token a pass: template, question and answer follow one another in
the same cache, nothing is read twice, and a row whose dialogue is done begins the next at once. What a dialogue draws
depends on the seed and its number alone.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from koala_bench.decoding.sampling import Sampling
from koala_bench.decoding.stops import end_of_text, without_end
from koala_bench.dialogues.distilling.manifest import messages_of
from koala_bench.dialogues.distilling.questions import (
    EvaluationText,
    draw_following,
    draw_kind,
    refuses,
    why_useless,
    words_of,
)
from koala_bench.dialogues.encoding import ChatTemplate, encode_prompt, encode_text
from koala_bench.engine.loading.token_ids import unknown_id
from koala_bench.engine.row_cache import RowCache, packed_layers
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError

_MARK = "\u2402"  # stands where the user's text goes
_SLACK = 32  # tokens of a template around a turn, at most
_OPENING = 8  # tokens of an answer that tell whether it refuses
_TRIES = 25  # questions drawn for one turn before the dialogue ends with what it has


@dataclass(frozen=True)
class SelfOptions:
    """How dialogues are written.

    Attributes:
        seed: of what is sampled.
        turns: questions of a dialogue.
        max_new_tokens: length limit of an answer.
        question_tokens: length limit of a question; a longer one is left out.
        rows: dialogues in the making at once.
        temperature, top_p: of questions; answers are greedy.
        refusals: share kept of answers that begin with an apology, which a small target gives to most of what is not
            plain; each is like the other.
    """

    seed: int
    turns: int
    max_new_tokens: int
    rows: int
    question_tokens: int = 100
    temperature: float = 0.8
    top_p: float = 0.95
    refusals: float = 0.1


@dataclass
class _Row:
    """An unfinished dialogue.

    Attributes:
        number: of the dialogue.
        kind: of its first question.
        beginning: words given to the question of this turn.
        fed: tokens whose keys and values the row holds.
        pending: tokens to be fed before the next is chosen, at least one.
        chosen: tokens chosen in this turn, after ``pending`` was empty.
        asking: whether the user speaks.
    """

    number: int
    rng: random.Random
    kind: str
    beginning: str
    fed: list[int]
    pending: list[int] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    asking: bool = True
    turns: list[str] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    answer_tokens: int = 0
    tries: int = 0
    rejected: Counter[str] = field(default_factory=Counter)

    def go_to(self, wanted: Sequence[int]) -> int:
        """Plan to feed what is missing of ``wanted``; returns how many tokens the row keeps of those fed."""
        same = next(
            (at for at, (old, new) in enumerate(zip(self.fed, wanted, strict=False)) if old != new),
            min(len(self.fed), len(wanted)),
        )
        kept = min(same, len(wanted) - 1)  # something must be fed for there to be logits
        self.fed, self.pending, self.chosen = list(self.fed[:kept]), list(wanted[kept:]), []
        return kept


class SelfDialogues:
    """Writes dialogues, numbered, each with the target's own questions and answers.

    Args:
        known: questions, as ``words_of`` joined by spaces, that must not come again; grows.
        evaluation: texts that questions must not repeat.
    """

    def __init__(
        self, target: Target, template: ChatTemplate, options: SelfOptions, known: set[str], evaluation: EvaluationText
    ) -> None:
        assert target.tokenizer is not None
        self._target, self._template, self._options = target, template, options
        self._tokenizer = target.tokenizer
        self._known, self._evaluation = known, evaluation
        self._special = frozenset(self._tokenizer.all_special_ids)
        after = template.render([_MARK]).partition(_MARK)[2]
        # The user's turn ends with a special token, or with the words that the template writes next.
        first = self._tokenizer(after, add_special_tokens=False)["input_ids"][:1]
        self._ends = frozenset(target.stop_ids) | (frozenset(first) & self._special)
        self._end_text = "" if self._ends & frozenset(first) else after.strip()
        self._prefix = self._before_question([])
        self._sampling = Sampling(options.temperature, top_p=options.top_p)
        self._longest = len(self._prefix) + options.turns * (options.question_tokens + options.max_new_tokens + _SLACK)
        if self._longest > target.longest:
            raise KoalaBenchError(
                f"{options.turns} turns of {options.question_tokens} and {options.max_new_tokens} tokens "
                f"do not go into the {target.longest} that {target.name} is decoded with.",
                "Lower --turns or --max-new-tokens.",
            )

    @torch.inference_mode()
    def write(
        self, numbers: Sequence[int], on_tokens: Callable[[int], None] = lambda tokens: None
    ) -> Iterator[dict[str, Any]]:
        """Write the dialogues with these numbers; each comes as a row of conversations when it is done, in no order.

        Args:
            on_tokens: is called after each pass with the number of answer tokens that it brought.
        """
        options, waiting = self._options, iter(numbers)
        cache = RowCache(self._target, min(options.rows, max(1, len(numbers))), self._longest)
        with packed_layers(self._target, cache.rows):
            shared = cache.read_prefix(self._prefix)
            rows: list[_Row] = []
            for number in waiting:
                rows.append(self._begin(cache, len(rows), shared, number))
                if len(rows) == cache.rows:
                    break
            while rows:
                tokens = torch.tensor([row.pending[0] for row in rows], device=self._target.device)
                logits = cache.step(tokens)
                best = logits.float().argmax(-1).tolist()
                drawn = self._draw(rows, logits)
                on_tokens(sum(not row.asking and len(row.pending) == 1 for row in rows))
                gone: list[int] = []
                for place, row in enumerate(rows):
                    row.fed.append(row.pending.pop(0))
                    if row.pending:
                        continue
                    kept = self._take(row, drawn[place] if row.asking else best[place])
                    if kept is not None:
                        cache.lengths[place] = kept
                    if not row.pending:
                        yield self._row(row)
                        following = next(waiting, None)
                        if following is None:
                            gone.append(place)
                        else:
                            rows[place] = self._begin(cache, place, shared, following)
                for place in reversed(gone):  # the last row takes the place of one that has ended
                    last = len(rows) - 1
                    if place != last:
                        cache.move(last, place)
                        rows[place] = rows[last]
                    rows.pop()

    def _begin(self, cache: RowCache, place: int, shared: torch.Tensor, number: int) -> _Row:
        rng = random.Random(f"{self._options.seed}:{number}")
        kind, beginning = draw_kind(rng)
        cache.begin(place, shared)
        row = _Row(number, rng, kind, beginning, list(self._prefix))
        cache.lengths[place] = self._ask(row)
        return row

    def _before_question(self, turns: Sequence[str], beginning: str = "") -> list[int]:
        text = self._template.render([*turns, _MARK]).rpartition(_MARK)[0]
        return encode_text(self._template, self._tokenizer, text + beginning)

    def _ask(self, row: _Row) -> int:
        row.asking = True
        row.tries += 1
        return row.go_to(self._before_question(row.turns, row.beginning))

    def _draw(self, rows: Sequence[_Row], logits: torch.Tensor) -> dict[int, int]:
        """The next token of rows that ask, by place."""
        places = [place for place, row in enumerate(rows) if row.asking and len(row.pending) == 1]
        if not places:
            return {}
        sums = self._sampling.probabilities(logits[places]).double().cumsum(-1)
        luck = torch.tensor([[rows[place].rng.random()] for place in places], dtype=sums.dtype, device=sums.device)
        drawn = torch.searchsorted(sums, luck * sums[:, -1:], right=True)[:, 0]
        return dict(zip(places, drawn.tolist(), strict=True))

    def _take(self, row: _Row, token: int) -> int | None:
        """Add a token to a row's turn; where the turn ends, how many of the tokens fed stay, and what is to be fed next
        in ``pending``."""
        options = self._options
        row.chosen.append(token)
        if row.asking:
            if token in self._ends:
                return self._asked(row, self._text(row.chosen[:-1]))
            if self._end_text and (text := self._text(row.chosen)).find(self._end_text) >= 0:
                return self._asked(row, text.partition(self._end_text)[0])
            if len(row.chosen) == options.question_tokens:
                return self._again(row, "does not end")
        elif len(row.chosen) == _OPENING and refuses(self._text(row.chosen)) and row.rng.random() >= options.refusals:
            row.turns.pop()
            return self._again(row, "refused")
        elif self._ended(row) or len(row.chosen) == options.max_new_tokens:
            return self._answered(row)
        row.pending = [token]
        return None

    def _asked(self, row: _Row, text: str) -> int:
        special = any(token in self._special for token in row.chosen[:-1])
        question = (row.beginning + text).strip()
        key = " ".join(words_of(question))
        reason = (
            why_useless(question, special)
            or ("empty" if not words_of(text) else None)
            or ("duplicate" if key in self._known else "of an evaluation" if self._evaluation.has(question) else None)
        )
        if reason:
            return self._again(row, reason)
        wanted = encode_prompt(self._template, self._tokenizer, [*row.turns, question])
        if len(wanted) + self._options.max_new_tokens > self._longest:
            return self._again(row, "over-long")
        if unknown_id(wanted, self._target.config.vocab_size) is not None:
            return self._again(row, "of a token that the target does not know")
        self._known.add(key)
        row.turns.append(question)
        row.asking = False
        return row.go_to(wanted)

    def _answered(self, row: _Row) -> int:
        by_token, ended = row.chosen[-1] in self._target.stop_ids, self._ended(row)
        said = self._text(row.chosen[:-1] if by_token else row.chosen)
        text = without_end(said, self._target.stop_texts).strip()
        if not text:
            row.turns.pop()
            return self._again(row, "unanswered")
        if not ended:
            row.cut.append(len(row.turns))
        row.answer_tokens += len(row.chosen)
        row.turns.append(text)
        row.tries, row.beginning = 0, draw_following(row.rng)
        if len(row.turns) == 2 * self._options.turns:
            return len(row.fed)  # nothing pending: done
        return self._ask(row)

    def _ended(self, row: _Row) -> bool:
        """Whether an answer's last token ends it, as a token or as the rest of a text that ends answers."""
        by_text = end_of_text(self._tokenizer, row.chosen, 1, self._target.stop_texts)
        return row.chosen[-1] in self._target.stop_ids or by_text is not None

    def _again(self, row: _Row, reason: str) -> int:
        row.rejected[reason] += 1
        if row.tries < _TRIES:
            return self._ask(row)
        if not row.turns:
            raise KoalaBenchError(
                f"{self._target.name} wrote no usable question in {_TRIES} tries: {dict(row.rejected)}.",
                "Check the chat template (--set target.chat_template=tokenizer), or give questions with --source.",
            )
        return len(row.fed)

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    @staticmethod
    def _row(row: _Row) -> dict[str, Any]:
        return {
            "id": f"self:{row.number}",
            "kind": row.kind,
            "conversations": messages_of(row.turns, row.cut),
            "answer_tokens": row.answer_tokens,
            "rejected": dict(row.rejected),
        }
