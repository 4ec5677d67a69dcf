"""The gate's verdicts as reports: Markdown for the terminal and a pull request, JUnit XML for build servers."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from datetime import UTC, datetime

from koala_bench.gate.regression import OVERALL, Gate, Line
from koala_bench.records.schema import RunHeader
from koala_bench.results.tables.notes import code_in_words
from koala_bench.results.tables.rendering import NOTHING, Note, grid_of, to_markdown, with_interval

# Characters that XML 1.0 cannot hold even escaped; an error message or a name in a record may have some.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _row(line: Line) -> dict[str, str]:
    return {
        "Method": line.name,
        "Heads": "fixed" if line.mode == "fixed" else f"retrained, {line.seeds[1]} against {line.seeds[0]} seeds",
        "Baseline τ": f"{line.baseline:.3f}",
        "τ": f"{line.measured:.3f}",
        "Change (%) [90 %]": with_interval(line.change, 2, sign=True),
        "Margin (%)": f"{line.margin:.1f}",
        "Speedup (x), not gated": f"{line.speedups[0]:.2f} → {line.speedups[1]:.2f}" if line.speedups else NOTHING,
        "Verdict": "pass" if line.passed else "REGRESSION",
    }


def _source(header: RunHeader) -> str:
    return f"run {header['run_id'][:8]} of {header['created']}, {code_in_words(header['code'])}"


def headline(gate: Gate) -> str:
    """One line: passed, or what failed."""
    failed = [line.name for line in gate.lines if not line.passed]
    return "Regression gate: passed" if not failed else f"Regression gate: acceptance length lost ({', '.join(failed)})"


_LEGEND = (
    "τ is the acceptance length: tokens per verification step, the target's own (bonus) token included.",
    "Pass: the whole 90 % interval of the change lies above minus the margin, a one-sided test at 5 %.",
    "Fixed: the same checkpoints on both sides; interval by paired bootstrap over questions. Retrained: other"
    " checkpoints; interval by the t distribution from the spread between the baseline's seeds.",
    "Speedups never decide, because times on shared machines are noise; of different machines they are not shown.",
)


def _explanations(gate: Gate) -> tuple[str, ...]:
    sides = (("Baseline", gate.baselines), ("Record", gate.records))
    sources = (f"{side}: {_source(header)}." for side, headers in sides for header in headers)
    return (*_LEGEND, f"{gate.questions} questions, {gate.answers} answers of each method.", *sources)


def to_report(gate: Gate) -> str:
    """The table with its findings and explanations, in GitHub's Markdown."""
    table = grid_of([_row(line) for line in gate.lines], ["Method", "Heads", "Verdict"])
    notes = (Note("Reported; decides nothing", gate.findings), Note("How to read this", _explanations(gate)))
    return to_markdown(table, headline(gate), notes)


def _sentence(line: Line) -> str:
    what = "all methods together" if line.name == OVERALL else line.name
    return (
        f"{what}: acceptance length {line.baseline:.3f} -> {line.measured:.3f}, change"
        f" {with_interval(line.change, 2, sign=True)} % (90 %"
        f" interval), margin {line.margin:.1f} %"
    )


def to_junit(gate: Gate) -> str:
    """JUnit XML as Jenkins, GitLab and GitHub's actions read it: one test case per method, and one for all together.

    The time of a case is the decode time of the new records in seconds.
    """

    def text(value: str) -> str:
        return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", value)

    failures = sum(not line.passed for line in gate.lines)
    seconds = next(line.decode_s for line in gate.lines if line.name == OVERALL)
    shared = {"tests": str(len(gate.lines)), "failures": str(failures), "errors": "0"}
    time = {"time": f"{seconds:.3f}"}
    counts = {**shared, "skipped": "0", **time}
    # The JUnit schema's times have no zone.
    created = datetime.fromisoformat(gate.records[0]["created"]).astimezone(UTC).replace(tzinfo=None)
    suites = ET.Element("testsuites", {"name": "koala-bench check", **shared, **time})
    suite = ET.SubElement(
        suites, "testsuite", {"name": "acceptance length", **counts, "timestamp": created.isoformat(timespec="seconds")}
    )
    properties = ET.SubElement(suite, "properties")
    values = {
        "margin_percent": f"{gate.wanted:g}",
        "baseline": " ".join(header["run_id"] for header in gate.baselines),
        "record": " ".join(header["run_id"] for header in gate.records),
    }
    for name, value in values.items():
        ET.SubElement(properties, "property", {"name": name, "value": text(value)})
    for line in gate.lines:
        case = ET.SubElement(
            suite,
            "testcase",
            {"classname": "koala_bench.acceptance_length", "name": text(line.name), "time": f"{line.decode_s:.3f}"},
        )
        if not line.passed:
            failure = ET.SubElement(case, "failure", {"message": text(_sentence(line)), "type": "regression"})
            failure.text = text(
                f"The lower end of the interval, {line.change.low:+.2f} %, does not lie above -{line.margin:.2f} %."
            )
        ET.SubElement(case, "system-out").text = text(_sentence(line))
    ET.SubElement(suite, "system-out").text = text("\n".join((headline(gate), *gate.findings, *_explanations(gate))))
    ET.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"
