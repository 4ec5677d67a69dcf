"""Bad input in what training leaves behind: checkpoints, logs, trained heads; and where it cannot write."""

from __future__ import annotations

from tests.support.bad_input.cases import EVALUATE, HEAD, TRAIN, Case
from tests.support.bad_input.spoiling import (
    NESTED,
    UNREADABLE,
    UNWRITABLE,
    both,
    copied,
    cut,
    edit,
    folder,
    full_disk,
    link,
    put,
    remove,
    state,
    state_without,
    tensors,
)

AGAIN = "train SMALL --methods medusa,eagle --out done"

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
        "questions.jsonl",
        "records.jsonl",
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

HEAD_CASES = [*TRAINING, *HEADS]
