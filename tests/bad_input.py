"""The table of bad input: for every command what can be wrong, how to arrange it, and what the one line must say."""

from __future__ import annotations

import gzip
from contextlib import nullcontext
from dataclasses import dataclass

from spoiling import (
    DIGITS,
    NESTED,
    UNREADABLE,
    UNWRITABLE,
    Around,
    Arrange,
    both,
    copied,
    cut,
    edit,
    encoder_decoder,
    folder,
    full_disk,
    keep_lines,
    line,
    lines,
    link,
    no_cuda,
    no_hub,
    no_network,
    offline,
    put,
    record,
    remove,
    sign_in_page,
    state,
    state_without,
    target,
    tensors,
    turn,
)
from test_records import make_header
from test_traces import medusa_row


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        name: what is wrong.
        command: as typed in the room, which ``test_bad_input.furnished`` describes; SMALL and ASK stand for options.
        names: the bad thing, as the line has to name it.
        remedy: words of what to do about it, behind that.
        arrange: spoils the room before the command runs.
        around: holds while it runs.
    """

    name: str
    command: str
    names: str
    remedy: str
    arrange: Arrange = lambda room: None
    around: Around = nullcontext


QUESTION = {"question_id": 1, "category": "a", "turns": ["count 5"]}
TALK = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
TRAIN = "train SMALL --methods medusa --out out"
AGAIN = "train SMALL --methods medusa,eagle --out done"
EVALUATE = "evaluate SMALL ASK --methods vanilla,medusa --tree 2x1 --heads done/heads --out out"
ASKING = "evaluate SMALL --methods vanilla,medusa --heads done/heads --out out --questions"
TALKING = TRAIN + " --set data.source="
HEAD = "done/heads/medusa/"
LONG = "x" * 300  # longer than any file's name may be

OPTIONS = [
    Case("a limit of zero", "evaluate --limit 0", "'--limit'", "evaluate --help"),
    Case("negative layers", "train --layers -1", "'--layers'", "train --help"),
    Case("a word for a number", "reproduce table1 --max-new-tokens many", "'--max-new-tokens'", "reproduce --help"),
    Case("half a repeat", "evaluate --repeats 1.5", "'--repeats'", "evaluate --help"),
    Case("a negative seed", "pretrain --out out --seed -1", "'--seed'", "pretrain --help"),
    Case("no steps", "pretrain --out out --steps 0", "'--steps'", "pretrain --help"),
    Case("answers of one token", "benchmark --tokens 1", "'--tokens'", "benchmark --help"),
    Case("no rounds", "benchmark --rounds 0", "'--rounds'", "benchmark --help"),
    Case("a negative margin", "check record.jsonl other.jsonl --margin -1", "'--margin'", "check --help"),
    Case("a margin that is no number", "check record.jsonl other.jsonl --margin nan", "'--margin'", "check --help"),
    Case("a misspelt command", "evaluat", "'evaluat'", "evaluate"),
    Case("an option of another command", "train --steps 3", "--steps", "train --help"),
    Case("nothing to make a table of", "table", "'records'", "table --help"),
    Case("an option without its value", "evaluate --limit", "'--limit'", "koala-bench --help"),
    Case("an argument too many", "heads more", "(more)", "heads --help"),
]

PRESETS = [
    Case("an unknown preset", "train --preset vicuna-7", "'vicuna-7'", "vicuna-7b"),
    Case("no such preset file", "train --preset none.toml", "none.toml", "--preset"),
    Case("a folder as preset", "train --preset is.toml", "is.toml", "--preset", folder("is.toml")),
    Case("a binary preset", "train --preset bad.toml", "bad.toml", "--preset", put("bad.toml", b"\xff\xfe\x00")),
    Case("a preset that is no TOML", "train --preset bad.toml", "bad.toml", "Mend", put("bad.toml", "[target\n")),
    Case("a section that is a number", "train --preset bad.toml", "bad.toml, target", "Correct the file", put("bad.toml", "target = 5\n")),
    Case("a preset without training", "train --preset bad.toml", "bad.toml, training", "Correct the file", put("bad.toml", "[target]\nname = 'tiny'\n")),
    Case("a quick form that is a number", "train --preset bad.toml --quick", "bad.toml", "quick", put("bad.toml", "quick = 5\n")),
    Case("a quick form of numbers", "train --preset bad.toml --quick", "bad.toml", "quick", put("bad.toml", "quick = [5]\n")),
    Case("no quick form", "train --preset vicuna-7b --quick", "vicuna-7b", "--quick"),
    Case("a misspelt key", "train --set training.stepz=4", "training.stepz", "--set"),
    Case("no value", "train --set training.steps", "'training.steps'", "section.key=value"),
    Case("a key below a value", "train --set training.steps.more=4", "'training.steps.more'", "section.key=value"),
    Case("an open quote", "train --set 'methods.\"eagle.layers=2'", "eagle.layers", "Quote"),
    Case("negative steps", "train --set training.steps=-5", "training.steps", "--set"),
    Case("a rate that is no number", "train --set training.learning_rate=nan", "training.learning_rate", "--set"),
    Case("an endless weight decay", "train --set training.weight_decay=inf", "training.weight_decay", "--set"),
    Case("a seed too large", "train --set training.seed=99999999999999999999", "training.seed", "--set"),
    Case("half precision of training without CUDA", f"{TRAIN} --set training.precision=fp16", "fp16", "training.precision", around=no_cuda),
    Case("an unknown method", "evaluate --methods vanilla,eagel", "'eagel'", "eagle"),
    Case("a method twice", "train --methods eagle,eagle", "eagle,eagle", "once"),
    Case("an unknown head", f"{TRAIN} --set methods.medusa.head=medussa", "'medussa'", "medusa"),
    Case("no such file of a head", f"{TRAIN} --set methods.medusa.head=./none.py:Head", "./none.py", "./file.py:Class"),
    Case("a head that does not parse", f"{TRAIN} --set methods.medusa.head=./bad.py:Head", "bad.py", "Mend", put("bad.py", "class Head(\n")),
    Case("a binary head", f"{TRAIN} --set methods.medusa.head=./bad.py:Head", "bad.py", "Mend", put("bad.py", b"\x00\xff")),
    Case("an unknown option of a head", f"{TRAIN} --set methods.medusa.options.hedas=3", "'hedas'", "heads"),
    Case("a negative option of a head", f"{TRAIN} --set methods.medusa.options.heads=-1", "heads=-1", "options"),
    Case("an unknown objective", f"{TRAIN} --set methods.medusa.objective=coala", "'coala'", "koala"),
    Case("an unknown tree", f"{TRAIN} --set methods.medusa.tree=oak", "'oak'", "chain-N"),
    Case("a tree of another script's digits", f"{TRAIN} --set methods.medusa.tree=\u00b2", "'\u00b2'", "chain-N"),
    Case("a chain without end", f"{TRAIN} --set methods.medusa.tree=chain-{DIGITS}", "chain-999", "chain-N"),
    Case("a tree as wide as a number can be", f"{TRAIN} --set methods.medusa.tree={DIGITS}x1", "'999", "chain-N"),
    Case("a tree deeper than the heads", f"{EVALUATE} --tree chain-5", "5 levels deep", "shallower"),
    Case("a tree wider than the vocabulary", f"{EVALUATE} --tree 260x1", "260 candidates", "narrower"),
    Case("a binary tree file", f"{EVALUATE} --tree bad.json", "bad.json", "[[0]", put("bad.json", b"\xff\xfe")),
    Case("a tree file nested too deep", f"{EVALUATE} --tree bad.json", "bad.json", "[[0]", put("bad.json", NESTED)),
    Case("a node without its parent", f"{EVALUATE} --tree bad.json", "[1, 0]", "parents included", put("bad.json", "[[0], [1, 0]]")),
    Case("a negative rank", f"{EVALUATE} --tree bad.json", "[-1]", "child ranks", put("bad.json", "[[-1]]")),
    Case("a folder as tree", f"{EVALUATE} --tree is.json", "is.json", "--tree", folder("is.json")),
    Case("a tree file with too long a name", f"{EVALUATE} --tree {LONG}.json", "xxx.json", "--tree"),
    Case("an unknown chat template", f"{TRAIN} --set target.chat_template=vicuna", "'vicuna'", "vicuna_v1.1"),
]

TARGETS = [
    Case("no such target", "train --target ./none", "./none", "--target"),
    Case("a target with too long a name", f"train --target {LONG}", "xxx", "--target", around=offline),
    Case("a target whose name has two lines", "train --target './none\nmore'", "./none more", "--target"),
    Case("a target of the hub, offline", "train --target nobody/nothing", "nobody/nothing", "HF_TOKEN", around=offline),
    Case("a target of a hub that does not answer", "train --target nobody/nothing", "nobody/nothing", "downloaded copy", around=no_hub),
    Case("an empty target", "benchmark --target empty", "empty", "--target", folder("empty")),
    Case("a configuration that is no JSON", TRAIN, "target target", "--target", put("target/config.json", "{")),
    Case("a configuration that is a list", TRAIN, "target target", "--target", put("target/config.json", "[]")),
    Case("a configuration of nothing", TRAIN, "target target", "--target", edit("target/config.json", hidden_size=-32)),
    Case("a configuration without heads", TRAIN, "target target", "--target", edit("target/config.json", num_attention_heads=0)),
    Case("a configuration of a word", TRAIN, "target target", "--target", edit("target/config.json", num_hidden_layers="two")),
    Case("an encoder-decoder", "train --target t5", "t5", "decoder-only", encoder_decoder("t5")),
    Case("cut weights", TRAIN, "target target", "--target", cut("target/model.safetensors", 1000)),
    Case("weights that are text", TRAIN, "target target", "--target", put("target/model.safetensors", "no weights")),
    Case("weights that are not there", TRAIN, "target target", "--target", remove("target/model.safetensors")),
    Case("a missing tensor", TRAIN, "lm_head.weight", "complete", tensors("target/model.safetensors", lambda found: found.pop("lm_head.weight"))),
    Case("weights of another shape", TRAIN, "target target", "--target", edit("target/config.json", vocab_size=300)),
    Case("no tokenizer", TRAIN, "target", "tokenizer", both(remove("target/tokenizer.json"), remove("target/tokenizer_config.json"))),
    Case("a cut tokenizer", TRAIN, "target", "--target", cut("target/tokenizer.json", 500)),
    Case("a tokenizer of another kind", TRAIN, "target", "--target", put("target/tokenizer.json", '{"model": {"type": "None"}}')),
    Case("a tokenizer of more tokens than the target knows", "train --target less --device cpu", "less", "tokenizer", target("less", vocab_size=128)),
    Case(
        "a broken chat template",
        f"{TRAIN} --set target.chat_template=tokenizer",
        "template",
        "chat_template",
        edit("target/tokenizer_config.json", chat_template="{% if"),
    ),
    Case(
        "a chat template that refuses",
        f"{TRAIN} --set target.chat_template=tokenizer",
        "no roles",
        "chat_template",
        edit("target/tokenizer_config.json", chat_template="{{ raise_exception('no roles') }}"),
    ),
    Case("no CUDA", f"{TRAIN} --device cuda", "'cuda'", "--device cpu", around=no_cuda),
    Case("no such device", "pretrain --out out --device gpu", "'gpu'", "--device"),
    Case("no such dtype", f"{TRAIN} --dtype int8", "'int8'", "--dtype"),
    Case("no such attention", f"{TRAIN} --attention magic", "magic", "sdpa"),
]

QUESTIONS = [
    Case("no such questions", f"{ASKING} none.jsonl", "none.jsonl", "koala-bench data"),
    Case("questions with too long a name", f"{ASKING} {LONG}.jsonl", "xxx.jsonl", "path"),
    Case("a folder of questions", f"{ASKING} is.jsonl", "is.jsonl", "inside it", folder("is.jsonl")),
    Case("unreadable questions", f"{ASKING} questions.jsonl", "questions.jsonl", "permissions", link("questions.jsonl", UNREADABLE)),
    Case("binary questions", f"{ASKING} bad.jsonl", "bad.jsonl, line 2", "UTF-8", put("bad.jsonl", b"\n\xff\xfe\x00\n")),
    Case("packed questions", f"{ASKING} bad.jsonl", "bad.jsonl, line 1", "Unpack", put("bad.jsonl", gzip.compress(b"{}"))),
    Case("an empty file of questions", f"{ASKING} bad.jsonl", "bad.jsonl", "question_id", put("bad.jsonl")),
    Case("a malformed question", f"{ASKING} bad.jsonl", "bad.jsonl, line 2", "question_id", lines("bad.jsonl", QUESTION, "{no json")),
    Case("a huge malformed line", f"{ASKING} bad.jsonl", "bad.jsonl, line 2", "question_id", lines("bad.jsonl", QUESTION, '"' + "x" * 20_000_000)),
    Case("a question nested too deep", f"{ASKING} bad.jsonl", "bad.jsonl, line 1", "question_id", lines("bad.jsonl", NESTED)),
    Case("an id of 5000 digits", f"{ASKING} bad.jsonl", "bad.jsonl, line 1", "question_id", lines("bad.jsonl", f'{{"question_id": {DIGITS}}}')),
    Case("missing turns", f"{ASKING} bad.jsonl", "line 1: the key 'turns'", "turns", lines("bad.jsonl", {"question_id": 1, "category": "a"})),
    Case("turns of the wrong type", f"{ASKING} bad.jsonl", "line 1: 'turns'", '"turns": [', lines("bad.jsonl", {**QUESTION, "turns": "count"})),
    Case("a question without turns", f"{ASKING} bad.jsonl", "line 1: 'turns' is empty", "remove", lines("bad.jsonl", {**QUESTION, "turns": []})),
    Case("an id that is a text", f"{ASKING} bad.jsonl", "line 1: 'question_id'", "81", lines("bad.jsonl", {**QUESTION, "question_id": "1"})),
    Case("an id twice", f"{ASKING} bad.jsonl", "line 2: the question_id 1", "of its own", lines("bad.jsonl", QUESTION, QUESTION)),
    Case("half a character", f"{ASKING} bad.jsonl", "line 1: turn 1", "Repair", lines("bad.jsonl", {**QUESTION, "turns": ["\ud83d"]})),
    Case("no data folder", f"{ASKING} mt_bench", "'mt_bench'", "--data-dir"),
    Case("a data folder that is a file", f"{ASKING} mt_bench --data-dir questions.jsonl", "questions.jsonl", "--data-dir"),
    Case("a prompt of the wrong questions", "reproduce table1 SMALL --questions bundle --out out", "'bundle'", "bundled"),
]

CONVERSATIONS = [
    Case("no such conversations", f"{TALKING}none.jsonl", "none.jsonl", "data.source"),
    Case("conversations with too long a name", f"{TALKING}{LONG}", "xxx", "data.source"),
    Case("unreadable conversations", f"{TALKING}bad.jsonl", "bad.jsonl", "data.source", link("bad.jsonl", UNREADABLE)),
    Case("a binary file of conversations", f"{TALKING}bad.jsonl", "bad.jsonl", "Fetch", put("bad.jsonl", b"\xff\xfe\x00")),
    Case("damaged packing", f"{TALKING}bad.gz", "bad.gz", "Fetch", put("bad.gz", gzip.compress(b"{}" * 4000)[:-20])),
    Case("a malformed conversation", f"{TALKING}bad.jsonl", "bad.jsonl, line 2", "Mend", lines("bad.jsonl", TALK, '{"conversations": [')),
    Case("a malformed array", f"{TALKING}bad.json", "bad.json", "Mend", put("bad.json", '[{"id": 1}, ')),
    Case("a conversation nested too deep", f"{TALKING}bad.jsonl", "bad.jsonl, line 2", "Mend", lines("bad.jsonl", TALK, '{"a":' + NESTED)),
    Case("an array nested too deep", f"{TALKING}bad.json", "bad.json", "Mend", put("bad.json", NESTED)),
    Case("an empty file of conversations", f"{TALKING}bad.jsonl", "bad.jsonl holds 0", "more conversations", put("bad.jsonl")),
    Case("too few conversations", f"{TALKING}bad.jsonl", "bad.jsonl holds 1", "more conversations", lines("bad.jsonl", TALK)),
    Case(
        "rows of the wrong type",
        f"{TALKING}bad.jsonl",
        "bad.jsonl holds 0",
        "more conversations",
        lines("bad.jsonl", 5, {"conversations": 5}, TALK | {"conversations": [5]}),
    ),
    Case("dialogues longer than a batch", f"{TRAIN} --set data.max_tokens=300", "300", "training.batch_tokens"),
    Case("no room for an answer", f"{TRAIN} --set data.max_tokens=9", "9 tokens", "data.max_tokens"),
]

TRAINING = [
    Case("a checkpoint of noise", AGAIN, "checkpoint.pt", "Delete", state(b"\x80noise" * 99)),
    Case("an empty checkpoint", AGAIN, "checkpoint.pt", "Delete", state(b"")),
    Case("a cut checkpoint", AGAIN, "checkpoint.pt", "Delete", both(remove(f"{HEAD}model.safetensors"), cut("done/heads/checkpoint.pt", 2000))),
    Case("a checkpoint of something else", AGAIN, "checkpoint.pt", "Delete", state([1, 2])),
    Case("a checkpoint without its identity", AGAIN, "checkpoint.pt", "Delete", state({"identity": 5})),
    Case("a checkpoint without its weights", AGAIN, "checkpoint.pt", "Delete", state_without("arms")),
    Case("an unreadable checkpoint", AGAIN, "checkpoint.pt", "Delete", both(remove(f"{HEAD}model.safetensors"), link("done/heads/checkpoint.pt", UNREADABLE))),
    Case("a checkpoint of another run", f"{AGAIN} --set training.learning_rate=0.1", "checkpoint.pt", "--out"),
    Case("a damaged training log", AGAIN, "training.jsonl", "Delete", both(remove(f"{HEAD}model.safetensors"), put("done/heads/training.jsonl", b"\xff\n"))),
    Case("an output folder below a file", "train SMALL --methods medusa --out questions.jsonl/out", "questions.jsonl/out", "--out"),
    Case("an output folder that is a file", "train SMALL --methods medusa --out questions.jsonl", "questions.jsonl/heads", "--out"),
    Case("an unwritable output folder", TRAIN, "out", "--out", link("out", UNWRITABLE)),
    Case("training on a full disk", TRAIN, "out/heads", "Free space", folder("out/heads"), full_disk),
]

HEADS = [
    Case("no trained head", f"{EVALUATE} --heads none", "none/medusa", "koala-bench train"),
    Case("heads that are a file", f"{EVALUATE} --heads questions.jsonl", "questions.jsonl/medusa", "koala-bench train"),
    Case("a configuration of a head that is no JSON", EVALUATE, f"{HEAD}config.json", "Train", put(f"{HEAD}config.json", "{")),
    Case("a configuration of a head nested too deep", EVALUATE, f"{HEAD}config.json", "Train", put(f"{HEAD}config.json", NESTED)),
    Case("a configuration of a head without its objective", EVALUATE, f"{HEAD}config.json", "Train", put(f"{HEAD}config.json", '{"target": {}}')),
    Case("a configuration of a head that lacks a field", EVALUATE, f"{HEAD}config.json", "Train", edit(f"{HEAD}config.json", objective=None)),
    Case("a head whose name is a number", EVALUATE, f"{HEAD}config.json", "Train", edit(f"{HEAD}config.json", head=5)),
    Case("a head with layers of a word", EVALUATE, f"{HEAD}config.json", "Train", edit(f"{HEAD}config.json", layers="two")),
    Case("a head with negative layers", EVALUATE, f"{HEAD}config.json", "Train", edit(f"{HEAD}config.json", layers=-1)),
    Case(
        "a head of another vocabulary",
        EVALUATE,
        "done/heads/medusa",
        "train a head",
        edit(f"{HEAD}config.json", target={"hidden_size": 32, "vocab_size": 32000}),
    ),
    Case("a head that is not installed", EVALUATE, "'medussa'", "medusa", edit(f"{HEAD}config.json", head="medussa")),
    Case("cut weights of a head", EVALUATE, f"{HEAD}model.safetensors", "Train", cut(f"{HEAD}model.safetensors", 1000)),
    Case("an empty file of weights", EVALUATE, f"{HEAD}model.safetensors", "Train", put(f"{HEAD}model.safetensors")),
    Case("unreadable weights of a head", EVALUATE, f"{HEAD}model.safetensors", "Train", link(f"{HEAD}model.safetensors", UNREADABLE)),
    Case("weights of another head", EVALUATE, "done/heads/medusa", "Train", copied("done/heads/eagle/model.safetensors", HEAD)),
    Case(
        "weights that are not finite",
        EVALUATE,
        "done/heads/medusa",
        "Train",
        tensors(f"{HEAD}model.safetensors", lambda found: found["block_bias"].fill_(float("nan"))),
    ),
    Case("a manifest whose target is a number", EVALUATE, f"{HEAD}training.json", "Train", edit(f"{HEAD}training.json", target=5)),
    Case("a manifest without its steps", EVALUATE, f"{HEAD}training.json", "Train", edit(f"{HEAD}training.json", steps=None)),
    Case("a manifest with steps of a word", EVALUATE, f"{HEAD}training.json", "Train", edit(f"{HEAD}training.json", steps="two")),
]

RECORDS = [
    Case("no such record", "table none.jsonl", "none.jsonl", "an evaluation wrote"),
    Case("a record with too long a name", f"table {LONG}", "xxx", "an evaluation wrote"),
    Case("a folder as record", "table target", "target", "an evaluation wrote"),
    Case("an unreadable record", "table record.jsonl", "record.jsonl", "an evaluation wrote", link("record.jsonl", UNREADABLE)),
    Case("an empty record", "table record.jsonl", "record.jsonl", "an evaluation wrote", put("record.jsonl")),
    Case("a binary record", "table record.jsonl", "record.jsonl:1", "Restore", put("record.jsonl", b"\xff\xfe\x00\n\n")),
    Case("questions as record", "table questions.jsonl", "questions.jsonl", "an evaluation wrote"),
    Case("half a header", "table record.jsonl", "record.jsonl", "an evaluation wrote", cut("record.jsonl", 200)),
    Case("a malformed line of a record", "table record.jsonl", "record.jsonl:3", "Restore", line(3, "{no json")),
    Case("a line that is a list", "table record.jsonl", "record.jsonl:3", "Restore", line(3, "[]")),
    Case("a number of 5000 digits", "table record.jsonl", "record.jsonl:3", "Restore", line(3, f'{{"kind": {DIGITS}}}')),
    Case("a line nested too deep", "table record.jsonl", "record.jsonl:3", "Restore", line(3, NESTED)),
    Case("a record of an earlier form", "table record.jsonl", "schema 1", "0.1.0", turn(1, schema=1)),
    Case("records of two forms", "table other.jsonl record.jsonl", "record.jsonl has record schema 3", "0.1.0", turn(1, schema=3)),
    Case(
        "a header without a time zone",
        "verify there",
        "there/records.jsonl:1: created",
        "Restore",
        lines("there/records.jsonl", {**make_header(), "created": "2026-02-03T04:05:06"}),
    ),
    Case("an unknown method in a record", "table record.jsonl", "record.jsonl:2: method: 'hawk'", "Restore", turn(method="hawk")),
    Case("a time that is a text", "table record.jsonl", "record.jsonl:2: decode_s", "Restore", turn(decode_s="fast")),
    Case("a negative time", "table record.jsonl", "record.jsonl:2: decode_s", "Restore", turn(decode_s=-1.0)),
    Case("steps that do not make the tokens", "table record.jsonl", "record.jsonl:2: accepted", "Restore", turn(accepted=[0], drafted_depth=[0])),
    Case("more accepted than drafted", "table record.jsonl", "record.jsonl:2: accepted", "Restore", turn(accepted=[35], drafted_depth=[3])),
    Case("an answer twice", "table record.jsonl", "record.jsonl:3: the same method", "Restore", keep_lines(lambda found: [*found[:2], found[1]])),
    Case("an answer less than the end counts", "table record.jsonl", "the end line counts", "Restore", keep_lines(lambda found: [*found[:-2], found[-1]])),
    Case("a line after the end", "table record.jsonl", "a line after the end", "Restore", keep_lines(lambda found: found * 2)),
    Case("a record broken off before its first answer", "table record.jsonl", "record.jsonl", "Evaluate", keep_lines(lambda found: found[:1])),
    Case("a damaged record to go on with", EVALUATE, "out/records.jsonl:1", "Restore", lines("out/records.jsonl", "{", "{}")),
    Case("a record of another run to go on with", f"{EVALUATE} --out done --max-new-tokens 5", "done/records.jsonl", "--out"),
    Case(
        "an interrupted record of another machine",
        EVALUATE + " --out done --max-new-tokens 6",
        "environment.cpu",
        "--out",
        keep_lines(lambda found: [found[0].replace('"cpu":"', '"cpu":"not '), *found[1:-1]], "done/records.jsonl"),
    ),
    Case("evaluating on a full disk", EVALUATE, "out/records.jsonl", "Free space", folder("out"), full_disk),
]

RESULTS = [
    Case("no such table specification", "table record.jsonl --spec none.toml --out out", "none.toml", "reproduce/"),
    Case("a table specification that is no TOML", "table record.jsonl --spec bad.toml --out out", "bad.toml", "Correct", put("bad.toml", "methods = [\n")),
    Case("a binary table specification", "table record.jsonl --spec bad.toml --out out", "bad.toml", "Correct", put("bad.toml", b"\xff")),
    Case(
        "an unknown column",
        "table record.jsonl --spec bad.toml --out out",
        "'size'",
        "columns are",
        put("bad.toml", 'methods = ["vanilla"]\nquestions = "mt_bench"\ncolumns = ["size"]\n'),
    ),
    Case("published values of the wrong type", "table record.jsonl --paper bad.toml --out out", "bad.toml: koala", "Correct", put("bad.toml", "koala = 5\n")),
    Case("a table below a file", "table record.jsonl --out questions.jsonl/out", "questions.jsonl/out", "--out"),
    Case("a table in an unwritable folder", "table record.jsonl --out out", "out/table1.md", "--out", link("out", UNWRITABLE)),
    Case("the same target twice in a table", "table record.jsonl other.jsonl --out out", "other.jsonl", "one record per target"),
    Case(
        "a table of vanilla alone",
        "table vanilla.jsonl --out out",
        "vanilla.jsonl",
        "--methods",
        record("vanilla.jsonl", methods=make_header(["vanilla"])["methods"]),
    ),
    Case("a table on a full disk", "table record.jsonl --out out", "out/table1.md", "Free space", folder("out"), full_disk),
    Case("an unknown figure", "figure hawk record.jsonl", "hawk", "depth"),
    Case("a figure of a damaged record", "figure depth record.jsonl", "record.jsonl:2", "Restore", line(2, "{")),
    Case("nothing to verify", "verify target", "target/records.jsonl", "an evaluation wrote"),
    Case("a damaged record to verify", "verify done", "done/records.jsonl:2", "Restore", line(2, "{", "done/records.jsonl")),
    Case("weights that cannot be verified", "verify done", f"{HEAD}model.safetensors", "permissions", link(f"{HEAD}model.safetensors", UNREADABLE)),
    Case("answers that cannot be verified", "verify done", "vanilla.jsonl", "permissions", link("done/answers/target-vanilla.jsonl", UNREADABLE)),
    Case("vanilla audited against itself", "audit --methods vanilla", "vanilla", "--methods"),
    Case("an unknown task", "audit --tasks mtbench --data-dir target", "'mtbench'", "mt_bench"),
    Case("no task", "audit --tasks ,", "','", "separated by commas"),
    Case("no tasks in the data folder", "audit --tasks all --data-dir target", "target", "koala-bench data"),
    Case("an audit without heads", "audit SMALL --tasks questions.jsonl --methods vanilla,medusa --heads none --out out", "none/medusa", "koala-bench train"),
]

TRACES = [
    Case("no such answers", "analyse none.jsonl", "none.jsonl", "path"),
    Case("answers with too long a name", f"analyse {LONG}", "xxx", "permissions"),
    Case("a folder of answers", "analyse target", "target", "inside it"),
    Case("unreadable answers", "analyse answers.jsonl", "answers.jsonl", "permissions", link("answers.jsonl", UNREADABLE)),
    Case("binary answers", "analyse answers.jsonl", "answers.jsonl, line 1", "UTF-8", put("answers.jsonl", b"\xff\xfe\x00")),
    Case("empty answers", "analyse answers.jsonl", "answers.jsonl", "choices", put("answers.jsonl")),
    Case("a malformed answer", "analyse answers.jsonl", "answers.jsonl, line 2", "cut off", line(2, "{", "answers.jsonl")),
    Case("questions as answers", "analyse questions.jsonl", "questions.jsonl, line 1", "--questions"),
    Case("an answer twice in a file", "analyse answers.jsonl", "answers.jsonl, line 3", "Keep one", lines("answers.jsonl", *map(medusa_row, (81, 82, 81)))),
    Case(
        "a negative count of tokens",
        "analyse answers.jsonl",
        "line 1: choices.0.new_tokens",
        "An answer is",
        lines("answers.jsonl", medusa_row(new_tokens=[-6, 5])),
    ),
    Case("fewer times than turns", "analyse answers.jsonl", "'wall_time' has 1", "one a turn", lines("answers.jsonl", medusa_row(wall_time=[0.5]))),
    Case("a file named twice", "analyse answers.jsonl ./answers.jsonl", "answers.jsonl", "once"),
    Case(
        "a baseline of other questions",
        "analyse answers.jsonl --baseline base.jsonl",
        "no question in common",
        "the same questions",
        lines("base.jsonl", medusa_row(500, "vanilla")),
    ),
    Case("no categories", "analyse answers.jsonl --by-category", "answers.jsonl", "--questions"),
    Case("a damaged record to analyse", "analyse record.jsonl", "record.jsonl:2", "Restore", line(2, "{")),
    Case("numbers below a file", "analyse answers.jsonl --csv questions.jsonl/x.csv", "questions.jsonl", "folder"),
    Case("numbers on a full disk", "analyse answers.jsonl --csv x.csv", "x.csv", "Free space", around=full_disk),
]

GATE = [
    Case("a baseline that is not there", "check none.jsonl record.jsonl", "none.jsonl", "an evaluation wrote"),
    Case("a baseline folder without records", "check target record.jsonl", "target", ".jsonl"),
    Case("the same run on both sides", "check record.jsonl record.jsonl", "the same run", "--out"),
    Case("an unfinished record", "check record.jsonl other.jsonl", "other.jsonl", "goes on", keep_lines(lambda found: found[:-1], "other.jsonl")),
    Case(
        "other questions than the baseline's",
        "check record.jsonl new.jsonl",
        "questions.sha256",
        "--questions",
        record("new.jsonl", questions={"name": "x", "sha256": "99" * 32, "count": 8}),
    ),
    Case(
        "a report below a file, beside one that could be written",
        "check record.jsonl other.jsonl --junit x.xml --markdown questions.jsonl/x.md",
        "questions.jsonl",
        "folder",
    ),
    Case("a report that is a folder", "check record.jsonl other.jsonl --junit target --markdown x.md", "target", "folder"),
    Case("a margin for what is accepted anyway", "check record.jsonl other.jsonl --update --margin 3", "--update", "--margin"),
    Case("two records for one file", "check record.jsonl other.jsonl more.jsonl --update", "record.jsonl", "folder", record("more.jsonl")),
    Case("a baseline on a full disk", "check new.jsonl other.jsonl --update", "new.jsonl", "Free space", around=full_disk),
]

OWN_HEADS = [
    Case("a head with a space in its name", "new-head 'my head'", "'my head'", "my_head"),
    Case("a head whose name is taken", "new-head medusa", "'medusa'", "another name"),
    Case("a package that is there", "new-head my_head --out target", "target", "--out"),
    Case("a package below a file", "new-head my_head --out questions.jsonl/x", "questions.jsonl", "--out"),
    Case("a package with too long a name", f"new-head my_head --out {LONG}", "xxx", "--out"),
    Case("a package on a full disk", "new-head my_head", "my_head", "Free space", around=full_disk),
    Case("a head to check that is unknown", "check-head medussa", "'medussa'", "medusa"),
    Case("a head to check that does not parse", "check-head ./bad.py:Head", "bad.py", "Mend", put("bad.py", "def\n")),
    Case("a head to check that is no class", "check-head ./bad.py:head", "'head'", "Class", put("bad.py", "head = 5\n")),
    Case("an option without a value", "check-head medusa --option layers", "'layers'", "key=value"),
    Case("an option of the wrong type", "check-head medusa --option layers=two", "layers is 'two'", "same kind"),
    Case("no record to judge", "compare --records none.jsonl", "none.jsonl", "an evaluation wrote"),
    Case("a head that is not in the record", "compare --records record.jsonl --methods vanilla,hawk --head hawk", "'hawk'", "eagle"),
    Case("nothing to judge", "compare --records record.jsonl", "paper", "--head"),
    Case("a head that is not compared", "compare --methods vanilla,medusa --head eagle", "--head eagle", "--methods"),
    Case("no head to compare", "compare --methods vanilla,medusa,./none.py:Head", "./none.py", "./file.py:Class"),
    Case(
        "a comparison without its data",
        "compare SMALL ASK --methods vanilla,medusa --head medusa --set data.source=none.jsonl --out out",
        "none.jsonl",
        "data.source",
    ),
    Case(
        "a damaged note of the code",
        "compare SMALL ASK --methods vanilla,medusa --head medusa --tree 2x1 --out out",
        "out/sources.json",
        "--out",
        put("out/sources.json", "[]"),
    ),
]

OTHERS = [
    Case("no such recipe", "reproduce table9", "'table9'", "table1"),
    Case("nothing to compare with vanilla", "reproduce table1 --methods vanilla", "vanilla", "--methods"),
    Case("nobody's questions to answer", "distill --out out.jsonl --target target --device cpu --source none.jsonl", "none.jsonl", "data.source"),
    Case(
        "answers below a file", "distill --out questions.jsonl/out.jsonl --target target --device cpu --source conversations.jsonl", "questions.jsonl", "--out"
    ),
    Case("no rows to answer", "distill --out out.jsonl --rows 0", "'--rows'", "distill --help"),
    Case("neither grid nor records", "sweep", "--records", "reproduce/sweeps"),
    Case("no such grid", "sweep none.toml --out out", "none.toml", "reproduce/sweeps"),
    Case("a grid that is no TOML", "sweep bad.toml --out out", "bad.toml", "Mend", put("bad.toml", "[grid\n")),
    Case("a sweep that is no sweep", "sweep --records questions.jsonl", "questions.jsonl", "--out"),
    Case("no recordings", "parity none", "none", "recordings"),
    Case("a file of recordings", "parity questions.jsonl", "questions.jsonl", "recordings"),
    Case("other things than recordings", "parity done", "medusa_tiny", "recordings"),
    Case("damaged tensors of a recording", "parity fixtures", "expected.safetensors", "again", put("fixtures/medusa_tiny/expected.safetensors", b"x" * 99)),
    Case("a recording without its target", "parity fixtures", "medusa_tiny/target", "--target", remove("fixtures/medusa_tiny/target/config.json")),
    Case("an unreadable recording", "parity fixtures", "expected.safetensors", "again", link("fixtures/medusa_tiny/expected.safetensors", UNREADABLE)),
    Case("a recording that lacks a field", "parity fixtures", "prompt0.hidden_states", "complete"),
    Case("unknown questions to fetch", "data mtbench --data-dir out", "'mtbench'", "mt_bench"),
    Case("nowhere to put the questions", "data mt_bench", "data folder", "--data-dir"),
    Case("no network", "data mt_bench --data-dir out", "Connection refused", "by hand", around=no_network),
    Case("a sign-in page", "data mt_bench --data-dir out", "not the pinned file", "sign-in page", around=sign_in_page),
    Case("questions that were changed", "data mt_bench --data-dir .", "mt_bench.jsonl", "Move it away", put("mt_bench.jsonl", "{}")),
    Case("questions that cannot be read", "data --data-dir .", "mt_bench.jsonl", "permissions", link("mt_bench.jsonl", UNREADABLE)),
    Case("a target below a file", "pretrain --out questions.jsonl/out", "questions.jsonl/out", "--out"),
    Case("a start that is not there", "pretrain --out out --start none", "none", "command has written"),
    Case("a start of another kind", "pretrain --out out --start target", "target", "command has written"),
    Case("a benchmark without CUDA", "benchmark --target target --device cuda:0", "'cuda:0'", "--device cpu", around=no_cuda),
]

CASES = [*OPTIONS, *PRESETS, *TARGETS, *QUESTIONS, *CONVERSATIONS, *TRAINING, *HEADS, *RECORDS, *RESULTS, *TRACES, *GATE, *OWN_HEADS, *OTHERS]
