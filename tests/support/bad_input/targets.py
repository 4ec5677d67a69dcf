"""Bad input in targets, and in the checkpoints of heads that are imported and exported."""

from __future__ import annotations

import json

import torch

from tests.support.bad_input.cases import HEAD, LONG, TRAIN, Case
from tests.support.bad_input.spoiling import (
    NESTED,
    Arrange,
    both,
    copied,
    cut,
    edit,
    encoder_decoder,
    folder,
    full_disk,
    no_cuda,
    no_hub,
    no_network,
    offline,
    pickled,
    put,
    remove,
    target,
    tensors,
)

IMPORT = "import bad --target target --device cpu --set target.engine=eager --out out"
EXPORT = "export done/heads/medusa --target target --device cpu --set target.engine=eager --out out"


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

EXCHANGE = [
    Case("an import of nothing", IMPORT, "There is no folder bad", "released"),
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
            ("num_attention_heads", float("inf")),
            ("num_attention_heads", True),
            ("intermediate_size", 2.5),
            ("intermediate_size", 10**12),
            ("num_hidden_layers", "one"),
            ("head_dim", [8]),
            ("rms_norm_eps", float("nan")),
            ("rope_theta", -5),
            ("rope_scaling", "linear"),
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
    Case("a draft's configuration nested too deep", IMPORT, "bad/config.json is no JSON file", "again", draft(NESTED)),
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
        f"{IMPORT[:-3]}done/heads/medusa",
        "holds a head already",
        "--out",
        put("bad/medusa_lm_head.pt"),
    ),
    Case("an export of nothing", EXPORT.replace("done/heads/medusa", "none"), "none", "koala-bench train"),
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
    Case(
        "a profile of no heads",
        "profile --target target --device cpu --engine eager --heads none",
        "none",
        "koala-bench train",
    ),
    Case("a plan without a target", "plan --target ./none", "./none", "--target", around=no_network),
    Case("a plan for no method", "plan --methods ''", "''", "vanilla"),
]

TARGET_CASES = [*TARGETS, *EXCHANGE]
