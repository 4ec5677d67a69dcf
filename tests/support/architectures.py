"""Tiny configurations of many families of causal LMs, and the page of what each engine makes of them.

``python -m tests.support.architectures`` writes ``koala_bench/engine/ARCHITECTURES.md`` anew.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig

import koala_bench.engine
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.loading.targets import load_target
from koala_bench.errors import KoalaBenchError
from koala_bench.testing import save_tiny_target
from koala_bench.tree import load_template
from tests.support.drafters import Oracle

PAGE = Path(koala_bench.engine.__file__).parent / "ARCHITECTURES.md"
_PROMPT, _NEW = [1, 70, 81, 82, 90, 33, 40, 41, 120, 7], 12
_HEAD = """# Architectures

What each engine makes of a family, with tiny random weights in float64 on the CPU: *equal* says that vanilla decoding
takes the tokens of transformers' `generate` and that a branching tree takes vanilla's; else stands the line with which
the target is refused when it is loaded. Where *graph* is *as eager*, a pass cannot be recorded, which is said, and the
target is decoded with the engine eager. *Rows* are those up to which answers are served, where that is less than the
context: behind them the model computes differently. `tests/engine/loading/test_architectures.py` holds every row
against the code (tried with transformers {version}); `python -m tests.support.architectures` writes the page.

| Family | Configuration | `--attention` | Rows | eager | graph |
| :-- | :-- | :-- | --: | :-- | :-- |
"""

_SIZES = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_GPT = {"vocab_size": 259, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_OPT = {
    "vocab_size": 259, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "init_std": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_FALCON = {
    **_GPT, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 80,
}  # fmt: skip
_SIGLIP = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How to make a family's tiny configuration: the name of its class, and what it is given."""

    cls: str
    options: dict[str, Any] = field(default_factory=dict)
    plain: bool = True  # whether it takes the sizes by Llama's names
    attention: str = "sdpa"

    def config(self) -> PretrainedConfig:
        made: PretrainedConfig = getattr(transformers, self.cls)(**{**(_SIZES if self.plain else {}), **self.options})
        return made


FAMILIES = {
    "llama": Family("LlamaConfig"),
    "mistral": Family("MistralConfig", {"sliding_window": 128}),
    "ministral": Family("MinistralConfig", {"sliding_window": 128, "head_dim": 8}),
    "qwen2": Family("Qwen2Config"),
    "qwen3": Family("Qwen3Config", {"head_dim": 8}),
    "phi": Family("PhiConfig"),
    "phi3": Family("Phi3Config", {"sliding_window": None}),
    "phi3-longrope": Family("Phi3Config", {
        "sliding_window": None, "original_max_position_embeddings": 80, "rope_parameters": _LONGROPE}),
    "gemma": Family("GemmaConfig", {"head_dim": 8}),
    "gemma2": Family("Gemma2Config", {
        "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 256, "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0}, attention="eager"),
    "gemma3": Family("Gemma3TextConfig", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 256}),
    "granite": Family("GraniteConfig", {"logits_scaling": 2.0, "embedding_multiplier": 3.0}),
    "cohere": Family("CohereConfig", {"logit_scale": 0.5}),
    "cohere2": Family("Cohere2Config", {"logit_scale": 0.5, "sliding_window": 256}),
    "olmo": Family("OlmoConfig"),
    "olmo2": Family("Olmo2Config"),
    "olmo3": Family("Olmo3Config", {"sliding_window": 256}),
    "stablelm": Family("StableLmConfig"),
    "starcoder2": Family("Starcoder2Config", {"sliding_window": None}),
    "smollm3": Family("SmolLM3Config"),
    "glm4": Family("Glm4Config", {"head_dim": 8}),
    "exaone4": Family("Exaone4Config", {"sliding_window": 256, "sliding_window_pattern": 2}),
    "ministral3": Family("Ministral3Config", {
        "head_dim": 8, "sliding_window": None, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 12,
            "llama_4_scaling_beta": 0.5, "max_position_embeddings": 512}}),
    "nemotron": Family("NemotronConfig"),
    "helium": Family("HeliumConfig", {"head_dim": 8}),
    "seed_oss": Family("SeedOssConfig", {"head_dim": 8}),
    "hunyuan_v1_dense": Family("HunYuanDenseV1Config", {"head_dim": 8}),
    "apertus": Family("ApertusConfig"),
    "arcee": Family("ArceeConfig"),
    "ernie4_5": Family("Ernie4_5Config", {"head_dim": 8}),
    "diffllama": Family("DiffLlamaConfig"),
    "doge": Family("DogeConfig", {"keep_window_size": 64}),
    "gptj": Family("GPTJConfig", {
        **_GPT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 4},
        plain=False, attention="eager"),
    "gpt2": Family("GPT2Config", {**_GPT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}, plain=False),
    "gpt_neo": Family("GPTNeoConfig", {
        **_GPT, "hidden_size": 32, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4,
        "max_position_embeddings": 512, "window_size": 40}, plain=False, attention="eager"),
    "gpt_neox": Family("GPTNeoXConfig"),
    "opt": Family("OPTConfig", _OPT, plain=False),
    "opt-narrow": Family("OPTConfig", {
        **_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, plain=False),
    "falcon": Family("FalconConfig", _FALCON, plain=False),
    "falcon-alibi": Family("FalconConfig", {**_FALCON, "alibi": True, "new_decoder_architecture": False}, plain=False),
    "mpt": Family("MptConfig", {
        "vocab_size": 259, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512, "initializer_range": 0.3},
        plain=False, attention="eager"),
    "bloom": Family("BloomConfig", {
        **_GPT, "hidden_size": 32, "n_layer": 2, "n_head": 4}, plain=False, attention="eager"),
    "mixtral": Family("MixtralConfig", {**_EXPERTS, "sliding_window": None}),
    "qwen3_moe": Family("Qwen3MoeConfig", {**_EXPERTS, "head_dim": 8}),
    "gpt_oss": Family("GptOssConfig", {**_EXPERTS, "head_dim": 16, "sliding_window": 256}, attention="eager"),
    "deepseek_v2": Family("DeepseekV2Config", {
        "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "qk_nope_head_dim": 8, "first_k_dense_replace": 1}),
    "dots1": Family("Dots1Config", {
        **_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "head_dim": 8}),
    "gemma3-multimodal": Family("Gemma3Config", {
        "text_config": {**_SIZES, "head_dim": 8, "sliding_window": 256, "query_pre_attn_scalar": 8},
        "vision_config": _SIGLIP, "mm_tokens_per_image": 4}, plain=False),
    "mamba": Family("MambaConfig", {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2}, plain=False),
    "lfm2": Family("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "granitemoehybrid": Family("GraniteMoeHybridConfig", {
        **_EXPERTS, "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2}),
    "llama4": Family("Llama4TextConfig", {
        **_EXPERTS, "head_dim": 8, "intermediate_size_mlp": 64, "attention_chunk_size": 64}),
}  # fmt: skip


# Recorded, these are like another one that is listed: what their models do besides is no matter of the passes' form.
RECORDED_ALIKE = {
    "mistral", "ministral", "phi3", "gemma", "granite", "cohere", "olmo", "olmo2", "starcoder2", "stablelm",
    "gpt_neox", "opt-narrow", "falcon", "qwen3_moe", "glm4", "exaone4", "nemotron", "helium", "seed_oss",
    "hunyuan_v1_dense", "apertus", "arcee", "ernie4_5", "gptj", "dots1", "ministral3", "diffllama", "doge",
}  # fmt: skip


def row(name: str, folder: Path, engines: Sequence[str] = ("eager", "graph")) -> str:
    """The page's line of a family, or its beginning."""
    family = FAMILIES[name]
    save_tiny_target(folder, family.config())
    cells, rows, expected = [], "all", None
    for engine in engines:
        try:
            target = load_target(str(folder), "cpu", "float64", attention=family.attention, engine=engine)
        except KoalaBenchError as error:
            cells.append(_general(error.message, folder))
            continue
        if target.limit is not None:
            rows = str(target.limit.rows)
        truth = decode(target, Vanilla(), VANILLA_TREE, _PROMPT, _NEW, ()).tokens
        if expected is None:
            with torch.inference_mode():
                ids = target.model.generate(
                    torch.tensor([_PROMPT]), do_sample=False, max_new_tokens=_NEW, min_new_tokens=_NEW,
                    eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
            expected = ids[0, len(_PROMPT) :].tolist()
        head = Oracle(truth, 259)
        drafted = decode(target, head, load_template("3x2x1"), _PROMPT, _NEW, ()).tokens
        same = drafted == truth == expected
        cells.append("DIFFERENT" if not same else "equal" if target.engine == engine else "as eager")
    return f"| {name} | {family.cls} | {family.attention} | {rows} | {' | '.join(cells)} |"


def _general(line: str, folder: Path) -> str:
    """A line without what differs from machine to machine."""
    line = re.sub(r"\d\.\de[+-]\d\d", "x", line.replace(str(folder), "It"))
    return line.replace("|", "/")


if __name__ == "__main__":
    with PAGE.open("w", encoding="utf-8") as page:
        page.write(_HEAD.format(version=transformers.__version__))
        for each in FAMILIES:
            with tempfile.TemporaryDirectory() as made:
                page.write(row(each, Path(made)) + "\n")
                page.flush()
