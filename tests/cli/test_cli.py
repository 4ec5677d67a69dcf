"""What the commands do when all is well: help, the whole way to Table 1 on a tiny target, reuse, going on, and options
that reach what they should.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import koala_bench.evaluation.loop as evaluation
from koala_bench.cli import app, main
from koala_bench.records.reading import read_run
from koala_bench.records.schema import key_of
from koala_bench.results.recipes import RECIPE_NAMES
from koala_bench.testing import save_tiny_target
from tests.evaluation.test_evaluation import write_questions
from tests.training.test_training import conversations

ROOT = Path(__file__).parents[2]
COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
TABLE_FILES = ["figure1.pdf", "figure1.png", "table1.csv", "table1.md", "table1.tex"]


@dataclass
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line that a mistake ends in."""
        found = [line for line in self.err.splitlines() if line.startswith("koala-bench: ")]
        assert len(found) == 1, self.err
        assert self.err.splitlines()[-1] == found[0]
        return found[0]


Koala = Callable[..., Result]


@pytest.fixture
def koala(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Koala:
    """Runs the entry point as a shell would; only a traceback passes through."""
    monkeypatch.delenv("KOALA_BENCH_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["/somewhere/bin/koala-bench", *arguments])
        capsys.readouterr()
        code: int | str | None = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return Result(int(code or 0), captured.out, captured.err)

    return run


def settings(folder: Path) -> list[str]:
    """Options that make a command small: a random target, made-up data, two steps."""
    values = [
        'target.engine="eager"',
        "data.max_tokens=192",
        "data.probes=1",
        "training.batch_tokens=256",
        "training.steps=2",
        "training.held_out_evaluations=1",
    ]
    source = f"data.source={folder / 'conversations.jsonl'}"
    return [
        "--target",
        str(folder / "target"),
        "--device",
        "cpu",
        *(part for value in [source, *values] for part in ("--set", value)),
    ]


def decoding(folder: Path) -> list[str]:
    return ["--questions", str(folder / "questions.jsonl"), "--max-new-tokens", "6", "--set", "evaluation.warmup=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, conversations and questions, and an empty folder."""
    place = tmp_path_factory.mktemp("cli")
    save_tiny_target(place / "target")
    conversations(place)
    write_questions(place / "questions.jsonl", [("a", ["count 5", "and 6"]), ("b", ["spell it", "again"])])
    (place / "empty").mkdir()
    return place


@pytest.fixture(scope="module")
def done(folder: Path) -> Path:
    """A finished run of ``reproduce table1``."""
    command = [
        "koala-bench",
        "reproduce",
        "table1",
        *settings(folder),
        *decoding(folder),
        "--out",
        str(folder / "done"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        app(standalone_mode=False)
    return folder / "done"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(koala: Koala, command: str) -> None:
    result = koala(command, "--help")
    assert result.code == 0
    assert "Usage:" in result.out and command in result.out


def test_the_commands_are_those_of_the_page(koala: Koala) -> None:
    page = (ROOT / "koala_bench" / "cli" / "README.md").read_text(encoding="utf-8")
    table = page.partition("| command | does |\n")[2].partition("\n\n")[0]
    named = {span.split()[0] for row in table.splitlines() for span in re.findall("`([^`]+)`", row.split(" | ")[0])}
    assert named - set(RECIPE_NAMES) == set(COMMANDS) - set(RECIPE_NAMES)
    listed = koala("--help").out
    assert all(f" {command} " in listed for command in COMMANDS)


def test_help_of_a_command_loads_no_torch() -> None:
    code = """if True:
        import sys
        from koala_bench.cli import main

        sys.argv = ["koala-bench", "reproduce", "--help"]
        try:
            main()
        except SystemExit:
            sys.exit("torch" in sys.modules)
        """
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_table_1_is_reproduced_end_to_end(done: Path) -> None:
    files = {str(path.relative_to(done)) for path in done.rglob("*") if path.is_file()}
    trained = ("medusa", "medusa+koala", "eagle", "eagle+koala")
    heads = {
        f"heads/{method}/{name}" for method in trained for name in ("config.json", "model.safetensors", "training.json")
    }
    answers = {f"answers/target-{method}.jsonl" for method in ("vanilla", *trained)}
    assert files == {*TABLE_FILES, "records.jsonl", "heads/checkpoint.pt", "heads/training.jsonl", *heads, *answers}
    run = read_run(done / "records.jsonl")
    assert run.finished
    assert len(run.turns) == 5 * 2 * 2
    assert run.header["command"][:3] == ["koala-bench", "reproduce", "table1"]
    table = (done / "table1.md").read_text()
    assert all(
        f"| {method} |" in " ".join(table.split())
        for method in ("vanilla", "medusa", "medusa+koala", "eagle", "eagle+koala")
    )
    assert "medusa 4/4 turns" in table and "eagle+koala 4/4 turns" in table


def test_a_second_run_reuses_everything_says_so_and_writes_the_same_bytes(
    koala: Koala, folder: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in done.rglob("*") if path.is_file()}

    def never(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(evaluation, "decode", never)
    result = koala("reproduce", "table1", *settings(folder), *decoding(folder), "--out", str(done))
    assert result.code == 0
    assert f"Reusing the trained heads in {done / 'heads'}" in result.err
    assert f"Reusing the finished record {done / 'records.jsonl'}" in result.err
    assert "# Table 1" in result.out
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in done.rglob("*") if path.is_file()}
    assert before.keys() == after.keys()
    assert {path for path in before if before[path][0] != after[path][0]} == set()
    untouched = {path for path in before if path.parent.parent.name == "heads" or path.name == "records.jsonl"}
    assert {path for path in untouched if before[path] != after[path]} == set()


def test_tables_come_again_from_the_record_alone(
    koala: Koala, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "elsewhere" / "records.jsonl"
    record.parent.mkdir()
    record.write_bytes((done / "records.jsonl").read_bytes())
    monkeypatch.chdir(tmp_path)
    result = koala("table", str(record))
    assert result.code == 0
    assert sorted(Path(line).name for line in result.out.split()) == TABLE_FILES
    for name in TABLE_FILES:
        assert (record.parent / name).read_bytes() == (done / name).read_bytes(), name


def test_train_and_evaluate_are_the_same_in_two_steps(koala: Koala, folder: Path, done: Path, tmp_path: Path) -> None:
    few = ["--methods", "vanilla,eagle"]
    assert koala("train", *settings(folder), *few, "--out", str(tmp_path)).out.strip() == str(tmp_path / "heads")
    assert (tmp_path / "heads" / "eagle" / "model.safetensors").read_bytes() == (
        done / "heads" / "eagle" / "model.safetensors"
    ).read_bytes()
    result = koala("evaluate", *settings(folder), *decoding(folder), *few, "--out", str(tmp_path))
    assert result.out.strip() == str(tmp_path / "records.jsonl")
    assert [turn["new_token_ids"] for turn in read_run(tmp_path / "records.jsonl").turns_of("eagle")] == [
        turn["new_token_ids"] for turn in read_run(done / "records.jsonl").turns_of("eagle")
    ]
    assert {path.name for path in (tmp_path / "answers").iterdir()} == {"target-vanilla.jsonl", "target-eagle.jsonl"}


def test_options_are_what_the_record_says(koala: Koala, folder: Path, done: Path, tmp_path: Path) -> None:
    options = [
        "--methods",
        "medusa",
        "--tree",
        "2x1",
        "--limit",
        "1",
        "--repeats",
        "2",
        "--dtype",
        "float64",
        "--attention",
        "eager",
        "--heads",
        str(done / "heads"),
    ]
    result = koala(
        "evaluate", *settings(folder), *decoding(folder), *options, "--max-new-tokens", "3", "--out", str(tmp_path)
    )
    assert result.code == 0
    header = read_run(tmp_path / "records.jsonl").header
    assert header["methods"][1]["tree"] == {"name": "2x1", "nodes": 5, "depth": 2, "parents": [-1, 0, 0, 1, 2]}
    assert (header["target"]["dtype"], header["target"]["attention"], header["target"]["device"]) == (
        "float64",
        "eager",
        "cpu",
    )
    assert (header["limits"]["max_new_tokens"], header["measure"]["repeats"]) == (3, 2)
    assert header["preset"]["resolved"]["methods"]["eagle+koala"]["tree"] == "2x1"


def test_layers_are_those_of_every_head(koala: Koala, folder: Path, tmp_path: Path) -> None:
    assert (
        koala(
            "train",
            *settings(folder),
            "--methods",
            "eagle,medusa",
            "--layers",
            "3",
            "--seed",
            "5",
            "--out",
            str(tmp_path),
        ).code
        == 0
    )
    for method in ("eagle", "medusa"):
        assert json.loads((tmp_path / "heads" / method / "config.json").read_text())["layers"] == 3
        assert json.loads((tmp_path / "heads" / method / "training.json").read_text())["training"]["seed"] == 5


def test_names_with_quotes_and_spaces_work(koala: Koala, folder: Path, done: Path, tmp_path: Path) -> None:
    odd = tmp_path / 'it\'s "one" \\ target'
    odd.symlink_to(folder / "target")
    few = ["--methods", "eagle", "--limit", "1", "--heads", str(done / "heads")]
    result = koala(
        "evaluate", *settings(folder), *decoding(folder), *few, "--target", str(odd), "--out", str(tmp_path / "out")
    )
    assert result.code == 0, result.err
    assert read_run(tmp_path / "out" / "records.jsonl").header["target"]["name"] == str(odd)


def test_without_out_the_results_go_to_a_folder_of_the_target(
    koala: Koala, folder: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--methods", "eagle", "--limit", "1", "--heads", str(done / "heads")]
    result = koala("evaluate", *settings(folder), *decoding(folder), *few)
    assert result.out.strip() == "results/runs/table1-target-questions/records.jsonl"
    assert (tmp_path / result.out.strip()).is_file()


def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(
    koala: Koala, folder: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        "evaluate",
        *settings(folder),
        *decoding(folder),
        "--methods",
        "eagle",
        "--heads",
        str(done / "heads"),
        "--out",
        str(tmp_path),
    ]
    real, kept = evaluation.decode, tmp_path / "records.jsonl"

    def dies(*arguments: object, **options: object) -> object:
        # By the lines that are kept, not by the calls: how many calls an answer takes depends on which passes were
        # recorded before.
        if kept.is_file() and len(kept.read_text().splitlines()) == 1 + 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation, "decode", dies)
    stopped = koala(*command)
    assert (stopped.code, stopped.complaint) == (130, "koala-bench: stopped; the same command goes on where it was.")
    monkeypatch.setattr(evaluation, "decode", real)
    result = koala(*command)
    assert result.code == 0
    assert "Resuming" in result.err and "2 of 8 turns are there" in result.err


def test_the_usual_engine_replays_and_answers_the_same(koala: Koala, folder: Path, done: Path, tmp_path: Path) -> None:
    """The other commands here are told to use the eager one: recording takes longer than what they decode."""
    command = [
        "evaluate",
        *settings(folder),
        *decoding(folder),
        "--methods",
        "eagle",
        "--heads",
        str(done / "heads"),
        "--out",
        str(tmp_path),
    ]
    result = koala(*command, "--set", 'target.engine="auto"')
    assert result.code == 0, result.err
    graph, eager = read_run(tmp_path / "records.jsonl"), read_run(done / "records.jsonl")
    assert (graph.header["target"].get("engine"), eager.header["target"].get("engine")) == ("graph", None)
    wanted = {key_of(turn): turn["new_token_ids"] for turn in eager.turns}
    assert {key_of(turn): turn["new_token_ids"] for turn in graph.turns} == {
        key: wanted[key] for key in map(key_of, graph.turns)
    }


def test_heads_lists_what_is_installed(koala: Koala) -> None:
    out = koala("heads").out
    for words in (
        "medusa",
        "heads.medusa:Medusa",
        "eagle",
        "heads.eagle:Eagle",
        "koala",
        "heads.koala:Adversarial",
        "medusa/mc_sim_7b_63",
        "eagle/mc_sim_7b_63",
    ):
        assert words in out
    assert "26 nodes with the root, depth 5" in out


def test_data_lists_the_public_files_with_their_state(
    koala: Koala, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = koala("data").out
    assert "mt_bench" in out and "no data folder set" in out and "Set --data-dir or KOALA_BENCH_DATA" in out
    assert "missing" in koala("data", "--data-dir", str(folder / "empty")).out
    monkeypatch.setenv("KOALA_BENCH_DATA", str(folder / "empty"))
    assert "missing" in koala("data").out


def test_data_finds_the_public_files(koala: Koala, data_dir: Path) -> None:
    assert koala("data", "--data-dir", str(data_dir)).out.count("present") == 8


def test_benchmark_says_how_vanilla_compares_and_what_steps_and_training_take(
    koala: Koala, folder: Path, tmp_path: Path
) -> None:
    small = [
        "--device",
        "cpu",
        "--dtype",
        "float64",
        "--tokens",
        "4",
        "--rounds",
        "1",
        "--steps",
        "1",
        "--set",
        "data.limit=40",
        "--out",
        str(tmp_path),
    ]
    result = koala("benchmark", "--target", str(folder / "target"), "--methods", "vanilla,medusa,eagle", *small)
    assert result.code == 0, result.err
    assert "8 of 8 answers have the same tokens" in result.out
    assert "| 504 | 8 |" in result.out  # as far as the target's context of 512 goes
    assert "A training step of 2 heads together" in result.out
    assert (tmp_path / "benchmark.md").read_text() in result.out + "\n"
    assert (tmp_path / "figure-context.png").stat().st_size > 10_000


def test_parity_exits_with_0_or_1(koala: Koala, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from koala_bench import parity

    for status, code in (("pass", 0), ("fail", 1)):
        monkeypatch.setattr(parity, "check", lambda _, status=status: [parity.Check("a/b", status, "said so")])
        result = koala("parity", str(tmp_path))
        assert (result.code, "said so" in result.out) == (code, True)
