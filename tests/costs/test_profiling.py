"""Profiles: the parts of a step add up, reads are counted, and watching a target changes nothing that it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from koala_bench.costs.bandwidth import weight_bytes
from koala_bench.costs.profile import PARTS, Profile, in_words, profile
from koala_bench.decoding.loop import decode
from koala_bench.engine.loading.targets import load_target
from koala_bench.evaluation.methods import load_methods
from koala_bench.testing import save_tiny_target, tiny_config
from tests.support.commands import Koala
from tests.support.small_runs import Bench


@pytest.fixture(scope="module")
def profiles(bench: Bench) -> list[Profile]:
    methods = load_methods(bench.preset(), ["vanilla", "medusa", "eagle"], bench.target, bench.heads)
    return profile(bench.target, methods, [[1, 2, 3, 4], [5, 6, 7]], tokens=9)


def test_parts_are_those_of_a_step_and_add_up(profiles: list[Profile]) -> None:
    assert [each.method for each in profiles] == ["vanilla", "medusa", "eagle"]
    for each in profiles:
        assert tuple(each.seconds) == PARTS and all(spent > 0 for spent in each.seconds.values())
        assert each.step_ms == pytest.approx(1000 * sum(each.seconds.values()) / each.steps)
        assert 0 < each.outside < 1
        assert each.tokens == 2 * 8
    assert profiles[0].steps == 2 * 8 and profiles[1].steps <= 16


def test_a_step_reads_from_the_device_once_whatever_drafts(profiles: list[Profile]) -> None:
    assert [each.reads for each in profiles] == [1.0, 1.0, 1.0]


def test_a_watched_target_says_the_same(bench: Bench) -> None:
    from koala_bench.costs.profile import _Watched

    (_, eagle) = load_methods(bench.preset(), ["vanilla", "eagle"], bench.target, bench.heads)
    prompt = [1, 2, 3, 4]
    plain = decode(bench.target, eagle.head, eagle.template, prompt, 9, ())
    assert decode(_Watched.of(bench.target), eagle.head, eagle.template, prompt, 9, ()).tokens == plain.tokens


def test_the_table_has_a_row_for_each_method(bench: Bench, profiles: list[Profile]) -> None:
    text = in_words(profiles, bench.target, 1e9)
    rows = [line.split(" | ") for line in text.splitlines()[4:7]]
    assert [row[0] for row in rows] == ["| vanilla", "| medusa", "| eagle"]
    for row, each in zip(rows, profiles, strict=True):
        rate = weight_bytes(bench.target) * each.steps / each.seconds["model"]
        assert row[-1] == f"{100 * rate / 1e9:.0f} |"
    assert "float64" in text


def test_the_command(koala: Koala, bench: Bench, tmp_path: Path) -> None:
    at = [
        "--target", str(bench.folder / "target"), "--heads", str(bench.heads), "--tokens", "4", "--tree", "2x1",
        "--engine", "eager",
    ]  # fmt: skip
    done = koala("profile", *at, "--methods", "vanilla,eagle", "--out", str(tmp_path / "profile.md"))
    assert done.code == 0, done.err
    assert (tmp_path / "profile.md").read_text() == done.out


def test_the_weights_of_a_pass_are_all_but_an_input_embedding_of_its_own(tmp_path: Path) -> None:
    for tied in (False, True):
        config = tiny_config(tie_word_embeddings=tied)
        target = load_target(str(save_tiny_target(tmp_path / str(tied), config)), "cpu", "float32")
        embedding = 0 if tied else config.vocab_size * config.hidden_size
        assert weight_bytes(target) == 4 * (target.parameters - embedding)
