"""Properties that hold for whatever is drawn: trees, masks, the cache after a commit, acceptance, whole answers,
records.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from koala_bench.decoding.acceptance import greedy
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.cache import TreeCache
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.recording import open_record
from koala_bench.records.reading import parse, read_run
from koala_bench.records.schema import TurnLine, key_of
from koala_bench.tree import DraftTree, TreeShape, TreeTemplate
from tests.support.drafters import Oracle
from tests.support.synthetic_run import failed, make_header, make_turn

few = settings(max_examples=40, derandomize=True, deadline=None, database=None)

Path_ = tuple[int, ...]


@st.composite
def paths(draw: st.DrawFn, most: int = 12) -> list[Path_]:
    """Child-rank paths of a template, parents included, ranks with gaps."""
    found: list[Path_] = []
    for _ in range(draw(st.integers(1, most))):
        parent = draw(st.sampled_from([(), *found]))
        taken = {path[-1] for path in found if path[:-1] == parent}
        found.append((*parent, draw(st.sampled_from([rank for rank in range(most + 2) if rank not in taken]))))
    return found


@st.composite
def drafts(draw: st.DrawFn, most: int = 12, vocabulary: int = 4) -> tuple[DraftTree, list[int]]:
    """A tree of few tokens, so that siblings repeat each other and paths are accepted, and the target's choice at each
    node.
    """
    parents = (-1, *(draw(st.integers(0, node - 1)) for node in range(1, draw(st.integers(1, most)))))
    tokens, best = (
        draw(st.lists(st.integers(0, vocabulary - 1), min_size=len(parents), max_size=len(parents))) for _ in range(2)
    )
    return DraftTree(torch.tensor(tokens), TreeShape(parents)), best


# ---------------------------------------------------------------------------------------------- trees and masks


@few
@given(paths(), st.randoms(use_true_random=False))
def test_a_template_is_the_same_however_its_paths_are_ordered(found: list[Path_], random: Any) -> None:
    shuffled = list(found)
    random.shuffle(shuffled)
    template = TreeTemplate.of("mine", found)
    assert TreeTemplate.of("mine", shuffled) == template
    assert set(template.paths) == set(found)
    assert template.nodes == len(found) + 1 == template.shape.nodes
    assert template.depth == max(map(len, found)) == template.shape.depth


@few
@given(paths())
def test_nodes_lie_below_the_node_of_the_path_above_theirs(found: list[Path_]) -> None:
    template = TreeTemplate.of("mine", found)
    nodes = [(), *template.paths]
    for node, path in enumerate(nodes[1:], start=1):
        assert nodes[template.shape.parents[node]] == path[:-1]
        assert template.shape.depths[node] == len(path)
    leaves = {path for path in nodes if not any(other[:-1] == path for other in template.paths)}
    assert {nodes[path[-1]] for path in template.shape.leaf_paths} == leaves
    assert {node for path in template.shape.leaf_paths for node in path} == set(range(template.nodes))


@few
@given(paths(), st.integers(0, 20))
def test_the_mask_shows_all_committed_rows_and_of_the_tree_the_ancestors_only(found: list[Path_], past: int) -> None:
    shape = TreeTemplate.of("mine", found).shape
    cache = TreeCache(1, past + shape.nodes)
    cache.past = past
    mask, depths = cache.tree_buffers(shape, torch.float32, torch.device("cpu"))
    assert mask.shape == (1, 1, shape.nodes, past + shape.nodes)
    for node in range(shape.nodes):
        above, each = set(), node
        while each >= 0:
            above.add(past + each)
            each = shape.parents[each]
        seen = {column for column in range(past + shape.nodes) if mask[0, 0, node, column] == 0}
        assert seen == set(range(past)) | above
        assert int(depths[0, node]) == len(above) - 1
    assert set(mask.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}


# ---------------------------------------------------------------------------------------------- commit


def rows_of(cache: TreeCache) -> torch.Tensor:
    """Keys and values of all layers, [layers, 2, heads, capacity, dim]."""
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])  # type: ignore[attr-defined]


@few
@given(drafts(vocabulary=259), st.lists(st.integers(3, 258), min_size=1, max_size=9), st.data())
@torch.inference_mode()
def test_committed_rows_are_those_of_a_plain_pass_and_others_are_untouched(
    target64: Target, draft: tuple[DraftTree, list[int]], prompt: list[int], data: Any
) -> None:
    tree = draft[0]
    path = tree.shape.path_to(data.draw(st.integers(0, tree.shape.nodes - 1)))
    cache = target64.new_cache(64)
    target64.prefill(torch.tensor(prompt), cache)
    target64.verify(tree, cache)
    before, past = rows_of(cache).clone(), cache.past
    cache.commit(path)
    after, committed = rows_of(cache), past + len(path)
    assert cache.past == committed

    plain = target64.new_cache(64)
    target64.prefill(torch.tensor([*prompt, *tree.tokens[list(path)].tolist()]), plain)
    torch.testing.assert_close(after[..., :committed, :], rows_of(plain)[..., :committed, :], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(after[..., :past, :], before[..., :past, :], atol=0, rtol=0)
    torch.testing.assert_close(after[..., committed:, :], before[..., committed:, :], atol=0, rtol=0)


# ---------------------------------------------------------------------------------------------- acceptance


def right_paths(tree: DraftTree, best: Sequence[int]) -> list[Path_]:
    """By brute force: every path from the root on which each token is what the target chose at the node above it."""
    found = []
    for node in range(tree.shape.nodes):
        path = tree.shape.path_to(node)
        if all(int(tree.tokens[below]) == best[above] for above, below in itertools.pairwise(path)):
            found.append(path)
    return found


@few
@given(drafts())
def test_the_accepted_path_is_right_and_cannot_be_made_longer(draft: tuple[DraftTree, list[int]]) -> None:
    tree, best = draft
    path, tokens, _ = greedy(tree, torch.nn.functional.one_hot(torch.tensor(best), 4).float())
    assert path in right_paths(tree, best)
    # The bonus token is the target's own, and what was accepted is what it chose at the node above.
    assert tokens == [best[node] for node in path]
    assert len(tokens) == len(path) >= 1
    assert not any(longer[:-1] == path for longer in right_paths(tree, best))


@few
@given(drafts())
def test_where_no_sibling_repeats_another_the_accepted_path_is_the_longest_of_all(
    draft: tuple[DraftTree, list[int]],
) -> None:
    tree, best = draft
    seen: set[tuple[int, int]] = set()
    kept = {0: 0}  # node -> its place in the tree without repeated siblings
    for node in range(1, tree.shape.nodes):
        place = (tree.shape.parents[node], int(tree.tokens[node]))
        if place[0] in kept and place not in seen:
            seen.add(place)
            kept[node] = len(kept)
    shape = TreeShape((-1, *(kept[tree.shape.parents[node]] for node in list(kept)[1:])))
    pruned, choice = DraftTree(tree.tokens[list(kept)], shape), [best[node] for node in kept]
    path, *_ = greedy(pruned, torch.nn.functional.one_hot(torch.tensor(choice), 4).float())
    assert path == max(right_paths(pruned, choice), key=len)


# ---------------------------------------------------------------------------------------------- whole answers


@settings(few, max_examples=15)
@given(
    paths(),
    st.lists(st.integers(3, 258), min_size=1, max_size=12),
    st.integers(1, 24),
    st.floats(0, 1),
    st.integers(0, 1000),
)
def test_any_drafter_on_any_tree_gives_vanillas_answer(
    target64: Target, found: list[Path_], prompt: list[int], limit: int, right: float, seed: int
) -> None:
    truth = decode(target64, Vanilla(), VANILLA_TREE, prompt, limit, target64.stop_ids)
    answer = decode(
        target64,
        Oracle(truth.tokens, 259, right, seed),
        TreeTemplate.of("drawn", found),
        prompt,
        limit,
        target64.stop_ids,
    )
    assert (answer.tokens, answer.stop) == (truth.tokens, truth.stop)
    assert len(answer.tokens) == 1 + sum(answer.accepted) + len(answer.accepted)
    assert all(0 <= count <= depth for count, depth in zip(answer.accepted, answer.drafted_depth, strict=True))


# ---------------------------------------------------------------------------------------------- records

METHODS = ["vanilla", "eagle"]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def turns(draw: st.DrawFn) -> list[TurnLine]:
    """Turns of a record, failed ones among them, with texts that are hard on a file of lines."""
    places = draw(
        st.lists(
            st.tuples(st.sampled_from(METHODS), st.integers(1, 4), st.integers(0, 1)),
            unique=True,
            min_size=1,
            max_size=6,
        )
    )
    found = []
    for method, question, number in places:
        turn = make_turn(
            method, question, number, text=draw(TEXTS), category=draw(TEXTS), decode_s=draw(st.floats(0, 1e9))
        )
        found.append(failed(turn, draw(TEXTS)) if draw(st.booleans()) else turn)
    return found


def write(path: Path, found: Sequence[TurnLine]) -> bytes:
    with open_record(path, make_header(METHODS)) as writer:
        for turn in found:
            if key_of(turn) not in writer.done:
                writer.append(turn)
        if not writer.finished:
            writer.finish(1.0)
    return path.read_bytes()


@few
@given(turns())
def test_what_is_written_is_what_is_read(found: list[TurnLine]) -> None:
    with TemporaryDirectory() as folder:
        write(Path(folder) / "run.jsonl", found)
        run = read_run(Path(folder) / "run.jsonl")
    assert (run.header, run.turns, run.finished) == (make_header(METHODS), found, True)


@few
@given(turns(), st.data())
def test_a_record_cut_anywhere_and_resumed_is_the_record_without_interruption(found: list[TurnLine], data: Any) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        whole = write(path, found)
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
        assert write(path, found) == whole
        assert [each.name for each in Path(folder).iterdir()] == ["run.jsonl"]


@settings(few, max_examples=150)
@given(turns(), st.data())
def test_a_damaged_byte_is_refused_by_name_or_changes_its_own_line_alone(found: list[TurnLine], data: Any) -> None:
    """Lines have no checksums: a letter that became another within a text is read as it is. No other line moves, and
    nothing else is raised.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        whole = write(path, found)
    content, place = bytearray(whole), data.draw(st.integers(0, len(whole) - 1))
    content[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
    try:
        run, _ = parse(path, bytes(content))
    except KoalaBenchError as error:
        assert "run.jsonl" in error.message and error.remedy
        return
    assert [
        run.header != make_header(METHODS),
        *(mine != theirs for mine, theirs in zip(run.turns, found, strict=False)),
    ].count(True) <= 1
    # Like a kill, damage at the very end may cost the end line, or the line end before it and with it the last turn.
    at_the_end = place >= whole.rstrip().rfind(b"\n")
    assert run.finished or at_the_end
    assert len(run.turns) >= len(found) - at_the_end


@few
@given(turns(), st.binary(min_size=1, max_size=30), st.data())
def test_noise_in_a_record_is_an_error_with_a_remedy_or_no_error(
    found: list[TurnLine], noise: bytes, data: Any
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        content = write(path, found)
        place = data.draw(st.integers(0, len(content)))
        path.write_bytes(content[:place] + noise + content[place:])
        try:
            read_run(path)
        except KoalaBenchError as error:
            assert error.remedy
