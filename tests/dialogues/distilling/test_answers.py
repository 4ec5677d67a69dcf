"""Self-distillation: the answers are the target's own, an interrupted run ends in the same bytes, nothing is
overwritten.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig

import koala_bench.dialogues.distilling.answers as distillation
import koala_bench.dialogues.distilling.manifest as manifest
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.dialogues.conversations import Conversations, read_conversations
from koala_bench.dialogues.distilling.answers import DistillOptions, distill
from koala_bench.dialogues.distilling.manifest import answering_target, manifest_of
from koala_bench.dialogues.distilling.questions import EvaluationText
from koala_bench.dialogues.distilling.sampling import SelfDialogues, SelfOptions
from koala_bench.dialogues.encoding import ChatTemplate, chat_template, encode_prompt
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.testing import tiny_config, tiny_target
from tests.support.interrupting import interrupt_at

OPTIONS = DistillOptions(train=5, held_out=2, max_new_tokens=12, rows=2)


def questions_starting(first: str = "What is") -> Conversations:
    dialogues = [[f"{first} {i}?", "old", "And why?", "old too"] for i in range(9)]
    return Conversations(dialogues[:6], [str(i) for i in range(6)], dialogues[6:], {"source": "test"})


@pytest.fixture
def template(target64: Target) -> ChatTemplate:
    assert target64.tokenizer is not None
    return chat_template("vicuna_v1.1", target64.tokenizer)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_of_each_dialogue_so_many_questions_are_answered_as_asked_for(
    target64: Target, template: ChatTemplate, tmp_path: Path
) -> None:
    whole = rows_of(distill(target64, template, questions_starting(), tmp_path / "a.jsonl", OPTIONS))
    first = rows_of(distill(target64, template, questions_starting(), tmp_path / "b.jsonl", replace(OPTIONS, turns=1)))
    assert [row["conversations"] for row in first] == [row["conversations"][:2] for row in whole]
    assert "turns" not in json.loads(manifest_of(tmp_path / "a.jsonl").read_text())["identity"]["options"]
    assert json.loads(manifest_of(tmp_path / "b.jsonl").read_text())["identity"]["options"]["turns"] == 1


def test_every_answer_is_what_the_target_says_to_its_own_conversation_so_far(
    target64: Target, template: ChatTemplate, tmp_path: Path
) -> None:
    rows = rows_of(distill(target64, template, questions_starting(), tmp_path / "a.jsonl", OPTIONS))
    assert [(row["id"], row["split"]) for row in rows] == [
        *((f"train:{i}", "train") for i in range(5)),
        *((f"held_out:{i}", "held_out") for i in range(2)),
    ]
    assert target64.tokenizer is not None
    for row in rows:
        texts = [message["value"] for message in row["conversations"]]
        assert "old" not in texts
        for place in range(1, len(texts), 2):
            prompt = encode_prompt(template, target64.tokenizer, texts[:place])
            found = decode(target64, Vanilla(), VANILLA_TREE, prompt, 12, target64.stop_ids)
            assert texts[place] == target64.tokenizer.decode(found.tokens, skip_special_tokens=True).strip()
            assert row["conversations"][place].get("cut", False) == (found.stop == "limit")


def test_the_reader_takes_the_file_with_its_splits(target64: Target, template: ChatTemplate, tmp_path: Path) -> None:
    plain = distill(target64, template, questions_starting(), tmp_path / "a.jsonl", OPTIONS)
    packed = distill(target64, template, questions_starting(), tmp_path / "b.jsonl.gz", OPTIONS)
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()
    found = read_conversations(str(packed))
    assert (len(found.train), len(found.held_out)) == (5, 2)
    assert [turns[0] for turns in found.held_out] == ["What is 6?", "What is 7?"]


def test_the_manifest_names_the_target_and_counts(target64: Target, template: ChatTemplate, tmp_path: Path) -> None:
    out = distill(target64, template, questions_starting(), tmp_path / "a.jsonl.gz", OPTIONS)
    manifest = json.loads((tmp_path / "a.manifest.json").read_text())
    rows = [json.loads(line) for line in gzip.decompress(out.read_bytes()).splitlines()]
    messages = [message for row in rows for message in row["conversations"] if message["from"] == "gpt"]
    cut = sum("cut" in message for message in messages)
    assert manifest["counts"] == {"dialogues": 7, "unanswered": 0, "answers": len(messages), "cut_answers": cut}
    assert answering_target(out) == manifest["identity"]["target"]
    assert answering_target(tmp_path / "other.jsonl") is None
    assert not (tmp_path / "a.jsonl.gz.partial").exists()


@pytest.mark.parametrize("call", [2, 4, 6])
def test_an_interrupted_run_ends_in_the_same_bytes(
    target64: Target,
    template: ChatTemplate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = distill(target64, template, questions_starting(), tmp_path / "whole.jsonl", OPTIONS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, distillation, "greedy_answers", call)
        distill(target64, template, questions_starting(), tmp_path / "cut.jsonl", OPTIONS)
    assert not (tmp_path / "cut.jsonl").exists()
    partial = tmp_path / "cut.jsonl.partial"
    partial.write_text(partial.read_text() + '{"id": "half a li')
    assert (
        distill(target64, template, questions_starting(), tmp_path / "cut.jsonl", OPTIONS).read_bytes()
        == whole.read_bytes()
    )
    assert ("Resuming" in capsys.readouterr().err) == (call > 2)


def test_what_is_there_is_reused_or_refused_and_never_overwritten(
    target64: Target, template: ChatTemplate, tmp_path: Path
) -> None:
    out = distill(target64, template, questions_starting(), tmp_path / "a.jsonl", OPTIONS)
    before = out.read_bytes(), manifest_of(out).read_bytes()
    distill(target64, template, questions_starting(), out, OPTIONS)
    with pytest.raises(KoalaBenchError, match="made with other settings"):
        distill(target64, template, questions_starting(), out, DistillOptions(4, 2, 12, 2))
    (tmp_path / "mine.jsonl").write_text("my own file")
    with pytest.raises(KoalaBenchError, match="made with other settings"):
        distill(target64, template, questions_starting(), tmp_path / "mine.jsonl", OPTIONS)
    assert (out.read_bytes(), manifest_of(out).read_bytes()) == before
    assert (tmp_path / "mine.jsonl").read_text() == "my own file"


def test_the_leftovers_of_another_run_are_refused(target64: Target, template: ChatTemplate, tmp_path: Path) -> None:
    for content, words in (('{"target": "other"}\n', "another run"), ("{{{\n", "not a line of JSON")):
        (tmp_path / "a.jsonl.partial").write_text(content)
        with pytest.raises(KoalaBenchError, match=words):
            distill(target64, template, questions_starting(), tmp_path / "a.jsonl", OPTIONS)
        assert (tmp_path / "a.jsonl.partial").read_text() == content


def test_a_dialogue_that_fills_the_context_ends_before_it(
    target64: Target, template: ChatTemplate, tmp_path: Path
) -> None:
    room = target64.max_positions  # a byte is a token
    long = Conversations([["a" * 100, "x", "b" * room, "y"], ["c" * room, "z"]], ["0", "1"], [["d", "e"]], {})
    rows = rows_of(distill(target64, template, long, tmp_path / "a.jsonl", OPTIONS))
    assert [(row["id"], len(row["conversations"])) for row in rows] == [("train:0", 2), ("held_out:0", 2)]


def test_a_dialogue_ends_where_the_target_attends_no_further(tmp_path: Path) -> None:
    config = MistralConfig(**{**tiny_config().to_dict(), "sliding_window": 60, "model_type": "mistral"})
    target = tiny_target(tmp_path / "target", config)
    assert target.tokenizer is not None
    target.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    talks = Conversations([["a" * 20, "x", "b" * 40, "y"]], ["0"], [["d", "e"]], {})
    template = chat_template("tokenizer", target.tokenizer)
    rows = rows_of(distill(target, template, talks, tmp_path / "a.jsonl", OPTIONS))
    assert [(row["id"], len(row["conversations"])) for row in rows] == [("train:0", 2), ("held_out:0", 2)]
    with pytest.raises(KoalaBenchError, match="do not go into the 60 "):
        SelfDialogues(target, template, SelfOptions(0, 1, 30, 1, question_tokens=20), set(), EvaluationText([]))


def test_a_disk_that_fills_up_inside_a_character_does_not_stop_the_next_run(
    target64: Target, template: ChatTemplate, tmp_path: Path, monkeypatch: Any
) -> None:
    whole = distill(target64, template, questions_starting("Où est"), tmp_path / "whole.jsonl", OPTIONS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, distillation, "greedy_answers", 4)
        distill(target64, template, questions_starting("Où est"), tmp_path / "cut.jsonl", OPTIONS)
    partial = tmp_path / "cut.jsonl.partial"
    partial.write_bytes(partial.read_bytes() + '{"id": "train:4", "conversations": [{"value": "Où'.encode()[:-1])
    assert (
        distill(target64, template, questions_starting("Où est"), tmp_path / "cut.jsonl", OPTIONS).read_bytes()
        == whole.read_bytes()
    )


@pytest.mark.parametrize("writing", ["write_text", "replacing"])
def test_a_kill_between_the_two_files_is_made_good_by_the_same_command(
    target64: Target, template: ChatTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writing: str
) -> None:
    whole = distill(target64, template, questions_starting(), tmp_path / "whole.jsonl", OPTIONS)
    out = tmp_path / "cut" / "a.jsonl"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _dies_before(patch, writing, {"write_text": manifest_of(out), "replacing": out}[writing])
        distill(target64, template, questions_starting(), out, OPTIONS)
    assert distill(target64, template, questions_starting(), out, OPTIONS).read_bytes() == whole.read_bytes()
    assert manifest_of(out).read_bytes() == manifest_of(whole).read_bytes()
    assert sorted(path.name for path in out.parent.iterdir()) == ["a.jsonl", "a.manifest.json"]


def _dies_before(patch: pytest.MonkeyPatch, name: str, path: Path) -> None:
    real = getattr(manifest, name)

    def dies(where: Path, *more: Any) -> Any:
        if where == path:
            raise KeyboardInterrupt
        return real(where, *more)

    patch.setattr(manifest, name, dies)


def test_a_folder_with_the_manifest_beside_its_answers_is_a_source(
    target64: Target, template: ChatTemplate, tmp_path: Path
) -> None:
    out = distill(target64, template, questions_starting(), tmp_path / "answers.jsonl", OPTIONS)
    assert manifest_of(out).exists()
    folder, alone = read_conversations(str(tmp_path)), read_conversations(str(out))
    assert (folder.train, folder.held_out) == (alone.train, alone.held_out)
    assert list(folder.provenance["files_sha256"]) == ["answers.jsonl"]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        "5",
        '{"identity": 5}',
        '{"identity": {"target": {"name": "x"}}}',
        '{"identity": {"target": {"weights_sha256": "x"}}}',
    ],
)
def test_a_damaged_manifest_is_one_clear_error(
    target64: Target, template: ChatTemplate, tmp_path: Path, text: str
) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text("{}")
    manifest_of(out).write_text(text)
    with pytest.raises(
        KoalaBenchError, match=r"a\.manifest\.json does not say whose answers a\.jsonl holds.* Delete it"
    ):
        answering_target(out)
    with pytest.raises(KoalaBenchError, match="made with other settings"):
        distill(target64, template, questions_starting(), out, OPTIONS)


def test_a_manifest_of_somebody_else_says_nothing(tmp_path: Path) -> None:
    manifest_of(tmp_path / "a.jsonl").write_text('{"rows": 5}')
    assert answering_target(tmp_path / "a.jsonl") is None
