"""The target model: any Hugging Face causal LM, through its public interface, with tree attention.

No modelling code is forked. A tree is verified in one forward pass by giving the stock model an additive 4-D mask,
explicit position ids and a ``TreeCache``. With the engine ``graph`` that pass is recorded and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from koala_bench.common.draft_vocabulary import DraftVocabulary
from koala_bench.engine.cache import ROW_BLOCK, TreeCache, aligned_mask, attention_mask, pass_cache
from koala_bench.engine.devices import Engine
from koala_bench.engine.graphs.capture import Captured
from koala_bench.engine.graphs.lowering import Layouts
from koala_bench.engine.graphs.replay import Recorded
from koala_bench.engine.limits import Limit, limit_of
from koala_bench.engine.processor import kernels
from koala_bench.engine.processor.compiling import compiler_version
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Pass, TargetSpec
from koala_bench.tree import DraftTree


def drafted_and_likeliest(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """What greedy verification reads from the device: drafted tokens [nodes] and the target's likeliest ones, int64 [2,
    nodes].

    Args:
        tokens: int64 [nodes].
        logits: [nodes, vocab_size].
    """
    return torch.stack([tokens, logits.argmax(dim=-1)])


@dataclass(frozen=True)
class Target:
    """A frozen causal LM, ready to verify trees.

    Attributes:
        name: hub id or path, as asked for.
        model: the stock model in evaluation mode.
        tokenizer: its tokenizer; absent for bare weights, as in numerical fixtures.
        engine: how a tree is verified: ``eager`` calls the model, ``graph`` replays a recording of that, see
            ``koala_bench.engine.graphs.replay``.
        fixed: whether ``graph`` gives its passes shapes that do not depend on how many tokens are committed and
            captures them, as CUDA graphs on a GPU; see ``koala_bench.engine.graphs.capture``.
        threads: CPU threads to decode with, see ``computing`` and ``pick_threads``; all that torch takes where None.
        more_stop_ids, stop_texts: what ends an answer besides the target's own ends: its chat template's, and others
            that were asked for.
        ignored: generation settings of the checkpoint that no method applies, see
            ``koala_bench.engine.loading.generation``.
    """

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase | None
    device: torch.device
    dtype: torch.dtype
    max_positions: int
    engine: Engine = "eager"
    fixed: bool = False
    threads: int | None = None
    more_stop_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()
    ignored: dict[str, Any] = field(default_factory=dict)
    _layouts: Layouts = field(default_factory=Layouts, init=False, repr=False, compare=False)
    _passes: dict[tuple[int, ...], Pass] = field(default_factory=dict, init=False, repr=False, compare=False)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute with ``threads`` CPU threads while this lasts: whatever is measured of decoding belongs inside."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @property
    def config(self) -> Any:
        """Configuration of the language model, which is a part of a multimodal model's."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def decoder(self) -> Any:
        """The model without its output layer."""
        return self.model.get_decoder() if hasattr(self.model, "get_decoder") else self.model.base_model

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: all that the generation configuration, the model's or the tokenizer names, and
        ``more_stop_ids``; but for ids that the model does not know."""
        found: list[int] = []
        for owner in (self.model.generation_config, self.model.config, self.config, self.tokenizer):
            ids = getattr(owner, "eos_token_id", None)
            found += ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids]
        every = dict.fromkeys(map(int, [*found, *self.more_stop_ids]))
        return tuple(each for each in every if each < self.config.vocab_size)

    @property
    def compiler(self) -> str | None:
        """What compiled the kernels of its recorded passes on the CPU; None if they run without."""
        by_kernels = self.engine == "graph" and self.device.type == "cpu" and self.dtype == torch.float32
        return compiler_version() if by_kernels and kernels.available() else None

    @property
    def weights_dtype(self) -> torch.dtype:
        """``bfloat16`` or ``float16`` where that has all numbers of its output layer, whatever it computes in; else
        ``float32``."""
        weight = self.model.get_output_embeddings().weight
        halves = (torch.bfloat16, torch.float16)
        return next((each for each in halves if torch.equal(weight.to(each).to(weight.dtype), weight)), torch.float32)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def parameters(self) -> int:
        """Number of parameters, shared ones counted once."""
        return sum(p.numel() for p in self.model.parameters())

    def spec(self, drafted: torch.Tensor | None = None) -> TargetSpec:
        """What heads may know of this target.

        Args:
            drafted: ids of the tokens that a head is to draft, int64 [drafted]; all if None. Their rows of the output
                layer are copied.
        """
        config, layer = self.config, self.model.get_output_embeddings()
        whole = TargetSpec(
            layer.weight.shape[-1], config.vocab_size, self.layers, self.max_positions, self.embed, self.output,
            layer.weight, config, self.device, self.dtype,
            self.tokenizer, self.record, self.engine == "graph" and self.fixed, cut=self.spec,
        )  # fmt: skip
        if drafted is None:
            return whole
        vocabulary = DraftVocabulary(drafted.to(self.device, torch.int64), config.vocab_size)
        weight = layer.weight.detach()[vocabulary.ids]
        bias = None if getattr(layer, "bias", None) is None else layer.bias.detach()[vocabulary.ids]

        def scores(hidden: torch.Tensor) -> torch.Tensor:
            return self._finished(F.linear(hidden.to(weight.dtype), weight, bias))

        def output(hidden: torch.Tensor) -> torch.Tensor:
            return vocabulary.spread(scores(hidden))

        return replace(whole, output=output, output_weight=weight, draft_vocabulary=vocabulary, scores=scores)

    @property
    def recordings(self) -> int:
        """How many recordings were made until now, of the target's passes and of its heads'."""
        return self._layouts.recordings

    def record(
        self,
        function: Pass,
        dynamic_dims: Sequence[Sequence[int]],
        static: Sequence[int] = (),
        constant: Sequence[int] = (),
    ) -> Pass:
        """A recording of a function, if this engine replays recordings; see ``TargetSpec``."""
        if self.engine == "eager":
            return function
        recorded = Recorded(function, dynamic_dims, self._layouts)
        return Captured(recorded, static, constant, self.device, self._layouts.count) if self.fixed else recorded

    @cached_property
    def greedy_read(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """What greedy verification reads: ``drafted_and_likeliest``, captured if the passes of ``verify`` are."""
        if self.engine == "eager" or not self.fixed:
            return drafted_and_likeliest
        return self.record(drafted_and_likeliest, ((0,), (0,)), (1,))  # a captured pass writes its logits to one place

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [..., hidden_size] of ids [...]."""
        embeddings: torch.Tensor = self.model.get_input_embeddings()(ids)
        return embeddings

    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocab_size] of final states [..., hidden_size], scaled and capped as the model does it.

        States may have another dtype than the target: heads are trained in float32, whatever the target computes in.
        """
        layer = self.model.get_output_embeddings()
        return self._finished(layer(hidden.to(layer.weight.dtype)))

    def _finished(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits scaled and capped."""
        config = self.config
        if scale := getattr(config, "logit_scale", None):
            logits = logits * scale
        if scale := getattr(config, "logits_scaling", None):
            logits = logits / scale
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    @cached_property
    def limit(self) -> Limit | None:
        """Up to how many rows the model computes as trees need it, if that is less than its context."""
        found = limit_of(self.config)
        return None if found is None or found.rows >= self.max_positions else found

    @property
    def longest(self) -> int:
        """Rows of the longest sequence to decode: the context, or as far as the model supports tree attention."""
        return self.max_positions if self.limit is None else self.limit.rows

    def new_cache(self, capacity: int, step: int = 1, longest: int | None = None) -> TreeCache:
        """An empty cache with room for ``capacity`` rows: committed tokens and the nodes of one tree.

        Args:
            step: the room is a multiple of this, so that one cache serves many prompts.
            longest: rows of the longest sequence in it where that is less: several share it, or it is not filled.

        Raises:
            KoalaBenchError: the model computes differently in sequences as long as that.
        """
        self.check_rows(capacity if longest is None else longest)
        if self.fixed:  # another cache is another graph: few different ones should come up
            step = max(step, ROW_BLOCK)
        return TreeCache(self.layers, -(-capacity // step) * step)

    def check_rows(self, rows: int) -> None:
        """Make sure that the model reads so many rows alike; raises KoalaBenchError where it does not."""
        if self.limit is not None and rows > self.limit.rows:
            raise KoalaBenchError(
                f"{self.name} {self.limit.reason}, {rows} are needed.", "Lower --max-new-tokens or use shorter prompts."
            )

    def _forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor,
        cache: Cache | None,
        features: tuple[int, ...],
    ) -> torch.Tensor:
        every = features != (-1,)
        found = self.decoder(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=every,
        )
        if not every:
            return self._gathered(found.last_hidden_state).unsqueeze(2)
        read = [found.last_hidden_state if index == -1 else found.hidden_states[index] for index in features]
        states = [self._gathered(state) for state in read]
        if len({state.shape[-1] for state in states}) > 1:
            raise KoalaBenchError(
                f"The last states of {self.name} are {states[-1].shape[-1]} wide, those of earlier layers"
                f" {max(state.shape[-1] for state in states)}.",
                "Take a head that reads the last states only, such as medusa or eagle.",
            )
        return torch.stack(states, dim=2)

    def _gathered(self, state: torch.Tensor) -> torch.Tensor:
        """A state of one of the layers, on the target's device."""
        return state

    @torch.inference_mode()
    def prefill(
        self, ids: torch.Tensor, cache: TreeCache, features: tuple[int, ...] = (-1,)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read a prompt into an empty cache.

        Args:
            ids: prompt, int64 [tokens].
        Returns:
            logits after the last token [vocab_size], and the states [tokens, features, hidden_size].
        """
        cache.begin()
        positions = torch.arange(len(ids), device=self.device)[None]
        hidden = self._forward(ids[None], None, positions, cache, features)[0]
        cache.past = len(ids)
        return (
            self.output(hidden[-1, -1]) if features[-1] == -1 else self.output(hidden[-1, features.index(-1)])
        ), hidden

    @torch.inference_mode()
    def verify(
        self, tree: DraftTree, cache: TreeCache, features: tuple[int, ...] = (-1,)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward pass over all nodes of a tree, each attending to the committed tokens and its ancestors.

        Returns:
            logits [nodes, vocab_size] and states [nodes, features, hidden_size].
        """
        if self.engine == "graph" and self.fixed:
            return self.run(tree.tokens, *cache.tree_mask(tree.shape, self.device), cache, features)
        mask, depths = cache.tree_buffers(tree.shape, self.dtype, self.device)
        # A root alone sees everything before it: without a mask the attention kernel takes its fast path.
        return self.run(tree.tokens, mask if tree.shape.nodes > 1 else None, depths + cache.past, cache, features)

    def run(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor,
        cache: TreeCache,
        features: tuple[int, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's own part of ``verify``: decoder and output layer.

        Args:
            mask, positions: as ``TreeCache.tree_buffers`` makes the mask, None for a root alone; or both as
                ``TreeCache.tree_mask`` does, for a pass of fixed shape.
        """
        if self.fixed and mask is not None and mask.dtype == torch.bool:
            return self.pass_of(features)(
                tokens, mask, positions, cache.past, cache.first_rows(cache.past + tokens.shape[0])
            )
        if self.engine == "graph" and not self.fixed:
            return self.pass_of(features)(tokens, mask, positions, cache.past, cache.storage)
        mask = mask if mask is None else aligned_mask(mask)
        hidden = self._forward(tokens[None], mask, positions, cache, features)[0]
        return self.output(hidden[:, features.index(-1)]), hidden

    def pass_of(self, features: tuple[int, ...]) -> Pass:
        """The pass of ``verify`` that reads these features, with everything that it depends on as an argument."""
        if features not in self._passes:
            if self.fixed:
                dynamic_dims, static, constant = ((0,), (0, 1), (1,), (), (3,)), (4,), (1, 2)
                self._passes[features] = self.record(
                    partial(self._fixed_pass, features), dynamic_dims, static, constant
                )
            else:
                self._passes[features] = self.record(partial(self._pass, features), ((0,), (2, 3), (1,), (), (3,)))
        return self._passes[features]

    def _pass(
        self, features: tuple[int, ...], tokens: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor,
        past: Any, storage: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """``run`` on a cache's storage alone; ``past`` as ``pass_cache`` takes it."""
        hidden = self._forward(tokens[None], mask, positions, pass_cache(storage, past, tokens.shape[0]), features)[0]
        return self.output(hidden[:, features.index(-1)]), hidden

    def _fixed_pass(
        self, features: tuple[int, ...], tokens: torch.Tensor, hidden: torch.Tensor, depths: torch.Tensor,
        past: torch.Tensor, storage: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """``_pass`` with shapes that do not depend on how many rows are committed, which is a tensor []."""
        rows = past + torch.arange(tokens.shape[0], device=tokens.device)
        mask = attention_mask(hidden, past, storage.shape[3], storage.dtype)[None, None]
        return self._pass(features, tokens, mask, depths + past, rows, storage)

    def unrecorded(self, tree: DraftTree, cache: TreeCache) -> tuple[torch.Tensor, torch.Tensor]:
        """``verify`` as this engine makes it, before it is recorded or captured."""
        if self.engine == "eager" or not self.fixed:
            return replace(self, engine="eager").verify(tree, cache)
        hidden, depths = cache.tree_mask(tree.shape, self.device)
        past, rows = torch.tensor(cache.past, device=self.device), cache.first_rows(cache.past + tree.shape.nodes)
        return self._fixed_pass((-1,), tree.tokens, hidden, depths, past, rows)

    @torch.inference_mode()
    def states(self, ids: torch.Tensor, features: tuple[int, ...] = (-1,)) -> torch.Tensor:
        """States [batch, tokens, features, hidden_size] of whole sequences, int64 [batch, tokens] padded on the right.

        Padding on the right needs no mask under causal attention: no real token can see it.
        """
        positions = torch.arange(ids.shape[1], device=self.device).expand(ids.shape[0], -1)
        return self._forward(ids, None, positions, None, features)
