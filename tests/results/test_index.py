"""`results/README.md`: every folder is listed, and its commits and numbers are those of what lies in the folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.markdown import table_rows

ROOT = Path(__file__).parents[2] / "results"
ROWS = {
    row[0].split("]")[0].strip("["): row for row in table_rows((ROOT / "README.md").read_text(encoding="utf-8"))[1:]
}
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "runs"}


def test_every_folder_is_listed() -> None:
    assert set(ROWS) >= FOLDERS
    assert all((ROOT / name).is_dir() for name in ROWS)


def headers(folder: Path) -> list[dict[str, object]]:
    logs = [path for path in sorted(folder.rglob("*.jsonl")) if path.name != "training.jsonl"]
    found = [json.loads(path.open(encoding="utf-8").readline()) for path in logs]
    return [*found, *(json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("device-report.json"))]


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_commit_is_that_of_the_record(name: str) -> None:
    commit, found = ROWS[name][3], headers(ROOT / name)
    assert commit.endswith("*") == (not found)
    codes = [header["code"] for header in found]
    assert not codes or any(str(code["commit"]).startswith(commit) for code in codes)  # type: ignore[index]


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_numbers_are_those_of_the_pages(name: str) -> None:
    pages = [path for path in (ROOT / name).rglob("*.md") if path.name != "README.md"]
    text = re.sub(r"[*,]", "", "\n".join(path.read_text(encoding="utf-8") for path in pages))
    for number in re.findall(r"[+-]?\d+\.\d+x? (?:% )?\[[^]]*\]|\d+\.\d+", ROWS[name][4]):
        wanted = re.sub(r"(x| %)? \[", " [", number).replace(",", "")
        assert wanted in text, f"{number} of {name} is on none of its pages"
