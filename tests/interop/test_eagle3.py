"""Reading and writing official EAGLE-3 checkpoints: strictly, with or without a draft vocabulary, told from EAGLE-1 by
what is in the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.interop import eagle3
from koala_bench.interop.checkpoints import make_head
from koala_bench.interop.layouts import import_head

WIDTH, VOCAB = 32, 259


def config_of(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB, "draft_vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 1,
        "intermediate_size": 20, "rms_norm_eps": 1e-5, "rope_theta": 500.0, "hidden_act": "silu", **changes,
    }  # fmt: skip


def official(drafted: int = VOCAB) -> dict[str, torch.Tensor]:
    """Tensors under upstream's names; where fewer tokens are drafted, with the maps."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"fc": (WIDTH, 3 * WIDTH), "norm": (WIDTH,), "lm_head": (drafted, WIDTH)}
    for name, shape in (("q", (WIDTH, 2 * WIDTH)), ("k", (8, 2 * WIDTH)), ("v", (8, 2 * WIDTH)), ("o", (WIDTH, WIDTH))):
        shapes[f"midlayer.self_attn.{name}_proj"] = shape
    for name, shape in (("gate", (20, WIDTH)), ("up", (20, WIDTH)), ("down", (WIDTH, 20))):
        shapes[f"midlayer.mlp.{name}_proj"] = shape
    shapes |= {f"midlayer.{name}": (WIDTH,) for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")}
    tensors = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    if drafted < VOCAB:
        ids = torch.randperm(VOCAB)[:drafted].sort().values
        tensors |= {
            "d2t": ids - torch.arange(drafted),
            "t2d": torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, ids, True),
        }
    return tensors


def folder_of(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(**config)))
    return folder


def refusal(folder: Path, target: Target) -> str:
    with pytest.raises(KoalaBenchError) as caught:
        eagle3.read(folder, target.spec())
    assert "\n" not in str(caught.value) and caught.value.remedy
    return caught.value.message


@pytest.mark.parametrize("drafted", [VOCAB, 40])
def test_a_draft_of_its_own_shape_and_vocabulary_fits_the_head(tmp_path: Path, target: Target, drafted: int) -> None:
    tensors = official(drafted)
    found = eagle3.read(folder_of(tmp_path, tensors, draft_vocab_size=drafted), target.spec())
    shape = {"attention_heads": 4, "kv_heads": 1, "intermediate": 20, "rope_base": 500.0, "norm_eps": 1e-5}
    assert (found.head, found.options) == ("eagle3", {"layers": 1, **shape})
    assert found.notes == ()
    head = make_head(found, target.spec())
    state = head.state_dict()
    if drafted < VOCAB:
        assert torch.equal(state.pop("draft_vocabulary"), torch.arange(drafted) + tensors["d2t"])
    assert state.keys() == {name for name in tensors if name not in ("d2t", "t2d")}
    assert all(torch.equal(value, tensors[name]) for name, value in state.items())
    made = eagle3.to_official(head, found.tensors, target)
    assert made.tensors.keys() == tensors.keys() and all(
        torch.equal(made.tensors[name], tensor) for name, tensor in tensors.items()
    )
    assert all(made.config[name] == value for name, value in config_of(draft_vocab_size=drafted).items())


def test_maps_that_map_nothing_are_no_draft_vocabulary(tmp_path: Path, target: Target) -> None:
    """Upstream's buffers where the vocabularies are the same: made, and never filled; or filled in full."""
    for known in (False, True):
        maps = {"d2t": torch.zeros(VOCAB, dtype=torch.int64), "t2d": torch.full((VOCAB,), known)}
        found = eagle3.read(folder_of(tmp_path, official() | maps), target.spec())
        assert found.tensors.keys() == official().keys()


def test_the_reader_is_chosen_by_what_is_in_the_file(tmp_path: Path, target: Target) -> None:
    torch.save(
        {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in official(40).items()},
        tmp_path / "pytorch_model.bin",
    )
    (tmp_path / "config.json").write_text(json.dumps(config_of(draft_vocab_size=40)))
    found = import_head(tmp_path, target, tmp_path / "head")
    assert (
        found.head == "eagle3"
        and found.tensors["fc.weight"].dtype == torch.float32
        and found.tensors["draft_vocabulary"].dtype == torch.int64
    )


def test_a_configuration_that_lies_is_noted(tmp_path: Path, target: Target) -> None:
    folder_of(tmp_path, official(40), draft_vocab_size=32000, num_hidden_layers=2, vocab_size=300)
    assert eagle3.read(tmp_path, target.spec()).notes == (
        "config.json says draft_vocab_size 32000, the file has 40.",
        "config.json says num_hidden_layers 2, the file has 1.",
        "config.json says vocab_size 300, the target has 259.",
    )


def test_an_embedding_must_be_a_copy_of_the_targets(tmp_path: Path, target: Target) -> None:
    tensors = official() | {"embed_tokens.weight": target.embed(torch.arange(VOCAB)).bfloat16()}
    assert eagle3.read(folder_of(tmp_path, tensors), target.spec()).notes == (
        "The embedding is a copy of the target's and was dropped.",
    )
    tensors["embed_tokens.weight"][7] += 1
    folder_of(tmp_path, tensors)
    assert "made for another target: its embedding differs in 1 of 259 rows" in refusal(tmp_path, target)


def ids_of(tensors: dict[str, torch.Tensor], *changes: tuple[int, int]) -> dict[str, torch.Tensor]:
    """With other ids of some drafted tokens."""
    d2t = tensors["d2t"].clone()
    for place, token in changes:
        d2t[place] = token - place
    return {**tensors, "d2t": d2t}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({name: tensor for name, tensor in official(40).items() if name != "d2t"}, "misses d2t"),
        (official() | {"d2t": torch.zeros(40, dtype=torch.int64)}, "d2t of shape [40] instead of [259]"),
        (official(40) | {"t2d": torch.zeros(40, dtype=torch.bool)}, "t2d of shape [40] instead of [259]"),
        (official(40) | {"d2t": torch.zeros(40)}, "d2t is of torch.float32"),
        (official(40) | {"t2d": torch.zeros(VOCAB)}, "t2d is of torch.float32"),
        (ids_of(official(40), (3, 259), (4, -1)), "d2t maps 2 of 40 drafted tokens to ids outside"),
        (ids_of(official(40), (3, 8), (4, 8)), "d2t maps several drafted tokens to one id"),
        (official(40) | {"t2d": torch.ones(VOCAB, dtype=torch.bool)}, "t2d and d2t disagree about 219 of 259 tokens"),
        (
            official() | {"lm_head.weight": torch.zeros(VOCAB + 2, WIDTH)},
            "lm_head.weight of shape [261, 32] instead of [259, 32]",
        ),
        (official() | {"lm_head.weight": torch.zeros(0, WIDTH)}, "lm_head.weight of shape [0, 32]"),
        (official() | {"fc.weight": torch.zeros(WIDTH, 2 * WIDTH)}, "fc.weight of shape [32, 64] instead of [32, 96]"),
        (
            {name: tensor for name, tensor in official().items() if "norm" not in name},
            "misses midlayer.hidden_norm.weight, midlayer.input_layernorm.weight",
        ),
        (official() | {"fc_norm.0.weight": torch.zeros(WIDTH)}, "has an unknown fc_norm.0.weight"),
        ({"layers.0.self_attn.q_proj.weight": torch.zeros(2)}, "misses fc.weight"),
    ],
)
def test_a_foreign_or_damaged_file_is_refused_by_name(
    tmp_path: Path, target: Target, tensors: dict[str, torch.Tensor], message: str
) -> None:
    assert message in refusal(folder_of(tmp_path, tensors), target)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "gelu"}, "activation is 'gelu'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "scaled ('longrope')"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "has no 'low_freq_factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "8"}}, "factor is '8', "),
        ({"head_dim": 7}, "is no attention layer"),
        ({"head_dim": 16}, "self_attn.k_proj.weight of shape [8, 64] instead of [16, 64]"),
        ({"hidden_size": 64}, "hidden_size is 64, the target's is 32"),
        ({"sliding_window": 512}, "sliding_window is 512"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}, "names the inputs of the target's layers 0, 1, 2"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1]}, "names the inputs of the target's layers 0, 1."),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state is false"),
        ({"num_attention_heads": 5}, "is no attention layer"),
        ({"num_attention_heads": "four"}, "num_attention_heads is 'four', "),
        ({"norm_before_residual": "false"}, "norm_before_residual is 'false', "),
        ({"draft_vocab_size": "all"}, "draft_vocab_size is 'all', "),
        ({"eagle_config": "none"}, "eagle_config is 'none', "),
        ({"eagle_aux_hidden_state_layer_ids": 3}, "eagle_aux_hidden_state_layer_ids is 3, "),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": ["a"]}}, "eagle_aux_hidden_state_layer_ids is ['a'], "),
        ({"norm_output": True}, "norm_output is set"),
        ({"norm_before_fc": True}, "norm_before_fc is set"),
        ({"intermediate_size": 24}, "mlp.down_proj.weight of shape [32, 20] instead of [32, 24]"),
    ],
)
def test_a_configuration_of_another_network_is_refused(
    tmp_path: Path, target: Target, config: dict[str, Any], message: str
) -> None:
    assert message in refusal(folder_of(tmp_path, official(), **config), target)


def test_missing_files_are_named(tmp_path: Path, target: Target) -> None:
    assert "holds no model.safetensors or pytorch_model.bin" in refusal(tmp_path, target)
    folder_of(tmp_path, official())
    (tmp_path / "config.json").unlink()
    assert "holds no config.json" in refusal(tmp_path, target)
