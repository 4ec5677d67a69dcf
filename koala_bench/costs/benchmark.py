"""Benchmark the harness: our loop against ``generate``, steps by context length, heads trained together and alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from koala_bench.costs import scaling
from koala_bench.costs.generate import compare_with_generate
from koala_bench.costs.generate import in_words as speeds_in_words
from koala_bench.costs.profile import machine_in_words
from koala_bench.costs.training import in_words, training_speed
from koala_bench.dialogues.conversations import read_conversations
from koala_bench.dialogues.encoding import ChatTemplate, encode_prompt
from koala_bench.dialogues.questions import bundled_questions, read_questions, select_questions
from koala_bench.engine.target import Target
from koala_bench.evaluation.methods import load_methods
from koala_bench.presets import Preset
from koala_bench.training.experiment import free_head, load_preset_target, methods_with_heads, training_streams

_CONTEXTS, _NODES = (64, 256, 1024, 2048, 4096), (1, 8)


def bundled_prompts(target: Target, template: ChatTemplate) -> list[list[int]]:
    """The first bundled question of each category, as token ids."""
    assert target.tokenizer is not None
    questions = select_questions(read_questions(bundled_questions()), 1)
    return [encode_prompt(template, target.tokenizer, question.dialogue_after()) for question in questions]


def benchmark(
    preset: Preset, methods: Sequence[str], tokens: int, rounds: int, steps: int
) -> tuple[str, list[scaling.StepCost]]:
    """The report in Markdown, and step costs by context length for the figure.

    Args:
        methods: those with nothing to train are decoded beside ``generate``, heads of the others trained for a while.
        tokens: length of every answer.
        rounds: timings of each prompt.
        steps: training steps to time.
    """
    target, template = load_preset_target(preset)
    named = methods_with_heads(preset, methods)
    free = [name for name in named if free_head(preset.method(name), target) is not None]
    with target.computing():
        place = machine_in_words(target)
        ready = load_methods(preset, free, target, Path())
        speeds = compare_with_generate(target, ready, bundled_prompts(target, template), tokens, rounds)
        costs = scaling.step_costs(target, _CONTEXTS, _NODES)
    eager = replace(target, engine="eager")
    trained = list(dict.fromkeys(preset.trained_as(name) for name in named if name not in free))
    parts = [f"Decoding on {place}.", speeds_in_words(speeds, tokens), scaling.in_words(costs)]
    if trained:  # lookups have nothing to train
        stream, *_ = training_streams(preset, read_conversations(preset.data.source, template), eager, template)
        parts.append(in_words(training_speed(preset, trained, eager, stream, steps)))
    return "\n\n".join(parts), costs
