"""Shared by the checks of a head: findings, tiny targets, batches, a training step, and drafts along a given text.

One of the targets counts in a circle. Its next token is known by construction, so a head learns the language in a
second, and a drafted token shows for which position it was meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from koala_bench.decoding.loop import Decoded, capacity_for, decode
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target
from koala_bench.heads import Committed, FeatureBatch, read_prompt
from koala_bench.presets import MethodPreset
from koala_bench.testing import save_tiny_target, tiny_config
from koala_bench.training.loop import build_head
from koala_bench.tree import DraftTree, Template, TreeTemplate, load_template

CIRCLE = tuple(range(40, 53))  # 13 tokens: prime, and longer than any draft is deep plus any likely slip
PROMPT = [1, 70, 81, 82, 90, 33]
DEPTH = 4  # heads that draft deeper are checked this deep
_FIRST_ORDINARY = 3  # ids below are special tokens
_RATE = 1e-2


class BrokenError(Exception):
    """The head does not keep the contract; the message says where to look."""


class NotApplicableError(Exception):
    """There is nothing to check; the message says why."""


class Bench:
    """Tiny targets of several kinds, unchanged since they were made, and fresh heads for them.

    Args:
        preset: the head and its options.
        folder: where targets and trained heads may be written.
    """

    def __init__(self, preset: MethodPreset, folder: Path) -> None:
        self.preset, self.folder = preset, folder
        self._made: dict[str, tuple[Target, dict[str, torch.Tensor]]] = {}

    def target(self, kind: str = "float32") -> Target:
        """A tiny random target: ``float32``, ``float64``, ``bfloat16``, ``tied`` (output layer and embedding), or
        ``circle``."""
        if kind not in self._made:
            target = self._make(kind)
            self._made[kind] = target, {name: tensor.clone() for name, tensor in target.model.state_dict().items()}
        target, weights = self._made[kind]
        # A head that changes its target must fail the check of that, and spoil none of the others.
        target.model.load_state_dict(weights)
        target.model.requires_grad_(False)
        return target

    def _make(self, kind: str) -> Target:
        if kind in ("tied", "circle"):
            config = tiny_config(tie_word_embeddings=True) if kind == "tied" else tiny_config(initializer_range=1.0)
            target = load_target(str(save_tiny_target(self.folder / kind, config)), "cpu", "float32", tokenizer=False)
            if kind == "circle":
                _teach_circle(target)
            return target
        folder = self.folder / "random"
        return load_target(str(folder if folder.exists() else save_tiny_target(folder)), "cpu", kind, tokenizer=False)

    def head(self, target: Target, seed: int = 0) -> Any:
        """A fresh head, built as for training."""
        return build_head(target, self.preset, seed)

    def trained(self, target: Target, steps: int = 3) -> Any:
        """A head after a few steps, so that nothing is at its initial zero; fresh if it has no loss."""
        head = self.head(target)
        if hasattr(head, "loss"):
            train(head, batch_of(target, random_ids(2, 24), head.features), steps)
        return head

    def ready(self) -> tuple[Target, Any]:
        """The float32 target and a head trained for some steps, ready to draft."""
        target = self.target()
        return target, self.trained(target).eval()


def _teach_circle(target: Target) -> None:
    """Make a random target continue each token of the circle with the next one, whatever came before.

    Without what attention and feed-forward layers add, the last state is the normalised embedding of the last token;
    the output layer then maps the state of each token of the circle to its successor, and knows no other token.
    """
    with torch.no_grad():
        for name, weight in target.model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        states = target.states(torch.tensor([CIRCLE]))[0, :, -1].clone()
        output = target.model.get_output_embeddings().weight
        output.zero_()
        output[[*CIRCLE[1:], CIRCLE[0]]] = 0.5 * states


def circle_ids(rows: int, tokens: int) -> torch.Tensor:
    """Text of the target that counts in a circle, int64 [rows, tokens], each row begun elsewhere."""
    places = torch.arange(tokens)[None] + 5 * torch.arange(rows)[:, None]
    return torch.tensor(CIRCLE)[places % len(CIRCLE)]


def random_ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Ordinary tokens without any pattern, int64 [rows, tokens]."""
    return torch.randint(
        _FIRST_ORDINARY, tiny_config().vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed)
    )


def batch_of(target: Target, ids: torch.Tensor, features: tuple[int, ...]) -> FeatureBatch:
    """A batch without padding in which all but the first two tokens belong to answers."""
    supervised = torch.ones_like(ids, dtype=torch.bool)
    supervised[:, :2] = False
    return FeatureBatch(
        ids, supervised, target.states(ids, features).clone(), 0, target.output, torch.full((len(ids),), ids.shape[1])
    )


def optimiser_of(head: nn.Module) -> torch.optim.Optimizer:
    """The suite's optimiser, with a rate that overfits a short text quickly."""
    return torch.optim.AdamW(head.parameters(), lr=_RATE, weight_decay=0.0)


def train(
    head: Any, batch: FeatureBatch, steps: int, optimiser: torch.optim.Optimizer | None = None, seed: int = 0
) -> float:
    """Some steps on one batch, whose seed changes from ``seed`` on as in training; returns the last loss."""
    optimiser = optimiser or optimiser_of(head)
    loss = 0.0
    head.train()
    for step in range(steps):
        optimiser.zero_grad(set_to_none=True)
        total = head.loss(replace(batch, seed=seed + step)).total
        total.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimiser.step()
        loss = float(total.detach())
    return loss


@torch.inference_mode()
def drafts_along(
    head: Any,
    target: Target,
    template: Template,
    ids: Sequence[int],
    first: int,
    overwritten: bool = False,
    reading: bool = False,
) -> Iterator[tuple[int, DraftTree]]:
    """Drafts while a text is committed in pieces as verification would: the prompt of ``first`` tokens, then 1 to depth
    + 1 at a time.

    Args:
        overwritten: whether the given states become nan after each draft, since a CUDA graph's next pass overwrites
            them.
        reading: call ``prefill`` if the head has it.

    Yields:
        the place of each tree's root in the text, and the tree.
    """
    text = torch.tensor(ids)
    states = target.states(text[None], head.features)[0].clone()
    head.begin(template, capacity_for(first, len(ids) - first, template.nodes, target.max_positions))
    start, stop, piece = 0, first, 1
    while stop < len(ids):
        new = Committed(text[start + 1 : stop + 1], states[start:stop], start)
        yield stop, head.draft(read_prompt(head, new) if reading and not start else new)
        if overwritten:
            states[start:stop] = torch.nan
        piece = piece % (template.depth + 1) + 1
        start, stop = stop, stop + piece


def answer(target: Target, head: Any, template: Template, tokens: int, prompt: list[int] | None = None) -> Decoded:
    """A greedy answer of a fixed length, with its trees."""
    return decode(target, head, template, prompt or PROMPT, tokens, (), trace=True)


def templates_of(max_depth: int) -> list[Template]:
    """A chain, a single level, a bushy tree, and one with gaps between its ranks; none deeper than the head."""
    depth = min(max_depth, DEPTH)
    uneven = [(0,), (1,), (3,), (0, 0), (0, 2), (3, 0), (0, 0, 0), (3, 0, 1)]
    return [
        load_template(f"chain-{depth}"),
        load_template("3"),
        load_template("x".join("221"[:depth])),
        TreeTemplate.of("uneven", [path for path in uneven if len(path) <= depth]),
    ]


def apart(*runs: Sequence[Any]) -> int | None:
    """The first place in which some runs differ; None if they are equal."""
    if all(run == runs[0] for run in runs):
        return None
    places = enumerate(zip(*runs, strict=False))
    return next((at for at, each in places if any(one != each[0] for one in each)), min(map(len, runs)))


def needs_loss(head: Any) -> None:
    """Skip a check of training for a head without a loss."""
    if not hasattr(head, "loss"):
        raise NotApplicableError("the head has no loss, so the suite does not train it")


def listed(names: list[str]) -> str:
    """The first few of the names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
