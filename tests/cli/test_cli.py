"""What the commands do when all is well: help, the whole way to Table 1 on a tiny target, reuse, going on, and options
that reach what they should.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import koala_bench.evaluation.answering as evaluation
from koala_bench.cli import app
from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import read_run
from koala_bench.records.schema import key_of
from koala_bench.results.recipes import RECIPE_NAMES
from tests.support.commands import EAGER, Koala, decoding, settings
from tests.support.markdown import table_rows

ROOT = Path(__file__).parents[2]
COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
TABLE_FILES = ["figure1.pdf", "figure1.png", "table1.csv", "table1.md", "table1.tex"]


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


def test_table_1_is_reproduced_end_to_end(finished_run: Path) -> None:
    files = {str(path.relative_to(finished_run)) for path in finished_run.rglob("*") if path.is_file()}
    trained = ("medusa", "medusa+koala", "eagle", "eagle+koala")
    heads = {
        f"heads/{method}/{name}"
        for method in trained
        for name in ("config.json", "model.safetensors", "tokens.safetensors", "training.json")
    }
    answers = {f"answers/target-{method}.jsonl" for method in ("vanilla", *trained)}
    assert files == {*TABLE_FILES, "records.jsonl", "heads/checkpoint.pt", "heads/training.jsonl", *heads, *answers}
    run = read_run(finished_run / "records.jsonl")
    assert run.finished
    assert len(run.turns) == 5 * 2 * 2
    assert run.header["command"][:3] == ["koala-bench", "reproduce", "table1"]
    table = (finished_run / "table1.md").read_text()
    rows = table_rows(table)
    assert {"vanilla", *trained} <= {row[0] for row in rows}
    assert {method for method in trained if [method, "4/4"] in [[row[0], cell] for row in rows for cell in row]} == {
        *trained
    }


def test_a_second_run_reuses_everything_says_so_and_writes_the_same_bytes(
    koala: Koala, cli_folder: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in finished_run.rglob("*") if path.is_file()}

    def never(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(evaluation, "decode", never)
    result = koala("reproduce", "table1", *settings(cli_folder), *decoding(cli_folder), "--out", str(finished_run))
    assert result.code == 0
    assert f"Reusing the trained heads in {finished_run / 'heads'}" in result.err
    assert f"Reusing the finished record {finished_run / 'records.jsonl'}" in result.err
    assert "# Table 1" in result.out
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in finished_run.rglob("*") if path.is_file()}
    assert before.keys() == after.keys()
    assert {path for path in before if before[path][0] != after[path][0]} == set()
    untouched = {path for path in before if path.parent.parent.name == "heads" or path.name == "records.jsonl"}
    assert {path for path in untouched if before[path] != after[path]} == set()


def test_tables_come_again_from_the_record_alone(
    koala: Koala, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "elsewhere" / "records.jsonl"
    record.parent.mkdir()
    record.write_bytes((finished_run / "records.jsonl").read_bytes())
    monkeypatch.chdir(tmp_path)
    result = koala("table", str(record))
    assert result.code == 0
    assert sorted(Path(line).name for line in result.out.split()) == TABLE_FILES
    for name in TABLE_FILES:
        assert (record.parent / name).read_bytes() == (finished_run / name).read_bytes(), name


def test_train_and_evaluate_are_the_same_in_two_steps(
    koala: Koala, cli_folder: Path, finished_run: Path, tmp_path: Path
) -> None:
    few = ["--methods", "vanilla,eagle"]
    assert koala("train", *settings(cli_folder), *few, "--out", str(tmp_path)).out.strip() == str(tmp_path / "heads")
    assert (tmp_path / "heads" / "eagle" / "model.safetensors").read_bytes() == (
        finished_run / "heads" / "eagle" / "model.safetensors"
    ).read_bytes()
    result = koala("evaluate", *settings(cli_folder), *decoding(cli_folder), *few, "--out", str(tmp_path))
    assert result.out.strip() == str(tmp_path / "records.jsonl")
    assert [turn["new_token_ids"] for turn in read_run(tmp_path / "records.jsonl").turns_of("eagle")] == [
        turn["new_token_ids"] for turn in read_run(finished_run / "records.jsonl").turns_of("eagle")
    ]
    assert {path.name for path in (tmp_path / "answers").iterdir()} == {"target-vanilla.jsonl", "target-eagle.jsonl"}


def test_options_are_what_the_record_says(koala: Koala, cli_folder: Path, finished_run: Path, tmp_path: Path) -> None:
    options = [
        "--methods", "medusa", "--tree", "2x1", "--limit", "1", "--repeats", "2", "--dtype", "float64", "--attention",
        "eager", "--heads", str(finished_run / "heads"),
    ]  # fmt: skip
    result = koala(
        "evaluate",
        *settings(cli_folder),
        *decoding(cli_folder),
        *options,
        "--max-new-tokens",
        "3",
        "--out",
        str(tmp_path),
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


def test_layers_are_those_of_every_head(koala: Koala, cli_folder: Path, tmp_path: Path) -> None:
    assert (
        koala(
            "train",
            *settings(cli_folder),
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


def test_names_with_quotes_and_spaces_work(koala: Koala, cli_folder: Path, finished_run: Path, tmp_path: Path) -> None:
    odd = tmp_path / 'it\'s "one" \\ target'
    odd.symlink_to(cli_folder / "target")
    few = ["--methods", "eagle", "--limit", "1", "--heads", str(finished_run / "heads")]
    result = koala(
        "evaluate",
        *settings(cli_folder),
        *decoding(cli_folder),
        *few,
        "--target",
        str(odd),
        "--out",
        str(tmp_path / "out"),
    )
    assert result.code == 0, result.err
    assert read_run(tmp_path / "out" / "records.jsonl").header["target"]["name"] == str(odd)


def test_without_out_the_results_go_to_a_folder_of_the_target(
    koala: Koala, cli_folder: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--methods", "eagle", "--limit", "1", "--heads", str(finished_run / "heads")]
    result = koala("evaluate", *settings(cli_folder), *decoding(cli_folder), *few)
    assert result.out.strip() == "results/runs/table1-target-questions/records.jsonl"
    assert (tmp_path / result.out.strip()).is_file()


def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(
    koala: Koala, cli_folder: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        "evaluate", *settings(cli_folder), *decoding(cli_folder), "--methods", "eagle", "--heads",
        str(finished_run / "heads"), "--out", str(tmp_path),
    ]  # fmt: skip
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


def test_the_usual_engine_replays_and_answers_the_same(
    koala: Koala, cli_folder: Path, finished_run: Path, tmp_path: Path
) -> None:
    """The other commands here are told to use the eager one: recording takes longer than what they decode."""
    command = [
        "evaluate", *settings(cli_folder), *decoding(cli_folder), "--methods", "eagle", "--heads",
        str(finished_run / "heads"), "--out", str(tmp_path),
    ]  # fmt: skip
    result = koala(*command, "--set", 'target.engine="auto"')
    assert result.code == 0, result.err
    graph, eager = read_run(tmp_path / "records.jsonl"), read_run(finished_run / "records.jsonl")
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
    koala: Koala, cli_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = koala("data").out
    assert "mt_bench" in out and "no data folder set" in out and "Set --data-dir or KOALA_BENCH_DATA" in out
    assert "missing" in koala("data", "--data-dir", str(cli_folder / "empty")).out
    monkeypatch.setenv("KOALA_BENCH_DATA", str(cli_folder / "empty"))
    assert "missing" in koala("data").out


def test_data_finds_the_public_files(koala: Koala, data_dir: Path) -> None:
    assert koala("data", "--data-dir", str(data_dir)).out.count("present") == 8


def test_benchmark_says_how_vanilla_compares_and_what_steps_and_training_take(
    koala: Koala, cli_folder: Path, tmp_path: Path
) -> None:
    small = [
        "--device", "cpu", "--dtype", "float64", "--tokens", "4", "--rounds", "1", "--steps", "1", "--set",
        "data.limit=40", "--out", str(tmp_path), *EAGER,
    ]  # fmt: skip
    result = koala("benchmark", "--target", str(cli_folder / "target"), "--methods", "vanilla,medusa,eagle", *small)
    assert result.code == 0, result.err
    assert re.search(r"\| vanilla \|.*\| 8/8 \|", result.out)
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


def test_a_message_of_others_ends_in_a_full_stop_before_the_remedy() -> None:
    for message in ("too many values", "too many values."):
        assert str(KoalaBenchError(message, "Use another.")) == "too many values. Use another."
    assert str(KoalaBenchError("Nothing to add", "")) == "Nothing to add"
