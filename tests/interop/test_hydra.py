"""Reading and writing official Hydra checkpoints: strictly, with or without a prefix layer and places of dropouts,
whatever config.json says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from heads.hydra import Hydra
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.interop import hydra
from koala_bench.interop.checkpoints import make_head

WIDTH, VOCAB = 32, 259
FILE = "hydra_lm_head.pt"


def official(
    heads: int = 2, layers: int = 2, prefix: bool = False, dropout: bool = False, tied: bool = False
) -> dict[str, torch.Tensor]:
    """Tensors as upstream saves them, written down from its modules."""
    torch.manual_seed(0)
    tensors = {}
    places = range(1, 2 * layers, 2) if dropout else range(layers)
    for head in range(heads):
        at = f"hydra_mlp.{head}"
        repeated = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)
        for place in places:
            if place == places[0]:
                for name in ("linear", "res_connection"):
                    tensors |= {
                        f"{at}.{place}.{name}.weight": torch.randn(WIDTH, (head + 2) * WIDTH),
                        f"{at}.{place}.{name}.bias": torch.randn(WIDTH),
                    }
            else:
                block = repeated if tied else (torch.randn(WIDTH, WIDTH), torch.randn(WIDTH))
                tensors |= {f"{at}.{place}.linear.weight": block[0], f"{at}.{place}.linear.bias": block[1]}
        output = f"hydra_lm_head.{head}.1" if dropout else f"hydra_lm_head.{head}"
        tensors |= {f"{output}.weight": torch.randn(VOCAB, WIDTH), f"{output}.bias": torch.randn(VOCAB)}
    if prefix:
        own = "prefix_embeding_layer"
        sizes = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}
        tensors |= {f"{own}.layers.0.self_attn.{name}_proj.weight": torch.randn(shape) for name, shape in sizes.items()}
        sizes = {"gate": (64, 32), "up": (64, 32), "down": (32, 64)}
        tensors |= {f"{own}.layers.0.mlp.{name}_proj.weight": torch.randn(shape) for name, shape in sizes.items()}
        tensors |= {
            f"{own}.layers.0.{name}.weight": torch.randn(WIDTH)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        tensors |= {f"{own}.norm.weight": torch.randn(WIDTH)}
    return tensors


def folder_of(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    torch.save(tensors, folder / FILE)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def refusal(folder: Path, target: Target) -> KoalaBenchError:
    with pytest.raises(KoalaBenchError) as caught:
        hydra.read(folder, target.spec())
    assert "\n" not in str(caught.value) and caught.value.remedy
    return caught.value


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(("heads", "layers"), [(1, 1), (4, 1), (2, 3)])
def test_heads_layers_prefix_and_dropouts_come_from_the_keys(
    tmp_path: Path, target: Target, heads: int, layers: int, prefix: bool, dropout: bool
) -> None:
    tensors = official(heads, layers, prefix, dropout)
    found = hydra.read(folder_of(tmp_path, tensors), target.spec())
    assert (found.head, found.options) == ("hydra", {"heads": heads, "layers": layers, "prefix": prefix})
    head = make_head(found, target.spec())
    state, step = head.state_dict(), 2 if dropout else 1
    assert len(state) == len(tensors)
    last = heads - 1
    assert torch.equal(
        state[f"heads.{last}.first.linear.weight"], tensors[f"hydra_mlp.{last}.{step - 1}.linear.weight"]
    )
    assert torch.equal(
        state[f"heads.{last}.first.residual.bias"], tensors[f"hydra_mlp.{last}.{step - 1}.res_connection.bias"]
    )
    assert torch.equal(
        state["heads.0.output.weight"], tensors["hydra_lm_head.0.1.weight" if dropout else "hydra_lm_head.0.weight"]
    )
    for block in range(layers - 1):
        assert torch.equal(
            state[f"heads.0.blocks.{block}.linear.weight"],
            tensors[f"hydra_mlp.0.{step * (block + 2) - 1}.linear.weight"],
        )
    if prefix:
        assert torch.equal(
            state["prefix.layer.self_attn.k_proj.weight"],
            tensors["prefix_embeding_layer.layers.0.self_attn.k_proj.weight"],
        )
        assert torch.equal(state["prefix.norm.weight"], tensors["prefix_embeding_layer.norm.weight"])


@pytest.mark.parametrize(("prefix", "dropout"), [(False, False), (True, True)])
def test_what_upstream_saves_is_written_again(tmp_path: Path, target: Target, prefix: bool, dropout: bool) -> None:
    """Upstream has dropouts where it has a prefix layer, and only there."""
    tensors = official(3, 4, prefix, dropout)
    found = hydra.read(folder_of(tmp_path, tensors), target.spec())
    made = hydra.to_official(make_head(found, target.spec()), found.tensors, target)
    assert made.file == FILE and made.tensors.keys() == tensors.keys()
    assert all(torch.equal(made.tensors[name], tensor) for name, tensor in tensors.items())
    assert {**made.config, "base_model_name_or_path": ""} == {
        "hydra_num_heads": 3, "hydra_num_layers": 4, "hydra_head_arch": "prefix-mlp" if prefix else "mlp",
        "grounded_heads": True,
        "hidden_state_offset": 0, "base_model_name_or_path": "",
    }  # fmt: skip
    assert made.notes == (
        "Upstream's model applies one block 3 times behind the first: its own loader cannot use these 3 distinct ones.",
    )


def test_a_configuration_that_lies_is_noted_and_not_believed(tmp_path: Path, target: Target) -> None:
    lies = {
        "hydra_num_heads": 4,
        "hydra_num_layers": 1,
        "hydra_head_arch": "prefix-mlp",
        "grounded_heads": False,
        "hidden_state_offset": 0,
    }
    found = hydra.read(folder_of(tmp_path, official(2, 2), **lies), target.spec())
    assert found.options == {"heads": 2, "layers": 2, "prefix": False}
    contradictions = (("num_heads", 4, 2), ("num_layers", 1, 2), ("head_arch", "prefix-mlp", "mlp"))
    notes = [f"config.json says hydra_{name} {lie}, the file has {truth}." for name, lie, truth in contradictions]
    assert found.notes == (*notes, "config.json says grounded_heads False, the file has True.")


def test_heads_over_an_earlier_state_are_refused(tmp_path: Path, target: Target) -> None:
    folder_of(tmp_path, official(), hidden_state_offset=1)
    assert "hidden_state_offset is 1" in refusal(tmp_path, target).message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_state_offset": "0"}, "hidden_state_offset is '0', "),
        ({"hydra_num_heads": [2]}, "hydra_num_heads is [2], "),
        ({"hydra_num_layers": 0}, "hydra_num_layers is 0, "),
        ({"hydra_head_arch": 5}, "hydra_head_arch is 5, "),
        ({"grounded_heads": "false"}, "grounded_heads is 'false', "),
    ],
)
def test_a_malformed_configuration_is_named(
    tmp_path: Path, target: Target, config: dict[str, Any], message: str
) -> None:
    assert f"config.json: {message}" in refusal(folder_of(tmp_path, official(), **config), target).message


def test_tied_blocks_are_reported(tmp_path: Path, target: Target) -> None:
    tensors = official(2, 4, tied=True)
    found = hydra.read(folder_of(tmp_path, tensors), target.spec())
    assert found.notes == (
        (
            "The 3 residual blocks behind the first of every head are identical copies: upstream applies one block 3"
            " times."
        ),
    )
    assert hydra.to_official(Hydra(target.spec(), heads=2, layers=4), found.tensors, target).notes == ()
    tensors["hydra_mlp.0.2.linear.bias"] = torch.zeros(WIDTH)
    found = hydra.read(folder_of(tmp_path, tensors), target.spec())
    assert found.notes == (
        "The 3 residual blocks behind the first are identical copies in heads 1 and distinct in the others.",
    )
    (note,) = hydra.to_official(Hydra(target.spec(), heads=2, layers=4), found.tensors, target).notes
    assert note.endswith("its own loader cannot use the distinct ones of heads 0.")
    assert hydra.read(folder_of(tmp_path, official(2, 2)), target.spec()).notes == ()


def test_the_prefixs_unread_embedding_is_dropped(tmp_path: Path, target: Target) -> None:
    """The prefix is a whole model upstream, whose embedding nobody calls."""
    tensors = official(prefix=True, dropout=True) | {
        "prefix_embeding_layer.embed_tokens.weight": torch.randn(VOCAB, WIDTH)
    }
    found = hydra.read(folder_of(tmp_path, tensors), target.spec())
    assert len(found.tensors) == len(tensors) - 1
    assert found.notes == (
        "prefix_embeding_layer.embed_tokens.weight is never read, by upstream neither, and was dropped.",
    )


def test_everything_wrong_with_the_keys_is_in_one_line(tmp_path: Path, target: Target) -> None:
    tensors = official(3, 2, prefix=True)
    del tensors["hydra_mlp.1.0.linear.bias"], tensors["hydra_lm_head.2.weight"]
    tensors["hydra_mlp.0.1.res_connection.weight"] = torch.zeros(2)
    tensors["hydra_mlp.0.0.linear.weight"] = torch.zeros(WIDTH, WIDTH)
    tensors["prefix_embeding_layer.norm.weight"][3] = float("nan")
    folder_of(tmp_path, tensors)
    notes = refusal(tmp_path, target).message
    for part in (
        "misses hydra_lm_head.2.weight, hydra_mlp.1.0.linear.bias",
        "unknown hydra_mlp.0.1.res_connection.weight",
        "hydra_mlp.0.0.linear.weight of shape [32, 32] instead of [32, 64]",
        "not finite in prefix_embeding_layer.norm.weight",
    ):
        assert part in notes


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"0.0.linear.weight": torch.zeros(2)}, "has no hydra_mlp.0.0.linear.weight or hydra_mlp.0.1.linear.weight"),
        (official() | {"hydra_lm_head.999.weight": torch.zeros(2)}, "has a head 999, but no head 2"),
        (official() | {"hydra_mlp.0.999.linear.weight": torch.zeros(2)}, "has a block 999, but no block 2"),
        (
            official() | {"hydra_mlp.99999999.0.linear.weight": torch.zeros(2)},
            "has an unknown hydra_mlp.99999999.0.linear.weight",
        ),
        (
            {name: tensor for name, tensor in official().items() if "res_connection" not in name},
            "no res_connection in any hydra_mlp",
        ),
    ],
)
def test_other_networks_are_told_apart(
    tmp_path: Path, target: Target, tensors: dict[str, torch.Tensor], message: str
) -> None:
    folder_of(tmp_path, tensors)
    assert message in refusal(tmp_path, target).message


def test_heads_for_another_target_are_refused_by_shape(tmp_path: Path, target: Target) -> None:
    folder_of(
        tmp_path, official() | {f"hydra_lm_head.{head}.weight": torch.zeros(VOCAB + 2, WIDTH) for head in range(2)}
    )
    assert "hydra_lm_head.0.weight of shape [261, 32] instead of [259, 32]" in refusal(tmp_path, target).message


def test_a_damaged_or_missing_file_is_named(tmp_path: Path, target: Target) -> None:
    assert f"holds no {FILE}" in refusal(tmp_path, target).message
    (tmp_path / FILE).write_bytes(b"not a checkpoint")
    assert f"{FILE} is damaged" in refusal(tmp_path, target).message
