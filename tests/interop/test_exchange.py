"""Heads of others both ways: what is exported computes the same when it is read as the other system reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from heads.eagle import Eagle
from heads.medusa import Medusa
from koala_bench.contract.bench import drafts_along, random_ids
from koala_bench.engine.graphs.replay import Recorded
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.interop import layouts
from koala_bench.interop.layouts import LAYOUTS, export_head, import_head
from koala_bench.presets import MethodPreset
from koala_bench.training.checkpoints import load_head, save_head
from koala_bench.training.loop import build_head
from koala_bench.tree import load_template
from tests.support.bad_input.spoiling import full_disk
from tests.support.commands import EAGER, Koala

METHODS = {
    "medusa": MethodPreset(head="medusa", options={"heads": 3}, tree="chain-2"),
    "medusa of two layers": MethodPreset(head="medusa", layers=2, options={"heads": 2}, tree="chain-2"),
    "eagle": MethodPreset(head="eagle", tree="chain-2"),
    "eagle of two layers": MethodPreset(head="eagle", layers=2, tree="chain-2"),
    "eagle without a bias": MethodPreset(head="eagle", layers=2, options={"bias": False}, tree="chain-2"),
    "eagle with fewer heads": MethodPreset(
        head="eagle", options={"attention_heads": 4, "kv_heads": 1, "intermediate": 20}, tree="chain-2"
    ),
    "hydra": MethodPreset(head="hydra", options={"heads": 3}, tree="chain-2"),
    "hydra of three layers": MethodPreset(head="hydra", layers=3, options={"heads": 2}, tree="chain-2"),
    "hydra with a prefix": MethodPreset(head="hydra", layers=3, options={"heads": 2, "prefix": True}, tree="chain-2"),
    "eagle3": MethodPreset(head="eagle3", tree="chain-2"),
    "eagle3 of a shape of its own": MethodPreset(
        head="eagle3",
        options={"attention_heads": 2, "kv_heads": 1, "intermediate": 20, "rope_base": 500.0, "norm_eps": 1e-5},
        tree="chain-2",
    ),
    "eagle3 of fewer tokens": MethodPreset(head="eagle3", draft_vocabulary=40, tree="chain-2"),
}


@pytest.fixture(scope="module")
def own(target_folder: Path) -> Target:
    return load_target(str(target_folder), "cpu", "float32")


def saved(own: Target, method: str, folder: Path) -> nn.Module:
    """A head of random weights, and its folder."""
    order = torch.randperm(own.model.config.vocab_size, generator=torch.Generator().manual_seed(5))
    head = build_head(own, METHODS[method], seed=3, order=order)
    torch.manual_seed(4)
    for parameter in head.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    save_head(folder, head, METHODS[method], own, {})
    return head.eval()


@pytest.mark.parametrize("method", METHODS)
def test_what_is_exported_officially_is_imported_as_it_was(own: Target, method: str, tmp_path: Path) -> None:
    head = saved(own, method, tmp_path / "head")
    export_head(tmp_path / "head", own, "official", tmp_path / "official", None)
    imported = import_head(tmp_path / "official", own, tmp_path / "again")
    again, config, _ = load_head(tmp_path / "again", own)
    assert (config["head"], config["layers"]) == (METHODS[method].head, METHODS[method].layers)
    assert list(again.state_dict()) == list(head.state_dict())
    for name, tensor in head.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    manifest = json.loads((tmp_path / "again" / "training.json").read_text())
    assert manifest["imported"]["notes"] == list(imported.notes) and manifest["target"]["weights_sha256"]
    ids = random_ids(1, 14)[0].tolist()
    drafts = [
        [tree.tokens.tolist() for _, tree in drafts_along(each, own, load_template("2x2"), ids, 8)]
        for each in (head, again)
    ]
    assert drafts[0] == drafts[1]


@pytest.mark.parametrize("method", METHODS)
def test_an_imported_head_is_exported_as_it_came(own: Target, method: str, tmp_path: Path) -> None:
    saved(own, method, tmp_path / "head0")
    written = []
    for turn in range(2):
        path = export_head(tmp_path / f"head{turn}", own, "official", tmp_path / f"official{turn}", None)[0]
        written.append(torch.load(path, weights_only=True))
        import_head(tmp_path / f"official{turn}", own, tmp_path / f"head{turn + 1}")
    assert list(written[0]) == list(written[1])
    assert all(
        tensor.dtype == written[1][name].dtype and torch.equal(tensor, written[1][name])
        for name, tensor in written[0].items()
    )


class BlockOfLayers(nn.Module):
    """vLLM's ``ResidualBlock``, written down from its description: every linear layer has a residual."""

    def __init__(self, width: int, layers: int, bias: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=bias) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + F.silu(layer(x))
        return x


@pytest.mark.parametrize("method", ["medusa", "medusa of two layers"])
def test_vllms_medusa_computes_the_same(own: Target, method: str, tmp_path: Path) -> None:
    head = saved(own, method, tmp_path / "head")
    assert isinstance(head, Medusa)
    export_head(tmp_path / "head", own, "vllm", tmp_path / "vllm", None)
    config = json.loads((tmp_path / "vllm" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("medusa", ["MedusaModel"])
    # Its configuration renames every key with "num" and "heads" or "layers" in it: two must not become one.
    assert (
        sum("num" in key and "heads" in key for key in config)
        == sum("num" in key and "layers" in key for key in config)
        == 1
    )
    theirs = nn.ModuleDict(
        {
            "blocks": nn.ModuleList(
                BlockOfLayers(config["hidden_size"], config["num_hidden_layers"], config["medusa_fc_bias"])
                for _ in range(config["num_heads"])
            ),
            "lm_heads": nn.ModuleList(
                nn.Linear(config["hidden_size"], config["truncated_vocab_size"], bias=False)
                for _ in range(config["num_heads"])
            ),
        }
    )
    theirs.load_state_dict(load_file(tmp_path / "vllm" / "model.safetensors"))
    states = torch.randn(5, config["hidden_size"])
    for index in range(config["num_heads"]):
        ours = F.linear(head.blocks(states, index), head.output_weight[index])  # type: ignore[index]
        torch.testing.assert_close(theirs["lm_heads"][index](theirs["blocks"][index](states)), ours)


def test_vllms_medusa_with_one_output_layer_for_all(own: Target, tmp_path: Path) -> None:
    preset = MethodPreset(head="medusa", options={"heads": 3, "own_output": False}, tree="chain-2")
    save_head(tmp_path / "head", build_head(own, preset, 0), preset, own, {})
    export_head(tmp_path / "head", own, "vllm", tmp_path / "vllm", None)
    tensors = load_file(tmp_path / "vllm" / "model.safetensors")
    assert [name for name in tensors if name.startswith("lm_heads")] == ["lm_heads.0.weight"]
    assert json.loads((tmp_path / "vllm" / "config.json").read_text())["original_lm_head"] is True
    with pytest.raises(KoalaBenchError, match="no official layout"):
        export_head(tmp_path / "head", own, "official", tmp_path / "official", None)


def test_vllms_eagle_is_a_llama_without_a_bias(own: Target, tmp_path: Path) -> None:
    head = saved(own, "eagle without a bias", tmp_path / "head")
    assert isinstance(head, Eagle)
    export_head(tmp_path / "head", own, "vllm", tmp_path / "vllm", torch.float16)
    tensors, config = (
        load_file(tmp_path / "vllm" / "model.safetensors"),
        json.loads((tmp_path / "vllm" / "config.json").read_text()),
    )
    assert set(tensors) == {"embed_tokens.weight", *head.state_dict()}
    assert (config["architectures"], config["num_hidden_layers"], config["torch_dtype"]) == (
        ["LlamaForCausalLM"],
        2,
        "float16",
    )
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
    saved(own, "eagle", tmp_path / "biased")
    with pytest.raises(KoalaBenchError, match=r"vLLM's EAGLE has no fc\.bias"):
        export_head(tmp_path / "biased", own, "vllm", tmp_path / "refused", None)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("method", ["hydra"])
def test_a_layout_that_a_head_has_not_is_refused(own: Target, method: str, tmp_path: Path) -> None:
    saved(own, method, tmp_path / "head")
    with pytest.raises(KoalaBenchError, match=rf"no vllm layout for the head '{method}'\. Use --layout official"):
        export_head(tmp_path / "head", own, "vllm", tmp_path / "refused", None)
    assert not (tmp_path / "refused").exists()


def test_eagle3_of_several_layers_has_no_official_place(own: Target, tmp_path: Path) -> None:
    preset = MethodPreset(head="eagle3", layers=2, tree="chain-2")
    save_head(tmp_path / "head", build_head(own, preset, 0), preset, own, {})
    with pytest.raises(KoalaBenchError, match="no place for 2 layers"):
        export_head(tmp_path / "head", own, "official", tmp_path / "refused", None)
    assert not (tmp_path / "refused").exists()


def test_ids_are_not_rounded_by_the_dtype_of_an_export(own: Target, tmp_path: Path) -> None:
    saved(own, "eagle3 of fewer tokens", tmp_path / "head")
    path = export_head(tmp_path / "head", own, "official", tmp_path / "official", torch.bfloat16)[0]
    assert {
        name: tensor.dtype
        for name, tensor in torch.load(path, weights_only=True).items()
        if tensor.dtype != torch.bfloat16
    } == {"d2t": torch.int64, "t2d": torch.bool}


@pytest.mark.parametrize(("method", "layout"), [("medusa", "official"), ("medusa", "vllm")])
def test_an_export_that_fails_leaves_nothing_and_can_be_repeated(
    own: Target, method: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path, text: str) -> None:
        raise KoalaBenchError(f"Cannot write {path}.", "Free space.")

    saved(own, method, tmp_path / "head")
    out = tmp_path / "out"
    for kilobytes in (0, 20):
        with (
            full_disk(kilobytes),
            pytest.raises(KoalaBenchError, match=r"(medusa_lm_head\.pt|model\.safetensors): .*Free space"),
        ):
            export_head(tmp_path / "head", own, layout, out, None)
        assert list(out.iterdir()) == []
    with monkeypatch.context() as patch, pytest.raises(KoalaBenchError, match="config"):
        patch.setattr(layouts, "write_text", fails)
        export_head(tmp_path / "head", own, layout, out, None)
    assert list(out.iterdir()) == []
    assert all(path.is_file() for path in export_head(tmp_path / "head", own, layout, out, None))


def test_an_import_that_failed_can_be_repeated(own: Target, tmp_path: Path) -> None:
    """It leaves a configuration at most, which is one of a head of ours."""
    saved(own, "medusa", tmp_path / "head")
    export_head(tmp_path / "head", own, "official", tmp_path / "official", None)
    with full_disk(20), pytest.raises(KoalaBenchError, match=r"model\.safetensors: .*Free space"):
        import_head(tmp_path / "official", own, tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["config.json", "training.json"]
    import_head(tmp_path / "official", own, tmp_path / "again")
    load_head(tmp_path / "again", own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda ids: ids.index_fill(0, torch.tensor([1, 2]), 259),
            "draft_vocabulary holds 2 ids outside of the target's 259 tokens",
        ),
        (lambda ids: ids - 1 - ids.min(), "draft_vocabulary holds 1 ids outside"),
        (lambda ids: ids.index_fill(0, torch.tensor([1]), int(ids[0])), "draft_vocabulary holds an id more than once"),
        (lambda ids: ids.float(), "draft_vocabulary is of torch.float32, no whole numbers"),
        (lambda ids: ids[:-1], "size mismatch for lm_head"),
    ],
)
def test_a_damaged_draft_vocabulary_is_found_when_it_is_loaded(
    own: Target, tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    saved(own, "eagle3 of fewer tokens", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"draft_vocabulary": change(tensors["draft_vocabulary"])}, tmp_path / "model.safetensors")
    with pytest.raises(KoalaBenchError, match=rf"The weights in {tmp_path} do not fit the head 'eagle3': {message}"):
        load_head(tmp_path, own)


def test_a_file_of_eagles_name_that_is_none_says_what_was_looked_for(own: Target, tmp_path: Path) -> None:
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(
        KoalaBenchError,
        match=r"neither an EAGLE-1 nor an EAGLE-3 head: nothing in it is called layers\.\* or midlayer\.\*",
    ):
        import_head(tmp_path, own, tmp_path / "out")


def test_a_checkpoint_finer_than_its_target_keeps_its_digits(target_folder: Path, own: Target, tmp_path: Path) -> None:
    head = saved(own, "medusa", tmp_path / "head")
    export_head(tmp_path / "head", own, "official", tmp_path / "official", None)
    import_head(tmp_path / "official", load_target(str(target_folder), "cpu", "bfloat16"), tmp_path / "again")
    stored = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in head.state_dict().items())


def test_the_commands_and_an_evaluation_with_an_imported_head(
    koala: Koala, own: Target, target_folder: Path, tmp_path: Path
) -> None:
    saved(own, "medusa", tmp_path / "head")
    at = ["--target", str(target_folder), *EAGER]
    done = koala("export", str(tmp_path / "head"), "--out", str(tmp_path / "official"), *at)
    assert done.code == 0 and sorted(path.name for path in (tmp_path / "official").iterdir()) == [
        "config.json",
        "medusa_lm_head.pt",
    ]
    done = koala("import", str(tmp_path / "official"), "--out", str(tmp_path / "heads" / "medusa"), *at)
    assert done.code == 0, done.err
    decode = [
        "--methods", "vanilla,medusa", "--tree", "chain-2", "--limit", "1", "--max-new-tokens", "4", "--set",
        "evaluation.warmup=0",
    ]  # fmt: skip
    done = koala("evaluate", "--heads", str(tmp_path / "heads"), "--out", str(tmp_path / "out"), *decode, *at)
    assert done.code == 0, done.err


def test_neither_command_records_a_pass(
    koala: Koala, own: Target, target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("nothing is decoded")

    monkeypatch.setattr(Recorded, "__call__", refuse)
    saved(own, "medusa", tmp_path / "head")
    at = ["--target", str(target_folder), "--set", "target.engine=graph"]
    assert koala("export", str(tmp_path / "head"), "--out", str(tmp_path / "official"), *at).code == 0
    assert koala("import", str(tmp_path / "official"), "--out", str(tmp_path / "again"), *at).code == 0


def test_the_official_layout_is_written_for_every_head_that_can_be_exported() -> None:
    from koala_bench.interop.layouts import WRITERS

    assert all("official" in writers and set(writers) <= set(LAYOUTS) for writers in WRITERS.values())
