"""Unlikelihood: which tokens repeat, that their probability falls, and that fresh text is left alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from koala_bench.decoding.answering import greedy_answers
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.dialogues.encoding import chat_template
from koala_bench.engine.target import Target
from koala_bench.pretraining.unlikelihood import draw_prompts, likelihood_loss, repeated_tokens, unlikelihood_loss
from koala_bench.testing import tiny_config, tiny_tokenizer

DIALOGUES = [[f"What is {i}?", f"It is {i}.", "Why?", "Because."] for i in range(50)]


def small_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config())


@pytest.mark.parametrize(
    ("answer", "n", "marked"),
    [
        ([1, 2, 3, 4, 5, 6], 2, ""),
        ([1, 2, 3, 1, 2, 4], 2, "34"),
        ([1, 2, 3, 1, 2, 4], 3, ""),
        ([7, 7, 7, 7], 2, "123"),  # the second pair overlaps the first
        ([1, 2, 1, 2, 1, 2], 4, "2345"),
        ([1, 2], 3, ""),
        ([], 2, ""),
    ],
)
def test_tokens_of_an_ngram_that_was_there_before_are_marked(answer: list[int], n: int, marked: str) -> None:
    assert "".join(str(i) for i, flag in enumerate(repeated_tokens(answer, n)) if flag) == marked


def test_the_loss_is_the_mean_of_minus_log_one_minus_p_over_all_answer_tokens() -> None:
    model, prompts, answers = small_model(), [[1, 9, 10], [1, 5]], [[7, 8, 7, 8, 7, 8], [20, 21, 22]]
    loss, share = unlikelihood_loss(model, prompts, answers, 2)
    with torch.no_grad():
        p = model(input_ids=torch.tensor([[*prompts[0], *answers[0]]])).logits[0].double().softmax(-1)
    wanted = sum(-math.log1p(-float(p[len(prompts[0]) + i - 1, answers[0][i]])) for i in range(2, 6)) / 9
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert share == pytest.approx(4 / 9)


def test_text_without_repeats_costs_nothing_and_has_no_gradient() -> None:
    model = small_model()
    loss, share = unlikelihood_loss(model, [[1, 2]], [[10, 11, 12]], 2)
    loss.backward()  # type: ignore[no-untyped-call]
    assert (loss.item(), share) == (0.0, 0.0)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_certain_loop_gives_a_finite_loss_and_training_makes_it_unlikely() -> None:
    model = small_model()
    prompts, answers = [[1, 9, 10]], [[7, 8] * 6]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.tensor([[*prompts[0], *answers[0]]])
    for _ in range(60):  # learn the loop by heart
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert greedy_answers(model, prompts, 12, ())[0] == answers[0]
    for _ in range(60):
        found, share = unlikelihood_loss(model, prompts, greedy_answers(model, prompts, 12, ()), 4)
        assert math.isfinite(found.item())
        if share == 0:
            break
        optimiser.zero_grad()
        found.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert share == 0


def test_the_likelihood_is_that_of_each_dialogue_alone() -> None:
    model, rows = small_model(), [[1, 40, 50, 60, 70], [1, 80, 90]]
    with torch.no_grad():
        p = [model(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1) for row in rows]
    wanted = -sum(float(p[0][i, rows[0][i + 1]]) for i in range(3)) - sum(
        float(p[1][i, rows[1][i + 1]]) for i in range(2)
    )
    assert likelihood_loss(model, rows, 4).item() == pytest.approx(wanted / 5, rel=1e-5)


def test_answers_of_a_batch_are_those_of_the_engine_one_by_one(target64: Target) -> None:
    prompts = [[1, 40, 50, 60], [1, 70], [1, 80, 81, 82, 83, 84, 85]]
    alone = [decode(target64, Vanilla(), VANILLA_TREE, prompt, 20, target64.stop_ids).tokens for prompt in prompts]
    assert greedy_answers(target64.model, prompts, 20, target64.stop_ids) == alone
    stops = (alone[0][5], alone[1][9])  # any token may end an answer
    cut = [decode(target64, Vanilla(), VANILLA_TREE, prompt, 20, stops).tokens for prompt in prompts]
    assert greedy_answers(target64.model, prompts, 20, stops) == cut


def test_prompts_are_drawn_by_seed_from_both_turns_and_kept_short() -> None:
    tokenizer = tiny_tokenizer()
    template = chat_template("vicuna_v1.1", tokenizer)
    long = [["x" * 400, "y", "z", "w"]]

    def drawn(*seed: int) -> list[list[int]]:
        indices, prompts = draw_prompts(template, tokenizer, DIALOGUES + long, 40, 230, seed)
        assert all(
            tokenizer.decode(prompt).split("USER: ")[1].startswith(DIALOGUES[i][0])
            for i, prompt in zip(indices, prompts, strict=True)
        )
        return prompts

    assert drawn(3, 1) == drawn(3, 1) != drawn(3, 2)
    texts = [tokenizer.decode(prompt) for prompt in drawn(3, 1)]
    assert 5 < sum("Why?" in text for text in texts) < 35
    assert all(text.endswith("ASSISTANT:") for text in texts)
    assert all(len(prompt) <= 230 for prompt in drawn(3, 1))


def test_a_target_trained_with_it_is_saved_like_any_other(tmp_path: Path) -> None:
    from koala_bench.pretraining.corpus import Corpus
    from koala_bench.pretraining.loop import PretrainOptions, pretrain

    options = PretrainOptions(
        layers=2, width=32, intermediate=48, attention_heads=2, vocabulary=320, positions=512,
        row_tokens=32, decay_row_tokens=64, step_tokens=128, steps=5, warmup_steps=2, unlikelihood=1.0, rate=0.5,
    )  # fmt: skip
    corpus = Corpus(DIALOGUES, DIALOGUES[:8], {"library": "1.0"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("koala_bench.pretraining.card._PROMPTS", 2)
        patch.setattr("koala_bench.pretraining.card._TOKENS", 12)
        pretrain(corpus, options, tmp_path / "out", torch.device("cpu"), checkpoint_every=100)
    log = (tmp_path / "out" / "work" / "log.jsonl").read_text().splitlines()
    assert [i for i, line in enumerate(log) if "repeated" in line] == [0, 2, 4]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--rate 0.5 --unlikelihood 1" in card and "1908.04319" in card
