"""Vanilla decoding against transformers' ``generate``, interleaved on the same prompts: is our baseline fair?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import GenerationConfig

from koala_bench.common.progress import progress
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, capacity_for, decode
from koala_bench.engine.target import Target
from koala_bench.engine.timing import synchronise


@dataclass(frozen=True)
class Comparison:
    """Times of the same answers by both.

    Attributes:
        vanilla_tokens_per_s, generate_tokens_per_s: medians over prompts and rounds, prefill included.
        ratio: median over pairs of generate's time by ours; above 1, ours is faster.
        lowest, highest: quartiles of the ratio.
        equal: answers with the same tokens, of ``answers``.
    """

    vanilla_tokens_per_s: float
    generate_tokens_per_s: float
    ratio: float
    lowest: float
    highest: float
    equal: int
    answers: int


def _generate(target: Target, ids: torch.Tensor, tokens: int) -> list[int]:
    config = GenerationConfig(do_sample=False, max_new_tokens=tokens, pad_token_id=0, use_cache=True)
    # generate() fills what is unset from the model's own configuration, the end-of-sequence token among it.
    own, target.model.generation_config = target.model.generation_config, config
    try:
        with torch.inference_mode():
            out = target.model.generate(ids[None], attention_mask=torch.ones_like(ids[None]))
    finally:
        target.model.generation_config = own
    return list(out[0, len(ids) :].tolist())


def compare_with_generate(target: Target, prompts: Sequence[Sequence[int]], tokens: int, rounds: int) -> Comparison:
    """Time both on every prompt in turn, ``rounds`` times, each answer exactly ``tokens`` long."""
    target = replace(target, stop_texts=())  # both go on to the last token
    longest = max(len(prompt) for prompt in prompts)
    cache = target.new_cache(capacity_for(longest, tokens, 1, target.max_positions))
    times: dict[str, list[float]] = {"vanilla": [], "generate": []}
    equal = 0
    with progress("benchmark", rounds * len(prompts), "prompts") as advance:
        for turn in range(-1, rounds):  # the first pass warms up
            for place, prompt in enumerate(prompts if turn >= 0 else prompts[:1]):
                ids = torch.tensor(prompt, device=target.device)
                answers: dict[str, list[int]] = {}
                for name in ("vanilla", "generate") if (turn + place) % 2 else ("generate", "vanilla"):
                    synchronise(target.device)
                    started = time.perf_counter()
                    if name == "vanilla":
                        answers[name] = decode(target, Vanilla(), VANILLA_TREE, prompt, tokens, (), cache).tokens
                    else:
                        answers[name] = _generate(target, ids, tokens)
                    synchronise(target.device)
                    if turn >= 0:
                        times[name].append(time.perf_counter() - started)
                if turn >= 0:
                    equal += answers["vanilla"] == answers["generate"]
                    advance()
    ratios = [theirs / ours for ours, theirs in zip(times["vanilla"], times["generate"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    vanilla, generate = (tokens / statistics.median(times[name]) for name in ("vanilla", "generate"))
    return Comparison(vanilla, generate, middle, low, high, equal, len(ratios))
