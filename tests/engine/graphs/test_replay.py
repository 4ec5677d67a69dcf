"""Recorded passes: the same numbers as the model and the heads themselves, one recording for all sizes that move, and
clear refusals.
"""

from __future__ import annotations

import dis
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from koala_bench.common.draft_vocabulary import DraftVocabulary
from koala_bench.decoding.acceptance import SpeculativeSampling
from koala_bench.decoding.loop import decode
from koala_bench.decoding.sampling import Sampling
from koala_bench.engine.devices import pick_engine
from koala_bench.engine.graphs import lowering
from koala_bench.engine.graphs.lowering import Layouts
from koala_bench.engine.graphs.replay import Recorded, UntraceableError, compare
from koala_bench.engine.processor import kernels
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import load_preset
from koala_bench.testing import tiny_config
from koala_bench.training.loop import build_head
from koala_bench.tree import ROOT_ONLY, DraftTree, TreeShape, load_template
from tests.decoding.test_decoding import CONFIGS, PROMPT, vanilla
from tests.support.drafters import Oracle
from tests.support.engines import pair


def verified(target: Target, tree: DraftTree, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    cache = target.new_cache(64)
    target.prefill(torch.tensor(prompt, device=target.device), cache, (0, 1, -1))
    logits, hidden = target.verify(tree, cache, (0, 1, -1))
    return logits, hidden, cache.storage


@pytest.mark.parametrize(
    ("family", "attention"),
    [*((family, "sdpa") for family in ("llama", *sorted(CONFIGS))), ("llama", "eager"), ("gpt2", "eager")],
)
def test_a_replayed_verification_is_the_models(tmp_path: Path, family: str, attention: str) -> None:
    eager, graph = pair(tmp_path, CONFIGS.get(family), attention=attention)
    draw = torch.Generator().manual_seed(0)
    for shape in (ROOT_ONLY, TreeShape((-1, 0)), TreeShape((-1, 0, 0, 1, 1, 3)), ROOT_ONLY):
        tree = DraftTree(torch.randint(3, 250, (shape.nodes,), generator=draw), shape)
        for prompt in (PROMPT, [*PROMPT, *PROMPT]):
            for one, other in zip(verified(eager, tree, prompt), verified(graph, tree, prompt), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert graph.engine == "graph"
    assert [recorded.refusal for recorded in graph._passes.values()] == [None] * 2  # type: ignore[attr-defined]


def test_a_full_cache_is_no_other_case(tmp_path: Path) -> None:
    """Recorded with room to spare, replayed where the last node takes the last row."""
    eager, graph = pair(tmp_path)
    tree = DraftTree(torch.tensor([7, 8, 9]), TreeShape((-1, 0, 0)))
    found = []
    for target in (eager, graph):
        for room in (20, 3):
            cache = target.new_cache(len(PROMPT) + room)
            target.prefill(torch.tensor(PROMPT), cache)
            found.append(target.verify(tree, cache)[0])
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-4), ("bfloat16", 0.2)])
def test_in_less_precision_it_differs_by_rounding(tmp_path: Path, dtype: str, within: float) -> None:
    eager, graph = pair(tmp_path, dtype=dtype)
    tree = DraftTree(torch.tensor([7, 8, 9]), TreeShape((-1, 0, 1)))
    torch.testing.assert_close(
        verified(eager, tree, PROMPT)[0], verified(graph, tree, PROMPT)[0], rtol=within, atol=within
    )


def test_decoding_is_lossless_and_one_recording_serves_a_whole_answer(tmp_path: Path) -> None:
    eager, graph = pair(tmp_path)
    truth = vanilla(eager, 60).tokens
    assert vanilla(graph, 60).tokens == truth
    for tree in ("chain-5", "3x2x1"):
        assert decode(graph, Oracle(truth, 259), load_template(tree), PROMPT, 60, ()).tokens == truth
    (recorded,) = graph._passes.values()
    assert isinstance(recorded, Recorded)
    assert len(recorded._recordings) == 2  # a root alone, and every other tree at every place


@pytest.mark.parametrize(
    "method", ["medusa+koala", "eagle+koala", "eagle2", "hydra+koala", "eagle3+koala", "draft_model"]
)
def test_heads_draft_the_same_trees_replayed(tmp_path: Path, method: str) -> None:
    """Of random heads, so that hardly anything is accepted: the trees themselves are compared."""
    eager, graph = pair(tmp_path, tiny_config(num_hidden_layers=4 if "eagle3" in method else 2))
    options = [f'methods.draft_model.options.model="{tmp_path}"'] if method == "draft_model" else []
    preset = load_preset("tiny", options).method(method)
    found = []
    for target in (eager, graph):
        torch.manual_seed(0)
        head = build_head(target, preset, seed=0).double().eval()
        found.append(decode(target, head, load_template(preset.tree), PROMPT, 24, (), trace=True))
    assert found[0].tokens == found[1].tokens
    assert found[0].steps == found[1].steps


@pytest.mark.parametrize("method", ["medusa", "eagle"])
def test_trees_that_take_turns_are_recorded_once(tmp_path: Path, method: str) -> None:
    _, graph = pair(tmp_path)
    head = build_head(graph, load_preset("tiny").method(method), seed=0).double().eval()
    trees = [load_template(name) for name in ("chain-3", "3x2x1")]
    made = []
    for _ in range(3):
        for tree in trees:
            decode(graph, head, tree, PROMPT, 12, ())
        made.append(graph.recordings)
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("method", ["medusa", "eagle", "hydra+koala"])
def test_samples_are_the_same_replayed(tmp_path: Path, method: str) -> None:
    """Drawn candidates need the host between levels: each level is a pass of its own then."""
    eager, graph = pair(tmp_path)
    preset = load_preset("tiny").method(method)
    found = []
    for target in (eager, graph):
        torch.manual_seed(0)
        head = build_head(target, preset, seed=0).double().eval()
        for tree in ("chain-3", "3x2x1"):
            rule = SpeculativeSampling(Sampling(0.8), torch.Generator().manual_seed(3))
            found.append(decode(target, head, load_template(tree), PROMPT, 16, (), trace=True, rule=rule))
    assert [each.steps for each in found[:2]] == [each.steps for each in found[2:]]


# ------------------------------------------------------------------------------ recordings


def only(recorded: Any) -> Any:
    """What the one recording there is replays."""
    ((recording,),) = recorded._recordings.values()
    return recording.replay


class Small(nn.Module):
    """Three products of one input, a norm, a rotation and a product behind which something is added."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(8, size, bias=False) for size in (8, 4, 4))
        self.out = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor, past: int, rows: torch.Tensor) -> torch.Tensor:
        normed = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        q, k, v = (part(normed) for part in self.parts)
        turned = torch.cat([-q[..., 4:], q[..., :4]], dim=-1)
        q = q * rows[-1].cos() + turned * rows[-1].sin()
        rows[past : past + x.shape[0], :4].copy_(k)
        return x + self.out(F.silu(q)) * v.mean() + rows[: past + x.shape[0]].sum()


MOVING = ((0,), (), (0,))


def small(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(rows)
    return torch.rand(rows, 8, generator=draw), torch.rand(30, 8, generator=draw)


def test_a_recording_computes_and_writes_what_the_function_does() -> None:
    module = Small()
    recorded = Recorded(module, MOVING, Layouts())
    with torch.inference_mode():
        for count, past in ((3, 0), (5, 7), (1, 2), (1, 9), (3, 0), (20, 10)):
            x, rows = small(count)
            own = rows.clone()
            torch.testing.assert_close(recorded(x, past, own), module(x, past, rows))
            torch.testing.assert_close(own, rows)
    assert len(recorded._recordings) == 2  # one row, and several


def test_products_of_one_input_become_one_and_the_norm_and_the_rotation_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda: False)
    monkeypatch.setattr(lowering, "_PACK_ABOVE", 0)  # as if these were large
    recorded = Recorded(Small(), MOVING, Layouts())
    x, rows = small(3)
    with torch.inference_mode():
        recorded(x, 2, rows)
    replay = only(recorded)
    names = replay.func.__code__.co_names  # type: ignore[attr-defined]
    assert {"layer_norm", "roll", "addcmul"} <= set(names)
    assert not {"rsqrt", "pow", "neg"} & set(names)
    packed = [value for name, value in vars(replay.args[0]).items() if name.startswith("packed")]  # type: ignore[attr-defined]
    assert len(packed) == 2


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_queries_and_keys_are_turned_together(tmp_path: Path, kv_heads: int) -> None:
    _, graph = pair(tmp_path, tiny_config(num_hidden_layers=3, num_key_value_heads=kv_heads))
    verified(graph, DraftTree(torch.tensor([7, 8, 9]), TreeShape((-1, 0, 0))), PROMPT)
    replay = only(graph._passes[0, 1, -1])
    assert [step.argval for step in dis.get_instructions(replay.func)].count("roll") == 3  # one a layer


@pytest.mark.parametrize(
    ("size", "columns", "layout"),
    [(192, 192, "column_major"), (192, 512, "packed"), (576, 192, "packed"), (4096, 192, "packed")],
)
@pytest.mark.parametrize("one_row", [False, True])
def test_without_a_compiler_the_layout_goes_by_the_size_of_the_weights(
    size: int, columns: int, one_row: bool, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "available", lambda: False)
    assert lowering._layout((torch.empty(size, columns),), one_row) == layout
    assert lowering._layout((torch.empty(size, columns, dtype=torch.float64),), one_row) == (
        "column_major" if one_row else "plain"
    )


def test_what_is_computed_twice_is_computed_once_but_for_what_is_written_between() -> None:
    def read(x: torch.Tensor, rows: torch.Tensor, start: int) -> torch.Tensor:
        places = start + torch.arange(2)
        before, again = x.index_select(0, places), x.index_select(0, start + torch.arange(2))
        first = rows.index_select(0, places)
        rows.index_copy_(0, places, before + again)
        second = rows.index_select(0, places + 0)
        rows.index_copy_(0, places, first)  # so that the same happens when it is called again
        return torch.stack([before, again, first, second])

    recorded = Recorded(read, ((), (), ()), Layouts())
    x = torch.arange(5.0)
    for start in (0, 3):
        rows = torch.full((5,), 9.0)
        with torch.inference_mode():
            found = recorded(x, rows, start)
        own = x[start : start + 2]
        assert found.tolist() == [own.tolist(), own.tolist(), [9.0, 9.0], (2 * own).tolist()]
    replay = only(recorded)
    code = replay.func.__code__  # type: ignore[attr-defined]
    names = [each.argval for each in dis.get_instructions(code) if each.opname in ("LOAD_ATTR", "LOAD_METHOD")]
    assert names.count("index_select") == 3
    assert "arange" not in names


def test_what_is_written_into_is_made_anew_each_time() -> None:
    weight = torch.nn.Parameter(torch.ones(2), requires_grad=False)

    def count(x: torch.Tensor) -> torch.Tensor:
        ones, other = torch.ones(2), torch.ones(2)
        first, second = x + 1, x + 1
        known = weight + 1
        ones.add_(x)
        first.mul_(3)
        known[:1].add_(x[:1])
        return torch.stack([ones, other, first, second, known])

    recorded = Recorded(count, ((),), Layouts())
    x = torch.tensor([1.0, 2.0])
    for _ in range(3):
        with torch.inference_mode():
            assert recorded(x).tolist() == [[2.0, 3.0], [1.0, 1.0], [6.0, 9.0], [2.0, 3.0], [3.0, 2.0]]


def test_a_weight_that_changed_is_noticed() -> None:
    module = Small()
    recorded = Recorded(module, MOVING, Layouts())
    x, rows = small(3)
    with torch.no_grad():
        before = recorded(x, 2, rows)
        module.out.weight += 1.0
        torch.testing.assert_close(recorded(x, 2, rows), module(x, 2, rows))
        assert not torch.allclose(before, recorded(x, 2, rows))


def test_recordings_share_the_weights_they_lay_out() -> None:
    module, layouts = Small(), Layouts()
    first, second = (Recorded(module, MOVING, layouts) for _ in range(2))
    x, rows = small(3)
    with torch.inference_mode():
        first(x, 2, rows)
        known = len(layouts._known)
        second(x, 2, rows)
    assert len(layouts._known) == known > 0


def counted(recorded: Recorded) -> int:
    return sum(map(len, recorded._recordings.values()))


@pytest.mark.parametrize(
    ("branch", "recordings"),
    [
        (lambda x, n: x * 2 if x.shape[0] < 100 else x, 2),
        (lambda x, n: x * 2 if n < 7 else x, 2),
        (lambda x, n: x * 2 if x.shape[0] + n >= 100 else x - 1, 2),
        (lambda x, n: x * 2 if x.shape[0] == 3 else x, 2),
        (lambda x, n: x * 2 if x.shape[0] % 2 else x, 2),
        (lambda x, n: x * x.shape[0] + n, 1),
    ],
)
def test_where_another_branch_would_be_taken_it_is_recorded_anew(
    branch: Any, recordings: int, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = Recorded(branch, ((0,), ()), Layouts())
    for size, number in ((3, 5), (120, 5), (50, 9), (3, 99), (98, 1), (99, 1), (3, 5), (1000, 0)):
        x = torch.arange(float(size))
        assert torch.equal(recorded(x, number), branch(x, number))
    assert counted(recorded) == recordings
    assert capsys.readouterr().err == ""


def test_a_model_that_changes_with_the_length_is_replayed_as_it_is(tmp_path: Path) -> None:
    """As one with a cutoff in its own code would: the states double from twenty positions on."""
    eager, graph = pair(tmp_path)
    for target in (eager, graph):
        norm = target.model.model.norm
        norm.register_forward_hook(lambda module, inputs, out: out)
        layer = target.model.model.layers[-1].self_attn.o_proj
        attend = target.model.model.layers[-1].self_attn

        def scaled(module: Any, inputs: Any, kwargs: Any, out: Any, layer: Any = layer) -> Any:
            cache = kwargs["past_key_values"]
            return (out[0] * 3 if cache is not None and cache.get_seq_length() > 20 else out[0], *out[1:])

        attend.register_forward_hook(scaled, with_kwargs=True)
    truth = vanilla(eager, 40).tokens
    assert vanilla(graph, 40).tokens == truth


def test_what_depends_on_every_size_is_called_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    recorded = Recorded(lambda x: x * len(list(range(x.shape[0]))), ((0,),), Layouts())
    for size in range(3, 40):
        assert torch.equal(recorded(torch.ones(size)), torch.full((size,), float(size)))
    assert recorded.refusal is not None
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_torch_logs_of_a_trace_that_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("torch._subclasses.fake_tensor")

    def refused(x: torch.Tensor) -> torch.Tensor:
        logger.error("a long traceback")
        return x if bool(x.sum() > 0) else -x

    recorded = Recorded(refused, ((0,),), Layouts())
    assert recorded(torch.ones(2)).tolist() == [1.0, 1.0] and recorded.refusal is not None
    said = [record for record in caplog.records if record.name == logger.name]
    assert len(said) == 1, "of the call itself, which is not a trace"


def test_what_depends_on_values_is_called_as_it_is_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    recorded = Recorded(lambda x: x if bool(x.sum() > 0) else -x, ((0,),), Layouts())
    for _ in range(2):
        assert recorded(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
        assert recorded(torch.tensor([-1.0, -2.0])).tolist() == [1.0, 2.0]
    (line,) = capsys.readouterr().err.splitlines()
    assert "--engine eager" in line


def test_a_recording_that_would_be_wrong_is_not_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []

    def forgetful(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x * len(calls)

    recorded = Recorded(forgetful, ((0,),), Layouts())
    for _ in range(2):
        assert recorded(torch.ones(3)).tolist() == [float(len(calls))] * 3
    assert "off by" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "device", "words"), [("fast", "cpu", "no engine"), ("", "cuda", "no engine")])
def test_impossible_engines_are_refused(name: str, device: str, words: str) -> None:
    with pytest.raises(KoalaBenchError, match=words):
        pick_engine(name, torch.device(device))


def test_the_papers_protocol_is_the_default_where_there_is_a_gpu() -> None:
    assert (pick_engine("auto", torch.device("cpu")), pick_engine("auto", torch.device("cuda"))) == ("graph", "eager")


def test_scores_of_tokens_that_are_not_drafted_agree() -> None:
    """A cut vocabulary has -inf for them, and the difference of two infinities is no number."""
    scores = torch.tensor([1.0, float("-inf"), 2.0])
    compare(scores, scores + 1e-6, half=False)
    for other in (torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.5, float("-inf"), 2.0]), scores * float("nan")):
        with pytest.raises(UntraceableError):
            compare(scores, other, half=False)


@pytest.mark.parametrize("log_probabilities", [False, True])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_tokens_are_picked_among_those_that_can_be_drafted(count: int, log_probabilities: bool) -> None:
    """With more picks than tokens to draft, impossible ones are among them, as without a recording."""
    vocabulary = DraftVocabulary(torch.tensor([7, 2, 40, 11]), 50)

    def picks(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        spread = vocabulary.spread(scores)
        top = (torch.log_softmax(spread, dim=-1) if log_probabilities else spread).topk(count, dim=-1)
        return top.values, top.indices

    recorded = Recorded(picks, ((0,),), Layouts())
    for rows in (3, 2, 1):
        scores = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
        with torch.inference_mode():
            (values, tokens), (expected, other) = recorded(scores), picks(scores)
        torch.testing.assert_close(values, expected)
        assert tokens.shape == other.shape
        assert torch.equal(tokens[:, :4], other[:, :4])
    assert recorded.refusal is None
    used = set().union(*(recording.replay.func.__code__.co_names for (recording,) in recorded._recordings.values()))  # type: ignore[attr-defined]
    assert ("index_copy" in used) == (count > 4)
