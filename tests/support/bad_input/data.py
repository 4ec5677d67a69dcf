"""Bad input in what training and decoding read: questions and conversations."""

from __future__ import annotations

import gzip

from tests.support.bad_input.cases import LONG, REPRODUCE, TRAIN, Case
from tests.support.bad_input.spoiling import (
    NESTED,
    UNREADABLE,
    folder,
    lines,
    link,
    no_hub,
    no_network,
    put,
    sign_in_page,
)

QUESTION = {"question_id": 1, "category": "a", "turns": ["count 5"]}
TALK = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
ASKING = "evaluate SMALL --methods vanilla,medusa --heads done/heads --out out --questions"
TALKING = TRAIN + " --set data.source="

QUESTIONS = [
    Case("no such questions", f"{ASKING} none.jsonl", "none.jsonl", "koala-bench data"),
    Case("questions with too long a name", f"{ASKING} {LONG}.jsonl", "xxx.jsonl", "path"),
    Case("a folder of questions", f"{ASKING} is.jsonl", "is.jsonl is a folder", "inside it", folder("is.jsonl")),
    Case(
        "unreadable questions",
        f"{ASKING} questions.jsonl",
        "questions.jsonl",
        "permissions",
        link("questions.jsonl", UNREADABLE),
    ),
    Case(
        "binary questions", f"{ASKING} bad.jsonl", "bad.jsonl, line 2", "UTF-8", put("bad.jsonl", b"\n\xff\xfe\x00\n")
    ),
    Case(
        "packed questions", f"{ASKING} bad.jsonl", "bad.jsonl, line 1", "Unpack", put("bad.jsonl", gzip.compress(b"{}"))
    ),
    Case(
        "a malformed question",
        f"{ASKING} bad.jsonl",
        "bad.jsonl, line 2",
        "question_id",
        lines("bad.jsonl", QUESTION, "{no json"),
    ),
    Case(
        "a malformed question, before the training",
        f"{REPRODUCE} --questions bad.jsonl",
        "bad.jsonl, line 2",
        "question_id",
        lines("bad.jsonl", QUESTION, "{no json"),
    ),
    Case(
        "a huge malformed line",
        f"{ASKING} bad.jsonl",
        "bad.jsonl, line 2",
        "question_id",
        lines("bad.jsonl", QUESTION, '"' + "x" * 20_000_000),
    ),
    Case(
        "a question nested too deep",
        f"{ASKING} bad.jsonl",
        "bad.jsonl, line 1",
        "question_id",
        lines("bad.jsonl", NESTED),
    ),
    Case("no data folder", f"{ASKING} mt_bench", "'mt_bench'", "--data-dir"),
    Case("questions without a name", f"{ASKING} ''", "''", "--data-dir"),
    Case(
        "a data folder that is a file",
        f"{ASKING} mt_bench --data-dir questions.jsonl",
        "There is no data folder questions.jsonl",
        "--data-dir",
    ),
    Case(
        "a data folder that is not there",
        f"{REPRODUCE} --questions mt_bench --data-dir none",
        "There is no data folder none",
        "--data-dir",
    ),
    Case(
        "a data folder without the questions",
        f"{REPRODUCE} --questions mt_bench --data-dir target",
        "target has no questions 'mt_bench'",
        "koala-bench data",
    ),
    Case(
        "a prompt of the wrong questions",
        "reproduce table1 SMALL --questions bundle --out out",
        "'bundle'",
        "Did you mean bundled?",
    ),
    Case("a misspelt name of questions", f"{REPRODUCE} --questions mtbench", "'mtbench'", "Did you mean mt_bench?"),
    Case("unknown questions to fetch", "data mtbench --data-dir out", "'mtbench'", "mt_bench"),
    Case("nowhere to put the questions", "data mt_bench", "No data folder is set", "--data-dir"),
    Case("nowhere to put all questions", "data --all", "No data folder is set", "--data-dir"),
    Case("no network", "data mt_bench --data-dir out", "Connection refused", "by hand", around=no_network),
    Case("a sign-in page", "data mt_bench --data-dir out", "not the pinned file", "sign-in page", around=sign_in_page),
    Case(
        "questions that were changed",
        "data mt_bench --data-dir .",
        "mt_bench.jsonl",
        "Move it away",
        put("mt_bench.jsonl", "{}"),
    ),
    Case(
        "questions that cannot be read",
        "data --data-dir .",
        "mt_bench.jsonl",
        "permissions",
        link("mt_bench.jsonl", UNREADABLE),
    ),
]

CONVERSATIONS = [
    Case("no such conversations", f"{TALKING}none.jsonl", "none.jsonl", "data.source"),
    Case("a folder of other files", f"{TALKING}target", "config.json, line 1 is not valid JSON", "Mend"),
    Case(
        "conversations of a hub that does not answer",
        f"{TALKING}hub:someone/talks",
        "Cannot fetch hub:someone/talks",
        "downloaded file",
        around=no_hub,
    ),
    Case("conversations with too long a name", f"{TALKING}{LONG}", "xxx", "data.source"),
    Case("unreadable conversations", f"{TALKING}bad.jsonl", "bad.jsonl", "data.source", link("bad.jsonl", UNREADABLE)),
    Case(
        "a malformed conversation",
        f"{TALKING}bad.jsonl",
        "bad.jsonl, line 2",
        "Mend",
        lines("bad.jsonl", TALK, '{"conversations": ['),
    ),
    Case(
        "a conversation nested too deep",
        f"{TALKING}bad.jsonl",
        "bad.jsonl, line 2",
        "Mend",
        lines("bad.jsonl", TALK, '{"a":' + NESTED),
    ),
    Case(
        "rows of the wrong type",
        f"{TALKING}bad.jsonl",
        "bad.jsonl holds 0",
        "hold conversations",
        lines("bad.jsonl", 5, {"conversations": 5}, TALK | {"conversations": [5]}),
    ),
    Case("dialogues longer than a batch", f"{TRAIN} --set data.max_tokens=300", "300", "training.batch_tokens"),
    Case("no room for an answer", f"{TRAIN} --set data.max_tokens=9", "within its first 9 tokens", "data.max_tokens"),
    Case(
        "answers whose manifest is a list",
        TRAIN,
        "conversations.manifest.json",
        "Delete",
        put("conversations.manifest.json", "[]"),
    ),
    Case(
        "answers of nobody",
        TRAIN,
        "conversations.manifest.json",
        "Delete",
        put("conversations.manifest.json", '{"identity": {"target": {"name": "x"}}}'),
    ),
    Case(
        "nobody's questions to answer",
        "distill --out out.jsonl --target target --device cpu --engine eager --source none.jsonl",
        "none.jsonl",
        "data.source",
    ),
    Case(
        "answers below a file",
        "distill --out questions.jsonl/out.jsonl --target target --engine eager --source conversations.jsonl",
        "questions.jsonl",
        "--out",
    ),
]

DATA_CASES = [*QUESTIONS, *CONVERSATIONS]
