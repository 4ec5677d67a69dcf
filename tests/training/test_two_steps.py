"""Heads of a target too large to lie beside them: its states are written once, by several processes, then it goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils

from koala_bench.dialogues.encoding import chat_template
from koala_bench.engine.loading.outer_layers import OuterLayers, load_outer_layers
from koala_bench.engine.loading.spread import load_spread
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import Preset
from koala_bench.runs.states import train_from_states, write_training_states
from koala_bench.training.experiment import train_heads
from koala_bench.training.log import read_training
from koala_bench.training.states import layers_of, write_states
from tests.support.commands import EAGER, Koala
from tests.support.processes import command, together
from tests.support.small_runs import conversations, preset_for
from tests.training.test_states import count_passes, dialogues

METHODS = ["medusa+koala", "eagle", "eagle3"]
STORED = ("training.stored_states=true", "training.steps=6")


def small(target_folder: Path, data: Path, *more: str) -> Preset:
    return preset_for(target_folder, data, *STORED, *more)


def test_two_processes_write_states_and_heads_from_the_ends_alone_equal_those_beside_the_target(
    target: Target,
    target_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data, states = conversations(tmp_path), tmp_path / "states"
    settings = [
        f"data.source='{data}'", "data.max_tokens=192", "data.probes=1", "training.batch_tokens=256",
        "training.steps=6",
    ]  # fmt: skip
    options = ["--target", str(target_folder), "--methods", ",".join(METHODS), "--out", str(states), *EAGER]
    for each in settings:
        options += ["--set", each]
    assert together(2, command, "states", *options) == [0, 0]
    assert capfd.readouterr().out.split() == [str(states)]
    manifest = json.loads((states / "states.json").read_text())
    assert manifest["layers"][-1] == -1 and len(manifest["layers"]) > 1

    preset = small(target_folder, data)
    template = chat_template("vicuna_v1.1", target.tokenizer)  # type: ignore[arg-type]
    passes = count_passes(monkeypatch)
    train_from_states(preset, METHODS, states, tmp_path / "ends")
    assert passes[0] == 0
    monkeypatch.undo()
    train_heads(preset, METHODS, target, template, tmp_path / "whole", states=states)
    for method in METHODS:
        one, two = (tmp_path / name / method / "model.safetensors" for name in ("ends", "whole"))
        assert one.read_bytes() == two.read_bytes()
    watched = [
        [line for line in read_training(tmp_path / name / "training.jsonl") if line["kind"] == "held_out"]
        for name in ("ends", "whole")
    ]
    assert [line["loss"] for line in watched[0]] == [line["loss"] for line in watched[1]]
    assert all(line["acceptance_length"] is None for line in watched[0])
    again = count_passes(monkeypatch)
    train_heads(preset, METHODS, target, template, tmp_path / "ends")
    assert not again[0], "they are the finished heads of this training"


def test_the_ends_of_a_target_are_its_own_and_nothing_else_is_there(target: Target, target_folder: Path) -> None:
    ends = load_outer_layers(str(target_folder), "cpu", "float32", known={"weights_sha256": "0"})
    whole, own = target.spec(), ends.spec()
    ids, states = torch.arange(7), torch.randn(3, whole.hidden_size)
    assert torch.equal(own.embed(ids), whole.embed(ids)) and torch.equal(own.output(states), whole.output(states))
    assert (own.hidden_size, own.vocab_size, own.layers) == (whole.hidden_size, whole.vocab_size, whole.layers)
    kept = set(target.model.state_dict()) & set(ends.model.state_dict())
    assert not any("layers" in name for name in ends.model.state_dict()) and len(kept) == 3
    assert isinstance(ends, OuterLayers)
    with pytest.raises(KoalaBenchError, match="only the embedding and the output layer"):
        ends.states(ids[None])


def test_tensors_of_the_layers_are_not_read(target_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, read = transformers.modeling_utils.safe_open, []

    class Slice:
        """A tensor of a file, which notes when it is read."""

        def __init__(self, name: str, inner: Any) -> None:
            self.name, self.inner = name, inner

        def __getitem__(self, key: Any) -> Any:
            read.append(self.name)
            return self.inner[key]

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    class File:
        """A file whose tensors are ``Slice``."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.inner = real(*arguments, **options)

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self.inner.get_slice(name))

        def __enter__(self) -> File:
            self.inner.__enter__()
            return self

        def __exit__(self, *arguments: Any) -> Any:
            return self.inner.__exit__(*arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", File)
    load_outer_layers(str(target_folder), "cpu", "float32", known={})
    assert sorted(set(read)) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]


def test_states_that_are_not_there_are_refused_in_a_line(target: Target, target_folder: Path, tmp_path: Path) -> None:
    data, states = conversations(tmp_path), tmp_path / "states"
    with pytest.raises(KoalaBenchError, match=r"no finished states.*koala-bench states"):
        train_from_states(small(target_folder, data), ["eagle"], states, tmp_path / "heads")
    write_training_states(small(target_folder, data), ["eagle"], states)
    before = (states / "states.json").read_bytes()
    with pytest.raises(KoalaBenchError, match="their choice of hidden states differs"):
        train_from_states(small(target_folder, data), ["eagle3"], states, tmp_path / "heads")
    longer = small(target_folder, data, "data.max_tokens=200")
    with pytest.raises(KoalaBenchError, match=r"lack \d+ of \d+ dialogues"):
        train_from_states(longer, ["eagle"], states, tmp_path / "heads")
    assert (states / "states.json").read_bytes() == before, "nothing is lost"
    fewer = small(target_folder, data, "data.limit=50")  # of the same dialogues
    train_from_states(fewer, ["eagle"], states, tmp_path / "heads")
    assert (tmp_path / "heads" / "eagle" / "model.safetensors").is_file()


def test_states_of_more_layers_serve_who_reads_fewer(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from koala_bench.common.process_group import SINGLE_PROCESS

    talk = dialogues()
    more = write_states(target, talk, 24, layers_of([(1, -1)]), tmp_path, {"of": "test"}, SINGLE_PROCESS)
    passes = count_passes(monkeypatch)
    fewer = write_states(target, talk, 24, layers_of([(-1,)]), tmp_path, {"of": "test"}, SINGLE_PROCESS)
    assert not passes[0] and fewer.layers == more.layers == (1, -1)
    write_states(target, talk, 24, layers_of([(2, -1)]), tmp_path, {"of": "test"}, SINGLE_PROCESS)
    assert passes[0]


def test_a_target_spread_by_accelerate_has_the_same_states(target: Target, target_folder: Path) -> None:
    """Here over the CPU alone, which is all that a machine without cards can show."""
    spread = load_spread(str(target_folder), "cpu", "float32", device_map="auto")
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(spread.states(ids, (1, -1)), target.states(ids, (1, -1)))


def test_trainings_of_a_run_share_one_folder_of_states(
    koala: Koala, cli_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.commands import decoding, settings

    passes = count_passes(monkeypatch)
    written: list[tuple[int, ...]] = []
    from koala_bench.training import shared_states

    real = shared_states.write_states

    def noted(target: Target, talk: object, tokens: int, layers: tuple[int, ...], *rest: object) -> object:
        before = passes[0]
        found = real(target, talk, tokens, layers, *rest)  # type: ignore[arg-type]
        written.append((passes[0] - before, *layers))
        return found

    monkeypatch.setattr(shared_states, "write_states", noted)
    out = cli_folder / "stored"
    table = [
        "reproduce", "table3", *settings(cli_folder), *decoding(cli_folder), "--out", str(out), "--methods",
        "eagle,eagle+koala",
        "--set", "training.stored_states=true", "--set", "training.precision=no",
    ]  # fmt: skip
    assert koala(*table).code == 0
    assert len(written) > 1 and written[0][0] > 0 and all(each[0] == 0 for each in written[1:]), written
    assert not (out / "states").exists()


def test_states_are_kept_if_asked_for(koala: Koala, cli_folder: Path) -> None:
    from tests.support.commands import settings

    train = ["train", *settings(cli_folder), "--methods", "eagle", "--out", str(cli_folder / "kept"), "--keep-states"]
    assert "stored_states=true" in koala(*train).complaint
    assert koala(*train, "--set", "training.stored_states=true").code == 0
    assert (cli_folder / "kept" / "heads" / "states" / "states.json").is_file()
