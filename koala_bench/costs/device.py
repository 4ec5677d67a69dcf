"""What decoding costs on a device, measured with random weights: steps, verifications and drafts of models of the
papers' shapes.

With random weights hardly a drafted token is accepted, which does not change what a step takes. So this gives
latencies, and what acceptance length a method needs for them to pay; it says nothing about the acceptance length that a
trained head reaches.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

from koala_bench.common.progress import progress
from koala_bench.costs.scaling import StepCost, step_costs
from koala_bench.decoding.loop import VANILLA_TREE, Decoded, Vanilla, capacity_for, decode
from koala_bench.engine.devices import Engine
from koala_bench.engine.shapes import llama
from koala_bench.engine.target import Target
from koala_bench.engine.timing import seconds_of
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import MethodPreset
from koala_bench.training.loop import build_head
from koala_bench.tree import Template, load_template

_PROMPT = 256  # tokens behind which everything is measured
_COPIES = 20
_GIB = 1 << 30


@dataclass(frozen=True)
class MethodCost:
    """One method's step, from answers interleaved with vanilla's.

    Attributes:
        head: name of its head; ``layers`` how many layers it has, ``objective`` what it is trained with on top of its
            own loss.
        nodes, depth: of its tree.
        step_s, draft_s, verify_s: seconds of a step and of two of its parts, medians over answers.
        vanilla_s: seconds of vanilla's step in the answers between.
    """

    method: str
    head: str
    layers: int
    objective: str | None
    tree: str
    nodes: int
    depth: int
    step_s: float
    draft_s: float
    verify_s: float
    vanilla_s: float

    @property
    def break_even(self) -> float:
        """Acceptance length at which the method is as fast as vanilla."""
        return self.step_s / self.vanilla_s


@dataclass(frozen=True)
class ModelCost:
    """What one model costs with one engine.

    Attributes:
        parameters: of the model.
        bytes_per_token: that a vanilla step must read at least: the weights, of the input embedding only a row, and the
            cache's rows in the middle of an answer.
        vanilla_s: seconds of a vanilla step.
        steps: verifications of chains of different lengths.
    """

    size: str
    engine: Engine
    parameters: int
    bytes_per_token: int
    vanilla_s: float
    steps: tuple[StepCost, ...]
    methods: tuple[MethodCost, ...]

    def verification(self, nodes: int) -> float | None:
        """A verification in vanilla ones; None if it was not measured."""
        times = {each.nodes: each.step_s for each in self.steps}
        return times[nodes] / times[1] if nodes in times and 1 in times else None


@dataclass(frozen=True)
class Bandwidth:
    """What a device's memory was measured to do, in bytes a second.

    Attributes:
        copied: read and written in a copy, both counted.
        read: read in a sum.
    """

    copied: float
    read: float

    @property
    def most(self) -> float:
        """The higher of both, against which decoding is held: it reads far more than it writes."""
        return max(self.copied, self.read)


def bandwidth(device: torch.device, size: int) -> Bandwidth:
    """Copy and sum up ``size`` bytes, several times; the medians."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)

    def rate(moved: int, run: Callable[[], object]) -> float:
        return moved / statistics.median([seconds_of(device, run) for _ in range(_COPIES + 2)][2:])

    return Bandwidth(rate(2 * size, lambda: target.copy_(source)), rate(size, source.sum))


def random_model(size: str, device: torch.device, dtype: torch.dtype) -> Target:
    """A target of a shape out of ``SHAPES`` with weights as transformers draws them.

    Raises:
        KoalaBenchError: it does not fit into the memory that is free.
    """
    config = llama(size)
    with torch.device("meta"):
        needed = sum(each.numel() for each in AutoModelForCausalLM.from_config(config).parameters()) * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > 0.95 * free:
        raise KoalaBenchError(
            f"A model of {size} needs {needed / _GIB:.1f} GiB, {free / _GIB:.1f} are free.",
            "Measure smaller ones with --sizes.",
        )
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    return Target(
        f"llama-{size}, random weights",
        model,
        None,
        device,
        dtype,
        config.max_position_embeddings,
        fixed=device.type == "cuda",
    )


def model_cost(
    target: Target,
    size: str,
    methods: dict[str, tuple[MethodPreset, str]],
    nodes: Sequence[int],
    tokens: int,
    rounds: int,
) -> ModelCost:
    """Measure vanilla steps, verifications and methods; what is compared is interleaved.

    Args:
        methods: by name, each with its tree.
        nodes: sizes of the chains whose verification is timed.
        tokens: length of each answer; ``rounds`` answers are timed of each method.
    """
    steps = step_costs(target, (_PROMPT,), nodes, rounds)
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, target.config.vocab_size, (_PROMPT,), generator=draw).tolist()
    found = [
        _method_cost(target, name, preset, tree, prompt, tokens, rounds) for name, (preset, tree) in methods.items()
    ]
    weights = target.parameters - target.model.get_input_embeddings().weight.numel()
    config = target.config
    row = 2 * target.layers * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    bytes_per_token = target.dtype.itemsize * (weights + row * (_PROMPT + tokens // 2))
    vanilla = statistics.median(each.vanilla_s for each in found) if found else _vanilla(target, prompt, tokens, rounds)
    return ModelCost(size, target.engine, target.parameters, bytes_per_token, vanilla, tuple(steps), tuple(found))


def _vanilla(target: Target, prompt: list[int], tokens: int, rounds: int) -> float:
    cache = target.new_cache(capacity_for(len(prompt), tokens, 1, target.max_positions))
    return statistics.median(
        [_step_s(decode(target, Vanilla(), VANILLA_TREE, prompt, tokens, (), cache)) for _ in range(rounds + 1)][1:]
    )


def _method_cost(
    target: Target, name: str, preset: MethodPreset, tree: str, prompt: list[int], tokens: int, rounds: int
) -> MethodCost:
    template: Template = load_template(tree)
    # Its recordings are a target's of its own, so that their weights go when the head goes.
    with target.device:  # where numbers for a large head are drawn soonest
        head = build_head(replace(target), preset, seed=0).to(target.dtype).eval()
    cache = target.new_cache(capacity_for(len(prompt), tokens, template.nodes, target.max_positions))
    runs: tuple[list[Decoded], list[Decoded]] = ([], [])
    with progress(f"{target.name}, {target.engine}, {name}", rounds + 1, "answers") as advance:
        for turn in range(rounds + 1):  # the first warms up, records and captures
            for place, (own, shape) in enumerate(((Vanilla(), VANILLA_TREE), (head, template))):
                answer = decode(target, own, shape, prompt, tokens, (), cache)  # type: ignore[arg-type]
                if turn:
                    runs[place].append(answer)
            advance()
    steps = [len(answer.accepted) for answer in runs[1]]
    cost = MethodCost(
        name, preset.head, preset.layers, preset.objective, tree, template.nodes, template.depth,
        statistics.median(map(_step_s, runs[1])),
        statistics.median(answer.draft_s / count for answer, count in zip(runs[1], steps, strict=True)),
        statistics.median(answer.verify_s / count for answer, count in zip(runs[1], steps, strict=True)),
        statistics.median(map(_step_s, runs[0])),
    )  # fmt: skip
    del head
    gc.collect()
    if target.device.type == "cuda":
        torch.cuda.empty_cache()
    return cost


def _step_s(answer: Decoded) -> float:
    return answer.decode_s / len(answer.accepted)
