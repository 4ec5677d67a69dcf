"""From a preset to trained heads: what is told before anything is read, and what becomes of dialogues that are too
long.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, MistralConfig, PretrainedConfig

import koala_bench.training.experiment as experiment
from koala_bench.dialogues.encoding import chat_template
from koala_bench.engine.loading.targets import fingerprint
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import Preset, load_preset
from koala_bench.testing import tiny_config, tiny_target
from koala_bench.training import held_out
from koala_bench.training.checkpoints import read_manifest
from koala_bench.training.experiment import load_preset_target, methods_with_heads, train_heads
from tests.support.small_runs import conversations, preset_for


def train(preset: Preset, target: Target, out: Path, methods: tuple[str, ...] = ("eagle",)) -> None:
    assert target.tokenizer is not None
    train_heads(preset, methods, target, chat_template("vicuna_v1.1", target.tokenizer), out)


def with_long_questions(folder: Path, every: int) -> Path:
    """Conversations of which some ask for longer than a sample is."""
    path = conversations(folder, 400)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[::every]:
        row["conversations"][0]["value"] += " please" * 60
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_dialogues_whose_answer_lies_beyond_the_limit_are_left_out(
    target: Target, target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = preset_for(target_folder, with_long_questions(tmp_path, 10), "training.steps=2")
    train(preset, target, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out" / "eagle")
    assert manifest and 300 < manifest["dialogues"] < 370
    said = capsys.readouterr().err
    left_out = manifest["provenance"]["dialogues"]["train"]["over_long_and_left_out"]
    assert left_out > 20
    assert f"; {left_out} are left out, having no answer token before, such as conversations.jsonl:" in said
    assert (tmp_path / "out" / "eagle" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        (
            GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=96, bos_token_id=1, eos_token_id=2),
            96,
        ),
        (tiny_config(max_position_embeddings=96), 96),
        (MistralConfig(**{**tiny_config().to_dict(), "sliding_window": 70, "model_type": "mistral"}), 70),
    ],
    ids=["learnt positions", "short context", "window"],
)
def test_dialogues_and_probes_are_no_longer_than_what_the_target_decodes(
    config: PretrainedConfig, rows: int, target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out, "ANSWER_TOKENS", 64)
    data = conversations(tmp_path)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for line in lines:
        line["conversations"][1]["value"] += " and on" * 60
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    preset = preset_for(target_folder, data, "training.steps=1", "data.probes=3")
    target = tiny_target(tmp_path / "target", config)
    assert target.tokenizer is not None
    target.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    train_heads(preset, ["eagle"], target, chat_template("tokenizer", target.tokenizer), tmp_path / "out")
    manifest = read_manifest(tmp_path / "out" / "eagle")
    assert manifest
    counts = manifest["provenance"]["dialogues"]
    assert counts["train"]["tokens"] == rows * manifest["dialogues"]
    assert counts["held_out"]["probes_left_out"] == (3 if rows == 70 else 0), "an answer of 64 tokens has no room"


def test_every_dialogue_is_counted_in_the_manifest_and_said(
    target: Target, target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = conversations(tmp_path, 400)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows[::10]:
        row["conversations"][1]["value"] += " and on" * 60  # the beginning of the answer can be learnt
    for row in rows[1::10]:
        row["conversations"][0]["value"] += " please" * 60
    rows += [{"conversations": []}, {"text": "no form"}, {"conversations": [{"from": "human", "value": "why?"}]}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(
        preset_for(target_folder, data, "training.steps=2", "data.limit=300", "data.probes=9"), target, tmp_path / "out"
    )
    manifest, said = read_manifest(tmp_path / "out" / "eagle"), capsys.readouterr().err
    assert manifest
    found = manifest["provenance"]["dialogues"]
    counts, apart = found["train"], found["held_out"]
    kinds = ("whole", "over_long_and_cut", "over_long_and_left_out", "without_answer_token")
    assert (
        sum(counts[kind] for kind in kinds) == 300
        and counts["whole"] + counts["over_long_and_cut"] == manifest["dialogues"]
    )
    assert counts["over_long_and_cut"] >= 25 <= counts["over_long_and_left_out"] and counts["without_answer_token"] == 0
    read = 300 + counts["not_taken"] + sum(apart[kind] for kind in kinds)
    assert read == 400
    assert counts["tokens"] < 300 * 192 and counts["tokens_cut_off"] > 25 * 100
    assert (
        f"Of 300 dialogues, at most 192 tokens each: {counts['over_long_and_cut']} are cut there, which loses"
        f" {counts['tokens_cut_off']:,} tokens; " in said
    )
    assert manifest["provenance"]["rows"] == {
        "whole": 400, "in_part": {}, "left_out": {
            "the last question has no answer": 1,
            "the text was formatted by another chat template": 1,
            "there is no message": 1,
        }
    }  # fmt: skip
    assert "3 rows without a question followed by an answer are left out: " in said


def test_the_counts_do_not_decide_whether_a_head_is_reused(
    target: Target, target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = preset_for(target_folder, conversations(tmp_path), "training.steps=2")
    train(preset, target, tmp_path / "out")
    written = tmp_path / "out" / "eagle" / "training.json"
    manifest = json.loads(written.read_text())
    for key in ("rows", "dialogues"):
        del manifest["provenance"][key]  # as before they were counted
    written.write_text(json.dumps(manifest))
    train(preset, target, tmp_path / "out")
    assert "Reusing the trained heads" in capsys.readouterr().err


def test_if_all_are_too_long_that_is_one_clear_error(target: Target, target_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        KoalaBenchError,
        match=r"None of \d+ dialogues has an answer token within its first 192 tokens\. Raise --set data\.max_tokens",
    ):
        train(preset_for(target_folder, with_long_questions(tmp_path, 1)), target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        "methods.eagle.head=eagel",
        "methods.eagle.tree=oak",
        "methods.eagle.tree=chain-65",
        "methods.eagle.options.lairs=1",
        "methods.eagle.objective=coala",
    ],
)
def test_mistakes_are_told_before_the_data_is_read(
    target: Target, target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the data was read first")

    monkeypatch.setattr(experiment, "read_conversations", never)
    with pytest.raises(KoalaBenchError):
        train(preset_for(target_folder, tmp_path / "unread.jsonl", change), target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_one_clear_error(target: Target, target_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(KoalaBenchError, match="Cannot make the folder"):
        train(preset_for(target_folder, conversations(tmp_path)), target, tmp_path / "file" / "out")


def test_vanilla_alone_needs_no_training(target: Target, target_folder: Path, tmp_path: Path) -> None:
    train(preset_for(target_folder, tmp_path / "unread.jsonl"), target, tmp_path / "out", ("vanilla",))
    assert not (tmp_path / "out").exists()
    assert methods_with_heads(load_preset("tiny"), ["eagle", "vanilla", "medusa"]) == ["eagle", "medusa"]


def test_a_tree_may_change_without_training_again(
    target: Target, target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = conversations(tmp_path)
    train(preset_for(target_folder, data, "training.steps=2"), target, tmp_path / "out")
    train(
        preset_for(
            target_folder, data, "training.steps=2", "methods.eagle.tree=chain-2", "evaluation.max_new_tokens=7"
        ),
        target,
        tmp_path / "out",
    )
    assert "Reusing the trained heads" in capsys.readouterr().err


def test_the_presets_target_and_template_are_loaded(target_folder: Path, tmp_path: Path) -> None:
    target, template = load_preset_target(
        preset_for(target_folder, tmp_path, "target.dtype=float64", "target.chat_template=zero_shot")
    )
    assert (target.name, str(target.dtype), template.name) == (str(target_folder), "torch.float64", "zero_shot")


def test_answers_of_another_target_are_noticed_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tiny_target(tmp_path)
    for weights, noticed in ((fingerprint(target)["weights_sha256"], False), ("other", True)):
        identity = {"target": {"name": "someone", "weights_sha256": weights}}
        (tmp_path / "answers.manifest.json").write_text(json.dumps({"identity": identity}))
        capsys.readouterr()
        experiment._check_answers(target, str(tmp_path / "answers.jsonl.gz"))
        assert ("another target, someone" in capsys.readouterr().err) == noticed


def test_the_bundled_answers_are_refused_for_another_target(
    target: Target, target_folder: Path, tmp_path: Path
) -> None:
    preset = load_preset("tiny", [f"target.name='{target_folder}'"])
    with pytest.raises(KoalaBenchError, match=r"--set data\.source=FILE"):
        train(preset, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()
