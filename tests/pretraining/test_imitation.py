"""Draft models trained to imitate a target: the loss, the text, the tokenizer, resume, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from heads.draft_model import DraftModel
from koala_bench.dialogues.conversations import Conversations
from koala_bench.engine.loading.targets import load_target
from koala_bench.errors import KoalaBenchError
from koala_bench.pretraining.imitation import Imitated, load_imitated
from koala_bench.pretraining.loop import pretrain
from koala_bench.pretraining.text import Rows, Text
from tests.pretraining.test_pretraining import CPU, TINY, equal, made_up
from tests.pretraining.test_pretraining import train as train_target
from tests.support.commands import Koala


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small target that has learnt something."""
    return train_target(tmp_path_factory.mktemp("teacher") / "out", steps=30, every=100)


def said(count: int) -> Conversations:
    dialogues = [[f"What does `thing_{i}` do?", f"It answers {i}, and {i + 1}, and {i + 2}."] for i in range(count)]
    return Conversations(dialogues, [str(i) for i in range(count)], dialogues[:12], {"source": "answers.jsonl"})


def imitate(teacher: Path, out: Path, answers: int = 40, **changes: Any) -> Path:
    imitated = Imitated(load_target(str(teacher), "cpu", "float32"), said(answers) if answers else None)
    return pretrain(made_up(), replace(TINY, layers=1, **changes), out, CPU, checkpoint_every=2, imitate=imitated)


def test_the_loss_is_the_cross_entropy_with_the_targets_distribution(teacher: Path) -> None:
    target, other = (load_target(str(teacher), "cpu", "float32") for _ in range(2))
    other.model.get_input_embeddings().weight.mul_(1.5)
    imitated, ids = Imitated(target), torch.tensor([[1, 5, 9, 30], [7, 8, 4, 2]])
    p, q = (
        model(input_ids=ids).logits[:, :-1].double().softmax(-1).flatten(0, 1).tolist()
        for model in (target.model, other.model)
    )
    wanted = (
        -sum(x * math.log(y) for theirs, ours in zip(p, q, strict=True) for x, y in zip(theirs, ours, strict=True)) / 6
    )
    assert imitated.loss(other.model, ids).item() == pytest.approx(wanted, rel=1e-4)
    assert imitated.loss(target.model, ids).item() < wanted - 0.01
    other.model.load_state_dict(target.model.state_dict())
    other.model.requires_grad_(True)
    imitated.loss(other.model, ids).backward()
    assert (
        max(float(weight.grad.abs().max()) for weight in other.model.parameters()) < 1e-5
    )  # least where the two are equal
    assert imitated.agreement(other.model, ids) == 1.0


def test_a_draft_model_has_the_targets_tokens_and_its_own_shape(teacher: Path, tmp_path: Path) -> None:
    out = imitate(teacher, tmp_path / "out")
    target = load_target(str(teacher), "cpu", "float32")
    head = DraftModel(target.spec(), str(out))
    made = load_target(str(out), "cpu", "float32")
    assert (made.layers, target.layers, made.max_positions) == (1, 2, target.max_positions)
    assert head.drafting_parameters == made.parameters < target.parameters
    manifest = json.loads((out / "pretraining.json").read_text())
    assert manifest["imitates"]["weights_sha256"] == load_imitated(str(teacher), None, CPU).identity["weights_sha256"]
    assert manifest["imitates"]["answers"] == {"source": "answers.jsonl"}
    assert manifest["options"]["layers"] == 1
    card = (out / "README.md").read_text()
    assert "draft model for" in card and f"{manifest['imitates']['agreement']:.1%} of its best guesses" in card


def test_it_comes_to_agree_with_the_target(teacher: Path, tmp_path: Path) -> None:
    shares = [
        json.loads((imitate(teacher, tmp_path / str(n), steps=n) / "pretraining.json").read_text())["imitates"][
            "agreement"
        ]
        for n in (1, 40)
    ]
    assert shares[1] > shares[0] + 0.2


def test_an_interrupted_imitation_ends_in_the_same_weights(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imitate(teacher, tmp_path / "whole", steps=10)
    with monkeypatch.context() as patch:
        real, calls = Imitated.loss, iter(range(100))

        def interrupted(self: Imitated, model: Any, ids: torch.Tensor) -> torch.Tensor:
            if next(calls) == 8:  # when the rate falls, between two checkpoints
                raise KeyboardInterrupt
            return real(self, model, ids)

        patch.setattr(Imitated, "loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            imitate(teacher, tmp_path / "parts", steps=10)
    imitate(teacher, tmp_path / "parts", steps=10)
    assert equal(tmp_path / "whole", tmp_path / "parts")


def test_a_checkpoint_that_imitates_something_else_is_refused(teacher: Path, tmp_path: Path) -> None:
    imitate(teacher, tmp_path / "out", steps=2)
    with pytest.raises(KoalaBenchError, match="made from another corpus or with other options"):
        imitate(teacher, tmp_path / "out", answers=0, steps=2)


def test_half_of_the_rows_are_answers_while_the_rate_falls() -> None:
    corpus, answers = (Rows([np.full(50, token, dtype=np.uint16)] * 9, 10, 0) for token in (3, 7))
    text = Text(corpus, corpus, answers, torch.empty(0), torch.empty(0))
    assert text.batch(4, 40, decaying=True)[:, 0].tolist() == [7, 7, 3, 3]
    assert text.batch(4, 40, decaying=False)[:, 0].tolist() == [3, 3, 3, 3]
    assert {tuple(text.batch(step, 20, decaying=True).shape) for step in range(30)} == {(2, 10)}


def test_answers_that_fill_no_row_are_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(KoalaBenchError, match="do not fill a row of 512 tokens"):
        imitate(teacher, tmp_path / "out", answers=1, decay_row_tokens=512, step_tokens=1024)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--answers bundled", "--answers are those of a target. Name it with --imitate."),
        ("--imitate nowhere", "nowhere is no target of `koala-bench pretrain`."),
        ("--imitate tiny --answers none.jsonl", "Cannot read none.jsonl"),
        ("--layers 2 --start somewhere", "--start brings its own shape. Leave out layers."),
        ("--set width=64 --start somewhere", "--start brings its own shape. Leave out width."),
        (
            "--imitate tiny --set vocabulary=512",
            "A draft model has its target's vocabulary and positions. Leave out --set vocabulary.",
        ),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(koala: Koala, tmp_path: Path, command: str, message: str) -> None:
    result = koala("pretrain", "--out", str(tmp_path / "out"), *command.split())
    assert result.code == 2 and message in result.complaint
    assert not (tmp_path / "out").exists()
