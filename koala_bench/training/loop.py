"""Training many heads from one stream: one pass of the target per batch feeds the loss of every head.

All heads therefore see the same batches in the same order with the same hidden states, and the target is paid for once.
Each head has its own optimiser, schedule and clipping. The state of a run is one checkpoint; resumed on the CPU, a run
ends in the same weights bit for bit, because nothing draws from a global random generator.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn

from koala_bench.common.draft_vocabulary import checked_count, first_of
from koala_bench.common.files import continue_log
from koala_bench.common.moving import moved
from koala_bench.common.process_group import ProcessGroup
from koala_bench.common.progress import log_line, progress
from koala_bench.dialogues.streams import Stream, TokenBatch
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import TargetSpec, TrainableHead
from koala_bench.presets import MethodPreset, TrainingPreset
from koala_bench.registry import OBJECTIVES, build
from koala_bench.training.checkpoints import (
    build_head_of,
    earlier,
    first_difference,
    identity_of,
    read_state,
    save_head,
    save_token_order,
    write_state,
)
from koala_bench.training.features import features_of_each, in_host_memory
from koala_bench.training.held_out import HeldOut, held_out_acceptance, held_out_losses
from koala_bench.training.states import StoredStates
from koala_bench.training.step import LOG_EVERY, Features, HeadTrainer, train_step
from koala_bench.training.tracking import curves, tracked_accelerator


def spec_of(target: Target, preset: MethodPreset, order: torch.Tensor | None = None) -> TargetSpec:
    """What the head and the objective of a method know of a target; ``order`` is as for ``build_head``."""
    if preset.draft_vocabulary is None:
        return target.spec()
    size = target.config.vocab_size
    count = checked_count(preset.draft_vocabulary, size)
    return target.spec(first_of(torch.arange(size) if order is None else order, count))


def build_head(target: Target, preset: MethodPreset, seed: int, order: torch.Tensor | None = None) -> nn.Module:
    """A fresh head of a method, on the target's device, in float32; equal seeds give equal weights.

    Args:
        order: in which its draft vocabulary takes the target's tokens, see ``draft_vocabulary.by_count``; by their ids
            if None.

    Raises:
        KoalaBenchError: unknown head or option, a draft vocabulary larger than the target's, or the class is no module.
    """
    return _head_from(spec_of(target, preset, order), preset, seed)


def _head_from(spec: TargetSpec, preset: MethodPreset, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = build_head_of(spec, preset.head, preset.options, preset.layers)
    if not isinstance(head, nn.Module):
        raise KoalaBenchError(f"The head '{preset.head}' is no torch.nn.Module.", "Derive it from torch.nn.Module.")
    return moved(head, spec.device)


def make_trainer(
    target: Target, name: str, preset: MethodPreset, options: TrainingPreset, order: torch.Tensor | None = None
) -> HeadTrainer:
    """Build a method's head, objective and optimiser; ``order`` is as for ``build_head``. Raises KoalaBenchError where
    the head cannot be trained by the suite, or an option is unknown."""
    spec = spec_of(target, preset, order)  # one for both, since a cut copies rows of the output layer
    head = _head_from(spec, preset, options.seed)
    if not isinstance(head, TrainableHead):
        raise KoalaBenchError(
            f"The head '{preset.head}' has no loss.", "Give it a loss(batch) method, or train it elsewhere and load it."
        )
    objective = build(OBJECTIVES, preset.objective, spec, preset.objective_options) if preset.objective else None
    rate = preset.learning_rate or options.learning_rate
    module: nn.Module = head
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=rate, betas=options.betas, weight_decay=options.weight_decay, fused=True
    )
    return HeadTrainer(name, preset, head, objective, rate, optimiser)


def schedule(step: int, options: TrainingPreset) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to the final fraction."""
    warmup = max(1, round(options.warmup_fraction * options.steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, options.steps - warmup)
    return options.final_rate_fraction + (1 - options.final_rate_fraction) * 0.5 * (1 + math.cos(math.pi * done))


def _check_batch(batch: TokenBatch, names: Sequence[str]) -> None:
    if not batch.supervised.any():
        raise KoalaBenchError(
            f"No token of dialogue {names[batch.samples[0]]} and its batch belongs to an answer.",
            "Check the chat template and the data.",
        )


def _read_checkpoint(path: Path, identity: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    state = read_state(path, device)
    if state is None:
        return None
    different = first_difference(identity_of(identity), identity_of(state["identity"]))
    if different is None and state["identity"].get("methods") != identity.get("methods"):
        different = "methods"
    if different is not None:
        raise KoalaBenchError(
            f"The checkpoint {path} belongs to another run: its {different} differs.",
            "Choose another --out, or delete the folder to start again.",
        )
    return state


def _restore(path: Path, state: dict[str, Any], trainers: Sequence[HeadTrainer]) -> tuple[int, int]:
    """Put all trainers into the state of a checkpoint; returns its step and the tokens seen until then."""
    try:
        for trainer in trainers:
            saved = state["arms"][trainer.name]
            trainer.head.load_state_dict(saved["head"])
            trainer.optimiser.load_state_dict(saved["optimiser"])
            if trainer.objective is not None:
                trainer.objective.load_state_dict(saved["objective"])
        return int(state["step"]), int(state["tokens"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise KoalaBenchError(f"The checkpoint {path} is damaged.", "Delete it to start the training again.") from error


def _features(
    target: Target, batch: TokenBatch, trainers: Sequence[HeadTrainer], seed: int, stored: StoredStates | None,
    again: bool, timings: dict[str, float],
) -> Callable[[], Features]:  # fmt: skip
    """Makes the features of a micro-batch when called, and makes them again when called again.

    Only a GPU's second time is cheaper: its states wait in the host's memory for it, of which there is more, and which
    costs less than another pass of a large target. Stored states are read again.

    Args:
        again: whether there can be a second time.
    """
    features = [trainer.head.features for trainer in trainers]
    on_gpu, objectives = target.device.type != "cpu", any(trainer.objective for trainer in trainers)
    kept = again and stored is None and on_gpu and objectives
    waiting: list[Features] = []

    def make() -> Features:
        before = time.perf_counter()
        if waiting:
            found = in_host_memory(waiting.pop(), back_to=target.device)
        else:
            found = features_of_each(target, batch, features, seed=seed, stored=stored)
            if kept:
                waiting.append(in_host_memory(found))
        timings["target_s"] += time.perf_counter() - before
        return found

    return make


def train(
    target: Target,
    trainers: Sequence[HeadTrainer],
    stream: Stream,
    names: Sequence[str],
    held_out: HeldOut,
    options: TrainingPreset,
    out: Path,
    manifest: dict[str, Any],
    group: ProcessGroup,
    stored: StoredStates | None = None,
    log_with: str | None = None,
    order: torch.Tensor | None = None,
) -> None:
    """Train all heads together and write each as ``out/<method>/``.

    A step is ``options.micro_batches`` batches of the stream, dealt out to the processes of the group; the update does
    not depend on their number.

    Args:
        names: what to call each dialogue of the stream in an error.
        order: of the target's tokens, kept beside every head for cuts of its vocabulary.
        manifest: hashes and settings of the run; it becomes ``training.json`` beside every head, and a checkpoint of
            another manifest is refused.
        stored: the target's states of the stream and, behind them, of what is held out; without them the target
            computes the states of each batch.
        log_with: where curves go beside the log, out of ``tracking.SERVICES``.

    Raises:
        KoalaBenchError: a loss is not finite, a batch has nothing to train on, a checkpoint does not fit, or memory
            runs out.
    """
    AcceleratorState._reset_state()  # it keeps the first precision of a process and refuses another one
    log_with = log_with if group.first else None
    accelerator = tracked_accelerator(log_with, out, mixed_precision=options.precision, cpu=target.device.type == "cpu")
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    state = _read_checkpoint(checkpoint, manifest, target.device)
    first, seen = 0, 0
    if state:
        first, seen = _restore(checkpoint, state, trainers)
        state = None  # the heads hold what is needed of it
        log_line(f"Resuming the training after step {first:,} of {options.steps:,}.")

    def save(step: int) -> None:
        states = {
            trainer.name: {
                "head": trainer.head.state_dict(),
                "optimiser": trainer.optimiser.state_dict(),
                "objective": trainer.objective.state_dict() if trainer.objective is not None else None,
            }
            for trainer in trainers
        }
        write_state(checkpoint, {"identity": manifest, "step": step, "tokens": seen, "arms": states})

    evaluate_at = {
        round(options.steps * (i + 1) / options.held_out_evaluations) for i in range(options.held_out_evaluations)
    }
    seed, again = options.seed * 1_000_003, group.size < options.micro_batches
    timings = {"target_s": 0.0, **{trainer.name: 0.0 for trainer in trainers}}
    started, seen_before = time.perf_counter(), seen
    log_file = continue_log(out / "training.jsonl", first) if group.first else open(os.devnull, "w")  # noqa: SIM115
    with (
        curves(accelerator, log_with) as send,  # first: a service that refuses leaves no log
        log_file as log,
        progress("train", options.steps, "steps", first) as advance,
    ):

        def write(line: dict[str, Any]) -> None:
            log.write(json.dumps(line) + "\n")
            send(line)

        for step in range(first, options.steps):
            numbers = range(step * options.micro_batches, (step + 1) * options.micro_batches)
            micro_batches = [stream.batch(number) for number in numbers]
            for tokens in micro_batches:
                _check_batch(tokens, names)
            factor = schedule(step, options)
            own = [
                _features(target, micro_batches[index], trainers, seed + numbers[index], stored, again, timings)
                for index in group.own(options.micro_batches)
            ]
            for name, line in train_step(accelerator, trainers, own, options, factor, step, group, timings).items():
                if line is None:
                    worst = ", ".join(names[i] for tokens in micro_batches for i in tokens.samples[:4])
                    raise KoalaBenchError(
                        f"The loss of {name} is not finite at step {step + 1}, on dialogues {worst} ...",
                        "Lower its learning rate; the last checkpoint is kept.",
                    )
                if (step + 1) % LOG_EVERY == 0 or step == 0:
                    rate = next(trainer.learning_rate for trainer in trainers if trainer.name == name) * factor
                    write({"kind": "step", "step": step + 1, "method": name, "rate": round(rate, 8), **line})
            seen += sum(int(tokens.lengths.sum()) for tokens in micro_batches)
            if step + 1 in evaluate_at and group.first:
                for trainer in trainers:
                    losses = held_out_losses(target, trainer.head, held_out, stored)
                    accepted = held_out_acceptance(target, trainer.head, held_out)
                    write({"kind": "held_out", "step": step + 1, "method": trainer.name, **losses, **accepted})
            log.flush()
            if group.first and ((step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps):
                save(step + 1)
            rate = (seen - seen_before) / max(time.perf_counter() - started, 1e-9)
            advance(1, f"{rate:,.0f} tokens/s")
    if first < options.steps:
        spent = sum(timings.values())
        parts = ", ".join(f"{name.removesuffix('_s')} {seconds / spent:.0%}" for name, seconds in timings.items())
        log_line(f"Trained {len(trainers)} heads on {seen:,} tokens; time by part: {parts}.")
    for trainer in trainers if group.first else ():
        if order is not None:
            save_token_order(out / trainer.name, order)
        own_manifest = {**manifest, "steps": options.steps, "tokens": seen, "method": trainer.name}
        # As narrow as the target's own weights, so that a byte read by a draft is worth one read by a verification.
        save_head(out / trainer.name, trainer.head, trainer.preset, target, own_manifest, target.weights_dtype)
    if group.first:
        earlier(checkpoint).unlink(missing_ok=True)
    group.wait()  # nobody looks for a head that is not written yet
