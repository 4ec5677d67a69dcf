"""Speculative decoding with a small draft model (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv
2302.01318).

Any causal LM that shares the target's tokenizer guesses what the target says; Spec-Bench calls the method SpS. Nothing
of it is trained here: the model is loaded as it is, and reads only the committed tokens. Published implementations
draft chains; ours grows whatever tree it is asked for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedTokenizerBase

from heads.common.drafting import CachedHead, DraftState, KVCache, Scored
from heads.common.growth import MAX_DEPTH, LevelNodes
from koala_bench.engine.cache import pass_cache
from koala_bench.engine.devices import DTYPES
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Committed, TargetSpec
from koala_bench.tree import ROOT_ONLY, DraftTree, Template

_REMEDY = (
    "Give the option 'model': a causal LM with the target's own tokenizer, such as a smaller one of its family (bundled"
    " name, hub id or folder)."
)


class DraftModel(CachedHead):
    """Drafts with another causal LM, on the target's device and in its dtype.

    A step costs as many passes of the draft model as the tree is deep, whatever its width: one reads the new committed
    tokens (the accepted ones once more, in the same pass as the new root) and scores the first level, then each level
    but the last is one pass over those of its nodes that have children. ``chain-4`` is 4 passes, ``4x2x1`` is 3,
    ``dynamic-5x8x25`` is 6. The prompt is one more pass before the first of them.

    The draft model's output layer may be padded to another length than the target's: ids that only one of the two has
    are never proposed. Where its context ends before the target's, nothing is drafted any more.

    Args:
        model: bundled name, hub id or folder of the draft model.
        revision: of a model on the hub.

    Raises:
        KoalaBenchError: the model cannot be loaded, or has other tokens than the target.
    """

    features = (-1,)
    max_depth = MAX_DEPTH
    usual_tree = "chain-4"
    model_option = "model"

    def __init__(self, spec: TargetSpec, model: str = "tiny-draft", revision: str | None = None) -> None:
        super().__init__(spec)
        # Target is no module: neither state_dict() nor parameters() finds what it holds.
        self._model = _load(spec, model, revision)
        self._vocab_size, self._own = spec.vocab_size, int(self._model.config.vocab_size)
        self._known = min(self._vocab_size, self._own)
        self._places = torch.empty(1, 0)

    @property
    def drafting_parameters(self) -> int:
        """Parameters of the draft model, none of which is trained here."""
        return self._model.parameters

    def assisted(self, depth: int) -> dict[str, Any]:
        """Arguments of transformers' ``generate`` for chains of the same draft model, ``depth`` tokens long."""
        self._model.model.generation_config = GenerationConfig(
            num_assistant_tokens=depth,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
            pad_token_id=0,
        )
        return {"assistant_model": self._model.model}

    def begin(self, template: Template, capacity: int) -> None:
        """Forget the sequence; rows are kept while they fit."""
        template.check(depth=self.max_depth, candidates=self._known)
        like = self._model.model.get_input_embeddings().weight
        self._state = self._drafter.begin(self._state, template, capacity + 1, like, self._empty)
        self._state.cache = replace(self._state.cache, table=self._places)

    def _empty(self, rows: int) -> KVCache:
        """An empty cache for the draft model, with a table of plain positions [1, rows + deepest draft]."""
        cache = self._model.new_cache(rows, longest=min(rows, self._model.longest))
        self._model.prefill(torch.zeros(1, dtype=torch.int64, device=self._model.device), cache)  # which makes the rows
        self._places = torch.arange(rows + MAX_DEPTH, device=self._model.device)[None]
        return KVCache(cache.storage.unsqueeze(2), self._places, 0)

    def prefill(self, new: Committed) -> None:
        """Read a prompt, if the draft model has room for it and a draft, see ``Target.longest``."""
        assert self._state is not None, "begin() comes before prefill()"
        if self._has_room(self._state, new):
            super().prefill(self._given(self._state, new))

    def draft(self, new: Committed) -> DraftTree:
        """Read the committed tokens and grow the tree; the root alone once the draft model has no room left."""
        state = self._state
        assert state is not None, "begin() comes before draft()"
        if not self._has_room(state, new):
            return DraftTree(new.tokens[-1:], ROOT_ONLY)
        return super().draft(self._given(state, new))

    def _has_room(self, state: DraftState, new: Committed) -> bool:
        last = new.position + len(new.tokens)  # place of the last token in the sequence
        return last + state.levels.template.depth <= self._model.longest

    def _given(self, state: DraftState, new: Committed) -> Committed:
        """The tokens to read; the target's states are not read."""
        tokens = new.tokens
        if not state.cache.past:
            if new.first is not None:
                tokens = torch.cat([new.first, tokens])
            else:  # row 0 is that of the second token
                state.cache = replace(state.cache, table=state.cache.table[:, 1:])
        return Committed(tokens, tokens, new.position)

    def extend_cache(self, new: Committed, cache: KVCache) -> torch.Tensor:
        """Write the rows of the new tokens; their last states [new, width]."""
        count = new.tokens.shape[0]
        return self._states(
            new.tokens, cache.causal_mask(count), cache.positions(0, count), cache.rows(0, count), cache
        )

    def read(self, new: Committed, cache: KVCache) -> Scored:
        """Commit the new tokens; logits [1, vocab_size] of what follows the last of them."""
        states = self.extend_cache(new, cache)[-1:]
        return self._logits(states), states

    def score_children(self, level: LevelNodes, carried: torch.Tensor, cache: KVCache) -> Scored:
        """Logits [nodes, vocab_size] after each node of a level; the next step overwrites their cache rows."""
        count = level.tokens.shape[0]
        places, rows = cache.positions(level.depth - 1, 1).expand(1, count), cache.rows(level.offset, count)
        states = self._states(level.tokens, cache.tree_mask(level.tree_mask), places, rows, cache)
        return self._logits(states), states

    # ------------------------------------------------------------------------------ the model

    def _states(
        self, tokens: torch.Tensor, mask: torch.Tensor | None, places: torch.Tensor, start: Any, cache: KVCache
    ) -> torch.Tensor:
        """Last states [tokens, width] of tokens at positions ``places`` [1, tokens]."""
        if self._own < self._vocab_size:
            # Ids beyond the draft model's are padding of the target's output layer, which it never predicts.
            tokens = tokens.clamp(max=self._own - 1)
        model_cache = pass_cache(cache.buffers.squeeze(2), start, tokens.shape[0])
        wide = None if mask is None else mask[None, None]
        given = {"attention_mask": wide, "position_ids": places, "past_key_values": model_cache, "use_cache": True}
        states: torch.Tensor = self._model.decoder(input_ids=tokens[None], **given).last_hidden_state[0]
        return states

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits over the target's ids; those that the draft model lacks are impossible, and its own surplus is cut
        off.
        """
        logits = self._model.output(states)[:, : self._known]
        missing = self._vocab_size - self._known
        return F.pad(logits, (0, missing), value=-torch.inf) if missing else logits


def _load(spec: TargetSpec, name: str, revision: str | None) -> Target:
    dtype = next(each for each, dtype in DTYPES.items() if dtype == spec.dtype)
    try:
        model = load_target(name, str(spec.device), dtype, revision, tokenizer=spec.tokenizer is not None)
    except KoalaBenchError as error:
        raise KoalaBenchError(f"No draft model: {error.message}", _REMEDY) from error
    if spec.tokenizer is not None and model.tokenizer is not None:
        if problem := _difference(spec.tokenizer, model.tokenizer):
            raise KoalaBenchError(f"The draft model {name} has another tokenizer than the target: {problem}.", _REMEDY)
    elif model.config.vocab_size != spec.vocab_size:
        raise KoalaBenchError(
            f"The draft model {name} has {model.config.vocab_size} tokens, the target {spec.vocab_size}.", _REMEDY
        )
    return model


def _difference(theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase) -> str | None:
    """How two tokenizers differ in what an id means, or None. Either may have added tokens that the other lacks, such
    as one for padding.

    Only ids are exchanged, so how text becomes ids is the target's business alone.
    """
    target, draft = theirs.get_vocab(), ours.get_vocab()
    if target == draft:
        return None
    for token in target.keys() & draft.keys():
        if target[token] != draft[token]:
            return f"{token!r} is {draft[token]} there and {target[token]} in the target"
    tokens_of = {index: token for token, index in target.items()}
    for token, index in draft.items():
        if token not in target and index in tokens_of:
            return f"{index} is {token!r} there and {tokens_of[index]!r} in the target"
    only_target = len(target.keys() - draft.keys() - theirs.get_added_vocab().keys())
    only_draft = len(draft.keys() - target.keys() - ours.get_added_vocab().keys())
    if only_target or only_draft:
        return f"it lacks {only_target} of the target's tokens and has {only_draft} others"
    return None
