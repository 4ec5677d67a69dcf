"""Passes of fixed shapes, as CUDA graphs need them: on the CPU the same functions on the same inputs, with a GPU the
graphs themselves.
"""

from __future__ import annotations

import gc
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch

from koala_bench.decoding.acceptance import SpeculativeSampling
from koala_bench.decoding.loop import decode
from koala_bench.decoding.sampling import Sampling
from koala_bench.engine.cache import attention_mask, write_rows
from koala_bench.engine.graphs import lowering
from koala_bench.engine.graphs.capture import Captured
from koala_bench.engine.graphs.replay import Recorded
from koala_bench.engine.target import drafted_and_likeliest
from koala_bench.presets import load_preset
from koala_bench.testing import tiny_config
from koala_bench.training.loop import build_head
from koala_bench.tree import ROOT_ONLY, DraftTree, TreeShape, load_template
from tests.decoding.test_decoding import CONFIGS, PROMPT, vanilla
from tests.engine.graphs.test_replay import verified
from tests.support.drafters import Oracle
from tests.support.engines import pair

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
METHODS = ["medusa", "eagle+koala", "eagle2", "hydra+koala", "eagle3", "draft_model"]


fixed_pair = partial(pair, fixed=True)  # called with passes of fixed shapes


EVERY = [*((family, "sdpa") for family in ("llama", *sorted(CONFIGS))), ("llama", "eager")]


@pytest.mark.parametrize(
    ("device", "family", "attention"),
    [  # on the CPU the other families are held against the models in test_replay.py
        *(("cpu", *each) for each in EVERY if each[0] in ("llama", "gpt2")),
        *(pytest.param("cuda", *each, marks=DEVICES[1].marks) for each in EVERY),
    ],
)
def test_a_verification_of_fixed_shape_is_the_models(tmp_path: Path, family: str, attention: str, device: str) -> None:
    eager, fixed = fixed_pair(tmp_path, CONFIGS.get(family), attention, device)
    within = 1e-9 if attention == "sdpa" else 1e-5  # transformers' own attention rounds its weights to float32
    draw = torch.Generator().manual_seed(0)
    for shape in (ROOT_ONLY, TreeShape((-1, 0)), TreeShape((-1, 0, 0, 1, 1, 3)), ROOT_ONLY):
        tree = DraftTree(torch.randint(3, 250, (shape.nodes,), generator=draw).to(device), shape)
        for prompt in (PROMPT, [*PROMPT, *PROMPT]):
            cut = len(prompt) + shape.nodes
            (logits, hidden, rows), (others, seen, written_) = (
                verified(eager, tree, prompt),
                verified(fixed, tree, prompt),
            )
            for one, other in ((logits, others), (hidden, seen), (rows[:, :, :, :cut], written_[:, :, :, :cut])):
                torch.testing.assert_close(one, other, rtol=within, atol=within)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_what_is_rewritten_for_a_gpu_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Joined products whose parts the model's own weights become, and plain norms; tried on the CPU, without kernels of
    our own.
    """
    eager, fixed = fixed_pair(tmp_path, dtype=dtype)
    monkeypatch.setattr(lowering, "_on_processor", lambda weight: False)
    monkeypatch.setattr(lowering, "_kernels", lambda constants: ())
    tree = DraftTree(torch.tensor([7, 8, 9]), TreeShape((-1, 0, 0)))
    wanted = verified(eager, tree, PROMPT)
    tolerance = 1e-9 if dtype == "float64" else 0.2
    for _ in range(2):  # the second time without recording
        for one, other in zip(wanted[:2], verified(fixed, tree, PROMPT)[:2], strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    layer = fixed.decoder.layers[0]
    query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
    assert query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
    assert torch.equal(query, eager.decoder.layers[0].self_attn.q_proj.weight)
    (captured,) = fixed._passes.values()
    assert isinstance(captured, Captured) and isinstance(captured._function, Recorded)
    ((recording,),) = captured._function._recordings.values()
    replay = recording.replay
    assert isinstance(replay, partial)
    called = set(replay.func.__code__.co_names)
    # In float64 transformers' norm rounds to float32, which is not what a norm's own kernel does.
    assert ("rms_norm" in called, "rsqrt" in called) == ((False, True) if dtype == "float64" else (True, False))
    assert "layer_norm" not in called


@pytest.mark.parametrize("device", DEVICES)
def test_decoding_is_lossless_and_captures_once_for_each_size(tmp_path: Path, device: str) -> None:
    eager, fixed = fixed_pair(tmp_path, device=device)
    truth = vanilla(eager, 60).tokens
    cache = fixed.new_cache(200)
    for tree in ("chain-5", "3x2x1", "chain-5"):
        assert decode(fixed, Oracle(truth, 259), load_template(tree), PROMPT, 60, (), cache).tokens == truth
    (captured,) = fixed._passes.values()
    assert isinstance(captured, Captured)
    assert len(captured._graphs) == 2  # six nodes and sixteen
    read = fixed.greedy_read
    assert isinstance(read, Captured) and len(read._graphs) == 2
    assert eager.greedy_read is drafted_and_likeliest
    assert fixed.recordings >= len(captured._graphs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_heads_draft_the_same_trees_with_fixed_shapes(tmp_path: Path, method: str, device: str) -> None:
    """Of random heads, so that hardly anything is accepted: the trees themselves are compared, over two answers."""
    eager, fixed = fixed_pair(tmp_path, tiny_config(num_hidden_layers=4 if "eagle3" in method else 2), device=device)
    options = [f'methods.draft_model.options.model="{tmp_path}"'] if method == "draft_model" else []
    preset = load_preset("tiny", options).method(method)
    found = []
    for target in (eager, fixed):
        torch.manual_seed(0)
        head = build_head(target, preset, seed=0).double().eval()
        found.append(
            [
                decode(target, head, load_template(preset.tree), prompt, 24, (), trace=True)
                for prompt in (PROMPT * 3, PROMPT)
            ]
        )
    for one, other in zip(*found, strict=True):
        assert one.tokens == other.tokens
        assert one.steps == other.steps


def test_samples_are_the_same_with_fixed_shapes(tmp_path: Path) -> None:
    eager, fixed = fixed_pair(tmp_path)
    preset = load_preset("tiny").method("eagle")
    found = []
    for target in (eager, fixed):
        torch.manual_seed(0)
        head = build_head(target, preset, seed=0).double().eval()
        rule = SpeculativeSampling(Sampling(0.8), torch.Generator().manual_seed(3))
        found.append(decode(target, head, load_template("2x2x1"), PROMPT, 24, (), trace=True, rule=rule))
    assert found[0].steps == found[1].steps


# ------------------------------------------------------------------------------ what a graph asks of a function


def test_the_mask_and_the_rows_are_those_of_dynamic_shapes() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.rand(3, 4, generator=draw) > 0.5
    for past in (0, 2, 6):
        dynamic, static = (attention_mask(hidden, each, 10, torch.float32) for each in (past, torch.tensor(past)))
        assert torch.equal(static[:, : past + 4], dynamic)
        assert (static[:, past + 4 :] == torch.finfo(torch.float32).min).all()
        assert torch.equal(dynamic == 0, torch.cat([torch.ones(3, past, dtype=torch.bool), ~hidden], dim=1))
        keys, values = torch.rand(2, 1, 2, 3, 5, generator=draw)
        one, other = torch.zeros(2, 2, 1, 2, 10, 5)
        until = write_rows(one, past, keys, values)
        every = write_rows(other, past + torch.arange(3), keys, values)
        assert torch.equal(one, other)
        assert [each.shape[2] for each in (*until, *every)] == [past + 3, past + 3, 10, 10]


@pytest.mark.parametrize("device", DEVICES)
def test_arguments_are_copied_but_for_those_that_stay(device: str) -> None:
    calls = []

    def add(
        x: torch.Tensor, number: torch.Tensor, rows: torch.Tensor, nothing: None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(x.shape)
        rows[:2].add_(0).copy_(x[:2] + number)
        return x + number, rows.sum()

    made: list[int] = []
    captured = Captured(add, (2,), (), torch.device(device), lambda: made.append(1))
    rows = torch.zeros(5, device=device)
    with torch.inference_mode():
        for count, number in ((3, 1), (4, 5), (3, 7), (4, -2)):
            x = torch.arange(float(count), device=device)
            total, whole = captured(x, number, rows, None)
            assert total.tolist() == [each + number for each in range(count)]
            assert rows.tolist() == [number, 1 + number, 0, 0, 0]
            assert float(whole) == 2 * number + 1
        other = torch.ones(5, device=device)
        captured(torch.zeros(3, device=device), 9, other, None)
    assert other.tolist() == [9, 9, 1, 1, 1]
    assert rows.tolist() == [-2, -1, 0, 0, 0]
    assert len(made) == 3  # two sizes, and other rows


@pytest.mark.parametrize("device", DEVICES)
def test_what_nobody_changes_is_copied_where_another_one_came(device: str) -> None:
    captured = Captured(lambda x, y: x + y, (), (1,), torch.device(device), lambda: None)
    one, other = torch.ones(2, device=device), torch.full((2,), 5.0, device=device)
    with torch.inference_mode():
        for constant, wanted in ((one, 1.0), (one, 1.0), (other, 5.0), (one, 1.0)):
            assert captured(torch.zeros(2, device=device), constant).tolist() == [wanted] * 2
        (graph,) = captured._graphs.values()
        own = graph.inputs[1]
        assert own is not None
        own.fill_(7.0)  # which the next call of the same would not undo
        assert captured(torch.zeros(2, device=device), one).tolist() == [7.0, 7.0]
        assert captured(torch.zeros(2, device=device), other).tolist() == [5.0, 5.0]


@pytest.mark.parametrize("device", DEVICES)
def test_what_stays_where_it_is_is_not_kept_alive(device: str) -> None:
    """An outgrown cache goes, though graphs were captured with it."""
    captured = Captured(lambda x, rows: rows[:3] + x, (1,), (), torch.device(device), lambda: None)
    rows = torch.ones(5, device=device)
    captured(torch.zeros(3, device=device), rows)
    gone = weakref.ref(rows.untyped_storage())
    del rows
    gc.collect()
    assert gone() is None
    other = torch.full((6,), 2.0, device=device)
    assert captured(torch.zeros(3, device=device), other).tolist() == [2.0] * 3


def test_graphs_are_not_kept_without_end() -> None:
    made: list[int] = []
    captured = Captured(lambda x: x * 2, (), (), torch.device("cpu"), lambda: made.append(1))
    for _ in range(2):
        for size in range(100):
            assert captured(torch.ones(size)).tolist() == [2.0] * size
    assert len(captured._graphs) == 64
    assert len(made) == 200
