"""The header of a run record: what is measured, where and with which code."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from koala_bench.common.provenance import code_state
from koala_bench.dialogues.encoding import ChatTemplate
from koala_bench.dialogues.questions import questions_sha256
from koala_bench.engine.devices import machine
from koala_bench.engine.loading.targets import fingerprint
from koala_bench.engine.target import Target
from koala_bench.evaluation.methods import Method
from koala_bench.presets import Preset
from koala_bench.records.schema import SCHEMA, MethodInfo, RunHeader


def header_of(
    preset: Preset,
    name: str,
    target: Target,
    template: ChatTemplate,
    methods: Sequence[Method],
    questions: tuple[str, Path, int],
    command: Sequence[str],
    process: int,
    processes: int,
) -> RunHeader:
    """The header of a run.

    Args:
        name: of the preset.
        questions: their name, file and number.
        process: which of several fresh processes that make the same evaluation, from 1 on.
        processes: that share out the questions.
    """
    prints, wanted = fingerprint(target), preset.evaluation
    header: RunHeader = {
        "kind": "run",
        "schema": SCHEMA,
        "run_id": uuid.uuid4().hex,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "preset": {
            "name": name,
            "sha256": preset.sha256,
            "resolved": preset.model_dump(mode="json"),
            "settled": _settled(preset, target, template, [method.info for method in methods]),
        },
        "target": {
            "name": target.name,
            "path": target.name,  # as it was asked for, not where it lies on this machine
            "config_sha256": prints["config_sha256"],
            "weights_sha256": prints["weights_sha256"],
            "parameters": target.parameters,
            "layers": target.layers,
            "dtype": str(target.dtype).removeprefix("torch."),
            "device": target.device.type,
            "attention": preset.target.attention,
        },
        "methods": [method.info for method in methods],
        "acceptance": {
            "rule": "speculative sampling" if wanted.temperature else "greedy",
            "temperature": wanted.temperature,
            "top_k": wanted.top_k,
            "top_p": wanted.top_p,
        },
        "questions": {"name": questions[0], "sha256": questions_sha256(questions[1]), "count": questions[2]},
        "chat_template": {"name": template.name, "sha256": template.sha256},
        "limits": {"max_new_tokens": wanted.max_new_tokens, "stop_ids": list(target.stop_ids)},
        "seed": wanted.seed,
        "measure": {"warmup": wanted.warmup, "repeats": wanted.repeats, "order": "drawn"},
        "environment": machine(target.device),
        "code": code_state(),
    }
    if process > 1:
        header["measure"]["process"] = process
    if processes > 1:
        header["measure"]["processes"] = processes
    if target.engine == "graph":
        header["target"]["engine"] = "graph"
    if target.compiler is not None:
        header["environment"]["compiler"] = target.compiler
    if target.stop_texts:
        header["limits"]["stop_texts"] = list(target.stop_texts)
    if target.ignored:
        header["target"]["ignored_settings"] = dict(target.ignored)
    return header


def _settled(
    preset: Preset, target: Target, template: ChatTemplate, methods: Sequence[MethodInfo]
) -> dict[str, str | int | None]:
    """Values of the ``auto`` settings: of the target on this machine, and of the training in the heads."""
    wanted = preset.target
    found: dict[str, str | int | None] = {}
    if wanted.threads is None and target.device.type == "cpu":
        found["target.threads"] = torch.get_num_threads()
    came_to = {
        "device": str(target.device), "dtype": str(target.dtype).removeprefix("torch."), "engine": target.engine,
        "chat_template": template.name,
    }  # fmt: skip
    found |= {f"target.{key}": value for key, value in came_to.items() if getattr(wanted, key) == "auto"}
    if wanted.template_date is None and template.date is not None:
        found["target.template_date"] = template.date.isoformat()
    trained = {each["training"].get("precision") for each in methods if each["training"] is not None}
    if preset.training.precision == "auto" and len(trained) == 1:
        found["training.precision"] = trained.pop()
    return found
