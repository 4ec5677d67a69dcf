"""Several processes: two end in the weights of one, share out the questions, and merge their parts into one complete
record.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import koala_bench.training.experiment as experiment
from koala_bench.common.process_group import SINGLE_PROCESS, ProcessGroup
from koala_bench.dialogues.encoding import chat_template
from koala_bench.dialogues.questions import Question
from koala_bench.engine.loading.targets import load_target
from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.loop import evaluate
from koala_bench.evaluation.recording import open_record
from koala_bench.evaluation.shards import merge_parts, part_of, place_for
from koala_bench.records.reading import read_run
from koala_bench.records.schema import key_of
from tests.support.commands import Koala
from tests.support.processes import together
from tests.support.small_runs import conversations, preset_for, write_questions
from tests.support.synthetic_run import QUESTIONS, make_header, make_turns
from tests.training.test_training import run, weights

METHODS = ["medusa+koala", "eagle", "eagle+koala"]
TIMES = {"prefill_s", "draft_prefill_s", "decode_s", "draft_s", "verify_s"}


def settings(folder: Path, micro_batches: int) -> list[str]:
    balanced = (
        "methods.\"medusa+koala\".objective_options={ discriminator = 'embedding', weight = 0.1, balanced = true,"
        " r1 = 1.0 }"
    )
    small = [
        "training.batch_tokens=192", f"training.micro_batches={micro_batches}", "training.steps=8",
        "training.checkpoint_every=4", balanced,
    ]  # fmt: skip
    return [
        *small,
        f"evaluation.questions='{folder / 'questions.jsonl'}'",
        "evaluation.max_new_tokens=10",
        "evaluation.warmup=0",
    ]


def train_and_evaluate(
    target_folder: Path, folder: Path, out: Path, more: list[str], methods: Sequence[str] = METHODS
) -> None:
    preset = preset_for(target_folder, folder / "conversations.jsonl", *more)
    run(preset, list(methods), out)
    exact = load_target(str(target_folder), "cpu", "float64")
    assert exact.tokenizer is not None
    evaluate(
        preset,
        "tiny",
        ["vanilla", *methods],
        exact,
        chat_template("vicuna_v1.1", exact.tokenizer),
        out,
        out / "records.jsonl",
        None,
        ["koala-bench"],
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    conversations(folder)
    write_questions(folder / "questions.jsonl", [("words", [f"count {i}", "go on"]) for i in range(5)])
    return folder


@pytest.fixture(scope="module")
def alone(target_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    train_and_evaluate(target_folder, data, out, settings(data, 2))
    return out


@pytest.mark.slow
def test_two_processes_end_in_the_weights_and_records_of_one(
    target_folder: Path, data: Path, alone: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    two = tmp_path / "two"
    assert together(2, train_and_evaluate, target_folder, data, two, settings(data, 2)) == [0, 0]
    said = capfd.readouterr().err
    for method in METHODS:
        one, other = weights(alone / method), weights(two / method)
        assert max(float((one[key] - other[key]).abs().max()) for key in one) < 1e-5
    assert said.count("Resuming") == 0 and said.count("trained parameters") == len(METHODS), "one process speaks"
    mine, theirs = read_run(alone / "records.jsonl"), read_run(two / "records.jsonl")
    assert theirs.finished and not list(two.glob("*.part-*"))
    assert [key_of(turn) for turn in theirs.turns] == [key_of(turn) for turn in mine.turns], "the order of one process"
    for turn, other_turn in zip(mine.turns, theirs.turns, strict=True):
        assert {k: v for k, v in turn.items() if k not in TIMES} == {
            k: v for k, v in other_turn.items() if k not in TIMES
        }
    assert theirs.header["measure"] == {"warmup": 0, "repeats": 1, "processes": 2, "order": "drawn"}
    # A finished record is anyone's to reuse.
    again = read_run(two / "records.jsonl").path.read_bytes()
    train_and_evaluate(target_folder, data, two, settings(data, 2))
    assert (two / "records.jsonl").read_bytes() == again


def test_micro_batches_that_cannot_be_shared_out_are_one_clear_error(
    target_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "find_process_group", lambda device: ProcessGroup(0, 2))
    preset = preset_for(target_folder, data / "conversations.jsonl", "training.micro_batches=3")
    with pytest.raises(
        KoalaBenchError,
        match=r"3 micro-batches cannot be shared out to 2 processes\. Set training\.micro_batches to a multiple of 2\.",
    ):
        run(preset, ["eagle"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_micro_batches_are_one_step_on_their_mean(target_folder: Path, data: Path, tmp_path: Path) -> None:
    """One step of plain gradient descent, written down again: the mean of the gradients of both batches."""
    from koala_bench.training.features import features_of
    from koala_bench.training.loop import build_head

    preset = preset_for(
        target_folder,
        data / "conversations.jsonl",
        "training.batch_tokens=192",
        "training.micro_batches=2",
        "training.steps=1",
    )
    run(preset, ["eagle"], tmp_path / "out")
    target = load_target(str(target_folder), "cpu", "float32")
    head = build_head(target, preset.method("eagle"), 0)
    head.train()
    stream = _stream(preset, target)
    for number in (0, 1):
        batch = features_of(target, stream.batch(number), (-1,), seed=number)
        with torch.autocast("cpu", torch.bfloat16):
            loss = head.loss(batch).total
        (loss / 2).backward()
    torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
    torch.optim.AdamW(head.parameters(), lr=1e-3, betas=preset.training.betas, weight_decay=0.0, fused=True).step()
    trained = weights(tmp_path / "out" / "eagle")
    for key, parameter in head.state_dict().items():
        torch.testing.assert_close(trained[key], parameter, rtol=0, atol=1e-6)
    manifest = json.loads((tmp_path / "out" / "eagle" / "training.json").read_text())
    assert manifest["tokens"] == sum(int(stream.batch(number).lengths.sum()) for number in (0, 1))


def _stream(preset: Any, target: Any) -> Any:
    from koala_bench.dialogues.conversations import read_conversations
    from koala_bench.training.experiment import training_streams

    return training_streams(
        preset, read_conversations(preset.data.source), target, chat_template("vicuna_v1.1", target.tokenizer)
    )[0]


def test_a_command_that_writes_alone_refuses_to_be_launched(koala: Koala, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    done = koala("compare", "eagle")
    assert done.code == 2
    assert (
        done.err == "koala-bench: compare runs in one process. Start it without a launcher; these can be launched:"
        " distill, states, train, evaluate, reproduce.\n"
    )
    done = koala("distill", "--out", "answers.jsonl")
    assert (done.code, done.err) == (
        2,
        "koala-bench: distill --source documentation runs in one process. Start it without a launcher, or use --source"
        " self.\n",
    )


# ------------------------------------------------------------------------------ dealing out and merging


class _Still(ProcessGroup):
    """A process that need not wait for others."""

    def wait(self) -> None:
        pass


def test_everything_is_dealt_out_once() -> None:
    for size in (1, 2, 3, 7):
        dealt = [index for rank in range(size) for index in ProcessGroup(rank, size).own(10)]
        assert sorted(dealt) == list(range(10))


def part(path: Path, questions: list[int], methods: list[str], finish: bool = True) -> None:
    header = make_header(methods)
    header["measure"]["processes"] = 2
    with open_record(path, header) as writer:
        for turn in make_turns(methods):
            if turn["question_id"] in questions:
                writer.append(turn)
        if finish:
            writer.finish(1.0)


def test_parts_merge_into_the_record_of_one_process(tmp_path: Path) -> None:
    record, methods = tmp_path / "records.jsonl", ["vanilla", "eagle"]
    questions = [Question(number, "writing", ("a",)) for number in QUESTIONS]
    for rank in (0, 1):
        part(part_of(record, rank, 2), list(QUESTIONS)[rank::2], methods)
    merge_parts(record, _Still(0, 2), questions, 0.0)
    found = read_run(record)
    assert found.finished and [key_of(turn) for turn in found.turns] == [key_of(turn) for turn in make_turns(methods)]
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


def test_parts_of_another_number_of_processes_are_not_written_over(tmp_path: Path) -> None:
    record = tmp_path / "records.jsonl"
    part(part_of(record, 0, 2), [81], ["vanilla", "eagle"], finish=False)
    assert place_for(record, ProcessGroup(1, 2), 8) == part_of(record, 1, 2)
    for group in (SINGLE_PROCESS, ProcessGroup(0, 3)):
        with pytest.raises(KoalaBenchError, match="part of a run with another number of processes"):
            place_for(record, group, 8)
    with pytest.raises(KoalaBenchError, match="8 questions cannot be shared out to 9"):
        place_for(tmp_path / "other.jsonl", ProcessGroup(0, 9), 8)
