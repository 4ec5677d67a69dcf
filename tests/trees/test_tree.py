"""Trees: shapes, masks, templates, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koala_bench.errors import KoalaBenchError
from koala_bench.tree import TreeShape, TreeTemplate, load_template, template_names

shapes = st.lists(st.integers(0, 10**6), max_size=24).map(
    lambda draws: TreeShape((-1, *(draw % (node + 1) for node, draw in enumerate(draws))))
)


@given(shapes)
def test_a_node_sees_itself_and_exactly_its_ancestors(shape: TreeShape) -> None:
    for node in range(shape.nodes):
        seen = {i for i in range(shape.nodes) if shape.ancestors[node, i]}
        assert seen == set(shape.path_to(node))
        assert len(seen) == shape.depths[node] + 1


@given(shapes)
def test_leaf_paths_start_at_the_root_and_cover_every_node(shape: TreeShape) -> None:
    assert {node for path in shape.leaf_paths for node in path} == set(range(shape.nodes))
    for path in shape.leaf_paths:
        assert path[0] == 0
        assert all(shape.parents[child] == parent for parent, child in pairwise(path))


@pytest.mark.parametrize("parents", [(), (0,), (-1, 1), (-1, 0, 2), (-1, -1)])
def test_a_shape_without_root_or_order_is_refused(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="starts with its root"):
        TreeShape(parents)


def test_the_two_official_trees_of_one_name_are_kept_apart() -> None:
    medusa, eagle = load_template("medusa/mc_sim_7b_63"), load_template("eagle/mc_sim_7b_63")
    assert (medusa.nodes, medusa.depth) == (64, 4)
    assert (eagle.nodes, eagle.depth) == (26, 5)


@pytest.mark.parametrize("name", template_names())
def test_every_bundled_tree_is_valid_and_names_its_source(name: str) -> None:
    family, _, size = name.partition("/")
    assert load_template(name).nodes == ({"medusa": 64, "eagle": 26}.get(family) or int(size.rpartition("-")[2]))


def test_chains_and_products_are_made_from_their_names() -> None:
    assert load_template("chain-3").paths == ((0,), (0, 0), (0, 0, 0))
    assert load_template("2x1").paths == ((0,), (1,), (0, 0), (1, 0))


def test_a_template_can_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([[0, 1], [0], [1], [0, 0]]))
    assert load_template(str(path)).paths == ((0,), (1,), (0, 0), (0, 1))


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ([[0], [0]], "twice"),
        ([[0], [1, 0]], "parent"),
        ([[]], "not a path"),
        ([[-1]], "not a path"),
        ([["a"]], "not a path"),
    ],
)
def test_a_broken_template_is_refused_by_name(paths: list[list[int]], words: str) -> None:
    with pytest.raises(KoalaBenchError, match=words):
        TreeTemplate.of("mine", paths)


@pytest.mark.parametrize("name", ["chain-0", "chain-x", "mc_sim_7b_36", "0x2", "", "none.json", "99x99x99"])
def test_an_unknown_tree_is_one_clear_error(name: str) -> None:
    with pytest.raises(KoalaBenchError):
        load_template(name)


def test_a_misspelt_tree_gets_a_suggestion() -> None:
    with pytest.raises(KoalaBenchError, match="medusa/mc_sim_7b_63"):
        load_template("medusa/mc_sim_7b_36")


def test_a_tree_deeper_than_the_heads_is_refused() -> None:
    with pytest.raises(KoalaBenchError, match="4 levels deep, the head drafts only 3"):
        load_template("medusa/mc_sim_7b_63").check(depth=3, candidates=1000)


def test_a_tree_wider_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(KoalaBenchError, match="10 candidates"):
        load_template("medusa/mc_sim_7b_63").check(depth=4, candidates=9)
