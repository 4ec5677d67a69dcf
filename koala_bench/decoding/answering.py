"""Greedy answers to many prompts at once, where the answers matter and their timing does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from koala_bench.decoding.stops import end_of_text


@torch.no_grad()
def greedy_answers(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int],
    stop_texts: Sequence[str] = (), tokenizer: Any = None,
) -> list[list[int]]:  # fmt: skip
    """A causal LM's greedy answers. Each ends with its first stop id, with the token that completes a stop text, or
    after ``max_new_tokens``. The checkpoint's own generation settings are ignored.

    The prompts run as one batch, padded on the left, so near-ties may be decided otherwise than for a single prompt.
    """
    longest = max(map(len, prompts))
    padding = stop_ids[0] if stop_ids else 0  # masked on the left; on the right it is cut after the first stop id
    gaps = [longest - len(prompt) for prompt in prompts]
    padded = [[padding] * gap + list(prompt) for gap, prompt in zip(gaps, prompts, strict=True)]
    ids, places = torch.tensor(padded, device=model.device), torch.arange(longest, device=model.device)
    mask = (places >= torch.tensor(gaps, device=model.device)[:, None]).long()
    was_training = model.training
    model.eval()
    # generate() takes unset options from the model's configuration, such as a repetition penalty.
    generation_config = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=padding, eos_token_id=list(stop_ids) or None
    )
    texts = {"stop_strings": list(stop_texts), "tokenizer": tokenizer} if stop_texts else {}
    try:
        outputs = model.generate(input_ids=ids, attention_mask=mask, **texts)
    finally:
        model.generation_config = generation_config
        model.train(was_training)
    answers = []
    for answer in outputs[:, longest:].tolist():
        until = answer[: next((index + 1 for index, token in enumerate(answer) if token in stop_ids), None)]
        answers.append(until[: end_of_text(tokenizer, until, len(until), stop_texts)])
    return answers
