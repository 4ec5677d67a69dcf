"""A draft model's labels: the target's own distributions, on the corpus and on the target's answers.

A draft is accepted if it agrees with the target, not with the corpus. So the loss is the cross-entropy with the
target's whole distribution (Zhou et al. 2024, arXiv 2310.08461, "DistillSpec", with the forward divergence).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from koala_bench.common.progress import log_line
from koala_bench.dialogues.conversations import Conversations, bundled_answers, read_conversations
from koala_bench.dialogues.distilling.manifest import answering_target
from koala_bench.engine.loading.targets import bundled_target, fingerprint, load_target
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError


@dataclass(frozen=True)
class Imitated:
    """A target to draft for.

    Attributes:
        answers: its answers, half of the text while the rate decays; None for the corpus only.
    """

    target: Target
    answers: Conversations | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What the training depends on, for checkpoint and manifest."""
        return {
            "name": self.target.name,
            "weights_sha256": fingerprint(self.target)["weights_sha256"],
            "answers": None if self.answers is None else self.answers.provenance,
        }

    def loss(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        """Cross-entropy with the target's distribution after each token of int64 [rows, tokens] but the last, nats."""
        with torch.no_grad():
            wanted = torch.softmax(self.target.model(input_ids=ids[:, :-1], use_cache=False).logits.float(), dim=-1)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        return -(wanted * torch.log_softmax(logits, dim=-1)).sum(-1).mean()

    def agreement(self, model: Any, ids: torch.Tensor) -> float:
        """Share of positions of rows [rows, tokens] where the model's most likely token is the target's."""

        def best(model: Any, part: torch.Tensor) -> torch.Tensor:
            return model(input_ids=part).logits.argmax(-1)

        same = [(best(model, part) == best(self.target.model, part)).float().mean() for part in ids.split(8)]
        return float(torch.stack(same).mean())


def load_imitated(name: str, answers: str | None, device: torch.device) -> Imitated:
    """The target of that name or folder, and conversations in which it answered (a file, or ``bundled``). Raises
    KoalaBenchError where the target was not made by ``koala-bench pretrain``, or the conversations cannot be read."""
    if not ((bundled_target(name) or Path(name)) / "pretraining.json").is_file():
        raise KoalaBenchError(
            f"{name} is no target of `koala-bench pretrain`.",
            "Give --imitate a bundled target, or a folder that command has written.",
        )
    target = load_target(name, str(device), "float32")
    if answers is None:
        return Imitated(target)
    found = read_conversations(answers)
    said_by = answering_target(bundled_answers(answers) or Path(answers))
    if said_by is not None and said_by["weights_sha256"] != fingerprint(target)["weights_sha256"]:
        log_line(
            f"{answers} holds answers of another target, {said_by['name']}: make {name}'s own with koala-bench distill."
        )
    return Imitated(target, replace(found, provenance={**found.provenance, "source": answers}))
