"""For tests, ours and third parties': a tiny random target with a tokenizer, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from koala_bench.engine.devices import DTYPES
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target

_LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, with ``<unk>``, ``<s>`` and ``</s>`` at ids 0 to 2: 259 tokens."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *_LETTERS])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def tiny_config(**changes: Any) -> LlamaConfig:
    """A Llama of two layers and width 32 over the tiny tokenizer's vocabulary, with grouped-query attention."""
    sizes = {
        "vocab_size": 3 + len(_LETTERS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # wide, so that greedy choices have clear margins
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**sizes, **changes})


def save_tiny_target(folder: Path, config: PretrainedConfig | None = None, seed: int = 0) -> Path:
    """Write a random model of a configuration (``tiny_config()`` by default) and the tiny tokenizer; returns the
    folder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config or tiny_config())
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_target(
    folder: Path, config: PretrainedConfig | None = None, dtype: str = "float32", seed: int = 0, attention: str = "sdpa"
) -> Target:
    """A tiny random target on the CPU, loaded through the same code as any other."""
    assert dtype in DTYPES
    return load_target(str(save_tiny_target(folder, config, seed)), "cpu", dtype, attention=attention)
