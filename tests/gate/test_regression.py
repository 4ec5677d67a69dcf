"""The regression gate: its decision, its reports, and what it refuses. Its power is simulated in
test_regression_power.py.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student

from koala_bench.cli import main
from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.recording import open_record
from koala_bench.gate import regression
from koala_bench.gate.junit import to_junit, to_report
from koala_bench.gate.regression import OVERALL, check
from koala_bench.records import statistics
from koala_bench.records.reading import Run
from koala_bench.records.schema import TurnLine
from tests.support.markdown import table_rows
from tests.support.synthetic_run import failed, make_header, make_turns

ROOT = Path(__file__).parents[2]
METHODS = ["vanilla", "medusa", "eagle"]

# ---------------------------------------------------------------------------------------------- records


def cut(turn: TurnLine, steps: int) -> TurnLine:
    """The same answer when the first few steps that accepted something lose their draft: as many more steps as tokens
    lost.
    """
    accepted = list(turn["accepted"] or [])
    for place in [place for place, count in enumerate(accepted) if count][:steps]:
        accepted += [0] * accepted[place]
        accepted[place] = 0
    seconds = (turn["decode_s"] or 0.0) * len(accepted) / len(turn["accepted"] or [])
    depth = max(turn["drafted_depth"] or [0])
    return {**turn, "accepted": accepted, "drafted_depth": [depth] * len(accepted), "decode_s": seconds}


def make(
    name: str,
    change: Callable[[TurnLine], TurnLine] = lambda turn: turn,
    methods: Sequence[str] = METHODS,
    weights: str | None = None,
    **header: Any,
) -> Run:
    """A finished record named after ``name``; with ``weights`` its heads are from a training of that name."""
    head = copy.deepcopy(make_header(list(methods)))
    head["run_id"] = f"{name}-{name}"
    for place, value in header.items():
        *above, last = place.split("__")
        inner: Any = head
        for part in above:
            inner = inner[int(part)] if isinstance(inner, list) else inner[part]
        inner[last] = value
    for method in head["methods"]:
        if weights is not None and method["head"] is not None:
            method["weights_sha256"] = f"{method['name']} of {weights}"
    return Run(Path(f"{name}.jsonl"), head, [change(turn) for turn in make_turns(list(methods))], True)


def losing(method: str, steps: int) -> Callable[[TurnLine], TurnLine]:
    return lambda turn: cut(turn, steps) if turn["method"] == method else turn


def trained(name: str, questions: int, steps: int = 1) -> Run:
    """A record of another training: some of the questions lose a few steps."""
    return make(
        name,
        lambda turn: cut(turn, steps) if turn["method"] != "vanilla" and turn["question_id"] < 81 + questions else turn,
        weights=name,
    )


def written(folder: Path, run: Run, name: str = "") -> Path:
    path = folder / (name or run.path.name)
    with open_record(path, run.header) as writer:
        for turn in run.turns:
            writer.append(turn)
        writer.finish(1.0)
    return path


BASE = make("base")

# ---------------------------------------------------------------------------------------------- fixed checkpoints


def test_the_same_steps_pass_with_an_interval_without_width_and_at_any_margin() -> None:
    gate = check([BASE], [make("new")], margin=0.0)
    assert [line.name for line in gate.lines] == ["medusa", "eagle", OVERALL]
    assert all(
        (line.mode, line.change.low, line.change.value, line.change.high, line.margin) == ("fixed", 0, 0, 0, 0)
        for line in gate.lines
    )
    assert gate.passed


def test_a_loss_fires_for_its_method_and_the_lengths_are_those_of_the_totals() -> None:
    gate = check([BASE], [make("new", losing("eagle", 1))])
    medusa, eagle, overall = gate.lines
    assert (medusa.passed, eagle.passed, gate.passed) == (True, False, False)
    old, new = (run.turns_of("eagle") for run in (BASE, make("new", losing("eagle", 1))))
    tokens, before, after = (
        sum(len(turn["new_token_ids"] or []) for turn in old),
        *(sum(len(turn["accepted"] or []) for turn in side) for side in (old, new)),
    )
    assert (eagle.baseline, eagle.measured) == pytest.approx((tokens / before, tokens / after))
    assert eagle.change.value == pytest.approx(100 * (before / after - 1))
    assert eagle.change.low <= eagle.change.value <= eagle.change.high < 0
    steps = sum(len(turn["accepted"] or []) for turn in BASE.turns_of("medusa"))
    assert overall.baseline == pytest.approx(2 * tokens / (before + steps))
    assert overall.change.value == pytest.approx(100 * ((before + steps) / (after + steps) - 1))


def test_a_gain_passes_and_so_does_a_loss_within_the_margin() -> None:
    worse = make("worse", losing("eagle", 1))
    assert check([worse], [BASE]).passed
    assert check([BASE], [worse], margin=40.0).passed


def test_an_interval_that_is_not_a_number_does_not_pass() -> None:
    line = check([BASE], [make("new")]).lines[0]
    assert not replace(line, change=statistics.Interval(0.0, math.nan, math.nan)).passed


# ---------------------------------------------------------------------------------------------- retrained heads


def test_the_test_between_seeds_is_the_t_test_with_the_baselines_spread() -> None:
    old, new = np.array([2.00, 2.04, 1.97, 2.02]), np.array([1.98, 2.01])
    found = regression.retrained_change(new, old, wanted=1.0, verdicts=3)
    spread = np.log(old).std(ddof=1)
    error = spread * math.sqrt(1 / 4 + 1 / 2)
    change = np.log(new).mean() - np.log(old).mean()
    assert found.value == pytest.approx(100 * (math.exp(change) - 1))
    assert found.low == pytest.approx(100 * (math.exp(change - student.ppf(0.95, 3) * error) - 1))
    assert found.high == pytest.approx(100 * (math.exp(change + student.ppf(0.95, 3) * error) - 1))
    wide = (student.ppf(0.95, 3) + student.ppf(1 - 0.01 / 3, 3)) * error
    assert found.margin == pytest.approx(100 * (1 - math.exp(-wide)))
    assert regression.retrained_change(new, old, wanted=30.0, verdicts=3).margin == pytest.approx(30.0)
    # A new version whose seeds lie far apart does not widen its own margin.
    assert regression.retrained_change(np.array([1.0, 4.0]), old, wanted=1.0, verdicts=3).margin == pytest.approx(
        found.margin
    )


def test_the_seeds_that_are_said_to_be_enough_are_just_enough() -> None:
    needed = regression.seeds_needed(1.5, 5.0, 3)
    assert needed is not None
    for seeds, enough in ((needed, True), (needed - 1, False)):
        old = np.exp(0.015 * np.linspace(-1, 1, seeds) / np.linspace(-1, 1, seeds).std(ddof=1))
        assert (float(regression.retrained_change(old, old, 5.0, 3).margin) <= 5.0 + 1e-9) is enough
    assert regression.seeds_needed(50.0, 1.0, 3) is None


def test_retrained_heads_are_held_by_the_spread_between_the_baselines_seeds() -> None:
    seeds = [trained("a", 0), trained("b", 1), trained("c", 2), trained("d", 1)]
    gate = check(seeds, [trained("e", 1), trained("f", 0)])
    assert gate.passed
    assert all(
        line.mode == "retrained" and line.seeds == (4, 2) and line.margin > 3 and line.spread for line in gate.lines
    )
    assert any("The margin of eagle is widened from 3 %" in text and "seeds" in text for text in gate.findings)
    assert not check(seeds, [trained("e", 8, steps=4), trained("f", 8, steps=4)]).passed


def test_a_method_without_trained_weights_is_fixed_beside_retrained_ones() -> None:
    seeds = [trained("a", 0), trained("b", 1), trained("c", 2), trained("d", 1)]
    for run in seeds:
        run.methods["medusa"]["weights_sha256"] = None
        run.turns[:] = [
            turn if turn["method"] != "medusa" else next(t for t in BASE.turns if _key(t) == _key(turn))
            for turn in run.turns
        ]
    gate = check(seeds[:3], seeds[3:])
    assert [line.mode for line in gate.lines] == ["fixed", "retrained", "retrained"]
    assert gate.lines[0].change.low == 0


def _key(turn: TurnLine) -> tuple[str, int, int]:
    return turn["method"], turn["question_id"], turn["turn"]


# ---------------------------------------------------------------------------------------------- what is refused


def one_question(name: str) -> Run:
    run = make(name)
    return replace(run, turns=[turn for turn in run.turns if turn["question_id"] == 81])


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "other questions": (
        lambda: check([BASE], [make("new", questions__sha256="99" * 32)]),
        "questions.sha256 is 9999.* --questions",
    ),
    "fewer questions": (
        lambda: check([BASE], [make("new", questions__count=4)]),
        "questions.count is 4 in the one and 8 in the other.*--limit",
    ),
    "other target": (
        lambda: check([BASE], [make("new", target__weights_sha256="99" * 32)]),
        "target.weights_sha256 .*baseline's target",
    ),
    "other precision": (
        lambda: check([BASE], [make("new", target__dtype="bfloat16")]),
        "target.dtype is bfloat16 .* --dtype",
    ),
    "other limit": (
        lambda: check([BASE], [make("new", limits__max_new_tokens=32)]),
        "limits.max_new_tokens is 32 .* --max-new-tokens",
    ),
    "other rule": (lambda: check([BASE], [make("new", acceptance__rule="typical")]), "acceptance.rule is typical"),
    "other tree": (
        lambda: check(
            [BASE], [make("new", methods__2__tree={"name": "chain-2", "nodes": 3, "depth": 2, "parents": [-1, 0, 1]})]
        ),
        "the tree.name of eagle is chain-2 .*--tree",
    ),
    "missing method": (
        lambda: check([BASE], [make("new", methods=["vanilla", "eagle"])]),
        "new.jsonl lacks the method medusa.*--methods vanilla,medusa,eagle",
    ),
    "no vanilla": (
        lambda: check([make("old", methods=["eagle"])], [make("new", methods=["eagle"])]),
        "no vanilla decoding",
    ),
    "no method": (lambda: check([make("old", methods=["vanilla"])], [BASE]), "no method beside vanilla"),
    "unfinished": (lambda: check([BASE], [replace(make("new"), finished=False)]), "new.jsonl is unfinished.*goes on"),
    "the same run": (lambda: check([BASE], [BASE]), "one and the same run.*--out"),
    "a failed answer": (
        lambda: check([BASE], [make("new", lambda turn: failed(turn) if _key(turn) == ("eagle", 83, 1) else turn)]),
        "new.jsonl has no answer of eagle to question 83, turn 1",
    ),
    "one seed": (
        lambda: check([trained("a", 0)], [trained("b", 0)]),
        "fewer than 3 baseline records.*at least 3 seeds",
    ),
    "a training twice": (
        lambda: check([trained("a", 0), trained("b", 0), make("c", weights="a")], [trained("d", 0)]),
        "a.jsonl and c.jsonl have the same weights of medusa",
    ),
    "one question": (
        lambda: check([one_question("old")], [one_question("new")]),
        "share 1 answered question.*at least two",
    ),
    "another target in effect": (
        lambda: check(
            [BASE], [make("new", lambda turn: {**turn, "new_token_ids": [7, *(turn["new_token_ids"] or [])[1:]]})]
        ),
        "only 0 of 16 answers of vanilla decoding are the same.*--update",
    ),
    "nothing": (lambda: check([], []), "no record to check"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compared_is_refused_with_a_remedy(name: str) -> None:
    action, words = REFUSED[name]
    with pytest.raises(KoalaBenchError, match=words) as caught:
        action()
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def test_what_concerns_times_and_trainings_only_may_differ() -> None:
    new = make(
        "new", preset__sha256="77" * 32, target__name="/models/tiny", measure__warmup=3, seed=5, code__commit="89" * 20
    )
    assert check([BASE], [new]).passed


def test_an_upgrade_of_transformers_changes_every_configurations_hash_and_can_be_gated() -> None:
    other = {"target__config_sha256": "78" * 32}
    assert check([BASE], [make("new", **other, environment__packages__transformers="5.30.0")]).passed
    with pytest.raises(KoalaBenchError, match=r"target\.config_sha256"):
        check([BASE], [make("new", **other)])


# ---------------------------------------------------------------------------------------------- what is reported


def moved(turn: TurnLine, position: int, gap: float | None) -> TurnLine:
    tokens = list(turn["new_token_ids"] or [])
    difference = (
        {"position": position, "token": 7, "vanilla_token": tokens[position], "top2_gap": gap}
        if gap is not None
        else None
    )
    tokens[position] = 7
    return {**turn, "new_token_ids": tokens, "first_difference": difference}  # type: ignore[typeddict-item]


def test_answers_that_the_target_itself_gives_otherwise_are_left_out_with_the_turns_after_them() -> None:
    def change(turn: TurnLine) -> TurnLine:
        if (turn["question_id"], turn["turn"]) == (82, 0):
            return cut(moved(turn, 3, None), 9)
        return cut(turn, 9) if turn["question_id"] == 82 else turn  # its prompt shows the other answer

    gate = check([BASE], [make("new", change)], margin=0.0)
    assert gate.passed
    assert (gate.answers, gate.questions) == (14, 7)
    assert any("2 of 16 answers" in text for text in gate.findings)


@pytest.mark.parametrize(("gap", "reported"), [(0.5, True), (None, True), (1e-6, False)])
def test_an_answer_that_leaves_vanillas_is_reported_unless_it_is_a_tie(gap: float | None, reported: bool) -> None:
    gate = check([BASE], [make("new", lambda turn: moved(turn, 3, gap) if _key(turn) == ("eagle", 84, 1) else turn)])
    assert gate.passed
    assert (
        any(
            "NOT LOSSLESS: 1 of 16 answers of eagle" in text and "question 84, turn 1, position 3" in text
            for text in gate.findings
        )
        is reported
    )
    assert any("CHANGED ANSWERS: 1 of 16 answers of eagle" in text for text in gate.findings)


def test_other_methods_heads_and_versions_are_named() -> None:
    new = make("new", methods=[*METHODS, "eagle+koala"], methods__2__layers=3, environment__packages__torch="3.0")
    findings = "\n".join(check([BASE], [new]).findings)
    assert "do not have" not in findings
    assert "Not held, because the baseline does not have them: eagle+koala." in findings
    assert "eagle.layers" in findings
    assert "environment.packages.torch" in findings


def test_speedups_show_on_the_same_machine_and_never_decide() -> None:
    slow = make(
        "new", lambda turn: {**turn, "decode_s": 9 * (turn["decode_s"] or 0)} if turn["method"] == "eagle" else turn
    )
    gate = check([BASE], [slow])
    assert gate.passed
    assert gate.lines[1].speedups is not None
    assert gate.lines[1].speedups[1] == pytest.approx(gate.lines[1].speedups[0] / 9)
    other = check([BASE], [make("new", environment__cpu="Another CPU")])
    assert all(line.speedups is None for line in other.lines)
    assert "\N{EN DASH}" in to_report(other) and "\N{EN DASH}" not in to_report(gate).split("overall")[0]


# ---------------------------------------------------------------------------------------------- reports


def test_the_report_has_a_row_per_verdict_and_says_what_was_lost() -> None:
    text = to_report(check([BASE], [make("new", losing("eagle", 1))]))
    assert text.startswith("# Regression gate: acceptance length lost (eagle")
    rows = table_rows(text)[1:]
    assert [(row[0], row[-1]) for row in rows[:2]] == [("medusa", "pass"), ("eagle", "REGRESSION")]
    assert rows[2][:2] == ["overall", "fixed"]


def test_junit_has_a_case_per_verdict_and_survives_any_character() -> None:
    odd = make("odd\x01")
    suites = ET.fromstring(to_junit(check([odd], [make("new", losing("eagle", 1))])))
    suite = suites.find("testsuite")
    assert suites.tag == "testsuites"
    assert suite is not None
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == ["medusa", "eagle", OVERALL]
    failures = [case for case in cases if case.find("failure") is not None]
    assert suite.get("failures") == suites.get("failures") == str(len(failures))
    assert suite.get("tests") == "3"
    assert suite.get("timestamp") == "2026-02-03T04:05:06"
    failure = cases[1].find("failure")
    assert failure is not None
    assert "eagle: acceptance length" in (failure.get("message") or "")
    assert float(cases[0].get("time") or 0) > 0


# ---------------------------------------------------------------------------------------------- the command


Koala = Callable[..., tuple[int, str, str]]


@pytest.fixture
def koala(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Koala:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["koala-bench", "check", *map(str, arguments)])
        code: int | str | None = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return int(code or 0), out, err

    return run


def test_exit_codes_and_reports(koala: Koala, tmp_path: Path) -> None:
    base, same, worse = (written(tmp_path, run) for run in (BASE, make("same"), make("worse", losing("eagle", 2))))
    reports = tmp_path / "reports" / "junit.xml", tmp_path / "reports" / "report.md"
    options = ("--junit", reports[0], "--markdown", reports[1])
    code, _, err = koala(base, base, *options)
    assert (code, "the same run" in err, (tmp_path / "reports").exists()) == (2, True, False)
    code, out, err = koala(base, same, *options)
    assert code == 0, err
    assert ["eagle", "fixed"] in [row[:2] for row in table_rows(out)]
    assert reports[1].read_text(encoding="utf-8").strip() == out.strip()
    code, _, err = koala(base, worse, *options)
    assert (code, err.strip().splitlines()[-1][:41]) == (1, "Regression gate: acceptance length lost (")
    assert ET.parse(reports[0]).getroot().get("failures") != "0"
    assert koala(base, worse, "--margin", "45")[0] == 0


def test_help_names_the_margin_that_is_in_force(koala: Koala) -> None:
    assert f"{regression.MARGIN:g} by default" in " ".join(koala("--help")[1].replace("│", " ").split())


def test_update_makes_and_replaces_a_baseline_and_says_what_changed(koala: Koala, tmp_path: Path) -> None:
    base = tmp_path / "accepted" / "baseline.jsonl"
    first, second = (
        written(tmp_path, BASE),
        written(tmp_path, make("worse", losing("eagle", 1), target__dtype="float64")),
    )
    code, out, err = koala(base, first, "--update")
    assert (code, base.read_bytes() == first.read_bytes()) == (0, True), err
    assert "eagle: acceptance length" in out
    assert "(new)" in out
    code, out, _ = koala(base, second, "--update")
    assert (code, base.read_bytes() == second.read_bytes()) == (0, True)
    assert "medusa: acceptance length 1.714 -> 1.714 (+0.00 %)" in out or "(+0.00 %)" in out
    assert "target.dtype" in out
    assert [path.name for path in base.parent.iterdir()] == ["baseline.jsonl"]


def test_update_keeps_the_baseline_when_the_record_is_unfinished(koala: Koala, tmp_path: Path) -> None:
    base, new = written(tmp_path, BASE), written(tmp_path, make("new"))
    new.write_bytes(b"".join(new.read_bytes().splitlines(keepends=True)[:-1]))
    before = base.read_bytes()
    code, _, err = koala(base, new, "--update")
    assert (code, "unfinished" in err, base.read_bytes() == before) == (2, True, True)


def test_update_of_a_folder_leaves_the_new_seeds_only_and_says_if_the_old_ones_were_damaged(
    koala: Koala, tmp_path: Path
) -> None:
    folder = tmp_path / "seeds"
    runs = [written(tmp_path, trained(name, count)) for name, count in (("a", 0), ("b", 1), ("c", 2))]
    assert koala(folder, *runs, "--update")[0] == 0
    assert len(list(folder.iterdir())) == 3
    later = [written(tmp_path, trained(name, count)) for name, count in (("d", 0), ("e", 1), ("f", 1))]
    code, out, err = koala(folder, *later)
    assert (code, "retrained, 3 against 3 seeds" in out) == (0, True), err
    (folder / "broken.jsonl").write_text("{}\n", encoding="utf-8")
    code, out, err = koala(folder, *later, "--update")
    assert (code, "cannot be read" in err) == (0, True)
    assert sorted(
        json.loads(path.read_text(encoding="utf-8").splitlines()[0])["run_id"][0] for path in folder.iterdir()
    ) == ["d", "e", "f"]
    assert koala(runs[0], *later, "--update")[0] == 2
    (tmp_path / "empty").mkdir()
    assert koala(tmp_path / "empty", later[0])[0] == 2


def test_the_session_measures_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    assert spec is not None
    assert spec.loader is not None
    noxfile = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(noxfile)
    commands: list[tuple[str, ...]] = []
    old = tmp_path / "results" / "runs" / "regression" / "records.jsonl"

    class Session:
        posargs = ("--update",)

        def install(self, *_: str, **__: object) -> None:
            pass

        def run(self, *arguments: str) -> None:
            assert not old.exists()
            commands.append(arguments)

    monkeypatch.chdir(tmp_path)
    old.parent.mkdir(parents=True)
    old.write_text("an earlier record\n", encoding="utf-8")
    noxfile.regression.func(Session())
    assert [command[1] for command in commands] == ["evaluate", "check"]
    assert commands[1][3] == str(old.relative_to(tmp_path))
    assert commands[1][-1] == "--update"
