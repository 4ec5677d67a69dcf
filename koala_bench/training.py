"""Training many heads from one stream: one pass of the target per batch feeds the loss of every head.

All heads therefore see the same batches in the same order with the same hidden states, and the target is paid for once.
Each head has its own optimiser, schedule and clipping. The state of a run is one checkpoint; resumed on the CPU, a run
ends in the same weights bit for bit, because nothing draws from a global random generator.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from koala_bench.checkpoints import read_state, save_head, write_state
from koala_bench.errors import KoalaBenchError
from koala_bench.features import features_of_each
from koala_bench.files import continue_log
from koala_bench.heads import FeatureBatch, TrainableHead
from koala_bench.held_out import HeldOut, held_out_acceptance, held_out_losses
from koala_bench.presets import MethodPreset, TrainingPreset
from koala_bench.progress import progress, say
from koala_bench.registry import HEADS, OBJECTIVES, build
from koala_bench.streams import Stream, TokenBatch
from koala_bench.target import Target

_LOG_EVERY = 10


@dataclass
class Arm:
    """One head in training.

    Attributes:
        name: of the method.
        head, objective: what is trained, and what is added to its supervised loss if anything.
        learning_rate: at the top of the schedule.
    """

    name: str
    preset: MethodPreset
    head: Any  # a TrainableHead that is an nn.Module
    objective: Any | None
    learning_rate: float
    optimiser: torch.optim.Optimizer

    @property
    def parameters(self) -> int:
        """Number of trained parameters of the head."""
        return sum(p.numel() for p in self.head.parameters() if p.requires_grad)


def build_head(target: Target, preset: MethodPreset, seed: int) -> nn.Module:
    """A fresh head of a method, on the target's device, in float32; equal seeds give equal weights.

    Raises:
        KoalaBenchError: unknown head or option, or the class is no module.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = build(HEADS, preset.head, target.spec(), {**preset.options, **({"layers": preset.layers} if preset.layers != 1 else {})})
    if not isinstance(head, nn.Module):
        raise KoalaBenchError(f"The head '{preset.head}' is no torch.nn.Module.", "Derive it from torch.nn.Module.")
    return head.to(target.device)


def make_arm(target: Target, name: str, preset: MethodPreset, options: TrainingPreset) -> Arm:
    """Build a method's head, objective and optimiser.

    Raises:
        KoalaBenchError: the head cannot be trained by the suite, an option is unknown, or the device knows no such precision.
    """
    if options.precision == "fp16" and target.device.type != "cuda":
        raise KoalaBenchError("Training in fp16 needs a CUDA device.", "Use --set training.precision=bf16 or no.")
    head = build_head(target, preset, options.seed)
    if not isinstance(head, TrainableHead):
        raise KoalaBenchError(f"The head '{preset.head}' has no loss.", "Give it a loss(batch) method, or train it elsewhere and load it.")
    objective = build(OBJECTIVES, preset.objective, target.spec(), preset.objective_options) if preset.objective else None
    rate = preset.learning_rate or options.learning_rate
    module: nn.Module = head
    optimiser = torch.optim.AdamW(module.parameters(), lr=rate, betas=options.betas, weight_decay=options.weight_decay, fused=True)
    return Arm(name, preset, head, objective, rate, optimiser)


def schedule(step: int, options: TrainingPreset) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to the final fraction."""
    warmup = max(1, round(options.warmup_fraction * options.steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, options.steps - warmup)
    return options.final_rate_fraction + (1 - options.final_rate_fraction) * 0.5 * (1 + math.cos(math.pi * done))


def _check_batch(batch: TokenBatch, names: Sequence[str]) -> None:
    if not batch.supervised.any():
        raise KoalaBenchError(f"No token of dialogue {names[batch.samples[0]]} and its batch belongs to an answer.", "Check the chat template and the data.")


def _read_checkpoint(path: Path, identity: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    if not path.exists():
        return None
    state = read_state(path, device)
    for key, value in identity.items():
        if state["identity"].get(key) != value:
            raise KoalaBenchError(
                f"The checkpoint {path} belongs to another run: its {key} differs.", "Choose another --out, or delete the folder to start again."
            )
    return state


def _restore(path: Path, state: dict[str, Any], arms: Sequence[Arm]) -> tuple[int, int]:
    """Put all arms into the state of a checkpoint; returns its step and the tokens seen until then."""
    try:
        for arm in arms:
            saved = state["arms"][arm.name]
            arm.head.load_state_dict(saved["head"])
            arm.optimiser.load_state_dict(saved["optimiser"])
            if arm.objective is not None:
                arm.objective.load_state_dict(saved["objective"])
        return int(state["step"]), int(state["tokens"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise KoalaBenchError(f"The checkpoint {path} is damaged.", "Delete it to start the training again.") from error


def train(
    target: Target, arms: Sequence[Arm], stream: Stream, names: Sequence[str], held_out: HeldOut, options: TrainingPreset, out: Path, manifest: dict[str, Any]
) -> None:
    """Train all arms together and write each as ``out/<method>/``.

    Args:
        names: what to call each dialogue of the stream in an error.
        manifest: hashes and settings of the run; it becomes ``training.json`` beside every head, and a checkpoint of
            another manifest is refused.

    Raises:
        KoalaBenchError: a loss is not finite, a batch has nothing to train on, a checkpoint does not fit, or memory runs out.
    """
    AcceleratorState._reset_state()  # it keeps the first precision of a process and refuses another one
    accelerator = Accelerator(mixed_precision=options.precision, cpu=target.device.type == "cpu")
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    state = _read_checkpoint(checkpoint, manifest, target.device)
    first, seen = 0, 0
    if state:
        first, seen = _restore(checkpoint, state, arms)
        say(f"Resuming the training after step {first:,} of {options.steps:,}.")

    def save(step: int) -> None:
        states = {
            arm.name: {
                "head": arm.head.state_dict(),
                "optimiser": arm.optimiser.state_dict(),
                "objective": arm.objective.state_dict() if arm.objective is not None else None,
            }
            for arm in arms
        }
        write_state(checkpoint, {"identity": manifest, "step": step, "tokens": seen, "arms": states})

    evaluate_at = {round(options.steps * (i + 1) / options.held_out_evaluations) for i in range(options.held_out_evaluations)}
    timings = {"target_s": 0.0, **{arm.name: 0.0 for arm in arms}}
    started, seen_before = time.perf_counter(), seen
    with continue_log(out / "training.jsonl", first) as log, progress("train", options.steps, "steps", first) as advance:

        def write(line: dict[str, Any]) -> None:
            log.write(json.dumps(line) + "\n")

        for step in range(first, options.steps):
            tokens = stream.batch(step)
            _check_batch(tokens, names)
            factor = schedule(step, options)
            before = time.perf_counter()
            batches = features_of_each(target, tokens, (arm.head.features for arm in arms), seed=options.seed * 1_000_003 + step)
            timings["target_s"] += time.perf_counter() - before
            for arm in arms:
                before = time.perf_counter()
                line = _train_step(accelerator, arm, batches[arm.head.features], options, factor, step)
                timings[arm.name] += time.perf_counter() - before
                if line is None:
                    worst = ", ".join(names[i] for i in tokens.samples[:4])
                    raise KoalaBenchError(
                        f"The loss of {arm.name} is not finite at step {step + 1}, on dialogues {worst} ...",
                        "Lower its learning rate; the last checkpoint is kept.",
                    )
                if (step + 1) % _LOG_EVERY == 0 or step == 0:
                    write({"kind": "step", "step": step + 1, "method": arm.name, "rate": round(arm.learning_rate * factor, 8), **line})
            seen += int(tokens.lengths.sum())
            if step + 1 in evaluate_at:
                for arm in arms:
                    write(
                        {
                            "kind": "held_out",
                            "step": step + 1,
                            "method": arm.name,
                            **held_out_losses(target, arm.head, held_out),
                            **held_out_acceptance(target, arm.head, held_out),
                        }
                    )
            log.flush()
            if (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps:
                save(step + 1)
            rate = (seen - seen_before) / max(time.perf_counter() - started, 1e-9)
            advance(1, f"{rate:,.0f} tokens/s")
    if first < options.steps:
        spent = sum(timings.values())
        parts = ", ".join(f"{name.removesuffix('_s')} {seconds / spent:.0%}" for name, seconds in timings.items())
        say(f"Trained {len(arms)} heads on {seen:,} tokens; time by part: {parts}.")
    for arm in arms:
        save_head(out / arm.name, arm.head, arm.preset, target, {**manifest, "steps": options.steps, "tokens": seen, "method": arm.name})


def _train_step(accelerator: Accelerator, arm: Arm, batch: FeatureBatch, options: TrainingPreset, factor: float, step: int) -> dict[str, float] | None:
    """One update of one head; returns what is logged, or None if the loss or the gradient is not finite."""
    for group in arm.optimiser.param_groups:
        group["lr"] = arm.learning_rate * factor
    with accelerator.autocast(), warnings.catch_warnings():
        # Norms keep float32 weights under autocast on purpose; torch warns that its fused kernel cannot have that.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        found = arm.head.loss(batch)
    extra, parts = (None, {}) if arm.objective is None else arm.objective.term(batch, found, step / options.steps)
    accelerator.backward(found.total if extra is None else found.total + extra)
    norm = nn.utils.clip_grad_norm_(arm.head.parameters(), options.clip_norm)
    if not torch.isfinite(norm) or not torch.isfinite(found.total):
        return None
    arm.optimiser.step()
    arm.optimiser.zero_grad(set_to_none=True)
    if (step + 1) % _LOG_EVERY and step:
        return {}
    values = {"loss": found.total.detach(), "gradient_norm": norm, **found.parts, **parts}
    return {key: round(float(value), 5) for key, value in values.items()}
