"""check-head: the bundled heads keep the contract, and each way of breaking it is caught by its own check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import koala_bench.contract as contract
from koala_bench.contract import CHECKS, CheckResult, check_head
from koala_bench.contract.bench import CIRCLE, Bench, circle_ids
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import MethodPreset
from tests.support.broken_heads import BROKEN, Good, NoDepth, ReportsNothing
from tests.support.commands import Koala


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A bench whose targets all tests share."""
    return Bench(MethodPreset(head="none", tree="chain-1"), tmp_path_factory.mktemp("bench"))


@pytest.fixture
def shared(made: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every head is checked on these same targets, which the bench hands out as they were made."""

    def bench(preset: MethodPreset, folder: Path) -> Bench:
        found = Bench(preset, folder)
        found._made, found.folder = made._made, made.folder
        return found

    monkeypatch.setattr(contract, "Bench", bench)


def failed(results: list[CheckResult]) -> dict[str, str]:
    return {result.name: result.detail for result in results if result.outcome == "failed"}


@pytest.mark.parametrize("head", BROKEN, ids=lambda head: head.__name__)
def test_a_broken_head_is_caught_by_the_right_check(
    shared: None, monkeypatch: pytest.MonkeyPatch, head: type[nn.Module]
) -> None:
    name, _, words = BROKEN[head]
    monkeypatch.setattr(contract, "CHECKS", {each: CHECKS[each] for each in dict.fromkeys(("form", name))})
    found = failed(check_head(head))
    assert found.keys() == {name}
    assert words in found[name] and "\n" not in found[name]


@pytest.mark.exhaustive  # that no check fires without a reason shows in the heads that are right as well
@pytest.mark.parametrize("head", BROKEN, ids=lambda head: head.__name__)
def test_and_by_no_other(shared: None, head: type[nn.Module]) -> None:
    name, others, _ = BROKEN[head]
    assert failed(check_head(head)).keys() == {name, *others}


# ---------------------------------------------------------------------------------------------- heads that are right


@pytest.mark.parametrize(("head", "options"), [("medusa", {}), ("eagle", {"layers": 2}), (Good, {})])
def test_right_heads_pass_every_check(shared: None, head: Any, options: dict[str, Any]) -> None:
    before = torch.random.get_rng_state()
    results = check_head(head, options)
    assert [result.name for result in results if result.outcome != "passed"] == ["observation"]  # they have no observe
    assert [result.name for result in results] == list(CHECKS)
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_a_head_does_not_have_is_not_checked(shared: None) -> None:
    found = {result.name: result for result in check_head(ReportsNothing)}
    assert found["predictions"].outcome == "not applicable"
    assert "no objective can be added" in found["predictions"].detail
    assert found["gradients"].outcome == "passed"


def test_a_head_that_is_not_trained_is_checked_for_its_drafts(shared: None, tmp_path: Path) -> None:
    from tests.contract.test_registry import ECHO

    (tmp_path / "echo.py").write_text(ECHO)
    results = check_head(f"{tmp_path}/echo.py:Echo")
    assert failed(results) == {}
    assert [result.name for result in results if result.outcome == "not applicable"] == [
        "gradients",
        "prompts",
        "observation",
        "positions",
        "predictions",
        "vocabulary",
        "batches",
    ]


def test_after_a_wrong_form_nothing_else_is_tried() -> None:
    results = check_head(NoDepth)
    assert [result.outcome for result in results] == ["failed", *["not applicable"] * (len(CHECKS) - 1)]


def test_the_target_that_counts_in_a_circle_does(made: Bench) -> None:
    prompt = circle_ids(1, 5)[0].tolist()
    answer = decode(made.target("circle"), Vanilla(), VANILLA_TREE, prompt, 30, ())
    assert answer.tokens == [CIRCLE[(5 + i) % len(CIRCLE)] for i in range(30)]


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_prints_a_line_for_each_check_and_exits_with_0_or_1(
    koala: Koala, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for results, code in (
        ([CheckResult("form", "passed", "so")], 0),
        ([CheckResult("form", "passed", "so"), CheckResult("trees", "failed", "no")], 1),
    ):
        monkeypatch.setattr(contract, "check_head", lambda *_, results=results: results)
        result = koala("check-head", "eagle")
        assert (result.code, result.out.splitlines()) == (code, [str(each) for each in results])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eagle", "--option", "=2"], "is not an option of a head"),
        (["eagle", "--option", "lairs=2"], "Did you mean layers"),
        (["./plain.py:Plain"], "is no torch.nn.Module"),
    ],
)
def test_a_name_or_option_that_is_none_is_one_clear_error(
    koala: Koala, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    (tmp_path / "plain.py").write_text("class Plain:\n    def __init__(self, spec): pass\n")
    monkeypatch.chdir(tmp_path)
    result = koala("check-head", *arguments)
    assert result.code == 2
    assert words in result.complaint


def test_options_are_read_as_toml() -> None:
    from koala_bench.cli.options import head_options

    assert head_options(["layers=2", "noise=0.1", "bias=false", "name=x y"]) == {
        "layers": 2,
        "noise": 0.1,
        "bias": False,
        "name": "x y",
    }
    with pytest.raises(KoalaBenchError):
        head_options(["a.b=2"])
