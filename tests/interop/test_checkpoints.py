"""Reading official checkpoints strictly: everything in the file is accounted for, or named."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import TargetSpec
from koala_bench.interop import eagle, medusa
from koala_bench.interop.checkpoints import make_head
from koala_bench.interop.repeats import tied_heads

WIDTH, VOCAB = 16, 30


@pytest.fixture(scope="module")
def spec() -> TargetSpec:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return Target("tiny", model, None, torch.device("cpu"), torch.float32, 64).spec()


def _medusa_tensors(heads: int, layers: int, tied: bool = False) -> dict[str, torch.Tensor]:
    tensors = {}
    for head in range(heads):
        for block in range(layers):
            torch.manual_seed(head if tied else head * layers + block)
            tensors[f"{head}.{block}.linear.weight"] = torch.randn(WIDTH, WIDTH)
            tensors[f"{head}.{block}.linear.bias"] = torch.randn(WIDTH)
        tensors[f"{head}.{layers}.weight"] = torch.randn(VOCAB, WIDTH)
    return tensors


def _draft_config(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 20, "rms_norm_eps": 1e-5, "hidden_act": "silu", **changes,
    }  # fmt: skip


def _draft_tensors(spec: TargetSpec, layers: int = 1, bias: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (WIDTH, 2 * WIDTH)} | ({"fc.bias": (WIDTH,)} if bias else {})
    for layer in range(layers):
        at = f"layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qo"} | {
            f"{at}.self_attn.{name}_proj.weight": (WIDTH // 2, WIDTH) for name in "kv"
        }
        shapes |= {
            f"{at}.mlp.gate_proj.weight": (20, WIDTH),
            f"{at}.mlp.up_proj.weight": (20, WIDTH),
            f"{at}.mlp.down_proj.weight": (WIDTH, 20),
        }
        shapes |= {
            f"{at}.{name}.weight": (WIDTH,)
            for name in ("post_attention_layernorm", *(["input_layernorm"] if layer else []))
        }
    return {
        "embed_tokens.weight": spec.embed(torch.arange(VOCAB)).clone(),
        **{name: torch.randn(shape) for name, shape in shapes.items()},
    }


def _draft(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_draft_config(**config)))
    return folder


# ------------------------------------------------------------------------------ Medusa


def test_heads_and_layers_of_medusa_come_from_the_keys_and_the_disagreement_is_noted(
    tmp_path: Path, spec: TargetSpec
) -> None:
    tensors = _medusa_tensors(5, 2)
    save_file(tensors, tmp_path / "medusa_lm_head.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1}))
    found = medusa.read(tmp_path, spec)
    assert (found.head, found.options) == ("medusa", {"heads": 5, "layers": 2})
    assert found.notes == (
        "The 2 residual blocks of every head are distinct.",
        "config.json says medusa_num_heads 2, the file has 5.",
        "config.json says medusa_num_layers 1, the file has 2.",
    )
    head = make_head(found, spec)
    assert torch.equal(head.block_weight[1, 3], tensors["3.1.linear.weight"])
    assert torch.equal(head.block_bias[0, 4], tensors["4.0.linear.bias"])
    assert torch.equal(head.output_weight[2], tensors["2.2.weight"])
    assert not head.training


@pytest.mark.parametrize("config", [{"medusa_num_heads": "two"}, {"medusa_num_layers": [1]}])
def test_a_malformed_configuration_of_medusa_is_named(tmp_path: Path, config: dict[str, Any], spec: TargetSpec) -> None:
    save_file(_medusa_tensors(2, 1), tmp_path / "medusa_lm_head.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(KoalaBenchError, match=rf"config\.json: {next(iter(config))} is .*, "):
        medusa.read(tmp_path, spec)


def test_tied_blocks_are_reported_per_head(tmp_path: Path, spec: TargetSpec) -> None:
    target = cast(Target, SimpleNamespace(name="tiny"))  # of which an export asks only the name
    tensors = _medusa_tensors(3, 3, tied=True)
    save_file(tensors, tmp_path / "medusa_lm_head.safetensors")
    found = medusa.read(tmp_path, spec)
    assert tied_heads(medusa.blocks_of(found.tensors)) == [0, 1, 2]
    assert medusa.to_official(None, found.tensors, target).notes == ()
    assert found.notes == (
        "The 3 residual blocks of every head are identical copies: upstream applies one block 3 times.",
    )
    tensors["1.2.linear.bias"][0] += 1
    save_file(tensors, tmp_path / "medusa_lm_head.safetensors")
    found = medusa.read(tmp_path, spec)
    assert found.notes == ("The 3 residual blocks are identical copies in heads 0, 2 and distinct in the others.",)
    (note,) = medusa.to_official(None, found.tensors, target).notes
    assert note.endswith("its own loader cannot use the distinct ones of heads 1.")
    save_file(_medusa_tensors(3, 3), tmp_path / "medusa_lm_head.safetensors")
    (note,) = medusa.to_official(None, medusa.read(tmp_path, spec).tensors, target).notes
    assert note.endswith("its own loader cannot use these 3 distinct ones.")


def test_a_pickled_file_in_half_precision_is_read_as_float32(tmp_path: Path, spec: TargetSpec) -> None:
    tensors = {name: tensor.half() for name, tensor in _medusa_tensors(2, 1).items()}
    torch.save(tensors, tmp_path / "medusa_lm_head.pt")
    found = medusa.read(tmp_path, spec)
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}
    assert torch.equal(found.tensors["output_weight"][1], tensors["1.1.weight"].float())
    assert found.notes == ()


def test_everything_wrong_with_the_keys_is_in_one_message(tmp_path: Path, spec: TargetSpec) -> None:
    tensors = _medusa_tensors(3, 2)
    del tensors["1.0.linear.bias"], tensors["2.2.weight"]
    tensors["lm_head.weight"] = torch.zeros(2)
    tensors["0.1.linear.weight"] = torch.zeros(WIDTH, WIDTH + 1)
    tensors["0.0.linear.bias"][3] = float("nan")
    save_file(tensors, tmp_path / "medusa_lm_head.safetensors")
    with pytest.raises(KoalaBenchError) as caught:
        medusa.read(tmp_path, spec)
    for part in (
        "misses 1.0.linear.bias, 2.2.weight",
        "unknown lm_head.weight",
        "0.1.linear.weight of shape [16, 17] instead of [16, 16]",
        "not finite in 0.0.linear.bias",
    ):
        assert part in caught.value.message
    assert "\n" not in str(caught.value)


def test_heads_for_another_target_are_refused_by_shape(tmp_path: Path, spec: TargetSpec) -> None:
    tensors = _medusa_tensors(2, 1) | {f"{head}.1.weight": torch.zeros(VOCAB + 2, WIDTH) for head in range(2)}
    save_file(tensors, tmp_path / "medusa_lm_head.safetensors")
    with pytest.raises(KoalaBenchError, match=r"0\.1\.weight of shape \[32, 16\] instead of \[30, 16\]"):
        medusa.read(tmp_path, spec)


def test_heads_without_projections_are_explained(tmp_path: Path, spec: TargetSpec) -> None:
    save_file(
        {name: tensor for name, tensor in _medusa_tensors(2, 1).items() if "linear" in name},
        tmp_path / "medusa_lm_head.safetensors",
    )
    with pytest.raises(KoalaBenchError, match="share the target's output layer"):
        medusa.read(tmp_path, spec)


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("touched"),))


@pytest.mark.parametrize(
    "contents", [_Harmful(), {"0.0.linear.weight": _Harmful()}, [torch.zeros(1)], {"0.0.linear.weight": 1.0}]
)
def test_a_pickle_of_anything_but_tensors_is_refused_and_not_run(
    tmp_path: Path, contents: Any, monkeypatch: pytest.MonkeyPatch, spec: TargetSpec
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(contents, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(KoalaBenchError, match="holds more than tensors"):
        medusa.read(tmp_path, spec)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", medusa.FILES)
@pytest.mark.parametrize("data", [b"", b"not a checkpoint", b"\x80\x02}q\x00", b"PK\x03\x04"])
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, name: str, data: bytes, spec: TargetSpec) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(KoalaBenchError) as caught:
        medusa.read(tmp_path, spec)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_pickle_of_the_old_kind_is_named(tmp_path: Path, spec: TargetSpec) -> None:
    path = tmp_path / "medusa_lm_head.pt"
    tensor = torch.zeros(3)
    torch.save({"0.0.weight": tensor}, path, _use_new_zipfile_serialization=False)
    key = str(tensor.untyped_storage()._cdata).encode()
    head, _, tail = path.read_bytes().rpartition(key)  # the last is in the list of what follows
    path.write_bytes(head + b"0" * len(key) + tail)
    with pytest.raises(KoalaBenchError, match=r"medusa_lm_head\.pt is damaged"):
        medusa.read(tmp_path, spec)


def test_missing_folders_and_files_are_named(tmp_path: Path, spec: TargetSpec) -> None:
    with pytest.raises(KoalaBenchError, match="There is no folder"):
        medusa.read(tmp_path / "nowhere", spec)
    with pytest.raises(KoalaBenchError, match=r"holds no medusa_lm_head.safetensors or medusa_lm_head.pt"):
        medusa.read(tmp_path, spec)
    with pytest.raises(KoalaBenchError, match=r"holds no model.safetensors or pytorch_model.bin"):
        eagle.read(tmp_path, spec)


# ------------------------------------------------------------------------------ EAGLE


@pytest.mark.parametrize(("layers", "bias"), [(1, True), (3, False)])
def test_a_draft_of_its_own_shape_fits_the_head(tmp_path: Path, spec: TargetSpec, layers: int, bias: bool) -> None:
    tensors = _draft_tensors(spec, layers, bias)
    found = eagle.read(_draft(tmp_path, tensors, num_hidden_layers=layers, rope_theta=500.0), spec)
    assert found.options == {
        "layers": layers,
        "attention_heads": 4,
        "kv_heads": 2,
        "intermediate": 20,
        "rope_base": 500.0,
        "norm_eps": 1e-5,
        "bias": bias,
    }
    assert "embed_tokens.weight" not in found.tensors
    head = make_head(found, spec, noise=0.0)
    assert head.noise == 0.0
    assert all(torch.equal(value, tensors[name]) for name, value in head.state_dict().items())


def test_without_rope_theta_the_base_is_upstreams_not_the_targets(tmp_path: Path, spec: TargetSpec) -> None:
    tensors = _draft_tensors(spec)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(_draft_config()))
    assert eagle.read(tmp_path, spec).options["rope_base"] == 10000.0


def test_the_embedding_must_be_a_copy_of_the_targets(tmp_path: Path, spec: TargetSpec) -> None:
    tensors = _draft_tensors(spec)
    tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"].bfloat16()
    assert eagle.read(_draft(tmp_path, tensors), spec).notes == (
        "The embedding is a copy of the target's and was dropped.",
    )
    tensors["embed_tokens.weight"][[4, 9]] += 0.1
    _draft(tmp_path, tensors)
    with pytest.raises(KoalaBenchError, match="made for another target: its embedding differs in 2 of 30 rows"):
        eagle.read(tmp_path, spec)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 2}, r"misses layers\.1\.input_layernorm\.weight, .* and 5 more"),
        ({"bias": False}, r"unknown fc\.bias"),
        ({"num_key_value_heads": 4}, r"k_proj\.weight of shape \[8, 16\] instead of \[16, 16\]"),
        ({"hidden_act": "gelu"}, "activation is 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"positions are scaled \('linear'\)"),
        ({"num_attention_heads": 3}, "is no attention layer"),
        ({"head_dim": 8}, "head_dim 8"),
    ],
)
def test_a_configuration_that_contradicts_the_file_is_named(
    tmp_path: Path, spec: TargetSpec, config: dict[str, Any], message: str
) -> None:
    _draft(tmp_path, _draft_tensors(spec), **config)
    with pytest.raises(KoalaBenchError, match=message) as caught:
        eagle.read(tmp_path, spec)
    assert "\n" not in str(caught.value)


def test_a_missing_configuration_or_field_is_named(tmp_path: Path, spec: TargetSpec) -> None:
    _draft(tmp_path, _draft_tensors(spec))
    config = _draft_config()
    del config["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(KoalaBenchError, match=r"config\.json has no 'num_attention_heads'"):
        eagle.read(tmp_path, spec)
    (tmp_path / "config.json").unlink()
    with pytest.raises(KoalaBenchError, match=r"holds no config\.json"):
        eagle.read(tmp_path, spec)


def test_successors_of_eagle_are_told_apart(tmp_path: Path, spec: TargetSpec) -> None:
    _draft(
        tmp_path,
        {
            "midlayer.self_attn.q_proj.weight": torch.zeros(WIDTH, 2 * WIDTH),
            "fc.weight": torch.zeros(WIDTH, 3 * WIDTH),
            "d2t": torch.zeros(4),
        },
    )
    with pytest.raises(KoalaBenchError, match="EAGLE-3 and other successors"):
        eagle.read(tmp_path, spec)
