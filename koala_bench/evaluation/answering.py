"""One answer of one method as a line of the record, failures included, and where it first differs from vanilla's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from koala_bench.decoding.acceptance import GREEDY, Rule, SpeculativeSampling, TypicalAcceptance
from koala_bench.decoding.loop import Decoded, capacity_for, decode, fits
from koala_bench.decoding.sampling import Sampling
from koala_bench.decoding.stops import without_end
from koala_bench.dialogues.encoding import ChatTemplate, encode_prompt
from koala_bench.dialogues.questions import Question
from koala_bench.engine.cache import TreeCache
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.methods import Method
from koala_bench.presets import Preset
from koala_bench.records.schema import TurnLine

_CACHE_ROUNDING = 256  # rows; a cache that grows in steps serves many prompts


@dataclass(frozen=True)
class Place:
    """Identifies an answer: question, turn (counted from 0) and repeat."""

    question: Question
    turn: int
    repeat: int

    @property
    def key(self) -> tuple[int, int, int]:
        """(question_id, turn, repeat), as in the record."""
        return self.question.question_id, self.turn, self.repeat


class Session:
    """Shared by the turns of a run: target, template, limits, and a cache that is enlarged for longer prompts."""

    def __init__(
        self, preset: Preset, target: Target, template: ChatTemplate, methods: Sequence[Method], process: int
    ) -> None:
        self.target, self.template, self.process = target, template, process
        self.evaluation = preset.evaluation
        self.methods = {method.name: method for method in methods}
        self.widest = max(method.template.nodes for method in methods)
        self.cache: TreeCache | None = None

    def prompt(self, turns: Sequence[str]) -> list[int]:
        """Token ids of a conversation up to its last question."""
        assert self.target.tokenizer is not None
        return encode_prompt(self.template, self.target.tokenizer, turns)

    def _rows(self, prompt: Sequence[int]) -> int:
        target = self.target
        return capacity_for(len(prompt), self.evaluation.max_new_tokens, self.widest, target.max_positions)

    def fits(self, prompt: Sequence[int]) -> bool:
        """Whether an answer to a prompt fits into the target's context and, if it has one, its window."""
        return fits(self.target, len(prompt), self.evaluation.max_new_tokens, self.widest)

    def _rule(self, method: Method, place: Place) -> Rule:
        """A method's acceptance rule; its random numbers depend on the seed and the place only, so that resuming
        changes nothing."""
        wanted = self.evaluation
        if wanted.temperature == 0:
            return GREEDY
        if (typical := method.info["typical"]) is not None:
            return TypicalAcceptance(wanted.temperature, **typical, top_k=wanted.top_k, top_p=wanted.top_p)
        drawn = hashlib.sha256(" ".join(map(str, (wanted.seed, method.name, *place.key))).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(drawn[:7], "little"))
        return SpeculativeSampling(Sampling(wanted.temperature, wanted.top_k, wanted.top_p), generator)

    def _decode(self, method: Method, place: Place, prompt: Sequence[int]) -> Decoded:
        rows = self._rows(prompt)
        if self.cache is None or self.cache.capacity < rows:
            self.cache = self.target.new_cache(rows, _CACHE_ROUNDING)
        target, limit, rule = self.target, self.evaluation.max_new_tokens, self._rule(method, place)
        return decode(target, method.head, method.template, prompt, limit, target.stop_ids, self.cache, rule=rule)

    def answer(self, method: Method, place: Place, prompt: Sequence[int]) -> TurnLine:
        """One answer, or the record of its failure: a question too long for the context or the memory must not end the
        run."""
        try:
            captured = self.target.recordings
            answer = self._decode(method, place, prompt)
            if self.target.recordings > captured:
                # A graph was captured during this answer; decode it again with the same seed so that the time excludes
                # the capture.
                answer = self._decode(method, place, prompt)
            return self._line(method, place, prompt, answer)
        except (KoalaBenchError, RuntimeError) as error:  # torch reports a lack of memory as a RuntimeError
            self.cache = None
            return failure(method.name, place, prompt, error)

    def _line(self, method: Method, place: Place, prompt: Sequence[int], answer: Decoded) -> TurnLine:
        assert self.target.tokenizer is not None
        text = str(self.target.tokenizer.decode(list(answer.tokens), skip_special_tokens=True))
        static = method.info["tree"] and method.info["tree"]["parents"] is not None
        return {
            **_empty(method.name, place, prompt),
            "new_token_ids": answer.tokens,
            "text": without_end(text, self.target.stop_texts).strip(),
            "stop": answer.stop,
            "accepted": answer.accepted,
            "drafted_depth": answer.drafted_depth,
            "kept_node": answer.kept_node if static else None,
            "prefill_s": answer.prefill_s,
            "draft_prefill_s": answer.draft_prefill_s,
            "decode_s": answer.decode_s,
            "draft_s": answer.draft_s,
            "verify_s": answer.verify_s,
            "distance": sum(answer.distances) / len(answer.distances) if answer.distances else None,
        }

    def compare(self, line: TurnLine, vanilla: TurnLine, prompt: Sequence[int]) -> None:
        """Record the first difference from vanilla's answer, with the target's top-2 logit gap there.

        If one answer is a prefix of the other there are no two tokens to compare, and no gap.
        """
        mine, theirs = line["new_token_ids"] or [], vanilla["new_token_ids"] or []
        pairs = enumerate(zip(mine, theirs, strict=False))
        position = next((index for index, (token, other) in pairs if token != other), None)
        if position is None:
            return
        ids = torch.tensor([*prompt, *theirs[:position]], device=self.target.device)
        logits, _ = self.target.prefill(ids, self.target.new_cache(len(ids)))
        best = logits.double().topk(2).values
        line["first_difference"] = {
            "position": position,
            "token": mine[position],
            "vanilla_token": theirs[position],
            "top2_gap": float(best[0] - best[1]),
        }


def failure(method: str, place: Place, prompt: Sequence[int] | None, error: Exception) -> TurnLine:
    """The line of a turn that failed."""
    message = (str(error).strip().splitlines() or [""])[0]
    return {**_empty(method, place, prompt), "error": {"type": type(error).__name__, "message": message}}


def _empty(method: str, place: Place, prompt: Sequence[int] | None) -> TurnLine:
    """A turn line with its place filled in and nothing else."""
    nothing: dict[str, Any] = dict.fromkeys(TurnLine.__annotations__)
    filled = {
        "kind": "turn",
        "method": method,
        "question_id": place.question.question_id,
        "category": place.question.category,
        "turn": place.turn,
        "repeat": place.repeat,
        "prompt_tokens": None if prompt is None else len(prompt),
    }
    return cast(TurnLine, nothing | filled)
