"""Greedy answers to many prompts at once, where the answers matter and their timing does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def greedy_answers(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int]
) -> list[list[int]]:
    """A causal LM's greedy answers, each up to its first stop id (included) or ``max_new_tokens``.

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
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=filler,
        eos_token_id=list(stop_ids) or None,
    )
    model.train(was_training)
    return [_until_stop(answer, stop_ids) for answer in found[:, longest:].tolist()]


def _until_stop(answer: list[int], stop_ids: Sequence[int]) -> list[int]:
    return next((answer[: index + 1] for index, token in enumerate(answer) if token in stop_ids), answer)
