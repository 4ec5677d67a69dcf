"""Kernels compiled for the processor: what torch computes, the same bits for a row in any company, and what happens
without a compiler.
"""

from __future__ import annotations

import dis
import platform
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from koala_bench.costs.bandwidth import weight_bytes
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.graphs.lowering import Layouts
from koala_bench.engine.graphs.replay import Recorded
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.processor import compiling, kernels
from koala_bench.engine.target import Target
from koala_bench.testing import tiny_config
from koala_bench.tree import ROOT_ONLY, DraftTree, TreeShape
from tests.decoding.test_decoding import CONFIGS, PROMPT
from tests.engine.graphs.test_replay import verified
from tests.support.engines import pair

needs_compiler = pytest.mark.skipif(not kernels.available(), reason="no C compiler")
TREE = TreeShape((-1, 0, 0, 1, 3, 3, 4))
PATH = (0, 1, 3, 4, 6)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@needs_compiler
@pytest.mark.parametrize(("count", "width"), [(1, 1), (5, 3), (48, 16), (100, 33), (257, 64), (4096, 96)])
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 10, 11, 26, 40])
def test_linear_layers(count: int, width: int, rows: int) -> None:
    x, weight, bias, other = drawn(1, rows, width), drawn(count, width), drawn(count), drawn(1, rows, count)
    packed = kernels.in_blocks(weight)
    for added in (None, bias), (other, None), (other, bias):
        residual, term = added
        found = kernels.linear(x, packed, term, residual, count)
        expected = F.linear(x.double(), weight.double(), None if term is None else term.double())
        expected = expected if residual is None else expected + residual
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * width**0.5)
    strided = drawn(1, width, rows).transpose(1, 2)
    torch.testing.assert_close(
        kernels.linear(strided, packed, None, None, count), F.linear(strided, weight), rtol=1e-4, atol=1e-4
    )
    assert kernels.linear(x[:, :0], packed, bias, None, count).shape == (1, 0, count)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 10, 11])
def test_weights_of_bfloat16_take_half_the_memory_and_give_the_same_bits(rows: int) -> None:
    weight, x = drawn(64, 33).bfloat16().float(), drawn(rows, 33)
    half, whole = kernels.in_blocks(weight), kernels.in_blocks(torch.cat([weight, drawn(1, 33)]))
    assert (half.dtype, whole.dtype) == (torch.bfloat16, torch.float32)
    found = kernels.linear(x, half, None, None, 64)
    assert torch.equal(found, kernels.linear(x, whole, None, None, 65)[:, :64])


@needs_compiler
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 16), (6, 2, 64), (2, 1, 96), (4, 2, 128)])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 50), (3, 17), (6, 100), (70, 80)])
def test_attention(heads: int, groups: int, width: int, rows: int, keys: int) -> None:
    cache = drawn(2, 1, groups, keys + 5, width)
    query, (key, value) = drawn(1, rows, heads, width).transpose(1, 2), cache[:, :, :, :keys]
    hidden = torch.rand(1, 1, rows, keys, generator=torch.Generator().manual_seed(1)) < 0.3
    hidden[..., 0] = False
    for mask in (None, torch.zeros(1, 1, rows, keys).masked_fill(hidden, torch.finfo(torch.float32).min)):
        found = kernels.attend(query, key, value, mask, 0.3)
        expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
def test_attention_of_several_sequences_as_long_as_each_is(threads: int) -> None:
    lengths = torch.tensor([1, 50, 17, 33])
    query, key, value = drawn(4, 6, 3, 32), drawn(4, 2, 50, 32, seed=1), drawn(4, 2, 50, 32, seed=2)
    hidden = torch.arange(50)[None, None, None] >= lengths[:, None, None, None]
    mask = torch.zeros(4, 1, 3, 50).masked_fill(hidden, torch.finfo(torch.float32).min)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = kernels.attend(query, key, value, mask, 0.2)
    finally:
        torch.set_num_threads(before)
    for row, length in enumerate(lengths.tolist()):
        own = slice(row, row + 1)
        alone = kernels.attend(query[own], key[own, :, :length], value[own, :, :length], None, 0.2)
        assert torch.equal(found[own], alone), "keys behind those that are seen change no bit"
    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.2, enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("size", [1e-20, 1.0, 50.0, 1e4])
def test_norms_and_gates(size: float) -> None:
    x, weight = size * drawn(1, 5, 70), drawn(70)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-6), F.rms_norm(x, (70,), weight, 1e-6))
    both = size * drawn(1, 5, 96)
    torch.testing.assert_close(kernels.gate(both), F.silu(both[..., :48]) * both[..., 48:], rtol=1e-5, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("family", ["llama", *sorted(CONFIGS)])
def test_a_replayed_verification_is_the_models(tmp_path: Path, family: str) -> None:
    eager, graph = pair(tmp_path, CONFIGS.get(family), dtype="float32")
    for shape in (ROOT_ONLY, TreeShape((-1, 0)), TREE):
        tree = DraftTree(torch.arange(shape.nodes) + 5, shape)
        for one, other in zip(verified(eager, tree, PROMPT), verified(graph, tree, PROMPT), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert [recorded.refusal for recorded in graph._passes.values()] == [None] * 2  # type: ignore[attr-defined]


@needs_compiler
@pytest.mark.parametrize(("kv_heads", "rounded"), [(4, False), (2, False), (1, False), (2, True)])
def test_a_verification_has_the_bits_of_vanilla_decoding(tmp_path: Path, kv_heads: int, rounded: bool) -> None:
    """Not only up to rounding: so nearly equal scores of two tokens never fall the other way."""
    _, graph = pair(
        tmp_path, tiny_config(hidden_size=64, num_hidden_layers=3, num_key_value_heads=kv_heads), dtype="float32"
    )
    before = weight_bytes(graph)
    if rounded:  # to bfloat16, as checkpoints are
        with torch.no_grad():
            for weight in graph.model.parameters():
                weight.copy_(weight.bfloat16())
    vectors = sum(weight.numel() for weight in graph.model.parameters() if weight.ndim == 1)
    assert weight_bytes(graph) == (before // 2 + 2 * vectors if rounded else before)
    tokens, ids = torch.arange(TREE.nodes) * 7 + 5, torch.tensor(PROMPT)
    cache = graph.new_cache(64)
    graph.prefill(ids, cache)
    logits, hidden = graph.verify(DraftTree(tokens, TREE), cache)
    cache = graph.new_cache(64)
    graph.prefill(ids, cache)
    for node in PATH:
        alone, states = graph.verify(DraftTree(tokens[node : node + 1], ROOT_ONLY), cache)
        assert torch.equal(alone[0], logits[node])
        assert torch.equal(states[0], hidden[node])
        cache.commit([0])


@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="options of another processor's compiler")
@pytest.mark.parametrize("narrower", ["", "-mno-avx512f", "-mno-fma -mno-avx512f", "-mno-avx"])
def test_a_row_has_the_same_bits_in_any_company_whatever_the_processor(
    anew: pytest.MonkeyPatch, tmp_path: Path, narrower: str
) -> None:
    anew.setenv("XDG_CACHE_HOME", str(tmp_path))
    anew.setenv("CC", f"{shlex.join(compiling.compiler() or ())} {narrower}")
    compiling.compiler.cache_clear()
    compiling.compiler_version.cache_clear()
    assert kernels.available()
    weight = kernels.in_blocks(drawn(190, 33))
    for rows in (2, 3, 5, 6, 10, 11):
        x, query = drawn(rows, 33), drawn(1, 4, rows, 32)
        keys, values = drawn(1, 2, 50, 32, seed=1), drawn(1, 2, 50, 32, seed=2)
        products = kernels.linear(x, weight, None, None, 190)
        attended = kernels.attend(query, keys, values, torch.zeros(1, 1, rows, 50), 0.3)
        for row in range(rows):
            one = slice(row, row + 1)
            assert torch.equal(kernels.linear(x[one], weight, None, None, 190), products[one])
            assert torch.equal(kernels.attend(query[:, :, one], keys, values, None, 0.3), attended[:, :, one])


@needs_compiler
def test_grouped_keys_are_read_where_they_lie(tmp_path: Path) -> None:
    """Repeating them for each head would copy the whole cache at every verification."""
    _, graph = pair(tmp_path, tiny_config(hidden_size=64, num_hidden_layers=3, num_key_value_heads=2), dtype="float32")
    verified(graph, DraftTree(torch.arange(3) + 5, TreeShape((-1, 0, 0))), PROMPT)
    ((recording,),) = graph._passes[0, 1, -1]._recordings.values()  # type: ignore[attr-defined]
    steps = [step.argval for step in dis.get_instructions(recording.replay.func) if step.opname == "LOAD_GLOBAL"]
    assert len([name for name in steps if name.endswith("kernels_attend")]) == 3
    assert "expand" not in recording.replay.func.__code__.co_names


@needs_compiler
def test_what_has_no_weights_on_the_processor_is_left_to_torch() -> None:
    """Without weights a trace does not say where it runs, and a kernel of the processor must not get a GPU's memory."""
    query = drawn(1, 2, 3, 16)
    recorded = Recorded(F.scaled_dot_product_attention, ((2,), (2,), (2,)), Layouts())
    with torch.inference_mode():
        recorded(query, query, query)
    ((recording,),) = recorded._recordings.values()
    steps = [step.argval for step in dis.get_instructions(recording.replay.func) if step.opname == "LOAD_GLOBAL"]
    assert not [name for name in steps if name.endswith("kernels_attend")]


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Nothing is known of a compiler yet, and what is found out now is forgotten afterwards."""
    caches = (compiling.compiler, compiling.compiler_version, kernels._library)
    for each in caches:
        each.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for each in caches:
        each.cache_clear()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "there is no C compiler"),
        ("exit 1", "there is no C compiler"),
        ('test "$1" = --version && echo cc 1 || exit 1', "failed"),
    ],
)
def test_without_a_working_compiler_a_line_says_so_and_the_tokens_are_the_same(
    anew: pytest.MonkeyPatch, tmp_path: Path, script: str | None, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    compiler = tmp_path / "cc"
    if script is not None:
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
    anew.setenv("CC", str(compiler))
    anew.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    eager, graph = pair(tmp_path / "target", dtype="float32")
    found = [decode(each, Vanilla(), VANILLA_TREE, PROMPT, 20, ()).tokens for each in (eager, graph)]
    assert found[0] == found[1]
    assert graph.compiler is None
    said = [line for line in capfd.readouterr().err.splitlines() if "slower than it could be" in line]
    assert len(said) == 1
    assert reason in said[0]


@needs_compiler
def test_kernels_are_compiled_once_for_all_processes_and_named_in_records(
    anew: pytest.MonkeyPatch, tmp_path: Path, target: Target
) -> None:
    anew.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels.available()
    (library,) = (tmp_path / "koala-bench" / "kernels").iterdir()
    before = library.stat().st_mtime_ns
    kernels._library.cache_clear()
    assert kernels.available()
    assert library.stat().st_mtime_ns == before
    assert load_target(target.name, "cpu", "float32", engine="graph").compiler
    assert load_target(target.name, "cpu", "float32", engine="eager").compiler is None
