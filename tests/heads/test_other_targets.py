"""Heads for targets unlike Llama: without a named feed-forward width, with odd attention heads, narrow last states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from koala_bench.decoding.loop import decode
from koala_bench.dialogues.streams import TokenBatch
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import FeatureBatch
from koala_bench.presets import load_preset
from koala_bench.testing import tiny_target
from koala_bench.training.features import features_of
from koala_bench.training.loop import build_head
from koala_bench.tree import load_template
from tests.decoding.test_decoding import PROMPT, vanilla
from tests.support.architectures import FAMILIES, Family

TARGETS = {
    "gpt2": FAMILIES["gpt2"],
    "odd": Family("LlamaConfig", {"hidden_size": 36, "num_key_value_heads": 4, "head_dim": 16}),
    "narrow": FAMILIES["opt-narrow"],
    "multimodal": FAMILIES["gemma3-multimodal"],
}
METHODS = ["medusa", "eagle", "eagle2", "hydra+koala"]


@pytest.fixture(scope="module", params=sorted(TARGETS))
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    family = TARGETS[request.param]
    config: Any = family.config()
    if request.param != "multimodal":
        config.num_hidden_layers = 4
    return tiny_target(tmp_path_factory.mktemp(request.param), config, "float64", attention=family.attention)


@pytest.mark.parametrize("method", METHODS)
def test_heads_decode_losslessly_and_learn(other: Target, method: str) -> None:
    preset = load_preset("tiny").method(method)
    head = build_head(other, preset, seed=0).double().eval()
    truth = vanilla(other, 16).tokens
    assert decode(other, head, load_template("2x2x1"), PROMPT, 16, ()).tokens == truth
    head.float()
    batch = one_batch(other, head)
    loss = head.loss(batch).total
    loss.backward()
    assert torch.isfinite(loss)
    assert any(each.grad is not None and each.grad.abs().sum() > 0 for each in head.parameters())


def one_batch(target: Target, head: Any) -> FeatureBatch:
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(ids, torch.ones(2, 12, dtype=torch.bool), (0, 1), torch.tensor([12, 12]))
    return features_of(target, batch, head.features, seed=0)


def test_a_head_that_reads_layers_of_another_width_is_refused(tmp_path: Path) -> None:
    config: Any = TARGETS["narrow"].config()
    config.num_hidden_layers = 4
    target = tiny_target(tmp_path, config, "float64")
    head = build_head(target, load_preset("tiny").method("eagle3+koala"), seed=0).double().eval()
    with pytest.raises(KoalaBenchError, match="16 wide"):
        decode(target, head, load_template("2x2x1"), PROMPT, 16, ())
