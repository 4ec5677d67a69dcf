"""Quick checks, for authors of heads, that a head keeps the contract of ``koala_bench.heads``; on tiny random targets.

Each check looks for one mistake that would otherwise show up as a poor number, hours later. In: a head's name. Out: a
result per check. Read ``drafts`` first. In a test of a head's own package::

    from koala_bench.contract import check_head

    def test_the_contract_is_kept():
        assert [result for result in check_head("my_head") if result.outcome == "failed"] == []
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import koala_bench
from koala_bench.contract import drafts, module, observation, vocabulary
from koala_bench.contract.bench import Bench, BrokenError, NotApplicableError
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import MethodPreset

CHECKS: dict[str, Callable[[Bench], str]] = {
    "form": module.form,
    "frozen parts": module.frozen_parts,
    "gradients": module.gradients,
    "target": module.target_unchanged,
    "trees": drafts.trees,
    "forgetting": drafts.forgetting,
    "lent states": drafts.lent_states,
    "prompts": drafts.prompts,
    "losslessness": drafts.losslessness,
    "observation": observation.observation,
    "positions": drafts.positions,
    "predictions": drafts.predictions,
    "saving": module.saving,
    "vocabulary": vocabulary.draft_vocabulary,
    "determinism": module.determinism,
    "batches": drafts.batches,
    "half precision": module.half_precision,
}


@dataclass(frozen=True)
class CheckResult:
    """What one check found.

    Attributes:
        name: of the check; ``CHECKS`` lists them.
        detail: what was checked, what is wrong and where to look, or why the check does not apply.
    """

    name: str
    outcome: Literal["passed", "failed", "not applicable"]
    detail: str

    def __str__(self) -> str:
        return f"{self.outcome:<15} {self.name:<14} {self.detail}"


def check_head(head: str | type[Any], options: Mapping[str, Any] | None = None) -> list[CheckResult]:
    """Run all checks on a head; takes a few seconds and leaves no files.

    Args:
        head: an installed name, ``package.module:Class``, ``./file.py:Class``, or a class at the top of an imported
            module.
        options: of the head, as a preset would give them.

    Raises:
        KoalaBenchError: nothing has that name, the options are not the head's, or it is no module.
    """
    name = head if isinstance(head, str) else f"{head.__module__}:{head.__qualname__}"
    preset = MethodPreset(head=name, options=dict(options or {}), tree="chain-1")
    results: list[CheckResult] = []
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        bench = Bench(preset, Path(folder))
        for check, function in CHECKS.items():
            if results and results[0].outcome == "failed":
                results.append(CheckResult(check, "not applicable", f"the check '{results[0].name}' failed"))
            else:
                results.append(_run(check, function, bench))
    return results


def _run(name: str, check: Callable[[Bench], str], bench: Bench) -> CheckResult:
    try:
        return CheckResult(name, "passed", check(bench))
    except NotApplicableError as reason:
        return CheckResult(name, "not applicable", str(reason))
    except BrokenError as finding:
        return CheckResult(name, "failed", str(finding))
    except Exception as error:  # whatever a head under test raises is a finding about the head
        if isinstance(error, KoalaBenchError) and check is module.form:
            raise
        others = (Path(koala_bench.__file__).parent, Path(torch.__file__).parent)
        every = traceback.extract_tb(error.__traceback__)
        frames = [frame for frame in every if not any(map(Path(frame.filename).is_relative_to, others))]
        where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
        message = (str(error).strip().splitlines() or [""])[0]
        return CheckResult(name, "failed", f"{type(error).__name__}: {message}{where}")
