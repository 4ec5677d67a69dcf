"""A lookup before a head: whose draft is used, what the other has read by then, and that the answer is unchanged."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from heads.eagle import Eagle
from heads.eagle3 import Eagle3
from heads.prompt_lookup import PromptLookup
from heads.suffix_lookup import SuffixLookup
from heads.token_recycling import TokenRecycling
from koala_bench.contract.bench import random_ids
from koala_bench.decoding.acceptance import SpeculativeSampling
from koala_bench.decoding.batching import decode_batch
from koala_bench.decoding.hybrid import Hybrid
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.decoding.sampling import Sampling
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.methods import load_methods
from koala_bench.heads import Committed
from koala_bench.presets import load_preset
from koala_bench.testing import save_tiny_target, tiny_config
from koala_bench.training.experiment import first_head, train_heads
from koala_bench.tree import ROOT_ONLY, DraftTree, Template, load_template
from tests.decoding.test_sampling_loop import LEAST, fit, sampled_law

PROMPT = [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]
TREES = load_template("chain-7"), load_template("3x2x1")


class Sometimes:
    """Proposes one token at every ``period``-th draft, else nothing."""

    features, max_depth = (-1,), 1

    def __init__(self, period: int) -> None:
        self.period = period

    def begin(self, template: Template, capacity: int) -> None:
        self.template, self.asked = template, 0

    def draft(self, new: Committed) -> DraftTree:
        self.asked += 1
        if self.asked % self.period:
            return DraftTree(new.tokens[-1:], ROOT_ONLY)
        return DraftTree(torch.cat([new.tokens[-1:], new.tokens[-1:]]), self.template.shape)


class Listening:
    """Notes what it is given, in whatever pieces."""

    def __init__(self, features: tuple[int, ...]) -> None:
        self.features, self.max_depth = features, 0

    def begin(self, template: Template, capacity: int) -> None:
        self.given: list[Committed] = []

    def draft(self, new: Committed) -> DraftTree:
        self.given.append(new)
        return DraftTree(new.tokens[-1:], ROOT_ONLY)


def eagle(target: Target, **options: Any) -> Eagle:
    torch.manual_seed(0)
    return Eagle(target.spec(), **options).to(target.dtype).eval()


def test_the_second_head_catches_up_on_all_that_was_settled(target64: Target) -> None:
    """When it drafts, it has read the same pairs, with its own states, as if it had drafted at each step."""
    for features in ((-1,), (0, -1), (1, -1)):
        heads = Listening(features), Listening(features)
        hybrid = Hybrid(Sometimes(2), heads[1], (load_template("chain-1"), VANILLA_TREE))
        assert hybrid.features == features
        for head in (heads[0], hybrid):
            decode(target64, head, VANILLA_TREE, PROMPT, 20, ())
        alone, after = (
            (torch.cat([each.tokens for each in head.given]), torch.cat([each.hidden for each in head.given]))
            for head in heads
        )
        assert len(heads[1].given) < len(heads[0].given)
        count = len(after[0])
        assert torch.equal(alone[0][:count], after[0])
        torch.testing.assert_close(alone[1][:count], after[1], rtol=1e-9, atol=1e-9)
        assert heads[1].given[0].first == PROMPT[0] and all(each.first is None for each in heads[1].given[1:])
        starts = [each.position for each in heads[1].given]
        assert starts == [sum(len(each.tokens) for each in heads[1].given[:place]) for place in range(len(starts))]


@pytest.mark.parametrize("second", ["eagle", "eagle3", "token_recycling"])
@pytest.mark.parametrize("first", [SuffixLookup, PromptLookup])
def test_answers_are_vanillas_and_both_heads_draft(target64: Target, first: Any, second: str) -> None:
    makers: dict[str, Any] = {
        "eagle": lambda spec: eagle(target64),
        "eagle3": lambda spec: Eagle3(spec).double().eval(),
        "token_recycling": TokenRecycling,
    }
    hybrid = Hybrid(first(target64.spec()), makers[second](target64.spec()), TREES)
    vanilla = decode(target64, Vanilla(), VANILLA_TREE, PROMPT, 60, ())
    for _ in range(2):  # the second time nothing of the first is left
        found = decode(target64, hybrid, hybrid.template, PROMPT, 60, (), trace=True)
        assert found.tokens == vanilla.tokens
    assert {len(step.tree_tokens) for step in found.steps} > {TREES[1].nodes}
    assert len(found.accepted) < len(vanilla.accepted)
    near_the_end = random_ids(1, target64.max_positions - 20)[0].tolist()
    truth = decode(target64, Vanilla(), VANILLA_TREE, near_the_end, 40, ()).tokens
    assert decode(target64, hybrid, hybrid.template, near_the_end, 40, ()).tokens == truth


def test_a_draft_after_others_drafts_is_the_one_it_would_have_made(target64: Target) -> None:
    """The head after a lookup drafts the same trees as a head that read along."""
    second = eagle(target64)
    hybrid = Hybrid(Sometimes(3), second, (load_template("chain-1"), TREES[1]))
    mixed = decode(target64, hybrid, TREES[1], PROMPT, 40, (), trace=True)
    text = [*PROMPT, *mixed.tokens]
    states = target64.states(torch.tensor([text]))[0]
    head, place, compared = eagle(target64), len(PROMPT), 0
    for step in mixed.steps[:-1]:
        if len(step.tree_tokens) == TREES[1].nodes:
            head.begin(TREES[1], 600)
            with torch.inference_mode():
                anew = head.draft(Committed(torch.tensor(text[1 : place + 1]), states[:place], 0))
            assert anew.tokens.tolist() == step.tree_tokens
            compared += 1
        place += len(step.path)
    assert compared > 10


def test_batches_have_copies_of_both(target64: Target) -> None:
    hybrid = Hybrid(SuffixLookup(target64.spec(), 2), eagle(target64), TREES)
    prompts = [PROMPT, [1, 70, 81, 82], [1, 90]]
    found = decode_batch(target64, hybrid, hybrid.template, prompts, 24, ())
    assert found.tokens == [decode(target64, Vanilla(), VANILLA_TREE, each, 24, ()).tokens for each in prompts]
    assert copy.copy(hybrid).first is not hybrid.first and copy.copy(hybrid).second.fc is hybrid.second.fc


def test_the_distribution_stays_as_it_is(tmp_path: Path) -> None:
    folder = save_tiny_target(tmp_path, tiny_config(vocab_size=8))
    target = load_target(str(folder), "cpu", "float32", tokenizer=False)
    second = eagle(target)
    hybrid = Hybrid(SuffixLookup(target.spec(), 2), second, (load_template("chain-2"), load_template("2x2")))
    sampling = Sampling(1.0, top_k=3)
    rule = SpeculativeSampling(sampling, torch.Generator().manual_seed(0))
    prompt = [1, 5, 3, 5, 4, 6, 7, 3, 6, 5]
    counts: Counter[tuple[int, ...]] = Counter()
    depths: set[int] = set()
    for _ in range(300):
        found = decode(target, hybrid, hybrid.template, prompt, 3, (), rule=rule, trace=True)
        counts[tuple(found.tokens)] += 1
        depths |= {len(step.tree_tokens) for step in found.steps}
    assert second.pick is rule.pick
    assert {2, 3} & depths and 7 in depths
    assert fit(counts, sampled_law(target, sampling, prompt, 3)) > LEAST


SMALL = """
[target]
name = "{target}"
device = "cpu"
dtype = "float32"
[training]
steps = 1
batch_tokens = 256
learning_rate = 1e-3
[methods.eagle]
head = "eagle"
tree = "small/6"
[methods.mixed]
head_of = "eagle"
first = {{ head = "{first}", options = {{ {options} }}, tree = "chain-7" }}
"""


def small(tmp_path: Path, target: Path, first: str = "suffix_lookup", options: str = "least = 5") -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL.format(target=target, first=first, options=options))
    return path


def test_a_preset_names_a_head_to_be_asked_first(target_folder: Path, target: Target, tmp_path: Path) -> None:
    from koala_bench.training.checkpoints import save_head

    preset = load_preset(str(small(tmp_path, target_folder)))
    assert preset.trained_as("mixed") == "eagle"
    save_head(tmp_path / "heads" / "eagle", eagle(target), preset.method("eagle"), target, {})
    _, plain, mixed = load_methods(preset, ["vanilla", "eagle", "mixed"], target, tmp_path / "heads")
    assert isinstance(mixed.head, Hybrid) and mixed.head.first.least == 5
    assert mixed.info["tree"] == {"name": "chain-7 or small/6", "nodes": 8, "depth": 7, "parents": None}
    assert mixed.info["weights_sha256"] == plain.info["weights_sha256"] and mixed.info["lossless"]
    assert "first" not in preset.method("eagle").model_dump()  # so that hashes of presets without it are as before


@pytest.mark.parametrize(
    ("first", "options", "words"),
    [
        ("medusa", "", "'medusa' must be trained"),
        ("sufix_lookup", "", "Did you mean suffix_lookup"),
        ("suffix_lookup", "last = 5", "Did you mean least"),
        ("suffix_lookup", "least = 0", "least is 0"),
    ],
)
def test_a_wrong_first_is_told_before_anything_is_trained(
    target_folder: Path, target: Target, tmp_path: Path, first: str, options: str, words: str
) -> None:
    preset = load_preset(str(small(tmp_path, target_folder, first, options)))
    with pytest.raises(KoalaBenchError) as raised:
        first_head(preset.method("mixed"), target)
    assert words in f"{raised.value.message} {raised.value.remedy}"
    template: Any = None  # not reached
    with pytest.raises(KoalaBenchError):
        train_heads(preset, ["mixed"], target, template, tmp_path / "out")
    assert not (tmp_path / "out").exists()
