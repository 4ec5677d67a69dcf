"""Our loop against transformers' ``generate``, plain and assisted, interleaved on the same prompts: is it fair?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig

from koala_bench.common.markdown import table
from koala_bench.common.progress import progress
from koala_bench.decoding.loop import capacity_for, decode
from koala_bench.engine.target import Target
from koala_bench.engine.timing import synchronise
from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.methods import Method

GENERATE = "generate"


@dataclass(frozen=True)
class DecoderSpeed:
    """One decoder's times of all answers.

    Attributes:
        name: a method's, ``generate``, or ``generate, METHOD`` for assisted generation with that method's drafts.
        tokens_per_s: median over prompts and rounds, prefill included.
        ratio: median over pairs of ``generate``'s time by this one's; above 1, this one is faster.
        lowest, highest: quartiles of the ratio.
        equal: answers with ``generate``'s tokens, of ``answers``.
    """

    name: str
    tokens_per_s: float
    ratio: float
    lowest: float
    highest: float
    equal: int
    answers: int


def _generate(target: Target, ids: torch.Tensor, tokens: int, assistance: Mapping[str, Any]) -> list[int]:
    """Greedy tokens by transformers.

    Args:
        assistance: arguments of ``generate`` that choose its drafts; empty for plain decoding.
    """
    config = GenerationConfig(do_sample=False, max_new_tokens=tokens, pad_token_id=0, use_cache=True)
    # generate() takes unset options, such as the end-of-sequence token, from the model's own configuration.
    own, target.model.generation_config = target.model.generation_config, config
    try:
        with torch.inference_mode():
            out = target.model.generate(ids[None], attention_mask=torch.ones_like(ids[None]), **assistance)
    finally:
        target.model.generation_config = own
    return list(out[0, len(ids) :].tolist())


def compare_with_generate(
    target: Target, methods: Sequence[Method], prompts: Sequence[Sequence[int]], tokens: int, rounds: int
) -> list[DecoderSpeed]:
    """Time every decoder on every prompt in turn, ``rounds`` times, each answer exactly ``tokens`` long.

    A head whose drafts transformers can make too says so: ``assisted(depth)`` gives the arguments of ``generate`` that
    draft likewise, ``depth`` tokens at a time. Its method then has a second line.

    Returns:
        ``generate`` first, then the methods in their order.

    Raises:
        KoalaBenchError: the prompts and answers do not fit the target.
    """
    target = replace(target, stop_texts=())  # all go on to the last token
    longest, widest = max(len(prompt) for prompt in prompts), max(method.template.nodes for method in methods)
    if longest + tokens > target.max_positions:
        raise KoalaBenchError(
            f"A prompt of {longest} tokens and {tokens} more exceed the target's {target.max_positions} positions.",
            "Choose fewer --tokens.",
        )
    cache = target.new_cache(capacity_for(longest, tokens, widest, target.max_positions))
    decoders: dict[str, Callable[[Sequence[int]], list[int]]] = {}

    def by_transformers(**assistance: Any) -> Callable[[Sequence[int]], list[int]]:
        return lambda prompt: _generate(target, torch.tensor(prompt, device=target.device), tokens, assistance)

    def by_us(method: Method) -> Callable[[Sequence[int]], list[int]]:
        return lambda prompt: decode(target, method.head, method.template, prompt, tokens, (), cache).tokens

    decoders[GENERATE] = by_transformers()
    for method in methods:
        decoders[method.name] = by_us(method)
        if (assisted := getattr(method.head, "assisted", None)) is not None:
            decoders[f"{GENERATE}, {method.name}"] = by_transformers(**assisted(method.template.depth))

    names = list(decoders)
    times: dict[str, list[float]] = {name: [] for name in names}
    equal = dict.fromkeys(names, 0)
    with progress("benchmark", rounds * len(prompts), "prompts") as advance:
        for turn in range(-1, rounds):  # the first pass warms up
            for place, prompt in enumerate(prompts if turn >= 0 else prompts[:1]):
                answers: dict[str, list[int]] = {}
                first = (turn + place) % len(names)
                for name in names[first:] + names[:first]:
                    synchronise(target.device)
                    started = time.perf_counter()
                    answers[name] = decoders[name](prompt)
                    synchronise(target.device)
                    if turn >= 0:
                        times[name].append(time.perf_counter() - started)
                if turn >= 0:
                    for name in names:
                        equal[name] += answers[name] == answers[GENERATE]
                    advance()
    return [_speed(name, times[name], times[GENERATE], tokens, equal[name]) for name in names]


def _speed(name: str, own: Sequence[float], generate: Sequence[float], tokens: int, equal: int) -> DecoderSpeed:
    ratios = [theirs / ours for ours, theirs in zip(own, generate, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return DecoderSpeed(name, tokens / statistics.median(own), middle, low, high, equal, len(own))


def in_words(speeds: Sequence[DecoderSpeed], tokens: int) -> str:
    """The table of all decoders in Markdown."""
    rows = [
        [
            speed.name,
            f"{speed.tokens_per_s:.1f}",
            f"{speed.ratio:.2f} [{speed.lowest:.2f}, {speed.highest:.2f}]",
            f"{speed.equal}/{speed.answers}",
        ]
        for speed in speeds
    ]
    head = ["Decoder", "Tokens/s", "Times generate's speed [quartiles]", "Answers equal to generate's"]
    return f"Answers of {tokens} tokens, prefills included, decoders in turn:\n\n{table(head, rows)}"
