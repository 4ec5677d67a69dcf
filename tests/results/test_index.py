"""`results/README.md`: every folder is listed, and its commands, commits and numbers are those of what lies in it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.support.markdown import table_rows

ROOT = Path(__file__).parents[2] / "results"
ROWS = {
    row[0].split("]")[0].strip("["): row for row in table_rows((ROOT / "README.md").read_text(encoding="utf-8"))[1:]
}
LINKS = {name: row[0].partition("(")[2].partition(")")[0].partition("#")[0] for name, row in ROWS.items()}
# Folders whose row is that of the folder above them: records of seeds and tasks, and two sweeps that are one result.
PART = re.compile(r".*/(seed-\d+|tasks/[^/]+)|sweeps-tiny/[^/]+")


def files(suffix: str) -> list[tuple[str, Path]]:
    """The files of results with the row that each belongs to: that of the nearest folder above it that has one."""
    found = []
    for path in sorted(ROOT.rglob(f"*{suffix}")):
        above = [place.relative_to(ROOT).as_posix() for place in path.parents if place.is_relative_to(ROOT)]
        if "runs" not in above:
            found.append((next((name for name in above if name in ROWS), ""), path))
    return found


def test_every_folder_with_a_record_or_a_page_is_listed() -> None:
    pages = [path for _, path in files(".md") if path.name != "README.md"]
    records = [path for _, path in files(".jsonl")]
    shown = {path.parent.relative_to(ROOT).as_posix() for path in [*pages, *records]}
    assert {name for name in shown if not PART.fullmatch(name)} <= set(ROWS)
    top = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs", "smollm2-135m"}
    assert top <= set(ROWS)
    assert all((ROOT / name).is_dir() for name in ROWS)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_link_leads_to_a_page(name: str) -> None:
    assert (ROOT / LINKS[name]).is_file()


def headers(name: str) -> list[dict[str, object]]:
    logs = [path for row, path in files(".jsonl") if row == name and path.name != "training.jsonl"]
    found = [json.loads(path.open(encoding="utf-8").readline()) for path in logs]
    reports = [path for row, path in files("device-report.json") if row == name]
    return [*found, *(json.loads(path.read_text(encoding="utf-8")) for path in reports)]


def without_out(words: list[str]) -> list[str]:
    """A command without the name of the program and the folder that it writes to."""
    out = words.index("--out") if "--out" in words else len(words)
    return [*words[1:out], *words[out + 2 :]]


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_command_is_that_of_a_record(name: str) -> None:
    recorded = [without_out(header["command"]) for header in headers(name) if "command" in header]  # type: ignore[arg-type]
    shown = [without_out(shlex.split(command)) for command in re.findall(r"`([^`]*)`", ROWS[name][2])]
    assert shown and (not recorded or any(command in recorded for command in shown))


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_commit_is_that_of_the_record(name: str) -> None:
    commit, found = ROWS[name][3], headers(name)
    assert commit.endswith("*") == (not found)
    codes = [header["code"] for header in found]
    assert not codes or any(str(code["commit"]).startswith(commit) for code in codes)  # type: ignore[index]


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_numbers_are_those_of_the_pages(name: str) -> None:
    pages = [path for row, path in files(".md") if row == name and path.name != "README.md"]
    text = re.sub(r"[*,]", "", "\n".join(path.read_text(encoding="utf-8") for path in pages))
    for number in re.findall(r"[+-]?\d+\.\d+x? (?:% )?\[[^]]*\]|\d+\.\d+", ROWS[name][4]):
        wanted = re.sub(r"(x| %)? \[", " [", number).replace(",", "")
        assert wanted in text, f"{number} of {name} is on none of its pages"
