"""`koala-bench verify`: what still matches its record, what does not, and what cannot be said here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from koala_bench.common.bundled import RECIPES
from koala_bench.common.files import sha256_of
from koala_bench.dialogues.questions import bundled_questions, questions_sha256
from koala_bench.evaluation.recording import open_record
from koala_bench.interop.answers import write_fastchat_answers
from koala_bench.presets import resolved_sha256
from koala_bench.records.reading import read_run
from koala_bench.results.integrity import verify, verify_below
from koala_bench.results.making import make_table
from tests.support.commands import Koala
from tests.support.synthetic_run import make_header, make_turns


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder as ``reproduce table1`` leaves it, with one head's weights."""
    import torch

    head = tmp_path / "heads" / "eagle" / "model.safetensors"
    head.parent.mkdir(parents=True)
    save_file({"weight": torch.ones(3)}, head)
    header = make_header()
    header["preset"]["sha256"] = resolved_sha256(header["preset"]["resolved"])
    header["questions"]["sha256"] = questions_sha256(bundled_questions())
    next(method for method in header["methods"] if method["name"] == "eagle")["weights_sha256"] = sha256_of(head)
    with open_record(tmp_path / "records.jsonl", header) as writer:
        for turn in make_turns():
            writer.append(turn)
        writer.finish(1.0)
    run = read_run(tmp_path / "records.jsonl")
    make_table([run], tmp_path, RECIPES / "table1.toml")
    write_fastchat_answers(run, tmp_path / "answers")
    return tmp_path


def states(folder: Path) -> dict[str, str]:
    return {check.subject: check.state for check in verify(folder)[1]}


def test_an_untouched_folder_matches_and_missing_weights_are_not_called_a_match(results: Path) -> None:
    found = states(results)
    assert {subject for subject, state in found.items() if state == "not here"} == {
        "head medusa",
        "head medusa+koala",
        "head eagle+koala",
    }
    assert "differs" not in found.values()
    assert {
        "record",
        "preset",
        "questions bundled",
        "head eagle",
        "table1.md",
        "table1.tex",
        "table1.csv",
        "figure1.pdf",
        "figure1.png",
    } <= found.keys()
    assert "answers/tiny-eagle.jsonl" in found


@pytest.mark.parametrize(
    ("file", "old", "new", "subject"),
    [
        ("table1.md", "eagle", "eagIe", "table1.md"),
        ("table1.csv", "1", "2", "table1.csv"),
        ("answers/tiny-eagle.jsonl", '"index": 0', '"index": 1', "answers/tiny-eagle.jsonl"),
        ("records.jsonl", '"max_new_tokens":64}}', '"max_new_tokens":65}}', "preset"),
        ("records.jsonl", '"decode_s":0.', '"decode_s":1.', "table1.csv"),
    ],
)
def test_what_was_changed_by_hand_is_named(results: Path, file: str, old: str, new: str, subject: str) -> None:
    text = (results / file).read_text()
    assert old in text
    (results / file).write_text(text.replace(old, new, 1))
    assert states(results)[subject] == "differs"


def test_other_weights_and_a_record_without_its_end_differ(results: Path) -> None:
    (results / "heads" / "eagle" / "model.safetensors").write_bytes(b"other")
    record = results / "records.jsonl"
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:-1]))
    found = states(results)
    assert found["head eagle"] == found["record"] == "differs"


def with_checkpoint(results: Path, checkpoint: Path) -> None:
    """Have the record say that its EAGLE head was read from there."""
    record = results / "records.jsonl"
    old = '"checkpoint":"heads/eagle",'
    text = record.read_text()
    assert old in text
    record.write_text(text.replace(old, f'"checkpoint":"{checkpoint.as_posix()}",', 1))


def test_a_path_elsewhere_that_holds_other_weights_by_now_is_no_difference(results: Path, tmp_path: Path) -> None:
    """Records name the folder of a training; whoever trains there again has other heads."""
    elsewhere = tmp_path / "runs" / "heads" / "eagle"
    elsewhere.parent.mkdir(parents=True)
    (results / "heads" / "eagle").rename(elsewhere)
    with_checkpoint(results, elsewhere)
    assert states(results)["head eagle"] == "matches"
    (elsewhere / "model.safetensors").write_bytes(b"other")
    (found,) = [check for check in verify(results)[1] if check.subject == "head eagle"]
    assert found.state == "not here" and "now holds other weights" in found.detail


@pytest.mark.parametrize("record", ["records.jsonl", "regression.jsonl"])
def test_heads_that_shipped_are_looked_for_in_the_package_wherever_the_command_runs(
    results: Path, record: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies beside the record, since the gate keeps baselines of several targets in one folder; better heads
    may ship since, and the record stays what it was."""
    monkeypatch.chdir(results)
    with_checkpoint(results, Path("koala_bench/targets/smollm2-135m/heads/eagle"))
    (results / "records.jsonl").rename(results / record)
    assert [each.state for each in verify_below(results)] == ["matches"]
    if record == "records.jsonl":
        assert states(results)["head eagle"] == "not here"


def test_the_command_exits_with_1_when_something_differs(results: Path, koala: Koala) -> None:
    fine = koala("verify", str(results))
    assert fine.code == 0 and "not here" in fine.out and "commit 0123456789abcdef" in fine.out
    (results / "table1.tex").write_text("")
    changed = koala("verify", str(results))
    assert changed.code == 1 and "differs   table1.tex" in changed.out
    assert koala("verify", str(results / "nowhere")).code == 2


def test_all_folders_below_one_are_verified_in_a_line_each(results: Path, tmp_path: Path, koala: Koala) -> None:
    import shutil

    root = tmp_path / "all"
    for name in ("one", "deep/two"):
        shutil.copytree(results, root / name, ignore=shutil.ignore_patterns("all"))
    fine = koala("verify", str(root))
    assert fine.code == 0
    assert [line.split()[:2] for line in fine.out.splitlines()] == [
        ["matches", str(root / "deep" / "two")],
        ["matches", str(root / "one")],
    ]
    (root / "one" / "table1.tex").write_text("")
    changed = koala("verify", str(root))
    assert changed.code == 1 and "differs: table1.tex" in changed.out
    record = (root / "one" / "records.jsonl").read_bytes()
    again = koala("verify", str(root), "--update")
    assert again.code == 0 and (root / "one" / "records.jsonl").read_bytes() == record
    (root / "one" / "records.jsonl").write_text("{")
    damaged = koala("verify", str(root))
    assert damaged.code == 2 and damaged.out.count("\n") == 2 and "damaged" in damaged.out


def test_folders_without_a_record_are_named_and_baselines_are_records(results: Path, koala: Koala) -> None:
    for name in ("one", "gate"):
        (results / "all" / name).mkdir(parents=True)
    (results / "records.jsonl").rename(results / "all" / "gate" / "baseline.jsonl")
    (results / "table1.md").rename(results / "all" / "one" / "page.md")
    (results / "all" / "README.md").write_text("by hand")
    fine = koala("verify", str(results / "all"))
    assert fine.code == 0
    assert [line.split("/")[0].strip() for line in fine.out.splitlines()] == ["matches", "no record"]
    assert str(results / "all" / "one") in fine.out
    baseline = results / "all" / "gate" / "baseline.jsonl"
    baseline.write_text(baseline.read_text().replace('"max_new_tokens":64}}', '"max_new_tokens":65}}', 1))
    changed = koala("verify", str(results / "all"))
    assert changed.code == 1 and "differs: preset of baseline.jsonl" in changed.out
    baseline.write_text(baseline.read_text().replace('"turns":', '"turms":', 1))
    assert koala("verify", str(results / "all")).code == 2
    alone = koala("verify", str(results / "all" / "one"))
    assert alone.code == 2 and "no records.jsonl" in alone.err and alone.out == ""


def test_update_makes_only_what_lies_there(results: Path) -> None:
    (results / "figure1.pdf").unlink()
    (results / "figure1.png").unlink()
    before = {path.name for path in results.iterdir()}
    (found,) = verify_below(results, update=True)
    assert found.state == "matches"
    assert {path.name for path in results.iterdir()} - before <= {"figure1.pdf", "figure1.png"}


def test_seeds_and_tasks_belong_to_their_folder(results: Path) -> None:
    import shutil

    for part in ("seed-1", "tasks/humaneval"):
        (results / part).mkdir(parents=True)
        shutil.copy(results / "records.jsonl", results / part)
    assert [each.folder for each in verify_below(results)] == [results]


def test_the_places_of_files_are_no_part_of_a_presets_hash() -> None:
    from koala_bench.presets import load_preset

    plain = load_preset("tiny")
    moved = load_preset(
        "tiny", ["target.name='/elsewhere/tiny'", "evaluation.questions='copy.jsonl'", "data.source='chats.json'"]
    )
    assert moved.sha256 == plain.sha256 == resolved_sha256(plain.model_dump(mode="json"))
    assert load_preset("tiny", ["target.dtype='float64'"]).sha256 != plain.sha256


KEPT = sorted(path for path in (Path(__file__).parents[2] / "results").rglob("*.jsonl") if "runs" not in path.parts)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: str(path.relative_to(path.parents[2])))
def test_no_record_that_is_kept_names_a_place_on_the_machine_that_made_it(path: Path) -> None:
    with path.open(encoding="utf-8") as lines:
        header = json.loads(next(lines))
    places = [
        *header.get("command", []),
        *(method["checkpoint"] or "" for method in header.get("methods", []) if isinstance(method, dict)),
    ]
    assert not [place for place in places if Path(place).is_absolute()]
