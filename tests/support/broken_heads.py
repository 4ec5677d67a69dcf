"""A head that keeps the contract, and its sisters, each of which breaks it in one way; and which check finds what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from heads.common.growth import LevelNodes
from heads.eagle import Eagle
from koala_bench.contract import CHECKS
from koala_bench.decoding.loop import Vanilla
from koala_bench.heads import Committed, FeatureBatch, HeadLoss, Prediction
from koala_bench.tree import DraftTree, TreeTemplate, load_template


class Good(nn.Module):
    """One linear layer for each of two tokens ahead, read out by the target's output layer. Each sister breaks one
    thing.
    """

    features: Any = (-1,)
    max_depth: Any = 2

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.guess = nn.ModuleList(nn.Linear(spec.hidden_size, spec.hidden_size) for _ in range(2))
        self.spec_output, self.vocabulary = spec.output, spec.vocab_size

    def begin(self, template: TreeTemplate, capacity: int) -> None:
        template.check(depth=self.max_depth, candidates=self.vocabulary)
        self.template = template
        self.levels = torch.tensor([len(path) - 1 for path in template.paths])
        self.ranks = torch.tensor([path[-1] for path in template.paths])

    def candidates(self, state: torch.Tensor) -> torch.Tensor:
        states = torch.stack([guess(state) for guess in self.guess[: self.template.depth]])
        return self.spec_output(states).topk(self.template.widest_rank).indices

    def draft(self, new: Committed) -> DraftTree:
        tokens = self.candidates(new.hidden[-1, -1])[self.levels, self.ranks]
        return DraftTree(torch.cat([new.tokens[-1:], tokens]), self.template.shape)

    def counted(self, batch: FeatureBatch, ahead: int) -> torch.Tensor:
        counted = torch.zeros_like(batch.supervised)
        counted[:, :-ahead] = batch.supervised[:, ahead:]
        return counted.flatten().nonzero()[:, 0]

    def states(self, batch: FeatureBatch) -> torch.Tensor:
        return batch.hidden[:, :, -1].float().flatten(0, 1)

    def loss(self, batch: FeatureBatch) -> HeadLoss:
        total, predictions = torch.zeros(()), []
        for depth, guess in enumerate(self.guess, start=1):
            rows = self.counted(batch, depth + 1)
            feature = guess(self.states(batch)[rows])
            logits = self.spec_output(feature).float()
            total = total + F.cross_entropy(logits, batch.ids.flatten()[rows + depth + 1], reduction="sum") / max(
                len(rows), 1
            )
            predictions.append(Prediction(depth, rows, feature, logits))
        return HeadLoss(total, {}, tuple(predictions))


class LabelsTooEarly(Good):
    def loss(self, batch: FeatureBatch) -> HeadLoss:
        found = super().loss(batch)
        early = [
            F.cross_entropy(p.logits, batch.ids.flatten()[p.rows + p.depth], reduction="sum") / max(len(p.rows), 1)
            for p in found.predictions
        ]
        return HeadLoss(torch.stack(early).sum(), {}, found.predictions)


class LabelsTooLate(Good):
    def loss(self, batch: FeatureBatch) -> HeadLoss:
        found = super().loss(batch)
        late = []
        for p in found.predictions:
            kept = p.rows % batch.ids.shape[1] + p.depth + 2 < batch.ids.shape[1]
            late.append(
                F.cross_entropy(p.logits[kept], batch.ids.flatten()[p.rows[kept] + p.depth + 2], reduction="sum")
                / max(int(kept.sum()), 1)
            )
        return HeadLoss(torch.stack(late).sum(), {}, found.predictions)


class SecondLevelFromTheFirst(Good):
    def candidates(self, state: torch.Tensor) -> torch.Tensor:
        return super().candidates(state)[torch.zeros(self.template.depth, dtype=torch.int64)]


class WorstFirst(Good):
    def candidates(self, state: torch.Tensor) -> torch.Tensor:
        return super().candidates(state).flip(-1)


class DraftsFromTheOldestState(Good):
    def draft(self, new: Committed) -> DraftTree:
        return super().draft(Committed(new.tokens, new.hidden[:1], new.position))


class NeverLearns(Good):
    def loss(self, batch: FeatureBatch) -> HeadLoss:
        found = super().loss(batch)
        return HeadLoss(found.total * 0.0 + sum(p.square().sum() for p in self.parameters()), {}, found.predictions)


class DeadLayer(Good):
    def __init__(self, spec: Any) -> None:
        super().__init__(spec)
        self.unused = nn.Linear(4, 4)


class Detached(Good):
    def loss(self, batch: FeatureBatch) -> HeadLoss:
        found = super().loss(batch)
        labels = batch.ids.flatten()[found.predictions[0].rows + 2]
        return HeadLoss(
            F.cross_entropy(found.predictions[0].logits, labels, reduction="sum") / max(len(labels), 1),
            {},
            found.predictions[:1],
        )


class LearnsTheOutputLayer(Good):
    def __init__(self, spec: Any) -> None:
        super().__init__(spec)
        self.output_weight = nn.Parameter(spec.output_weight)
        self.spec_output = lambda states: states @ self.output_weight.to(states.dtype).T


class WritesToTheTarget(Good):
    def __init__(self, spec: Any) -> None:
        super().__init__(spec)
        self.own = [spec.output_weight]

    def loss(self, batch: FeatureBatch) -> HeadLoss:
        with torch.no_grad():
            self.own[0].div_(self.own[0].norm())
        return super().loss(batch)


class AlwaysAChain(Good):
    def draft(self, new: Committed) -> DraftTree:
        best = self.candidates(new.hidden[-1, -1])[:, 0]
        return DraftTree(torch.cat([new.tokens[-1:], best]), load_template(f"chain-{len(best)}").shape)


class SameSiblings(Good):
    def candidates(self, state: torch.Tensor) -> torch.Tensor:
        return super().candidates(state)[:, :1].expand(-1, self.template.widest_rank)


class BeyondTheVocabulary(Good):
    def candidates(self, state: torch.Tensor) -> torch.Tensor:
        return super().candidates(state) + 100


class OtherRoot(Good):
    def draft(self, new: Committed) -> DraftTree:
        tree = super().draft(new)
        return DraftTree(torch.cat([new.tokens[:1], tree.tokens[1:]]), tree.shape)


class Silent(Good):
    def draft(self, new: Committed) -> DraftTree:
        return Vanilla().draft(new)


class NeverForgets(Good):
    def __init__(self, spec: Any) -> None:
        super().__init__(spec)
        self.sum = torch.zeros(spec.hidden_size)

    def draft(self, new: Committed) -> DraftTree:
        self.sum = self.sum + new.hidden[:, -1].sum(0)
        return super().draft(Committed(new.tokens, new.hidden + 0.5 * self.sum.to(new.hidden.dtype), new.position))


class KeepsWhatWasLent(Good):
    def begin(self, template: TreeTemplate, capacity: int) -> None:
        super().begin(template, capacity)
        self.before: torch.Tensor | None = None

    def draft(self, new: Committed) -> DraftTree:
        before, self.before = self.before, new.hidden[-1]
        hidden = new.hidden if before is None else new.hidden + before
        return super().draft(Committed(new.tokens, hidden, new.position))


class ShortTable(Good):
    def draft(self, new: Committed) -> DraftTree:
        return super().draft(
            Committed(new.tokens, new.hidden + 0.0 * torch.arange(256)[new.position + len(new.tokens)], new.position)
        )


class OtherRows(Good):
    def loss(self, batch: FeatureBatch) -> HeadLoss:
        found = super().loss(batch)
        return HeadLoss(
            found.total,
            {},
            tuple(Prediction(p.depth, p.rows + p.depth, p.feature, p.logits) for p in found.predictions),
        )


class ReportsWithoutGradient(Good):
    def loss(self, batch: FeatureBatch) -> HeadLoss:
        found = super().loss(batch)
        return HeadLoss(
            found.total, {}, tuple(Prediction(p.depth, p.rows, p.feature.detach(), p.logits) for p in found.predictions)
        )


class RestOfEachDepth(Good):
    def loss(self, batch: FeatureBatch) -> HeadLoss:
        found = super().loss(batch)
        return HeadLoss(found.total, {}, found.predictions, rest=torch.zeros(len(found.predictions)))


class ReportsNothing(Good):
    def loss(self, batch: FeatureBatch) -> HeadLoss:
        return HeadLoss(super().loss(batch).total, {}, ())


class SavesHalf(Good):
    def __init__(self, spec: Any) -> None:
        super().__init__(spec)
        self.scale = 1.0 + torch.rand(spec.hidden_size)

    def states(self, batch: FeatureBatch) -> torch.Tensor:
        return super().states(batch) * self.scale

    def candidates(self, state: torch.Tensor) -> torch.Tensor:
        return super().candidates(state * self.scale.to(state.dtype))


class LayersInAList(Good):
    def __init__(self, spec: Any) -> None:
        super().__init__(spec)
        layers = list(self.guess)
        del self.guess
        self.guess = layers  # type: ignore[assignment]


class Dropout(Good):
    def states(self, batch: FeatureBatch) -> torch.Tensor:
        return F.dropout(super().states(batch), training=self.training)


class DraftsAtRandom(Good):
    def candidates(self, state: torch.Tensor) -> torch.Tensor:
        return super().candidates(state + 0.3 * torch.randn(state.shape, dtype=state.dtype))


class LearnsPadding(Good):
    def counted(self, batch: FeatureBatch, ahead: int) -> torch.Tensor:
        places = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
        return (places < batch.ids.shape[1] - ahead).flatten().nonzero()[:, 0]


class CrossesDialogues(Good):
    def counted(self, batch: FeatureBatch, ahead: int) -> torch.Tensor:
        wanted = batch.supervised.flatten().nonzero()[:, 0]
        return wanted[wanted + ahead < batch.ids.numel()]


class MeanOfNothing(Good):
    def loss(self, batch: FeatureBatch) -> HeadLoss:
        found = super().loss(batch)
        means = [F.cross_entropy(p.logits, batch.ids.flatten()[p.rows + p.depth + 1]) for p in found.predictions]
        return HeadLoss(torch.stack(means).sum(), {}, found.predictions)


class OneDtypeOnly(Good):
    def states(self, batch: FeatureBatch) -> torch.Tensor:
        return batch.hidden[:, :, -1].flatten(0, 1)


class WritesToWhatItIsShown(Good):
    def observe(self, tree: DraftTree, logits: torch.Tensor) -> None:
        logits.clamp_(min=0.0)


class KeepsWhatItIsShown(Good):
    shown: torch.Tensor | None

    def begin(self, template: TreeTemplate, capacity: int) -> None:
        super().begin(template, capacity)
        self.shown = None

    def observe(self, tree: DraftTree, logits: torch.Tensor) -> None:
        self.shown = logits[0]

    def draft(self, new: Committed) -> DraftTree:
        tree = super().draft(new)
        if self.shown is not None:
            level = tree.tokens[1 : 1 + len(self.template.shape.children[0])]
            level.copy_(self.shown.topk(len(level)).indices)
        return tree


class FeaturesAsList(Good):
    features = [-1]  # noqa: RUF012


class LastStateNotLast(Good):
    features = (-1, 1)


class NoDepth(Good):
    max_depth = 0


class NothingToTrain(Good):
    def __init__(self, spec: Any) -> None:
        super().__init__(spec)
        self.requires_grad_(False)


class CannotBeMade(Good):
    def __init__(self, spec: Any) -> None:
        super().__init__(spec)
        raise ValueError("not today")


class MispairedEagle(Eagle):
    """Learns from a state and the token before it, drafts from a state and the token after it."""

    def forward(self, ids: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return super().forward(ids.roll(1, dims=1), states)


class EagleThatRepeatsTheRoot(Eagle):
    """Its first level is right; the levels below are grown from the wrong token."""

    def draft(self, new: Committed) -> DraftTree:
        self.root = new.tokens[-1:]
        return super().draft(new)

    def score_children(self, level: LevelNodes, carried: torch.Tensor, cache: Any) -> Any:
        return super().score_children(replace(level, tokens=self.root.expand(len(level.tokens))), carried, cache)


class EagleThatSkipsThePrompt(Eagle):
    """Reads the last few pairs of a prompt only, if it is given them apart."""

    def prefill(self, new: Committed) -> None:
        super().prefill(replace(new, tokens=new.tokens[-3:], hidden=new.hidden[-3:]))


# Head -> the check that is for it, others that it fails as well, and words of the first one's answer.
BROKEN: dict[type[nn.Module], tuple[str, set[str], str]] = {
    LabelsTooEarly: ("positions", set(), "tokens drafted at depth 1 belong 1 place earlier"),
    LabelsTooLate: ("positions", {"batches"}, "tokens drafted at depth 1 belong 1 place later"),
    SecondLevelFromTheFirst: ("positions", set(), "tokens drafted at depth 2 belong 1 place earlier"),
    WorstFirst: ("positions", set(), "not (0, 1, 3): the best guess belongs at rank 0"),
    DraftsFromTheOldestState: ("positions", {"predictions"}, "at depth 1"),
    NeverLearns: ("positions", set(),
        "does draft() read what loss() trains on? the loss on a text to learn by heart ends at"),
    MispairedEagle: ("positions", {"predictions", "batches"}, "at depth 1"),
    EagleThatRepeatsTheRoot: ("positions", set(), "at depth 2"),
    EagleThatSkipsThePrompt: ("prompts", set(), "prefill() must keep what draft() would"),
    DeadLayer: ("gradients", set(), "no gradient reaches unused.bias, unused.weight"),
    Detached: ("gradients", {"positions"}, "no gradient reaches guess.1.bias, guess.1.weight"),
    LearnsTheOutputLayer: ("frozen parts", {"target", "vocabulary"}, "output_weight is the target's lm_head.weight"),
    WritesToTheTarget: ("target", set(), "of the target changed: the target is frozen"),
    AlwaysAChain: ("trees", {"positions"}, "the template's are (-1, 0, 0, 0)"),
    SameSiblings: ("trees", set(), "two children of node 0 are the same token"),
    BeyondTheVocabulary: ("trees",
        set(CHECKS)
        - {"form", "frozen parts", "gradients", "trees", "lent states", "batches", "observation", "prompts"},
        "is not one of the vocabulary's 259"),
    OtherRoot: ("trees", {"losslessness", "positions", "vocabulary"}, "it is new.tokens[-1]"),
    Silent: ("trees", {"positions", "predictions"}, "it never drafts anything"),
    NeverForgets: ("forgetting", {"lent states", "positions", "predictions"},
        "begin() must reset all that draft() keeps"),
    KeepsWhatWasLent: ("lent states", {"positions", "predictions"}, "clone what is kept of new.hidden"),
    ShortTable: ("losslessness", set(),
        "IndexError: index 492 is out of bounds for dimension 0 with size 256 (broken_heads.py, line "),
    OtherRows: ("predictions", set(), "reach beyond their dialogue"),
    ReportsWithoutGradient: ("predictions", set(), "carry no gradient"),
    RestOfEachDepth: ("gradients", set(), "and such a rest"),
    SavesHalf: ("saving", set(), "state_dict() leaves it out"),
    LayersInAList: ("form", set(), "not into a plain list"),
    Dropout: ("determinism", set(), "dropout uses the global one"),
    DraftsAtRandom: ("determinism", {"predictions"}, "draft() must not draw at random"),
    LearnsPadding: ("batches", set(), "with more padding"),
    CrossesDialogues: ("batches", {"predictions"}, "a label or state is taken from behind a dialogue's end"),
    MeanOfNothing: ("batches", set(), "the loss is nan where only token 2 of 18 is supervised"),
    OneDtypeOnly: ("half precision", set(), "RuntimeError: "),
    WritesToWhatItIsShown: ("observation", set(), "observe() changes the tree or the logits"),
    KeepsWhatItIsShown: ("observation", {"positions"}, "keep copies"),
    FeaturesAsList: ("form", set(), "features is [-1]"),
    LastStateNotLast: ("form", set(), "ends with -1"),
    NoDepth: ("form", set(), "max_depth is 0"),
    NothingToTrain: ("form", set(), "no parameter to train"),
    CannotBeMade: ("form", set(), "ValueError: not today (broken_heads.py, line "),
}  # fmt: skip
