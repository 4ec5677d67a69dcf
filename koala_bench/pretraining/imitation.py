"""Train a draft model to say what a target says: the target's own distributions are its labels, and the target's
answers its text.

A draft is accepted where it agrees with the target, not where it agrees with the corpus, and a small model cannot learn
both. So it is trained by distillation (Zhou et al. 2024, arXiv 2310.08461, "DistillSpec", with the forward divergence):
the cross-entropy with the target's whole distribution at every token, whose least value is reached where the two are
equal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from koala_bench.common.progress import say
from koala_bench.dialogues.conversations import Conversations, bundled_answers, read_conversations
from koala_bench.dialogues.distilling.answers import answering_target
from koala_bench.engine.loading.targets import bundled_target, fingerprint, load_target
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.pretraining.corpus import DOCUMENTATION


@dataclass(frozen=True)
class Imitated:
    """A target to draft for.

    Attributes:
        target: a target of ``koala-bench pretrain``.
        answers: what it answered, to train on beside the corpus while the rate falls; None for the corpus alone.
    """

    target: Target
    answers: Conversations | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What the training depends on, for checkpoint and manifest."""
        answers = None if self.answers is None else self.answers.provenance
        return {
            "name": self.target.name,
            "weights_sha256": fingerprint(self.target)["weights_sha256"],
            "answers": answers,
        }

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Refuse a tokenizer that is not the target's.

        Raises:
            KoalaBenchError: its tokens or their ids are others.
        """
        assert self.target.tokenizer is not None
        if tokenizer.get_vocab() != self.target.tokenizer.get_vocab():
            raise KoalaBenchError(
                f"The tokenizer to train with is not that of {self.target.name}.",
                "Choose another --out, or leave out --start.",
            )

    def loss(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the model with the target's distribution, mean over the rows' tokens but the last, nats.

        Args:
            ids: int64 [rows, tokens]. The last token is left out, as where the corpus is the label.
        """
        with torch.no_grad():
            wanted = torch.softmax(self.target.model(input_ids=ids[:, :-1], use_cache=False).logits.float(), dim=-1)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        return -(wanted * torch.log_softmax(logits, dim=-1)).sum(-1).mean()

    def agreement(self, model: Any, ids: torch.Tensor) -> float:
        """Share of the tokens of rows [rows, tokens] after which the model's best guess is the target's."""
        same = [
            (model(input_ids=part).logits.argmax(-1) == self.target.model(input_ids=part).logits.argmax(-1))
            .float()
            .mean()
            for part in ids.split(8)
        ]
        return float(torch.stack(same).mean())


def load_imitated(name: str, answers: str | None, device: torch.device) -> Imitated:
    """The target of that name or folder, and conversations in which it answered (a file, or ``bundled``).

    Raises:
        KoalaBenchError: the target was not made by ``koala-bench pretrain``, or the conversations cannot be read.
    """
    if not ((bundled_target(name) or Path(name)) / "pretraining.json").is_file():
        raise KoalaBenchError(
            f"{name} is no target of `koala-bench pretrain`.",
            "Give --imitate a bundled target, or a folder that command has written.",
        )
    if answers == DOCUMENTATION:
        raise KoalaBenchError(
            "The documentation is trained on anyway.",
            "Give --answers bundled, or a file made by `koala-bench distill`.",
        )
    target = load_target(name, str(device), "float32")
    if answers is None:
        return Imitated(target)
    said_by = answering_target(bundled_answers(answers) or Path(answers))
    if said_by is not None and said_by["weights_sha256"] != fingerprint(target)["weights_sha256"]:
        say(
            f"These answers are those of another target, {said_by['name']}: let {name} answer itself with koala-bench"
            " distill."
        )
    found = read_conversations(answers)
    return Imitated(target, replace(found, provenance={**found.provenance, "source": answers}))  # as it was asked for
