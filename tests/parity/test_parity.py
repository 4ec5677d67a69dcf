"""Parity with recordings of the official code, and with a folder of other sizes that a naive reference records here."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from koala_bench.decoding.acceptance import Accepted, Greedy, greedy
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.loading.targets import load_target
from koala_bench.errors import KoalaBenchError
from koala_bench.interop import eagle, medusa
from koala_bench.interop.checkpoints import make_head
from koala_bench.parity import Check, check, ok, report
from koala_bench.registry import HEADS, build
from koala_bench.tree import DraftTree, TreeTemplate
from tests.support.naive_reference import EAGLE_TREE, WRONGLY_DRAFTED_TREE, Recorder

FOLDER = Path(os.environ.get("KOALA_BENCH_FIXTURES") or Path(__file__).parents[3] / "shared" / "fixtures")

needs_recordings = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="no recordings of the official code; set KOALA_BENCH_FIXTURES"
)


def _statuses(checks: Sequence[Check]) -> dict[str, str]:
    return {each.name: each.status for each in checks}


def _failed(checks: Sequence[Check]) -> list[Check]:
    return [each for each in checks if each.status == "fail"]


def _copy(parts: Sequence[str], to: Path) -> Path:
    for part in parts:
        shutil.copytree(FOLDER / part, to / part)
    return to


def _rewrite(path: Path, change: Callable[[Any], None]) -> None:
    """Change a copied JSON or safetensors file."""
    contents = load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
    change(contents)
    if path.suffix == ".safetensors":
        save_file(contents, path)
    else:
        path.write_text(json.dumps(contents))


# ------------------------------------------------------------------------------ the official recordings


@needs_recordings
def test_everything_that_is_supported_agrees_with_the_official_code() -> None:
    checks = check(FOLDER)
    assert not _failed(checks), report(checks)
    assert {each.name: each.status for each in checks if each.status != "pass"} == {
        "medusa_decode/typical/padding_accepted": "skip"
    }
    passed = {each.name for each in checks if each.status == "pass"}
    assert len(passed) >= 50
    assert {
        f"eagle_decode/decode_eagle2/{name}"
        for name in ("generated_ids", "accept_lengths", "tree_tokens", "tree_parents", "retrieve_indices")
    } <= passed
    assert {f"losses/medusa/{kind}/loss" for kind in ("per_head_linear", "shared_lm_head_version2")} <= passed


@needs_recordings
@pytest.mark.parametrize(
    ("quantity", "changed"),
    [
        ("tree_tokens", lambda step: step["tree_tokens"].__setitem__(25, 3)),
        ("tree_parents", lambda step: step["tree_parents"].__setitem__(25, 0)),
        ("tree_position_ids", lambda step: step["tree_position_ids"].__setitem__(25, 1)),
        ("retrieve_indices", lambda step: step["retrieve_indices"].reverse()),
        ("best_candidate", lambda step: step.update(best_candidate=step["best_candidate"] + 1)),
    ],
)
def test_a_changed_dynamic_tree_fails_with_the_place_of_it(
    tmp_path: Path, quantity: str, changed: Callable[[Any], None]
) -> None:
    folder = _copy(["eagle_decode"], tmp_path)
    shutil.copytree(FOLDER / "medusa_decode/target", folder / "medusa_decode/target")
    (folder / "eagle_decode/buffers.json").unlink()
    _rewrite(folder / "eagle_decode/decode_eagle2.json", lambda recorded: changed(recorded["prompts"][1]["steps"][4]))
    (failed,) = _failed(check(folder))
    assert failed.name == f"eagle_decode/decode_eagle2/{quantity}"
    assert failed.detail.startswith("prompt 1, entry 4")


@needs_recordings
def test_a_changed_loss_of_the_shared_output_layer_fails_by_name(tmp_path: Path) -> None:
    folder = _copy(["losses", "medusa_decode"], tmp_path)
    (folder / "medusa_decode/buffers.json").unlink()

    def change(recorded: Any) -> None:
        recorded["shared_lm_head_version2"]["per_head_loss"][2] *= 1.001
        recorded["shared_lm_head_version2"]["grad_l2_norms"]["1.0.linear.bias"] *= 1.01

    _rewrite(folder / "losses/medusa_loss.json", change)
    assert {each.name for each in _failed(check(folder))} == {
        f"losses/medusa/shared_lm_head_version2/{name}" for name in ("loss", "gradients")
    }


@needs_recordings
def test_a_perturbed_weight_fails_by_name(tmp_path: Path) -> None:
    folder = _copy(["medusa_tiny"], tmp_path)
    _rewrite(
        folder / "medusa_tiny/heads_layers2/medusa_lm_head.safetensors",
        lambda tensors: tensors["1.0.linear.weight"][0, 0].add_(0.1),
    )
    checks = check(folder)
    assert [each.name for each in _failed(checks)] == ["medusa_tiny/medusa_logits/layers2"]
    assert not ok(checks)
    assert "1 failed" in report(checks).splitlines()[-1]


@needs_recordings
def test_a_changed_decision_fails_with_the_place_of_it(tmp_path: Path) -> None:
    folder = _copy(["medusa_decode"], tmp_path)

    def change(recorded: Any) -> None:
        recorded["prompts"][1]["steps"][3]["tree_tokens"][5] += 1
        recorded["eos_cases"][0]["accept_lengths"][0] += 1

    _rewrite(folder / "medusa_decode/decode.json", change)
    (folder / "medusa_decode/typical.json").unlink()
    failed = {each.name: each.detail for each in _failed(check(folder))}
    assert set(failed) == {"medusa_decode/tree_tokens", "medusa_decode/eos_cases"}
    assert failed["medusa_decode/tree_tokens"].startswith("prompt 1, entry 3")


@needs_recordings
def test_missing_parts_and_files_are_skipped_by_name(tmp_path: Path) -> None:
    folder = _copy(["medusa_tiny", "losses"], tmp_path)
    shutil.rmtree(folder / "medusa_tiny/heads_layers1")
    skipped = {each.name: each.detail for each in check(folder) if each.status == "skip"}
    assert skipped == {
        "medusa_tiny/medusa_logits/layers1": "medusa_tiny/heads_layers1 is absent",
        "medusa_decode": "medusa_decode is absent",
        "eagle_tiny": "eagle_tiny is absent",
        "eagle_decode": "eagle_decode is absent",
        "losses/medusa": "medusa_decode/target, medusa_decode/heads is absent",
        "losses/eagle": "medusa_decode/target, eagle_decode/draft is absent",
    }


@needs_recordings
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("medusa_tiny/expected.safetensors", lambda data: data[: len(data) // 2]),
        ("medusa_tiny/heads_layers1/medusa_lm_head.safetensors", lambda data: b"\xff" + data[1:]),
        ("medusa_tiny/target/model.safetensors", lambda data: data[:100]),
        ("medusa_tiny/target/config.json", lambda data: data[: len(data) // 2]),
        ("medusa_tiny/heads_layers1/config.json", lambda data: b"[]"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, file: str, damage: Callable[[bytes], bytes]) -> None:
    path = _copy(["medusa_tiny"], tmp_path) / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(KoalaBenchError) as caught:
        check(tmp_path)
    assert "\n" not in str(caught.value)
    assert Path(file).parent.name in str(caught.value) or Path(file).name in str(caught.value)


@needs_recordings
def test_a_field_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = _copy(["medusa_decode"], tmp_path)
    _rewrite(folder / "medusa_decode/decode.json", lambda recorded: recorded["prompts"][0].pop("accept_lengths"))
    with pytest.raises(KoalaBenchError, match=r"decode.json has no 'accept_lengths'"):
        check(folder)


def test_a_folder_without_recordings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KoalaBenchError, match="There is no folder"):
        check(tmp_path / "nowhere")
    with pytest.raises(KoalaBenchError, match="holds none of medusa_tiny"):
        check(tmp_path)


@needs_recordings
def test_a_rope_base_that_branch_v1_ignores_is_noticed(tmp_path: Path) -> None:
    folder = _copy(["medusa_tiny", "eagle_tiny"], tmp_path)
    _rewrite(folder / "eagle_tiny/draft/config.json", lambda config: config.update(rope_theta=500000.0))
    found = {each.name: each for each in check(folder)}
    assert found["eagle_tiny/out_features"].status == "pass"
    assert "with RoPE base 10000" in found["eagle_tiny/out_features"].detail


@needs_recordings
@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_recorded_prompts_decode_to_vanillas_tokens_in_float64(kind: str) -> None:
    target = load_target(str(FOLDER / "medusa_decode/target"), "cpu", "float64", tokenizer=False)
    reader, folder, key = (
        (medusa.read, "medusa_decode/heads", "medusa_choices")
        if kind == "medusa"
        else (eagle.read, "eagle_decode/draft", "tree_choices")
    )
    head = make_head(reader(FOLDER / folder, target.spec()), target.spec())
    buffers = json.loads((FOLDER / f"{kind}_decode/buffers.json").read_text())
    template = TreeTemplate.of(kind, buffers[key])
    for entry in json.loads((FOLDER / f"{kind}_decode/decode.json").read_text())["prompts"]:
        limit = len(entry["generated_ids"])
        ours = decode(target, head, template, entry["prompt_ids"], limit, ())
        assert (
            ours.tokens
            == decode(target, Vanilla(), VANILLA_TREE, entry["prompt_ids"], limit, ()).tokens
            == entry["generated_ids"]
        )
        assert sum(ours.accepted) > len(ours.accepted)  # the head is of use


# ------------------------------------------------------------------------------ padding


def _padded_rows(template: TreeTemplate) -> list[list[int]]:
    paths = [list(path) for path in reversed(template.shape.leaf_paths)]
    return [path + [-1] * (max(map(len, paths)) - len(path)) for path in paths]


def _official_greedy(tokens: torch.Tensor, logits: torch.Tensor, rows: list[list[int]]) -> list[int]:
    """Medusa's own rule: leaf paths are padded to the longest with token 0, which is compared like any token."""
    index = torch.tensor(rows)
    candidates = torch.cat([tokens, tokens.new_zeros(1)])[index]  # -1 is the zero behind the last node
    own = logits[index].argmax(-1)  # -1 is the last node
    right = (candidates[:, 1:] == own[:, :-1]).int().cumprod(1).sum(1)
    best = int(right.argmax())
    return rows[best][: int(right[best]) + 1]


def test_padding_is_never_accepted_where_the_target_says_token_0_after_a_shallow_leaf() -> None:
    template = TreeTemplate.of(
        "uneven", [[0], [1], [0, 0], [0, 0, 0]]
    )  # the leaf (1) is two levels short of the deepest
    tokens = torch.tensor([5, 3, 4, 6, 7])
    logits = F.one_hot(torch.tensor([4, 6, 0, 7, 0]), 9).float()  # the target says 4, then 0
    official = _official_greedy(tokens, logits, _padded_rows(template))
    assert official == [0, 2, -1, -1]  # node 2, then two paddings taken for the token 0
    assert greedy(DraftTree(tokens, template.shape), logits) == Accepted((0, 2), [4, 0])


@needs_recordings
def test_recorded_cases_of_accepted_padding_end_in_the_leaf_before_it() -> None:
    template = TreeTemplate.of(
        "recorded", json.loads((FOLDER / "medusa_decode/buffers.json").read_text())["medusa_choices"]
    )
    tensors = load_file(FOLDER / "medusa_decode/typical.safetensors")
    cases = json.loads((FOLDER / "medusa_decode/typical.json").read_text())["cases"]
    padded = 0
    for case in cases:
        tokens, logits = tensors[f"case{case['case']}.node_tokens"], tensors[f"case{case['case']}.node_logits"]
        official, ours = (
            _official_greedy(tokens, logits, _padded_rows(template)),
            greedy(DraftTree(tokens, template.shape), logits).path,
        )
        assert official == case["greedy"]["path_nodes"]
        assert list(ours) == [node for node in official if node >= 0]
        padded += -1 in official
    assert padded == sum(case["padding_accepted"] for case in cases) > 0


def test_decoding_stays_lossless_where_the_target_often_says_token_0(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=256,
            initializer_range=0.4,
        )
    )
    with torch.no_grad():
        states = model.model(torch.randint(64, (8, 32))).last_hidden_state
        model.lm_head.weight[0] += 1.5 * F.normalize(states.mean((0, 1)), dim=0) + 0.5 * states[:, -1].mean(0)
    model.save_pretrained(tmp_path)
    target = load_target(str(tmp_path), "cpu", "float64", tokenizer=False)
    head = build(HEADS, "medusa", target.spec(), {"heads": 4}).double().eval()
    # The wide first level makes some drafts right by chance, and most of its nodes are leaves far above the deepest.
    template = TreeTemplate.of(
        "uneven", [*([rank] for rank in range(40)), [0, 0], [0, 0, 0], [0, 0, 0, 0], [1, 0], [2, 0]]
    )
    official_paths: list[list[int]] = []

    class Watched(Greedy):
        def accept(self, tree: DraftTree, logits: torch.Tensor) -> Accepted:
            if tree.shape is template.shape:
                official_paths.append(_official_greedy(tree.tokens, logits, _padded_rows(template)))
            return super().accept(tree, logits)

    zeros = 0
    for seed in range(4):
        prompt = torch.randint(64, (7,), generator=torch.Generator().manual_seed(seed)).tolist()
        ours = decode(target, head, template, prompt, 40, (), rule=Watched())
        vanilla = decode(target, Vanilla(), VANILLA_TREE, prompt, 40, ())
        assert ours.tokens == vanilla.tokens
        zeros += vanilla.tokens.count(0)
    assert 10 < zeros < 150
    assert any(-1 in path for path in official_paths)  # the official rule would have kept rows of padding


# ------------------------------------------------------------------------------ a reference of other sizes


def test_a_folder_of_other_sizes_agrees_with_a_naive_reference(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, EAGLE_TREE)
    recorder.medusa_tiny()
    recorder.decode("medusa")
    recorder.eagle_tiny()
    recorder.decode("eagle")
    recorder.losses()
    checks = check(tmp_path)
    assert not _failed(checks), report(checks)
    assert {name for name, status in _statuses(checks).items() if status != "pass"} == {
        "medusa_decode/typical",
        "eagle_decode/decode_eagle2",
    }
    assert "RoPE base" not in report(checks)  # the draft's own base was used, and fits
    lengths = [
        length
        for kind in ("medusa", "eagle")
        for entry in json.loads((tmp_path / f"{kind}_decode/decode.json").read_text())["prompts"]
        for length in entry["accept_lengths"]
    ]
    assert {0, 1, 2} <= set(lengths)  # the recordings do hold accepted drafts


def test_a_tree_that_upstream_drafts_wrongly_is_unsupported_but_its_text_is_checked(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, WRONGLY_DRAFTED_TREE)
    recorder.decode("eagle")
    statuses = _statuses(check(tmp_path))
    assert statuses["eagle_decode/tree_tokens"] == "pass"

    def change(recorded: Any) -> None:
        recorded["prompts"][0]["steps"][0]["tree_tokens"][-1] += 1
        recorded["prompts"][1]["generated_ids"][2] += 1

    _rewrite(tmp_path / "eagle_decode/decode.json", change)
    statuses = _statuses(check(tmp_path))
    assert (statuses["eagle_decode/tree_tokens"], statuses["eagle_decode/generated_ids"]) == ("unsupported", "fail")
