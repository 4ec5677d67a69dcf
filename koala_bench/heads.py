"""The contract between the harness and a draft head: its inputs and outputs.

A head is an ``nn.Module`` built from a ``TargetSpec`` and its own options. Decoding needs ``draft``, training ``loss``
as well. Inputs are aligned the same way everywhere: ``hidden[i]`` is the state from which the target predicted
``tokens[i]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedTokenizerBase

from koala_bench.common.draft_vocabulary import DraftVocabulary
from koala_bench.tree import DraftTree, Template

Pass = Callable[..., Any]  # of tensors, numbers and None


class Record(Protocol):
    """Records a decoding pass, or returns it unchanged; see ``TargetSpec.record``."""

    def __call__(
        self,
        function: Pass,
        dynamic_dims: Sequence[Sequence[int]],
        static: Sequence[int] = (),
        constant: Sequence[int] = (),
    ) -> Pass: ...


def as_it_is(
    function: Pass, dynamic_dims: Sequence[Sequence[int]], static: Sequence[int] = (), constant: Sequence[int] = ()
) -> Pass:
    """The function itself, not recorded."""
    return function


@dataclass(frozen=True)
class TargetSpec:
    """What a head can use of its target. The modules are the target's own: frozen, and never part of a head's state.

    Attributes:
        hidden_size, vocab_size, layers, max_positions: sizes of the target; the first is the width of its last states,
            which some families make narrower than those of their layers.
        embed: ids [...] -> embeddings [..., hidden_size].
        output: states [..., hidden_size] -> logits [..., vocab_size], the whole of what follows the final norm; -inf
            for what is not drafted.
        output_weight: weight of the output layer [drafted, hidden_size], to start from.
        config: Hugging Face configuration of the target, of the language model where that is a part of it.
        device, dtype: where the target computes, and in what.
        tokenizer: the target's; None for bare weights.
        record: traces a head's decoding pass, a function of tensors, numbers and None whose operations depend on
            nothing but sizes. With ``--engine graph`` it returns a recording to call instead, see
            ``koala_bench.engine.graphs``. ``dynamic_dims`` lists for each argument the dimensions whose sizes differ
            between calls; ``static`` are indices of arguments used in place, because the pass writes into them or they
            are large; ``constant`` are indices of tensors that are never modified.
        fixed_shapes: whether shapes inside a recorded pass may depend on nothing but its arguments' shapes, as CUDA
            graphs need; numbers are then handed to it as tensors [] on the device.
        draft_vocabulary: the tokens that the head is to draft; all of them where None. A head that scores through
            ``output`` need not know of it. One with an output layer of its own gives that ``drafted`` rows, and its
            scores to ``spread``.
        scores: states [..., hidden_size] -> logits [..., drafted], for losses: ``output`` before it is spread.
        cut: makes the same for the draft vocabulary of these ids, int64 [drafted].
    """

    hidden_size: int
    vocab_size: int
    layers: int
    max_positions: int
    embed: Callable[[torch.Tensor], torch.Tensor]
    output: Callable[[torch.Tensor], torch.Tensor]
    output_weight: torch.Tensor
    config: Any
    device: torch.device
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase | None = None
    record: Record = as_it_is
    fixed_shapes: bool = False
    draft_vocabulary: DraftVocabulary | None = None
    scores: Callable[[torch.Tensor], torch.Tensor] | None = None
    cut: Callable[[torch.Tensor], TargetSpec] | None = None

    @property
    def drafted(self) -> int:
        """Number of tokens that can be drafted."""
        return self.vocab_size if self.draft_vocabulary is None else len(self.draft_vocabulary)

    def spread(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [..., drafted] of an output layer of the head's own among all tokens [..., vocab_size]."""
        return scores if self.draft_vocabulary is None else self.draft_vocabulary.spread(scores)

    def score(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [..., drafted] of final states [..., hidden_size]."""
        return (self.scores or self.output)(states)

    def labels(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [...] by their places among those drafted, -1 for the others."""
        return tokens if self.draft_vocabulary is None else self.draft_vocabulary.places(tokens)


@dataclass(frozen=True)
class Committed:
    """Tokens and states that the target committed since the last call.

    Attributes:
        tokens: committed tokens, int64 [new]; the last one is the root of the next tree.
        hidden: target states [new, features, hidden_size]; ``hidden[i]`` predicted ``tokens[i]``. Valid during the call
            only, since they may be the target's own buffer, which its next pass overwrites. Clone what you keep.
        position: position in the sequence of ``hidden[0]``; ``tokens[i]`` stands at ``position + i + 1``.
        first: the first token of a sequence, int64 [1], which no state predicted and ``tokens`` lacks; set in the first
            call of a sequence only, and not by all callers.
    """

    tokens: torch.Tensor
    hidden: torch.Tensor
    position: int
    first: torch.Tensor | None = None


@dataclass(frozen=True)
class SoftLabels:
    """The target's next-token distribution at each position, restricted to the tokens that a head can draft.

    Attributes:
        probabilities: float32 [batch * tokens, drafted]; renormalised over a draft vocabulary.
        likeliest: index of the target's most likely token among those drafted, int64 [batch * tokens]; -1 if a draft
            vocabulary lacks it. Little of the distribution may be left there, so losses skip the row, as EAGLE-3's does
            upstream.
        normalizers: logsumexp of the logits of a draft vocabulary, float32 [batch * tokens]; None of a whole one.
    """

    probabilities: torch.Tensor
    likeliest: torch.Tensor
    normalizers: torch.Tensor | None = None


@dataclass(frozen=True)
class FeatureBatch:
    """One batch of dialogues with the target's states; every head of a run sees the same ones.

    Attributes:
        ids: token ids, int64 [batch, tokens], padded on the right.
        supervised: bool [batch, tokens], whether the token belongs to an answer; False on padding.
        hidden: target states [batch, tokens, features, hidden_size].
        seed: new in each step; heads seed their noise with it, so that equal heads get equal noise.
        output: the target's output layer, see ``TargetSpec.output``.
        lengths: number of real tokens of each row, int64 [batch].
        whole: the batch that this one is a part of, if heads read different layers; it keeps what all of them share.
        known_likeliest, known_normalizers: the target's likeliest next tokens, int64 [batch, tokens], and the logsumexp
            of its logits, float32 [batch, tokens], where they were stored.
    """

    ids: torch.Tensor
    supervised: torch.Tensor
    hidden: torch.Tensor
    seed: int
    output: Callable[[torch.Tensor], torch.Tensor]
    lengths: torch.Tensor
    whole: FeatureBatch | None = None
    known_likeliest: torch.Tensor | None = None
    known_normalizers: torch.Tensor | None = None

    def reading(self, places: list[int]) -> FeatureBatch:
        """The same batch with the states at ``places`` of its features only."""
        # A slice if possible, which costs no copy.
        hidden = self.hidden[:, :, places[0] : places[0] + 1] if len(places) == 1 else self.hidden[:, :, places]
        return replace(self, hidden=hidden, whole=self)

    @cached_property
    def target_probabilities(self) -> torch.Tensor:
        """The target's next-token distribution [batch, tokens, vocab_size], computed once for all heads."""
        if self.whole is not None:
            return self.whole.target_probabilities
        # The first caller may be under autocast or not; all heads must get the same values.
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            return torch.softmax(self.output(self.hidden[:, :, -1]).float(), dim=-1)

    @cached_property
    def target_likeliest(self) -> torch.Tensor:
        """The target's likeliest next token of all, int64 [batch, tokens]."""
        if self.known_likeliest is not None:
            return self.known_likeliest
        if "target_probabilities" in self.__dict__:
            return self.target_probabilities.argmax(-1)
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            return torch.stack([self.output(row).argmax(-1) for row in self.hidden[:, :, -1]])

    def soft_labels(self, spec: TargetSpec) -> SoftLabels:
        """The target's distributions over what a head of this spec drafts, computed once for all heads of equal
        vocabularies.

        A cut vocabulary costs the softmax over its own tokens, and an argmax over all logits if none is stored.
        """
        if self.whole is not None:
            return self.whole.soft_labels(spec)
        key = "" if spec.draft_vocabulary is None else spec.draft_vocabulary.sha256
        if key not in self._soft_labels:
            normalizers = None
            if spec.draft_vocabulary is None:
                probabilities = self.target_probabilities
            else:
                with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
                    logits = spec.score(self.hidden[:, :, -1]).float()
                    probabilities, normalizers = torch.softmax(logits, dim=-1), logits.logsumexp(-1).flatten()
            self._soft_labels[key] = SoftLabels(
                probabilities.flatten(0, 1), spec.labels(self.target_likeliest).flatten(), normalizers
            )
        return self._soft_labels[key]

    @cached_property
    def _soft_labels(self) -> dict[str, SoftLabels]:
        return {}

    def drafted_share(self, spec: TargetSpec) -> torch.Tensor:
        """How much of the target's distribution a head of this spec can draft, float32 [batch * tokens]: 1 where it
        drafts all tokens.

        Costs what ``soft_labels`` does, and for a cut vocabulary the target's whole output layer, once for all heads,
        if no normalizers are stored.
        """
        if spec.draft_vocabulary is None:
            return torch.ones(self.ids.numel(), device=self.hidden.device)
        drafted = self.soft_labels(spec).normalizers
        assert drafted is not None
        return (drafted - self.target_normalizers.flatten()).exp()

    @cached_property
    def target_normalizers(self) -> torch.Tensor:
        """The logsumexp of the target's logits, float32 [batch, tokens], computed once for all heads."""
        if self.whole is not None:
            return self.whole.target_normalizers
        if self.known_normalizers is not None:
            return self.known_normalizers
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            # A dialogue at a time, since all its logits are held at once.
            return torch.stack([self.output(row).float().logsumexp(-1) for row in self.hidden[:, :, -1]])

    def forget(self) -> None:
        """Drop the cached distributions; they are computed again when needed."""
        for batch in (self, self.whole or self):
            for name in ("target_probabilities", "target_likeliest", "target_normalizers", "_soft_labels"):
                batch.__dict__.pop(name, None)


@dataclass(frozen=True)
class Prediction:
    """A head's predictions at one drafting depth, for objectives.

    Attributes:
        depth: 1 for the token after the root, 2 for the one after that, ...
        rows: int64 [rows], indices into the flattened [batch * tokens] of the states drafted from.
        feature: predicted target state [rows, hidden_size], to be compared with the state ``depth`` tokens later.
        scored: logits [rows, vocab_size] for the token ``depth + 1`` places after the state drafted from; or, for a
            large vocabulary, a function that computes those of a slice of the rows.
        vocabulary: if given, ``scored`` are logits [rows, drafted] of its tokens only.
        weight: of this prediction's token loss in the head's loss.
    """

    depth: int
    rows: torch.Tensor
    feature: torch.Tensor
    scored: torch.Tensor | Callable[[slice], torch.Tensor]
    vocabulary: DraftVocabulary | None = None
    weight: float = 1.0

    @cached_property
    def logits(self) -> torch.Tensor:
        """Logits [rows, vocab_size]; -inf for what is not drafted."""
        scored = self.scored if isinstance(self.scored, torch.Tensor) else self.scored(slice(None))
        return scored if self.vocabulary is None else self.vocabulary.spread(scored)

    def drafted(self, rows: slice, spec: TargetSpec) -> torch.Tensor:
        """Logits [rows, drafted] of a slice of the rows, over the tokens that heads of a spec draft."""
        scored = self.scored[rows] if isinstance(self.scored, torch.Tensor) else self.scored(rows)
        if self.vocabulary is None and spec.draft_vocabulary is not None:
            return scored[:, spec.draft_vocabulary.ids]
        return scored


@dataclass(frozen=True)
class HeadLoss:
    """A head's supervised loss on a batch.

    Attributes:
        total: scalar to minimise.
        parts: named scalars for the log, detached.
        predictions: one per depth that the loss covered; may be empty, then only supervised training is possible.
        rest: optional; ``total`` without the token losses of the predictions, for objectives that replace those.
    """

    total: torch.Tensor
    parts: dict[str, torch.Tensor]
    predictions: tuple[Prediction, ...]
    rest: torch.Tensor | None = None


@runtime_checkable
class DraftHead(Protocol):
    """A module that proposes tokens from the target's hidden states.

    Attributes:
        features: which target states it reads, as indices into the model's list of hidden states; ``(-1,)`` is
            the one after the final norm.
        max_depth: how many tokens ahead it can draft.
        dynamic: optional; True for a head whose trees may have other shapes than its template, no larger and no deeper.
        usual_tree: optional; name of the default template, if neither a preset nor an option names one.
        model_option: optional; the option that names a model whose weights the head loads and does not train.
        pick: optional; how candidates are taken from scores, see ``koala_bench.decoding.candidates``. Heads that have
            it sample their drafts above temperature 0.
        assisted: optional; a method that, given a depth, returns the arguments of transformers' ``generate`` that draft
            likewise. ``koala-bench benchmark`` then times that beside the head.
    """

    features: tuple[int, ...]
    max_depth: int

    def begin(self, template: Template, capacity: int) -> None:
        """Forget the sequence and prepare for another of at most ``capacity`` positions.

        A head without dynamic trees need not check for a dynamic template: its ``paths`` and ``shape`` raise an error.
        """

    def draft(self, new: Committed) -> DraftTree:
        """Propose a tree whose root is ``new.tokens[-1]``.

        Without ``prefill`` the first call of a sequence gets the whole prompt, and all its time counts as decoding.
        That is right for a head that reads the last pair only, and a disadvantage for one that reads the others too.
        """


@runtime_checkable
class ReadingHead(DraftHead, Protocol):
    """A draft head with a prefill of its own, timed apart from its first draft."""

    def prefill(self, new: Committed) -> None:
        """Read all pairs of the prompt but the last, after ``begin``; the last one comes with the first ``draft``.

        Drafts must equal those of ``draft`` given all pairs at once. Not called if the prompt is a single token.
        """


def read_prompt(head: DraftHead, prompt: Committed) -> Committed:
    """Prefill a head that has ``prefill``; returns the input of its first ``draft``."""
    last = len(prompt.tokens) - 1
    if not last or not isinstance(head, ReadingHead):
        return prompt
    head.prefill(replace(prompt, tokens=prompt.tokens[:last], hidden=prompt.hidden[:last]))
    return Committed(prompt.tokens[last:], prompt.hidden[last:], prompt.position + last)


@runtime_checkable
class ObservingHead(DraftHead, Protocol):
    """A draft head that learns from the target's logits while decoding."""

    def observe(self, tree: DraftTree, logits: torch.Tensor) -> None:
        """Receive the target's logits [nodes, vocab_size] at all nodes of a verified tree, accepted or not.

        Called after each verification, before the next ``draft``; its time counts as drafting. Modify neither argument,
        and copy what you keep: the next pass may overwrite them.
        """


@runtime_checkable
class TrainableHead(DraftHead, Protocol):
    """A draft head that the suite can train.

    Attributes:
        soft_labels: optional; True where the loss asks for ``FeatureBatch.soft_labels``, so that ``plan`` counts them.
    """

    def loss(self, batch: FeatureBatch) -> HeadLoss:
        """Supervised loss on a batch.

        ``predictions`` carry gradients; the batch is constant.
        """


class Objective(Protocol):
    """A term added to a head's supervised loss, or put in the place of its token losses: a module with trained
    parameters of its own, or without. It is built from its head's spec.

    A step has one or more micro-batches, which may be spread over processes: first ``learn`` for each, then one
    ``step``, then ``term`` for each.

    Attributes:
        learns: optional; False for an objective without parameters, of which only ``term`` is called.
        replaces: optional; True for one whose term stands in for the token losses, where ``HeadLoss.rest`` is known.
        soft_labels: as of ``TrainableHead``.
    """

    def active(self, progress: float) -> bool:
        """Whether there is a term now; ``progress`` is the fraction of training steps done. If not, nothing else is
        called.
        """

    def learn(self, batch: FeatureBatch, found: HeadLoss, progress: float, share: float) -> dict[str, torch.Tensor]:
        """Add ``share`` times this micro-batch's gradients to its own parameters'; returns values for the log."""

    def step(self, progress: float) -> None:
        """Update its own parameters, by the gradients of all micro-batches."""

    def term(
        self,
        batch: FeatureBatch,
        found: HeadLoss,
        progress: float,
        agree: Callable[[Callable[[], float | None]], float | None],
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """The term of a micro-batch's loss, None for nothing, and values for the log.

        Args:
            agree: measures a number on the first process and broadcasts it; all processes must call it equally often.
        """
