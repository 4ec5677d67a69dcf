"""Heads that ship: exported in half precision with a card, decoded with in place of a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from koala_bench.common import bundled
from koala_bench.records.reading import read_run
from tests.support.commands import Koala, decoding, settings


def test_a_head_is_handed_on_in_half_precision_and_a_table_made_with_it(
    koala: Koala, cli_folder: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, out = tmp_path / "package" / "targets" / "tiny" / "heads", tmp_path / "out"
    result = koala(
        *("export", str(finished_run / "heads" / "eagle"), "--layout", "koala-bench", "--dtype", "bfloat16"),
        *("--out", str(shipped / "eagle")),
    )
    assert result.code == 0 and "# eagle, a draft head" in (shipped / "eagle" / "README.md").read_text()
    kept, before = (load_file(place / "eagle" / "model.safetensors") for place in (shipped, finished_run / "heads"))
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    assert all(torch.equal(kept[name], tensor.to(torch.bfloat16)) for name, tensor in before.items())
    monkeypatch.setattr(bundled, "PACKAGE", tmp_path / "package")
    few = ["--methods", "vanilla,eagle", "--heads", "shipped", "--out", str(out)]
    result = koala("reproduce", "table1", *settings(cli_folder), *decoding(cli_folder), *few)
    assert result.code == 0 and "training" not in result.err.splitlines()[0], result.err
    assert not (out / "heads").exists()
    assert [turn["error"] for turn in read_run(out / "records.jsonl").turns_of("eagle")] == [None] * 4


def test_what_cannot_be_had_with_given_heads_is_refused(koala: Koala, cli_folder: Path, finished_run: Path) -> None:
    given = ["--heads", str(finished_run / "heads")]
    assert "trainings" in koala("reproduce", "table3", *settings(cli_folder), *given).complaint
    result = koala("reproduce", "table1", *settings(cli_folder), "--heads", "shipped")
    assert result.code == 2 and "No trained heads ship for the preset 'tiny'" in result.complaint
