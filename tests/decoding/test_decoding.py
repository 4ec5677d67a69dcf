"""The loop: lossless whatever is drafted, exact stopping, honest counting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, MistralConfig, Qwen2Config, T5Config

from koala_bench.decoding.loop import VANILLA_TREE, Decoded, Vanilla, decode
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.testing import save_tiny_target, tiny_config, tiny_target
from koala_bench.tree import load_template
from tests.support.drafters import Oracle

PROMPT = [1, 70, 81, 82, 90, 33, 40, 41, 120, 7]


def vanilla(target: Target, tokens: int, stops: tuple[int, ...] = (), prompt: list[int] = PROMPT) -> Decoded:
    return decode(target, Vanilla(), VANILLA_TREE, prompt, tokens, stops)


def generated(target: Target, tokens: int) -> list[int]:
    with torch.inference_mode():
        ids = target.model.generate(
            torch.tensor([PROMPT]),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    return list(ids[0, len(PROMPT) :].tolist())


def test_vanilla_takes_the_tokens_of_generate(target64: Target) -> None:
    target64.model.generation_config.eos_token_id = None
    assert vanilla(target64, 60).tokens == generated(target64, 60)


@pytest.mark.parametrize("tree", ["chain-5", "3x2x1", "medusa/mc_sim_7b_63", "eagle/mc_sim_7b_63"])
@pytest.mark.parametrize("right", [0.0, 0.6, 1.0])
def test_any_draft_gives_the_targets_own_tokens_in_float64(target64: Target, tree: str, right: float) -> None:
    truth = vanilla(target64, 80)
    head = Oracle(truth.tokens, 259, right)
    answer = decode(target64, head, load_template(tree), PROMPT, 80, ())
    assert answer.tokens == truth.tokens
    assert answer.stop == truth.stop == "limit"
    if right == 1.0:
        assert max(answer.accepted) >= 2


CONFIGS = {
    "qwen2": Qwen2Config(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    ),
    "mistral": MistralConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=None,
        initializer_range=0.3,
    ),
    "gpt2": GPT2Config(
        vocab_size=259,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_other_families_are_lossless_too(tmp_path: Path, family: str) -> None:
    target = tiny_target(tmp_path, CONFIGS[family], dtype="float64")
    truth = vanilla(target, 40)
    answer = decode(target, Oracle(truth.tokens, 259), load_template("3x2x1"), PROMPT, 40, ())
    assert answer.tokens == truth.tokens


def test_eager_attention_sees_the_same_tree_as_sdpa(tmp_path: Path) -> None:
    eager = tiny_target(tmp_path, dtype="float64", attention="eager")
    truth = vanilla(eager, 40)
    assert decode(eager, Oracle(truth.tokens, 259), load_template("3x2x1"), PROMPT, 40, ()).tokens == truth.tokens


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_and_counts(tmp_path: Path, dtype: str) -> None:
    target = tiny_target(tmp_path, dtype=dtype)
    truth = vanilla(target, 24)
    answer = decode(target, Oracle(truth.tokens, 259), load_template("3x2x1"), PROMPT, 24, ())
    assert len(answer.tokens) == len(truth.tokens) == 24


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 20])
def test_an_answer_is_never_longer_than_its_limit(target64: Target, limit: int) -> None:
    truth = vanilla(target64, 40).tokens
    answer = decode(target64, Oracle(truth, 259, 1.0), load_template("chain-5"), PROMPT, limit, ())
    assert answer.tokens == truth[:limit]
    assert len(answer.tokens) == 1 + sum(answer.accepted) + len(answer.accepted)


@pytest.mark.parametrize("place", [0, 1, 4, 9])
def test_an_answer_ends_with_the_first_stop_token(target64: Target, place: int) -> None:
    truth = vanilla(target64, 40).tokens
    stop = truth[place]
    expected = truth[: truth.index(stop) + 1]
    answer = decode(target64, Oracle(truth, 259, 1.0), load_template("chain-5"), PROMPT, 40, (stop,))
    assert answer.tokens == expected
    assert answer.stop == "eos"
    assert answer.tokens == vanilla(target64, 40, (stop,)).tokens
    assert len(answer.tokens) == 1 + sum(answer.accepted) + len(answer.accepted)


def test_a_stop_token_at_the_limit_counts_as_end(target64: Target) -> None:
    truth = vanilla(target64, 40).tokens
    limit = truth.index(truth[6]) + 1
    assert vanilla(target64, limit, (truth[6],)).stop == "eos"


def test_a_full_context_ends_the_answer_where_vanilla_ends(tmp_path: Path) -> None:
    target = tiny_target(tmp_path, tiny_config(max_position_embeddings=40), dtype="float64")
    truth = vanilla(target, 100)
    answer = decode(target, Oracle(truth.tokens, 259), load_template("chain-5"), PROMPT, 100, ())
    assert truth.stop == answer.stop == "context"
    assert answer.tokens == truth.tokens
    assert len(PROMPT) + len(truth.tokens) == 41  # the last token needs no position of its own


@pytest.mark.parametrize(
    ("prompt", "limit", "words"), [([], 5, "empty"), ([5] * 512, 5, "context of 512"), ([5], 0, "at least 1")]
)
def test_impossible_requests_are_refused(target: Target, prompt: list[int], limit: int, words: str) -> None:
    with pytest.raises(KoalaBenchError, match=words):
        decode(target, Vanilla(), VANILLA_TREE, prompt, limit, ())


def test_a_reused_cache_forgets_the_last_answer(target64: Target) -> None:
    cache = target64.new_cache(200)
    truth = vanilla(target64, 30)
    decode(target64, Vanilla(), VANILLA_TREE, PROMPT[::-1], 60, (), cache)
    assert (
        decode(target64, Oracle(truth.tokens, 259), load_template("3x2x1"), PROMPT, 30, (), cache).tokens
        == truth.tokens
    )


def test_a_sliding_window_shorter_than_the_context_is_refused(tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=32,
    )
    target = tiny_target(tmp_path, config)
    with pytest.raises(KoalaBenchError, match="last 32 tokens"):
        vanilla(target, 60)
    assert len(vanilla(target, 10).tokens) == 10


def test_an_encoder_decoder_model_is_refused(tmp_path: Path) -> None:
    T5Config(d_model=32, num_layers=1, num_heads=2, vocab_size=259).save_pretrained(tmp_path)
    with pytest.raises(KoalaBenchError, match="encoder-decoder"):
        load_target(str(tmp_path), "cpu")


def test_a_missing_target_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # the variable of that name is read once, at the import
    with pytest.raises(KoalaBenchError, match="no folder"):
        load_target("./not-there", "cpu")
    with pytest.raises(KoalaBenchError, match="Cannot load the target nobody/nothing"):
        load_target("nobody/nothing", "cpu")


def test_damaged_weights_are_one_clear_error(tmp_path: Path) -> None:
    folder = save_tiny_target(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(KoalaBenchError, match="Cannot load the target"):
        load_target(str(folder), "cpu")


@pytest.mark.parametrize(
    ("device", "dtype", "words"),
    [("gpu", "auto", "not a device"), ("cuda:99", "auto", "no CUDA device"), ("cpu", "int8", "not a dtype")],
)
def test_wrong_devices_and_dtypes_are_refused(target_folder: Path, device: str, dtype: str, words: str) -> None:
    with pytest.raises(KoalaBenchError, match=words):
        load_target(str(target_folder), device, dtype)


@pytest.mark.cuda
def test_cuda_decodes_the_same_tokens_as_the_cpu(target_folder: Path) -> None:
    on_cpu, on_gpu = (
        load_target(str(target_folder), "cpu", "float64"),
        load_target(str(target_folder), "cuda", "float64"),
    )
    truth = vanilla(on_cpu, 40)
    head = Oracle(truth.tokens, 259)
    assert decode(on_gpu, head, load_template("3x2x1"), PROMPT, 40, ()).tokens == truth.tokens
