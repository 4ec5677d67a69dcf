"""A synthetic run of eight questions: its header, turns and record, for tests of whatever reads records."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from koala_bench.evaluation.recording import open_record
from koala_bench.records.reading import Run, read_run
from koala_bench.records.schema import SCHEMA, MethodInfo, RunHeader, TurnLine
from koala_bench.records.summaries import Summary

QUESTIONS = range(81, 89)
# Accepted drafts of a few steps, repeated until the answer is whole; what a step costs, in seconds.
PATTERNS: dict[str, tuple[list[int], float]] = {
    "vanilla": ([0], 0.010),
    "medusa": ([1, 0, 2, 0], 0.011),
    "medusa+koala": ([1, 1, 2, 0], 0.0112),
    "eagle": ([2, 1, 3, 0], 0.013),
    "eagle+koala": ([2, 2, 4, 1], 0.0135),
}
# Methods of the ablation and of the curve over K, which no run has unless they are named.
FURTHER_PATTERNS: dict[str, tuple[list[int], float]] = {
    "medusa+layers": ([1, 1, 2, 0], 0.0111),
    "medusa+adversarial": ([1, 0, 2, 0], 0.011),
    "eagle+layers": ([2, 2, 3, 1], 0.0134),
    "eagle+adversarial": ([2, 1, 4, 0], 0.013),
    "eagle+lk": ([2, 2, 4, 0], 0.0128),
    "eagle+lk+layers": ([2, 2, 4, 1], 0.0135),
    "eagle+tv": ([2, 2, 3, 0], 0.0129),
    "hass": ([3, 1, 3, 0], 0.013),
    "eagle+vocab8k": ([2, 1, 2, 0], 0.011),
    "eagle+layers+vocab8k": ([2, 1, 3, 0], 0.012),
    "eagle+lk+vocab8k": ([2, 1, 3, 0], 0.011),
    "eagle+lk+layers+vocab8k": ([2, 2, 3, 0], 0.012),
    "eagle@3": ([3, 2, 4, 1], 0.014),
    "eagle@4": ([3, 2, 4, 2], 0.015),
    "eagle2": ([3, 1, 3, 0], 0.013),
    "eagle2@3": ([3, 3, 4, 1], 0.014),
    "eagle2@4": ([3, 3, 4, 2], 0.015),
}
TOKENS = 36


def make_method(name: str) -> MethodInfo:
    head = None if name == "vanilla" else re.split(r"[+@]", name)[0]
    layers = 0 if head is None else int(name.partition("@")[2] or (2 if name.endswith(("+koala", "+layers")) else 1))
    return {
        "name": name,
        "head": head,
        "layers": layers,
        "adversarial": name.endswith(("+koala", "+adversarial")),
        "parameters": layers * 410_000,
        "tree": {
            "name": "root" if head is None else "mc_sim_7b_63",
            "nodes": 26 if head else 1,
            "depth": 4 if head else 0,
            "parents": None,
        },
        "checkpoint": None if head is None else f"heads/{name}",
        "weights_sha256": None if head is None else "ab" * 32,
        "training": (
            None
            if head is None
            else {"stream_sha256": "cd" * 32, "order_sha256": "ef" * 32, "steps": 600, "tokens": 600_000, "seed": 0}
        ),
        "typical": None,
        "lossless": True,
    }


def make_header(methods: list[str] | None = None, target: str = "tiny") -> RunHeader:
    return {
        "kind": "run",
        "schema": SCHEMA,
        "run_id": f"{target}-0001",
        "created": "2026-02-03T04:05:06+00:00",
        "command": ["koala-bench", "evaluate", "--preset", target, "--out", "results/a b"],
        "preset": {"name": target, "sha256": "11" * 32, "resolved": {"limits": {"max_new_tokens": 64}}},
        "target": {
            "name": target,
            "path": "targets/tiny",
            "config_sha256": "22" * 32,
            "weights_sha256": "33" * 32,
            "parameters": 6_100_000,
            "layers": 14,
            "dtype": "float32",
            "device": "cpu",
            "attention": "sdpa",
        },
        "methods": [make_method(name) for name in methods or PATTERNS],
        "acceptance": {"rule": "greedy", "temperature": 0.0, "top_k": 0, "top_p": 1.0},
        "questions": {"name": "bundled", "sha256": "44" * 32, "count": len(QUESTIONS)},
        "chat_template": {"name": "vicuna_v1.1", "sha256": "55" * 32},
        "limits": {"max_new_tokens": 64, "stop_ids": [2]},
        "seed": 0,
        "measure": {"warmup": 1, "repeats": 1},
        "environment": {
            "python": "3.11.9",
            "platform": "Linux-6.1-x86_64",
            "cpu": "Example CPU @ 2.0 GHz",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 8 * 2**30,
            "packages": {"torch": "2.13.0", "transformers": "5.23.0", "fschat": None},
            "gpu": None,
            "driver": None,
        },
        "code": {"version": "0.1.0", "commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
    }


def steps_of(method: str, question: int) -> list[int]:
    """Accepted drafts per step of a synthetic answer of ``TOKENS`` tokens; they vary with the question."""
    pattern = (PATTERNS | FURTHER_PATTERNS)[method][0]
    accepted: list[int] = []
    while (left := TOKENS - sum(accepted) - len(accepted)) > 0:
        place = len(accepted) + question * (len(accepted) % 3)
        accepted.append(min(pattern[place % len(pattern)], left - 1))
    return accepted


def make_turn(method: str, question: int, turn: int, repeat: int = 0, **changes: Any) -> TurnLine:
    """A turn; every method gives the same tokens, 1000 and up."""
    accepted = steps_of(method, question)
    head = method != "vanilla"
    decode_s = (
        len(accepted) * (PATTERNS | FURTHER_PATTERNS)[method][1] * (1 + 0.01 * (question % 5) * (1 if head else 2))
    )
    line: TurnLine = {
        "kind": "turn",
        "method": method,
        "question_id": question,
        "category": "writing" if question < 85 else "coding",
        "turn": turn,
        "repeat": repeat,
        "prompt_tokens": 40 + question,
        "new_token_ids": [1000 + i for i in range(TOKENS)],
        "text": f"Answer {question}.{turn} with a quote \u201c and a bar |",
        "stop": "limit",
        "accepted": accepted,
        "drafted_depth": [4 if head else 0] * len(accepted),
        "kept_node": None,
        "prefill_s": 0.02,
        "draft_prefill_s": 0.004 if head else 0.0,
        "decode_s": decode_s,
        "draft_s": 0.2 * decode_s if head else None,
        "verify_s": 0.6 * decode_s if head else None,
        "distance": None,
        "first_difference": None,
        "error": None,
    }
    return line | changes  # type: ignore[return-value]


def failed(turn: TurnLine, message: str = "out of memory") -> TurnLine:
    """The same turn as a failure."""
    names = (
        "new_token_ids",
        "text",
        "stop",
        "accepted",
        "drafted_depth",
        "kept_node",
        "prefill_s",
        "draft_prefill_s",
        "decode_s",
        "draft_s",
        "verify_s",
        "first_difference",
    )
    return turn | {"error": {"type": "RuntimeError", "message": message}} | dict.fromkeys(names)  # type: ignore[return-value]


def make_turns(methods: list[str] | None = None) -> list[TurnLine]:
    """All turns, interleaved question by question."""
    return [
        make_turn(method, question, turn) for question in QUESTIONS for turn in (0, 1) for method in methods or PATTERNS
    ]


def write_run(
    path: Path,
    change: Callable[[TurnLine], TurnLine | None] = lambda turn: turn,
    finish: bool = True,
    header: RunHeader | None = None,
) -> Path:
    """Write a record of 8 questions with 2 turns; ``change`` edits a turn or leaves it out."""
    header = header or make_header()
    with open_record(path, header) as writer:
        for turn in make_turns([method["name"] for method in header["methods"]]):
            changed = change(turn)
            if changed is not None:
                writer.append(changed)
        if finish:
            writer.finish(12.5)
    return path


def write_sampled(path: Path, lossy: str, methods: list[str] | None = None) -> Path:
    """A run at temperature 0.7 in which one method accepts what is typical, at a total variation of 0.30."""
    header = make_header(methods)
    header["acceptance"] = {"rule": "speculative sampling", "temperature": 0.7, "top_k": 0, "top_p": 1.0}
    (method,) = (each for each in header["methods"] if each["name"] == lossy)
    method["lossless"], method["typical"] = False, {"threshold": 0.09, "alpha": 0.3}
    return write_run(path, lambda turn: turn | {"distance": 0.3 if turn["method"] == lossy else None}, header=header)  # type: ignore[return-value]


def with_chain(header: RunHeader) -> RunHeader:
    """The same run with a recorded tree, a chain of four."""
    for method in header["methods"][1:]:
        method["tree"] = {"name": "chain-4", "nodes": 5, "depth": 4, "parents": [-1, 0, 1, 2, 3]}
    return header


def changed(path: Path, change: Callable[[TurnLine], TurnLine | None], **options: Any) -> Run:
    """A written run, read again."""
    return read_run(write_run(path, change, **options))


def by_name(summaries: list[Summary]) -> dict[str, Summary]:
    return {summary.name: summary for summary in summaries}
