"""Draft vocabularies: chosen by counts, kept with the head, the same drafts as the whole head restricted, answers
unchanged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from koala_bench.common.draft_vocabulary import DraftVocabulary, by_count, first_of
from koala_bench.contract.bench import batch_of, random_ids
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.dialogues.encoding import chat_template
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.methods import load_methods
from koala_bench.planning.draft_reads import draft_reads
from koala_bench.presets import MethodPreset, cut_of, load_preset
from koala_bench.testing import tiny_config
from koala_bench.training.checkpoints import load_head, save_head, save_token_order
from koala_bench.training.experiment import train_heads
from koala_bench.training.loop import build_head
from koala_bench.tree import load_template
from tests.training.test_training import conversations, preset_for

VOCAB = 259
PROMPT = list(range(10, 30))
HEADS = {
    "medusa": MethodPreset(head="medusa", options={"heads": 4}, tree="chain-3"),
    "medusa of one output layer": MethodPreset(
        head="medusa", options={"heads": 4, "own_output": False}, tree="chain-3"
    ),
    "hydra": MethodPreset(head="hydra", options={"heads": 4, "labels": "target"}, tree="chain-3"),
    "eagle": MethodPreset(head="eagle", tree="chain-3"),
    "eagle3": MethodPreset(head="eagle3", tree="chain-3"),
}


def order() -> torch.Tensor:
    return torch.randperm(VOCAB, generator=torch.Generator().manual_seed(7))


def random_head(target: Target, preset: MethodPreset, folder: Path) -> Any:
    """A saved head of the whole vocabulary, of random weights."""
    head = build_head(target, preset, seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_head(folder, head, preset, target, {})
    save_token_order(folder, order())
    return head.to(target.dtype).eval()


def test_the_commonest_tokens_are_taken_and_special_ones_first() -> None:
    taken = by_count([[5, 5, 5, 4], [4, 7, 7, 4], [9]], 12, special=[11, 0])
    assert taken.tolist() == [0, 11, 4, 5, 7, 9, 1, 2, 3, 6, 8, 10]
    assert first_of(taken, 4).tolist() == [0, 4, 5, 11]


def test_scores_are_spread() -> None:
    vocabulary = DraftVocabulary(torch.tensor([4, 1]), 5)
    assert vocabulary.spread(torch.tensor([[0.5, 2.0]])).tolist() == [[-torch.inf, 2.0, -torch.inf, -torch.inf, 0.5]]
    assert vocabulary.places(torch.tensor([1, 0, 4])).tolist() == [1, -1, 0]


def test_soft_labels_are_the_target_s_distribution_within_the_cut(target: Target) -> None:
    whole = batch_of(target, random_ids(2, 24), (-1,))
    cut = target.spec(first_of(order(), 60))
    assert cut.draft_vocabulary is not None
    labels = whole.soft_labels(cut)
    inside = whole.target_probabilities.flatten(0, 1)[:, cut.draft_vocabulary.ids]
    torch.testing.assert_close(labels.probabilities, inside / inside.sum(-1, keepdim=True))
    best = whole.target_probabilities.flatten(0, 1).argmax(-1)
    assert torch.equal(labels.likeliest, cut.draft_vocabulary.places(best)) and (labels.likeliest == -1).any()
    # Equal vocabularies share one computation, in every part of the batch.
    assert whole.reading([0]).soft_labels(target.spec(first_of(order(), 60))) is labels
    every = whole.soft_labels(target.spec())
    assert torch.equal(every.probabilities, whole.target_probabilities.flatten(0, 1))
    assert torch.equal(every.likeliest, best)


@pytest.mark.parametrize("name", HEADS)
def test_what_the_target_would_say_outside_of_the_cut_teaches_nothing(target: Target, name: str) -> None:
    head = build_head(target, HEADS[name].model_copy(update={"draft_vocabulary": 60}), 0, order()).eval()
    batch = batch_of(target, random_ids(2, 24), head.features)
    labels = batch.soft_labels(head._spec)
    loss = head.loss(batch).total
    labels.probabilities[labels.likeliest < 0] = torch.nan
    if bool(torch.isfinite(head.loss(batch).total)):  # it learns from the data's tokens
        return
    labels.probabilities[labels.likeliest < 0] = 0.5
    torch.testing.assert_close(head.loss(batch).total, loss)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("tree", ["chain-3", "3x2x1", "dynamic-3x4x9"])
def test_a_cut_head_drafts_what_the_whole_one_would_of_these_tokens(
    target64: Target, tmp_path: Path, name: str, tree: str
) -> None:
    whole = random_head(target64, HEADS[name], tmp_path)
    cut = load_head(tmp_path, target64, 40)[0]
    ids = first_of(order(), 40)
    assert torch.equal(cut.draft_vocabulary, ids)
    forbidden = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, ids, False)
    masked = replace(target64.spec(), output=lambda states: target64.output(states).masked_fill(forbidden, -torch.inf))
    whole._spec = replace(masked, draft_vocabulary=_Masking(torch.arange(VOCAB), VOCAB, forbidden))
    whole._output = masked.output  # of those that keep it
    template = load_template(tree)
    expected = decode(target64, Vanilla(), VANILLA_TREE, PROMPT, 24, ())
    answers = [decode(target64, head, template, PROMPT, 24, (), trace=True) for head in (whole, cut)]
    assert answers[0].steps == answers[1].steps
    assert answers[1].tokens == expected.tokens


class _Masking(DraftVocabulary):
    """Of a head of the whole vocabulary: what is forbidden is impossible."""

    def __init__(self, ids: torch.Tensor, vocab_size: int, forbidden: torch.Tensor) -> None:
        super().__init__(ids, vocab_size)
        object.__setattr__(self, "forbidden", forbidden)

    def spread(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(self.forbidden, -torch.inf)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", HEADS)
def test_recorded_passes_of_a_cut_head_draft_the_same(target: Target, tmp_path: Path, name: str) -> None:
    random_head(target, HEADS[name], tmp_path)
    template = load_template("3x1x1")
    recorded = replace(target, engine="graph")
    answers = [
        decode(each, load_head(tmp_path, each, 40)[0], template, PROMPT, 24, (), trace=True)
        for each in (target, recorded)
    ]
    assert answers[0].steps == answers[1].steps


@pytest.mark.parametrize("name", HEADS)
def test_a_cut_head_learns_what_lies_within_the_cut(target: Target, name: str) -> None:
    head = build_head(target, HEADS[name].model_copy(update={"draft_vocabulary": 60}), 0, order())
    batch = batch_of(target, random_ids(2, 24), head.features)
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        found = head.loss(batch)
        found.total.backward()
        optimiser.step()
        losses.append(float(found.total.detach()))
    assert all(map(torch.isfinite, map(torch.tensor, losses))) and losses[-1] < losses[0]
    for prediction in found.predictions:
        assert torch.isfinite(prediction.logits).sum(-1).eq(60).all() and prediction.logits.shape[-1] == VOCAB


def test_a_name_cuts_the_head_of_another_method() -> None:
    assert (
        cut_of("eagle+vocab8k") == ("eagle", 8192)
        and cut_of("eagle+koala+vocab500") == ("eagle+koala", 500)
        and cut_of("eagle+koala") is None
    )
    preset = load_preset("tiny")
    method = preset.method("eagle+vocab2k")
    assert (method.head, method.tree, method.draft_vocabulary, preset.trained_as("eagle+vocab2k")) == (
        "eagle",
        "small/4",
        2048,
        "eagle",
    )
    assert (
        preset.method("eagle2+vocab2k").head_of == "eagle"
        and preset.method("eagle2+vocab2k").tree == preset.method("eagle2").tree
    )
    assert "draft_vocabulary" not in preset.model_dump(mode="json")["methods"]["eagle"]  # hashes stay what they were
    cut = load_preset("tiny", ["methods.eagle.draft_vocabulary=512"])
    assert cut.sha256 != preset.sha256 and cut.method("eagle2").draft_vocabulary == 512
    with pytest.raises(KoalaBenchError, match="drafts 512 tokens already"):
        cut.method("eagle+vocab2k")
    with pytest.raises(KoalaBenchError, match="whose head was trained on a cut one"):
        load_preset("tiny", ["methods.eagle.draft_vocabulary=512", "methods.eagle2.draft_vocabulary=256"])


def test_both_ways_from_training_to_decoding(target: Target, target_folder: Path, tmp_path: Path) -> None:
    preset = preset_for(
        target_folder,
        conversations(tmp_path),
        "training.steps=2",
        "methods.eagle.draft_vocabulary=24",
        "evaluation.limit=1",
    )
    assert target.tokenizer is not None
    train_heads(preset, ["eagle", "medusa"], target, chat_template("vicuna_v1.1", target.tokenizer), tmp_path / "out")
    ids = load_file(tmp_path / "out" / "eagle" / "model.safetensors")["draft_vocabulary"].tolist()
    digits = target.tokenizer("0123456789", add_special_tokens=False)["input_ids"]
    assert len(ids) == 24 and {*digits, *target.tokenizer.all_special_ids} <= set(ids) and ids == sorted(ids)
    methods = load_methods(preset, ["eagle", "medusa+vocab24", "medusa"], target, tmp_path / "out")
    assert [method.info.get("draft_vocabulary") for method in methods] == [None, 24, 24, None]
    assert methods[2].head.draft_vocabulary.tolist() == ids  # type: ignore[attr-defined]
    with pytest.raises(KoalaBenchError, match="drafts 24 tokens and cannot be cut to 12"):
        load_head(tmp_path / "out" / "eagle", target, 12)
    (tmp_path / "out" / "medusa" / "tokens.safetensors").unlink()
    with pytest.raises(KoalaBenchError, match=r"tokens\.safetensors is missing or damaged.*Train the head again"):
        load_methods(preset, ["medusa+vocab24"], target, tmp_path / "out")


@pytest.mark.parametrize("count", [0, 260])
def test_a_vocabulary_that_cannot_be_is_refused(target: Target, tmp_path: Path, count: int) -> None:
    random_head(target, HEADS["eagle"], tmp_path)
    with pytest.raises(KoalaBenchError, match=f"draft_vocabulary is {count}.*from 1 to the target's 259"):
        load_head(tmp_path, target, count)


def test_what_a_draft_reads_is_the_weights_of_its_products() -> None:
    config = tiny_config(vocab_size=6000)
    preset = load_preset("tiny", ['methods.eagle.tree="3x1x1"', "methods.medusa.options={heads=4,own_output=false}"])
    eagle, medusa = draft_reads(preset, ["vanilla", "eagle", "medusa", "prompt_lookup"], config)
    width, inner = config.hidden_size, config.intermediate_size
    layer = 3 * width * width + 3 * width * inner  # queries and output, keys and values of half the heads
    step = 2 * layer + 6000 * width + 5 * width  # norms too, which are next to nothing
    assert list(eagle.by_size) == [6000, 4096] and (eagle.depth, medusa.depth) == (3, 2)
    for size, steps in eagle.by_size.items():
        assert steps == pytest.approx(3 * (2 * width * width + layer + size * width) / step, rel=1e-6)
    for size, steps in medusa.by_size.items():  # a product of two rows with one output layer reads it once
        assert steps == pytest.approx((2 * width * width + size * width) / step, rel=1e-6)
