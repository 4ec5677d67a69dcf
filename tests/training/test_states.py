"""Stored states: training from disk equals training from passes; they are resumable, shared, refused if they differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from koala_bench.common.process_group import SINGLE_PROCESS, ProcessGroup
from koala_bench.dialogues.encoding import EncodedDialogue, chat_template
from koala_bench.dialogues.streams import groups_of, make_stream
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.training import states as states_module
from koala_bench.training.experiment import train_heads
from koala_bench.training.features import features_of
from koala_bench.training.states import layers_of, remove_states, write_states
from tests.support.small_runs import conversations, preset_for

METHODS = ["medusa", "eagle+koala", "eagle3"]


def dialogues(count: int = 20) -> list[EncodedDialogue]:
    draw = torch.Generator().manual_seed(0)
    lengths = [9 + (7 * i) % 31 for i in range(count)]
    return [
        EncodedDialogue(torch.randint(259, (n,), generator=draw).tolist(), [False] * 4 + [True] * (n - 4))
        for n in lengths
    ]


def count_passes(monkeypatch: pytest.MonkeyPatch, fail_after: int | None = None) -> list[int]:
    """Number of passes of the target so far; the one after ``fail_after`` dies as a killed process would."""
    counted = [0]
    real = Target.states

    def states(self: Target, *arguments: Any) -> torch.Tensor:
        if fail_after is not None and counted[0] == fail_after:
            raise KeyboardInterrupt
        counted[0] += 1
        return real(self, *arguments)

    monkeypatch.setattr(Target, "states", states)
    return counted


def test_rows_are_the_targets_states_and_padding_is_zero(target: Target, tmp_path: Path) -> None:
    talk = dialogues()
    found = write_states(target, talk, 24, (1, -1), tmp_path, {"of": "test"}, SINGLE_PROCESS)
    batch = make_stream(talk, [str(i) for i in range(len(talk))], 128, 24, seed=0).batch(1)
    read, likeliest, normalizers = found.read(batch, torch.device("cpu"), torch.float32)
    wanted = target.states(batch.ids, (1, -1))
    for row, length in enumerate(batch.lengths.tolist()):
        torch.testing.assert_close(read[row, :length], wanted[row, :length], rtol=1e-2, atol=1e-2)
        logits = target.output(read[row, :length, -1])
        assert torch.equal(likeliest[row, :length], logits.argmax(-1))
        torch.testing.assert_close(normalizers[row, :length], logits.logsumexp(-1))
        assert not any(each[row, length:].any() for each in (read, likeliest, normalizers))
    # What a draft vocabulary holds of the target's distribution, from the stored normalizers and from the output layer.
    spec, real = target.spec(torch.arange(0, 259, 2)), torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]
    shares = [features_of(target, batch, (1, -1), 0, stored).drafted_share(spec) for stored in (found, None)]
    stored_share, live_share = (share.view_as(batch.ids)[real] for share in shares)
    torch.testing.assert_close(stored_share, live_share, rtol=2e-2, atol=2e-2)
    assert 0 < float(live_share.min()) < float(live_share.max()) < 1


def test_training_from_stored_states_ends_near_that_from_live_ones_and_leaves_none_behind(
    target: Target, target_folder: Path, tmp_path: Path
) -> None:
    data = conversations(tmp_path)
    assert target.tokenizer is not None
    template = chat_template("vicuna_v1.1", target.tokenizer)
    losses = {}
    for name, setting in {"live": "false", "stored": "true"}.items():
        preset = preset_for(target_folder, data, f"training.stored_states={setting}")
        train_heads(preset, METHODS, target, template, tmp_path / name)
        log = [json.loads(line) for line in (tmp_path / name / "training.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in log]
        assert not (tmp_path / name / "states").exists()
    assert losses["stored"] == pytest.approx(losses["live"], rel=0.02)
    assert losses["stored"] != losses["live"], "states are rounded to half precision"
    manifest = json.loads((tmp_path / "stored" / "eagle3" / "training.json").read_text())
    assert len(manifest["states_sha256"]) == 64


def test_trainings_that_share_a_folder_ask_the_target_once(
    target: Target, target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = conversations(tmp_path)
    assert target.tokenizer is not None
    template = chat_template("vicuna_v1.1", target.tokenizer)
    for seed in (0, 1):
        preset = preset_for(
            target_folder,
            data,
            "training.stored_states=true",
            f"training.seed={seed}",
            "training.held_out_evaluations=1",
        )
        passes = count_passes(monkeypatch)
        train_heads(preset, ["eagle"], target, template, tmp_path / str(seed), states=tmp_path / "states")
        monkeypatch.undo()
        assert passes[0] > 1 if not seed else passes[0] <= 1, "the second only watches acceptance with it"
    assert (tmp_path / "states" / "states.json").exists()


def test_a_kill_loses_no_pass_and_processes_share_them(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(states_module._PASS_TOKENS, "cpu", 64)
    talk = dialogues()
    whole = write_states(target, talk, 64, (-1,), tmp_path / "whole", {}, SINGLE_PROCESS)
    count_passes(monkeypatch, fail_after=3)
    with pytest.raises(KeyboardInterrupt):
        write_states(target, talk, 64, (-1,), tmp_path / "killed", {}, SINGLE_PROCESS)
    monkeypatch.undo()
    monkeypatch.setitem(states_module._PASS_TOKENS, "cpu", 64)
    # The second of two processes does its share, as if it ran alone; then one process does the rest.
    monkeypatch.setattr(ProcessGroup, "wait", lambda self: None)
    with pytest.raises(KoalaBenchError, match=r"lack \d+ of \d+ dialogues"):  # the first process has not finished
        write_states(target, talk, 64, (-1,), tmp_path / "killed", {}, ProcessGroup(1, 2))
    counted = count_passes(monkeypatch)
    rest = write_states(target, talk, 64, (-1,), tmp_path / "killed", {}, SINGLE_PROCESS)
    lengths = [len(each.ids) for each in talk]
    total = len(list(groups_of(sorted(range(len(talk)), key=lengths.__getitem__), lengths.__getitem__, 64)))
    assert 0 < counted[0] < total - 3
    assert rest.sha256 == whole.sha256


def test_a_folder_grows_and_no_dialogue_is_read_twice(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(states_module._PASS_TOKENS, "cpu", 64)
    talk = dialogues()
    few = write_states(target, talk[5:12], 64, (-1,), tmp_path, {}, SINGLE_PROCESS)
    passes = count_passes(monkeypatch)
    # Others before and behind them, one twice.
    grown = write_states(target, [*talk, talk[6]], 64, (-1,), tmp_path, {}, SINGLE_PROCESS)
    missing = sorted(len(each.ids) for each in [*talk[:5], *talk[12:]])
    expected = len(list(groups_of(range(len(missing)), missing.__getitem__, 64)))
    assert passes[0] == expected
    again = write_states(target, talk[5:12], 64, (-1,), tmp_path, {}, SINGLE_PROCESS)
    assert passes[0] == expected
    assert again.sha256 == few.sha256 != grown.sha256
    assert grown.sha256 != write_states(target, talk, 64, (-1,), tmp_path, {}, SINGLE_PROCESS).sha256
    wanted = make_stream(talk, [str(i) for i in range(len(talk))], 128, 64, seed=0).batch(0)
    read, *_ = grown.read(wanted, torch.device("cpu"), torch.float32)
    alone = target.states(wanted.ids)
    for row, length in enumerate(wanted.lengths.tolist()):
        torch.testing.assert_close(read[row, :length], alone[row, :length], rtol=1e-2, atol=1e-2)


def test_what_is_said_to_be_computed_is_of_the_dialogues_asked_for(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = dialogues()
    count_passes(monkeypatch, fail_after=0)
    with pytest.raises(KeyboardInterrupt):
        write_states(target, talk, 64, (-1,), tmp_path, {}, SINGLE_PROCESS)
    monkeypatch.undo()
    capsys.readouterr()
    write_states(target, talk[:3], 64, (-1,), tmp_path, {}, SINGLE_PROCESS)
    tokens = sum(len(each.ids) for each in talk[:3])
    assert f"of {tokens} of {tokens} tokens" in capsys.readouterr().err


def test_only_states_are_deleted(target: Target, tmp_path: Path) -> None:
    write_states(target, dialogues(4), 64, (-1,), tmp_path / "own", {}, SINGLE_PROCESS)
    remove_states(tmp_path / "own")
    assert not (tmp_path / "own").exists()
    (tmp_path / "thesis.tex").write_text("ten years")
    write_states(target, dialogues(4), 64, (-1,), tmp_path, {"target": "a"}, SINGLE_PROCESS)
    write_states(target, dialogues(4), 64, (-1,), tmp_path, {"target": "b"}, SINGLE_PROCESS)
    remove_states(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    remove_states(tmp_path / "absent")


def test_states_of_another_target_are_computed_anew(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_states(target, dialogues(), 64, (-1,), tmp_path, {"target": "a"}, SINGLE_PROCESS)
    passes = count_passes(monkeypatch)
    other = write_states(target, dialogues(12), 64, (-1,), tmp_path, {"target": "b"}, SINGLE_PROCESS)
    assert passes[0] and len(first.rows) > len(other.rows) and len(other.starts) == 12


def test_a_disk_without_room_and_a_cut_file_are_told_in_a_line(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_states(target, dialogues(), 64, (-1,), tmp_path / "cut", {}, SINGLE_PROCESS)
    with open(tmp_path / "cut" / "states.bin", "r+b") as handle:
        handle.truncate(100)
    with pytest.raises(KoalaBenchError, match="incomplete"):
        write_states(target, dialogues(), 64, (-1,), tmp_path / "cut", {}, SINGLE_PROCESS)
    monkeypatch.setattr(states_module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    with pytest.raises(KoalaBenchError, match="GB free"):
        write_states(target, dialogues(), 64, (-1,), tmp_path / "full", {}, SINGLE_PROCESS)


def test_layers_of_heads_are_put_together_with_the_last_one_behind() -> None:
    assert layers_of([(-1,), (2, 0), (0, -1)]) == (0, 2, -1)


def test_weights_do_not_depend_on_who_computed_the_states(target: Target, target_folder: Path, tmp_path: Path) -> None:
    data = conversations(tmp_path)
    assert target.tokenizer is not None
    template = chat_template("vicuna_v1.1", target.tokenizer)
    preset = preset_for(target_folder, data, "training.stored_states=true")
    for name in ("first", "second"):
        train_heads(preset, ["medusa"], target, template, tmp_path / name)
    first, second = (load_file(tmp_path / name / "medusa" / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[key], second[key]) for key in first)
