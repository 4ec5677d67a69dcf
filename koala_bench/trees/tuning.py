"""Tune the draft tree to a head and machine: measured step times, ranks on held-out prompts, and a search over both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from koala_bench.common.markdown import table
from koala_bench.common.progress import progress
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, capacity_for, decode
from koala_bench.engine.target import Target
from koala_bench.engine.timing import seconds_of
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Committed
from koala_bench.tree import DraftTree, Template, TreeShape, TreeTemplate, load_template
from koala_bench.trees.rank_profile import RankProfile, measure_ranks
from koala_bench.trees.search import BestTrees, greedy

_PAST = 128  # committed tokens when a pass is timed
_ROUNDS = 8
_BURST = 4
_TIMED = 40  # prompts whose answers step times are taken from
_SEARCHES = 3


@dataclass(frozen=True)
class StepTimes:
    """Seconds of the parts of a step on this machine.

    Attributes:
        verify: of the target's pass, by number of nodes from 1 on; entry 0 is unused.
        draft: coefficients of a draft: constant, per level, per expanded node.
        around: of the rest of a step, the same for every method.
    """

    verify: np.ndarray[Any, np.dtype[np.float64]]
    draft: tuple[float, float, float]
    around: float

    @property
    def base(self) -> float:
        """A vanilla step."""
        return float(self.verify[1]) + self.around

    def step(self, template: TreeTemplate) -> float:
        """A step with a tree."""
        return float(self.verify[template.nodes] + np.dot(self.draft, _size(template))) + self.around


@dataclass(frozen=True)
class Tuned:
    """One tree.

    Attributes:
        found: name of the search.
        length, speedup: expected on the search prompts, from ranks and from step times relative to vanilla's.
        measured_length, measured_speedup: on held-out prompts that the search did not see, interleaved with vanilla.
    """

    found: str
    template: TreeTemplate
    length: float
    speedup: float
    measured_length: float
    measured_speedup: float


def tune(
    target: Target,
    head: Any,
    usual: Template,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    most: int,
    depth: int,
    widest: int,
) -> list[Tuned]:
    """Search for the fastest tree; returns the trees of both searches and the default one, fastest measured first.

    Args:
        usual: the default tree, compared with if it is static.
        prompts: held-out prompts; two of three are searched on, the others measured on.
        most: nodes of the largest tree, the root included.
        depth, widest: deepest level and number of candidates to consider.

    Raises:
        KoalaBenchError: the head has no candidates to rank, they are never accepted, or the prompts have no answers.
    """
    # Every third, since neighbouring prompts are of one kind.
    others = prompts[2::3] or prompts
    searched = [prompt for place, prompt in enumerate(prompts) if place % 3 != 2]
    profile = measure_ranks(target, head, searched, tokens, depth, widest, most)
    times = measure_steps(target, head, most, profile.depth, widest)

    def by_program(counted: RankProfile) -> Callable[[int, int], list[tuple[int, ...]]]:
        best = BestTrees(counted.conditional(widest), most - 1)
        return lambda nodes, depth: best.best(nodes, depth)[0]

    trees = {
        "dynamic programming": _fastest(profile, times, by_program),
        "greedy": _fastest(profile, times, lambda counted: partial(greedy, counted, widest=widest)),
    }
    if isinstance(usual, TreeTemplate) and usual.nodes <= most:
        trees[f"usual ({usual.name})"] = usual
    templates = list(trees.values())
    # Step times of whole answers: they include how many tokens a head reads at once, and its prompt.
    timed, measured = _measure(target, head, templates, (searched[:_TIMED], others), tokens)
    found = []
    for index, (name, tree) in enumerate(trees.items()):
        length, _ = _expected(profile, times, tree)
        step = timed[index][0] / timed[index][1]  # in vanilla steps
        found.append(Tuned(name, tree, length, length / step, *measured[index]))
    return sorted(found, key=lambda each: -each.measured_speedup)


def _expected(profile: RankProfile, times: StepTimes, template: TreeTemplate) -> tuple[float, float]:
    length = profile.length([path for path in template.paths if len(path) <= profile.depth])
    return length, length * times.base / times.step(template)


def _fastest(
    profile: RankProfile, times: StepTimes, search: Callable[[RankProfile], Callable[[int, int], list[tuple[int, ...]]]]
) -> TreeTemplate:
    """The tree of any size and depth with the most expected tokens per second.

    The first search counts all positions, each later one those at which steps of the best tree so far begin.
    """
    candidates: list[TreeTemplate] = []
    counted = profile
    depths = range(1, profile.depth + 1)
    sizes = [(nodes, depth) for depth in depths for nodes in range(depth, len(times.verify) - 1)]
    for _ in range(_SEARCHES):
        paths_of = search(counted)
        candidates += [TreeTemplate.of("tuned", paths) for nodes, depth in sizes if (paths := paths_of(nodes, depth))]
        if not candidates:
            raise KoalaBenchError(
                "None of the head's best candidates was right anywhere on the held-out prompts.",
                "Train it further, or raise --ranks.",
            )
        best = max(candidates, key=lambda tree: _expected(profile, times, tree)[1])
        candidates, counted = [best], profile.at(profile.steps(best.paths))
    return best


# ------------------------------------------------------------------------------ measuring


@torch.inference_mode()
def measure_steps(target: Target, head: Any, most: int, depth: int, widest: int) -> StepTimes:
    """Time passes over 1 to ``most`` nodes, drafts of several trees, and the rest of a step; interleaved medians."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(target.config.vocab_size, (_PAST,), generator=draw).to(target.device)
    cache = target.new_cache(_PAST + most)
    _, hidden = target.prefill(ids, cache, head.features)
    counts = sorted({1, 2, 3, 4, *range(6, most + 1, 2 if most <= 16 else 4), most} & set(range(1, most + 1)))
    chains = {count: DraftTree(ids[:count].clone(), TreeShape(tuple(range(-1, count - 1)))) for count in counts}
    templates = [load_template(f"chain-{length}") for length in range(1, depth + 1)]
    shapes = [(width, length) for width in (2, 3) for length in (1, 2) if length <= depth]
    templates += [load_template("x".join([str(min(width, widest))] * length)) for width, length in shapes]
    new = Committed(ids[-2:], hidden[-3:-1], len(ids) - 3)
    passes: dict[int, list[float]] = {count: [] for count in counts}
    drafts: dict[str, list[float]] = {template.name: [] for template in templates}
    around: list[float] = []

    def begin(template: Template) -> None:
        head.begin(template, capacity_for(len(ids), 2 * _BURST, template.nodes, target.max_positions))
        head.draft(Committed(ids[1:-2], hidden[:-3], 0, ids[:1]))

    def timed(run: Callable[[], object], between: Callable[[], object]) -> list[float]:
        """A burst of calls with ``between`` before each, so that processor caches hold what they hold in decoding."""
        spent = []
        for _ in range(_BURST):
            between()
            spent.append(seconds_of(target.device, run))
        return spent[1:]

    with progress("step times", _ROUNDS + 1, "rounds") as advance:
        for turn in range(_ROUNDS + 1):
            for count, chain in chains.items():
                begin(templates[0])
                before = partial(head.draft, new) if count > 1 else int  # vanilla drafts nothing between two passes
                passes[count] += timed(partial(target.verify, chain, cache), before)
            for template in templates:
                begin(template)
                after = chains[min(counts, key=lambda count, nodes=template.nodes: abs(count - nodes))]  # type: ignore[misc]
                drafts[template.name] += timed(lambda: head.draft(new), lambda after=after: target.verify(after, cache))  # type: ignore[misc]
            answer = decode(target, Vanilla(), VANILLA_TREE, ids[:16].tolist(), 8, ())
            around.append((answer.decode_s - answer.verify_s) / len(answer.accepted))
            advance(1)
            if not turn:  # the first round warms up
                for each in (*passes.values(), *drafts.values(), around):
                    each.clear()
    verify = np.interp(np.arange(most + 1), counts, [float(np.median(passes[count])) for count in counts])
    sizes = np.asarray([_size(template) for template in templates if isinstance(template, TreeTemplate)])
    spent = np.asarray([float(np.median(drafts[template.name])) for template in templates])
    fitted = np.linalg.lstsq(sizes, spent, rcond=None)[0]
    return StepTimes(verify, (float(fitted[0]), float(fitted[1]), float(fitted[2])), float(np.median(around)))


def _size(template: TreeTemplate) -> tuple[int, int, int]:
    """Regressors of draft time: a constant, levels, and nodes with children besides the root."""
    return 1, template.depth, len(template.shape.inner) - 1


def _measure(
    target: Target, head: Any, templates: Sequence[TreeTemplate], groups: Sequence[Sequence[Sequence[int]]], tokens: int
) -> list[list[tuple[float, float]]]:  # fmt: skip
    """Acceptance length and speedup of each tree on each group of prompts; all trees and vanilla decode every prompt.

    The groups are interleaved evenly, so that drift of the machine affects them alike.
    """
    runs: list[tuple[Any, Template]] = [(Vanilla(), VANILLA_TREE), *((head, template) for template in templates)]
    places = [(number, group, place) for number, group in enumerate(groups) for place in range(len(group))]
    order = sorted((place / len(group), number, group[place]) for number, group, place in places)
    tokens_out, steps, seconds = np.zeros((3, len(groups), len(runs)))
    widest, longest = max(template.nodes for template in templates), max(len(prompt) for _, _, prompt in order)
    cache = target.new_cache(capacity_for(longest, tokens, widest, target.max_positions))
    with progress("decode", (len(order) + 1) * len(runs), "answers") as advance:
        for turn, (_, group, prompt) in enumerate([order[0], *order]):
            for place in range(len(runs)):
                index = (place + turn) % len(runs)
                answer = decode(target, *runs[index], prompt, tokens, target.stop_ids, cache)
                advance(1)
                if turn:  # the first time warms up
                    tokens_out[group, index] += len(answer.tokens) - 1
                    steps[group, index] += len(answer.accepted)
                    seconds[group, index] += answer.decode_s
    lengths, rates = tokens_out / steps, tokens_out / seconds
    return [
        [(float(length[index]), float(rate[index] / rate[0])) for index in range(1, len(runs))]
        for length, rate in zip(lengths, rates, strict=True)
    ]


def in_words(method: str, found: Sequence[Tuned]) -> str:
    """A table in Markdown."""
    headings = (
        "Found by", "Nodes", "Depth", "Length, expected", "measured", "Speedup, expected", "measured", "Apart (%)",
    )  # fmt: skip
    rows = []
    for each in found:
        numbers = (each.length, each.measured_length, each.speedup, each.measured_speedup)
        apart = f"{100 * (each.measured_speedup / each.speedup - 1):+.1f}"
        size = (each.template.nodes, each.template.depth)
        rows.append([each.found, *size, *(f"{number:.2f}" for number in numbers), apart])
    return (
        f"Draft trees of {method}, the fastest first. Expected from ranks on held-out prompts and step times here;"
        f" measured on other such prompts.\n\n{table(headings, rows)}"
    )
