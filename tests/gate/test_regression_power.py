"""The power and the false alarms of the regression gate, by simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from koala_bench.gate import regression
from koala_bench.gate.regression import OVERALL
from koala_bench.records import statistics
from koala_bench.records.reading import read_run
from koala_bench.records.statistics import Array, Totals
from tests.gate.test_regression import ROOT, _key
from tests.support.seed_spread import Spread, read_spread

# Trainings of the table's original heads that differ in their seed alone, on its questions; see seed_spread.py.
SEEDS = ROOT / "results" / "seeds-tiny" / "acceptance.csv"
# Another machine: the record that the noise is taken from has not one of 640 answers changed by rounding; here 2 %, and
# as many steps in which the head's own choice of drafts changes, to the better or to the worse.
ROUNDED = 0.02
PER_CATEGORY = 2  # questions, as in the session `regression`
# Percent: those that something is promised of, and all that a table shows (with -s).
PROMISED, LOSSES = (0.0, 3.0, 5.0), (0.0, 1.0, 2.0, 3.0, 5.0, 10.0)
of_losses = pytest.mark.parametrize(
    "losses", [PROMISED, pytest.param(LOSSES, marks=pytest.mark.exhaustive)], ids=["promised", "all"]
)
TRIALS = 1000
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """What a record says of one method.

    Attributes:
        accepted: how many steps accepted 0, 1, 2 ... drafted tokens, [questions, turns, values].
        spread: standard deviations over trainings of the log acceptance length, of all questions and of one.
    """

    accepted: Array
    spread: Spread

    def steps(self) -> Array:
        return np.asarray(self.accepted.sum(axis=-1))

    def tokens(self) -> Array:
        return self.accepted @ np.arange(1.0, self.accepted.shape[-1] + 1)

    def share(self, loss: float) -> float:
        """The share of steps that has to lose its draft for the acceptance length of all questions to fall by ``loss``
        percent.
        """
        shares, tokens = np.linspace(0, 1, 1001), self.tokens()
        steps = (tokens / (1 + (1 - shares[:, None, None]) * (tokens / self.steps() - 1))).sum(axis=(1, 2))
        return float(np.interp(loss, 100 * (1 - steps[0] / steps), shares))


@dataclass(frozen=True)
class World:
    """Methods by name, and the places of the questions of each category."""

    methods: dict[str, Source]
    categories: list[list[int]]

    def draw(self, generator: np.random.Generator, trials: int) -> Numbers:
        """Questions of each trial, some of every category, [trials, questions]."""
        return np.concatenate(
            [generator.choice(places, size=(trials, PER_CATEGORY)) for places in self.categories], axis=1
        )


@pytest.fixture(scope="module")
def world() -> World:
    """The per-question numbers of a record of four methods and 80 questions."""
    run = read_run(ROOT / "results" / "all-tiny" / "records.jsonl")
    first = sorted((turn for turn in run.turns_of("vanilla") if turn["turn"] == 0), key=_key)
    categories = {
        category: [i for i, turn in enumerate(first) if turn["category"] == category]
        for category in {turn["category"] for turn in first}
    }

    def accepted(method: str) -> Array:
        turns = [turn["accepted"] or [] for turn in sorted(run.turns_of(method), key=_key)]
        values = max(max(accepted) for accepted in turns) + 1
        return np.array([np.bincount(accepted, minlength=values) for accepted in turns], dtype=float).reshape(
            len(first), 2, values
        )

    methods = {name: Source(accepted(name), spread) for name, spread in read_spread(SEEDS).items()}
    return World(methods, [categories[name] for name in sorted(categories)])


def together(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    return np.sum([part[0] for part in parts], axis=0), np.sum([part[1] for part in parts], axis=0)


def totalled(part: tuple[Array, Array]) -> Totals:
    """Tokens and steps of all trials at once, [trials, questions], as the statistics want them."""
    tokens, steps = part[0].T, part[1].T
    return Totals(tuple(range(len(tokens))), tokens, steps, steps)


def steps_after(source: Source, chosen: Numbers, share: float, rounded: float, generator: np.random.Generator) -> Array:
    """Steps per turn when a share of the steps loses its draft and rounding changes some both ways, [trials, questions,
    turns].

    The steps that keep their draft are the record's own; what the others lost takes further steps.
    """
    accepted, values = source.accepted[chosen].astype(int), np.arange(source.accepted.shape[-1])
    lost = (generator.binomial(accepted, min(1.0, share + rounded)) - generator.binomial(accepted, rounded)) @ values
    rate = 1 + (1 - share) * (source.tokens()[chosen] / source.steps()[chosen] - 1)
    return source.steps()[chosen] + np.floor(lost / rate + generator.random(lost.shape))


def fixed(world: World, losses: dict[str, float], rounded: float, seed: int) -> Array:
    """Lower ends of the changes of each trial, one column per verdict: the record's own steps against those after a
    loss.
    """
    generator = np.random.default_rng(seed)
    chosen = world.draw(generator, TRIALS)
    # An answer that the target gives otherwise is left out, and so is the turn after it.
    kept = np.logical_and.accumulate(generator.random((*chosen.shape, 2)) >= rounded, axis=2)
    old, new = [], []
    for name, source in world.methods.items():
        tokens, after = (
            source.tokens()[chosen],
            steps_after(source, chosen, source.share(losses[name]), rounded, generator),
        )
        old.append(((tokens * kept).sum(axis=2), (source.steps()[chosen] * kept).sum(axis=2)))
        new.append(((tokens * kept).sum(axis=2), (after * kept).sum(axis=2)))
    weights = statistics.resample_weights(chosen.shape[1], resamples=999)
    pairs = zip([*new, together(new)], [*old, together(old)], strict=True)
    changes = [regression.length_change(totalled(n), totalled(o)) for n, o in pairs]
    return np.stack([statistics.interval_ends(change, weights, regression.CONFIDENCE)[0] for change in changes], axis=1)


def retrained(world: World, losses: dict[str, float], seeds: tuple[int, int], seed: int) -> tuple[Array, Array]:
    """Lower ends and margins in force of each trial, one column per verdict: (baseline, new) trainings on the same
    questions.
    """
    generator = np.random.default_rng(seed)
    chosen = world.draw(generator, TRIALS)
    sides: list[list[tuple[Array, Array]]] = [[], []]
    for name, source in world.methods.items():
        tokens, steps = source.tokens()[chosen].sum(axis=2), source.steps()[chosen].sum(axis=2)
        for side, share, count in zip(sides, (0.0, source.share(losses[name])), seeds, strict=True):
            moved_by = generator.normal(0, source.spread.between, (count, TRIALS, 1))
            moved_by = moved_by + generator.normal(0, source.spread.interaction, (count, *tokens.shape))
            rate = np.maximum(1.0, (1 + (1 - share) * (tokens / steps - 1)) * np.exp(moved_by))
            side.append((np.broadcast_to(tokens, rate.shape), np.ceil(tokens / rate)))
    found = []
    for old, new in zip(*([*side, together(side)] for side in sides), strict=True):
        before, after = ((part[0].sum(axis=2) / part[1].sum(axis=2)).T for part in (old, new))
        found.append(regression.retrained_change(after, before, regression.MARGIN, len(world.methods) + 1))
    return np.stack([each.low for each in found], axis=1), np.stack([each.margin for each in found], axis=1)


def scenarios(world: World, losses: Sequence[float]) -> dict[tuple[str, float], dict[str, float]]:
    """The losses of every method, by who loses and how much."""
    found = {("all", loss): dict.fromkeys(world.methods, loss) for loss in losses}
    return found | {
        (name, loss): {**dict.fromkeys(world.methods, 0.0), name: loss} for name in world.methods for loss in losses[1:]
    }


def alarms(world: World, fired: dict[tuple[str, float], NDArray[np.bool_]]) -> dict[tuple[str, float], float]:
    """How many of 100 checks fire: when all methods lose, and when the one does that is harder to find."""
    share = {place: 100 * float(each.any(axis=1).mean()) for place, each in fired.items()}
    losses = [loss for who, loss in fired if who == "all"]
    share |= {("one", loss): min(share[name, loss] for name in world.methods) for loss in losses[1:]}
    return share | {("one", 0.0): share["all", 0.0]}


def show(title: str, found: dict[tuple[str, float], float]) -> None:
    print(
        f"{title}: alarms in 100 checks at a true loss of "
        + "  ".join(
            f"{loss:g} %: {each:.1f} / {found['one', loss]:.1f}" for (who, loss), each in found.items() if who == "all"
        )
    )


@of_losses
@pytest.mark.parametrize("rounded", [0.0, ROUNDED], ids=["same machine", "other machine"])
def test_simulated_power_and_false_alarms_of_fixed_checkpoints(
    world: World, rounded: float, losses: Sequence[float]
) -> None:
    lows = {place: fixed(world, each, rounded, seed=1) for place, each in scenarios(world, losses).items()}
    for margin in sorted({1.0, 2.0, regression.MARGIN, 4.0}):
        found = alarms(world, {place: low < -margin for place, low in lows.items()})
        show(f"fixed, {rounded:.0%} rounded otherwise, margin {margin:g} % (all methods lose / one alone)", found)
        if margin == regression.MARGIN:
            assert found["all", 0.0] <= 1
            assert min(found["all", 5.0], found["one", 5.0]) >= 95
            assert found["one", 3.0] >= 85


@of_losses
@pytest.mark.parametrize(
    ("seeds", "power_all", "power_one"),
    [((5, 1), 0, 0), ((5, 5), 95, 80), ((8, 4), 95, 95), ((12, 6), 95, 95), ((10, 10), 95, 95)],
)
def test_simulated_power_and_false_alarms_of_retrained_heads(
    world: World, seeds: tuple[int, int], power_all: float, power_one: float, losses: Sequence[float]
) -> None:
    tests = {place: retrained(world, each, seeds, seed=2) for place, each in scenarios(world, losses).items()}
    found = alarms(world, {place: low < -margin for place, (low, margin) in tests.items()})
    margins = np.median(tests["all", 0.0][1], axis=0)
    names = ", ".join(f"{name} {margin:.1f} %" for name, margin in zip([*world.methods, OVERALL], margins, strict=True))
    show(
        f"retrained, {seeds[1]} against {seeds[0]} seeds (all methods lose / one alone; median margins {names})", found
    )
    # Promised is 1; with the smallest samples the promise is only just kept, and 1,000 checks count 1 as up to 2.
    assert found["all", 0.0] <= (1 if power_all else 2)
    assert found["all", 5.0] >= power_all
    assert found["one", 5.0] >= power_one
