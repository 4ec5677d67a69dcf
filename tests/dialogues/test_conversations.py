"""Conversations: ShareGPT files in all their shapes, a held-out part that stays apart, damage named by line."""

from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path
from typing import Any

import huggingface_hub.utils._http as hub_http
import pytest

import koala_bench.dialogues.hub as hub
from koala_bench.dialogues.conversations import encode_all, read_conversations
from koala_bench.dialogues.encoding import chat_template
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from tests.support.bad_input.spoiling import Around, no_hub, offline


def row(*messages: tuple[Any, Any]) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": who, "value": text} for who, text in messages]}


def many(count: int = 300) -> list[dict[str, Any]]:
    return [row(("human", f"question {i}"), ("gpt", f"answer {i}")) for i in range(count)]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


def turns_of(tmp_path: Path, odd: Any) -> list[list[str]]:
    """What is made of one odd row among many good ones."""
    found = read_conversations(write(tmp_path / "odd.jsonl", [*many(), odd]))
    known = {tuple(turn["value"] for turn in each["conversations"]) for each in many()}
    return [turns for turns in [*found.train, *found.held_out] if tuple(turns) not in known]


# ------------------------------------------------------------------------------ shapes of files


def test_lines_an_array_and_gzip_are_the_same(tmp_path: Path) -> None:
    rows = many()
    lines = read_conversations(write(tmp_path / "lines.jsonl", rows))
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress((tmp_path / "lines.jsonl").read_bytes()))
    (tmp_path / "array.json.gz").write_bytes(gzip.compress((tmp_path / "array.json").read_bytes()))
    for name in ("array.json", "lines.jsonl.gz", "array.json.gz"):
        found = read_conversations(str(tmp_path / name))
        assert (found.train, found.held_out) == (lines.train, lines.held_out)


def test_dialogues_are_named_by_file_and_line_or_index(tmp_path: Path) -> None:
    (tmp_path / "array.json").write_text(json.dumps(many()))
    lines, array = (
        read_conversations(write(tmp_path / "lines.jsonl", many())),
        read_conversations(str(tmp_path / "array.json")),
    )
    for turns, line, index in zip(lines.train, lines.train_names, array.train_names, strict=True):
        number = int(turns[0].split()[1])
        assert (line, index) == (f"lines.jsonl:{number + 1}", f"array.json[{number}]")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\n\n"])
def test_line_ends_blank_lines_and_byte_order_marks_do_not_matter(tmp_path: Path, encoding: str, ends: str) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_bytes(ends.join(json.dumps(each) for each in many()).encode(encoding))
    assert len(read_conversations(str(path)).train) == len(
        read_conversations(write(tmp_path / "plain.jsonl", many())).train
    )


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_text_may_hold_what_unicode_takes_for_a_line_end(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "odd.jsonl"
    rows = [*many(), row(("human", f"one{separator}two"), ("gpt", "three"))]
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows), encoding="utf-8")
    found = read_conversations(str(path))
    assert [f"one{separator}two", "three"] in [*found.train, *found.held_out]


def test_the_provenance_names_the_file_its_hash_and_what_was_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = read_conversations(write(tmp_path / "some.jsonl", [*many(), row(), row(("gpt", "hello"))]))
    assert found.provenance["source"] == "some.jsonl"
    assert found.provenance["dropped"] == 2
    assert len(found.provenance["file_sha256"]) == 64
    assert (
        "some.jsonl: 2 rows without a question followed by an answer are left out: there is no message (1), an answer"
        " comes first (1)." in capsys.readouterr().err
    )


def test_a_folder_is_all_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    rows = many()
    write(tmp_path / "b.jsonl", rows[: len(rows) // 2])
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(each) + "\n" for each in rows[len(rows) // 2 :]).encode())
    )
    (tmp_path / "README.md").write_text("no conversation")
    (tmp_path / "deeper").mkdir()
    whole = read_conversations(
        write(tmp_path / "deeper" / "all.jsonl", [*rows[len(rows) // 2 :], *rows[: len(rows) // 2]])
    )
    found = read_conversations(str(tmp_path))
    assert (found.train, found.held_out) == (whole.train, whole.held_out)
    assert found.train_names[0].startswith("a.jsonl.gz:") and found.train_names[-1].startswith("b.jsonl:")
    assert list(found.provenance["files_sha256"]) == ["a.jsonl.gz", "b.jsonl"]


def test_an_empty_folder_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(KoalaBenchError, match=r"has no .* file of conversations"):
        read_conversations(str(tmp_path))


def test_rows_that_are_read_in_part_are_counted_by_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = [
        row(("gpt", "0"), ("human", "a"), ("gpt", "b")),
        row(("human", "a"), ("gpt", "b"), ("gpt", "c")),
        row(("human", "c"), ("gpt", "d"), ("human", "")),
        row(("human", "e"), ("gpt", "f"), ("human", None)),
        row(("human", "g"), ("gpt", "h"), ("human", "i")),
        row(("system", "be kind"), ("human", "j"), ("gpt", "k")),
    ]
    found = read_conversations(write(tmp_path / "some.jsonl", [*many(), *odd]))
    assert found.provenance["shortened"] == {
        "a message is empty or no text": 2, "an answer comes first": 1, "the last question has no answer": 1,
        "the speakers do not alternate": 1,
    }  # fmt: skip
    assert "some.jsonl: 5 rows are read in part: a message is empty or no text (2), " in capsys.readouterr().err


def test_rows_that_are_left_out_are_counted_by_what_is_wrong(tmp_path: Path) -> None:
    odd = {
        "the row has no form that is known": [5, {"text": "a"}, {"conversations": None}],
        "there is no message": [row()],
        "an answer comes first": [row(("gpt", "a")), row(("system", "s"), ("gpt", "a"), ("gpt", "b"))],
        "nobody asks": [row(("system", "be kind"))],
        "a message is empty or no text": [
            row(("human", ""), ("gpt", "b")),
            row(("human", "a"), ("gpt", None)),
            row(("human", "a \ud83d"), ("gpt", "b")),
        ],
        "the speakers do not alternate": [row(("human", "a"), ("human", "b"), ("gpt", "c"))],
        "the last question has no answer": [row(("human", "a")), row(("gpt", "0"), ("human", "a"))],
    }
    partly = row(("human", "a"), ("gpt", "b"), ("human", "c"))
    found = read_conversations(
        write(tmp_path / "some.jsonl", [*many(), partly, *(each for rows in odd.values() for each in rows)])
    )
    assert found.rows == {
        "whole": 300,
        "in_part": {"the last question has no answer": 1},
        "left_out": {why: len(rows) for why, rows in sorted(odd.items())},
    }
    assert found.provenance.keys() == {"source", "file_sha256", "dropped", "shortened"}, (
        "what distill has made is known by these"
    )


@pytest.mark.parametrize(
    ("odd", "expected"),
    [
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"}]}, ["a", "b"]),
        ({"messages": [{"role": "user", "content": [{"text": "a "}, {"text": "c"}]},
                    {"role": "assistant", "content": "b"}]}, ["a c", "b"]),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
                    {"role": "assistant", "content": "b"}]}, None),
        ({"conversation": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, ["a", "b"]),
        ({"instruction": "add", "input": "1 and 2", "output": "3"}, ["add\n\n1 and 2", "3"]),
        ({"instruction": "say hello", "input": "", "output": "hello"}, ["say hello", "hello"]),
        ({"instruction": "say nothing", "output": ""}, None),
    ],
    ids=["openai", "openai in parts", "openai with an image", "fastchat's log", "alpaca", "alpaca without input",
        "alpaca without output"],
)  # fmt: skip
def test_other_forms_of_rows(tmp_path: Path, odd: Any, expected: list[str] | None) -> None:
    assert turns_of(tmp_path, odd) == ([expected] if expected else [])


def test_a_data_set_of_the_hub_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "some.json", many())
    files = ["README.md", "some.json"]
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda self, name, repo_type: files)
    asked: list[tuple[str, str, str]] = []
    monkeypatch.setattr(
        hub, "hf_hub_download", lambda name, file, repo_type: asked.append((name, file, repo_type)) or str(path)
    )
    found = read_conversations("hub:someone/talks")
    assert asked == [("someone/talks", "some.json", "dataset")] and found.provenance["source"] == "hub:someone/talks"
    files.append("other.jsonl.gz")
    with pytest.raises(
        KoalaBenchError,
        match=(
            r"has 2 files of conversations: some\.json, other\.jsonl\.gz\. Name one:"
            r" data\.source=hub:someone/talks:FILE"
        ),
    ):
        read_conversations("hub:someone/talks")
    assert read_conversations("hub:someone/talks:some.json").train == found.train


@pytest.mark.parametrize("source", ["hub:someone/talks", "hub:someone/talks:some.json"])
@pytest.mark.parametrize("around", [no_hub, offline], ids=["unreachable", "offline"])
def test_a_hub_that_does_not_answer_is_one_clear_error(around: Around, source: str) -> None:
    with around(), pytest.raises(KoalaBenchError, match=rf"Cannot fetch {source}: .* Check the name and the network"):
        read_conversations(source)


def test_whatever_the_client_of_the_hub_raises_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    client = importlib.import_module(
        type(hub_http.get_session()).__module__.partition(".")[0]
    )  # httpx or httpx2, as the hub's package has it
    for error in (
        client.ConnectError("no network\nand more"),
        client.ReadTimeout("no network"),
        OSError("no network"),
        ValueError("no network"),
    ):
        monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(KoalaBenchError, match=r"Cannot fetch hub:someone/talks: no network\. Check the name"):
            read_conversations("hub:someone/talks")


def test_the_hub_is_asked_once_where_it_is_only_looked_for(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with no_hub():
        monkeypatch.setattr(hub_http.time, "sleep", lambda _: pytest.fail("it waits to ask again"))
        found = hub.ask_hub("someone/talks", "dataset")
    assert not found.reached and found.refusal and not found.sizes
    assert capfd.readouterr().err == ""


# ------------------------------------------------------------------------------ shapes of rows


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")], ["a", "b", "c", "d"]),
        ([("gpt", "0"), ("human", "a"), ("gpt", "b")], ["a", "b"]),  # the rest of a conversation that was cut in two
        ([("system", "be kind"), ("human", "a"), ("gpt", "b")], ["a", "b"]),
        ([("human", "a"), ("gpt", "b"), ("human", "c")], ["a", "b"]),  # a question without answer
        ([("human", "a"), ("gpt", "b"), ("gpt", "c"), ("human", "d"), ("gpt", "e")], ["a", "b"]),
        ([("human", "a"), ("gpt", "b"), ("human", "c"), ("human", "d"), ("gpt", "e")], ["a", "b"]),
        ([("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", " ")], ["a", "b"]),
        ([("human", "a"), ("gpt", "b"), ("human", "c"), ("tool", "d")], ["a", "b"]),
        ([("user", "a"), ("assistant", "b"), ("human", "c"), ("chatgpt", "d")], ["a", "b", "c", "d"]),
        ([("human", "  a\n"), ("gpt", "\n b ")], ["a", "b"]),
        ([("human", ""), ("human", "a"), ("gpt", "b")], ["a", "b"]),
        ([("human", None), ("human", "a"), ("gpt", "b")], ["a", "b"]),
        ([("human", 5), ("gpt", "b")], None),
        ([("human", ["a"]), ("gpt", "b")], None),
        ([("human", "a"), ("human", "b")], None),
        ([("gpt", "a"), ("gpt", "b")], None),
        ([("human", "a"), ("gpt", "")], None),
        ([(None, "a"), ("gpt", "b")], None),
        ([(["human"], "a"), ({"x": 1}, "b")], None),
        ([("human", "a \ud83d"), ("gpt", "b")], None),  # half of a surrogate pair, as damaged files have it
        ([], None),
    ],
    ids=str,
)
def test_a_row_is_read_from_its_first_question_to_its_last_answer(
    tmp_path: Path, messages: list[tuple[Any, Any]], expected: list[str] | None
) -> None:
    assert turns_of(tmp_path, row(*messages)) == ([expected] if expected else [])


@pytest.mark.parametrize(
    "odd",
    [
        {},
        [],
        5,
        None,
        "text",
        {"conversations": None},
        {"conversations": {"from": "human"}},
        {"conversations": ["human", 5, None]},
        {"conversations": [{}, {}]},
    ],
    ids=str,
)
def test_a_row_that_is_no_conversation_is_dropped(tmp_path: Path, odd: Any) -> None:
    assert turns_of(tmp_path, odd) == []


# ------------------------------------------------------------------------------ the held-out part


def test_the_held_out_part_depends_on_the_text_alone(tmp_path: Path) -> None:
    rows = many(2000)
    first = read_conversations(write(tmp_path / "a.jsonl", rows))
    turned = read_conversations(write(tmp_path / "b.jsonl", rows[::-1]))
    assert turned.held_out == first.held_out[::-1]
    assert turned.train == first.train[::-1]
    assert 25 <= len(first.held_out) <= 80  # about one in forty
    part = read_conversations(write(tmp_path / "c.jsonl", rows[:1000]))
    assert part.held_out == [turns for turns in first.held_out if int(turns[0].split()[1]) < 1000]


def test_no_dialogue_is_on_both_sides_even_if_it_comes_twice(tmp_path: Path) -> None:
    found = read_conversations(write(tmp_path / "a.jsonl", [*many(), *many()]))
    assert not {tuple(turns) for turns in found.train} & {tuple(turns) for turns in found.held_out}
    assert len(found.train) + len(found.held_out) == 600


# ------------------------------------------------------------------------------ damage


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(b"x" * 100_000)[:-30], "is damaged"),
        (gzip.compress(b"x" * 100_000)[:40] + b"\0" * 40, "is damaged"),
        (b"\x1f\x8bnot gzip", "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (b'{"conversations": []}\n\n{"conversations": [\n', r"line 3 is not valid JSON"),
        (b'[{"conversations": []},', "is not valid JSON"),
        (b"", "0 usable dialogues to train on and 0 to hold out"),
        (b"[]", "0 usable dialogues"),
        (json.dumps(many(1)).encode(), "holds . usable dialogues"),
    ],
    ids=["cut gzip", "bad gzip", "no gzip", "no utf-8", "bad line", "cut array", "empty", "empty array", "too few"],
)
def test_damage_is_one_clear_error(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "damaged.json"
    path.write_bytes(content)
    with pytest.raises(KoalaBenchError, match=words) as caught:
        read_conversations(str(path))
    assert "damaged.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["none.jsonl", "n" * 300])
def test_a_missing_file_is_one_clear_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(KoalaBenchError, match=rf"Cannot read .*{name}.*data\.source"):
        read_conversations(str(tmp_path / name))


# ------------------------------------------------------------------------------ encoding


def test_encoding_supervises_the_answers(target: Target) -> None:
    assert target.tokenizer is not None
    (found,) = encode_all(target, chat_template("vicuna_v1.1", target.tokenizer), [["why?", "because", "so?", "so."]])
    said = target.tokenizer.decode([token for token, wanted in zip(found.ids, found.supervised, strict=True) if wanted])
    assert said.split() == ["because</s>", "so.</s>"]


def test_a_target_without_tokenizer_is_refused(target: Target) -> None:
    bare = Target(target.name, target.model, None, target.device, target.dtype, target.max_positions)
    assert target.tokenizer is not None
    with pytest.raises(KoalaBenchError, match="has no tokenizer"):
        encode_all(bare, chat_template("vicuna_v1.1", target.tokenizer), [["a", "b"]])


# ------------------------------------------------------------------------------ real files


@pytest.mark.parametrize(("name", "rows", "most_turns"), [("sharegpt_1k.jsonl.gz", 801, 4), ("lima.jsonl.gz", 1021, 4)])
def test_real_files_are_read(data_dir: Path, name: str, rows: int, most_turns: int) -> None:
    path = data_dir / "train" / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    found = read_conversations(str(path))
    assert len(found.train) + len(found.held_out) + found.provenance["dropped"] == rows
    assert found.provenance["dropped"] == sum(found.rows["left_out"].values()) < 20
    assert len(found.train) + len(found.held_out) == found.rows["whole"] + sum(found.rows["in_part"].values())
    assert len(found.held_out) == pytest.approx(rows / 37, rel=0.5)
    assert all(len(turns) % 2 == 0 and all(turn.strip() for turn in turns) for turns in [*found.train, *found.held_out])
    assert max(map(len, found.train)) >= most_turns
    assert len(set(found.train_names)) == len(found.train)


def test_answers_that_ship_are_found_by_name() -> None:
    found = read_conversations("bundled:smollm2-135m")
    assert len(found.train) > 1000 and len(found.held_out) > 5
    with pytest.raises(KoalaBenchError, match="no bundled answers 'smollm2'") as error:
        read_conversations("bundled:smollm2")
    assert "smollm2-135m" in str(error.value)
