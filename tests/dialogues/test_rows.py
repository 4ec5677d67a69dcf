"""Rows in the forms of public data sets are read whole, or counted by the reason why not."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from koala_bench.dialogues.conversations import Conversations, read_conversations
from koala_bench.dialogues.preformatted import parse
from koala_bench.dialogues.rows import read_row
from koala_bench.dialogues.templates import ChatTemplate
from koala_bench.dialogues.turns import Dialogue
from koala_bench.errors import KoalaBenchError
from tests.dialogues.test_templates import CHATML, OPENS, THINKS, own

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.content }}</s>{% endfor %}"
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def read(row: Any, source: str | None = CHATML) -> tuple[Dialogue, str | None]:
    return read_row(row, None if source is None else own(source)[0])


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [user("a"), assistant("b")]},
        {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "a", "completion": "b"},
        {"prompt": [user("a")], "completion": [assistant("b")]},
        {"prompt": "a", "response": "b"},
        {"text": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"},
    ],
    ids=["specforge", "mixed", "trl", "trl in messages", "response", "preformatted"],
)
def test_a_question_and_its_answer_are_read_in_every_form(row: dict[str, Any]) -> None:
    assert read(row) == (["a", "b"], None)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": "rhyme"}, user("a"), assistant("b")]},
        {"system": "rhyme", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"system": "rhyme", "prompt": "a", "completion": "b"},
        {"text": "<|im_start|>system\nrhyme<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
            "<|im_start|>assistant\nb<|im_end|>"},
    ],
    ids=["a message", "beside the turns", "beside a prompt", "preformatted"],
)  # fmt: skip
def test_a_system_prompt_is_read_and_a_template_without_one_leaves_the_row_out(row: dict[str, Any]) -> None:
    dialogue, reason = read(row)
    assert (dialogue, dialogue.system, reason) == (["a", "b"], "rhyme", None)
    if "text" not in row:
        assert read(row, NO_SYSTEM) == ([], "the chat template shows no system prompt")


def test_reasoning_is_read_or_counted() -> None:
    row = {"messages": [user("a"), assistant("b", reasoning_content="hm")]}
    shown, reason = read(row, THINKS)
    assert shown.reasoning == {1: "hm"} and reason is None
    for source in (CHATML, OPENS):
        dialogue, reason = read(row, source)
        assert dialogue == ["a", "b"] and not dialogue.reasoning
        assert reason == "the chat template does not show the reasoning"


def test_tools_end_what_is_read() -> None:
    called = assistant(None, tool_calls=[{"function": {"name": "add"}}])
    tool = {"role": "tool", "content": "4"}
    assert read({"messages": [user("a"), called, tool, assistant("b")]}) == ([], "a tool is called")
    assert read({"messages": [user("a"), assistant("b"), user("c"), called, tool, assistant("d")]}) == (
        ["a", "b"], "a tool is called",
    )  # fmt: skip
    spoken = assistant("let me see", tool_calls=[{"function": {"name": "add"}}])
    assert read({"messages": [user("a"), spoken, tool, assistant("b")]}) == ([], "a tool is called")


def test_answers_that_were_cut_are_known() -> None:
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "cut": True}]}
    assert read(row)[0].cut == {1}


@pytest.mark.parametrize("text", ["plain text", "USER: a ASSISTANT: b</s>", "<|im_start|>user\na<|im_end|>\n"])
def test_text_of_another_template_is_counted(text: str) -> None:
    assert read({"text": text}) == ([], "the text was formatted by another chat template")
    assert read({"text": text}, None) == ([], "the row has no form that is known")


@pytest.mark.parametrize("turns", [["a", "b"], ["a", "b", "c\n\nd", "e"]])
@pytest.mark.parametrize("system", [None, "rhyme"])
def test_a_text_is_read_back_as_what_it_was_made_of(turns: list[str], system: str | None) -> None:
    for template in (own(CHATML)[0], vicuna()):
        dialogue = Dialogue(turns, system)
        found = parse(template, template.render(dialogue))
        assert found == turns and found.system == system


def vicuna() -> ChatTemplate:
    from koala_bench.dialogues.templates import chat_template
    from koala_bench.testing import tiny_tokenizer

    return chat_template("vicuna_v1.1", tiny_tokenizer())


def with_splits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "split": "held_out" if index == 0 else "train"} for index, row in enumerate(rows)]


ROWS = with_splits([{"messages": [user(f"a{i}"), assistant("b")], "system": None} for i in range(5)])


def test_parquet_files_are_read_like_others(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")

    def content(found: Conversations) -> Any:
        return found.train, found.held_out, found.rows

    whole = read_conversations(str(tmp_path / "rows.parquet"))
    assert content(whole) == content(read_conversations(str(tmp_path / "rows.jsonl")))
    assert whole.train_names[0] == "rows.parquet[1]"
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(KoalaBenchError, match=r"Cannot read .*rows\.parquet"):
        read_conversations(str(tmp_path / "rows.parquet"))


def test_without_pyarrow_a_parquet_file_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(KoalaBenchError, match=r"pyarrow is not installed\. Run `pip install pyarrow`"):
        read_conversations(str(tmp_path / "rows.parquet"))
