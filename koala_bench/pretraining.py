"""Train a small target model on the documentation corpus, from nothing or from an earlier target.

Matrices are trained with Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), which needs
about half the tokens of AdamW at this size, embeddings and norms with AdamW. The learning rate is constant after
a warm-up and falls linearly to zero over the last part ("warm-up, stable, decay"): a run stopped in the stable
part can therefore be resumed with another number of steps and still equals one run of that length.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from koala_bench.checkpoints import read_state
from koala_bench.corpus import Corpus
from koala_bench.decoding import VANILLA_TREE, Vanilla, decode
from koala_bench.dialogues import chat_template, encode_dialogues, encode_prompt
from koala_bench.errors import KoalaBenchError
from koala_bench.files import continue_log, make_folder, replacing, sha256_of, write_text
from koala_bench.progress import progress, say
from koala_bench.target import load_target

_CARD_PROMPTS = 40
_CARD_TOKENS = 128


@dataclass(frozen=True)
class PretrainOptions:
    """Shape of the target and how it is trained. Sizes are in tokens, layers and units."""

    layers: int = 14
    width: int = 192
    intermediate: int = 512
    attention_heads: int = 3
    vocabulary: int = 4096
    positions: int = 4096
    row_tokens: int = 256  # rows are short while the rate is stable: attention is a third of the cost at 512
    decay_row_tokens: int = 512  # and long while it falls, so that second turns lie at trained positions
    step_tokens: int = 8192
    steps: int = 2000
    warmup_steps: int = 50
    decay_fraction: float = 0.5
    matrix_rate: float = 0.02
    vector_rate: float = 3e-3
    weight_decay: float = 0.01
    seed: int = 0


def train_tokenizer(corpus: Corpus, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training dialogues, with Llama's special tokens at ids 0 to 2."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    core.train_from_iterator((text for dialogue in corpus.train for text in dialogue), trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False)


def _encode_all(tokenizer: PreTrainedTokenizerFast, dialogues: Sequence[Sequence[str]], template_name: str) -> list[np.ndarray]:
    template = chat_template(template_name, tokenizer)
    return [np.asarray(encoded.ids, dtype=np.uint16) for encoded in encode_dialogues(template, tokenizer, dialogues)]


class _Rows:
    """Dialogues laid end to end in a new order each epoch and cut into rows of equal length."""

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


def _decay_steps(options: PretrainOptions) -> int:
    return max(1, round(options.decay_fraction * options.steps))


def _rate(step: int, options: PretrainOptions) -> float:
    """Factor on the learning rates: warm-up, stable, linear decay."""
    return min(1.0, (step + 1) / options.warmup_steps, (options.steps - step) / _decay_steps(options))


def _loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def _earlier(start: Path) -> dict[str, Any]:
    """The manifest of an earlier target and a hash of its weights."""
    try:
        return {**json.loads((start / "pretraining.json").read_text(encoding="utf-8")), "weights_sha256": sha256_of(start / "model.safetensors")}
    except (OSError, ValueError) as error:
        raise KoalaBenchError(f"{start} is no target of `koala-bench pretrain`: {error}.", "Give a folder that command has written.") from error


def pretrain(
    corpus: Corpus,
    options: PretrainOptions,
    out: Path,
    device: torch.device,
    template_name: str = "vicuna_v1.1",
    checkpoint_every: int = 50,
    start: Path | None = None,
    compiled: bool = False,
) -> Path:
    """Train a Llama model and its tokenizer on the corpus; returns the folder of the finished target.

    Weights are stored in bfloat16. The folder ``out/work`` holds the log and the checkpoint from which an
    interrupted run goes on.

    Args:
        start: folder of an earlier target whose weights, shape and tokenizer this one begins with.
        compiled: train through ``torch.compile``, which needs a C++ compiler (on CUDA, Triton).

    Raises:
        KoalaBenchError: the checkpoint in ``out/work`` is of another corpus or shape, or is damaged;
            ``start`` holds no target of this command; or the loss is not finite.
    """
    earlier = _earlier(start) if start is not None else None
    if earlier is not None:
        shape = ("layers", "width", "intermediate", "attention_heads", "vocabulary", "positions")
        options = replace(options, **{name: earlier["options"][name] for name in shape})
    work = out / "work"
    make_folder(work)
    torch.manual_seed(options.seed)
    tokenizer_file = work / "tokenizer"
    if (tokenizer_file / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_file)
    elif start is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        tokenizer.save_pretrained(tokenizer_file)
    else:
        say(f"Training a tokenizer of {options.vocabulary:,} tokens ...")
        tokenizer = train_tokenizer(corpus, options.vocabulary)
        tokenizer.save_pretrained(tokenizer_file)
    say(f"Encoding {len(corpus.train):,} dialogues ...")
    dialogues = _encode_all(tokenizer, corpus.train, template_name)
    decay_start = options.steps - _decay_steps(options)
    stable_rows, decay_rows = _Rows(dialogues, options.row_tokens, options.seed), _Rows(dialogues, options.decay_row_tokens, options.seed)
    held_out = _Rows(_encode_all(tokenizer, corpus.held_out, template_name), options.decay_row_tokens, options.seed)
    held_out_ids = torch.from_numpy(held_out.batch(0, min(64, held_out.per_epoch))).to(device)

    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.width, intermediate_size=options.intermediate, num_hidden_layers=options.layers,
        num_attention_heads=options.attention_heads, num_key_value_heads=options.attention_heads, max_position_embeddings=options.positions,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    model: LlamaForCausalLM = LlamaForCausalLM(config) if start is None else LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    model.to(device)  # type: ignore[arg-type]
    step_loss = torch.compile(_loss, dynamic=False) if compiled else _loss
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=options.matrix_rate, weight_decay=options.weight_decay),
        torch.optim.AdamW(others, lr=options.vector_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = [options.matrix_rate, options.vector_rate]

    # The number of steps may change between runs (see the module's first lines); nothing else may.
    identity = {
        "corpus": corpus.sha256,
        "start": earlier and earlier["weights_sha256"],
        **{key: value for key, value in asdict(options).items() if key not in ("steps", "decay_fraction")},
    }
    checkpoint, first = work / "checkpoint.pt", 0
    if checkpoint.exists():
        state = read_state(checkpoint, device)
        if state["identity"] != identity:
            raise KoalaBenchError(
                f"The checkpoint in {work} was made from another corpus or with other options.", "Choose another --out, or delete the folder to start again."
            )
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        first = state["step"]
        planned = state.get("steps", options.steps)
        # Once the rate falls, or should have begun to, the run is bound to its length.
        if planned != options.steps and first > min(decay_start, planned - _decay_steps(replace(options, steps=planned))):
            raise KoalaBenchError(
                f"The checkpoint in {work} is at step {first:,} of {planned:,}, too late to make a run of {options.steps:,} steps of it.",
                f"Use --steps {planned}, or choose another --out.",
            )
        say(f"Resuming after step {first:,}.")

    def evaluate() -> float:
        model.eval()
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            losses = [_loss(model, part).item() for part in held_out_ids.split(8)]
        model.train()
        return sum(losses) / len(losses)

    def save(step: int) -> None:
        with replacing(checkpoint) as temporary:
            torch.save(
                {"identity": identity, "step": step, "steps": options.steps, "model": model.state_dict(), "optimisers": [o.state_dict() for o in optimisers]},
                temporary,
            )

    started = time.perf_counter()
    with (
        continue_log(work / "log.jsonl", first) as log,
        progress("pretrain", options.steps * options.step_tokens, "tokens", first * options.step_tokens) as advance,
    ):
        for step in range(first, options.steps):
            rows = stable_rows if step < decay_start else decay_rows
            count = options.step_tokens // rows.row_tokens
            ids = torch.from_numpy(rows.batch(step * count, count)).to(device)
            factor = _rate(step, options)
            for optimiser, base in zip(optimisers, base_rates, strict=True):
                for group in optimiser.param_groups:
                    group["lr"] = base * factor
            with torch.autocast(device.type, torch.bfloat16):
                loss = step_loss(model, ids)
            value = loss.item()
            if not np.isfinite(value):
                raise KoalaBenchError(f"The loss is {value} at step {step}.", "Start again in another --out with another --seed; the last checkpoint is kept.")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            line = {
                "step": step + 1,
                "tokens": (step + 1) * options.step_tokens,
                "loss": round(value, 4),
                "rate": round(factor, 4),
                "elapsed_s": round(time.perf_counter() - started, 1),
            }
            last = step + 1 == options.steps
            if (step + 1) % 200 == 0 or last:
                line["held_out_loss"] = round(evaluate(), 4)
            log.write(json.dumps(line) + "\n")
            log.flush()
            if (step + 1) % checkpoint_every == 0 or last:
                save(step + 1)
            advance(options.step_tokens, f"loss {value:.3f}")
        final = evaluate()

    model.to(torch.bfloat16).save_pretrained(out)  # type: ignore[arg-type]
    tokenizer.save_pretrained(out)
    manifest = {
        "options": asdict(options), "chat_template": template_name, "corpus_sha256": corpus.sha256, "corpus_versions": corpus.versions,
        "tokens_seen": options.steps * options.step_tokens, "corpus_tokens": stable_rows.per_epoch * options.row_tokens, "held_out_loss": round(final, 4),
        "parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__, "started_from": earlier,
    }  # fmt: skip
    manifest["repeated_8grams"] = round(repeated_ngrams(_answers(out, corpus, template_name)), 4)
    write_text(out / "pretraining.json", json.dumps(manifest, indent=2) + "\n")
    write_text(out / "README.md", _card(manifest))
    return out


def repeated_ngrams(answers: Sequence[Sequence[int]], n: int = 8) -> float:
    """Share of the n-grams of the answers that stood in the same answer before: 0 for fresh text, towards 1 for loops."""
    total = repeated = 0
    for answer in answers:
        grams = [tuple(answer[i : i + n]) for i in range(len(answer) - n + 1)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else 0.0


def _answers(folder: Path, corpus: Corpus, template_name: str) -> list[list[int]]:
    """Greedy answers of the finished target to the first questions of held-out dialogues."""
    target = load_target(str(folder), "cpu", "float32")
    assert target.tokenizer is not None
    template = chat_template(template_name, target.tokenizer)
    prompts = [encode_prompt(template, target.tokenizer, turns[:1]) for turns in corpus.held_out[:_CARD_PROMPTS]]
    return [decode(target, Vanilla(), VANILLA_TREE, prompt, _CARD_TOKENS, target.stop_ids).tokens for prompt in prompts]


def _card(manifest: dict[str, Any]) -> str:
    options = manifest["options"]
    earlier, before = manifest["started_from"], ""
    if earlier is not None:
        before = (
            f"| began with | a target of the command `koala-bench pretrain --steps {earlier['options']['steps']} --seed {earlier['options']['seed']}`: "
            f"{earlier['tokens_seen']:,} tokens of corpus `{earlier['corpus_sha256'][:12]}`, weights `{earlier['weights_sha256'][:12]}` |\n"
        )
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest["corpus_versions"].items()))
    return f"""---
license: apache-2.0
library_name: transformers
---

# A small target model for koala-bench

A Llama of {options["layers"]} layers and width {options["width"]}, {manifest["parameters"] / 1e6:.2f} M parameters, that answers questions about Python
libraries in the style of their documentation. It exists so that draft heads can be trained and measured on a CPU without a
model hub: deep and thin, so that a forward pass costs many times a one-layer draft step. What it says is not reliable.

| | |
|---|---|
| command | `koala-bench pretrain --steps {options["steps"]} --seed {options["seed"]}{"" if earlier is None else " --start EARLIER"}` |
{before}| tokens seen{"" if earlier is None else " by this command"} | {manifest["tokens_seen"]:,} (corpus: {manifest["corpus_tokens"]:,}) |
| held-out loss | {manifest["held_out_loss"]} nats per token, entries never trained on |
| repeated 8-grams | {manifest["repeated_8grams"]:.1%} of those in {_CARD_PROMPTS} greedy answers of at most {_CARD_TOKENS} tokens to held-out questions |
| corpus sha256 | `{manifest["corpus_sha256"]}` |
| optimiser | Muon for matrices, AdamW for the rest, in bfloat16 autocast; torch {manifest["torch"]} |
| chat template | `{manifest["chat_template"]}` of fschat |
| weights | bfloat16, safetensors |

The corpus is the docstrings and sources of installed packages, read at run time and not part of this folder: {versions}.
Each package has its own licence; the weights hold no text of theirs beyond what such a small model remembers.

Held out are whole entries, chosen by a hash of their names. Entries of one library share text, so "held out" means that a
name was never seen, not that every sentence of its answer is new.
"""
