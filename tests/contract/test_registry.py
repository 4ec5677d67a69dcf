"""Finding heads and objectives: installed names, modules, files, and helpful answers to wrong names."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import DraftHead, TrainableHead
from koala_bench.registry import HEADS, OBJECTIVES, build, installed, load
from koala_bench.tree import load_template

# A head in a file of its own: it guesses that text repeats itself. A dataclass, as anyone would write one.
ECHO = """
from __future__ import annotations

from dataclasses import dataclass

import torch

from koala_bench.tree import DraftTree


@dataclass(frozen=True)
class Settings:
    period: int


class Echo(torch.nn.Module):
    features = (-1,)
    max_depth = 8

    def __init__(self, spec, period: int = 3):
        super().__init__()
        self.settings = Settings(period)
        self.vocab_size = spec.vocab_size

    def begin(self, template, capacity):
        self.template, self.seen = template, []

    def draft(self, new):
        self.seen += new.tokens.tolist()
        tokens = [self.seen[-1]]
        for path in self.template.paths:
            tokens.append((self.seen[-min(self.settings.period, len(self.seen))] + path[-1]) % self.vocab_size)
        return DraftTree(torch.tensor(tokens), self.template.shape)


NOT_A_CLASS = 5
"""


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "echo.py").write_text(ECHO)
    monkeypatch.chdir(tmp_path)
    return "./echo.py:Echo"


def test_the_bundled_heads_and_objectives_are_installed_like_anyones() -> None:
    assert {"medusa", "eagle"} <= installed(HEADS).keys()
    assert "koala" in installed(OBJECTIVES)


@pytest.mark.parametrize("name", ["medusa", "eagle", "heads.medusa:Medusa", "heads.eagle:Eagle"])
def test_a_head_is_found_by_name_or_by_module(target64: Target, name: str) -> None:
    head = build(HEADS, name, target64.spec(), {})
    assert isinstance(head, DraftHead) and isinstance(head, TrainableHead)


def test_an_installed_name_and_its_module_are_the_same_class() -> None:
    assert load(HEADS, "eagle") is load(HEADS, "heads.eagle:Eagle")


@pytest.mark.parametrize("tree", ["chain-3", "3x2x1"])
def test_a_head_in_a_file_drafts_and_loses_nothing(target64: Target, echo: str, tree: str) -> None:
    head = build(HEADS, echo, target64.spec(), {"period": 2})
    prompt = [1, 70, 81, 82]
    truth = decode(target64, Vanilla(), VANILLA_TREE, prompt, 40, ())
    answer = decode(target64, head, load_template(tree), prompt, 40, ())
    assert answer.tokens == truth.tokens
    assert set(answer.drafted_depth) == {3}


def test_files_of_the_same_name_do_not_get_into_each_others_way(target64: Target, tmp_path: Path) -> None:
    for period in (1, 2):
        (tmp_path / str(period)).mkdir()
        (tmp_path / str(period) / "json.py").write_text(ECHO.replace("period: int = 3", f"period: int = {period}"))
    first, second = (build(HEADS, f"{tmp_path / str(period)}/json.py:Echo", target64.spec(), {}) for period in (1, 2))
    assert (first.settings.period, second.settings.period) == (1, 2)
    assert sys.modules["json"].loads("1") == 1


def test_an_error_inside_a_file_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import surely_not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        load(HEADS, f"{tmp_path}/broken.py:Head")


def test_a_module_that_lacks_something_names_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lacking_head.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KoalaBenchError, match="'lacking_head' needs the module 'surely_not_installed'"):
        load(HEADS, "lacking_head:Head")


@pytest.mark.parametrize(
    ("group", "name", "words"),
    [
        (HEADS, "eagel", "Unknown head 'eagel'. Did you mean eagle"),
        (HEADS, "zzz", "Installed: .*eagle, .*medusa"),
        (OBJECTIVES, "coala", "Unknown objective 'coala'. Did you mean koala"),
        (HEADS, "koala", "Unknown head 'koala'"),
        (HEADS, "./none.py:Head", r"no file \./none\.py"),
        (HEADS, "./echo.py:Eco", "has no class 'Eco'"),
        (HEADS, "./echo.py:NOT_A_CLASS", "has no class 'NOT_A_CLASS'"),
        (HEADS, "./echo.py:", "has no class ''"),
        (HEADS, "heads.eagle:Hawk", "has no class 'Hawk'"),
        (HEADS, "no.such:Head", "no module 'no.such'"),
        (HEADS, "heads.none:Head", "no module 'heads.none'"),
        (HEADS, ":", "no module ''"),
        (HEADS, "..heads:Eagle", r"no module '\.\.heads'"),
        (HEADS, "", "Unknown head ''"),
    ],
)
@pytest.mark.usefixtures("echo")
def test_a_name_that_is_none_is_one_clear_error(group: str, name: str, words: str) -> None:
    with pytest.raises(KoalaBenchError, match=words) as caught:
        load(group, name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("group", "name", "options", "words"),
    [
        (HEADS, "eagle", {"lairs": 2}, "'eagle' has no option 'lairs'. Did you mean layers"),
        (HEADS, "eagle", {"zzz": 2}, "It has: layers, "),
        (HEADS, "eagle", {"spec": 2}, "no option 'spec'"),
        (HEADS, "medusa", {"heads": "four"}, "heads is 'four', its default is"),
        (HEADS, "medusa", {"heads": 2.5}, "heads is 2.5"),
        (HEADS, "medusa", {"heads": True}, "heads is True"),
        (HEADS, "eagle", {"bias": 1}, "bias is 1, its default is True"),
        (HEADS, "medusa", {"heads": -2}, "'medusa' cannot be made with heads=-2"),
        (HEADS, "eagle", {"attention_heads": "many"}, "'eagle' cannot be made with attention_heads='many'"),
        (OBJECTIVES, "koala", {"wait": 0.1}, "Did you mean weight"),
        (OBJECTIVES, "koala", {"weight": "heavy"}, "weight is 'heavy'"),
        (OBJECTIVES, "koala", {"weight": -1}, "The adversarial weight is -1"),
        (OBJECTIVES, "koala", {"discriminator": "fake"}, "Unknown discriminator 'fake'"),
    ],
)
def test_a_wrong_option_is_one_clear_error(
    target64: Target, group: str, name: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(KoalaBenchError, match=words) as caught:
        build(group, name, target64.spec(), options)
    assert "\n" not in str(caught.value)


def test_whole_numbers_do_for_fractions(target64: Target) -> None:
    assert build(HEADS, "eagle", target64.spec(), {"noise": 0}).noise == 0


def test_a_defect_of_a_head_without_options_stays_a_traceback(target64: Target, tmp_path: Path) -> None:
    code = (
        "import torch\nclass Head(torch.nn.Module):\n    def __init__(self, spec):\n        raise ValueError('ours')\n"
    )
    (tmp_path / "defect.py").write_text(textwrap.dedent(code))
    with pytest.raises(ValueError, match="ours"):
        build(HEADS, f"{tmp_path}/defect.py:Head", target64.spec(), {})


def test_a_head_holds_none_of_the_targets_parameters(target64: Target) -> None:
    own = {parameter.data_ptr() for parameter in target64.model.parameters()}
    for name in ("medusa", "eagle"):
        head: torch.nn.Module = build(HEADS, name, target64.spec(), {})
        assert not own & {parameter.data_ptr() for parameter in head.parameters()}
