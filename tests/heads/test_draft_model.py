"""A small language model as a head: its drafts are those of the model without a cache, and it takes only models with
the target's tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaForCausalLM, MistralConfig, PretrainedConfig

import heads.common.growth
from heads.common.growth import LevelNodes, levels_of
from heads.draft_model import DraftModel
from koala_bench.contract import check_head
from koala_bench.decoding.candidates import best
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Committed
from koala_bench.presets import MethodPreset
from koala_bench.testing import save_tiny_target, tiny_config, tiny_target, tiny_tokenizer
from koala_bench.training.experiment import free_head
from koala_bench.tree import load_template

PROMPT = [1, 70, 81, 82, 90, 33]
TREES = ["chain-4", "3x2x1", "dynamic-3x4x10"]
TEXT = torch.randint(3, 259, (40,), generator=torch.Generator().manual_seed(3)).tolist()


def small(folder: Path, **changes: Any) -> str:
    """A random draft model of one layer."""
    return str(save_tiny_target(folder, tiny_config(num_hidden_layers=1, **changes), seed=5))


@pytest.fixture
def nearly_the_target(target64: Target, tmp_path: Path) -> str:
    """A model that mostly says what the target says."""
    folder = save_tiny_target(tmp_path / "near")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        for index, weight in enumerate(model.parameters()):
            weight.add_(
                0.03 * torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(index))
            )
    model.save_pretrained(folder)
    return str(folder)


class Uncached:
    """Grows trees by a whole pass of the draft model over the whole text for every node."""

    def __init__(self, model: Target) -> None:
        self.model = model
        self.text: list[int] = []
        self.first = 0

    def score(self, tokens: list[int]) -> torch.Tensor:
        places = torch.arange(self.first, self.first + len(tokens))[None]
        logits: torch.Tensor = self.model.model(
            input_ids=torch.tensor([tokens]), position_ids=places, use_cache=False
        ).logits[0, -1]
        return logits

    def read(self, new: Committed) -> torch.Tensor:
        if not self.text:
            self.first = 1 if new.first is None else 0
            self.text = [] if new.first is None else new.first.tolist()
        self.text += new.tokens.tolist()
        self.grown: list[int] = []
        return self.score(self.text)[None]

    def score_children(self, level: LevelNodes) -> torch.Tensor:
        self.grown += level.tokens.tolist()
        assert level.tree_mask.shape == (len(level.tokens), len(self.grown))
        return torch.stack(
            [
                self.score(self.text + [token for token, seen in zip(self.grown, row, strict=True) if seen])
                for row in level.tree_mask.tolist()
            ]
        )


def pieces(with_first: bool) -> list[Committed]:
    """The text, committed in pieces as verification would: a prompt, then one to five tokens at a time."""
    stops = [9, 10, 12, 15, 19, 24, 25]
    starts = [0, *stops[:-1]]
    empty = torch.empty(0)
    found = [
        Committed(torch.tensor(TEXT[start + 1 : stop + 1]), empty, start)
        for start, stop in zip(starts, stops, strict=True)
    ]
    return [replace(found[0], first=torch.tensor(TEXT[:1])), *found[1:]] if with_first else found


def configuration(family: str) -> PretrainedConfig:
    """Rotary positions tell distances only; GPT-2's learned ones tell every shift."""
    if family == "llama":
        return tiny_config(num_hidden_layers=1)
    return GPT2Config(
        vocab_size=259,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )


@torch.inference_mode()
@pytest.mark.parametrize("with_first", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tree", TREES)
def test_drafts_are_those_of_the_model_without_a_cache(
    target64: Target, tmp_path: Path, tree: str, family: str, with_first: bool
) -> None:
    head = DraftModel(target64.spec(), str(save_tiny_target(tmp_path, configuration(family), seed=5)))
    naive, levels = Uncached(head._model), levels_of(load_template(tree), target64.device)
    for capacity in (30, 60):  # once more with longer rows: whatever was kept must be made anew
        head.begin(load_template(tree), capacity)
        naive.text = []
        for new in pieces(with_first):
            found, wanted = head.draft(new), heads.common.growth.draft(naive, new, levels, best)
            assert (found.tokens.tolist(), found.shape) == (wanted.tokens.tolist(), wanted.shape)


@pytest.mark.parametrize("tree", TREES)
def test_answers_are_the_targets_own(target64: Target, nearly_the_target: str, tree: str) -> None:
    head = DraftModel(target64.spec(), nearly_the_target)
    wanted = decode(target64, Vanilla(), VANILLA_TREE, PROMPT, 60, ()).tokens
    found = decode(target64, head, load_template(tree), PROMPT, 60, ())
    assert found.tokens == wanted
    assert len(set(found.accepted)) > 1  # the test would say little if all or nothing were taken


@pytest.mark.parametrize("tree", TREES)
def test_a_draft_model_equal_to_the_target_is_always_right(target64: Target, tree: str) -> None:
    template = load_template(tree)
    found = decode(target64, DraftModel(target64.spec(), target64.name), template, PROMPT, 50, ())
    # A dynamic tree may leave out the deepest node of the best path, if others are likelier.
    assert found.accepted[:-1] == (
        found.drafted_depth[:-1] if template.dynamic else [template.depth] * (len(found.accepted) - 1)
    )


@pytest.mark.parametrize(("tree", "passes"), [("chain-4", 4), ("4x2x1", 3), ("3", 1), ("dynamic-2x3x6", 3)])
def test_a_step_costs_a_pass_a_level(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tree: str, passes: int
) -> None:
    head = DraftModel(target.spec(), small(tmp_path))
    calls: list[tuple[int, ...]] = []
    head._model.model.get_decoder().register_forward_pre_hook(
        lambda _, __, given: calls.append(given["input_ids"].shape), with_kwargs=True
    )
    found = decode(target, head, load_template(tree), PROMPT, 20, ())
    making_rows, prompt, *drafting = calls
    assert len(drafting) == passes * len(found.accepted)
    assert (making_rows, prompt, drafting[0]) == ((1, 1), (1, len(PROMPT)), (1, 1))


@torch.inference_mode()
def test_drawn_candidates_come_with_the_processed_distribution_they_were_drawn_from(
    target64: Target, tmp_path: Path
) -> None:
    sampling = pytest.importorskip("koala_bench.decoding.sampling")
    kind = sampling.Sampling(0.7, top_k=6)
    head = DraftModel(target64.spec(), small(tmp_path))
    head.pick = sampling.Draws(kind, torch.Generator().manual_seed(0))
    head.begin(load_template("2x2x1"), 60)
    naive = Uncached(head._model)
    for new in pieces(True):
        tree = head.draft(new)
        naive.read(new)
        assert tree.proposals is not None
        for row, node in enumerate(tree.shape.inner):
            path = [int(tree.tokens[each]) for each in tree.shape.path_to(node)[1:]]
            wanted = kind.probabilities(naive.score(naive.text + path))
            assert torch.allclose(tree.proposals[row], wanted, atol=1e-9)
            assert all(wanted[tree.tokens[child]] > 0 for child in tree.shape.children[node])


# ------------------------------------------------------------------------------ what is refused


def edit_vocabulary(folder: Path, edit: Callable[[dict[str, int]], None]) -> None:
    place = folder / "tokenizer.json"
    content = json.loads(place.read_text(encoding="utf-8"))
    edit(content["model"]["vocab"])
    place.write_text(json.dumps(content), encoding="utf-8")


def other_tokens(folder: Path) -> str:
    """A model whose tokenizer gives two bytes each other's id."""
    small(folder)
    edit_vocabulary(folder, lambda ids: ids.update(a=ids["b"], b=ids["a"]))
    return str(folder)


def more_tokens(folder: Path) -> str:
    """A model with tokens of its own beside the target's."""
    small(folder, vocab_size=262)
    edit_vocabulary(folder, lambda ids: ids.update(aa=259, ab=260))
    return str(folder)


def damaged(folder: Path) -> str:
    """A model without half of its weights."""
    small(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return str(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_tokens, "has another tokenizer than the target: '[ab]' is"),
        (more_tokens, "has another tokenizer than the target: it lacks 0 of the target's tokens and has 2 others"),
        (damaged, "No draft model: Cannot load"),
        (lambda folder: str(folder / "missing"), "No draft model: There is no folder"),
    ],
)
def test_a_model_that_cannot_draft_for_the_target_is_refused(
    target: Target, tmp_path: Path, make: Any, message: str
) -> None:
    with pytest.raises(KoalaBenchError, match=message) as found:
        DraftModel(target.spec(), make(tmp_path))
    assert "Give the option 'model'" in found.value.remedy


def test_without_tokenizers_the_numbers_of_tokens_are_compared(target: Target, tmp_path: Path) -> None:
    bare = replace(target.spec(), tokenizer=None)
    assert DraftModel(bare, small(tmp_path / "same"))
    with pytest.raises(KoalaBenchError, match="has 272 tokens, the target 259"):
        DraftModel(bare, small(tmp_path / "padded", vocab_size=272))


# ------------------------------------------------------------------------------ what is allowed


@torch.inference_mode()
@pytest.mark.parametrize(("theirs", "ours"), [(259, 272), (272, 259)])
def test_padding_of_an_output_layer_is_never_proposed(tmp_path: Path, theirs: int, ours: int) -> None:
    target = tiny_target(tmp_path / "target", tiny_config(vocab_size=theirs), "float64")
    head = DraftModel(target.spec(), small(tmp_path / "draft", vocab_size=ours))
    head._model.model.get_output_embeddings().weight[100:259] *= 0.01  # the padding would be among the best
    for tree in ("chain-3", "9x9", "dynamic-2x9x40"):
        head.begin(load_template(tree), 60)
        for new in pieces(True):
            assert int(head.draft(new).tokens.max()) < 259
    said = torch.tensor([5, theirs - 1])
    assert head.read(Committed(said, said, 0), head._empty(60))[0].shape == (
        1,
        theirs,
    )  # the target may say its own padding
    assert (
        decode(target, head, load_template("3x2"), PROMPT, 30, ()).tokens
        == decode(target, Vanilla(), VANILLA_TREE, PROMPT, 30, ()).tokens
    )


def test_an_added_token_of_either_is_no_difference(target: Target, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    folder = small(tmp_path, vocab_size=260)
    tokenizer.save_pretrained(folder)
    assert DraftModel(target.spec(), folder)
    assert DraftModel(load_target(folder, "cpu", "float32").spec(), small(tmp_path / "plain"))


@torch.inference_mode()
@pytest.mark.parametrize(("root", "depth"), [(20, 3), (21, 3), (22, 0), (30, 0)])
def test_nothing_is_drafted_beyond_the_draft_models_context(
    target: Target, tmp_path: Path, root: int, depth: int
) -> None:
    head = DraftModel(target.spec(), small(tmp_path, max_position_embeddings=24))
    head.begin(load_template("chain-3"), 60)
    asked: list[int] = []
    head._model.model.get_decoder().register_forward_pre_hook(
        lambda _, __, given: asked.append(int(given["position_ids"].max())), with_kwargs=True
    )
    tree = head.draft(Committed(torch.tensor(TEXT[1 : root + 1]), torch.empty(0), 0, torch.tensor(TEXT[:1])))
    assert (tree.tokens[0], tree.shape.depth) == (TEXT[root], depth)
    assert max(asked, default=0) == (root + 2 if depth else 0)


def test_an_answer_goes_on_where_the_draft_model_cannot(target64: Target, tmp_path: Path) -> None:
    head = DraftModel(target64.spec(), small(tmp_path, max_position_embeddings=24))
    for prompt in (PROMPT, TEXT):  # the second is longer than the draft model's whole context
        found = decode(target64, head, load_template("chain-3"), prompt, 30, ())
        assert found.tokens == decode(target64, Vanilla(), VANILLA_TREE, prompt, 30, ()).tokens
        assert found.drafted_depth[-1] == 0


# ------------------------------------------------------------------------------ in the suite


def test_it_keeps_the_contract_of_heads(tmp_path: Path) -> None:
    results = check_head(DraftModel, {"model": small(tmp_path)})
    assert [str(result) for result in results if result.outcome == "failed"] == []
    assert {"form", "trees", "forgetting", "losslessness", "saving", "determinism", "half precision"} <= {
        r.name for r in results if r.outcome == "passed"
    }


def test_it_needs_no_training_and_tells_its_size(target: Target, tmp_path: Path) -> None:
    preset = MethodPreset(head="heads.draft_model:DraftModel", options={"model": small(tmp_path)}, tree="chain-4")
    head = free_head(preset, target)
    assert head is not None and not head.state_dict()
    assert (
        head.drafting_parameters
        == sum(weight.numel() for weight in load_target(str(tmp_path), "cpu", "float32").model.parameters())
        > 0
    )


def test_a_draft_model_with_a_window_drafts_up_to_it(target64: Target, tmp_path: Path) -> None:
    sizes = {**tiny_config(num_hidden_layers=1).to_dict(), "sliding_window": 40, "model_type": "mistral"}
    head = DraftModel(target64.spec(), str(save_tiny_target(tmp_path, MistralConfig(**sizes), seed=5)))
    found = decode(target64, head, load_template("3x2x1"), PROMPT, 60, ())
    assert found.tokens == decode(target64, Vanilla(), VANILLA_TREE, PROMPT, 60, ()).tokens
    assert found.drafted_depth[0] == 3 and found.drafted_depth[-1] == 0
