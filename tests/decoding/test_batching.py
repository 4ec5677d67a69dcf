"""Several answers at once: the same tokens as one by one, whoever accepts how much, and what batches are not for is
refused.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from koala_bench.costs.batches import batch_speeds, in_words
from koala_bench.costs.figures import write_batches
from koala_bench.decoding.batching import decode_batch
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.methods import load_methods
from koala_bench.presets import load_preset
from koala_bench.testing import tiny_target
from koala_bench.training.loop import build_head
from koala_bench.tree import load_template
from tests.support.architectures import FAMILIES
from tests.support.commands import EAGER, Koala
from tests.support.small_runs import Bench

PROMPTS = [[1, 70, 81, 82], [1, 90], [1, 60, 61, 62, 63, 64, 65, 66, 67], [1, 5, 6]]


def alone(target: Target, tokens: int, stops: tuple[int, ...] = ()) -> list[list[int]]:
    return [decode(target, Vanilla(), VANILLA_TREE, prompt, tokens, stops).tokens for prompt in PROMPTS]


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_vanilla_in_a_batch_says_what_it_says_alone(target64: Target, engine: str) -> None:
    target = load_target(target64.name, "cpu", "float64", engine=engine)
    found = decode_batch(target, Vanilla(), VANILLA_TREE, PROMPTS, 24, ())
    assert found.tokens == alone(target, 24)
    assert found.steps == 23


@pytest.mark.parametrize("method", ["medusa", "eagle", "eagle2", "hydra", "prompt_lookup"])
def test_a_batch_is_lossless_whoever_accepts_how_much(target64: Target, method: str) -> None:
    preset = load_preset("tiny").method(method)
    head = build_head(target64, preset, seed=0).double().eval()
    truth = alone(target64, 24)
    stop = truth[1][5]
    for stops in ((), (stop,)):
        found = decode_batch(
            target64, head, load_template("16x2" if method in ("medusa", "eagle") else preset.tree), PROMPTS, 24, stops
        )
        assert found.tokens == alone(target64, 24, stops)
    assert found.steps <= 23


def test_a_batch_needs_room_in_the_context(target64: Target) -> None:
    with pytest.raises(KoalaBenchError, match="context of 512"):
        decode_batch(target64, Vanilla(), VANILLA_TREE, [[1, 2], [3] * 500], 24, ())


def test_speeds_and_their_figure(bench: Bench, tmp_path: Path) -> None:
    ready = load_methods(bench.preset(), ["vanilla", "medusa", "eagle"], bench.target, bench.heads)
    speeds = batch_speeds(bench.target, ready, PROMPTS, [1, 4], 6, 1)
    assert [(each.method, each.size) for each in speeds] == [
        (name, size) for name in ("vanilla", "medusa", "eagle") for size in (1, 4)
    ]
    assert all(each.speedup == 1.0 for each in speeds[:2]) and all(each.tokens_per_s > 0 for each in speeds)
    assert in_words(speeds).splitlines()[2].startswith("| vanilla | ")
    assert {path.name for path in write_batches(speeds, tmp_path)} == {"figure-batches.pdf", "figure-batches.png"}


def test_the_command(koala: Koala, bench: Bench, tmp_path: Path) -> None:
    at = ["--target", str(bench.folder / "target"), "--heads", str(bench.heads), "--methods", "vanilla,eagle", *EAGER]
    done = koala("batches", "--sizes", "1,2", "--tokens", "3", "--rounds", "1", "--out", str(tmp_path), *at)
    assert done.code == 0, done.err
    assert (tmp_path / "batches.md").read_text() in done.out + "\n"


@pytest.mark.parametrize("sizes", ["3", "0", "two", ""])
def test_other_sizes_are_one_clear_error(koala: Koala, sizes: str) -> None:
    done = koala("batches", "--sizes", sizes)
    assert done.code == 2 and "divisors of 8" in done.err


def test_each_answer_of_a_batch_is_held_against_what_the_target_computes_rightly(tmp_path: Path) -> None:
    """All together may take more rows than the target's factors last for, one alone may not."""
    target = tiny_target(tmp_path, FAMILIES["phi3-longrope"].config(), "float64")
    prompts = [[3 + (7 * place + number) % 250 for place in range(40)] for number in range(3)]
    found = decode_batch(target, Vanilla(), VANILLA_TREE, prompts, 20, ())
    assert found.tokens == [decode(target, Vanilla(), VANILLA_TREE, each, 20, ()).tokens for each in prompts]
    with pytest.raises(KoalaBenchError, match="more than 80 tokens"):
        decode_batch(target, Vanilla(), VANILLA_TREE, [prompts[0], prompts[0] * 2], 20, ())
