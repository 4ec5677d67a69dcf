"""Compare heads with the baselines of a run record: verdicts with intervals, as a Markdown table.

Also refuses to reuse heads in a folder that were trained by other code.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from koala_bench.common.bundled import RECIPES
from koala_bench.common.files import sha256_of, write_text
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import Preset
from koala_bench.records import statistics
from koala_bench.records.reading import Run, read_run
from koala_bench.records.statistics import Interval
from koala_bench.records.summaries import VANILLA, Summary, sample, summaries_of
from koala_bench.registry import HEADS, load
from koala_bench.results.tables.notes import Measured, exceptions, incomplete, settings
from koala_bench.results.tables.published import read_table_spec
from koala_bench.results.tables.rendering import NOTHING, Grid, Note, grid_of, label_of, to_markdown, with_interval


@dataclass(frozen=True)
class Comparison:
    """One head against one baseline, on the turns that all compared methods finished.

    Attributes:
        length, speed: change in acceptance length and in tokens per second from baseline to head, percent.
    """

    head: Summary
    baseline: Summary
    length: Interval
    speed: Interval

    @property
    def length_verdict(self) -> str:
        """Verdict on the acceptance length."""
        return _verdict(self.length)

    @property
    def speed_verdict(self) -> str:
        """Verdict on the speed."""
        return _verdict(self.speed)


def _verdict(change: Interval) -> str:
    return "better" if change.low > 0 else "worse" if change.high < 0 else "not distinguishable"


def methods_to_compare(methods: Sequence[str], heads: Sequence[str] | None) -> list[str]:
    """The methods to compare with the others: ``heads``, or by default those not in the paper's table.

    Raises:
        KoalaBenchError: a head is none of the methods, all are the paper's, or vanilla is to be judged.
    """
    if unknown := [head for head in heads or () if head not in methods]:
        raise KoalaBenchError(f"--head {unknown[0]} is not one of --methods.", f"They are {', '.join(methods)}.")
    paper = read_table_spec(RECIPES / "table1.toml").methods
    compared = list(heads or [name for name in methods if name not in paper])
    if not compared:
        raise KoalaBenchError(
            f"None of the methods {', '.join(methods)} is a head of your own: the paper's table has them all.",
            "Name a head of your own in --methods, or choose one with --head.",
        )
    if VANILLA in compared:
        raise KoalaBenchError("Vanilla decoding is what the others are compared with.", "Choose another --head.")
    return compared


def judge_record(
    record: Path, methods: Sequence[str] | None, heads: Sequence[str] | None, out: Path | None = None
) -> str:
    """The verdict table of a record, written to ``out/verdict.md`` too; errors as ``compare_heads``."""
    run = read_run(record)
    text = verdict_table(run, compare_heads(run, methods_to_compare(methods or list(run.methods), heads), methods))
    if out is not None:
        write_text(out / "verdict.md", text)
    return text


def compare_heads(run: Run, heads: Sequence[str], methods: Sequence[str] | None = None) -> list[Comparison]:
    """Compare each head with every method that is none of ``heads``, and ``HEAD+OBJECTIVE`` with ``HEAD`` besides.

    Args:
        heads: whose verdicts are wanted.
        methods: what takes part; vanilla always does. None takes all of the run.

    Raises:
        KoalaBenchError: a method is not in the record or finished no turn, there is nothing to compare, or see
            ``summarise``.
    """
    names = list(dict.fromkeys([VANILLA, *(run.methods if methods is None else methods), *heads]))
    for name in names:
        if name not in run.methods:
            raise KoalaBenchError(f"{run.path} has no method '{name}'.", f"It has {', '.join(run.methods)}.")
    chosen = sample([run], names)
    summaries = {summary.name: summary for summary in summaries_of(chosen)}
    for name in names:
        if name not in chosen.totals:
            raise KoalaBenchError(
                f"{name} finished no turn in {run.path}.", "Leave it out of --methods, or let the evaluation go on."
            )
    found = []
    for head in heads:
        plain = head.rpartition("+")[0]
        for baseline in (name for name in names if name not in heads or name == plain):
            changes = (
                chosen.interval(statistics.change_percent(of(head), of(baseline)))
                for of in (chosen.length, chosen.speedup)
            )
            found.append(Comparison(summaries[head], summaries[baseline], *changes))
    if not found:
        raise KoalaBenchError(
            "There is nothing to compare the heads with.",
            "Name the heads in question with --head, and the baselines in --methods.",
        )
    return found


_LEGEND = (
    f"Better or worse: the whole {100 * statistics.CONFIDENCE:.0f} % interval of the change lies on one side of zero,"
    f" by a paired bootstrap over questions ({statistics.RESAMPLES:,} resamples); of one question there is none.",
    statistics.CAUTION,
    "τ: tokens per verification step. Speedup and speed are of decoding; whole answer: with the reading of the prompt"
    " by the target and by the head.",
    "The verdicts are about these weights: another training seed may move the numbers.",
)


def verdict_table(run: Run, comparisons: Sequence[Comparison]) -> str:
    """The comparisons as Markdown, with what the verdicts mean and how the record was made."""
    rows = [
        {
            "Head": label_of(each.head),
            "Against": label_of(each.baseline),
            "Acceptance length τ": _both(each, "acceptance_length"),
            "Change of τ (%)": with_interval(each.length, 1, sign=True),
            "Verdict on τ": each.length_verdict,
            "Speedup (x)": _both(each, "speedup"),
            "Change of speed (%)": with_interval(each.speed, 1, sign=True),
            "Verdict on speed": each.speed_verdict,
            "Whole answer (x)": _both(each, "whole_answer"),
        }
        for each in comparisons
    ]
    heads = ", ".join(dict.fromkeys(row["Head"] for row in rows))
    methods = {summary.name: summary for each in comparisons for summary in (each.head, each.baseline)}
    measured = Measured(run.target, run, list(methods.values()))
    notes = [Note("Incomplete", tuple(incomplete(measured)), alarm=True), Note("What the verdicts mean", _LEGEND)]
    notes.append(settings([measured], ()))
    table = grid_of(rows, ["Head", "Against", "Verdict on τ", "Verdict on speed"])
    further = [_equal(methods.values()), *exceptions([measured])]
    return to_markdown(table, f"{heads} on {run.target}", notes, further)


def _both(each: Comparison, number: Literal["acceptance_length", "speedup", "whole_answer"]) -> str:
    return f"{getattr(each.head, number).value:.2f} vs {getattr(each.baseline, number).value:.2f}"


def _equal(methods: Iterable[Summary]) -> tuple[str, Grid]:
    rows = [
        {
            "Method": label_of(each),
            "Turns counted": f"{each.counted}/{each.turns}",
            "Equal answers": f"{each.compared - len(each.differing)}/{each.compared}" if each.compared else NOTHING,
        }
        for each in methods
    ]
    return "Answers, and those that are vanilla's token by token", grid_of(rows, ["Method"])


def refuse_changed_code(preset: Preset, methods: Sequence[str], folder: Path) -> Callable[[], None]:
    """Refuse to continue if the code of a head has changed since it was trained in a folder.

    Compares the source file of the head's class, not what that file imports.

    Returns:
        a function that writes the current hashes to the folder, to be called when training begins.
    """
    hashes = folder / "sources.json"
    heads = {name: load(HEADS, preset.method(name).head) for name in methods if name != VANILLA}
    now = {name: sha256_of(Path(inspect.getfile(head))) for name, head in heads.items()}
    try:
        before = json.loads(hashes.read_text(encoding="utf-8")) if hashes.exists() else {}
        changed = [name for name in now if before.get(name, now[name]) != now[name]]
    except (OSError, ValueError, AttributeError) as error:
        raise KoalaBenchError(
            f"{hashes} is damaged.", "Choose another --out, or delete the folder to start again."
        ) from error
    if changed:
        raise KoalaBenchError(
            f"The code of {', '.join(changed)} is not the one that was trained in {folder}.",
            "Choose another --out, or delete the folder to start again.",
        )
    return lambda: write_text(hashes, json.dumps({**before, **now}, indent=2) + "\n")
