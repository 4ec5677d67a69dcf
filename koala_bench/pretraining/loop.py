"""Train a small target model on a corpus of dialogues, from nothing or from an earlier target, or a draft model for
one.

Matrices are trained with Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), which needs
about half the tokens of AdamW at this size, embeddings and norms with AdamW. The learning rate is constant after
a warm-up and falls linearly to zero over the last part ("warm-up, stable, decay"): a run stopped in the stable
part can therefore be resumed with another number of steps and still equals one run of that length.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from koala_bench.common.files import continue_log, make_folder, sha256_of, write_text
from koala_bench.common.progress import progress, say
from koala_bench.decoding.answering import greedy_answers
from koala_bench.dialogues.encoding import ChatTemplate, chat_template, encode_dialogues
from koala_bench.errors import KoalaBenchError
from koala_bench.pretraining.card import held_out_answers, model_card, repeated_ngrams
from koala_bench.pretraining.corpus import Corpus
from koala_bench.pretraining.imitation import Imitated
from koala_bench.pretraining.options import SHAPE, PretrainOptions
from koala_bench.pretraining.unlikelihood import draw_prompts, likelihood_loss, unlikelihood_loss
from koala_bench.training.checkpoints import read_state, write_state

# Where unlikelihood is on: how often the target answers, how many prompts at once, how long, and which n-grams it must
# not repeat.
_ANSWER_EVERY = 2
_ANSWER_ROWS = 32
_ANSWER_TOKENS = 128
_ANSWER_PROMPT_TOKENS = 192
_ANSWER_NGRAM = 6


def train_tokenizer(corpus: Corpus, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training dialogues, with Llama's special tokens at ids 0 to 2."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((text for dialogue in corpus.train for text in dialogue), trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def _encode_all(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerFast, dialogues: Sequence[Sequence[str]]
) -> list[np.ndarray]:
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


def _batch(step: int, text: _Rows, answers: _Rows | None, step_tokens: int) -> np.ndarray:
    """Ids [rows, row_tokens] of a step, half of the rows from the answers where there are any."""
    count = step_tokens // text.row_tokens
    half = 0 if answers is None else count // 2
    rows = text.batch(step * (count - half), count - half)
    return rows if answers is None else np.concatenate([answers.batch(step * half, half), rows])


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
        manifest = json.loads((start / "pretraining.json").read_text(encoding="utf-8"))
        return {
            **manifest,
            "options": {**asdict(PretrainOptions()), **manifest["options"]},
            "weights_sha256": sha256_of(start / "model.safetensors"),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KoalaBenchError(
            f"{start} is no target of `koala-bench pretrain`: {error}.", "Give a folder that command has written."
        ) from error


def pretrain(
    corpus: Corpus,
    options: PretrainOptions,
    out: Path,
    device: torch.device,
    template_name: str = "vicuna_v1.1",
    checkpoint_every: int = 50,
    start: Path | None = None,
    compiled: bool = False,
    imitate: Imitated | None = None,
) -> Path:
    """Train a Llama model and its tokenizer on the corpus; returns the folder of the finished target.

    Weights are stored in bfloat16. The folder ``out/work`` holds the log and the checkpoint from which an
    interrupted run goes on.

    Args:
        checkpoint_every: steps between two checkpoints.
        start: folder of an earlier target whose weights, shape and tokenizer this one begins with.
        compiled: train through ``torch.compile``, which needs a C++ compiler (on CUDA, Triton).
        imitate: a target to make a draft model for: it brings tokenizer, vocabulary and labels, and while the rate
            falls half of the text is its answers, if it comes with some.

    Raises:
        KoalaBenchError: the checkpoint in ``out/work`` is of another corpus or shape, or is damaged;
            ``start`` holds no target of this command; the loss is not finite; or the answers do not fill a row.
    """
    if imitate is not None:
        known = imitate.target.model.config
        options = replace(options, vocabulary=known.vocab_size, positions=known.max_position_embeddings)
    earlier = _earlier(start) if start is not None else None
    if earlier is not None:
        options = replace(options, **{name: earlier["options"][name] for name in SHAPE})
    work = out / "work"
    make_folder(work)
    torch.manual_seed(options.seed)
    tokenizer_file = work / "tokenizer"
    if (tokenizer_file / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_file)
    elif start is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        tokenizer.save_pretrained(tokenizer_file)
    elif imitate is not None:
        imitate.save_tokenizer(tokenizer_file)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_file)
    else:
        say(f"Training a tokenizer of {options.vocabulary:,} tokens ...")
        tokenizer = train_tokenizer(corpus, options.vocabulary)
        tokenizer.save_pretrained(tokenizer_file)
    if imitate is not None:
        imitate.check_tokenizer(tokenizer)
    say(f"Encoding {len(corpus.train):,} dialogues ...")
    template = chat_template(template_name, tokenizer)
    dialogues = _encode_all(template, tokenizer, corpus.train)
    decay_start = options.steps - _decay_steps(options)
    stable_rows, decay_rows = (
        _Rows(dialogues, options.row_tokens, options.seed),
        _Rows(dialogues, options.decay_row_tokens, options.seed),
    )
    held_out = _Rows(_encode_all(template, tokenizer, corpus.held_out), options.decay_row_tokens, options.seed)
    held_out_ids = torch.from_numpy(held_out.batch(0, min(64, held_out.per_epoch))).to(device)
    answer_rows: _Rows | None = None
    judged_ids = held_out_ids  # where a draft model's guesses are compared with the target's
    if imitate is not None and imitate.answers is not None:
        answer_rows = _Rows(
            _encode_all(template, tokenizer, imitate.answers.train), options.decay_row_tokens, options.seed
        )
        apart = _Rows(
            _encode_all(template, tokenizer, imitate.answers.held_out), options.decay_row_tokens, options.seed
        )
        if not answer_rows.per_epoch or not apart.per_epoch:
            raise KoalaBenchError(
                f"The answers do not fill a row of {options.decay_row_tokens} tokens.",
                "Give --answers a file with more of them.",
            )
        judged_ids = torch.from_numpy(apart.batch(0, min(64, apart.per_epoch))).to(device)

    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.width, intermediate_size=options.intermediate, num_hidden_layers=options.layers,
        num_attention_heads=options.attention_heads, num_key_value_heads=options.attention_heads, max_position_embeddings=options.positions,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    model: LlamaForCausalLM = (
        LlamaForCausalLM(config) if start is None else LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    )
    model.to(device)  # type: ignore[arg-type]
    loss_of = _loss if imitate is None else imitate.loss
    step_loss = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=options.matrix_rate, weight_decay=options.weight_decay),
        torch.optim.AdamW(others, lr=options.vector_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = [options.rate * options.matrix_rate, options.rate * options.vector_rate]

    # The number of steps may change between runs (see the module's first lines); nothing else may.
    identity = {
        "corpus": corpus.sha256,
        "start": earlier and earlier["weights_sha256"],
        **({} if imitate is None else {"imitates": imitate.identity}),
        **{key: value for key, value in asdict(options).items() if key not in ("steps", "decay_fraction")},
    }
    checkpoint, first = work / "checkpoint.pt", 0
    if (state := read_state(checkpoint, device)) is not None:
        if state["identity"] != identity:
            raise KoalaBenchError(
                f"The checkpoint in {work} was made from another corpus or with other options.",
                "Choose another --out, or delete the folder to start again.",
            )
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        first = state["step"]
        planned = state.get("steps", options.steps)
        # Once the rate falls, or should have begun to, the run is bound to its length.
        if planned != options.steps and first > min(
            decay_start, planned - _decay_steps(replace(options, steps=planned))
        ):
            raise KoalaBenchError(
                f"The checkpoint in {work} is at step {first:,} of {planned:,}, too late to make a run of"
                f" {options.steps:,} steps of it.",
                f"Use --steps {planned}, or choose another --out.",
            )
        say(f"Resuming after step {first:,}.")

    def evaluate() -> dict[str, float]:
        model.eval()
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            losses = [_loss(model, part).item() for part in held_out_ids.split(8)]
            agreement = {} if imitate is None else {"agreement": round(imitate.agreement(model, judged_ids), 4)}
        model.train()
        return {"held_out_loss": round(sum(losses) / len(losses), 4), **agreement}

    def save(step: int) -> None:
        optimiser_states = [optimiser.state_dict() for optimiser in optimisers]
        write_state(
            checkpoint,
            {
                "identity": identity,
                "step": step,
                "steps": options.steps,
                "model": model.state_dict(),
                "optimisers": optimiser_states,
            },
        )

    started = time.perf_counter()
    with (
        continue_log(work / "log.jsonl", first) as log,
        progress("pretrain", options.steps * options.step_tokens, "tokens", first * options.step_tokens) as advance,
    ):
        for step in range(first, options.steps):
            decaying = step >= decay_start
            ids = torch.from_numpy(
                _batch(
                    step,
                    decay_rows if decaying else stable_rows,
                    answer_rows if decaying else None,
                    options.step_tokens,
                )
            ).to(device)
            factor = _rate(step, options)
            for optimiser, base in zip(optimisers, base_rates, strict=True):
                for group in optimiser.param_groups:
                    group["lr"] = base * factor
            with torch.autocast(device.type, torch.bfloat16):
                loss = step_loss(model, ids)
            value = loss.item()
            if not np.isfinite(value):
                raise KoalaBenchError(
                    f"The loss is {value} at step {step}.",
                    "Start again in another --out with another --seed; the last checkpoint is kept.",
                )
            loss.backward()
            repeated: dict[str, float] = {}
            if options.unlikelihood and step % _ANSWER_EVERY == 0:
                drawn, prompts = draw_prompts(
                    template, tokenizer, corpus.train, _ANSWER_ROWS, _ANSWER_PROMPT_TOKENS, (options.seed, step)
                )
                answers = greedy_answers(model, prompts, _ANSWER_TOKENS, (int(tokenizer.eos_token_id),))
                with torch.autocast(device.type, torch.bfloat16):
                    unlikelihood, share = unlikelihood_loss(model, prompts, answers, _ANSWER_NGRAM)
                    fitting = likelihood_loss(model, [dialogues[i].tolist() for i in drawn], options.row_tokens)
                (fitting + options.unlikelihood * unlikelihood).backward()
                repeated = {
                    "unlikelihood": round(unlikelihood.item(), 4),
                    "repeated": round(share, 4),
                    "dialogue_loss": round(fitting.item(), 4),
                    "answer_tokens": round(sum(map(len, answers)) / len(answers), 1),
                }
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            line = {
                "step": step + 1,
                "tokens": (step + 1) * options.step_tokens,
                "loss": round(value, 4),
                "rate": round(factor, 4),
                **repeated,
                "elapsed_s": round(time.perf_counter() - started, 1),
            }
            last = step + 1 == options.steps
            if (step + 1) % 200 == 0 or last:
                line |= evaluate()
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
        "tokens_seen": options.steps * options.step_tokens, "corpus_tokens": stable_rows.per_epoch * options.row_tokens,
        "held_out_loss": final["held_out_loss"], "parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__, "started_from": earlier,
    }  # fmt: skip
    if imitate is not None:
        manifest["imitates"] = {**imitate.identity, "agreement": final["agreement"]}
    if corpus.provenance:
        manifest["conversations"] = corpus.provenance
    manifest["repeated_8grams"] = round(repeated_ngrams(held_out_answers(out, corpus, template_name, device)), 4)
    write_text(out / "pretraining.json", json.dumps(manifest, indent=2) + "\n")
    write_text(out / "README.md", model_card(manifest))
    return out
