"""The kernels of our own compute what plain operations do: interpreted on the CPU in float16, and on a GPU in both half
precisions.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.cache import attention_mask
from koala_bench.engine.graphs import lowering
from koala_bench.engine.graphs.lowering import Layouts
from koala_bench.engine.graphs.replay import Recorded, UntraceableError, compare
from koala_bench.engine.loading.targets import load_target
from koala_bench.presets import load_preset
from koala_bench.testing import save_tiny_target, tiny_config
from koala_bench.training.loop import build_head
from koala_bench.tree import ROOT_ONLY, DraftTree, TreeShape, load_template
from tests.decoding.test_decoding import CONFIGS, PROMPT
from tests.engine.graphs.test_capture import DEVICES, METHODS
from tests.support.drafters import Oracle
from tests.support.engines import pair

kernels = pytest.importorskip("koala_bench.engine.kernels", reason="no Triton for this system")
fusing = pytest.importorskip("koala_bench.engine.graphs.gpu_kernels")
products = pytest.importorskip("koala_bench.engine.kernels.products")
HALF = [
    pytest.param("cpu", torch.float16, id="cpu-float16"),
    *(
        pytest.param("cuda", dtype, id=f"cuda-{dtype}", marks=DEVICES[1].marks)
        for dtype in (torch.float16, torch.bfloat16)
    ),  # type: ignore[union-attr]
]
everywhere = pytest.mark.parametrize(("device", "dtype"), HALF)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def normal(draw: torch.Generator, device: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=draw).to(device, dtype)


def agree(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Up to one rounding of the result."""
    assert found.shape == wanted.shape
    apart = (found.float() - wanted.float()).norm() / wanted.float().norm()
    assert apart < (1e-3 if found.dtype == torch.float16 else 6e-3)


@everywhere
@pytest.mark.parametrize("width", [96, 4096])
def test_norms(draw: torch.Generator, device: str, dtype: torch.dtype, width: int) -> None:
    x, gain = normal(draw, device, dtype, 1, 3, width), normal(draw, device, dtype, width)
    agree(kernels.rms_norm(x, gain, 1e-5), F.rms_norm(x.float(), (width,), gain.float(), 1e-5))


@everywhere
@pytest.mark.parametrize(("rows", "width"), [(40, 96), (7, 3000), (64, 1024)])
def test_products_of_one_row(draw: torch.Generator, device: str, dtype: torch.dtype, rows: int, width: int) -> None:
    x, weight = normal(draw, device, dtype, 1, 1, width), normal(draw, device, dtype, rows, width) * 0.02
    gain, bias, residual = (
        normal(draw, device, dtype, width),
        normal(draw, device, dtype, rows),
        normal(draw, device, dtype, 1, 1, rows),
    )
    plain = F.linear(x.float(), weight.float())
    agree(kernels.row_product(x, weight), plain)
    agree(kernels.row_product(x, weight, bias, residual), plain + bias.float() + residual.float())
    normed = F.rms_norm(x.float(), (width,), gain.float(), 1e-5)
    agree(kernels.row_product(x, weight, gain=gain, eps=1e-5), F.linear(normed, weight.float()))
    if rows % 2 == 0:
        gate, up = F.linear(normed, weight.float()).chunk(2, dim=-1)
        agree(kernels.row_product(x, weight, gain=gain, eps=1e-5, gated=True), F.silu(gate) * up)


@everywhere
def test_products_of_several_rows_with_a_residual(draw: torch.Generator, device: str, dtype: torch.dtype) -> None:
    x, weight, bias = (
        normal(draw, device, dtype, 1, 3, 32),
        normal(draw, device, dtype, 24, 32),
        normal(draw, device, dtype, 24),
    )
    residual = normal(draw, device, dtype, 1, 3, 24)
    before, wanted = residual.clone(), F.linear(x.float(), weight.float()) + residual.float()
    agree(kernels.product(x, weight, None, residual), wanted)
    agree(kernels.product(x, weight, bias, residual), wanted + bias.float())
    assert torch.equal(residual, before)
    assert kernels.product_(x, weight, None, residual) is residual
    agree(residual, wanted)


@everywhere
def test_gates(draw: torch.Generator, device: str, dtype: torch.dtype) -> None:
    x = normal(draw, device, dtype, 1, 5, 2 * 1100)
    gate, up = x.float().chunk(2, dim=-1)
    agree(kernels.gate(x), F.silu(gate) * up)


# Nodes, rows of the cache, committed ones, and rows of the draft of which the nodes are the last; the last of these are
# one node.
CASES = [
    (5, 512, 100, 5), (40, 1536, 700, 40), (70, 512, 3, 70), (3, 512, 20, 9), (1, 512, 37, 1), (1, 512, 300, 7),
    (1, 1536, 1280, 1), (1, 512, 0, 1), (1, 512, 127, 2), (1, 512, 128, 1),
]  # fmt: skip


# Heads, those of keys and values, and whether the sines are signed; interpreted, each of these once.
VARIANTS = [(4, 2, True), (3, 3, False), (4, 2, False), (3, 3, True)]


@pytest.mark.parametrize(
    ("device", "dtype", "variant"),
    [
        *(pytest.param("cpu", torch.float16, each, id=f"cpu-{each}") for each in VARIANTS[:2]),
        *(pytest.param(*on.values, each, marks=on.marks) for on in HALF[1:] for each in VARIANTS),
    ],
)
@pytest.mark.parametrize(("nodes", "capacity", "past", "columns"), CASES)
def test_attention_over_a_tree(
    draw: torch.Generator,
    device: str,
    dtype: torch.dtype,
    nodes: int,
    capacity: int,
    past: int,
    columns: int,
    variant: tuple[int, int, bool],
) -> None:
    width, (heads, kv_heads, signed) = 32, variant
    joined = normal(draw, device, dtype, 1, nodes, (heads + 2 * kv_heads) * width)
    x = joined[..., : (heads + kv_heads) * width].reshape(1, nodes, heads + kv_heads, width).transpose(1, 2)
    v = joined[..., (heads + kv_heads) * width :].reshape(1, nodes, kv_heads, width).transpose(1, 2)
    cosine, sine = normal(draw, device, dtype, 2, 1, 1, nodes, width)
    keys, values = normal(draw, device, dtype, 2, 1, kv_heads, capacity, width)
    numbers = past + columns - nodes + torch.arange(nodes, device=device)
    hidden = (torch.rand(nodes, columns, generator=draw) > 0.5).to(device)
    hidden[torch.arange(nodes), columns - nodes + torch.arange(nodes)] = False  # each sees itself
    behind = torch.tensor(past, device=device)

    wanted_keys, wanted_values = keys.clone(), values.clone()
    sign = sine if signed else sine * torch.cat([-torch.ones(width // 2), torch.ones(width // 2)]).to(sine)
    turned = torch.addcmul(x * cosine, x.roll(width // 2, -1), sign)
    wanted_keys.index_copy_(2, numbers, turned[:, heads:])
    wanted_values.index_copy_(2, numbers, v)
    mask = attention_mask(hidden, behind, capacity, torch.float32)
    wanted = F.scaled_dot_product_attention(
        turned[:, :heads].float(), wanted_keys.float(), wanted_values.float(), mask, enable_gqa=True
    )

    arguments = (x, v, cosine, sine, signed, width // 2, numbers)
    if nodes == 1:
        own, others, arrived = keys.clone(), values.clone(), torch.zeros(heads, dtype=torch.int32, device=device)
        for _ in range(2):  # the counters are as they were
            agree(kernels.attend_row(*arguments, own, others, hidden, behind, None, arrived), wanted)
        agree(own, wanted_keys)
        assert torch.equal(others, wanted_values)
    queries = kernels.rotate(*arguments, keys, values)
    agree(queries, turned[:, :heads])
    agree(keys, wanted_keys)
    assert torch.equal(values, wanted_values)
    agree(kernels.attend(queries, keys, values, hidden, behind), wanted)


@pytest.mark.parametrize(("device", "dtype"), HALF[:2])
def test_attention_in_little_shared_memory(
    draw: torch.Generator, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, (keys, values) = normal(draw, device, dtype, 1, 2, 9, 64), normal(draw, device, dtype, 2, 1, 2, 512, 64)
    hidden, behind = torch.ones(9, 9, dtype=torch.bool, device=device).triu(1), torch.tensor(230, device=device)
    found = kernels.attend(q, keys, values, hidden, behind)
    monkeypatch.setattr("koala_bench.engine.kernels.attention.cramped", lambda like: True)
    agree(kernels.attend(q, keys, values, hidden, behind), found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_best_candidates(draw: torch.Generator, device: str, dtype: torch.dtype) -> None:
    x = normal(draw, device, dtype, 3, 5000)  # with many equal values in half precision
    values, places = kernels.topk(x, 10)
    assert torch.equal(values, x.topk(10).values)
    assert torch.equal(x.gather(1, places), values)
    assert all(len(set(row)) == 10 for row in places.tolist())
    assert kernels.topk(torch.zeros(1, 4000, device=device), 3)[1].tolist() == [[0, 1, 2]]


@everywhere
def test_embeddings_beside_states(draw: torch.Generator, device: str, dtype: torch.dtype) -> None:
    embeddings, states = normal(draw, device, dtype, 50, 96), normal(draw, device, dtype, 5, 2, 80)[:, 1]
    tokens, places, parents = (torch.tensor(each, device=device) for each in ([4, 9, 0, 49, 4], [3, 0, 2], [1, 1, 4]))
    assert torch.equal(
        kernels.paired(embeddings, tokens, places, states, parents),
        torch.cat([embeddings[tokens[places]], states[parents]], dim=-1),
    )
    assert torch.equal(
        kernels.paired(embeddings, tokens, None, states, None), torch.cat([embeddings[tokens], states], dim=-1)
    )


# ------------------------------------------------------------------------------ whole passes


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Rewriting as for a GPU; the names of the kernels that recorded passes call."""
    names: list[str] = []
    monkeypatch.setattr(lowering, "_on_processor", lambda weight: False)
    if not torch.cuda.is_available():  # an interpreted program costs the same whatever its tile: few large ones
        monkeypatch.setattr(products, "TILES", {False: (128, 64, 1), True: (128, 64, 1)})
    fuse = fusing.fuse

    def noting(graph: torch.fx.Graph, constants: dict[str, object]) -> None:
        fuse(graph, constants)
        names.extend(
            node.target.__name__
            for node in graph.nodes
            if str(getattr(node.target, "__module__", "")).startswith(kernels.__name__)
        )

    monkeypatch.setattr(fusing, "fuse", noting)
    return names


@pytest.mark.parametrize(
    ("device", "dtype", "family"),
    [
        *(pytest.param("cpu", torch.float16, each, id=f"cpu-{each}") for each in ("llama", "qwen2", "gpt2")),
        *(pytest.param(*on.values, each, marks=on.marks) for on in HALF[1:] for each in ("llama", *sorted(CONFIGS))),
    ],
)
def test_a_verification_with_kernels_is_the_models(
    tmp_path: Path, called: list[str], device: str, dtype: torch.dtype, family: str
) -> None:
    narrow = CONFIGS.get(family, tiny_config(hidden_size=64))  # heads as narrow as kernels know them
    eager, fixed = pair(tmp_path, narrow, device=device, dtype=name_of(dtype), fixed=True)
    for shape in (ROOT_ONLY, TreeShape((-1, 0, 0, 1, 1, 3))):
        tree = DraftTree(torch.arange(3, 3 + shape.nodes, device=device), shape)
        found = []
        for target in (eager, fixed):
            cache = target.new_cache(64)
            target.prefill(torch.tensor(PROMPT, device=device), cache)
            for _ in range(2):  # the second time without recording
                logits, hidden = target.verify(tree, cache)
            found.append((logits.float(), hidden.float(), cache.storage[:, :, :, : len(PROMPT) + shape.nodes].float()))
        for one, other in zip(*found, strict=True):
            assert (one - other).norm() < (0.01 if dtype == torch.float16 else 0.05) * one.norm()
    if family == "llama":
        assert set(called) == {"rms_norm", "row_product", "attend_row", "rotate", "attend", "product_", "gate"}


INTERPRETED = ["medusa", "eagle+koala", "eagle2"]  # the others have the same kernels


@pytest.mark.parametrize(
    ("device", "method"),
    [
        *(("cpu", method) for method in INTERPRETED),
        *(pytest.param("cuda", method, marks=DEVICES[1].marks) for method in METHODS),
    ],
)
def test_heads_draft_with_kernels(tmp_path: Path, called: list[str], device: str, method: str) -> None:
    """Rounded otherwise, a close candidate may win: most tokens of a draft are the same. In bfloat16 a random head's
    need not be.
    """
    dtype = torch.float16
    config = tiny_config(hidden_size=64, num_hidden_layers=1 if device == "cpu" else 4)
    eager, fixed = pair(tmp_path, config, device=device, dtype=name_of(dtype), fixed=True)
    options = [f'methods.draft_model.options.model="{tmp_path}"'] if method == "draft_model" else []
    preset = load_preset("tiny", options).method(method)
    drafts = []
    for target in (eager, fixed):
        torch.manual_seed(0)
        head = build_head(target, preset, seed=0).to(dtype).eval()
        tree = preset.tree if preset.tree.startswith("dynamic") else "2x2x1"
        drafts.append(decode(target, head, load_template(tree), PROMPT, 2, (), trace=True).steps[0].tree_tokens)
    same = sum(one == other for one, other in zip(*drafts, strict=True))
    assert same >= 0.8 * len(drafts[0])
    assert "topk" in called


@everywhere
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_half_precision_stands_any_length(tmp_path: Path, device: str, dtype: torch.dtype, engine: str) -> None:
    """The mask of a tree begins at another place in memory with each token; on a GPU attention once read it as if it
    were aligned.
    """
    save_tiny_target(tmp_path, tiny_config(hidden_size=64, head_dim=64))
    target = load_target(str(tmp_path), device, name_of(dtype), engine=engine)
    truth = decode(target, Vanilla(), VANILLA_TREE, PROMPT, 70, ())
    answer = decode(target, Oracle(truth.tokens, 259), load_template("4x3x1"), PROMPT, 70, ())
    assert answer.tokens[:20] == truth.tokens[:20]  # ties may fall otherwise later
    assert len(answer.tokens) == 70


def test_tokens_of_half_precision_may_differ(capsys: pytest.CaptureFixture[str]) -> None:
    one, other = torch.arange(8), torch.arange(8).flip(0)
    compare(one, other, half=True)
    assert "0 of 8 tokens" in capsys.readouterr().err
    with pytest.raises(UntraceableError, match="other tokens"):
        compare(one, other, half=False)


def test_a_residual_that_is_read_later_is_not_written_over(called: list[str]) -> None:
    """Of two sums the first keeps what the second reads."""
    weight = torch.nn.Parameter(torch.eye(8, dtype=torch.float16), requires_grad=False)

    def twice(x: torch.Tensor) -> torch.Tensor:
        first = F.linear(x, weight)
        second = first + F.linear(first, weight)
        return torch.stack([first, second])

    x = torch.arange(16, dtype=torch.float16).reshape(2, 8)
    recorded = Recorded(twice, ((),), Layouts())
    assert torch.equal(recorded(x), torch.stack([x, 2 * x]))
    assert "product" in called and "product_" not in called
