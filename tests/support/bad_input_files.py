"""Bad input in what training and decoding read and write: targets, questions, conversations, checkpoints, trained
heads.
"""

from __future__ import annotations

import gzip
import json

import torch

from tests.support.bad_input import EVALUATE, HEAD, LONG, REPRODUCE, TRAIN, Case
from tests.support.spoiling import (
    DIGITS,
    NESTED,
    UNREADABLE,
    UNWRITABLE,
    Arrange,
    both,
    copied,
    cut,
    edit,
    encoder_decoder,
    folder,
    full_disk,
    lines,
    link,
    no_cuda,
    no_hub,
    no_network,
    offline,
    pickled,
    put,
    remove,
    sign_in_page,
    state,
    state_without,
    target,
    tensors,
)

QUESTION = {"question_id": 1, "category": "a", "turns": ["count 5"]}
TALK = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
AGAIN = "train SMALL --methods medusa,eagle --out done"
ASKING = "evaluate SMALL --methods vanilla,medusa --heads done/heads --out out --questions"
TALKING = TRAIN + " --set data.source="

TARGETS = [
    Case("no such target", "train --target ./none", "There is no folder ./none", "--target"),
    Case(
        "a target that is a file",
        "train --target ./questions.jsonl",
        "There is no folder ./questions.jsonl",
        "--target",
    ),
    Case("a target with too long a name", f"train --target {LONG}", "xxx", "--target", around=offline),
    Case("a target whose name has two lines", "train --target './none\nmore'", "./none more", "--target"),
    Case("a target of the hub, offline", "train --target nobody/nothing", "nobody/nothing", "HF_TOKEN", around=offline),
    Case(
        "a target of a hub that does not answer",
        "train --target nobody/nothing",
        "nobody/nothing",
        "downloaded copy",
        around=no_hub,
    ),
    Case("an empty target", "benchmark --target empty", "empty", "--target", folder("empty")),
    Case("a configuration that is no JSON", TRAIN, "target target", "--target", put("target/config.json", "{")),
    Case("a configuration that is a list", TRAIN, "target target", "--target", put("target/config.json", "[]")),
    Case("a configuration of nothing", TRAIN, "target target", "--target", edit("target/config.json", hidden_size=-32)),
    Case(
        "a configuration without heads",
        TRAIN,
        "target target",
        "--target",
        edit("target/config.json", num_attention_heads=0),
    ),
    Case(
        "a configuration of a word",
        TRAIN,
        "target target",
        "--target",
        edit("target/config.json", num_hidden_layers="two"),
    ),
    Case("an encoder-decoder", "train --target t5", "t5", "decoder-only", encoder_decoder("t5")),
    Case("cut weights", TRAIN, "target target", "--target", cut("target/model.safetensors", 1000)),
    Case("weights that are text", TRAIN, "target target", "--target", put("target/model.safetensors", "no weights")),
    Case("weights that are not there", TRAIN, "target target", "--target", remove("target/model.safetensors")),
    Case(
        "a missing tensor",
        TRAIN,
        "lm_head.weight",
        "complete",
        tensors("target/model.safetensors", lambda found: found.pop("lm_head.weight")),
    ),
    Case("weights of another shape", TRAIN, "target target", "--target", edit("target/config.json", vocab_size=300)),
    Case(
        "no tokenizer",
        TRAIN,
        "target",
        "tokenizer",
        both(remove("target/tokenizer.json"), remove("target/tokenizer_config.json")),
    ),
    Case("a cut tokenizer", TRAIN, "target", "--target", cut("target/tokenizer.json", 500)),
    Case(
        "a tokenizer of another kind",
        TRAIN,
        "target",
        "--target",
        put("target/tokenizer.json", '{"model": {"type": "None"}}'),
    ),
    Case(
        "a tokenizer of more tokens than the target knows",
        "train --target less --device cpu",
        "less",
        "tokenizer",
        target("less", vocab_size=128),
    ),
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
    Case("an unknown chat template", f"{TRAIN} --set target.chat_template=vicuna", "'vicuna'", "vicuna_v1.1"),
    Case("no CUDA", f"{TRAIN} --device cuda", "'cuda'", "--device cpu", around=no_cuda),
    Case("no CUDA device of that number", f"{TRAIN} --device cuda:99", "'cuda:99'", "--device cpu"),
    Case("no such device", "pretrain --out out --device gpu", "'gpu' is not a device", "--device"),
    Case("a device without a name", "pretrain --out out --device ''", "'' is not a device", "--device"),
    Case("no such dtype", f"{TRAIN} --dtype int8", "'int8' is not a dtype", "--dtype"),
    Case("no such attention", f"{TRAIN} --attention magic", "magic", "sdpa"),
    Case(
        "a benchmark without CUDA",
        "benchmark --target target --device cuda:0",
        "'cuda:0'",
        "--device cpu",
        around=no_cuda,
    ),
    Case("a start that is not there", "pretrain --out out --start none", "none", "command has written"),
    Case(
        "conversations that are not there, for a target",
        "pretrain --out out --source none.jsonl",
        "none.jsonl",
        "data.source",
    ),
    Case("a start of another kind", "pretrain --out out --start target", "target", "command has written"),
]

IMPORT = "import bad --target target --device cpu --out out"
EXPORT = "export done/heads/medusa --target target --device cpu --out out"


def draft(config: str) -> Arrange:
    """An EAGLE checkpoint of this configuration."""
    return both(put("bad/config.json", config), copied("done/heads/eagle/model.safetensors", "bad/"))


def draft_of(**changes: object) -> Arrange:
    """An EAGLE checkpoint with other fields of its configuration."""
    good = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    }
    return draft(json.dumps({**good, **changes}))


def medusa_of(tensor: torch.Tensor, key: str = "0.0.weight") -> Arrange:
    """A Medusa checkpoint of one tensor."""
    return pickled("bad/medusa_lm_head.pt", {key: tensor})


EXCHANGE = [
    Case("an import of nothing", IMPORT, "There is no folder bad", "downloaded"),
    Case("an import of an empty folder", IMPORT, "bad holds none of medusa_lm_head", "released", folder("bad")),
    Case("an import of noise", IMPORT, "medusa_lm_head.pt is damaged", "again", put("bad/medusa_lm_head.pt", b"noise")),
    Case(
        "an import of noise of another name",
        IMPORT,
        "model.safetensors is damaged",
        "again",
        put("bad/model.safetensors", b"noise"),
    ),
    Case(
        "an import of noise of Hydra's name",
        IMPORT,
        "hydra_lm_head.pt is damaged",
        "again",
        put("bad/hydra_lm_head.pt", b"noise"),
    ),
    Case(
        "an import of no EAGLE of any kind",
        IMPORT,
        "nothing in it is called layers.* or midlayer.*",
        "released",
        both(folder("bad"), copied(f"{HEAD}model.safetensors", "bad/")),
    ),
    *(
        Case(
            f"a draft whose {name} is {value!r}",
            IMPORT,
            f"bad/config.json: {name} is {value!r}, Input should be",
            "again",
            draft_of(**{name: value}),
        )
        for name, value in (
            ("num_attention_heads", 0),
            ("num_attention_heads", None),
            ("num_attention_heads", "x"),
            ("num_attention_heads", float("inf")),
            ("num_attention_heads", True),
            ("num_key_value_heads", -1),
            ("intermediate_size", 2.5),
            ("intermediate_size", 10**12),
            ("num_hidden_layers", "one"),
            ("head_dim", [8]),
            ("rms_norm_eps", None),
            ("rms_norm_eps", float("nan")),
            ("rope_theta", "x"),
            ("rope_theta", -5),
            ("rope_theta", 0),
            ("rope_scaling", "linear"),
            ("rope_parameters", []),
            ("hidden_act", ["silu"]),
            ("bias", "false"),
        )
    ),
    Case(
        "a draft whose rope_theta no float can hold",
        IMPORT,
        "bad/config.json: rope_theta is 1000",
        "again",
        draft_of(rope_theta=10**400),
    ),
    Case(
        "a draft whose heads cannot turn",
        IMPORT,
        "bad/config.json: width 32 with 32 query",
        "belongs",
        draft_of(num_attention_heads=32),
    ),
    Case(
        "a draft of a billion layers",
        IMPORT,
        "num_hidden_layers is 1000000000",
        "belongs",
        draft_of(num_hidden_layers=10**9),
    ),
    Case(
        "a draft's configuration nested too deep", IMPORT, "bad/config.json is nested too deep", "again", draft(NESTED)
    ),
    Case(
        "a Medusa key of a huge head",
        IMPORT,
        "has a head 99999999, but no head 0",
        "official",
        medusa_of(torch.zeros(1), "99999999.1.weight"),
    ),
    Case(
        "a Medusa key of a late block",
        IMPORT,
        "has a block 999, but no block 0",
        "official",
        medusa_of(torch.zeros(1), "0.999.weight"),
    ),
    Case("sparse weights", IMPORT, "no dense tensor in 0.0.weight", "dense", medusa_of(torch.eye(3).to_sparse())),
    Case(
        "weights without data",
        IMPORT,
        "no dense tensor in 0.0.weight",
        "dense",
        medusa_of(torch.empty(259, 32, device="meta")),
    ),
    Case(
        "weights that are whole numbers",
        IMPORT,
        "0.0.weight of int8 instead",
        "official",
        medusa_of(torch.zeros(259, 32, dtype=torch.int8)),
    ),
    Case(
        "complex weights",
        IMPORT,
        "0.0.weight of complex64 instead",
        "official",
        medusa_of(torch.zeros(259, 32, dtype=torch.complex64)),
    ),
    Case(
        "weights of eight bits",
        IMPORT,
        "0.0.weight of float8_e4m3fn",
        "official",
        medusa_of(torch.zeros(259, 32).to(torch.float8_e4m3fn)),
    ),
    Case(
        "weights as large as their shape says",
        IMPORT,
        "0.0.weight of shape [10000000, 1000000]",
        "official",
        medusa_of(torch.zeros(1).expand(10**7, 10**6)),
    ),
    Case(
        "an import over another program's configuration",
        IMPORT,
        "out/config.json is there already",
        "--out",
        both(medusa_of(torch.zeros(259, 32)), put("out/config.json", "{}")),
    ),
    Case(
        "an import over another head",
        "import bad --target target --out done/heads/medusa",
        "holds a head already",
        "--out",
        put("bad/medusa_lm_head.pt"),
    ),
    Case("an export of nothing", "export none --target target --out out", "none", "koala-bench train"),
    Case("an export in no layout", f"{EXPORT} --layout gguf", "'gguf'", "vllm"),
    Case("an export in no dtype", f"{EXPORT} --dtype int8", "'int8'", "float32"),
    Case(
        "an export over other files",
        f"{EXPORT[:-3]}bad",
        "config.json is there already",
        "--out",
        put("bad/config.json", "{}"),
    ),
    Case("an export on a full disk", EXPORT, "out/medusa_lm_head.pt", "Free space", folder("out"), full_disk),
    Case("a tree to tune of no method", "tune-tree eagel --target target --out tree.json", "'eagel'", "eagle"),
    Case(
        "a tree to tune without a name",
        "tune-tree eagle --target target --out tree",
        "tree is no name for a tree",
        ".json",
    ),
    Case("a profile of no heads", "profile --target target --device cpu --heads none", "none", "koala-bench train"),
    Case("a plan without a target", "plan --target ./none", "./none", "--target", around=no_network),
    Case("a plan for no method", "plan --methods ''", "''", "vanilla"),
]

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
        "an empty file of questions",
        f"{ASKING} bad.jsonl",
        "bad.jsonl has no questions",
        "question_id",
        put("bad.jsonl"),
    ),
    Case(
        "questions of a blank line",
        f"{ASKING} bad.jsonl",
        "bad.jsonl has no questions",
        "question_id",
        put("bad.jsonl", "\n"),
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
    Case(
        "an id of 5000 digits",
        f"{ASKING} bad.jsonl",
        "bad.jsonl, line 1",
        "question_id",
        lines("bad.jsonl", f'{{"question_id": {DIGITS}}}'),
    ),
    Case(
        "missing turns",
        f"{ASKING} bad.jsonl",
        "line 1: turns: ",
        "turns",
        lines("bad.jsonl", {"question_id": 1, "category": "a"}),
    ),
    Case(
        "turns of the wrong type",
        f"{ASKING} bad.jsonl",
        "line 1: turns: ",
        '"turns": [',
        lines("bad.jsonl", {**QUESTION, "turns": "count"}),
    ),
    Case(
        "a question without turns",
        f"{ASKING} bad.jsonl",
        "line 1: turns: ",
        '"turns": [',
        lines("bad.jsonl", {**QUESTION, "turns": []}),
    ),
    Case(
        "an id that is a text",
        f"{ASKING} bad.jsonl",
        "line 1: question_id: ",
        "81",
        lines("bad.jsonl", {**QUESTION, "question_id": "1"}),
    ),
    Case(
        "an id twice",
        f"{ASKING} bad.jsonl",
        "line 2: the question_id 1",
        "of its own",
        lines("bad.jsonl", QUESTION, QUESTION),
    ),
    Case(
        "half a character",
        f"{ASKING} bad.jsonl",
        "line 1: turns.0: ",
        '"turns": [',
        lines("bad.jsonl", {**QUESTION, "turns": ["\ud83d"]}),
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
        "a binary file of conversations", f"{TALKING}bad.jsonl", "bad.jsonl", "Fetch", put("bad.jsonl", b"\xff\xfe\x00")
    ),
    Case(
        "damaged packing",
        f"{TALKING}bad.gz",
        "bad.gz is damaged",
        "Fetch",
        put("bad.gz", gzip.compress(b"{}" * 4000)[:-20]),
    ),
    Case(
        "a malformed conversation",
        f"{TALKING}bad.jsonl",
        "bad.jsonl, line 2",
        "Mend",
        lines("bad.jsonl", TALK, '{"conversations": ['),
    ),
    Case("a malformed array", f"{TALKING}bad.json", "bad.json", "Mend", put("bad.json", '[{"id": 1}, ')),
    Case(
        "a conversation nested too deep",
        f"{TALKING}bad.jsonl",
        "bad.jsonl, line 2",
        "Mend",
        lines("bad.jsonl", TALK, '{"a":' + NESTED),
    ),
    Case("an array nested too deep", f"{TALKING}bad.json", "bad.json", "Mend", put("bad.json", NESTED)),
    Case(
        "an empty file of conversations",
        f"{TALKING}bad.jsonl",
        "bad.jsonl holds 0",
        "more conversations",
        put("bad.jsonl"),
    ),
    Case(
        "too few conversations",
        f"{TALKING}bad.jsonl",
        "bad.jsonl holds 1",
        "more conversations",
        lines("bad.jsonl", TALK),
    ),
    Case(
        "rows of the wrong type",
        f"{TALKING}bad.jsonl",
        "bad.jsonl holds 0",
        "more conversations",
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
        "distill --out out.jsonl --target target --device cpu --source none.jsonl",
        "none.jsonl",
        "data.source",
    ),
    Case(
        "answers below a file",
        "distill --out questions.jsonl/out.jsonl --target target --device cpu --source conversations.jsonl",
        "questions.jsonl",
        "--out",
    ),
]

TRAINING = [
    Case("a checkpoint of noise", AGAIN, "checkpoint.pt", "Delete", state(b"\x80noise" * 99)),
    Case("an empty checkpoint", AGAIN, "checkpoint.pt", "Delete", state(b"")),
    Case(
        "a cut checkpoint",
        AGAIN,
        "checkpoint.pt",
        "Delete",
        both(remove(f"{HEAD}model.safetensors"), cut("done/heads/checkpoint.pt", 2000)),
    ),
    Case("a checkpoint of something else", AGAIN, "checkpoint.pt", "Delete", state([1, 2])),
    Case("a checkpoint without its identity", AGAIN, "checkpoint.pt", "Delete", state({"identity": 5})),
    Case("a checkpoint without its weights", AGAIN, "checkpoint.pt", "Delete", state_without("arms")),
    Case(
        "an unreadable checkpoint",
        AGAIN,
        "checkpoint.pt",
        "Delete",
        both(remove(f"{HEAD}model.safetensors"), link("done/heads/checkpoint.pt", UNREADABLE)),
    ),
    Case(
        "a checkpoint of another run",
        f"{AGAIN} --set training.learning_rate=0.1",
        "checkpoint.pt belongs to another run: its training differs",
        "--out",
    ),
    Case(
        "a damaged training log",
        AGAIN,
        "training.jsonl",
        "Delete",
        both(remove(f"{HEAD}model.safetensors"), put("done/heads/training.jsonl", b"\xff\n")),
    ),
    Case(
        "an output folder below a file",
        "train SMALL --methods medusa --out questions.jsonl/out",
        "questions.jsonl/out",
        "--out",
    ),
    Case(
        "results below a file",
        "reproduce table1 SMALL --methods medusa --out questions.jsonl/out",
        "questions.jsonl/out",
        "--out",
    ),
    Case(
        "an output folder that is a file",
        "train SMALL --methods medusa --out questions.jsonl",
        "questions.jsonl/heads",
        "--out",
    ),
    Case("an unwritable output folder", TRAIN, "out", "--out", link("out", UNWRITABLE)),
    Case("training on a full disk", TRAIN, "out/heads", "Free space", folder("out/heads"), full_disk),
    Case("a target below a file", "pretrain --out questions.jsonl/out", "questions.jsonl/out", "--out"),
]

HEADS = [
    Case("no trained head", f"{EVALUATE} --heads none", "no trained head in none/medusa", "koala-bench train"),
    Case(
        "no trained head where it is by default",
        "evaluate SMALL ASK --methods vanilla,medusa --out out",
        "no trained head in out/heads/medusa",
        "koala-bench train",
    ),
    Case(
        "heads that are a file",
        f"{EVALUATE} --heads questions.jsonl",
        "no trained head in questions.jsonl/medusa",
        "koala-bench train",
    ),
    Case(
        "a configuration of a head that is no JSON",
        EVALUATE,
        f"{HEAD}config.json",
        "Train",
        put(f"{HEAD}config.json", "{"),
    ),
    Case(
        "a configuration of a head nested too deep",
        EVALUATE,
        f"{HEAD}config.json",
        "Train",
        put(f"{HEAD}config.json", NESTED),
    ),
    Case(
        "a configuration of a head without its objective",
        EVALUATE,
        f"{HEAD}config.json",
        "Train",
        put(f"{HEAD}config.json", '{"target": {}}'),
    ),
    Case(
        "a configuration of a head that lacks a field",
        EVALUATE,
        f"{HEAD}config.json",
        "Train",
        edit(f"{HEAD}config.json", objective=None),
    ),
    Case("a head whose name is a number", EVALUATE, f"{HEAD}config.json", "Train", edit(f"{HEAD}config.json", head=5)),
    Case(
        "a head with layers of a word",
        EVALUATE,
        f"{HEAD}config.json",
        "Train",
        edit(f"{HEAD}config.json", layers="two"),
    ),
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
    Case(
        "unreadable weights of a head",
        EVALUATE,
        f"{HEAD}model.safetensors",
        "Train",
        link(f"{HEAD}model.safetensors", UNREADABLE),
    ),
    Case(
        "weights of another head",
        EVALUATE,
        "done/heads/medusa",
        "Train",
        copied("done/heads/eagle/model.safetensors", HEAD),
    ),
    Case(
        "weights that are not finite",
        EVALUATE,
        "done/heads/medusa",
        "Train",
        tensors(f"{HEAD}model.safetensors", lambda found: found["block_bias"].fill_(float("nan"))),
    ),
    Case(
        "a manifest whose target is a number",
        EVALUATE,
        f"{HEAD}training.json",
        "Train",
        edit(f"{HEAD}training.json", target=5),
    ),
    Case(
        "a manifest without its steps",
        EVALUATE,
        f"{HEAD}training.json",
        "Train",
        edit(f"{HEAD}training.json", steps=None),
    ),
    Case(
        "a manifest with steps of a word",
        EVALUATE,
        f"{HEAD}training.json",
        "Train",
        edit(f"{HEAD}training.json", steps="two"),
    ),
]

FILE_CASES = [*TARGETS, *EXCHANGE, *QUESTIONS, *CONVERSATIONS, *TRAINING, *HEADS]
