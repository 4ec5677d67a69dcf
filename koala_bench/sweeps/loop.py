"""Run a sweep: train every trial of a grid on one stream per seed, decode held-out prompts, and find the best.

The log is append-only and the sweep can be killed at any time: training resumes from its checkpoint, decoding after its
last prompt. Trials may be added to the grid later.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from koala_bench.common.machine import memory_bytes
from koala_bench.common.progress import log_line, progress
from koala_bench.common.provenance import code_state
from koala_bench.decoding.loop import capacity_for, decode
from koala_bench.dialogues.conversations import held_out_prompts
from koala_bench.dialogues.encoding import ChatTemplate
from koala_bench.engine.devices import machine
from koala_bench.engine.loading.targets import fingerprint
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import Preset, load_preset
from koala_bench.sweeps.grid import SweepGrid, Trial, trials_of
from koala_bench.sweeps.results import SCHEMA, SweepLog, open_sweep, winner, write_pages
from koala_bench.training.checkpoints import load_head
from koala_bench.training.experiment import load_preset_target, train_heads
from koala_bench.training.log import read_training
from koala_bench.training.loop import make_trainer
from koala_bench.training.step import HeadTrainer
from koala_bench.tree import load_template

_BYTES_PER_PARAMETER = 16  # float32: the weight, its gradient, and Adam's two moments
_SHARE_OF_MEMORY = 0.5  # the rest is for one head's activations and the target's states


@dataclass
class _Sweep:
    """State shared by all parts of a sweep."""

    preset: Preset
    target: Target
    template: ChatTemplate
    trials: dict[str, Trial]
    prompts: list[list[int]]
    grid: SweepGrid
    together: int
    out: Path
    log: SweepLog
    heads_done: int = 0
    started: float = 0.0


def run_sweep(grid: SweepGrid, settings: Sequence[str], out: Path) -> SweepLog:
    """Train and measure the trials that ``out`` does not hold yet, and write ``sweep.md`` and ``sweep.csv``.

    Args:
        settings: overrides of the preset besides the grid's own.

    Raises:
        KoalaBenchError: a mistake in the grid, the preset or the data, or the folder holds another sweep.
    """
    preset = load_preset(grid.preset, [*grid.overrides, *settings])
    baseline, trials = trials_of(grid, preset)
    target, template = load_preset_target(preset)
    target = replace(target, engine="eager")  # tracing every trial would cost more than it saves
    every = [baseline, *trials]
    together = _fitting(target, preset, every, grid.arms)
    prompts = _held_out_prompts(preset, grid, target, template)
    log = open_sweep(out / "sweep.jsonl", _header(preset, grid, target, template, prompts))
    wanted = {
        "kind": "grid", "preset": grid.preset, "method": grid.method, "seeds": list(grid.seeds),
        "confirm_seeds": list(grid.confirm_seeds), "prompts": grid.prompts, "confirm_prompts": grid.confirm_prompts,
        "baseline": _as_line(baseline), "trials": [_as_line(trial) for trial in every],
    }  # fmt: skip
    if log.grid != wanted:
        log.append(wanted)
    by_name = {trial.name: trial for trial in every}
    started = time.perf_counter()
    sweep = _Sweep(preset, target, template, by_name, prompts, grid, together, out, log, started=started)
    for seed in grid.seeds:
        _seed(sweep, every, seed)
        write_pages(log, out)
    best = winner(log)
    for seed in grid.confirm_seeds if best else ():
        _seed(sweep, [trial for trial in every if trial.name in (baseline.name, best)], seed)
        write_pages(log, out)
    return log


def _as_line(trial: Trial) -> dict[str, Any]:
    return {"name": trial.name, "label": trial.label, "method": trial.preset.model_dump(mode="json")}


def _header(
    preset: Preset, grid: SweepGrid, target: Target, template: ChatTemplate, prompts: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """First line of the log; a sweep resumes only if ``identity`` is equal."""
    training = preset.training.model_dump(mode="json", exclude={"seed"})
    data = preset.data.model_dump(mode="json", exclude={"source"})
    identity = {
        "target": fingerprint(target), "data": {**data, "source": Path(preset.data.source).name}, "training": training,
        "chat_template": template.sha256, "new_tokens": grid.new_tokens, "depth": grid.depth,
        "prompts": hashlib.sha256(json.dumps(prompts[: grid.prompts]).encode()).hexdigest(),
    }  # fmt: skip
    return {
        "kind": "sweep", "schema": SCHEMA, "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": Path(preset.target.name).name, "identity": identity,
        "environment": machine(target.device), "code": code_state(),
    }  # fmt: skip


def _held_out_prompts(preset: Preset, grid: SweepGrid, target: Target, template: ChatTemplate) -> list[list[int]]:
    """First turns of held-out dialogues that leave room for an answer: for the search, then for confirmation."""
    wanted = grid.prompts + (grid.confirm_prompts if grid.confirm_seeds else 0)
    longest = min(preset.data.max_tokens, target.longest - grid.new_tokens - grid.depth - 1)
    prompts = held_out_prompts(target, template, preset.data.source, wanted, longest)
    if len(prompts) == wanted:
        return prompts
    raise KoalaBenchError(
        f"The grid decodes {wanted} held-out prompts, the data has {len(prompts)}.",
        "Lower prompts or confirm_prompts in the grid.",
    )


# ---------------------------------------------------------------------------------------------- memory


def _fitting(target: Target, preset: Preset, trials: Sequence[Trial], wanted: int | None) -> int:
    """Number of heads to train together: ``wanted``, or as many as fit in half of the free memory; all if that is
    unknown.

    They share one pass of the target per batch. Each costs 16 bytes per trained parameter, its discriminator included;
    only one head at a time holds activations.
    """
    # Building all of them also finds wrong settings before the first is trained.
    largest = max(trainer_bytes(make_trainer(target, trial.name, trial.preset, preset.training)) for trial in trials)
    device = target.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory_bytes("available")
    fitting = len(trials) if free is None else max(1, int(_SHARE_OF_MEMORY * free / largest))
    count = min(len(trials), wanted or fitting)
    known = "unknown" if free is None else f"{free / 1e9:.1f} GB"
    log_line(
        f"{len(trials)} heads of at most {largest / 1e6:.0f} MB in training (weights, gradients, Adam); free memory"
        f" {known}: {count} at a time."
    )
    return count


def trainer_bytes(trainer: HeadTrainer) -> int:
    """Training memory of a head, its objective and their optimisers, without activations."""
    modules = [trainer.head] + ([trainer.objective] if isinstance(trainer.objective, torch.nn.Module) else [])
    return _BYTES_PER_PARAMETER * sum(parameter.numel() for module in modules for parameter in module.parameters())


# ---------------------------------------------------------------------------------------------- one seed


def _seed(sweep: _Sweep, trials: Sequence[Trial], seed: int) -> None:
    """Train and measure the trials of one seed, group by group."""
    log = sweep.log
    pending = [trial.name for trial in trials if not log.measured(trial.name, seed)]
    groups = []
    for group in log.groups.get(seed, []):  # groups begun earlier keep their members
        if set(group["trials"]) <= sweep.trials.keys() and set(group["trials"]) & set(pending):
            groups.append(group)
            pending = [name for name in pending if name not in group["trials"]]
    for group in groups:
        _train_and_measure(sweep, group)
    for start in range(0, len(pending), sweep.together):
        names = pending[start : start + sweep.together]
        group = {"kind": "group", "seed": seed, "name": f"group-{len(log.groups.get(seed, []))}", "trials": names}
        log.append(group)
        _train_and_measure(sweep, group)


def _train_and_measure(sweep: _Sweep, group: dict[str, Any]) -> None:
    seed, names = group["seed"], group["trials"]
    folder = sweep.out / "heads" / f"seed-{seed}" / group["name"]
    methods = {name: sweep.trials[name].preset for name in names}
    training = sweep.preset.training.model_copy(update={"seed": seed})
    preset = sweep.preset.model_copy(update={"training": training, "methods": methods})
    log_line(f"Seed {seed}, {group['name']}: {len(names)} heads.")
    train_heads(preset, names, sweep.target, sweep.template, folder)
    logged = _logged(folder / "training.jsonl", sweep.preset.training.steps)
    for name in names:
        if (name, seed) not in sweep.log.trained:
            sweep.log.append({"kind": "trained", "trial": name, "seed": seed, "logged": logged.get(name, {})})
        _measure(sweep, name, seed, folder / name)
    (folder / "checkpoint.pt").unlink(missing_ok=True)  # Adam's moments would be most of a sweep's disk space


def _logged(path: Path, steps: int) -> dict[str, dict[str, float]]:
    """Each head's logged training values, as means over the last quarter of its steps."""
    values_of: dict[str, dict[str, list[float]]] = {}
    logged = [line for line in read_training(path) if line["kind"] == "step"]
    last = max((line["step"] for line in logged), default=0)  # the first step in a very short training
    since = min(0.75 * steps, last)
    for line in logged:
        if line["step"] >= since:
            for key, value in line.items():
                if isinstance(value, int | float) and math.isfinite(value) and key not in ("step", "rate"):
                    values_of.setdefault(line["method"], {}).setdefault(key, []).append(value)
    return {
        name: {key: round(math.fsum(each) / len(each), 5) for key, each in values.items()}
        for name, values in values_of.items()
    }


def _measure(sweep: _Sweep, name: str, seed: int, folder: Path) -> None:
    """Decode the remaining prompts with one head, drafting chains."""
    log, grid, target = sweep.log, sweep.grid, sweep.target
    missing = [prompt for prompt in log.prompts(seed) if prompt not in log.answers.get((name, seed), {})]
    if not missing:
        return
    head = load_head(folder, target)[0]
    chain = load_template(f"chain-{min(grid.depth, head.max_depth)}")
    longest = max(len(sweep.prompts[prompt]) for prompt in missing)
    cache = target.new_cache(capacity_for(longest, grid.new_tokens, chain.nodes, target.max_positions))
    with progress(f"decode {sweep.trials[name].label}", len(missing), "prompts") as advance:
        for prompt in missing:
            answer = decode(target, head, chain, sweep.prompts[prompt], grid.new_tokens, target.stop_ids, cache)
            line = {"kind": "answer", "trial": name, "seed": seed, "prompt": prompt}
            log.append({**line, "accepted": answer.accepted, "decode_s": round(answer.decode_s, 6)})
            advance()
    grid_seeds = (*grid.seeds, *grid.confirm_seeds)
    done = sum(log.measured(trial, each) for trial in sweep.trials for each in grid_seeds)
    sweep.heads_done += 1
    minutes = (time.perf_counter() - sweep.started) / sweep.heads_done / 60
    left = max(len(sweep.trials) * len(grid.seeds) + 2 * len(grid.confirm_seeds) - done, 0)
    log_line(f"Sweep: {done} heads measured, {left} left, about {minutes * left:.0f} min.")
