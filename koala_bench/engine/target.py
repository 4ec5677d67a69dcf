"""The target model: any Hugging Face causal LM, through its public interface, with tree attention.

No modelling code is forked. A tree is verified in one forward pass by giving the stock model an additive 4-D mask,
explicit position ids and a ``TreeCache``. With the engine ``graph`` that pass is recorded and replayed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from koala_bench.common.bundled import PACKAGE
from koala_bench.common.hub_errors import HUB_ERRORS, first_line
from koala_bench.common.process_group import local_device
from koala_bench.common.progress import say
from koala_bench.common.provenance import Environment, driver_version, environment
from koala_bench.engine.cache import ROW_BLOCK, TreeCache, aligned_mask, attention_mask, pass_cache
from koala_bench.engine.capture import Captured
from koala_bench.engine.conformance import check_trees
from koala_bench.engine.fingerprints import checkpoint_folder, weights_sha256
from koala_bench.engine.generation import set_aside
from koala_bench.engine.limits import Limit, limit_of
from koala_bench.engine.lowering import Layouts
from koala_bench.engine.replay import Recorded
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Pass, TargetSpec
from koala_bench.tree import DraftTree, TreeShape

# How transformers and what it stands on refuse a checkpoint; but for the hub's, they depend on the family.
_UNLOADABLE: tuple[type[Exception], ...] = (
    *HUB_ERRORS, ImportError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError, SafetensorError, StrictDataclassError,
)  # fmt: skip
# Bytes of weights up to which a second thread gains a tenth at most on an idle machine, and costs several times as much
# beside any other process.
_FEW = 64 << 20
Engine = Literal["eager", "graph"]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device that exists; of several GPUs each process of a team
    gets its own.

    Raises:
        KoalaBenchError: CUDA is asked for and there is none, or the name is no device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = local_device(torch.device(name))
    except RuntimeError as error:
        raise KoalaBenchError(f"'{name}' is not a device.", "Use --device auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise KoalaBenchError(f"Decoding on '{name}' has not been tried.", "Use --device auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise KoalaBenchError(
            f"There is no CUDA device '{name}' on this machine.",
            "Use --device cpu, or install a CUDA build of torch and a driver.",
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn a name into a dtype; ``auto`` is float32 on the CPU and float16 on CUDA, as the papers use."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if name not in DTYPES:
        raise KoalaBenchError(
            f"'{name}' is not a dtype that decoding knows.", f"Use --dtype auto, {', '.join(DTYPES)}."
        )
    return DTYPES[name]


def pick_engine(name: str, device: torch.device) -> Engine:
    """Turn a name into an engine; ``auto`` is ``graph`` on the CPU and ``eager`` on CUDA, as the papers decode.

    Raises:
        KoalaBenchError: there is no such engine, or not on this device.
    """
    if name == "auto":
        return "graph" if device.type == "cpu" else "eager"
    if name not in ("eager", "graph"):
        raise KoalaBenchError(f"'{name}' is no engine.", "Use --engine auto, eager or graph.")
    return "graph" if name == "graph" else "eager"


def pick_threads(wanted: int | None, device: torch.device, weights: int) -> int | None:
    """CPU threads to decode with, None for all that torch takes: with more than one every operation waits for the
    slowest core.

    A target of some millions of parameters is decoded on one, unless another number is wanted: on two cores with one
    busy process beside it a step of 7 million parameters was measured at three times its time with two threads, and at
    its usual time with one.

    Args:
        weights: size of the target in bytes.
    """
    return wanted if wanted is not None or device.type != "cpu" or weights > _FEW else 1


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
            ``koala_bench.engine.replay``.
        fixed: whether ``graph`` gives its passes shapes that do not depend on how many tokens are settled and captures
            them, as CUDA graphs on a GPU; see ``koala_bench.engine.capture``.
        threads: CPU threads to decode with, see ``computing`` and ``pick_threads``; all that torch takes where None.
        more_stop_ids, stop_texts: what ends an answer besides the target's own ends: its chat template's, and others
            that were asked for.
        ignored: generation settings of the checkpoint that no method takes over; see ``koala_bench.engine.generation``.
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
        ``more_stop_ids``.
        """
        found: list[int] = []
        for owner in (self.model.generation_config, self.model.config, self.config, self.tokenizer):
            ids = getattr(owner, "eos_token_id", None)
            found += ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids]
        return tuple(dict.fromkeys(map(int, [*found, *self.more_stop_ids])))

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def parameters(self) -> int:
        """Number of parameters, shared ones counted once."""
        return sum(p.numel() for p in self.model.parameters())

    def spec(self) -> TargetSpec:
        """What heads may know of this target."""
        config, weight = self.config, self.model.get_output_embeddings().weight
        return TargetSpec(
            weight.shape[-1], config.vocab_size, self.layers, self.max_positions, self.embed, self.output, weight, config, self.device, self.dtype,
            self.tokenizer, self.record, self.engine == "graph" and self.fixed,
        )  # fmt: skip

    @property
    def recordings(self) -> int:
        """How many recordings were made until now, of the target's passes and of its heads'."""
        return self._layouts.recordings

    def record(
        self, function: Pass, moving: Sequence[Sequence[int]], kept: Sequence[int] = (), steady: Sequence[int] = ()
    ) -> Pass:
        """A recording of a function, if this engine replays recordings; see ``TargetSpec``."""
        if self.engine == "eager":
            return function
        recorded = Recorded(function, moving, self._layouts)
        return Captured(recorded, kept, steady, self.device, self._layouts.count) if self.fixed else recorded

    @cached_property
    def greedy_question(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """``drafted_and_likeliest`` for the logits that ``verify`` returns, captured where its passes are captured too."""
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
        logits: torch.Tensor = layer(hidden.to(layer.weight.dtype))
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

    def new_cache(self, capacity: int, step: int = 1) -> TreeCache:
        """An empty cache with room for ``capacity`` rows: settled tokens and the nodes of one tree.

        Args:
            step: the room is a multiple of this, so that one cache serves many prompts.

        Raises:
            KoalaBenchError: the model computes differently in sequences as long as that.
        """
        self.check_rows(capacity)
        if self.fixed:  # another cache is another graph: few different ones should come up
            step = max(step, ROW_BLOCK)
        return TreeCache(self.layers, -(-capacity // step) * step)

    def check_rows(self, rows: int) -> None:
        """Make sure that the model reads so many rows alike.

        Raises:
            KoalaBenchError: it does not.
        """
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
            hidden: torch.Tensor = found.last_hidden_state.unsqueeze(2)
            return hidden
        states = [found.last_hidden_state if index == -1 else found.hidden_states[index] for index in features]
        if len({state.shape[-1] for state in states}) > 1:
            raise KoalaBenchError(
                f"The last states of {self.name} are {states[-1].shape[-1]} wide, those of earlier layers"
                f" {max(state.shape[-1] for state in states)}.",
                "Take a head that reads the last states only, such as medusa or eagle.",
            )
        return torch.stack(states, dim=2)

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
        """One forward pass over all nodes of a tree, each attending to the settled tokens and its ancestors.

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
            return self._recorded(features)(
                tokens, mask, positions, cache.past, cache.first_rows(cache.past + tokens.shape[0])
            )
        if self.engine == "graph" and not self.fixed:
            return self._recorded(features)(tokens, mask, positions, cache.past, cache.storage)
        mask = mask if mask is None else aligned_mask(mask)
        hidden = self._forward(tokens[None], mask, positions, cache, features)[0]
        return self.output(hidden[:, features.index(-1)]), hidden

    def _recorded(self, features: tuple[int, ...]) -> Pass:
        """The pass of ``verify`` that reads these features, with everything that it depends on as an argument."""
        if features not in self._passes:
            if self.fixed:
                moving, kept, steady = ((0,), (0, 1), (1,), (), (3,)), (4,), (1, 2)
                self._passes[features] = self.record(partial(self._fixed_pass, features), moving, kept, steady)
            else:
                self._passes[features] = self.record(partial(self._pass, features), ((0,), (2, 3), (1,), (), (3,)))
        return self._passes[features]

    def _pass(
        self, features: tuple[int, ...], tokens: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, past: Any, storage: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """``run`` on a cache's storage alone; ``past`` as ``pass_cache`` takes it."""
        hidden = self._forward(tokens[None], mask, positions, pass_cache(storage, past, tokens.shape[0]), features)[0]
        return self.output(hidden[:, features.index(-1)]), hidden

    def _fixed_pass(
        self, features: tuple[int, ...], tokens: torch.Tensor, unseen: torch.Tensor, depths: torch.Tensor, past: torch.Tensor, storage: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """``_pass`` with shapes that do not depend on how many rows are settled, which is a tensor []."""
        rows = past + torch.arange(tokens.shape[0], device=tokens.device)
        mask = attention_mask(unseen, past, storage.shape[3], storage.dtype)[None, None]
        return self._pass(features, tokens, mask, depths + past, rows, storage)

    def _unrecorded(self, tree: DraftTree, cache: TreeCache) -> tuple[torch.Tensor, torch.Tensor]:
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


def _refuse_unsupported(name: str, config: Any) -> None:
    remedy = (
        "Use a decoder-only causal LM with ordinary attention in every layer, such as Llama, Vicuna, Qwen or Mistral."
    )
    if getattr(config, "is_encoder_decoder", False):
        raise KoalaBenchError(f"{name} is an encoder-decoder model.", remedy)
    kinds = set(getattr(config, "layer_types", None) or ())
    if other := kinds - {"full_attention", "sliding_attention"}:
        raise KoalaBenchError(
            f"{name} has layers of kind {', '.join(sorted(other))}, which keep no rows that a tree could share.", remedy
        )


def bundled_target(name: str) -> Path | None:
    """Folder of a target that ships with the project, or None."""
    # Looked for among their names: a name may be too long to ask the file system for.
    return next((path.parent for path in (PACKAGE / "targets").glob("*/config.json") if path.parent.name == name), None)


def load_target(
    name: str, device: str = "auto", dtype: str = "auto", revision: str | None = None, attention: str = "sdpa", tokenizer: bool = True,
    engine: str = "eager", threads: int | None = None,
) -> Target:  # fmt: skip
    """Load a target from the hub, a folder, or the bundled ones by name (``tiny``).

    Raises:
        KoalaBenchError: not found, no access, damaged, of an unsupported kind, or too large for the memory.
    """
    where = pick_device(device)
    picked, driven = pick_dtype(dtype, where), pick_engine(engine, where)
    source = str(bundled_target(name) or name)
    if os.sep in name and name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise KoalaBenchError(f"There is no folder {name}.", "Check --target.")
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        _refuse_unsupported(name, config.get_text_config(decoder=True))
        model, loaded = _load_model(source, revision, config, picked, attention)
        found = _load_tokenizer(source, revision) if tokenizer else None
        model = model.to(where)
    except torch.cuda.OutOfMemoryError as error:
        raise KoalaBenchError(
            f"{name} does not fit into the memory of {where}.",
            "Use a smaller target, --dtype float16, or another --device.",
        ) from error
    except _UNLOADABLE as error:
        raise KoalaBenchError(f"Cannot load the target {name}: {first_line(error)}", _remedy(error)) from error
    if missing := sorted(loaded["missing_keys"]):  # transformers would draw them at random and go on
        raise KoalaBenchError(
            f"The weights of {name} lack {missing[0]}{' and others' if len(missing) > 1 else ''}.",
            "Use a complete checkpoint.",
        )
    model.eval().requires_grad_(False)
    ignored = set_aside(model)
    context = int(getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 30)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    target = Target(
        name,
        model,
        found,
        where,
        picked,
        context,
        driven,
        where.type == "cuda",
        pick_threads(threads, where, weights),
        ignored=ignored,
    )
    _check_target(target)
    return _recordable(target)


def _load_model(
    source: str, revision: str | None, config: Any, dtype: torch.dtype, attention: str
) -> tuple[Any, dict[str, Any]]:
    """The model, and what transformers says about its weights."""
    reader: Any = AutoModelForCausalLM  # whose annotation does not know that it can return two things
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if dtype == torch.float64 and _experts(config.get_text_config(decoder=True)):
        options["experts_implementation"] = "eager"  # the grouped products of the others know no float64
    return reader.from_pretrained(source, revision=revision, output_loading_info=True, **options)


def _experts(config: Any) -> int:
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return next((int(count) for name in names if (count := getattr(config, name, None))), 0)


def _remedy(error: Exception) -> str:
    """What helps against an error of loading: mostly the hub's."""
    said = str(error)
    if isinstance(error, ImportError):
        return "Install the package that it names, or use a copy of the target that is not quantised."
    if "attention implementation" in said or "attn_implementation" in said:
        return "Use --attention eager."
    return "Check --target, log in with HF_TOKEN for gated models, or give the path of a downloaded copy."


def _load_tokenizer(source: str, revision: str | None) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision)
    except Exception as error:  # the tokenizers library knows no other kind
        raise ValueError(f"its tokenizer cannot be read: {error}") from error


def _check_target(target: Target) -> None:
    """Look once at what decoding takes for granted: all ids have embeddings, the parts make up the model, trees work.

    Raises:
        KoalaBenchError: something of that is not so.
    """
    vocabulary, limit = target.config.vocab_size, target.limit
    if target.tokenizer is not None:
        _check_ids(target.name, target.tokenizer, vocabulary)
    try:
        _check_output(target)
    except torch.cuda.OutOfMemoryError as error:
        raise KoalaBenchError(
            f"There is no memory left for a pass of {target.name}.", "Use another --device."
        ) from error
    except _UNLOADABLE as error:
        raise KoalaBenchError(f"A pass of {target.name} fails: {first_line(error)}", "Use another target.") from error
    check_trees(target, target._unrecorded, limit.rows if limit else target.max_positions)
    if limit is not None:
        say(f"koala-bench: {target.name} {limit.reason}: answers that need more rows than that are refused.")


def _recordable(target: Target) -> Target:
    """The target, with the engine ``eager`` if its passes cannot be recorded, as those of most mixtures of experts.

    The recording that shows it is the one that verifies trees later on. Graphs of fixed shapes fit none but their own,
    and are not tried here.
    """
    if target.engine == "eager" or target.fixed:
        return target
    tree, cache = DraftTree(torch.tensor([1, 2, 3], device=target.device), TreeShape((-1, 0, 0))), target.new_cache(8)
    with torch.inference_mode():
        target.prefill(tree.tokens[:2], cache)
        target.verify(tree, cache)
    recorded = target._passes[(-1,)]
    if not isinstance(recorded, Recorded) or recorded.refusal is None:
        return target
    say(f"koala-bench: {target.name} is decoded with the engine eager.")
    return replace(target, engine="eager")


def _check_ids(name: str, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Refuse tokens without an embedding, but for padding, which no prompt holds."""
    beyond = [
        (index, token)
        for token, index in tokenizer.get_vocab().items()
        if index >= vocabulary and index != tokenizer.pad_token_id
    ]
    if beyond:
        index, token = min(beyond)
        raise KoalaBenchError(
            f"The tokenizer of {name} has the token {token!r} with id {index}, the model knows only {vocabulary} ids.",
            "Use the tokenizer that belongs to the model, or resize the model's embeddings and train them.",
        )


def _check_output(target: Target) -> None:
    """Make sure that decoder and output layer together are the model: some families post-process their logits."""
    ids = torch.arange(4, device=target.device)[None] % target.config.vocab_size
    with torch.inference_mode():
        whole = target.model(input_ids=ids, use_cache=False).logits
        parts = target.output(target.states(ids)[:, :, -1])
    if whole.shape != parts.shape or not torch.allclose(whole.float(), parts.float(), atol=1e-3, rtol=1e-3):
        raise KoalaBenchError(
            f"{target.name} changes its logits in a way that is not known here.",
            "Use another target, or teach koala_bench/engine/target.py what this family does after the output layer.",
        )


def machine(device: torch.device) -> Environment:
    """The machine and its installed versions, for records of what was measured on a device of it."""
    if device.type != "cuda":
        return environment(torch.get_num_threads())
    return environment(torch.get_num_threads(), torch.cuda.get_device_name(device), driver_version())


def fingerprint(target: Target) -> dict[str, str]:
    """Hashes of configuration, weights and tokenizer; of the weights' files where they are at hand, else of the tensors."""
    config = hashlib.sha256(target.model.config.to_json_string().encode()).hexdigest()
    folder = bundled_target(target.name) or checkpoint_folder(target.name, target.model.config)
    found = {"config_sha256": config, "weights_sha256": weights_sha256(folder, target.model)}
    if target.tokenizer is not None:
        found["tokenizer_sha256"] = hashlib.sha256(
            repr(sorted(target.tokenizer.get_vocab().items())).encode()
        ).hexdigest()
    return found
