"""Pretraining: a loadable target, its manifest and card, and exact resume."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import koala_bench.pretraining.loop as pretraining
from koala_bench.dialogues.conversations import Conversations
from koala_bench.engine.loading.targets import load_target
from koala_bench.errors import KoalaBenchError
from koala_bench.pretraining.corpus import corpus_sha256, read_corpus
from koala_bench.pretraining.loop import pretrain
from koala_bench.pretraining.options import PretrainOptions, with_settings
from tests.support.commands import Koala
from tests.support.interrupting import interrupt_at

CPU = torch.device("cpu")
TINY = PretrainOptions(
    layers=2, width=32, intermediate=48, attention_heads=2, vocabulary=320, positions=512,
    row_tokens=32, decay_row_tokens=64, step_tokens=128, steps=6, warmup_steps=2, decay_fraction=0.3,
)  # fmt: skip


def made_up(offset: int = 0) -> Conversations:
    train = [
        [f"What does `thing_{i + offset}` do?", f"It counts to {i}.", "Show an example.", f"thing_{i}(1, 2, {i})"]
        for i in range(60)
    ]
    held_out = [["What does `other` do?", f"It counts to {i}."] for i in range(8)]
    provenance = {"source": "documentation", "versions": {"library": "1.0"}}
    return Conversations(train, [str(i) for i in range(60)], held_out, provenance)


def train(out: Path, corpus: Conversations | None = None, every: int = 2, **changes: Any) -> Path:
    return pretrain(corpus or made_up(), dataclasses.replace(TINY, **changes), out, CPU, checkpoint_every=every)


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Interrupt the training in the middle of a step."""
    interrupt_at(monkeypatch, pretraining, "_loss", call)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights in full precision, from the checkpoint; those of the finished target are rounded."""
    found: dict[str, torch.Tensor] = torch.load(folder / "work" / "checkpoint.pt", weights_only=True)["model"]
    return found


def equal(first: Path, second: Path) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps without interruption."""
    return train(tmp_path_factory.mktemp("whole") / "out")


def test_the_finished_target_loads_like_any_other(whole: Path) -> None:
    target = load_target(str(whole), "cpu", "float32")
    assert target.tokenizer is not None
    assert (target.layers, target.model.config.hidden_size, target.model.config.vocab_size, target.max_positions) == (
        2,
        32,
        320,
        512,
    )
    assert target.stop_ids == (2,)
    assert (
        target.tokenizer.decode(target.tokenizer("thing_7(1, 2)")["input_ids"], skip_special_tokens=True)
        == "thing_7(1, 2)"
    )
    stored = load_file(whole / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, weights(whole)[name].bfloat16()) for name, tensor in stored.items())


def test_the_manifest_says_what_it_was_made_of(whole: Path) -> None:
    manifest = json.loads((whole / "pretraining.json").read_text())
    assert manifest["corpus_sha256"] == corpus_sha256(made_up())
    assert manifest["corpus_versions"] == {"library": "1.0"}
    assert manifest["tokens_seen"] == 6 * 128
    assert manifest["options"] == dataclasses.asdict(TINY)
    assert 0 < manifest["held_out_loss"] < 8
    assert manifest["parameters"] == sum(tensor.numel() for tensor in load_file(whole / "model.safetensors").values())
    lines = [json.loads(line) for line in (whole / "work" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert lines[-1]["held_out_loss"] == manifest["held_out_loss"]
    assert [line["rate"] for line in lines] == [0.5, 1.0, 1.0, 1.0, 1.0, 0.5]


def test_the_card_holds_the_numbers_of_the_manifest(whole: Path) -> None:
    card, manifest = (whole / "README.md").read_text(), json.loads((whole / "pretraining.json").read_text())
    for value in (str(manifest["held_out_loss"]), f"{manifest['tokens_seen']:,}", "docstrings of installed packages"):
        assert value in card


def test_it_learns(tmp_path: Path) -> None:
    train(tmp_path / "out", steps=40, every=100)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "work" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 1.5


@pytest.mark.parametrize("call", [1, 4, 6])
def test_an_interrupted_run_ends_in_the_same_weights(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, call)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    train(tmp_path / "out")
    assert equal(whole, tmp_path / "out")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_finished_run_is_not_trained_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "out")
    before = weights(tmp_path / "out")
    train(tmp_path / "out")
    assert "Resuming after step 6." in capsys.readouterr().err
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "out").items())


@pytest.mark.parametrize("change", ["corpus", "seed", "width", "steps"])
def test_another_corpus_or_other_options_are_refused(tmp_path: Path, change: str) -> None:
    train(tmp_path / "out", steps=2)
    before = (tmp_path / "out" / "work" / "checkpoint.pt").read_bytes()
    changes: dict[str, Any] = {
        "corpus": {"corpus": made_up(1000)},
        "seed": {"seed": 1},
        "width": {"width": 64},
        "steps": {"steps": 3},
    }[change]
    with pytest.raises(KoalaBenchError, match="made from another corpus or with other options"):
        train(tmp_path / "out", **{"steps": 2, **changes})
    assert (tmp_path / "out" / "work" / "checkpoint.pt").read_bytes() == before


def test_a_damaged_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    train(tmp_path / "out", steps=2)
    checkpoint = tmp_path / "out" / "work" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    with pytest.raises(KoalaBenchError, match=r"checkpoint\.pt is damaged"):
        train(tmp_path / "out", steps=2)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pretraining._loss
    monkeypatch.setattr(pretraining, "_loss", lambda *arguments: real(*arguments) * float("nan"))
    with pytest.raises(KoalaBenchError, match="The loss is nan at step 0"):
        train(tmp_path / "out")
    assert not (tmp_path / "out" / "work" / "checkpoint.pt").exists()


def test_seeds_give_different_weights_and_equal_seeds_equal_ones(whole: Path, tmp_path: Path) -> None:
    torch.manual_seed(77)  # whatever was drawn before does not matter
    train(tmp_path / "same")
    train(tmp_path / "other", seed=1)
    assert equal(whole, tmp_path / "same")
    assert not equal(whole, tmp_path / "other")


def conversations(folder: Path, count: int = 200) -> Path:
    """A folder with a file of conversations, one of which is too long to be answered."""
    rows = [
        {
            "conversations": [
                {"from": "human", "value": f"How many are {i} and {i}?"},
                {"from": "gpt", "value": f"They are {2 * i}." * (1 + i % 3)},
            ]
        }
        for i in range(count)
    ]
    rows.append(
        {
            "split": "held_out",
            "conversations": [{"from": "human", "value": "why? " * 600}, {"from": "gpt", "value": "Because."}],
        }
    )
    folder.mkdir()
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_target_of_conversations_in_another_shape(
    koala: Koala, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    conversations(tmp_path / "talk")
    shape = (
        "--layers 1 --set width=32 --set attention_heads=2 --set intermediate=48 --set vocabulary=300 --set"
        " positions=256"
    )
    rows = "--set row_tokens=64 --set decay_row_tokens=64 --set step_tokens=256 --set weight_decay=0.1"
    command = f"pretrain --out out --source talk --device cpu --steps 3 {shape} {rows}"
    assert koala(*command.split()).code == 0
    target = load_target(str(tmp_path / "out"), "cpu", "float32")
    assert (target.layers, target.model.config.hidden_size, target.model.config.vocab_size, target.max_positions) == (
        1,
        32,
        300,
        256,
    )
    manifest = json.loads((tmp_path / "out" / "pretraining.json").read_text())
    assert manifest["conversations"]["source"] == "talk" and list(manifest["conversations"]["files_sha256"]) == [
        "sums.jsonl"
    ]
    assert manifest["corpus_sha256"] == corpus_sha256(read_corpus("talk"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "conversations of others" in card and "license: other" in card and "installed packages" not in card


def test_conversations_come_shuffled_and_as_they_were_read(tmp_path: Path) -> None:
    folder = conversations(tmp_path / "talk")
    one, other = read_corpus(str(folder)), read_corpus(str(folder))
    assert one.train == other.train != sorted(one.train)
    assert len(one.train) + len(one.held_out) == 201
    assert {len(turns) for turns in one.train} == {2}
    assert one.provenance["rows"]["whole"] == 201


def test_settings_say_what_differs_from_the_usual() -> None:
    changed = with_settings(
        PretrainOptions(steps=7, seed=3), ["width=64", "attention_heads=2", "matrix_rate=0.01", "weight_decay=0"]
    )
    assert (changed.width, changed.matrix_rate, changed.weight_decay, changed.steps) == (64, 0.01, 0.0, 7)
    with pytest.raises(KoalaBenchError, match="decay_fraction"):
        with_settings(PretrainOptions(), ["decay_fraction=1.5"])
