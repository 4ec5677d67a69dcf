"""A head of one's own trained and measured beside the baselines, and judged against each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from koala_bench.common.files import write_text
from koala_bench.dialogues.questions import find_questions, read_questions
from koala_bench.gate.comparison import compare_heads, refuse_changed_code, verdict_table
from koala_bench.presets import Preset
from koala_bench.results.making import RECORD
from koala_bench.runs.evaluate import evaluate
from koala_bench.training.experiment import load_preset_target, train_heads


def compare(
    preset: Preset,
    name: str,
    methods: Sequence[str],
    compared: Sequence[str],
    folder: Path,
    data_dir: Path | None,
    command: Sequence[str],
    log_with: str | None,
) -> str:
    """Train and decode all methods into ``folder``, write ``verdict.md`` there and return its text.

    Args:
        compared: those of the methods that are compared with the others.

    Raises:
        KoalaBenchError: a mistake in questions, data or methods, or the folder holds heads that other code trained.
    """
    read_questions(find_questions(preset.evaluation.questions, data_dir)[1])  # before the training: it may be wrong
    target, template = load_preset_target(preset)
    note_code = refuse_changed_code(preset, methods, folder)
    heads = folder / "heads"
    train_heads(preset, methods, target, template, heads, note_code, log_with=log_with)
    loaded = target, template
    run = evaluate(preset, name, methods, heads, folder / RECORD, data_dir, command, loaded=loaded)
    text = verdict_table(run, compare_heads(run, compared, methods))
    write_text(folder / "verdict.md", text)
    return text
