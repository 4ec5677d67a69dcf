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
    """A causal LM's greedy answers, each up to its first stop id (included), to the token that completes a stop text, or
    ``max_new_tokens``. The checkpoint's own generation settings have no part in it.

    The prompts run as one batch, padded on the left, so a near-tie may fall otherwise than for a prompt alone.
    """
    longest = max(map(len, prompts))
    filler = (
        stop_ids[0] if stop_ids else 0
    )  # the mask hides it on the left, and what follows the first stop id is cut below
    ids = torch.tensor([[filler] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    was_training = model.training
    model.eval()
    # What a call leaves open, generate() takes from the model's own configuration, a repetition penalty for one.
    own = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=filler, eos_token_id=list(stop_ids) or None
    )
    texts = {"stop_strings": list(stop_texts), "tokenizer": tokenizer} if stop_texts else {}
    try:
        found = model.generate(input_ids=ids, attention_mask=mask, **texts)
    finally:
        model.generation_config = own
        model.train(was_training)
    answers = [_until_stop(answer, stop_ids) for answer in found[:, longest:].tolist()]
    if not stop_texts:
        return answers
    return [answer[: end_of_text(tokenizer, answer, len(answer), stop_texts)] for answer in answers]


def _until_stop(answer: list[int], stop_ids: Sequence[int]) -> list[int]:
    return next((answer[: index + 1] for index, token in enumerate(answer) if token in stop_ids), answer)
