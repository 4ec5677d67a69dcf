"""How long a preset would take on this machine: from its own steps where the target is here, else from limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from koala_bench.common.process_group import SINGLE_PROCESS
from koala_bench.costs.bandwidth import bandwidth_of
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, capacity_for, decode
from koala_bench.dialogues.streams import TokenBatch
from koala_bench.engine.target import Target
from koala_bench.engine.timing import seconds_of
from koala_bench.planning.requirements import Needs, dtype_of
from koala_bench.presets import Preset
from koala_bench.training.experiment import VANILLA, free_head, trained_methods
from koala_bench.training.features import features_of_each
from koala_bench.training.loop import make_trainer
from koala_bench.training.precision import resolve
from koala_bench.training.step import Features, HeadTrainer, train_step
from koala_bench.tree import Template, load_template

# NVIDIA's data sheet of the A100 (SXM, 80 GB): 2,039 GB/s; dense, without sparsity, 312 TFLOP/s in bfloat16 and
# float16, 19.5 in float32.
NAMED_GPU = "A100 80GB"
_NAMED_BYTES, _NAMED_FLOP, _NAMED_SINGLE_FLOP = 2.0e12, 312e12, 19.5e12
FLOP_SHARE = 0.4  # of these, an assumption: what training large models mostly gets
_PROMPT, _ANSWER = 64, 16  # tokens
_ROW = 256  # tokens of a dialogue in the measured batch
_LONG_CALL_S = 10.0  # where warming up is little beside the call itself


@dataclass(frozen=True)
class Pace:
    """Seconds of single steps.

    Attributes:
        target: of the target's pass over one micro-batch.
        heads: of the update of all trained heads from one micro-batch, adversarial terms and the target's distributions
            that they are taught by included.
        steps: of one decoding step of each method: draft and verification.
    """

    target: float
    heads: float
    steps: Mapping[str, float]


@dataclass(frozen=True)
class Limits:
    """What a device does at best.

    Attributes:
        bytes_per_s: read and written by a copy.
        flop_per_s: of a large matrix product in the target's dtype.
    """

    bytes_per_s: float
    flop_per_s: float


@dataclass(frozen=True)
class Hours:
    """Expected times in hours; ``decoding`` at an acceptance length of 1 (nothing accepted) and of 2."""

    training: float
    decoding: tuple[float, float]


def measure_pace(preset: Preset, methods: Sequence[str], target: Target, seconds: float = 60.0) -> Pace:
    """Time training and decoding steps with fresh heads on random tokens, for about ``seconds``."""
    names = [name for name in methods if name != VANILLA]
    trained = trained_methods(preset, methods, target)
    each = seconds / (2 + len(trained) + len(names))
    trainers = {name: make_trainer(target, name, preset.method(name), preset.training) for name in trained}
    pass_s, heads = _training(preset, trainers, target, each)
    with target.computing():
        steps = {VANILLA: _step(target, Vanilla(), VANILLA_TREE, each)}
        for name in names:
            method = preset.method(name)
            head = free_head(method, target)
            if head is None:
                head = trainers[preset.trained_as(name)].head.to(dtype=target.dtype).eval()
            steps[name] = _step(target, head, load_template(method.tree), each)
    return Pace(pass_s, heads, steps)


def training_pace(preset: Preset, trained: Sequence[str], target: Target, seconds: float) -> tuple[float, float]:
    """Seconds of the target's pass over one micro-batch, and of the update of all trained heads; see ``Pace``."""
    trainers = {name: make_trainer(target, name, preset.method(name), preset.training) for name in trained}
    return _training(preset, trainers, target, seconds / (1 + len(trainers)))


def _training(preset: Preset, trainers: Mapping[str, HeadTrainer], target: Target, each: float) -> tuple[float, float]:
    if not trainers:
        return 0.0, 0.0
    options, device = preset.training, target.device
    target = replace(target, engine="eager")  # as ``train_heads`` does
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=resolve(options.precision, device), cpu=device.type == "cpu")
    batch = _batch(preset, target)
    read = partial(features_of_each, target, batch, [trainer.head.features for trainer in trainers.values()], seed=0)
    pass_s = _time(device, each, read)
    features: Features = read()
    if options.stored_states:
        features = _as_stored(features)

    def fresh() -> Features:
        for found in features.values():
            found.forget()  # each step makes the target's distributions anew, once for all heads
        return features

    own = [fresh] * options.micro_batches
    last = options.steps - 1  # everything that sets in late has done so
    step = partial(train_step, accelerator, list(trainers.values()), own, options, 1e-6, last, SINGLE_PROCESS)
    return pass_s, _time(device, each * len(trainers), step) / options.micro_batches


def _as_stored(features: Features) -> Features:
    """The features as stored states give them: what the target finds likeliest, and its normalizers, are known."""
    first = next(iter(features.values()))
    whole = first.whole or first
    known = replace(whole, known_likeliest=whole.target_likeliest, known_normalizers=whole.target_normalizers)
    return {read: known if each is whole else replace(each, whole=known) for read, each in features.items()}


def hours_at(pace: Pace, preset: Preset, needs: Needs, stored_tokens: int | None = None) -> Hours:
    """Times of the whole run at a measured pace.

    Args:
        stored_tokens: that the target reads once where its states are stored; None where it reads each batch.
    """
    steps = preset.training.steps * preset.training.micro_batches if pace.heads else 0
    passes = steps if stored_tokens is None or not steps else stored_tokens / preset.training.batch_tokens
    training = passes * pace.target + steps * pace.heads
    drafted = sum(step for name, step in pace.steps.items() if name != VANILLA)
    first, second = (needs.answer_tokens * (pace.steps[VANILLA] + drafted / length) for length in (1, 2))
    return Hours(training / 3600, (first / 3600, second / 3600))


def measure_limits(device: torch.device, dtype: torch.dtype, seconds: float) -> Limits:
    """Copy bandwidth and matrix throughput of a device."""
    width = 8192 if device.type == "cuda" else 2048
    a, b = (torch.ones(width, width, device=device, dtype=dtype) for _ in range(2))
    multiplied = _time(device, seconds, lambda: a @ b)
    return Limits(bandwidth_of(device).copied, 2 * width**3 / multiplied)


def limits_of_named_gpu(dtype: torch.dtype) -> Limits:
    """What ``NAMED_GPU`` does by its data sheet, with ``FLOP_SHARE`` of its operations; nothing of it is measured."""
    return Limits(_NAMED_BYTES, FLOP_SHARE * (_NAMED_FLOP if dtype.itemsize == 2 else _NAMED_SINGLE_FLOP))


def least_hours(
    limits: Limits, preset: Preset, methods: Sequence[str], needs: Needs, stored_tokens: int | None = None
) -> Hours:
    """Lower bound: 2 FLOP per parameter and token for the target, 6 for trained ones, and those of the soft labels; a
    step reads all weights.

    Args:
        stored_tokens: as for ``hours_at``.
    """
    trained = sum(head.parameters + head.discriminator for head in needs.heads if head.shares is None)
    read = needs.training_tokens if stored_tokens is None or not needs.training_tokens else stored_tokens
    flop = read * 2 * needs.target_parameters + needs.training_tokens * (6 * trained + needs.label_flop)
    training = flop / limits.flop_per_s
    step = needs.target_parameters * dtype_of(preset).itemsize / limits.bytes_per_s
    drafting = len([name for name in methods if name != VANILLA])
    first, second = (needs.answer_tokens * step * (1 + drafting / length) for length in (1, 2))
    return Hours(training / 3600, (first / 3600, second / 3600))


def _batch(preset: Preset, target: Target) -> TokenBatch:
    length = min(_ROW, preset.data.max_tokens, preset.training.batch_tokens)
    rows = max(1, preset.training.batch_tokens // length)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(target.config.vocab_size, (rows, length), generator=draw)
    supervised = torch.ones(rows, length, dtype=torch.bool)
    supervised[:, : length // 4] = False
    return TokenBatch(ids, supervised, tuple(range(rows)), torch.full((rows,), length))


def _step(target: Target, head: object, template: Template, seconds: float) -> float:
    """Seconds of a decoding step, the median over answers to one prompt."""
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(target.config.vocab_size, (_PROMPT,), generator=draw).tolist()
    cache = target.new_cache(capacity_for(_PROMPT, _ANSWER, template.nodes, target.max_positions))
    found: list[float] = []
    stop = time.perf_counter() + seconds
    while len(found) < 2 or (time.perf_counter() < stop and len(found) < 200):
        answer = decode(target, head, template, prompt, _ANSWER, (), cache)  # type: ignore[arg-type]
        found.append(answer.decode_s / len(answer.accepted))
    return sorted(found[1:])[len(found[1:]) // 2]


def _time(device: torch.device, seconds: float, run: Callable[[], object]) -> float:
    """Median seconds of a call; the first one only warms up, if there is time for another."""
    stop = time.perf_counter() + seconds
    first = seconds_of(device, run)
    if first > max(seconds, _LONG_CALL_S):
        return first
    found: list[float] = []
    while not found or (time.perf_counter() < stop and len(found) < 50):
        found.append(seconds_of(device, run))
    return sorted(found)[len(found) // 2]
