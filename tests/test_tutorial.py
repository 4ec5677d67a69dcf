"""The code of heads/README.md does what it says: its head trains, also with an objective, and is lossless."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_training import conversations, preset_for, run

from koala_bench.checkpoints import load_head
from koala_bench.decoding import VANILLA_TREE, Vanilla, decode
from koala_bench.target import load_target
from koala_bench.tree import load_template

README = Path(__file__).parent.parent / "heads" / "README.md"


def test_the_tutorials_head_trains_and_is_lossless(target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code
    (tmp_path / "one_more.py").write_text(code[1])
    monkeypatch.chdir(tmp_path)
    mine = "methods.one_more={head='./one_more.py:OneMore', tree='3'}"
    with_objective = "methods.\"one_more+koala\"={head='./one_more.py:OneMore', tree='3', objective='koala'}"
    preset = preset_for(target_folder, conversations(tmp_path), mine, with_objective)
    run(preset, ["one_more", "one_more+koala"], tmp_path / "out")
    target = load_target(str(target_folder), "cpu", "float64")
    head, _, _ = load_head(tmp_path / "out" / "one_more", target)
    prompt = [1, 70, 81, 82]
    answer = decode(target, head, load_template("3"), prompt, 30, ())
    assert answer.tokens == decode(target, Vanilla(), VANILLA_TREE, prompt, 30, ()).tokens
