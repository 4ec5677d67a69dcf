"""One evaluation: a run record, and the same answers in FastChat's format beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from koala_bench.dialogues.encoding import ChatTemplate
from koala_bench.engine.target import Target
from koala_bench.evaluation import loop
from koala_bench.interop.answers import write_fastchat_answers
from koala_bench.presets import Preset
from koala_bench.records.reading import Run
from koala_bench.training.experiment import load_preset_target


def evaluate(
    preset: Preset,
    name: str,
    methods: Sequence[str],
    heads: Path,
    record: Path,
    data_dir: Path | None,
    command: Sequence[str],
    process: int = 1,
    loaded: tuple[Target, ChatTemplate] | None = None,
) -> Run:
    """Decode with trained heads and without, into ``record``; also what a fresh process is started with; raises
    ``KoalaBenchError`` if anything that it needs is wrong.

    Args:
        name: of the preset, for the record.
        process: which of several evaluations of one recipe this is, from 1.
        loaded: the preset's target and template, where they are here already.
    """
    target, template = loaded or load_preset_target(preset)
    run = loop.evaluate(preset, name, methods, target, template, heads, record, data_dir, command, process)
    write_fastchat_answers(run, record.parent / "answers")
    return run
