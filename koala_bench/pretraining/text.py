"""The text of a pretraining: its tokenizer, and dialogues concatenated and cut into rows of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from koala_bench.common.progress import log_line
from koala_bench.dialogues.conversations import Conversations
from koala_bench.dialogues.encoding import chat_template, encode_dialogues
from koala_bench.errors import KoalaBenchError
from koala_bench.pretraining.imitation import Imitated
from koala_bench.pretraining.options import PretrainOptions

TEMPLATE = "vicuna_v1.1"
_HELD_OUT_ROWS = 64


class Rows:
    """Dialogues concatenated in a new order each epoch and cut into rows of equal length."""

    def __init__(self, dialogues: Sequence[np.ndarray], row_tokens: int, seed: int) -> None:
        self.dialogues, self.row_tokens, self.seed = dialogues, row_tokens, seed
        self.per_epoch = sum(map(len, dialogues)) // row_tokens
        self._epoch, self._rows = -1, np.empty((0, row_tokens), dtype=np.uint16)

    def __getitem__(self, index: int) -> np.ndarray:
        epoch, row = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dialogues))
            stream = np.concatenate([self.dialogues[i] for i in order])
            self._epoch, self._rows = epoch, stream[: self.per_epoch * self.row_tokens].reshape(-1, self.row_tokens)
        return self._rows[row]

    def batch(self, first: int, count: int) -> np.ndarray:
        """Rows ``first .. first + count`` as int64 ids, shape [count, row_tokens]."""
        return np.stack([self[first + i] for i in range(count)]).astype(np.int64)

    def first(self) -> torch.Tensor:
        """The first rows, for held-out measurements."""
        return torch.from_numpy(self.batch(0, min(_HELD_OUT_ROWS, self.per_epoch)))


@dataclass(frozen=True)
class Text:
    """Rows to train on and to measure with.

    Attributes:
        stable, decaying: of the corpus, while the rate is stable and while it falls.
        answers: the imitated target's answers, half of the text while the rate falls; None where there are none.
        held_out: int64 ids [rows, tokens] of held-out dialogues.
        compared: ids [rows, tokens] on which a draft model's agreement with its target is measured.
    """

    stable: Rows
    decaying: Rows
    answers: Rows | None
    held_out: torch.Tensor
    compared: torch.Tensor

    def batch(self, step: int, step_tokens: int, decaying: bool) -> torch.Tensor:
        """Int64 ids [rows, row_tokens] of a step, half of the rows from the answers where these are in use."""
        text, answers = (self.decaying, self.answers) if decaying else (self.stable, None)
        count = step_tokens // text.row_tokens
        half = 0 if answers is None else count // 2
        rows = text.batch(step * (count - half), count - half)
        return torch.from_numpy(rows if answers is None else np.concatenate([answers.batch(step * half, half), rows]))


def make_text(
    corpus: Conversations, tokenizer: PreTrainedTokenizerFast, options: PretrainOptions, imitate: Imitated | None
) -> Text:
    """Encode a corpus and the answers of the target to imitate. Raises KoalaBenchError where the answers do not fill a
    row."""
    template = chat_template(TEMPLATE, tokenizer)

    def rows(dialogues: Sequence[Sequence[str]], tokens: int = options.decay_row_tokens) -> Rows:
        encoded = encode_dialogues(template, tokenizer, dialogues)
        return Rows([np.asarray(each.ids, dtype=np.uint16) for each in encoded], tokens, options.seed)

    log_line(f"Encoding {len(corpus.train):,} dialogues ...")
    stable, held_out = rows(corpus.train, options.row_tokens), rows(corpus.held_out).first()
    decaying = Rows(stable.dialogues, options.decay_row_tokens, options.seed)
    if imitate is None or imitate.answers is None:
        return Text(stable, decaying, None, held_out, held_out)
    answers, apart = rows(imitate.answers.train), rows(imitate.answers.held_out)
    if not answers.per_epoch or not apart.per_epoch:
        raise KoalaBenchError(
            f"The answers do not fill a row of {options.decay_row_tokens} tokens.",
            "Give --answers a file with more of them.",
        )
    return Text(stable, decaying, answers, held_out, apart.first())


def tokenizer_in(
    folder: Path, corpus: Conversations, vocabulary: int, start: Path | None, imitate: Imitated | None
) -> PreTrainedTokenizerFast:
    """The tokenizer kept in a folder; at first that of an earlier or the imitated target, else one of the corpus.
    Raises KoalaBenchError where it is not that of the target to imitate."""
    own = None if imitate is None else imitate.target.tokenizer
    if not (folder / "tokenizer.json").exists():
        made = PreTrainedTokenizerFast.from_pretrained(start) if start is not None else own
        (made or _train_tokenizer(corpus, vocabulary)).save_pretrained(folder)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    if own is not None and tokenizer.get_vocab() != own.get_vocab():
        raise KoalaBenchError(
            "The tokenizer to train with is not that of the target to imitate.",
            "Choose another --out, or leave out --start.",
        )
    return tokenizer


def _train_tokenizer(corpus: Conversations, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training dialogues, with Llama's special tokens at ids 0 to 2."""
    log_line(f"Training a tokenizer of {vocabulary:,} tokens ...")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((text for dialogue in corpus.train for text in dialogue), trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
