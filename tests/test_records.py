"""Run records: validation, resuming, reading, provenance, FastChat answers; and the synthetic run of other tests."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from koala_bench.errors import KoalaBenchError
from koala_bench.interop.answers import write_fastchat_answers
from koala_bench.provenance import code_state, environment
from koala_bench.recording import open_record
from koala_bench.records import differences, read_run, read_runs
from koala_bench.schema import MethodInfo, RunHeader, TurnLine, key_of

# ---------------------------------------------------------------------------------------------- a synthetic run

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
    "eagle@3": ([3, 2, 4, 1], 0.014),
    "eagle@4": ([3, 2, 4, 2], 0.015),
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
        "tree": {"name": "root" if head is None else "mc_sim_7b_63", "nodes": 26 if head else 1, "depth": 4 if head else 0, "parents": None},
        "checkpoint": None if head is None else f"heads/{name}",
        "weights_sha256": None if head is None else "ab" * 32,
        "training": None if head is None else {"stream_sha256": "cd" * 32, "order_sha256": "ef" * 32, "steps": 600, "tokens": 600_000, "seed": 0},
        "lossless": True,
    }


def make_header(methods: list[str] | None = None, target: str = "tiny") -> RunHeader:
    return {
        "kind": "run",
        "schema": 3,
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
        "acceptance": {"rule": "greedy", "temperature": 0.0},
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
    decode_s = len(accepted) * (PATTERNS | FURTHER_PATTERNS)[method][1] * (1 + 0.01 * (question % 5) * (1 if head else 2))
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
        "decode_s": decode_s,
        "draft_s": 0.2 * decode_s if head else None,
        "verify_s": 0.6 * decode_s if head else None,
        "first_difference": None,
        "error": None,
    }
    return line | changes  # type: ignore[return-value]


def failed(turn: TurnLine, message: str = "out of memory") -> TurnLine:
    """The same turn as a failure."""
    names = ("new_token_ids", "text", "stop", "accepted", "drafted_depth", "kept_node", "prefill_s", "decode_s", "draft_s", "verify_s", "first_difference")
    return turn | {"error": {"type": "RuntimeError", "message": message}} | dict.fromkeys(names)  # type: ignore[return-value]


def make_turns(methods: list[str] | None = None) -> list[TurnLine]:
    """All turns, interleaved question by question."""
    return [make_turn(method, question, turn) for question in QUESTIONS for turn in (0, 1) for method in methods or PATTERNS]


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


# ---------------------------------------------------------------------------------------------- writing and reading


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run.jsonl"))
    assert run.finished
    assert run.header == make_header()
    assert run.turns == make_turns()
    assert list(run.methods) == list(PATTERNS)
    assert [turn["question_id"] for turn in run.turns_of("eagle")] == [question for question in QUESTIONS for _ in range(2)]
    assert len(read_runs([run.path, run.path])) == 2


def test_a_turn_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    with open_record(tmp_path / "run.jsonl", make_header()) as writer:
        writer.append(make_turn("vanilla", 81, 0))
        run = read_run(tmp_path / "run.jsonl")
    assert len(run.turns) == 1
    assert not run.finished


def test_the_prefill_token_may_be_no_steps_token(tmp_path: Path) -> None:
    with open_record(tmp_path / "run.jsonl", make_header()) as writer:
        writer.append(make_turn("vanilla", 81, 0, new_token_ids=list(range(TOKENS + 1))))
        writer.append(make_turn("vanilla", 81, 1, new_token_ids=[2], accepted=[], drafted_depth=[], stop="eos"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"accepted": [0] * 35}, "drafted_depth: 36 steps, but accepted has 35"),
        ({"new_token_ids": [1]}, "36 steps settle 36 tokens, but new_token_ids has 1"),
        ({"accepted": [1] + [0] * 35, "new_token_ids": list(range(37))}, "more tokens than the draft was deep"),
        ({"decode_s": None}, "decode_s: is null"),
        ({"decode_s": math.nan}, "decode_s: Input should be a finite number"),
        ({"decode_s": -1.0}, "decode_s: Input should be greater than or equal to 0"),
        ({"question_id": "81"}, "question_id: Input should be a valid integer"),
        ({"turn": True}, "turn: Input should be a valid integer"),
        ({"method": "hydra"}, "'hydra' is not among the run's methods"),
        ({"kept_node": [0] * 36}, "kept_node: the run line has no tree for this method"),
        ({"draft_s": 0.1}, "one is null and the other is not"),
        ({"error": {"type": "E", "message": ""}}, "a failed turn has no numbers"),
        ({"tokens": 3}, "tokens: Extra inputs are not permitted"),
    ],
)
def test_a_malformed_turn_is_not_written(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with open_record(tmp_path / "run.jsonl", make_header()) as writer, pytest.raises(ValueError, match=problem.replace("(", r"\(")):
        writer.append(make_turn("vanilla", 81, 0) | changes)  # type: ignore[arg-type]
    assert read_run(tmp_path / "run.jsonl").turns == []


def with_chain(header: RunHeader) -> RunHeader:
    """The same run with a recorded tree, a chain of four."""
    for method in header["methods"][1:]:
        method["tree"] = {"name": "chain-4", "nodes": 5, "depth": 4, "parents": [-1, 0, 1, 2, 3]}
    return header


def test_kept_nodes_stand_at_the_depths_that_were_accepted(tmp_path: Path) -> None:
    with open_record(tmp_path / "run.jsonl", with_chain(make_header())) as writer:
        right = make_turn("eagle", 81, 0)
        writer.append(right | {"kept_node": right["accepted"]})
        for wrong in ([0] * len(right["accepted"] or []), (right["accepted"] or [])[1:], [5, *(right["accepted"] or [])[1:]]):
            with pytest.raises(ValueError, match="kept_node: not at the depths that accepted says"):
                writer.append(make_turn("eagle", 81, 1) | {"kept_node": wrong})


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({"parents": [0, 0, 1, 2, 3]}, "tree.parents: not a tree"),
        ({"parents": [-1, 0, 3, 2, 3]}, "tree.parents: not a tree"),
        ({"parents": [-1, 0, 1, 2]}, "tree.parents: 4 nodes of depth 3, not 5 of depth 4"),
    ],
)
def test_a_recorded_tree_is_one(tmp_path: Path, tree: dict[str, Any], problem: str) -> None:
    header = with_chain(make_header())
    header["methods"][1]["tree"] |= tree  # type: ignore[operator, typeddict-item]
    with pytest.raises(ValueError, match=problem), open_record(tmp_path / "run.jsonl", header):
        pass


def test_a_turn_is_written_once_and_nothing_follows_the_end(tmp_path: Path) -> None:
    with open_record(tmp_path / "run.jsonl", make_header()) as writer:
        writer.append(make_turn("vanilla", 81, 0))
        with pytest.raises(ValueError, match="already"):
            writer.append(make_turn("vanilla", 81, 0))
        writer.finish(1.0)
        with pytest.raises(ValueError, match="finished"):
            writer.append(make_turn("vanilla", 81, 1))
        with pytest.raises(ValueError, match="finished"):
            writer.finish(1.0)


@pytest.mark.parametrize("field", ["seed", "limits", "target", "methods"])
def test_a_malformed_header_is_not_written(tmp_path: Path, field: str) -> None:
    header = make_header()
    header[field] = "x"  # type: ignore[literal-required]
    with pytest.raises(ValueError, match=field):
        open_record(tmp_path / "run.jsonl", header)
    assert not (tmp_path / "run.jsonl").exists()


# ---------------------------------------------------------------------------------------------- resuming


HALF_LINES = [b'{"kind":"turn","method":"ea', b'{"kind":"turn","method":"ea\n', b'{"kind":"end","status":"finished","turns":33,"wall_s":1.0}', b"\xff\xfe\n"]


@pytest.mark.parametrize("tail", HALF_LINES)
def test_resume_drops_a_half_written_last_line_and_goes_on(tmp_path: Path, tail: bytes) -> None:
    whole = write_run(tmp_path / "whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"".join(lines[:34]) + tail)
    assert not read_run(path).finished
    assert path.read_bytes().endswith(tail), "reading changes nothing"
    with open_record(path, make_header()) as writer:
        assert writer.resumed
        assert len(writer.done) == 33
        for turn in make_turns():
            if key_of(turn) not in writer.done:
                writer.append(turn)
        writer.finish(12.5)
    assert path.read_bytes() == whole


def test_a_header_that_was_half_written_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"kind":"run","schema"')
    with open_record(path, make_header()) as writer:
        assert not writer.resumed
    assert read_run(path).header == make_header()


def test_a_failed_turn_counts_as_done(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run.jsonl", lambda turn: failed(turn) if key_of(turn) == ("eagle", 83, 1, 0) else turn, finish=False)
    with open_record(path, make_header()) as writer:
        assert ("eagle", 83, 1, 0) in writer.done
    assert len(read_run(path).turns) == len(make_turns())


def test_a_finished_record_is_handed_back_even_to_other_code(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run.jsonl")
    header = make_header()
    header["code"]["commit"] = "f" * 40
    header["run_id"] = "another"
    with open_record(path, header) as writer:
        assert writer.finished
        assert writer.header == make_header()


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("limits", "max_new_tokens"), 128, "limits.max_new_tokens"),
        (("methods", 4, "weights_sha256"), "cd" * 32, "methods.4.weights_sha256"),
        (("environment", "threads"), 1, "environment.threads"),
        (("environment", "packages", "torch"), "2.14.0", "environment.packages.torch"),
        (("code", "commit"), "f" * 40, "code.commit"),
        (("limits", "stop_ids"), [2, 3], "limits.stop_ids.1"),
    ],
)
def test_another_run_does_not_continue_a_record(tmp_path: Path, place: tuple[Any, ...], value: object, named: str) -> None:
    path = write_run(tmp_path / "run.jsonl", finish=False)
    before = path.read_bytes()
    header: Any = make_header()
    inner = header
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(KoalaBenchError, match=f"run.jsonl holds another run; they differ in {named}"):
        open_record(path, header)
    assert path.read_bytes() == before


def test_paths_do_not_make_another_run() -> None:
    header, moved = make_header(), make_header()
    moved["target"]["path"] = "elsewhere"
    moved["methods"][1]["checkpoint"] = "elsewhere"
    moved["created"], moved["run_id"], moved["command"] = "2027-01-01T00:00:00+00:00", "x", []
    assert differences(header, moved) == []


# ---------------------------------------------------------------------------------------------- damaged records


def edited(path: Path, line: int, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Change one line (counted from 1) of a record."""
    lines = path.read_text(encoding="utf-8").splitlines()
    value = json.loads(lines[line - 1])
    edit(value)
    lines[line - 1] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("line", "edit", "message"),
    [
        (1, lambda value: value.update(seed="0"), ":1: seed: Input should be a valid integer"),
        (1, lambda value: value["target"].pop("dtype"), ":1: target.dtype: Field required"),
        (1, lambda value: value["methods"].append(value["methods"][0]), ":1: methods: 'vanilla' is listed twice"),
        (1, lambda value: value.update(created="yesterday"), ":1: created: not an ISO 8601 time"),
        (1, lambda value: value.update(created="2026-02-03T04:05:06"), ":1: created: has no time zone"),
        (1, lambda value: value.update(kind="turn"), "is not a run record"),
        (1, lambda value: value.update(schema=1), "has record schema 1; this version reads schema 3. Read it with koala-bench 0.1.0"),
        (7, lambda value: value.update(accepted=[0]), ":7: drafted_depth: 36 steps, but accepted has 1"),
        (7, lambda value: value.pop("stop"), ":7: stop: Field required"),
        (7, lambda value: value.update(turn=0), ":7: the same method, question, turn and repeat as line 2"),
        (82, lambda value: value.update(turns=3), ":82: the end line counts 3 turns, but there are 80"),
        (82, lambda value: value.update(status="aborted"), ":82: status: Input should be 'finished'"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: int, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    path = edited(write_run(tmp_path / "run.jsonl"), line, edit)
    with pytest.raises(KoalaBenchError) as caught:
        read_run(path)
    assert f"{path}" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has no complete line"),
        (b"{}", "it has no complete line"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", ":1: not a line of JSON"),
        (b"[1]\n", ":1: not a JSON object"),
        (b"[" * 100_000 + b"\n", ":1: not a line of JSON"),
        (b'{"question_id": 81}\n', "its first line is not a 'run' line"),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    with pytest.raises(KoalaBenchError, match=r"run\.jsonl") as caught:
        read_run(path)
    assert message in str(caught.value)


def test_damage_in_the_middle_is_not_taken_for_an_interrupted_run(tmp_path: Path) -> None:
    lines = write_run(tmp_path / "run.jsonl").read_bytes().splitlines(keepends=True)
    lines[4] = lines[4][:50] + b"\n"
    (tmp_path / "run.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(KoalaBenchError, match=r"run\.jsonl:5: not a line of JSON"):
        open_record(tmp_path / "run.jsonl", make_header())
    assert (tmp_path / "run.jsonl").read_bytes() == b"".join(lines)


def test_lines_after_the_end_are_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run.jsonl")
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(make_turn("vanilla", 81, 0, repeat=1)) + "\n")
    with pytest.raises(KoalaBenchError, match=r"run\.jsonl:83: a line after the end line"):
        read_run(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(KoalaBenchError, match=r"Cannot read the run record .*none\.jsonl: No such file"):
        read_run(tmp_path / "none.jsonl")
    with pytest.raises(KoalaBenchError, match="Is a directory"):
        read_run(tmp_path)


# ---------------------------------------------------------------------------------------------- provenance


def test_the_environment_is_described_without_importing_torch(tmp_path: Path) -> None:
    where = environment(threads=2, gpu="GPU", driver="1.2")
    assert where["threads"] == 2
    assert where["gpu"] == "GPU"
    assert where["packages"]["numpy"]
    assert where["memory_bytes"] is None or where["memory_bytes"] > 2**20
    header = make_header()
    header["environment"] = where
    open_record(tmp_path / "run.jsonl", header).__exit__(None, None, None)


def test_what_follows_the_record_needs_no_torch() -> None:
    import sys

    code = "import sys, koala_bench.figures, koala_bench.tables, koala_bench.statistics; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_code_state_of_a_checkout_and_of_an_installed_package(tmp_path: Path) -> None:
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")

    def git(*arguments: str) -> str:
        options = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false", "-c", "core.hooksPath=/dev/null"]
        return subprocess.run(["git", *options, *arguments], cwd=package, check=True, capture_output=True, text=True).stdout.strip()

    assert code_state(package)["commit"] is None
    git("init", "-q")
    assert code_state(package)["commit"] is None, "no commit yet"
    git("add", "__init__.py")
    git("commit", "-q", "-m", "one")
    (package / "untracked.txt").write_text("")
    state = code_state(package)
    assert (state["commit"], state["dirty"]) == (git("rev-parse", "HEAD"), False)
    (package / "__init__.py").write_text("x = 1\n")
    assert code_state(package)["dirty"] is True
    below = package / "venv" / "package"
    below.mkdir(parents=True)
    (below / "__init__.py").write_text("")
    assert code_state(below)["commit"] is None, "a package below another project's checkout is not of that project"


# ---------------------------------------------------------------------------------------------- FastChat answers


def test_fastchat_answers_hold_what_fastchat_medusa_and_spec_bench_read(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run.jsonl"))
    paths = write_fastchat_answers(run, tmp_path / "answers")
    assert [path.name for path in paths] == [f"tiny-{method}.jsonl" for method in PATTERNS]
    rows = [json.loads(line) for line in paths[3].read_text(encoding="utf-8").splitlines()]
    assert [row["question_id"] for row in rows] == list(QUESTIONS)
    assert len({row["answer_id"] for row in rows}) == len(rows)
    first, turns = rows[0], [make_turn("eagle", 81, 0), make_turn("eagle", 81, 1)]
    assert first["model_id"] == "tiny-eagle"
    assert first["tstamp"] == 1770091506.0  # 2026-02-03T04:05:06 UTC
    (choice,) = first["choices"]
    assert choice["index"] == 0
    assert choice["turns"] == [turn["text"] for turn in turns]
    steps = steps_of("eagle", 81)
    assert choice["idxs"] == [len(steps) - 1] * 2
    assert choice["decoding_steps"] == [len(steps)] * 2
    assert choice["new_tokens"] == [TOKENS, TOKENS]
    assert choice["wall_time"] == [(turn["prefill_s"] or 0) + (turn["decode_s"] or 0) for turn in turns]
    assert choice["accept_lengths"] == [count + 1 for count in steps] * 2
    assert sum(choice["accept_lengths"]) == sum(choice["new_tokens"])


def test_fastchat_answers_are_the_same_bytes_again(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run.jsonl"))
    first = [path.read_bytes() for path in write_fastchat_answers(run, tmp_path / "one")]
    assert first == [path.read_bytes() for path in write_fastchat_answers(run, tmp_path / "two")]


def test_a_failed_answer_is_left_out_of_the_fastchat_file(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run.jsonl", lambda turn: failed(turn) if key_of(turn) == ("eagle", 83, 1, 0) else turn))
    rows = [json.loads(line) for line in (write_fastchat_answers(run, tmp_path)[3]).read_text(encoding="utf-8").splitlines()]
    assert [row["question_id"] for row in rows] == [question for question in QUESTIONS if question != 83]


def test_repeats_are_choices_in_the_fastchat_file(tmp_path: Path) -> None:
    header = copy.deepcopy(make_header(["vanilla"]))
    header["measure"]["repeats"] = 2
    with open_record(tmp_path / "run.jsonl", header) as writer:
        for repeat in (0, 1):
            for turn in (0, 1):
                writer.append(make_turn("vanilla", 81, turn, repeat))
    (path,) = write_fastchat_answers(read_run(tmp_path / "run.jsonl"), tmp_path)
    assert [choice["index"] for choice in json.loads(path.read_text(encoding="utf-8"))["choices"]] == [0, 1]
