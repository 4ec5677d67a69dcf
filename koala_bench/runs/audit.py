"""An audit of losslessness: every task decoded, every answer compared with vanilla's, each difference judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from koala_bench.common.files import write_text
from koala_bench.common.progress import log_line
from koala_bench.dialogues.downloads import data_folder
from koala_bench.dialogues.questions import Question, find_questions, names_in, read_questions
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.loop import evaluate
from koala_bench.gate import audit as judging
from koala_bench.presets import Preset
from koala_bench.training.experiment import load_preset_target


def questions_of(preset: Preset, tasks: str | None, data_dir: Path | None) -> dict[str, tuple[str, list[Question]]]:
    """The question sets to audit, each with the short name of its records; all are read before the first hour.

    Args:
        tasks: names or files separated by commas, or ``all`` of the data folder; None for the preset's questions.

    Raises:
        KoalaBenchError: there is no such set, or none at all.
    """
    if tasks is None:
        names = [preset.evaluation.questions]
    elif tasks == "all":
        folder = data_folder(data_dir)
        if not (names := names_in(folder)):
            raise KoalaBenchError(
                f"{folder} has no question files.", "Fetch them with `koala-bench data --all`, or name --tasks."
            )
    elif not (names := [name.strip() for name in tasks.split(",") if name.strip()]):
        raise KoalaBenchError(f"--tasks '{tasks}' names no question set.", "Name some, separated by commas, or all.")
    found = {name: find_questions(name, data_dir) for name in names}
    return {name: (short, read_questions(path)) for name, (short, path) in found.items()}


def audit(
    preset: Preset,
    name: str,
    methods: Sequence[str],
    tasks: Mapping[str, tuple[str, Sequence[Question]]],
    heads: Path,
    folder: Path,
    data_dir: Path | None,
    command: Sequence[str],
) -> tuple[str, bool]:
    """Decode the tasks into records of ``folder`` and judge them: the text of ``audit.md``, and whether it is clean."""
    target, template = load_preset_target(preset)

    def in_precision(dtype: str) -> Target:
        of = preset.target
        return load_target(of.name, of.device, dtype, of.revision, of.attention, engine=of.engine, threads=of.threads)

    found = []
    for task, (short, questions) in tasks.items():
        own = preset.model_copy(update={"evaluation": preset.evaluation.model_copy(update={"questions": task})})
        record = folder / f"{short}-{str(target.dtype).removeprefix('torch.')}.jsonl"
        run = evaluate(own, name, methods, target, template, heads, record, data_dir, command)
        found.append(judging.audit(run, questions, template, target, in_precision))
        equal, compared = (sum(getattr(count, of) for count in found[-1].counts) for of in ("equal", "compared"))
        log_line(f"{task}: {equal} of {compared} answers equal to vanilla's.")
    text = judging.to_markdown(found)
    write_text(folder / "audit.md", text)
    return text, not any(each.defects for each in found)
