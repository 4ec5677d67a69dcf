"""The smallest data that a run can do with: conversations, questions and a preset; and heads trained on them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from koala_bench.dialogues.encoding import ChatTemplate, chat_template
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target
from koala_bench.evaluation.loop import evaluate
from koala_bench.presets import Preset, load_preset
from koala_bench.records.reading import Run
from koala_bench.testing import save_tiny_target
from koala_bench.training.experiment import train_heads

METHODS = ["vanilla", "medusa", "medusa+koala", "eagle", "eagle+koala"]
TREE = "48x2x1"
QUESTIONS = [
    ("words", ["count 5", "and 6"]),
    ("numbers", ["Write the letters of the alphabet.", "Again, please."]),
    ("words", ["3, 4, 5", "go on"]),
]


def conversations(folder: Path, count: int = 120) -> Path:
    rows = [
        {
            "id": f"c{i}",
            "conversations": [
                {"from": "human", "value": f"count {i}"},
                {"from": "gpt", "value": " ".join(str(i + j) for j in range(3 + i % 9))},
            ],
        }
        for i in range(count)
    ]
    path = folder / "conversations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def preset_for(target_folder: Path, data: Path, *more: str) -> Preset:
    return load_preset(
        "tiny",
        [
            f"target.name='{target_folder}'", f"data.source='{data}'", "data.max_tokens=192", "data.probes=1",
            "training.batch_tokens=256", "training.steps=12", "training.checkpoint_every=4",
            "training.held_out_evaluations=1", "training.learning_rate=1e-3", "training.precision=bf16", *more,
        ],
    )  # fmt: skip


def write_questions(path: Path, questions: Sequence[tuple[str, list[str]]]) -> Path:
    rows = [
        {"question_id": 81 + i, "category": category, "turns": turns} for i, (category, turns) in enumerate(questions)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclasses.dataclass
class Bench:
    """Trained heads of a tiny target, a target in float64, and a short way to evaluate them."""

    folder: Path
    heads: Path
    target: Target
    template: ChatTemplate

    def preset(self, *more: str) -> Preset:
        questions = f"evaluation.questions='{self.folder / 'questions.jsonl'}'"
        sizes = ("training.steps=4", "evaluation.max_new_tokens=12", "evaluation.warmup=0")
        # Heads trained for so short guess badly; a wide tree is right now and then all the same.
        trees = [f"methods.{method}.tree='{TREE}'" for method in METHODS[1:]]
        return preset_for(self.folder / "target", self.folder / "conversations.jsonl", questions, *sizes, *trees, *more)

    def run(self, record: Path, methods: Sequence[str] = METHODS, *more: str, target: Target | None = None) -> Run:
        return evaluate(
            self.preset(*more),
            "tiny",
            methods,
            target or self.target,
            self.template,
            self.heads,
            record,
            None,
            ["koala-bench", "evaluate"],
        )


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    save_tiny_target(folder / "target")
    conversations(folder)
    write_questions(folder / "questions.jsonl", QUESTIONS)
    exact = load_target(str(folder / "target"), "cpu", "float64")
    assert exact.tokenizer is not None
    made = Bench(folder, folder / "heads", exact, chat_template("vicuna_v1.1", exact.tokenizer))
    train_heads(
        made.preset(), METHODS, load_target(str(folder / "target"), "cpu", "float32"), made.template, made.heads
    )
    return made
