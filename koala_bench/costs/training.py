"""Training several heads in one pass of the target over the stream, against each in a pass of its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from koala_bench.common.process_group import SINGLE_PROCESS
from koala_bench.common.progress import progress
from koala_bench.dialogues.streams import Stream
from koala_bench.engine.target import Target
from koala_bench.engine.timing import synchronise
from koala_bench.presets import Preset
from koala_bench.training.features import features_of_each
from koala_bench.training.loop import make_trainer
from koala_bench.training.precision import resolve
from koala_bench.training.step import HeadTrainer, train_step


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
    options, precision = preset.training, resolve(preset.training.precision, target.device)
    AcceleratorState._reset_state()  # as in ``train``
    accelerator = Accelerator(mixed_precision=precision, cpu=target.device.type == "cpu")
    groups: dict[str, list[HeadTrainer]] = {
        group: [make_trainer(target, name, preset.method(name), options) for name in members]
        for group, members in {"": names, **{name: [name] for name in names}}.items()
    }
    spent: dict[str, list[float]] = {group: [] for group in groups}
    passes: list[float] = []
    tokens: list[int] = []
    with progress("training", steps + 2, "steps") as advance:
        for step in range(steps + 2):
            batch = stream.batch(step)
            tokens.append(int(batch.lengths.sum()))
            for group, trainers in groups.items():
                synchronise(target.device)
                started = time.perf_counter()
                features = features_of_each(target, batch, (trainer.head.features for trainer in trainers), seed=step)
                synchronise(target.device)
                between = time.perf_counter()
                own = [lambda features=features: features]
                train_step(accelerator, trainers, own, options, 1e-3, step + options.steps // 2, SINGLE_PROCESS)
                synchronise(target.device)
                if step >= 2:
                    spent[group].append(time.perf_counter() - started)
                    passes += [] if group else [between - started]
            advance(1)
    together, *alone = (statistics.median(each) for each in spent.values())
    of_each = dict(zip(names, alone, strict=True))
    return TrainingSpeed(together, statistics.median(passes), of_each, statistics.mean(tokens[2:]))


def in_words(speed: TrainingSpeed) -> str:
    """One sentence."""
    alone = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in speed.alone.items())
    return (
        f"A training step of {len(speed.alone)} heads together takes {1000 * speed.together:.0f} ms"
        f" ({speed.tokens / speed.together:,.0f} tokens/s, {speed.target / speed.together:.0%} of it the target's),"
        f" of each alone {alone}: together {speed.ratio:.2f} of the sum."
    )
