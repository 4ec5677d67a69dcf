"""Bad input: whatever is wrong, the command ends in one line that names thing and remedy, exit code 2, and nothing has
changed.
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from koala_bench.cli import app
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.recording import open_record
from koala_bench.presets import load_preset
from koala_bench.testing import save_tiny_target
from koala_bench.training.checkpoints import save_weights, write_state
from koala_bench.training.loop import build_head
from tests.cli.test_cli import COMMANDS
from tests.interop.test_traces import medusa_row, write
from tests.support.bad_input.cases import Case
from tests.support.bad_input.data import DATA_CASES
from tests.support.bad_input.heads import HEAD_CASES
from tests.support.bad_input.options import OPTION_CASES
from tests.support.bad_input.results import RESULT_CASES
from tests.support.bad_input.spoiling import full_disk
from tests.support.bad_input.targets import TARGET_CASES
from tests.support.commands import Koala
from tests.support.small_runs import conversations, write_questions
from tests.support.synthetic_run import make_header, make_turn, write_run

ROOT = Path(__file__).parents[2]
CASES = [*OPTION_CASES, *TARGET_CASES, *DATA_CASES, *HEAD_CASES, *RESULT_CASES]
FEWEST = 60
SMALL = (
    "--target target --device cpu --set target.engine=eager --set data.source=conversations.jsonl "
    "--set data.max_tokens=192 --set data.probes=1 --set training.batch_tokens=256 --set training.steps=2 "
    "--set training.held_out_evaluations=1"
)
ASK = "--questions questions.jsonl --max-new-tokens 6 --set evaluation.warmup=0"


def words(command: str) -> list[str]:
    return shlex.split(command.replace("SMALL", SMALL).replace("ASK", ASK))


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything is well: target, conversations, questions, answers, two records, recordings, a
    finished run in ``done``.
    """
    place = tmp_path_factory.mktemp("furnished")
    save_tiny_target(place / "target")
    conversations(place)
    write_questions(place / "questions.jsonl", [("a", ["count 5"]), ("b", ["spell it"])])
    write(place / "answers.jsonl", *(medusa_row(question) for question in range(81, 89)))
    for name in ("record", "other"):
        write_run(place / f"{name}.jsonl", header={**make_header(), "run_id": name})
    shutil.copytree(place / "target", place / "fixtures/medusa_tiny/target")
    (place / "fixtures/medusa_tiny/expected.safetensors").write_bytes(_tensors())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for command in (
            "train SMALL --methods medusa,eagle --out done",
            "evaluate SMALL ASK --methods vanilla,medusa --tree 2x1 --out done",
        ):
            patch.setattr(sys, "argv", ["koala-bench", *words(command)])
            app(standalone_mode=False)
    return place


def _tensors() -> bytes:
    """A recording with a prompt and none of its outputs."""
    import torch
    from safetensors.torch import save

    return save({"prompt0.input_ids": torch.arange(1, 9)})


@pytest.fixture
def room(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(furnished, tmp_path / "room")
    monkeypatch.chdir(tmp_path / "room")
    return tmp_path / "room"


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """What a folder holds: the bytes of files, where links lead, None for folders."""
    found: dict[str, bytes | str | None] = {}
    for path in folder.rglob("*"):
        place = str(path.relative_to(folder))
        found[place] = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def test_there_are_enough_cases_and_every_command_has_some() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= FEWEST
    assert {shlex.split(case.command)[0] for case in CASES} - {"evaluat"} == set(COMMANDS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_ends_in_one_line_and_changes_nothing(case: Case, koala: Koala, room: Path) -> None:
    case.arrange(room)
    before = contents(room)
    with case.around():
        result = koala(*words(case.command))
    assert contents(room) == before
    assert result.code == 2
    complaint = result.complaint  # asserts that it is one line, and the last one
    assert case.names in complaint
    assert case.remedy in complaint.partition(case.names)[2]
    assert "Traceback" not in result.err
    assert result.out == ""


def test_a_process_of_its_own_ends_in_the_same_way(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "koala_bench.cli", "table", str(tmp_path / "nowhere.jsonl")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("koala-bench: Cannot read the run record") and result.stderr.count("\n") == 1


def test_what_no_command_reaches_on_a_full_disk_is_told_by_name_too(target: Target, tmp_path: Path) -> None:
    """Heads and checkpoints are written by libraries with errors of their own, and after much else; the end of a record
    is its last bytes.
    """
    preset = load_preset("tiny").method("medusa")
    head = build_head(target, preset, 0)
    with open_record(tmp_path / "record.jsonl", make_header()) as writer:
        writer.append(make_turn("vanilla", 81, 0))
        before = contents(tmp_path)
        for name, write_it in {
            "model.safetensors": lambda: save_weights(tmp_path / "model.safetensors", head),
            "checkpoint.pt": lambda: write_state(
                tmp_path / "checkpoint.pt", {"identity": {}, "head": head.state_dict()}
            ),
            "record.jsonl": lambda: writer.finish(1.0),
        }.items():
            with full_disk(), pytest.raises(KoalaBenchError, match=rf"{name}.*(space|Space)"):
                write_it()
            assert contents(tmp_path) == before


def test_a_disk_that_fails_when_a_record_ends_is_told_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with open_record(tmp_path / "record.jsonl", make_header()) as writer:
        writer.append(make_turn("vanilla", 81, 0))
        monkeypatch.setattr(os, "fsync", fails)
        with pytest.raises(KoalaBenchError, match=r"record\.jsonl: Input/output error"):
            writer.finish(1.0)


def test_good_input_is_no_mistake(koala: Koala, room: Path) -> None:
    """The room itself is well, so that what a case complains of is what the case has spoilt."""
    for command in (
        "train SMALL --methods medusa,eagle --out done",
        "evaluate SMALL ASK --methods vanilla,medusa --tree 2x1 --out done",
        "verify done",
        "table record.jsonl",
        "analyse answers.jsonl",
        "check record.jsonl other.jsonl",
        "compare --records record.jsonl --head medusa",
    ):
        assert koala(*words(command)).code == 0, command
