"""Plain tables in Markdown, for reports that hold nothing but numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """A table whose first ``left`` columns are aligned at the left, the others at the right."""
    rule = [":--" if place < left else "--:" for place in range(len(headings))]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (headings, rule, *rows))
