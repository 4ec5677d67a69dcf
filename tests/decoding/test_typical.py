"""Typical acceptance: decides as Medusa's code does, and says how far it is from the target."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from koala_bench.decoding.acceptance import GREEDY, TypicalAcceptance, greedy
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.parity import check
from koala_bench.tree import DraftTree, TreeShape, load_template
from tests.support.drafters import Oracle

PROMPT = [1, 70, 81, 82, 90, 33, 40, 41, 120, 7]
FOLDER = Path(os.environ.get("KOALA_BENCH_FIXTURES") or Path(__file__).parents[3] / "shared" / "fixtures")


def official(
    tree: DraftTree, logits: torch.Tensor, temperature: float, threshold: float, alpha: float
) -> tuple[int, ...]:
    """The path that upstream's ``evaluate_posterior`` takes: rows of candidates, last leaf first, padding never
    accepted.
    """
    rows = [list(path) for path in reversed(tree.shape.leaf_paths)]
    width = max(map(len, rows))
    padded = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    probabilities = torch.softmax(logits[padded][:, :-1] / temperature, -1)
    candidates = tree.tokens[padded][:, 1:]
    chances = probabilities.gather(-1, candidates[..., None])[..., 0].masked_fill(padded[:, 1:] < 0, -1)
    entropy = -(probabilities * torch.log(probabilities + 1e-5)).sum(-1)
    limit = torch.minimum(torch.full_like(entropy, threshold), torch.exp(-entropy) * alpha)
    lengths = torch.cumprod((chances > limit).int(), 1).sum(1)
    longest = int(lengths.max())
    if longest == 0:
        return (0,)
    among = (lengths == longest).nonzero()[:, 0]
    row = among[torch.log(chances[among, :longest]).sum(-1).argmax()]
    return tuple(padded[row, : longest + 1].tolist())


def drawn_tree(draw: random.Random, vocab: int) -> DraftTree:
    """A random tree whose siblings differ."""
    parents, tokens = [-1], [draw.randrange(vocab)]
    for _ in range(draw.randrange(1, 30)):
        parent = draw.randrange(len(parents))
        free = set(range(vocab)) - {tokens[node] for node, above in enumerate(parents) if above == parent}
        if free:
            parents.append(parent)
            tokens.append(draw.choice(sorted(free)))
    return DraftTree(torch.tensor(tokens), TreeShape(tuple(parents)))


def test_it_decides_as_upstream_does() -> None:
    draw, lengths, unlike_greedy = random.Random(0), set(), 0
    for case in range(300):
        tree = drawn_tree(draw, 9)
        logits = 2 * torch.randn(tree.shape.nodes, 9, generator=torch.Generator().manual_seed(case))
        numbers = draw.choice([(0.7, 0.09, 0.3), (1.0, 0.3, 0.09), (0.4, 0.2, 0.6)])
        path, tokens, _ = TypicalAcceptance(*numbers).accept(tree, logits)
        assert path == official(tree, logits, *numbers)
        assert tokens == [*tree.tokens[list(path[1:])].tolist(), int(logits[path[-1]].argmax())]
        lengths.add(len(path))
        unlike_greedy += path != greedy(tree, logits).path
    assert lengths >= {1, 2, 3, 4, 5}
    assert unlike_greedy > 50


def test_the_distance_of_a_token_is_what_its_probability_lacks_to_1() -> None:
    tree = DraftTree(torch.tensor([0, 1, 2]), TreeShape((-1, 0, 1)))
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.7, 0.2, 0.1]]).log()
    path, tokens, distances = TypicalAcceptance(1.0).accept(tree, logits)
    assert (path, tokens) == ((0, 1, 2), [1, 2, 0])
    assert distances == pytest.approx([0.7, 0.4, 0.3])
    committed = torch.zeros(3, 3).index_put((torch.arange(3), torch.tensor(tokens)), torch.tensor(1.0))
    assert distances == pytest.approx(((committed - logits.exp()).abs().sum(-1) / 2).tolist())  # the total variation
    cold = torch.softmax(logits / 0.5, -1)
    assert TypicalAcceptance(0.5).accept(tree, logits).distances == pytest.approx(
        [1 - float(cold[0, 1]), 1 - float(cold[1, 2]), 1 - float(cold[2, 0])]
    )


def test_distances_are_from_what_a_lossless_method_samples_and_decisions_are_not() -> None:
    tree = DraftTree(torch.tensor([0, 1, 2]), TreeShape((-1, 0, 1)))
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.7, 0.2, 0.1]]).log()
    whole = TypicalAcceptance(1.0).accept(tree, logits)
    assert (whole.path, whole.tokens) == ((0, 1, 2), [1, 2, 0])
    for cut, expected in (
        ({"top_k": 2}, [1 - 0.3 / 0.8, 1 - 0.5 / 0.8, 1 - 0.7 / 0.9]),
        ({"top_p": 0.6}, [1 - 0.3 / 0.8, 1 - 0.5 / 0.8, 0]),
        ({"top_k": 1}, [1, 0, 0]),  # a point mass
    ):
        found = TypicalAcceptance(1.0, **cut).accept(tree, logits)  # type: ignore[arg-type]
        assert found[:2] == whole[:2]
        assert found.distances == pytest.approx(expected, abs=1e-6)


def test_of_equally_long_paths_the_likelier_wins_and_of_equal_ones_the_first() -> None:
    shape = TreeShape((-1, 0, 0))
    logits = torch.tensor([[0.3, 0.4, 0.3], [0.8, 0.1, 0.1], [0.8, 0.1, 0.1]]).log()
    rule = TypicalAcceptance(1.0)
    assert rule.accept(DraftTree(torch.tensor([0, 0, 1]), shape), logits).path == (0, 2)
    assert rule.accept(DraftTree(torch.tensor([0, 1, 1]), shape), logits).path == (0, 1)


def test_every_token_of_an_answer_has_its_distance(target64: Target) -> None:
    truth = decode(target64, Vanilla(), VANILLA_TREE, PROMPT, 40, ())
    assert truth.distances is None
    rule = TypicalAcceptance(0.7)
    for limit, stops in ((1, ()), (2, ()), (17, ()), (40, (truth.tokens[11],))):
        answer = decode(target64, Oracle(truth.tokens, 259), load_template("3x2x1"), PROMPT, limit, stops, rule=rule)
        assert answer.distances is not None
        assert len(answer.distances) == len(answer.tokens)
        # One by one, without a tree.
        logits = target64.output(target64.states(torch.tensor([PROMPT + answer.tokens]))[0, len(PROMPT) - 1 : -1, 0])
        chances = torch.softmax(logits / 0.7, -1)[range(len(answer.tokens)), answer.tokens]
        assert answer.distances == pytest.approx((1 - chances).tolist(), abs=1e-9)


def test_it_is_deterministic_and_settles_other_tokens_than_greedy_decoding(target64: Target) -> None:
    truth = decode(target64, Vanilla(), VANILLA_TREE, PROMPT, 40, ()).tokens
    rule = TypicalAcceptance(1.5, threshold=0.001, alpha=0.01)

    def answer(seed: int) -> list[int]:
        return decode(target64, Oracle(truth, 259, 0.0, seed), load_template("8x4"), PROMPT, 40, (), rule=rule).tokens

    assert answer(1) == answer(1)
    assert any(answer(seed) != truth for seed in range(3))
    assert decode(target64, Vanilla(), VANILLA_TREE, PROMPT, 40, (), rule=rule).tokens == truth  # alone it is greedy
    assert rule.pick is GREEDY.pick


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((0.0,), "temperature is 0"),
        ((1.0, 0.09, 0.3, -1), "top-k is -1"),
        ((float("nan"),), "temperature is nan"),
        ((1.0, 0.0), "threshold 0"),
        ((1.0, 0.09, float("inf")), "alpha inf"),
    ],
)
def test_impossible_numbers_are_refused(numbers: tuple[float, ...], words: str) -> None:
    with pytest.raises(KoalaBenchError, match=words):
        TypicalAcceptance(*numbers)


@pytest.mark.skipif(
    not (FOLDER / "medusa_decode").is_dir(), reason="no recordings of the official code; set KOALA_BENCH_FIXTURES"
)
def test_the_recorded_decisions_are_taken_and_a_changed_one_is_found(tmp_path: Path) -> None:
    (tmp_path / "medusa_decode").mkdir()
    for name in ("buffers.json", "typical.json", "typical.safetensors"):
        shutil.copy(FOLDER / "medusa_decode" / name, tmp_path / "medusa_decode")
    ours = {each.name: each for each in check(tmp_path) if each.name.startswith("medusa_decode/typical")}
    assert {name: each.status for name, each in ours.items()} == {
        "medusa_decode/typical": "pass",
        "medusa_decode/typical/greedy": "pass",
        "medusa_decode/typical/padding_accepted": "skip",
        "medusa_decode/typical/greedy_without_padding": "pass",
    }
    assert "case 10 and case 11" in ours["medusa_decode/typical/padding_accepted"].detail
    place = tmp_path / "medusa_decode/typical.json"
    recorded = json.loads(place.read_text())
    recorded["posterior_alpha"] = 0.6
    place.write_text(json.dumps(recorded))
    assert [each.name for each in check(tmp_path) if each.status == "fail"] == ["medusa_decode/typical"]
