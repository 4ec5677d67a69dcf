"""A checkpoint's own generation settings, which all methods ignore because they would change answers."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

# Settings of special tokens, lengths and speed; all others change the answers.
_NEUTRAL = (
    "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length",
    "max_new_tokens", "min_length", "use_cache", "cache_implementation", "cache_config", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "trust_remote_code",
    "remove_invalid_values",
)  # fmt: skip


def set_aside(model: Any) -> dict[str, Any]:
    """Reset a model's generation configuration but for its special tokens: ``generate`` takes its defaults from there.

    Returns the settings that are ignored from now on, such as ``repetition_penalty``, in JSON's types for the record.
    """
    own = getattr(model, "generation_config", None)
    if own is None:
        return {}
    special = {name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**special)
    return {
        name: value
        for name, value in sorted(own.to_diff_dict().items())
        if value is not None and name not in _NEUTRAL and not name.startswith("_")
    }


def in_words(ignored: dict[str, Any]) -> str:
    """The settings, each with its value."""
    return ", ".join(f"{name} {value}" for name, value in ignored.items())
