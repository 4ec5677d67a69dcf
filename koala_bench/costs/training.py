"""What training several heads from one stream saves against training each alone: the target is asked once for all of
them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from koala_bench.common.process_group import Team
from koala_bench.common.progress import progress
from koala_bench.dialogues.streams import Stream
from koala_bench.engine.target import Target
from koala_bench.engine.timing import synchronise
from koala_bench.presets import Preset
from koala_bench.training.features import features_of_each
from koala_bench.training.loop import make_arm
from koala_bench.training.precision import resolve
from koala_bench.training.step import Arm, Features, train_step


@dataclass(frozen=True)
class TrainingSpeed:
    """Seconds of a step, medians over the same batches.

    Attributes:
        together: all heads from one stream.
        target: of that, the target's own pass.
        alone: each head from a stream of its own.
        tokens: of a step, mean.
    """

    together: float
    target: float
    alone: dict[str, float]
    tokens: float

    @property
    def ratio(self) -> float:
        """Time of training all together over the sum of training each alone."""
        return self.together / sum(self.alone.values())


def training_speed(preset: Preset, names: Sequence[str], target: Target, stream: Stream, steps: int) -> TrainingSpeed:
    """Take the same steps with all heads at once and with each by itself, in turn.

    Args:
        names: of the methods.
        target: one that calls its model, see ``Target.engine``.
        steps: to time; two more come first to warm up.
    """
    options = preset.training
    AcceleratorState._reset_state()  # as in ``train``
    accelerator, team = (
        Accelerator(mixed_precision=resolve(options.precision, target.device), cpu=target.device.type == "cpu"),
        Team(),
    )
    groups: dict[str, list[Arm]] = {"": [make_arm(target, name, preset.method(name), options) for name in names]}
    groups |= {name: [make_arm(target, name, preset.method(name), options)] for name in names}
    spent: dict[str, list[float]] = {name: [] for name in groups}
    asked: list[float] = []
    tokens: list[int] = []
    with progress("training", steps + 2, "steps") as advance:
        for step in range(steps + 2):
            batch = stream.batch(step)
            tokens.append(int(batch.lengths.sum()))
            for name, arms in groups.items():
                synchronise(target.device)
                started = time.perf_counter()
                features = features_of_each(target, batch, (arm.head.features for arm in arms), seed=step)
                synchronise(target.device)
                between = time.perf_counter()
                train_step(
                    accelerator, arms, [partial(_the_same, features)], options, 1e-3, step + options.steps // 2, team
                )
                synchronise(target.device)
                if step >= 2:
                    spent[name].append(time.perf_counter() - started)
                    asked += [between - started] if not name else []
            advance(1)
    together, *alone = (statistics.median(each) for each in spent.values())
    return TrainingSpeed(
        together, statistics.median(asked), dict(zip(names, alone, strict=True)), statistics.mean(tokens[2:])
    )


def _the_same(features: Features) -> Features:
    return features


def in_words(speed: TrainingSpeed) -> str:
    """One sentence."""
    alone = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in speed.alone.items())
    return (
        f"A training step of {len(speed.alone)} heads together takes {1000 * speed.together:.0f} ms"
        f" ({speed.tokens / speed.together:,.0f} tokens/s, {speed.target / speed.together:.0%} of it the target's),"
        f" of each alone {alone}: together {speed.ratio:.2f} of the sum."
    )
