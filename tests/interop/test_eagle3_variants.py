"""EAGLE-3 heads as servers train them: other layers, head widths, positions, biases and residuals are computed
correctly in every layout and exported back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from heads.common.layers import rotary_table
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.interop import eagle3
from koala_bench.interop.checkpoints import make_head
from koala_bench.interop.layouts import export_head, import_head
from koala_bench.testing import tiny_config, tiny_target
from koala_bench.tree import load_template
from tests.interop.test_eagle3 import VOCAB, WIDTH, config_of, folder_of, official

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
QKV = ("fc", *(f"midlayer.self_attn.{name}_proj" for name in "qkvo"))


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A target of eight layers, the fewest but one of which upstream's three can be read."""
    return tiny_target(tmp_path_factory.mktemp("deep"), tiny_config(num_hidden_layers=8))


def tensors_of(head_dim: int = 8, biases: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Of four query heads and one key head, of any width."""
    found = official()
    torch.manual_seed(1)
    for name, rows in (("q", 4), ("k", 1), ("v", 1)):
        found[f"midlayer.self_attn.{name}_proj.weight"] = torch.randn(rows * head_dim, 2 * WIDTH) / 8
    found["midlayer.self_attn.o_proj.weight"] = torch.randn(WIDTH, 4 * head_dim) / 8
    return found | {f"{name}.bias": torch.randn(len(found[f"{name}.weight"])) for name in biases}


def speculators(tensors: dict[str, torch.Tensor], **config: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The same head under the names of that library."""
    layer = {key: value for key, value in config_of().items() if key != "draft_vocab_size"}
    named = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    return named, {"transformer_layer_config": layer, "draft_vocab_size": VOCAB, **config}


def expected(tensors: dict[str, torch.Tensor], target: Target, config: dict[str, Any], ids: list[int]) -> torch.Tensor:
    """Logits after each token of a sequence, written down from the description of the network."""
    tokens = torch.arange(40, 70)[None]
    states = target.model(input_ids=tokens, output_hidden_states=True).hidden_states
    fused = torch.cat([states[each] for each in ids], dim=-1)[:, :-1]

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * tensors[f"{name}.weight"]

    x, own = linear("fc", fused), config.get("head_dim", 8)
    normed = norm("midlayer.hidden_norm", x)
    pair = torch.cat([norm("midlayer.input_layernorm", target.embed(tokens[:, 1:])), normed], dim=-1)
    q, k, v = (linear(f"midlayer.self_attn.{n}_proj", pair).unflatten(-1, (-1, own)).transpose(1, 2) for n in "qkv")
    rope = {"rope_type": "default", **(config.get("rope_scaling") or {}), "rope_theta": 500.0}
    plain = LlamaConfig(hidden_size=WIDTH, num_attention_heads=4, head_dim=own, rope_parameters=rope)
    q, k = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(plain)(pair, torch.arange(pair.shape[1])[None]))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
    x = (normed if config.get("norm_before_residual") else x) + linear("midlayer.self_attn.o_proj", mixed)
    inner = norm("midlayer.post_attention_layernorm", x)
    gated = F.silu(linear("midlayer.mlp.gate_proj", inner)) * linear("midlayer.mlp.up_proj", inner)
    return linear("lm_head", norm("norm", x + linear("midlayer.mlp.down_proj", gated)))


@torch.no_grad()
def assert_computes(
    found: Any, tensors: dict[str, torch.Tensor], target: Target, config: dict[str, Any], ids: list[int]
) -> None:
    head = make_head(found, target.spec())
    tokens = torch.arange(40, 70)[None]
    out = head(tokens[:, 1:], target.states(tokens, head.features)[:, :-1])[0]
    torch.testing.assert_close(
        head.lm_head(head.norm(out)), expected(tensors, target, config, ids), atol=2e-3, rtol=1e-3
    )


@pytest.mark.parametrize(
    ("config", "biases", "ids"),
    [
        ({}, (), [2, 4, 5]),
        ({"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}, (), [1, 3, 6]),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 6]}}, (), [1, 3, 7]),
        ({"head_dim": 16}, (), [2, 4, 5]),
        ({"rope_scaling": LLAMA3}, (), [2, 4, 5]),
        ({"rope_scaling": LINEAR}, (), [2, 4, 5]),
        ({"rope_scaling": {**YARN, "type": "yarn"}}, (), [2, 4, 5]),
        ({}, QKV, [2, 4, 5]),
        ({"norm_before_residual": True}, ("midlayer.mlp.down_proj",), [2, 4, 5]),
    ],
    ids=["plain", "layers", "layers of sglang", "head width", "llama3", "linear", "yarn", "biases", "residual"],
)
def test_every_variant_computes_what_its_description_says(
    tmp_path: Path, deep: Target, config: dict[str, Any], biases: tuple[str, ...], ids: list[int]
) -> None:
    tensors = tensors_of(config.get("head_dim", 8), biases)
    found = eagle3.read(folder_of(tmp_path, tensors, **config), deep.spec())
    assert_computes(found, tensors, deep, config, ids)
    import_head(tmp_path, deep, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["head"] == "eagle3"


@pytest.mark.parametrize("scaling", [LLAMA3, LINEAR, YARN], ids=lambda each: each["rope_type"])
def test_stretched_positions_are_those_of_transformers(scaling: dict[str, Any]) -> None:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, rope_parameters={**scaling, "rope_theta": 500.0}
    )
    theirs = torch.stack(LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(300)[None]))[:, 0]
    torch.testing.assert_close(rotary_table(300, 16, 500.0, torch.device("cpu"), torch.float32, scaling), theirs)


def test_the_layout_of_speculators_is_the_same_head(tmp_path: Path, deep: Target) -> None:
    tensors = tensors_of()
    named, config = speculators(tensors, norm_before_residual=True, eagle_aux_hidden_state_layer_ids=[1, 3, 6])
    named["embed_tokens.weight"] = deep.embed(torch.arange(VOCAB))
    save_file(named, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = import_head(tmp_path, deep, tmp_path / "ours")
    assert found.head == "eagle3" and found.options["layer_ids"] == [1, 3, 6]
    assert_computes(found, tensors, deep, {"norm_before_residual": True}, [1, 3, 6])
    del config["norm_before_residual"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(KoalaBenchError, match="has no 'norm_before_residual'"):
        eagle3.read(tmp_path, deep.spec())


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_shards_are_read_as_one_file(tmp_path: Path, deep: Target, kind: str) -> None:
    tensors = tensors_of()
    names = sorted(tensors)
    stem, _, ending = kind.rpartition(".")
    files = {name: f"{stem}-0000{1 + place % 2}-of-00002.{ending}" for place, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: tensors[name] for name in names if files[name] == file}
        save_file(part, tmp_path / file) if ending == "safetensors" else torch.save(part, tmp_path / file)
    (tmp_path / f"{kind}.index.json").write_text(json.dumps({"weight_map": files}))
    (tmp_path / "config.json").write_text(json.dumps(config_of()))
    found = import_head(tmp_path, deep, tmp_path / "ours")
    assert all(torch.equal(found.tensors[name], tensors[name]) for name in names)
    (tmp_path / files[names[0]]).unlink()
    with pytest.raises(KoalaBenchError, match=r"Cannot read|damaged"):
        eagle3.read(tmp_path, deep.spec())


def test_an_index_that_names_no_files_beside_it_is_refused(tmp_path: Path, deep: Target) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of()))
    for names in ({}, {"fc.weight": "../elsewhere.safetensors"}, {"fc.weight": 5}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        with pytest.raises(KoalaBenchError, match="names no files beside it"):
            eagle3.read(tmp_path, deep.spec())


@pytest.mark.parametrize("layout", ["vllm", "sglang"])
@pytest.mark.parametrize("drafted", [VOCAB, 40])
def test_what_is_exported_to_a_server_is_the_same_head_when_read_again(
    tmp_path: Path, deep: Target, layout: str, drafted: int
) -> None:
    config = {"rope_scaling": LLAMA3, "eagle_aux_hidden_state_layer_ids": [1, 3, 7], "draft_vocab_size": drafted}
    (tmp_path / "theirs").mkdir()
    first = import_head(folder_of(tmp_path / "theirs", official(drafted), **config), deep, tmp_path / "ours")
    export_head(tmp_path / "ours", deep, layout, tmp_path / "out", None)
    again = eagle3.read(tmp_path / "out", deep.spec())
    assert again.options == first.options and again.notes == ()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in first.tensors.items())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLMEagle3"] and written["rope_scaling"] == LLAMA3
    if layout == "vllm":
        assert written["eagle_aux_hidden_state_layer_ids"] == [1, 3, 7]
    else:
        assert written["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 6]
    d2t = load_file(tmp_path / "out" / "model.safetensors")["d2t"]
    assert d2t.shape == (drafted,) and bool(d2t.any()) == (drafted < VOCAB)


@pytest.mark.parametrize(
    ("config", "biases", "layout", "message"),
    [
        ({}, ("fc",), "vllm", "vLLM's EAGLE-3 has no place for biases"),
        ({}, ("fc",), "official", "has no place for biases"),
        ({"norm_before_residual": True}, (), "sglang", "SGLang's EAGLE-3 has no place for norm_before_residual"),
        ({"norm_before_residual": True}, (), "official", "has no place for norm_before_residual"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 3, 7]}, (), "official", "has no place for layer_ids"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 3, 7]}, (), "sglang", "hands a draft no such state"),
    ],
)
def test_what_a_server_would_compute_otherwise_is_not_exported_to_it(
    tmp_path: Path, deep: Target, config: dict[str, Any], biases: tuple[str, ...], layout: str, message: str
) -> None:
    (tmp_path / "theirs").mkdir()
    import_head(folder_of(tmp_path / "theirs", tensors_of(biases=biases), **config), deep, tmp_path / "ours")
    with pytest.raises(KoalaBenchError, match=message):
        export_head(tmp_path / "ours", deep, layout, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_a_variant_drafts_and_changes_no_answer(tmp_path: Path, deep: Target, engine: str) -> None:
    config = {"head_dim": 16, "rope_scaling": LLAMA3, "norm_before_residual": True}
    found = eagle3.read(folder_of(tmp_path, tensors_of(16, QKV), **config), deep.spec())
    target = load_target(deep.name, "cpu", "float64", engine=engine)
    head, prompt = make_head(found, target.spec()), list(range(40, 60))
    answer = decode(target, head, load_template("3x2x1"), prompt, 16, ())
    assert answer.tokens == decode(target, Vanilla(), VANILLA_TREE, prompt, 16, ()).tokens
    assert max(answer.drafted_depth) == 3
