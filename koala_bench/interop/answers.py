"""Answer files as FastChat's tools read them, with the extra fields that Medusa and Spec-Bench added."""

from __future__ import annotations

import json
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

from koala_bench.common.files import write_text
from koala_bench.records.reading import Run
from koala_bench.records.schema import TurnLine, answer_s, key_of


def write_fastchat_answers(run: Run, folder: Path) -> list[Path]:
    """Write the answers as FastChat's tools read them, one ``<target>-<method>.jsonl`` per method.

    A repeat is a choice. Beside FastChat's fields a choice has those that Medusa (``idxs``, the 0-based index of
    the last step; ``new_tokens``; ``wall_time``, prefill and decode in seconds) and Spec-Bench
    (``decoding_steps``, ``accept_lengths``: tokens per step over all turns) read. Choices with a failed or a
    missing turn are left out. Ids and time stamps follow from the record, so writing again gives the same bytes.

    Returns:
        The files written.
    """
    header = run.header
    created = datetime.fromisoformat(header["created"]).timestamp()
    # Every method is asked the same turns, so the longest conversation seen is the whole one.
    turn_counts: dict[int, int] = {}
    for turn in run.turns:
        turn_counts[turn["question_id"]] = max(turn_counts.get(turn["question_id"], 0), turn["turn"] + 1)
    written = []
    for method in run.methods:
        model_id = f"{header['target']['name'].rpartition('/')[2]}-{method}"
        answers: dict[tuple[int, str], dict[int, list[TurnLine]]] = {}
        for turn in sorted(run.turns_of(method), key=key_of):
            if turn["error"] is None:
                question = answers.setdefault((turn["question_id"], turn["category"]), {})
                question.setdefault(turn["repeat"], []).append(turn)
        lines = []
        for (number, category), repeats in answers.items():
            name = f"koala-bench/{header['run_id']}/{method}/{number}"
            answer = {
                "question_id": number,
                "category": category,
                "answer_id": uuid.uuid5(uuid.NAMESPACE_URL, name).hex,
                "model_id": model_id,
                "choices": [_choice(at, turns) for at, turns in repeats.items() if len(turns) == turn_counts[number]],
                "tstamp": created,
            }
            lines += [json.dumps(answer, ensure_ascii=False) + "\n"] if answer["choices"] else []
        written.append(folder / f"{model_id}.jsonl")
        write_text(written[-1], "".join(lines))
    return written


def _choice(repeat: int, turns: list[TurnLine]) -> dict[str, Any]:
    steps = [len(turn["accepted"] or []) for turn in turns]
    return {
        "index": repeat,
        "turns": [turn["text"] for turn in turns],
        "idxs": [count - 1 for count in steps],
        "decoding_steps": steps,
        "new_tokens": [len(turn["new_token_ids"] or []) for turn in turns],
        "wall_time": [answer_s(turn) for turn in turns],
        "accept_lengths": [accepted + 1 for turn in turns for accepted in turn["accepted"] or []],
    }
