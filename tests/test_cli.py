"""The command line: the whole way to Table 1 on a tiny target, and every mistake in one line."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_evaluation import write_questions
from test_training import conversations

import koala_bench.evaluation as evaluation
from koala_bench.cli import app, main
from koala_bench.records import read_run
from koala_bench.testing import save_tiny_target

ROOT = Path(__file__).parent.parent
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
    values = ["data.max_tokens=192", "data.probes=1", "training.batch_tokens=256", "training.steps=2", "training.held_out_evaluations=1"]
    source = f"data.source={folder / 'conversations.jsonl'}"
    return ["--target", str(folder / "target"), "--device", "cpu", *(part for value in [source, *values] for part in ("--set", value))]


def decoding(folder: Path) -> list[str]:
    return ["--questions", str(folder / "questions.jsonl"), "--max-new-tokens", "6", "--set", "evaluation.warmup=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad input side by side."""
    place = tmp_path_factory.mktemp("cli")
    save_tiny_target(place / "target")
    conversations(place)
    questions = write_questions(place / "questions.jsonl", [("a", ["count 5", "and 6"]), ("b", ["spell it", "again"])])
    (place / "bad-questions.jsonl").write_text(questions.read_text().splitlines()[0] + "\n{not json\n")
    (place / "no-questions.jsonl").write_text("\n")
    (place / "file").write_text("just a text\n")
    (place / "empty").mkdir()
    (place / "damaged.jsonl.gz").write_bytes(gzip.compress(b"{}" * 4000)[:-20])
    (place / "bad-conversations.jsonl").write_text('{"conversations": []}\n{"conversations": [\n')
    (place / "few-conversations.jsonl").write_text('{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n')
    (place / "broken.toml").write_text("[target\n")
    (place / "incomplete.toml").write_text("[target]\nname = 'tiny'\n")
    (place / "tree.json").write_text("5")
    (place / "orphan.json").write_text("[[0], [1, 0]]")
    damaged = save_tiny_target(place / "damaged-target")
    (damaged / "model.safetensors").write_bytes(b"x" * 100)
    return place


@pytest.fixture(scope="module")
def done(folder: Path) -> Path:
    """A finished run of ``reproduce table1``."""
    command = ["koala-bench", "reproduce", "table1", *settings(folder), *decoding(folder), "--out", str(folder / "done")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        app(standalone_mode=False)
    return folder / "done"


# ------------------------------------------------------------------------------ what works


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(koala: Koala, command: str) -> None:
    result = koala(command, "--help")
    assert result.code == 0
    assert "Usage:" in result.out and command in result.out


def test_the_commands_are_those_of_the_readme(koala: Koala) -> None:
    listed = koala("--help").out
    assert {
        "pretrain",
        "distill",
        "sweep",
        "train",
        "evaluate",
        "table",
        "figure",
        "reproduce",
        "parity",
        "heads",
        "data",
        "benchmark",
        "audit",
        "verify",
        "analyse",
        "check",
        "new-head",
        "check-head",
        "compare",
    } == set(COMMANDS)
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
    heads = {f"heads/{method}/{name}" for method in trained for name in ("config.json", "model.safetensors", "training.json")}
    answers = {f"answers/target-{method}.jsonl" for method in ("vanilla", *trained)}
    assert files == {*TABLE_FILES, "records.jsonl", "heads/checkpoint.pt", "heads/training.jsonl", *heads, *answers}
    run = read_run(done / "records.jsonl")
    assert run.finished
    assert len(run.turns) == 5 * 2 * 2
    assert run.header["command"][:3] == ["koala-bench", "reproduce", "table1"]
    table = (done / "table1.md").read_text()
    assert all(f"| {method} |" in " ".join(table.split()) for method in ("vanilla", "medusa", "medusa+koala", "eagle", "eagle+koala"))
    assert "medusa 4/4 turns" in table and "eagle+koala 4/4 turns" in table


def test_a_second_run_reuses_everything_says_so_and_writes_the_same_bytes(koala: Koala, folder: Path, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_tables_come_again_from_the_record_alone(koala: Koala, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert (tmp_path / "heads" / "eagle" / "model.safetensors").read_bytes() == (done / "heads" / "eagle" / "model.safetensors").read_bytes()
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
    result = koala("evaluate", *settings(folder), *decoding(folder), *options, "--max-new-tokens", "3", "--out", str(tmp_path))
    assert result.code == 0
    header = read_run(tmp_path / "records.jsonl").header
    assert header["methods"][1]["tree"] == {"name": "2x1", "nodes": 5, "depth": 2, "parents": [-1, 0, 0, 1, 2]}
    assert (header["target"]["dtype"], header["target"]["attention"], header["target"]["device"]) == ("float64", "eager", "cpu")
    assert (header["limits"]["max_new_tokens"], header["measure"]["repeats"]) == (3, 2)
    assert header["preset"]["resolved"]["methods"]["eagle+koala"]["tree"] == "2x1"


def test_layers_are_those_of_every_head(koala: Koala, folder: Path, tmp_path: Path) -> None:
    assert koala("train", *settings(folder), "--methods", "eagle,medusa", "--layers", "3", "--seed", "5", "--out", str(tmp_path)).code == 0
    for method in ("eagle", "medusa"):
        assert json.loads((tmp_path / "heads" / method / "config.json").read_text())["layers"] == 3
        assert json.loads((tmp_path / "heads" / method / "training.json").read_text())["training"]["seed"] == 5


def test_names_with_quotes_and_spaces_work(koala: Koala, folder: Path, done: Path, tmp_path: Path) -> None:
    odd = tmp_path / 'it\'s "one" \\ target'
    odd.symlink_to(folder / "target")
    few = ["--methods", "eagle", "--limit", "1", "--heads", str(done / "heads")]
    result = koala("evaluate", *settings(folder), *decoding(folder), *few, "--target", str(odd), "--out", str(tmp_path / "out"))
    assert result.code == 0, result.err
    assert read_run(tmp_path / "out" / "records.jsonl").header["target"]["name"] == str(odd)


def test_without_out_the_results_go_to_a_folder_of_the_target(koala: Koala, folder: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--methods", "eagle", "--limit", "1", "--heads", str(done / "heads")]
    result = koala("evaluate", *settings(folder), *decoding(folder), *few)
    assert result.out.strip() == "results/runs/table1-target-questions/records.jsonl"
    assert (tmp_path / result.out.strip()).is_file()


def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(koala: Koala, folder: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["evaluate", *settings(folder), *decoding(folder), "--methods", "eagle", "--heads", str(done / "heads"), "--out", str(tmp_path)]
    real, calls = evaluation.decode, 0

    def dies(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation, "decode", dies)
    stopped = koala(*command)
    assert (stopped.code, stopped.complaint) == (130, "koala-bench: stopped; the same command goes on where it was.")
    result = koala(*command)
    assert result.code == 0
    assert "Resuming" in result.err and "2 of 8 turns are there" in result.err


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


def test_data_lists_the_public_files_with_their_state(koala: Koala, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = koala("data").out
    assert "mt_bench" in out and "no data folder set" in out and "Set --data-dir or KOALA_BENCH_DATA" in out
    assert "missing" in koala("data", "--data-dir", str(folder / "empty")).out
    monkeypatch.setenv("KOALA_BENCH_DATA", str(folder / "empty"))
    assert "missing" in koala("data").out


def test_data_finds_the_public_files(koala: Koala, data_dir: Path) -> None:
    assert koala("data", "--data-dir", str(data_dir)).out.count("present") == 8


def test_benchmark_says_how_vanilla_compares(koala: Koala, folder: Path) -> None:
    result = koala("benchmark", "--target", str(folder / "target"), "--device", "cpu", "--dtype", "float64", "--tokens", "4", "--rounds", "1")
    assert result.code == 0
    assert "8 of 8 answers have the same tokens" in result.out


def test_parity_exits_with_0_or_1(koala: Koala, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from koala_bench import parity

    for status, code in (("pass", 0), ("fail", 1)):
        monkeypatch.setattr(parity, "check", lambda _, status=status: [parity.Check("a/b", status, "said so")])
        result = koala("parity", str(tmp_path))
        assert (result.code, "said so" in result.out) == (code, True)


def test_the_installed_command_is_the_same(folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "koala_bench.cli", "table", str(folder / "nowhere.jsonl")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ},
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("koala-bench: Cannot read the run record") and result.stderr.count("\n") == 1


# ------------------------------------------------------------------------------ what does not

# Name of the case -> options after `reproduce table1` with a small target and data, and what the line must name.
# {} is the folder of good and bad input.
WRONG: dict[str, tuple[list[str], str]] = {
    "preset": (["--preset", "vicuna-7"], "vicuna-7b"),
    "preset file": (["--preset", "{}/none.toml"], "none.toml"),
    "preset not toml": (["--preset", "{}/broken.toml"], "broken.toml is not valid TOML"),
    "preset incomplete": (["--preset", "{}/incomplete.toml"], "incomplete.toml, training.learning_rate: Field required"),
    "preset a folder": (["--preset", "{}/empty"], "empty"),
    "quick": (["--preset", "vicuna-7b", "--quick"], "no quick form"),
    "method": (["--methods", "vanilla,medusa,eagel"], "eagle"),
    "method twice": (["--methods", "eagle,eagle"], "twice"),
    "no method": (["--methods", ","], "names no method"),
    "empty methods": (["--methods", ""], "names no method"),
    "vanilla alone": (["--methods", "vanilla"], "nothing to compare"),
    "tree": (["--tree", "oak"], "'oak'"),
    "tree too deep": (["--tree", "chain-5", "--methods", "eagle,medusa"], "5 levels deep, the head drafts only 4"),
    "tree too wide": (["--tree", "260x1"], "needs 260 candidates"),
    "tree too large": (["--tree", "64x64x64"], "4096"),
    "empty tree": (["--tree", ""], "Unknown tree ''"),
    "tree file": (["--tree", "{}/none.json"], "none.json"),
    "tree file no list": (["--tree", "{}/tree.json"], "tree.json"),
    "tree without parent": (["--tree", "{}/orphan.json"], "the parent of [1, 0] is missing"),
    "questions": (["--questions", "mtbench"], "mt_bench"),
    "empty questions": (["--questions", ""], "''"),
    "questions file": (["--questions", "{}/none.jsonl"], "none.jsonl"),
    "questions a folder": (["--questions", "{}/empty"], "is a folder"),
    "questions bad line": (["--questions", "{}/bad-questions.jsonl"], "bad-questions.jsonl, line 2"),
    "no questions": (["--questions", "{}/no-questions.jsonl"], "has no questions"),
    "data folder": (["--questions", "mt_bench", "--data-dir", "{}/nowhere"], "no data folder"),
    "data folder a file": (["--questions", "mt_bench", "--data-dir", "{}/file"], "no data folder"),
    "questions not there": (["--questions", "mt_bench", "--data-dir", "{}/empty"], "has no questions 'mt_bench'"),
    "target": (["--target", "{}/nowhere"], "nowhere"),
    "target a file": (["--target", "{}/file"], "file"),
    "target empty": (["--target", "{}/empty"], "empty"),
    "target damaged": (["--target", "{}/damaged-target"], "damaged-target"),
    "device": (["--device", "gpu"], "'gpu' is not a device"),
    "device not there": (["--device", "cuda:99"], "cuda:99"),
    "dtype": (["--dtype", "int8"], "'int8' is not a dtype"),
    "attention": (["--attention", "magic"], "magic"),
    "chat template": (["--set", "target.chat_template=vicuna"], "vicuna_v1.1"),
    "set key": (["--set", "training.stepz=4"], "training.stepz"),
    "set section": (["--set", "trainink.steps=4"], "trainink"),
    "set without value": (["--set", "training.steps"], "'training.steps' is not an override"),
    "set without key": (["--set", "=4"], "'=4' is not an override"),
    "set below a value": (["--set", "training.steps.more=4"], "goes below a value"),
    "set open quote": (["--set", 'methods."eagle.layers=2'], 'methods."eagle.layers'),
    "set a word": (["--set", "training.steps=many"], "training.steps"),
    "set zero": (["--set", "training.steps=0"], "training.steps"),
    "negative steps": (["--set", "training.steps=-5"], "training.steps"),
    "negative rate": (["--set", "training.learning_rate=-0.1"], "training.learning_rate"),
    "rate not a number": (["--set", "training.learning_rate=nan"], "training.learning_rate"),
    "rate infinite": (["--set", "training.learning_rate=inf"], "training.learning_rate"),
    "betas": (["--set", "training.betas=[2.0, 3.0]"], "training.betas"),
    "precision": (["--set", "training.precision=fp8"], "training.precision"),
    "negative seed": (["--set", "training.seed=-1"], "training.seed"),
    "large seed": (["--set", "training.seed=99999999999999999999"], "training.seed"),
    "head": (["--set", "methods.eagle.head=eagel"], "eagle"),
    "head file": (["--set", "methods.eagle.head=./none.py:Head"], "none.py"),
    "head module": (["--set", "methods.eagle.head=no.such:Head"], "no.such"),
    "head class": (["--set", "methods.eagle.head=heads.eagle:Hawk"], "Hawk"),
    "head not a name": (["--set", "methods.eagle.head=':'"], "no module ''"),
    "head relative": (["--set", "methods.eagle.head='..heads:Eagle'"], "'..heads'"),
    "head not a class": (["--set", "methods.eagle.head='heads.eagle:annotations'"], "annotations"),
    "head option": (["--set", "methods.eagle.options.noize=0.1"], "noise"),
    "head option kind": (["--set", "methods.medusa.options.heads=four"], "heads is 'four'"),
    "head option negative": (["--set", "methods.medusa.options.heads=-1"], "heads=-1"),
    "objective": (["--set", 'methods."eagle+koala".objective=coala'], "koala"),
    "objective option": (["--set", 'methods."eagle+koala".objective_options.wait=1'], "weight"),
    "objective weight": (["--set", 'methods."eagle+koala".objective_options.weight=-1'], "-1"),
    "discriminator": (["--set", 'methods."eagle+koala".objective_options.discriminator=fake'], "'fake'"),
    "source": (["--set", "data.source={}/none.jsonl"], "none.jsonl"),
    "source a folder": (["--set", "data.source={}/empty"], "empty"),
    "source damaged": (["--set", "data.source={}/damaged.jsonl.gz"], "damaged.jsonl.gz is damaged"),
    "source bad line": (["--set", "data.source={}/bad-conversations.jsonl"], "bad-conversations.jsonl, line 2"),
    "source too small": (["--set", "data.source={}/few-conversations.jsonl"], "few-conversations.jsonl"),
    "samples longer than a batch": (["--set", "data.max_tokens=300"], "300"),
    "nothing to learn": (["--set", "data.max_tokens=9"], "within its first 9 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_ends_in_one_line_and_leaves_nothing(koala: Koala, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    options, words = WRONG[name]
    result = koala("reproduce", "table1", *settings(folder), *decoding(folder), "--out", "out", *(part.replace("{}", str(folder)) for part in options))
    assert result.code == 2
    assert words in result.complaint
    assert result.out == ""
    assert list(tmp_path.iterdir()) == []


# The same for other commands; whole command lines. {} as above, {done} is a finished run.
WRONG_COMMANDS: dict[str, tuple[list[str], str]] = {
    "recipe": (["reproduce", "table9"], "table9"),
    "evaluate without heads": (["evaluate", "SMALL", "--out", "out"], "no trained head in out/heads/medusa"),
    "evaluate heads elsewhere": (["evaluate", "SMALL", "--heads", "{}/nowhere", "--out", "out"], "nowhere/medusa"),
    "evaluate heads a file": (["evaluate", "SMALL", "--heads", "{}/file", "--out", "out"], "file/medusa"),
    "evaluate another tree on a record": (["evaluate", "SMALL", "--tree", "chain-2", "--out", "{done}"], "records.jsonl holds another run"),
    "evaluate out below a file": (["evaluate", "SMALL", "--heads", "{done}/heads", "--out", "{}/file/out"], "file/out"),
    "train out below a file": (["train", "SMALL", "--out", "{}/file/out"], "file/out"),
    "train out a file": (["train", "SMALL", "--out", "{}/file"], "file/heads"),
    "train otherwise": (["train", "SMALL", "--set", "training.steps=3", "--out", "{done}"], "belongs to another run: its training differs"),
    "reproduce out below a file": (["reproduce", "table1", "SMALL", "--out", "{}/file/out"], "file/out"),
    "pretrain out below a file": (["pretrain", "--out", "{}/file/out"], "file/out"),
    "pretrain device": (["pretrain", "--device", "gpu", "--out", "out"], "'gpu' is not a device"),
    "pretrain empty device": (["pretrain", "--device", "", "--out", "out"], "'' is not a device"),
    "table no record": (["table", "{}/none.jsonl"], "none.jsonl"),
    "table a folder": (["table", "{}/empty"], "empty: Is a directory"),
    "table no record at all": (["table", "{}/file"], "file:1: not a line of JSON"),
    "table questions": (["table", "{}/questions.jsonl"], "is not a run record"),
    "table damaged record": (["table", "{}/damaged-record.jsonl", "--out", "out"], "damaged-record.jsonl:3"),
    "table vanilla alone": (["table", "{}/vanilla-record.jsonl", "--out", "out"], "no method beside vanilla"),
    "table twice the same": (["table", "{done}/records.jsonl", "{done}/records.jsonl", "--out", "out"], "of the same target"),
    "table out below a file": (["table", "{done}/records.jsonl", "--out", "{}/file/out"], "file/out"),
    "table spec": (["table", "{done}/records.jsonl", "--spec", "{}/none.toml", "--out", "out"], "none.toml"),
    "table spec not toml": (["table", "{done}/records.jsonl", "--spec", "{}/broken.toml", "--out", "out"], "broken.toml is not TOML"),
    "table paper": (["table", "{done}/records.jsonl", "--paper", "{}/incomplete.toml", "--out", "out"], "incomplete.toml"),
    "parity": (["parity", "{}/nowhere"], "no folder"),
    "parity a file": (["parity", "{}/file"], "no folder"),
    "parity empty": (["parity", "{}/empty"], "holds none of"),
    "data": (["data", "mtbench", "--data-dir", "out"], "mt_bench"),
    "data without folder": (["data", "mt_bench"], "No data folder is set"),
    "data all without folder": (["data", "--all"], "No data folder is set"),
    "benchmark target": (["benchmark", "--target", "{}/empty"], "empty"),
    "benchmark preset": (["benchmark", "--preset", "small"], "'small'"),
    "benchmark tokens": (["benchmark", "--target", "{}/target", "--device", "cuda:99"], "cuda:99"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad_records(folder: Path, done: Path) -> None:
    lines = (done / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "damaged-record.jsonl").write_text("".join([*lines[:2], lines[2][:50] + "\n", *lines[3:]]))
    header = json.loads(lines[0])
    header["methods"] = header["methods"][:1]
    kept = [line for line in lines[1:-1] if json.loads(line)["method"] == "vanilla"]
    (folder / "vanilla-record.jsonl").write_text("".join([json.dumps(header) + "\n", *kept]))


def expand(arguments: Sequence[str], folder: Path, done: Path) -> list[str]:
    small = [*settings(folder), "--questions", str(folder / "questions.jsonl"), "--max-new-tokens", "6"]
    found: list[str] = []
    for part in arguments:
        options = small if arguments[0] != "train" else settings(folder)
        found += options if part == "SMALL" else [part.replace("{done}", str(done)).replace("{}", str(folder))]
    return found


@pytest.mark.usefixtures("bad_records")
@pytest.mark.parametrize("name", WRONG_COMMANDS)
def test_wrong_commands_end_in_one_line_and_leave_nothing(
    koala: Koala, folder: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    arguments, words = WRONG_COMMANDS[name]
    result = koala(*expand(arguments, folder, done))
    assert result.code == 2
    assert words in result.complaint
    assert result.out == ""
    assert list(tmp_path.iterdir()) == []
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["reproduce", "table1", "--limit", "0"], ["reproduce", "table1", "--layers", "-1"], ["reproduce", "table1", "--max-new-tokens", "many"],
        ["train", "--seed", "-1"], ["pretrain", "--out", "x", "--seed", "-1"], ["pretrain", "--out", "x", "--steps", "0"], ["pretrain"],
        ["evaluate", "--repeats", "1.5"], ["table"], ["reproduce"], ["benchmark", "--tokens", "1"], ["evaluat"], ["train", "--steps", "3"], ["heads", "more"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_options_of_the_wrong_kind_exit_with_2(koala: Koala, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    result = koala(*arguments)
    assert result.code == 2
    assert result.complaint.endswith(" --help.") and "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []
