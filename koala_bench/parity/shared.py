"""Shared by all parity checks: reading recordings, comparing with them, and one forward pass of a head."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target
from koala_bench.heads import FeatureBatch
from koala_bench.interop import eagle, medusa
from koala_bench.interop.checkpoints import Fields, Imported, read_json, read_tensors
from koala_bench.tree import Template

# Tolerances of the recordings' README.
OUTPUTS_ABSOLUTE = 1e-4
LOSSES_RELATIVE = 1e-4
_GRADIENTS_RELATIVE = 1e-3

Status = Literal["pass", "fail", "skip", "unsupported"]


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: part and quantity, such as ``medusa_decode/accept_lengths``.
        status: ``skip`` if the recordings lack something, ``unsupported`` if this project does.
    """

    name: str
    status: Status
    detail: str


class Recordings:
    """The folder, with the targets that were already loaded from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._targets: dict[str, Target] = {}

    def absent(self, *paths: str) -> str:
        """Those of some paths that do not exist, as text; empty if all do."""
        return ", ".join(path for path in paths if not (self.folder / path).exists())

    def target(self, path: str) -> Target:
        if path not in self._targets:
            self._targets[path] = load_target(str(self.folder / path), "cpu", "float32", tokenizer=False)
        return self._targets[path]

    def json(self, path: str) -> Fields:
        return read_json(self.folder / path)

    def tensors(self, path: str) -> Fields:
        """Tensors with their numbers as float32 and int64, whatever they are stored as."""
        found = read_tensors(self.folder / path)
        plain = {name: each.float() if each.is_floating_point() else each.long() for name, each in found.items()}
        return Fields(found.path, plain)

    def medusa(self, path: str, target: Target) -> Imported:
        return medusa.read(self.folder / path, target.spec())

    def eagle(self, path: str, target: Target) -> Imported:
        return eagle.read(self.folder / path, target.spec())


@dataclass(frozen=True)
class Drafter:
    """A head on its target, with the tree that it fills.

    Attributes:
        rows: leaf paths of a static tree, padded with -1, in the order of the recordings; those of a dynamic one differ
            from step to step.
    """

    target: Target
    head: Any
    template: Template
    rows: list[list[int]]


def ok(checks: Iterable[Check]) -> bool:
    """Whether nothing failed."""
    return all(each.status != "fail" for each in checks)


def skipped(name: str, absent: str) -> list[Check]:
    """The check of a part that lacks files; ``absent`` names them."""
    return [Check(name, "skip", f"{absent} is absent")]


def judge(name: str, faults: Sequence[str], detail: str) -> Check:
    """A check that passes if there are no faults; otherwise it reports the first one."""
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return Check(name, "fail", faults[0] + more) if faults else Check(name, "pass", detail)


def near(
    name: str,
    pairs: Iterable[tuple[str, torch.Tensor | float, torch.Tensor | float]],
    allowed: float = OUTPUTS_ABSOLUTE,
    relative: bool = False,
) -> Check:
    """Compare tensors or numbers (what, ours, recorded) by their largest absolute or relative difference."""
    faults, differences = [], []
    for what, mine, theirs in pairs:
        ours, recorded = (torch.as_tensor(each, dtype=torch.float64) for each in (mine, theirs))
        if ours.shape != recorded.shape:
            faults.append(f"{what}: shape {list(ours.shape)}, recorded {list(recorded.shape)}")
            continue
        apart = (ours - recorded).abs() / (recorded.abs().clamp(min=1e-6) if relative else 1.0)
        differences.append(float(apart.max()) if apart.numel() else 0.0)
        if not differences[-1] <= allowed:  # so that nan fails
            faults.append(f"{what}: differs by {differences[-1]:.1e}, {allowed:.0e} is allowed")
    if not faults and not differences:
        return Check(name, "skip", "nothing of it is recorded")
    kind = "largest relative difference" if relative else "largest difference"
    return judge(name, faults, f"{len(differences)} compared, {kind} {max(differences, default=0.0):.1e}")


def by_prompt(part: str, key: str, ours: Mapping[int, torch.Tensor], expected: Fields) -> Check:
    """Compare a tensor of each prompt with the recorded one of that name."""
    return near(f"{part}/{key}", ((f"prompt {i}", each, expected[f"prompt{i}.{key}"]) for i, each in ours.items()))


def prompt_numbers(tensors: Fields) -> list[int]:
    """Numbers of the recorded prompts."""
    return sorted(int(found[1]) for name in tensors if (found := re.fullmatch(r"prompt(\d+)\.input_ids", name)))


def compare_norms(name: str, ours: dict[str, float], recorded: Fields) -> Check:
    """Compare gradient norms by parameter; recordings may hold fewer parameters than the head has."""
    if unknown := sorted(set(recorded) - set(ours)):
        return Check(name, "fail", f"the head has no parameter {', '.join(unknown)}")
    return near(name, ((key, ours[key], value) for key, value in recorded.items()), _GRADIENTS_RELATIVE, relative=True)


def first_difference(where: str, ours: Sequence[Any], recorded: Sequence[Any]) -> str:
    """The first entry in which two sequences differ, in words."""
    for i, (mine, theirs) in enumerate(zip(ours, recorded, strict=False)):
        if mine != theirs:
            return f"{where}, entry {i}: {reprlib.repr(mine)}, recorded {reprlib.repr(theirs)}"
    return f"{where}: {len(ours)} entries, recorded {len(recorded)}"


def predictions(
    head: Any, target: Target, next_ids: torch.Tensor, hidden: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Predictions of a head at every state, through the loss that it is trained with.

    Args:
        next_ids: int64 [tokens], the token after each state's own.
        hidden: [tokens, hidden_size].
    Returns:
        predicted features [tokens, hidden_size] and logits [tokens, vocab_size] for each drafting depth.
    """
    count = len(next_ids)
    # Tokens appended after the last state give its deepest prediction a label; causal attention never sees them.
    beyond = head.max_depth + 1
    ids = torch.cat([next_ids[:1], next_ids, next_ids.new_zeros(beyond)])[None]
    states = torch.cat([hidden, hidden.new_zeros(1 + beyond, hidden.shape[-1])])[None, :, None]
    every, length = torch.ones_like(ids, dtype=torch.bool), torch.tensor([ids.shape[1]])
    with torch.no_grad():
        found = head.loss(FeatureBatch(ids, every, states, 0, target.output, length))
    return [(each.feature[each.rows < count], each.logits[each.rows < count]) for each in found.predictions]


def states_of(target: Target, ids: torch.Tensor) -> torch.Tensor:
    """States [..., tokens, hidden_size] after the final norm, free of the inference mode they come from."""
    return target.states(ids if ids.ndim == 2 else ids[None]).clone()[:, :, -1].view(*ids.shape, -1)


def gradients_of(head: Any, total: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a loss by parameter; zeros where it does not depend on one."""
    parameters = dict(head.named_parameters())
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))
