"""Profile of a decoding step: drafting, the model's pass, the harness around it, and device reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from koala_bench.common.markdown import table
from koala_bench.common.progress import progress
from koala_bench.costs.bandwidth import weight_bytes
from koala_bench.decoding.loop import Decoded, capacity_for, decode
from koala_bench.engine.cache import TreeCache
from koala_bench.engine.target import Target
from koala_bench.engine.timing import Stopwatch
from koala_bench.evaluation.methods import Method

PARTS = ("draft", "model", "verify", "accept", "commit", "rest")
# Calls that synchronise the host with the device.
_READS = frozenset({"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"})


@dataclass(frozen=True)
class Profile:
    """One method's steps.

    Attributes:
        steps, tokens: of all answers, without the first token of each.
        seconds: of all steps by part, see ``PARTS``: ``model`` is the target's decoder and output layer, ``verify`` the
            rest of its pass.
        reads: device reads per step.
    """

    method: str
    steps: int
    tokens: int
    seconds: dict[str, float]
    reads: float

    @property
    def step_ms(self) -> float:
        """Milliseconds of a step."""
        return 1000 * sum(self.seconds.values()) / self.steps

    @property
    def outside(self) -> float:
        """Share of a step that is neither drafting nor the model's own pass."""
        return 1 - (self.seconds["draft"] + self.seconds["model"]) / sum(self.seconds.values())


_TRIES = 4  # answers until one needs no new trace


@dataclass(frozen=True)
class _Watched(Target):
    """A target that times the model's own part of each verification, with the traces of ``inner``."""

    inner: Any = None
    watch: Any = None

    @classmethod
    def of(cls, target: Target) -> _Watched:
        known = {each.name: getattr(target, each.name) for each in fields(Target) if each.init}
        return cls(**known, inner=target, watch=Stopwatch(target.device))

    @property
    def greedy_read(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:  # captured by the target before
        read: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = self.inner.greedy_read
        return read

    def run(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.watch.mark("between")
        found: tuple[torch.Tensor, torch.Tensor] = self.inner.run(*arguments)
        self.watch.mark("model")
        return found


class _Counter(TorchFunctionMode):
    """Counts reads from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in _READS
        return func(*args, **(kwargs or {}))


def profile(target: Target, methods: Sequence[Method], prompts: Sequence[Sequence[int]], tokens: int) -> list[Profile]:
    """Answer every prompt with every method in turn, greedily, and split the time of the steps.

    Args:
        tokens: length of every answer; end-of-sequence tokens do not end it.
    """
    longest, widest = max(map(len, prompts)), max(method.template.nodes for method in methods)
    cache = target.new_cache(capacity_for(longest, tokens, widest, target.max_positions))
    seconds = {method.name: dict.fromkeys(PARTS, 0.0) for method in methods}
    steps = dict.fromkeys(seconds, 0)
    produced = dict.fromkeys(seconds, 0)
    with progress("profile", len(methods) * (len(prompts) + 1), "answers") as advance:
        for turn, prompt in enumerate([prompts[0], *prompts]):  # the first pass warms up
            for place in range(len(methods)):
                method = methods[(place + turn) % len(methods)]
                watched, answer = _answer(target, method, prompt, tokens, cache)
                advance(1, method.name)
                if not turn:
                    continue
                model = watched.watch.seconds().get("model", 0.0)
                own = {**answer.parts_s, "model": model, "verify": answer.verify_s - model}
                for part in PARTS:
                    seconds[method.name][part] += own.get(part, 0.0)
                steps[method.name] += len(answer.accepted)
                produced[method.name] += len(answer.tokens) - 1
    reads = {method.name: _reads(target, method, prompts[0], tokens, cache) for method in methods}
    return [Profile(name, steps[name], produced[name], seconds[name], reads[name]) for name in seconds]


def _answer(
    target: Target, method: Method, prompt: Sequence[int], tokens: int, cache: TreeCache
) -> tuple[_Watched, Decoded]:
    """An answer during which nothing was traced; where something was, the answer is decoded again."""
    for _ in range(_TRIES):
        known, watched = target.recordings, _Watched.of(target)
        answer = decode(watched, method.head, method.template, prompt, tokens, (), cache)
        if target.recordings == known:
            break
    return watched, answer


def _reads(target: Target, method: Method, prompt: Sequence[int], tokens: int, cache: TreeCache) -> float:
    """Reads per step: those of an answer minus those of the prefill."""
    counts, steps = [], 0
    for length in (1, tokens):
        with _Counter() as counter:
            steps = len(decode(target, method.head, method.template, prompt, length, (), cache).accepted)
        counts.append(counter.count)
    return (counts[1] - counts[0]) / steps


def machine_in_words(target: Target) -> str:
    """Machine, target and engine, for the top of a report."""
    threads = torch.get_num_threads()
    device = f"{threads} CPU thread{'s' if threads > 1 else ''}"
    if target.device.type == "cuda":
        device = torch.cuda.get_device_name(target.device)
    return f"{device}, target {target.name} in {str(target.dtype).removeprefix('torch.')}, engine {target.engine}"


def in_words(profiles: Sequence[Profile], target: Target, bytes_per_s: float) -> str:
    """A table in Markdown.

    Args:
        bytes_per_s: memory bandwidth, measured beside the profiles.
    """
    headings = (
        "Method", "Tokens a step", "Step", "Draft", "Model's pass", "Around it", "Accept", "Commit", "Rest",
        "Outside of draft and model (%)", "Reads a step", "Model's pass, of the memory's rate (%)",
    )  # fmt: skip
    weights, rows = weight_bytes(target), []
    for each in profiles:
        parts = (f"{1000 * each.seconds[part] / each.steps:.3f}" for part in PARTS)
        step = (f"{each.tokens / each.steps:.2f}", f"{each.step_ms:.2f}")
        rate = weights * each.steps / each.seconds["model"]
        shares = (f"{100 * each.outside:.1f}", f"{each.reads:.1f}", f"{100 * rate / bytes_per_s:.0f}")
        rows.append([each.method, *step, *parts, *shares])
    limit = (
        f"A pass reads {weights / 1e6:.1f} MB of weights, {1000 * weights / bytes_per_s:.2f} ms at the memory's rate,"
        f" {bytes_per_s / 1e9:.1f} GB/s, the highest of copies and sums before and after. Above 100 % they come from"
        " the processor's cache."
    )
    return f"Milliseconds of a decoding step on {machine_in_words(target)}.\n\n{table(headings, rows)}\n\n{limit}"
