"""Tiny configurations of many families of causal LMs: four layers, random weights, made in a moment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import PretrainedConfig

_SIZES = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_GPT = {"vocab_size": 259, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


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
    "phi3-longrope": Family("Phi3Config", {"sliding_window": None, "original_max_position_embeddings": 80, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 80}}),
    "gemma": Family("GemmaConfig", {"head_dim": 8}),
    "gemma2": Family("Gemma2Config", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 256, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
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
    "glm": Family("GlmConfig", {"head_dim": 8}),
    "glm4": Family("Glm4Config", {"head_dim": 8}),
    "nemotron": Family("NemotronConfig"),
    "exaone4": Family("Exaone4Config", {"sliding_window": 256, "sliding_window_pattern": 2}),
    "helium": Family("HeliumConfig", {"head_dim": 8}),
    "arcee": Family("ArceeConfig"),
    "apertus": Family("ApertusConfig"),
    "ernie4_5": Family("Ernie4_5Config", {"head_dim": 8}),
    "seed_oss": Family("SeedOssConfig", {"head_dim": 8}),
    "hunyuan": Family("HunYuanDenseV1Config", {"head_dim": 8}),
    "gpt2": Family("GPT2Config", {**_GPT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}, plain=False),
    "gpt_neo": Family("GPTNeoConfig", {**_GPT, "hidden_size": 32, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4,
        "max_position_embeddings": 512, "window_size": 16}, plain=False),
    "gpt_neox": Family("GPTNeoXConfig"),
    "gptj": Family("GPTJConfig", {**_GPT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 4}, plain=False),
    "gpt_bigcode": Family("GPTBigCodeConfig", {**_GPT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}, plain=False),
    "codegen": Family("CodeGenConfig", {**_GPT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 4}, plain=False),
    "opt": Family("OPTConfig", {"vocab_size": 259, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512,
        "init_std": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, plain=False),
    "opt-narrow": Family("OPTConfig", {"vocab_size": 259, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512,
        "init_std": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, plain=False),
    "falcon": Family("FalconConfig", {**_GPT, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}, plain=False),
    "falcon-alibi": Family("FalconConfig", {**_GPT, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512, "alibi": True,
        "new_decoder_architecture": False}, plain=False),
    "mpt": Family("MptConfig", {"vocab_size": 259, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512, "initializer_range": 0.3}, plain=False, attention="eager"),
    "bloom": Family("BloomConfig", {**_GPT, "hidden_size": 32, "n_layer": 2, "n_head": 4}, plain=False, attention="eager"),
    "mixtral": Family("MixtralConfig", {**_EXPERTS, "sliding_window": None}),
    "qwen2_moe": Family("Qwen2MoeConfig", {**_EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": Family("Qwen3MoeConfig", {**_EXPERTS, "head_dim": 8}),
    "olmoe": Family("OlmoeConfig", _EXPERTS),
    "granitemoe": Family("GraniteMoeConfig", _EXPERTS),
    "gpt_oss": Family("GptOssConfig", {**_EXPERTS, "head_dim": 16, "sliding_window": 256}, attention="eager"),
    "deepseek_v2": Family("DeepseekV2Config", {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 8, "first_k_dense_replace": 1}),
    "deepseek_v3": Family("DeepseekV3Config", {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 8, "first_k_dense_replace": 1}),
    "gemma3-multimodal": Family("Gemma3Config", {"text_config": {**_SIZES, "head_dim": 8, "sliding_window": 256, "query_pre_attn_scalar": 8},
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4}, plain=False),
    "mamba": Family("MambaConfig", {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2}, plain=False),
    "rwkv": Family("RwkvConfig", {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}, plain=False),
    "recurrent_gemma": Family("RecurrentGemmaConfig", {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "lru_width": 32}, plain=False),
    "llama4": Family("Llama4TextConfig", {**_EXPERTS, "head_dim": 8, "intermediate_size_mlp": 64, "attention_chunk_size": 64}),
    "biogpt": Family("BioGptConfig", {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}, plain=False),
    "xglm": Family("XGLMConfig", {"vocab_size": 259, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 512, "init_std": 0.3}, plain=False),
    "persimmon": Family("PersimmonConfig"),
}  # fmt: skip
