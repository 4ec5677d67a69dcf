"""Tables as text: numbers with intervals, and a table with its notes as Markdown and LaTeX."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from koala_bench.records.statistics import Interval
from koala_bench.records.summaries import Summary

NOTHING = "\N{EN DASH}"
ALPHA = "\N{GREEK SMALL LETTER ALPHA}"


def fixed(value: float, digits: int, sign: bool = False) -> str:
    """A number with so many digits after the point; never a negative zero."""
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", "+" if sign else "") if float(text) == 0 else text


def with_interval(measured: Interval | None, digits: int, sign: bool = False) -> str:
    """A number with its interval in brackets, rounded; alone if it has no interval (NaN), a dash if there is none."""
    if measured is None or math.isnan(measured.value):
        return NOTHING
    value, low, high = (fixed(each, digits, sign) for each in (measured.value, measured.low, measured.high))
    return value if math.isnan(measured.low) else f"{value} [{low}, {high}]"


def method_label(name: str, lossless: bool, distance: float | None) -> str:
    """A method's name; that of a lossy one with its total variation from the target's distribution."""
    apart = NOTHING if distance is None else fixed(distance, 2)
    return name if lossless else f"{name} (lossy, total variation {apart})"


def label_of(summary: Summary) -> str:
    """``method_label`` of a summary."""
    return method_label(summary.name, summary.method["lossless"], summary.distance)


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

    @property
    def last_group(self) -> Grid:
        """The rows of the last target or task alone."""
        first = max(self.begins, default=0)
        best = frozenset((row - first, column) for row, column in self.best if row >= first)
        return Grid(self.headings, self.rows[first:], self.right, best)


@dataclass(frozen=True)
class Note:
    """A paragraph under a table.

    Attributes:
        title, lines: text, in which only `code` is marked up.
        alarm: whether it stands right under the table, and is never folded.
    """

    title: str
    lines: tuple[str, ...]
    alarm: bool = False


def grid_of(rows: Sequence[Mapping[str, str]], left: Sequence[str]) -> Grid:
    """A table of rows by heading; the columns of ``left`` are aligned at the left."""
    headings = list(rows[0]) if rows else []
    return Grid(headings, [list(row.values()) for row in rows], [heading not in left for heading in headings])


def _cells(table: Grid, escape: Callable[[str], str], bold: str) -> pd.DataFrame:
    """The table with escaped text, and the first word of each emphasised cell in bold."""
    rows = [[escape(cell) for cell in row] for row in table.rows]
    for row, column in table.best:
        value, space, rest = rows[row][column].partition(" ")
        rows[row][column] = bold.format(value) + space + rest
    return pd.DataFrame(rows, columns=[escape(heading) for heading in table.headings])


def _markdown(table: Grid) -> str:
    cells = _cells(table, lambda text: text.replace("|", "\\|"), "**{}**")
    alignment = ["right" if right else "left" for right in table.right]
    return str(cells.to_markdown(index=False, disable_numparse=True, colalign=alignment))


def to_markdown(table: Grid, title: str, notes: Sequence[Note], further: Sequence[tuple[str, Grid]] = ()) -> str:
    """A heading, the table, further ones with their titles, and notes that say something, in GitHub's Markdown."""

    def paragraphs(alarm: bool) -> list[str]:
        shown = (note for note in notes if note.lines and note.alarm is alarm)
        return ["\n".join([f"**{note.title}**", "", *(f"- {line}" for line in note.lines)]) for note in shown]

    tables = [f"**{name}**\n\n{_markdown(grid)}" for name, grid in further if grid.rows]
    parts = [f"# {title}", _markdown(table), *paragraphs(True), *tables, *paragraphs(False)]
    return "\n\n".join(parts) + "\n"


def frame_of(rows: Iterable[Mapping[str, object]]) -> pd.DataFrame:
    """Numbers in full precision; an interval takes the columns NAME, NAME_low and NAME_high."""

    def flat(row: Mapping[str, object]) -> dict[str, object]:
        found: dict[str, object] = {}
        for name, value in row.items():
            if isinstance(value, Interval):
                found |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
            else:
                found[name] = value
        return found

    return pd.DataFrame([flat(row) for row in rows], dtype=object)  # an integer stays one beside an empty cell


def csv_of(frame: pd.DataFrame) -> str:
    """Numbers with 12 digits, which hides how vector units round the last ones; empty cells for what there is not."""

    def text(value: object) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if isinstance(value, bool):
            return str(value).lower()
        return f"{value:.12g}" if isinstance(value, float) else str(value)

    return str(frame.map(text).to_csv(index=False, lineterminator="\n"))


_TEX = str.maketrans(
    {
        **{sign: "\\" + sign for sign in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        "τ": r"$\tau$",
        ALPHA: r"$\alpha$",
        "₁": "$_1$",
        "₂": "$_2$",
        "…": r"\ldots{}",
        "≥": r"$\geq$",
        NOTHING: "--",
    }
)


def tex(text: str) -> str:
    """Plain text for LaTeX: special characters escaped, signs of numbers set as in mathematics."""
    signed = re.sub(r"(?<![\w.-])([+-])(?=\d)", r"$\1$", text.translate(_TEX))
    return signed.replace("$$_", "_")  # a symbol and its index are one formula


_HEADING, _GROUP_NAME = 14, 16  # characters of a line
_UPRIGHT = 7  # columns, above which headings that are as wide as their columns are turned


def _heading(text: str, right: bool, cells: Sequence[str], turns: bool) -> str:
    """A heading on several short lines, so that it is hardly wider than its column; turned where there are many."""
    lines = textwrap.wrap(text, _HEADING)
    turned = turns and max(map(len, lines), default=0) >= max(map(len, cells), default=0)
    side = "r" if right and not turned else "l"
    whole = r"\\".join(tex(line) for line in lines)
    stacked = rf"\shortstack[{side}]{{{whole}}}" if len(lines) > 1 else whole
    return rf"\rotatebox{{90}}{{{stacked}}}" if turned else stacked


def _once(table: Grid) -> Grid:
    """The table with the name of each target or task once, on as many lines as it takes if the rows are as many."""
    bounds = [0, *sorted(table.begins), len(table.rows)] if table.begins else []
    rows = [list(row) for row in table.rows]
    for first, last in itertools.pairwise(bounds):
        for column, heading in enumerate(table.headings):
            if heading in ("Target", "Task"):
                name = rows[first][column]
                lines = textwrap.wrap(name, _GROUP_NAME)
                for row, line in zip(
                    rows[first:last],
                    itertools.chain(lines if len(lines) <= last - first else [name], itertools.repeat("")),
                    strict=False,
                ):
                    row[column] = line
    return replace(table, rows=rows)


def to_latex(table: Grid, caption: str, label: str, legend: str) -> str:
    """A ``table*`` float with booktabs rules and one line under it; needs the packages booktabs and graphicx."""
    cells = _cells(_once(table), tex, r"\textbf{{{}}}")
    columns = zip(*table.rows, strict=True) if table.rows else ([""] for _ in table.headings)
    turns = len(table.headings) > _UPRIGHT
    cells.columns = pd.Index(
        [
            _heading(heading, right, of, turns)
            for heading, right, of in zip(table.headings, table.right, columns, strict=True)
        ]
    )
    for row in table.begins:
        cells.iloc[row, 0] = "\\midrule\n" + cells.iloc[row, 0]
    alignment = "".join("r" if right else "l" for right in table.right)
    tabular = cells.style.hide(axis="index").to_latex(hrules=True, column_format=alignment)
    return "\n".join(
        [
            r"% Needs \usepackage{booktabs,graphicx}.",
            r"\begin{table*}[t]",
            r"\centering\small\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{tex(caption)}}}",
            rf"\label{{{label}}}",
            # No wider than the text, and never enlarged.
            r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
            str(tabular).rstrip() + "}",
            rf"\par\smallskip\parbox{{\textwidth}}{{\footnotesize {tex(legend)}}}",
            r"\end{table*}",
            "",
        ]
    )
