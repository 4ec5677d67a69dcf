"""Latencies of steps, verifications and drafts on a device, with random weights of the papers' shapes.

Hardly any drafted token is accepted then, which does not change the time of a step.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

from koala_bench.common.progress import progress
from koala_bench.costs.bandwidth import weight_bytes
from koala_bench.costs.scaling import StepCost, step_costs
from koala_bench.decoding.loop import VANILLA_TREE, Decoded, Vanilla, capacity_for, decode
from koala_bench.engine.devices import Engine
from koala_bench.engine.shapes import llama
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import MethodPreset
from koala_bench.training.loop import build_head
from koala_bench.tree import Template, load_template

_PROMPT = 256  # tokens behind which everything is measured
_GIB = 1 << 30


@dataclass(frozen=True)
class MethodCost:
    """One method's step, from answers interleaved with vanilla's; seconds are medians over answers."""

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
        bytes_per_token: that a vanilla step must read at least: the weights, of the input embedding only a row, and the
            cache's rows in the middle of an answer.
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


def random_model(size: str, device: torch.device, dtype: torch.dtype) -> Target:
    """A target of a shape out of ``SHAPES`` with weights as transformers draws them. Raises KoalaBenchError where it
    does not fit into the memory that is free."""
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
    name, fixed = f"llama-{size}, random weights", device.type == "cuda"
    return Target(name, model, None, device, dtype, config.max_position_embeddings, fixed=fixed)


def model_cost(
    target: Target,
    size: str,
    methods: dict[str, tuple[MethodPreset, str]],
    nodes: Sequence[int],
    tokens: int,
    rounds: int,
) -> ModelCost:
    """Measure vanilla steps, verifications and methods, interleaved where compared.

    Args:
        methods: by name, each with its tree.
        nodes: sizes of the chains whose verification is timed.
        tokens: length of each answer; ``rounds`` answers are timed of each method.
    """
    steps = step_costs(target, (_PROMPT,), nodes, rounds)
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, target.config.vocab_size, (_PROMPT,), generator=draw).tolist()
    found = [_method_cost(target, name, *each, prompt, tokens, rounds) for name, each in methods.items()]
    config = target.config
    row = 2 * target.layers * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    bytes_per_token = weight_bytes(target) + target.dtype.itemsize * row * (_PROMPT + tokens // 2)
    alone = [] if found else map(_step_s, _answers(target, [(Vanilla(), VANILLA_TREE)], prompt, tokens, rounds)[0])
    vanilla = statistics.median([each.vanilla_s for each in found] or alone)
    return ModelCost(size, target.engine, target.parameters, bytes_per_token, vanilla, tuple(steps), tuple(found))


def _answers(
    target: Target, runs: Sequence[tuple[Any, Template]], prompt: list[int], tokens: int, rounds: int
) -> list[list[Decoded]]:
    """Answers of each head, in turn; a first round, which warms up, records and captures, is left out."""
    widest = max(template.nodes for _, template in runs)
    cache = target.new_cache(capacity_for(len(prompt), tokens, widest, target.max_positions))
    turns = []
    with progress(f"{target.name}, {target.engine}", rounds + 1, "answers") as advance:
        for _ in range(rounds + 1):
            turns.append([decode(target, head, template, prompt, tokens, (), cache) for head, template in runs])
            advance()
    return [list(answers) for answers in zip(*turns[1:], strict=True)]


def _method_cost(
    target: Target, name: str, preset: MethodPreset, tree: str, prompt: list[int], tokens: int, rounds: int
) -> MethodCost:
    template: Template = load_template(tree)
    # Its recordings are a target's of its own, so that their weights go when the head goes.
    with target.device:  # where numbers for a large head are drawn soonest
        head = build_head(replace(target), preset, seed=0).to(target.dtype).eval()
    runs = [(Vanilla(), VANILLA_TREE), (head, template)]
    vanilla, own = _answers(target, runs, prompt, tokens, rounds)
    cost = MethodCost(
        name, preset.head, preset.layers, preset.objective, tree, template.nodes, template.depth,
        statistics.median(map(_step_s, own)),
        statistics.median(answer.draft_s / len(answer.accepted) for answer in own),
        statistics.median(answer.verify_s / len(answer.accepted) for answer in own),
        statistics.median(map(_step_s, vanilla)),
    )  # fmt: skip
    del head, runs
    gc.collect()
    if target.device.type == "cuda":
        torch.cuda.empty_cache()
    return cost


def _step_s(answer: Decoded) -> float:
    return answer.decode_s / len(answer.accepted)
