"""The tables of a Markdown page as cells."""

from __future__ import annotations


def table_rows(page: str) -> list[list[str]]:
    """The cells of every row of every table, headings included."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines]
    return [row for row in rows if set("".join(row)) - set("|:- ")]


def table_under(page: str, title: str) -> list[dict[str, str]]:
    """The rows, by heading, of the table that follows a title in bold."""
    (after,) = page.split(f"**{title}**\n\n")[1:]
    heading, *rows = table_rows(after.split("\n\n")[0])
    return [dict(zip(heading, row, strict=True)) for row in rows]
