"""An audit of losslessness: every task decoded, every answer compared with vanilla's, each difference judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Task:
    """A question set: the short name of its records, and its questions."""

    name: str
    questions: Sequence[Question]


def questions_of(preset: Preset, tasks: str | None, data_dir: Path | None) -> dict[str, Task]:
    """The question sets to audit, all read, so that a wrong file is told before the first hour.

    Args:
        tasks: names or files separated by commas, or ``all`` of the data folder; None for the preset's questions.

    Raises:
        KoalaBenchError: there is no such set, or none at all.
    """
    found = {}
    for name in _tasks(preset, tasks, data_dir):
        short, path = find_questions(name, data_dir)
        found[name] = Task(short, read_questions(path))
    return found


def _tasks(preset: Preset, tasks: str | None, data_dir: Path | None) -> list[str]:
    if tasks is None:
        return [preset.evaluation.questions]
    if tasks == "all":
        folder = data_folder(data_dir)
        if names := names_in(folder):
            return names
        raise KoalaBenchError(
            f"{folder} has no question files.", "Fetch them with `koala-bench data --all`, or name --tasks."
        )
    if names := [name.strip() for name in tasks.split(",") if name.strip()]:
        return list(dict.fromkeys(names))
    raise KoalaBenchError(f"--tasks '{tasks}' names no question set.", "Name some, separated by commas, or all.")


def audit(
    preset: Preset,
    name: str,
    methods: Sequence[str],
    tasks: Mapping[str, Task],
    heads: Path,
    folder: Path,
    data_dir: Path | None,
    command: Sequence[str],
) -> tuple[str, bool]:
    """Decode the tasks into records of ``folder``, judge them and write ``audit.md``.

    Args:
        name: of the preset, for the records.
        heads: folder of trained heads.

    Returns:
        the report in Markdown, and whether no defect was found.
    """
    target, template = load_preset_target(preset)

    def in_precision(dtype: str) -> Target:
        wanted = preset.target
        return load_target(
            wanted.name,
            wanted.device,
            dtype,
            wanted.revision,
            wanted.attention,
            engine=wanted.engine,
            threads=wanted.threads,
        )

    found = []
    for task, task_questions in tasks.items():
        own = preset.model_copy(update={"evaluation": preset.evaluation.model_copy(update={"questions": task})})
        record = folder / f"{task_questions.name}-{str(target.dtype).removeprefix('torch.')}.jsonl"
        run = evaluate(own, name, methods, target, template, heads, record, data_dir, command)
        found.append(judging.audit(run, task_questions.questions, template, target, in_precision))
        equal, compared = (sum(getattr(count, of) for count in found[-1].counts) for of in ("equal", "compared"))
        log_line(f"{task}: {equal} of {compared} answers equal to vanilla's.")
    text = judging.to_markdown(found)
    write_text(folder / "audit.md", text)
    return text, not any(each.defects for each in found)
