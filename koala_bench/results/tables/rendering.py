"""What a table looks like: columns, cells, and the table with its notes as CSV, Markdown and LaTeX.

The CSV holds the numbers with 12 digits, which hides how a machine's vector units round the last ones; the Markdown
and the LaTeX hold them rounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from koala_bench.records.summaries import VANILLA, Summary

_NOTHING = "\N{EN DASH}"
ALPHA = "\N{GREEK SMALL LETTER ALPHA}"

# ---------------------------------------------------------------------------------------------- cells


def _fixed(value: float, digits: int, sign: bool = False) -> str:
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", "+" if sign else "") if float(text) == 0 else text


def with_interval(value: float, low: float, high: float, digits: int, sign: bool = False) -> str:
    """A number with its interval in brackets, rounded; the number alone if there is no interval (NaN)."""
    if math.isnan(low) or math.isnan(high):
        return _fixed(value, digits, sign)
    return f"{_fixed(value, digits, sign)} [{_fixed(low, digits, sign)}, {_fixed(high, digits, sign)}]"


def _interval_cell(row: Mapping[str, Any], name: str, digits: int, sign: bool = False) -> str:
    if row[name] is None:
        return _NOTHING
    if row["method"] == VANILLA:
        return _fixed(row[name], digits, sign)  # 1 by definition
    return with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"], digits, sign)


def _rates_cell(row: Mapping[str, Any]) -> str:
    rates = [
        value
        for name, value in row.items()
        if name.startswith("acceptance_rate_given_parent_depth_") and value is not None
    ]
    return " / ".join(_fixed(rate, 2) for rate in rates) or _NOTHING


def _claim_cell(row: Mapping[str, Any]) -> str:
    if row["claim_speedup_change_x_low"] is None:
        return _NOTHING
    x, percent = ([row[f"claim_speedup_change_{unit}_{end}"] for end in ("low", "high")] for unit in ("x", "percent"))
    return f"+{x[0]:.2f} to +{x[1]:.2f} x; +{percent[0]:.2f} to +{percent[1]:.2f} %"


def _paper_cell(row: Mapping[str, Any]) -> str:
    values = [value for value in (row["paper_speedup"], row["paper_acceptance_length"]) if value is not None]
    if not values:
        return _NOTHING
    if set(values) == {"unknown"}:
        return "unknown"
    return "; ".join(value if isinstance(value, str) else f"{value:.2f}" for value in values)


@dataclass(frozen=True)
class Column:
    """A column of the rounded table: its heading, its cell, and whether it is aligned at the right."""

    heading: str
    cell: Callable[[Mapping[str, Any]], str]
    right: bool = True


def _plain(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: _NOTHING if row[name] is None else str(row[name])


@dataclass(frozen=True)
class ColumnGroup:
    """What a name in a table's file gives: rounded columns, and a pattern of its columns in the CSV."""

    shown: tuple[Column, ...]
    raw: str


def _label(name: str, lossless: bool, distance: float | None) -> str:
    return (
        name if lossless else f"{name} (lossy, total variation {_NOTHING if distance is None else _fixed(distance, 2)})"
    )


def label_of(summary: Summary) -> str:
    """What a method is called wherever its numbers are shown: a lossy one with its total variation."""
    return _label(summary.name, summary.method["lossless"], summary.distance)


def _method_cell(row: Mapping[str, Any]) -> str:
    return _label(str(row["method"]), row["lossless"], row["total_variation"])


def _yes_or_no(row: Mapping[str, Any]) -> str:
    return _NOTHING if row["adversarial"] is None else "yes" if row["adversarial"] else "no"


def _scaled(name: str, factor: float, digits: int) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: _NOTHING if row[name] is None else _fixed(row[name] * factor, digits)


def _interval_of(name: str, digits: int, sign: bool = False) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: _interval_cell(row, name, digits, sign)


_ENDS = "(_low|_high)?"
_CHANGES = (
    Column("Change (x)", _interval_of("speedup_change_x", 2, sign=True)),
    Column("Change (%)", _interval_of("speedup_change_percent", 1, sign=True)),
)
_PAPER = Column("Paper: speedup; τ", _paper_cell, right=False)

COLUMNS: dict[str, ColumnGroup] = {
    "target": ColumnGroup((Column("Target", _plain("target"), right=False),), "target"),
    "task": ColumnGroup((Column("Task", _plain("task"), right=False),), "task"),
    "questions": ColumnGroup((Column("Questions", _plain("questions")),), "questions"),
    "method": ColumnGroup((Column("Method", _method_cell, right=False),), "method"),
    "layers": ColumnGroup((Column("Layers K", _plain("layers")),), "layers"),
    "adversarial": ColumnGroup((Column("Adversarial", _yes_or_no, right=False),), "adversarial"),
    "parameters": ColumnGroup((Column("Head (M)", _scaled("parameters", 1e-6, 2)),), "parameters"),
    "speedup": ColumnGroup(
        (Column("Speedup (x)", _interval_of("speedup", 2)),), f"speedup({_ENDS}|_ratio_of_means|_mean_of_ratios)"
    ),
    "acceptance_length": ColumnGroup(
        (Column("Acceptance length τ", _interval_of("acceptance_length", 2)),), f"acceptance_length{_ENDS}"
    ),
    "acceptance_rate": ColumnGroup(
        (Column(f"Acceptance rate {ALPHA}₁ / {ALPHA}₂ / …", _rates_cell, right=False),), "acceptance_(rate|trials)_.*"
    ),
    "draft_overhead": ColumnGroup(
        (Column("Draft overhead (%)", _scaled("draft_overhead_percent", 1.0, 1)),), "draft_overhead_percent"
    ),
    "change": ColumnGroup(
        _CHANGES, f"original|(speedup_change_x|speedup_change_percent|acceptance_length_change){_ENDS}"
    ),
    "length_change": ColumnGroup(
        (Column("Change of τ", _interval_of("acceptance_length_change", 2, sign=True)),),
        f"acceptance_length_change{_ENDS}",
    ),
    "claim": ColumnGroup((Column("Paper: change", _claim_cell, right=False), _PAPER), "(claim|paper)_.*"),
    "paper": ColumnGroup((_PAPER,), "paper_.*"),
}
# The CSV always says how much its numbers stand on.
_ALWAYS = "decode_tokens_per_s|lossless|total_variation|questions|turns_.*"


# ---------------------------------------------------------------------------------------------- CSV, Markdown, LaTeX


@dataclass(frozen=True)
class Grid:
    """A table as text.

    Attributes:
        headings, rows: text of each column and cell.
        right: which columns are aligned at the right.
        best: (row, column) of the cells to emphasise.
        begins: rows that begin a new target or task, but for the first.
    """

    headings: list[str]
    rows: list[list[str]]
    right: list[bool]
    best: frozenset[tuple[int, int]] = frozenset()
    begins: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Note:
    """A paragraph under a table.

    Attributes:
        title, lines: text, in which only `code` is marked up.
        details: more lines, for the Markdown only: a float of LaTeX has to fit on a page.
    """

    title: str
    lines: tuple[str, ...]
    details: tuple[str, ...] = ()


def grid(frame: pd.DataFrame, columns: Sequence[str]) -> Grid:
    """Round a table's frame to what is read; the best speedup of each target, or of each of its tasks, is marked, lossy
    methods aside.
    """
    shown = [column for name in columns for column in COLUMNS[name].shown]
    records = [{str(name): value for name, value in row.items()} for row in frame.to_dict(orient="records")]
    groups = [tuple(row[name] for name in ("target", "task") if name in row) for row in records]
    best: set[tuple[int, int]] = set()
    if "speedup" in columns:
        place = shown.index(COLUMNS["speedup"].shown[0])
        for group in dict.fromkeys(groups):
            speeds = {
                i: row["speedup"]
                for i, row in enumerate(records)
                if groups[i] == group and row["lossless"] and row["speedup"] is not None
            }
            if speeds:
                best.add((max(speeds, key=lambda index: speeds[index]), place))
    rows = [[column.cell(row) for column in shown] for row in records]
    begins = frozenset(index for index in range(1, len(records)) if groups[index] != groups[index - 1])
    return Grid([column.heading for column in shown], rows, [column.right for column in shown], frozenset(best), begins)


def to_csv(frame: pd.DataFrame, columns: Sequence[str]) -> str:
    """The table's numbers with 12 digits; empty cells for what there is not."""
    pattern = re.compile("|".join([*(COLUMNS[name].raw for name in columns), _ALWAYS]))
    chosen = frame[[name for name in frame.columns if pattern.fullmatch(name)]]

    def text(value: Any) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if isinstance(value, bool):
            return "true" if value else "false"
        return f"{value:.12g}" if isinstance(value, float) else str(value)

    return str(chosen.map(text).to_csv(index=False, lineterminator="\n"))


def _bold_start(cell: str, mark: Callable[[str], str]) -> str:
    value, _, rest = cell.partition(" ")
    return f"{mark(value)} {rest}".rstrip()


def _markdown_rows(table: Grid) -> list[str]:
    rows = [
        [
            _bold_start(cell, lambda value: f"**{value}**") if (r, c) in table.best else cell.replace("|", "\\|")
            for c, cell in enumerate(row)
        ]
        for r, row in enumerate(table.rows)
    ]
    lines = [table.headings, ["--:" if right else ":--" for right in table.right], *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def to_markdown(table: Grid, title: str, notes: Sequence[Note], below: tuple[str, Grid] | None = None) -> str:
    """A heading, the table and its notes in GitHub's Markdown; ``below`` is a second table with its title."""
    text = [f"# {title}", "", *_markdown_rows(table)]
    if below is not None:
        text += ["", f"**{below[0]}**", "", *_markdown_rows(below[1])]
    for note in notes:
        text += ["", f"**{note.title}**", "", *(f"- {line}" for line in (*note.lines, *note.details))]
    return "\n".join(text) + "\n"


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: "\\" + sign for sign in "&%$#_{}"},
    "τ": r"$\tau$",
    ALPHA: r"$\alpha$",
    "₁": "$_1$",
    "₂": "$_2$",
    "…": r"\ldots{}",
    _NOTHING: "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
}


def tex(text: str) -> str:
    """Plain text with `code` for LaTeX: special characters escaped, signs of numbers set as in mathematics."""
    parts = text.split("`")
    for index, part in enumerate(parts):
        escaped = "".join(_TEX.get(sign, sign) for sign in part)
        if index % 2:
            # A line of text has ligatures and line breaks that a command must not get.
            parts[index] = r"\texttt{" + escaped.replace("-", "-{}").replace("/", r"/\allowbreak{}") + "}"
        else:
            parts[index] = re.sub(r"(?<![\w.-])([+-])(?=\d)", r"$\1$", escaped)
    return "".join(parts).replace("$$_", "_")  # a symbol and its index are one formula


def _tabular(table: Grid) -> list[str]:
    rows = []
    for r, row in enumerate(table.rows):
        rows += [r"\midrule"] if r in table.begins else []
        cells = [
            _bold_start(tex(cell), lambda value: rf"\textbf{{{value}}}") if (r, c) in table.best else tex(cell)
            for c, cell in enumerate(row)
        ]
        rows.append(" & ".join(cells) + r" \\")
    return [
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{{''.join('r' if right else 'l' for right in table.right)}}}",
        r"\toprule",
        " & ".join(tex(heading) for heading in table.headings) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}}",
    ]


def to_latex(table: Grid, title: str, label: str, notes: Sequence[Note], below: tuple[str, Grid] | None = None) -> str:
    """A ``table*`` float with booktabs rules and the notes under it; needs the packages booktabs and graphicx."""
    text = [
        r"% Needs \usepackage{booktabs,graphicx}.",
        r"\begin{table*}[t]",
        r"\centering",
        rf"\caption{{{tex(title)}}}",
        rf"\label{{{label}}}",
        *_tabular(table),
        *(
            [r"\par\medskip", rf"\textbf{{{tex(below[0])}}}\par\smallskip", *_tabular(below[1])]
            if below is not None
            else []
        ),
        r"\par\medskip",
        r"\begin{minipage}{\textwidth}\footnotesize\raggedright",
        *(rf"\textbf{{{tex(note.title)}.}} " + " ".join(tex(line) for line in note.lines) + r"\par" for note in notes),
        r"\end{minipage}",
        r"\end{table*}",
    ]
    return "\n".join(text) + "\n"
