"""Teach a target not to loop: unlikelihood of what its own answers repeat (Welleck et al. 2020, arXiv 1908.04319,
section 5.2).

A small target that has seen few tokens answers greedily in loops, and likelihood on more text mends that slowly. Here
the target answers training questions itself, and every token that stands in an n-gram which the same answer held before
is made less probable: the loss is -log(1 - p(token)). The likelihood of the true dialogues belongs beside it, each at
the start of a sequence as the answers are: without it, measured on the bundled target, answers end after a few words,
which repeats nothing either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from koala_bench.dialogues.encoding import ChatTemplate, encode_prompt


def repeated_tokens(answer: Sequence[int], n: int) -> list[bool]:
    """Whether each token is part of an n-gram that occurred earlier in the answer; same length as ``answer``."""
    seen: set[tuple[int, ...]] = set()
    marked = [False] * len(answer)
    for start in range(len(answer) - n + 1):
        gram = tuple(answer[start : start + n])
        if gram in seen:
            marked[start : start + n] = [True] * n
        seen.add(gram)
    return marked


def draw_prompts(
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    dialogues: Sequence[Sequence[str]],
    count: int,
    max_tokens: int,
    seed: tuple[int, ...],
) -> tuple[list[int], list[list[int]]]:
    """Indices of ``count`` dialogues drawn by ``seed``, and a prompt of each: of the first or second turn, at most
    ``max_tokens`` long.
    """
    draw = np.random.default_rng(seed)
    indices: list[int] = []
    prompts: list[list[int]] = []
    while len(prompts) < count:
        index = int(draw.integers(len(dialogues)))
        turns = dialogues[index]
        prompt = encode_prompt(template, tokenizer, turns[: 3 if len(turns) > 3 and draw.random() < 0.5 else 1])
        if len(prompt) <= max_tokens:
            indices.append(index)
            prompts.append(prompt)
    return indices, prompts


def likelihood_loss(model: LlamaForCausalLM, rows: Sequence[Sequence[int]], max_tokens: int) -> torch.Tensor:
    """Cross-entropy of dialogues, nats per token, each alone at the start of a sequence and cut to ``max_tokens``."""
    longest = min(max(map(len, rows)), max_tokens)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    wanted = torch.full((len(rows), longest), -100)
    for row, whole in enumerate(rows):
        cut = torch.as_tensor(whole[:max_tokens], dtype=torch.int64)
        ids[row, : len(cut)] = wanted[row, : len(cut)] = cut
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), wanted[:, 1:].flatten().to(model.device))


def unlikelihood_loss(
    model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], n: int
) -> tuple[torch.Tensor, float]:
    """Sum of -log(1 - p) over the repeated tokens of the answers, divided by the number of all answer tokens.

    Returns the loss, a scalar with gradients, and the share of the answer tokens that is repeated.
    """
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    marked = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (whole, prompt, answer) in enumerate(zip(rows, prompts, answers, strict=True)):
        ids[row, : len(whole)] = torch.tensor(whole)
        marked[row, len(prompt) : len(whole)] = torch.tensor(repeated_tokens(answer, n), dtype=torch.bool)
    ids, marked = ids.to(model.device), marked.to(model.device)
    # Padding stands on the right and attention looks to the left, so no mask is needed.
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    wrong = marked[:, 1:]
    total = max(1, sum(map(len, answers)))
    log_p = torch.log_softmax(logits[wrong].float(), dim=-1).gather(-1, ids[:, 1:][wrong][:, None])[:, 0]
    # log(1 - p) has no gradient to speak of where p rounds to one; the bound keeps it finite there.
    loss = (-torch.log1p(-log_p.exp().clamp(max=1 - 1e-4))).sum() / total
    return loss, int(wrong.sum()) / total
