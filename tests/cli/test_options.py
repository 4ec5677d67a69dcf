"""Options that commands share: written once, the same everywhere, and what they make of a preset."""

from __future__ import annotations

from typing import Annotated

import pytest
import typer
from typer.main import get_command

from koala_bench.cli import app
from koala_bench.cli.options import DECODING, EVERYTHING, Shared, with_shared
from koala_bench.presets import load_preset
from tests.support.commands import Koala

FIRST = ["reproduce", "evaluate", "new-head", "check-head", "compare", "check"]
PANELS = ["Start here", "Reproduce", "Your own head", "Gate", "Inspect", "Exchange", "This machine"]
# What these commands have of their own under the name of a shared option, with a meaning of its own.
OWN = {
    ("analyse", "--questions"), ("distill", "--limit"), ("distill", "--max-new-tokens"), ("pretrain", "--layers"),
    ("pretrain", "--set"), ("export", "--dtype"),
}  # fmt: skip


def test_help_groups_the_commands_and_shows_the_six_that_matter_first(koala: Koala) -> None:
    lines = koala("--help").out.splitlines()
    panels = [line.split("─")[1].strip() for line in lines if line.startswith("╭─")]
    assert panels == ["Options", *PANELS]
    start = next(i for i, line in enumerate(lines) if "Start here" in line)
    named = [line.split()[1] for line in lines[start + 1 :] if line[:3] == "│ " + line[2:3] != "│  "]
    assert named[:6] == FIRST


def test_a_shared_option_is_the_same_in_every_command() -> None:
    found: dict[str, set[tuple[object, ...]]] = {}
    for command, definition in get_command(app).commands.items():  # type: ignore[attr-defined]
        for option in definition.params:
            name = option.opts[0]
            if (
                name != "--out"
                and (command, name) != ("evaluate", "--seed")
                and option.name in EVERYTHING
                and (command, name) not in OWN
            ):
                found.setdefault(name, set()).add((option.help, option.default, option.multiple))
    assert len(found) == len(EVERYTHING) - 1
    assert {name: each for name, each in found.items() if len(each) > 1} == {}


def test_options_win_over_quick_and_settings_over_both() -> None:
    usual = load_preset("tiny")
    assert Shared().resolved() == usual
    chosen = Shared(quick=True, seed=5, layers=3, tree="2x1", limit=2, temperature=0.5, engine="eager").resolved()
    assert (chosen.training.seed, chosen.evaluation.limit, chosen.evaluation.temperature) == (5, 2, 0.5)
    assert chosen.target.engine == "eager" and chosen.training.steps < usual.training.steps
    assert {(method.layers, method.tree) for method in chosen.methods.values()} == {(3, "2x1")}
    assert Shared(seed=5, settings=["training.seed=6"]).resolved().training.seed == 6
    stops = ["### End", 'a "b" \\']
    assert Shared(stop=stops).resolved().evaluation.stop == tuple(stops) and Shared(stop=[]).resolved() == usual
    odd = 'it\'s "one" \\ target'
    assert Shared(target=odd).resolved().target.name == odd


def test_an_option_cannot_be_taken_twice() -> None:
    def twice(options: Shared, tree: Annotated[str, typer.Option("--tree")] = "") -> None: ...

    with pytest.raises(TypeError, match="twice"):
        with_shared(twice, DECODING)
