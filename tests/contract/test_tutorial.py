"""The code of heads/README.md does what it says: its head keeps the contract, trains, is lossless, and its commands
run.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from koala_bench.contract import check_head
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.loading.targets import load_target
from koala_bench.presets import MethodPreset
from koala_bench.registry import HEADS
from koala_bench.testing import save_tiny_target
from koala_bench.training.checkpoints import load_head
from koala_bench.tree import load_template
from tests.support.commands import Koala, decoding, settings
from tests.support.markdown import table_rows
from tests.support.small_runs import conversations, preset_for, write_questions
from tests.training.test_training import run

README = (Path(__file__).parents[2] / "heads" / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the tutorial's file in it, as a reader would have it."""
    (tmp_path / "relay.py").write_text("\n".join(blocks("python")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def without(folder: Path, old: str, new: str) -> str:
    code = (folder / "relay.py").read_text()
    assert code.count(old) == 1
    (folder / "changed.py").write_text(code.replace(old, new))
    return "./changed.py:Relay"


def test_the_tutorials_head_trains_and_is_lossless(target_folder: Path, folder: Path) -> None:
    (methods, _) = blocks("toml")
    mine = MethodPreset.model_validate(tomllib.loads(methods)["methods"]["relay"])
    values = f"head='{mine.head}', tree='{mine.tree}', learning_rate={mine.learning_rate}"
    preset = preset_for(
        target_folder,
        conversations(folder),
        f"methods.relay={{{values}}}",
        f"methods.\"relay+koala\"={{{values}, objective='koala'}}",
    )
    run(preset, ["relay", "relay+koala"], folder / "out")
    target = load_target(str(target_folder), "cpu", "float64")
    head, _, _ = load_head(folder / "out" / "relay", target)
    prompt = [1, 70, 81, 82]
    answer = decode(target, head, load_template(mine.tree), prompt, 30, ())
    assert answer.tokens == decode(target, Vanilla(), VANILLA_TREE, prompt, 30, ()).tokens


def test_it_keeps_the_contract(folder: Path) -> None:
    assert [str(result) for result in check_head("./relay.py:Relay") if result.outcome == "failed"] == []


@pytest.mark.parametrize(
    ("old", "new", "name", "words"),
    [
        (
            "self.step(states[rows], ids[rows + 1])",
            "self.step(states[rows], ids[rows])",
            "predictions",
            "draft() says another token than the loss",
        ),
        ("best.gather(1, ranks[:, None])[:, 0]", "best[:, 0]", "trees", "two children of node 0 are the same token"),
    ],
)
def test_its_mistakes_are_found_as_it_says(folder: Path, old: str, new: str, name: str, words: str) -> None:
    failed = {
        result.name: result.detail for result in check_head(without(folder, old, new)) if result.outcome == "failed"
    }
    assert words in failed[name]


@pytest.mark.slow
def test_its_commands_run(koala: Koala, folder: Path) -> None:
    save_tiny_target(folder / "target")
    conversations(folder)
    write_questions(folder / "questions.jsonl", [("a", ["count 5"]), ("b", ["spell it"])])
    ran = []
    for line in "".join(blocks("sh")).splitlines():
        program, command, *options = line.split()
        small = [*settings(folder), *decoding(folder)] if command == "compare" else []
        result = koala(command, *(option for option in options if not small or option != "--quick"), *small)
        assert (program, result.code) == ("koala-bench", 0), result.err
        ran.append(command)
    assert ran == ["check-head", "compare", "new-head"]
    verdict = next((folder / "results").rglob("verdict.md")).read_text()
    assert ["Relay+koala", "eagle"] in [row[:2] for row in table_rows(verdict)]
    assert tomllib.loads(blocks("toml")[1])["project"]["entry-points"] == {HEADS: {"my_head": "my_head:MyHead"}}
    assert "class MyHead(" in (folder / "my_head" / "my_head.py").read_text()
