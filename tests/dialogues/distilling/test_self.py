"""A target writes dialogues alone: its answers are its greedy ones, what is drawn depends on the seed, a kill loses
little."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.dialogues.conversations import read_conversations
from koala_bench.dialogues.distilling import files as self_files
from koala_bench.dialogues.distilling.files import distill_self, read_parts
from koala_bench.dialogues.distilling.manifest import answering_target, manifest_of
from koala_bench.dialogues.distilling.questions import (
    EvaluationText,
    draw_kind,
    evaluation_files,
    mix,
    refuses,
    why_useless,
)
from koala_bench.dialogues.distilling.sampling import SelfDialogues, SelfOptions
from koala_bench.dialogues.encoding import ChatTemplate, chat_template, encode_prompt
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.processor import kernels
from koala_bench.engine.row_cache import RowCache, packed_layers
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.testing import tiny_config, tiny_target

OPTIONS = SelfOptions(seed=3, turns=2, max_new_tokens=8, rows=3, question_tokens=24)


@pytest.fixture(scope="module")
def writer() -> Target:
    """The bundled target in float64: it asks and answers about libraries, and its greedy choices do not depend on the
    batch."""
    return load_target("tiny", "cpu", "float64")


@pytest.fixture(scope="module")
def template(writer: Target) -> ChatTemplate:
    assert writer.tokenizer is not None
    return chat_template("vicuna_v1.1", writer.tokenizer)


@pytest.fixture(scope="module")
def written(writer: Target, template: ChatTemplate, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distill_self(writer, template, tmp_path_factory.mktemp("self") / "answers.jsonl.gz", OPTIONS, 3, 1, [])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def test_every_answer_is_what_the_target_says_to_its_dialogue_so_far(
    writer: Target, template: ChatTemplate, written: Path
) -> None:
    assert writer.tokenizer is not None
    for row in rows_of(written):
        texts = [message["value"] for message in row["conversations"]]
        assert len(texts) in (2, 4)
        tokens = 0
        for place in range(1, len(texts), 2):
            prompt = encode_prompt(template, writer.tokenizer, texts[:place])
            found = decode(writer, Vanilla(), VANILLA_TREE, prompt, 8, writer.stop_ids)
            assert texts[place] == writer.tokenizer.decode(found.tokens, skip_special_tokens=True).strip()
            assert row["conversations"][place].get("cut", False) == (found.stop == "limit")
            tokens += len(found.tokens)
        assert row["answer_tokens"] == tokens


def test_the_file_is_a_source_with_splits_and_its_manifest_counts(writer: Target, written: Path) -> None:
    found = read_conversations(str(written))
    assert (len(found.train), len(found.held_out)) == (3, 1)
    rows, manifest = rows_of(written), json.loads(manifest_of(written).read_text())
    assert [row["id"] for row in rows] == [f"self:{number}" for number in range(4)]
    assert manifest["counts"]["answer_tokens"] == sum(row["answer_tokens"] for row in rows)
    assert manifest["counts"]["cut_answers"] == sum(
        "cut" in message for row in rows for message in row["conversations"]
    )
    assert manifest["counts"]["dialogues"] == 4 and sum(manifest["counts"]["kinds"].values()) == 4
    assert (manifest["identity"]["dtype"], manifest["identity"]["source"]["mix"]) == ("float64", mix())
    assert answering_target(written) == manifest["identity"]["target"]
    assert not written.with_name(written.name + ".parts").exists()


def test_what_is_drawn_depends_on_seed_and_number_and_not_on_the_rows_beside_it(
    writer: Target, template: ChatTemplate, written: Path
) -> None:
    (alone,) = SelfDialogues(writer, template, OPTIONS, set(), EvaluationText([])).write([2])
    assert alone["conversations"] == rows_of(written)[2]["conversations"]
    assert draw_kind(random.Random("3:2"))[0] == alone["kind"]


def test_a_kill_loses_only_the_dialogues_in_the_making(
    writer: Target,
    template: ChatTemplate,
    written: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, real = tmp_path / "answers.jsonl.gz", self_files.SelfDialogues.write

    def dies_after_two(*arguments: Any) -> Any:
        found = real(*arguments)
        yield next(found)
        yield next(found)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(self_files.SelfDialogues, "write", dies_after_two)
        distill_self(writer, template, out, OPTIONS, 3, 1, [])
    parts = tmp_path / "answers.jsonl.gz.parts"
    with open(parts / "0.jsonl", "ab") as handle:
        handle.write('{"id": "self:3", "conversations": [{"value": "Où'.encode()[:-1])  # the next line was half written
    kept = read_parts(parts)
    assert len(kept) == 2 and answering_target(parts / "0.jsonl") is not None
    assert distill_self(writer, template, out, OPTIONS, 3, 1, []).read_bytes() == written.read_bytes()
    assert "Resuming after 2 of 4 dialogues" in capsys.readouterr().err


def test_what_is_there_is_reused_or_refused(
    writer: Target, template: ChatTemplate, written: Path, tmp_path: Path
) -> None:
    before = written.read_bytes()
    assert distill_self(writer, template, written, OPTIONS, 3, 1, []) == written
    with pytest.raises(KoalaBenchError, match="made with other settings"):
        distill_self(writer, template, written, OPTIONS, 4, 1, [])
    assert written.read_bytes() == before
    parts = tmp_path / "b.jsonl.parts"
    parts.mkdir()
    (parts / "0.jsonl").write_text("{}\n")
    with pytest.raises(KoalaBenchError, match="belongs to another run"):
        distill_self(writer, template, tmp_path / "b.jsonl", OPTIONS, 3, 1, [])


def test_a_question_that_came_before_is_drawn_anew(writer: Target, template: ChatTemplate, written: Path) -> None:
    from koala_bench.dialogues.distilling.questions import words_of

    first = rows_of(written)[0]["conversations"][0]["value"]
    known = {" ".join(words_of(first))}
    (other,) = SelfDialogues(writer, template, OPTIONS, known, EvaluationText([])).write([0])
    assert other["conversations"][0]["value"] != first and other["rejected"]["duplicate"] >= 1


def test_a_question_of_an_evaluation_is_drawn_anew(
    writer: Target, template: ChatTemplate, written: Path, tmp_path: Path
) -> None:
    first = rows_of(written)[0]["conversations"][0]["value"]
    file = tmp_path / "eval" / "mine" / "question.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"question_id": 1, "category": "x", "turns": [first.upper()]}))
    texts = EvaluationText(evaluation_files(tmp_path))
    assert list(texts.files) == ["mine/question.jsonl"]
    (other,) = SelfDialogues(writer, template, OPTIONS, set(), texts).write([0])
    assert other["conversations"][0]["value"] != first and other["rejected"]["of an evaluation"] >= 1


def test_eight_words_in_a_row_are_shared_and_seven_are_not(tmp_path: Path) -> None:
    file = tmp_path / "question.jsonl"
    file.write_text(
        json.dumps(
            {"question_id": 1, "category": "x", "turns": ["one two three four five six seven eight nine", "Short one?"]}
        )
    )
    texts = EvaluationText([file])
    assert texts.has("So: One two, three four five six seven EIGHT!")
    assert not texts.has("one two three four five six seven and eight nine")
    assert texts.has("short one") and not texts.has("a short one")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Why is the sky blue?", None),
        ("...", "empty"),
        ("Hi there!", "empty"),
        ("I am an AI assistant and can answer questions", "speaks as the assistant"),
        ("a b c a b c a b c a b c a b c", "repeats itself"),
    ],
)
def test_questions_of_no_use_are_told_from_others(text: str, reason: str | None) -> None:
    assert why_useless(text, special=False) == reason
    assert why_useless(text, special=True) == "special token"


def test_an_answer_that_declines_is_told_by_its_beginning() -> None:
    assert (
        refuses("I'm sorry for any confusion") and refuses("I apologize for that") and not refuses("I am happy to help")
    )


def test_the_kinds_come_in_their_shares() -> None:
    draw = random.Random(0)
    kinds = [draw_kind(draw)[0] for _ in range(20_000)]
    assert sum(mix().values()) == pytest.approx(1)
    for kind, share in mix().items():
        assert kinds.count(kind) / 20_000 == pytest.approx(share, abs=0.01)


def test_a_target_that_asks_nothing_usable_is_one_clear_error(target64: Target) -> None:
    assert target64.tokenizer is not None
    template = chat_template("vicuna_v1.1", target64.tokenizer)
    options = SelfOptions(0, 1, 4, 1, question_tokens=2)
    with pytest.raises(KoalaBenchError, match=r"no usable question in 25 tries.*chat template"):
        list(SelfDialogues(target64, template, options, set(), EvaluationText([])).write([0]))
    with pytest.raises(KoalaBenchError, match="do not go into the 512 "):
        SelfDialogues(target64, template, SelfOptions(0, 9, 64, 1), set(), EvaluationText([]))


def test_rows_of_different_lengths_get_the_logits_of_each_alone(target64: Target) -> None:
    rows_are_as_alone(target64, 1e-10)


@pytest.mark.skipif(not kernels.available(), reason="no C compiler")
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_so_they_do_in_float32_where_each_reads_its_own_keys_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_heads: int
) -> None:
    target = tiny_target(tmp_path, tiny_config(hidden_size=64, num_key_value_heads=kv_heads), "float32")
    called, real = [0], kernels.attend

    def counted(*arguments: Any) -> torch.Tensor:
        called[0] += 1
        return real(*arguments)

    monkeypatch.setattr(kernels, "attend", counted)
    rows_are_as_alone(target, 1e-4)
    assert called[0] == 60 * target.layers
    assert target.decoder.config._attn_implementation == "sdpa"


@torch.inference_mode()
def rows_are_as_alone(target: Target, atol: float) -> None:
    """Steps of a batch whose rows grow, begin anew and move, against each text in a pass of its own."""
    cache = RowCache(target, 3, 80)
    prefix, draw = [5, 6, 7], torch.Generator().manual_seed(0)
    shared = cache.read_prefix(prefix)
    texts = [list(prefix) for _ in range(3)]
    for row in range(3):
        cache.begin(row, shared)
    for step in range(60):
        if step == 20:  # one is shortened, one begins anew
            cache.lengths[0] = 10
            texts[0] = texts[0][:10]
            cache.begin(1, shared)
            texts[1] = list(prefix)
        if step == 40:  # the last takes the first one's place
            cache.move(2, 0)
            texts = [texts[2], texts[1]]
        tokens = torch.randint(3, 259, (len(texts),), generator=draw)
        logits = cache.step(tokens)
        for row, text in enumerate(texts):
            text.append(int(tokens[row]))
            if step % 10 == 9:
                alone = target.output(target.states(torch.tensor([text]))[0, -1, -1])
                torch.testing.assert_close(logits[row], alone, rtol=0, atol=atol)


@torch.inference_mode()
def test_packed_layers_compute_the_same_and_are_put_back(target: Target) -> None:
    ids = torch.arange(3, 40)[None]
    before = target.output(target.states(ids))
    with packed_layers(target, 37):
        torch.testing.assert_close(target.output(target.states(ids)), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target.output(target.states(ids)), before, rtol=0, atol=0)
