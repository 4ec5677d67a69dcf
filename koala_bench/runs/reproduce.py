"""A recipe from start to end: how long it takes, trainings, evaluations, tables and figures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from koala_bench.common.machine import peak_memory_bytes
from koala_bench.common.progress import log_line
from koala_bench.dialogues.questions import find_questions, read_questions
from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.processes import in_fresh_process, record_of_process, refuse_launched
from koala_bench.planning.requirements import find_target
from koala_bench.presets import Preset
from koala_bench.results.making import make, sources_in
from koala_bench.results.recipes import Job, Plan
from koala_bench.results.report import write_report
from koala_bench.runs.evaluate import evaluate
from koala_bench.runs.forecast import LONG_S, forecast
from koala_bench.training.experiment import STATES, load_preset_target, train_heads, trained_methods
from koala_bench.training.precision import settle_precision
from koala_bench.training.shared_states import features_read
from koala_bench.training.states import remove_states
from koala_bench.training.tracking import check_service


def reproduce(
    planned: Plan,
    preset: Preset,
    title: str,
    name: str,
    folder: Path,
    *,
    data_dir: Path | None,
    command: Sequence[str],
    quick: bool = False,
    report: bool = False,
    log_with: str | None = None,
    processes: int = 1,
    keep_states: bool = False,
    heads: Path | None = None,
) -> list[Path]:
    """Train, decode and write what a plan says into ``folder``; returns the tables, figures and pages.

    Args:
        title: what is made and where, for the first line.
        name: of the preset, for the records.
        command: as typed, for the records.
        quick: whether the preset is in its quick form.
        report: write the HTML page of the folder too.
        log_with: see ``train_heads``.
        processes: how often to evaluate, each time in a fresh process.
        keep_states: leave the states that trainings stored in ``folder/states``.
        heads: folder of trained heads to use in place of a training.
    """
    started = time.perf_counter()
    check_service(log_with)
    if processes > 1:
        refuse_launched()
    if heads is not None:
        planned = _with_heads(planned, heads)
    for job in planned.jobs:  # a wrong --questions should not wait for the training
        read_questions(find_questions(job.preset.evaluation.questions, data_dir)[1])
    everything = replace(planned, jobs=_jobs(planned, processes))
    _say_how_long(everything, preset, title, data_dir, quick, trained=heads is not None)
    for remark in planned.remarks:
        log_line(remark)
    if heads is None:
        _train(planned, folder / STATES, keep_states, log_with)
    records = _evaluated(planned, preset, name, data_dir, command, processes)
    written = _pages(planned, folder, data_dir, report)
    _say_the_end(written, records, folder, time.perf_counter() - started)
    return written


def _with_heads(planned: Plan, heads: Path) -> Plan:
    """The plan with trained heads in place of its one training."""
    if len(planned.trainings) > 1:
        raise KoalaBenchError(
            f"This needs the heads of {len(planned.trainings)} trainings, --heads gives those of one.",
            "Leave --heads out, or ask for table1 or the leaderboard.",
        )
    return replace(planned, jobs=tuple(replace(job, heads=heads) for job in planned.jobs))


def _train(planned: Plan, states: Path, keep: bool, log_with: str | None) -> None:
    """All trainings of a plan. Those that store the target's states share one folder of them, which goes in the end."""
    trainings = planned.trainings
    for heads, (preset, methods) in trainings.items():
        target, template = load_preset_target(preset)
        names = trained_methods(preset, methods, target)
        settled = settle_precision(
            preset, names, heads, target.device, [other for other in trainings if other != heads]
        )
        also = [
            each
            for other, names in trainings.values()
            if len(trainings) > 1 and other.training.stored_states
            for each in features_read(other, trained_methods(other, names, target), target)
        ]
        train_heads(settled, methods, target, template, heads, states=states, log_with=log_with, also=also)
        del target
    if not keep:
        remove_states(states)


def _evaluated(
    planned: Plan, preset: Preset, name: str, data_dir: Path | None, command: Sequence[str], processes: int
) -> list[Path]:
    """The records of all evaluations."""
    if processes == 1:
        loaded = load_preset_target(preset)
        for job in planned.jobs:
            evaluate(job.preset, name, job.methods, job.heads, job.record, data_dir, command, loaded=loaded)
        return [job.record for job in planned.jobs]
    jobs = _jobs(planned, processes)
    for number, job in enumerate(jobs):
        process = 1 + number // len(planned.jobs)
        log_line(f"Process {process} of {processes} into {job.record}.")
        in_fresh_process(evaluate, job.preset, name, job.methods, job.heads, job.record, data_dir, command, process)
    return [job.record for job in jobs]


def _jobs(planned: Plan, processes: int) -> tuple[Job, ...]:
    """The jobs of all processes, one process after the other."""
    return tuple(
        replace(job, record=record_of_process(job.record, process))
        for process in range(1, processes + 1)
        for job in planned.jobs
    )


def _say_how_long(planned: Plan, preset: Preset, title: str, data_dir: Path | None, quick: bool, trained: bool) -> None:
    """The first line. Where the target has to be downloaded, it says so, and a second one follows when it is here."""
    if not find_target(preset).at_hand:
        log_line(f"{title}: the target has to be downloaded first; then follows how long the rest takes.")
    target, template = load_preset_target(preset)
    expected = forecast(planned, target, template, data_dir, trained)
    del target
    reduced = " (quick: sizes are reduced, the numbers mean little)" if quick else ""
    log_line(f"{title}{reduced}: {expected}.")
    if expected.total_s > LONG_S and not quick and preset.quick:
        log_line("With --quick it takes minutes, at reduced sizes: that shows that everything works, no more.")


def _pages(planned: Plan, folder: Path, data_dir: Path | None, report: bool) -> list[Path]:
    sources = sources_in(folder)
    if missing := [name for name in planned.products if not sources.of(name)]:
        log_line(
            f"Not made: {', '.join(missing)}, for {folder} has no log of the training (its heads come from elsewhere)."
        )
    written = [path for name in planned.products if name not in missing for path in make(name, sources, folder)]
    return [*written, write_report(folder, folder / "report.html", data_dir)] if report else written


def _say_the_end(written: Sequence[Path], made: Sequence[Path], folder: Path, seconds: float) -> None:
    names = ", ".join(str(path.relative_to(folder)) for path in (*written, *made))
    peak = peak_memory_bytes()
    memory = "" if peak is None else f", at most {peak / 2**30:.1f} GiB of memory"
    log_line(f"Wrote {names} to {folder}; {seconds / 60:.1f} minutes{memory}.")
