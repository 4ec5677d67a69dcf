"""Versions of torch and transformers are bounded by those tried, since private interfaces of both are used."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib

import pytest

from tests.house.test_layers import ROOT

# Oldest and newest, each where it was tried: the older ones in results/device-h200, the newer ones in constraints.txt.
TRIED = {"torch": ("2.11.0", "2.13.0"), "transformers": ("5.17.0", "5.23.0")}


def release(version: str) -> tuple[int, int]:
    """Major and minor number."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


@pytest.mark.parametrize("package", TRIED)
def test_the_bounds_are_the_versions_that_were_tried(package: str) -> None:
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    line = next(line for line in lines if re.split(r"[<>=]", line)[0] == package)
    oldest, newest = map(release, TRIED[package])
    assert line == f"{package}>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}", "try a version, then allow it"
    assert f"{package}=={TRIED[package][1]}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    report = (ROOT / "results" / "device-h200" / "device-report.md").read_text(encoding="utf-8")
    assert f"{package} {TRIED[package][0]}" in report


@pytest.mark.parametrize("package", TRIED)
def test_the_version_here_is_within_them(package: str) -> None:
    oldest, newest = map(release, TRIED[package])
    assert oldest <= release(importlib.metadata.version(package)) <= newest
