"""Sweeps: grids that say what is tried, trials that go on after any interruption, verdicts that follow from the lines
alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from koala_bench.errors import KoalaBenchError
from koala_bench.presets import load_preset
from koala_bench.records import statistics
from koala_bench.sweeps.grid import SweepGrid, read_grid, trials_of
from koala_bench.sweeps.results import SweepLog, confirmed, explored, markdown, open_sweep, read_sweep, to_csv, winner
from tests.support.commands import Koala
from tests.support.interrupting import interrupt_at
from tests.support.markdown import table_rows, table_under
from tests.support.small_runs import conversations
from tests.training.test_training import equal

SWEEPS = Path(__file__).parents[2] / "reproduce" / "sweeps"


# ---------------------------------------------------------------------------------------------- grids


def grid_of(**changes: Any) -> SweepGrid:
    values = {"preset": "tiny", "baseline": "eagle+layers", "method": "eagle+koala", "seeds": [0, 1], "trial": [{}]}
    return SweepGrid.model_validate({**values, **changes})


def test_the_axes_make_a_product_and_single_trials_come_before_it() -> None:
    axes = {"objective_options.weight": [0.1, 0.3], "learning_rate": [1e-3, 2e-3, 4e-3]}
    baseline, trials = trials_of(
        grid_of(axes=axes, trial=[{"objective_options.discriminator": "embedding"}]), load_preset("tiny")
    )
    assert [trial.label for trial in trials][:3] == [
        "discriminator = embedding",
        "weight = 0.1, learning_rate = 0.001",
        "weight = 0.1, learning_rate = 0.002",
    ]
    assert len(trials) == 7
    assert (
        trials[-1].preset.objective_options["weight"],
        trials[-1].preset.learning_rate,
        trials[-1].preset.layers,
    ) == (0.3, 4e-3, 2)
    assert (baseline.label, baseline.preset.objective) == ("eagle+layers", None)


def test_a_setting_may_be_written_quoted_dotted_or_nested(tmp_path: Path) -> None:
    common = 'preset = "tiny"\nbaseline = "eagle"\nmethod = "eagle+koala"\nseeds = [0]\n'
    labels = []
    for number, text in enumerate(
        (
            '[[trial]]\n"objective_options.weight" = 0.2\n',
            "[[trial]]\nobjective_options.weight = 0.2\n",
            "[[trial]]\nobjective_options = { weight = 0.2 }\n",
        )
    ):
        path = tmp_path / f"{number}.toml"
        path.write_text(common + text)
        labels.append([(trial.name, trial.label) for trial in trials_of(read_grid(path), load_preset("tiny"))[1]])
    assert labels[0] == labels[1] == labels[2] == [(labels[0][0][0], "weight = 0.2")]


def test_a_trial_keeps_its_name_in_a_larger_grid_and_with_another_tree() -> None:
    preset = load_preset("tiny")
    small = trials_of(grid_of(trial=[{"layers": 3}]), preset)[1]
    large = trials_of(
        grid_of(trial=[{"layers": 4}, {"layers": 3}]), load_preset("tiny", ['methods."eagle+koala".tree="chain-3"'])
    )[1]
    assert small[0].name == large[1].name != large[0].name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trial": []}, "nothing to try"),
        ({"axes": {"layers": 3}}, "axis 'layers' is 3"),
        ({"axes": {"layers": []}}, "axis 'layers' is \\[\\]"),
        ({"trial": [{"layers": 3}, {"layers": 3}]}, "'layers = 3' twice"),
        ({"trial": [{"training.steps": 3}]}, "'training.steps' is not a setting"),
        ({"trial": [{"tree": "chain-3"}]}, "'tree' is not a setting"),
        ({"trial": [{"objective_options": 3}]}, "'objective_options' is not a setting"),
        ({"trial": [{"layers": "two"}]}, "layers = two.*layers"),
        ({"method": "eagel+koala"}, "eagle\\+koala"),
    ],
)
def test_a_wrong_trial_is_one_clear_error(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(KoalaBenchError, match=words):
        trials_of(grid_of(**changes), load_preset("tiny"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("preset = ", "not valid TOML"),
        ('preset = "tiny"\nseedz = [1]', "baseline"),
        ('preset = "tiny"\nbaseline = "a"\nmethod = "b"\nseeds = []', "seeds"),
        ('preset = "tiny"\nbaseline = "a"\nmethod = "b"\nseeds = [0]\nseedz = [1]', "seedz"),
        ('preset = "tiny"\nbaseline = "a"\nmethod = "b"\nseeds = [0, 1]\nconfirm_seeds = [1]', "seed 1 is there twice"),
    ],
)
def test_a_wrong_grid_file_is_one_clear_error(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "grid.toml").write_text(text)
    with pytest.raises(KoalaBenchError, match=words):
        read_grid(tmp_path / "grid.toml")
    with pytest.raises(KoalaBenchError, match="Cannot read the grid"):
        read_grid(tmp_path / "none.toml")


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_grids_that_ship_name_settings_that_their_methods_have(path: Path, target: Any) -> None:
    from koala_bench.training.loop import make_arm

    grid = read_grid(path)
    preset = load_preset(grid.preset, grid.overrides)
    baseline, trials = trials_of(grid, preset)
    assert 8 <= len(trials) <= 20 and len(grid.seeds) >= 3 and grid.confirm_seeds
    assert baseline.preset.objective is None and baseline.preset.layers == preset.method(grid.method).layers
    for trial in trials:
        make_arm(target, trial.name, trial.preset, preset.training)


# ---------------------------------------------------------------------------------------------- what follows from lines

TRIALS = ["base", "one", "two"]
IDENTITY = {"new_tokens": 32, "depth": 4, "training": {"steps": 10, "batch_tokens": 256}}


def grid_line(**changes: Any) -> dict[str, Any]:
    named = [{"name": name, "label": f"label {name}", "method": {}} for name in TRIALS]
    values = {
        "kind": "grid",
        "preset": "tiny",
        "method": "eagle+koala",
        "seeds": [0, 1, 2],
        "confirm_seeds": [],
        "prompts": 12,
        "confirm_prompts": 8,
    }
    return {**values, "baseline": named[0], "trials": named, **changes}


def make_log(path: Path, gains: dict[str, float], fresh: dict[str, float] | None = None, **changes: Any) -> SweepLog:
    """Lines in which a trial accepts ``gains`` more drafts a step than the baseline, give or take noise of seed and
    prompt.
    """
    header = {"kind": "sweep", "schema": 1, "target": "tiny", "identity": IDENTITY}
    log = open_sweep(path, header)
    log.append(grid_line(**changes))
    draw = np.random.default_rng(5)
    for stage, seeds in ((gains, log.grid["seeds"]), (fresh or {}, log.grid["confirm_seeds"])):
        for seed in seeds:
            for prompt in log.prompts(seed):
                ease = draw.normal(1.5, 0.3)
                for name, gain in stage.items():
                    accepted = draw.poisson(max(ease + gain, 0), 20).clip(0, 4).tolist()
                    log.append(
                        {
                            "kind": "answer",
                            "trial": name,
                            "seed": seed,
                            "prompt": prompt,
                            "accepted": accepted,
                            "decode_s": 0.5,
                        }
                    )
                    log.trained[name, seed] = {"discriminator_accuracy": 0.75} if name != "base" else {}
    return log


def test_values_and_intervals_are_those_of_the_answers(tmp_path: Path) -> None:
    log = make_log(tmp_path / "sweep.jsonl", {"base": 0.0, "one": 0.5, "two": -0.4})
    stage = explored(log)
    assert [outcome.trial for outcome in stage.outcomes] == ["one", "base", "two"]

    def tau(name: str) -> float:
        steps = [count for seed in range(3) for accepted, _ in log.answers[name, seed].values() for count in accepted]
        return sum(steps) / len(steps) + 1

    one = stage.trials[0]
    assert one.length.value == pytest.approx(tau("one"))
    assert one.change is not None and one.change.value == pytest.approx(100 * (tau("one") / tau("base") - 1))
    assert one.length.low < one.length.value < one.length.high
    assert 0 < one.change.low < one.change.value < one.change.high
    assert (one.accuracy, stage.outcomes[1].accuracy, stage.outcomes[1].change) == (0.75, None, None)
    assert statistics.against_zero(stage.trials[1].change or one.change) == "below zero"


def test_the_search_alone_is_called_no_result(tmp_path: Path) -> None:
    log = make_log(tmp_path / "sweep.jsonl", {"base": 0.0, "one": 0.6, "two": 0.0})
    text = markdown(log)
    assert "the search is an exploration" in text and "Fresh seeds: 0 of 0 finished (none)" in text
    rows = table_rows(text)
    assert rows[1][0] == "label one" and rows[1][2].startswith("**+")


@pytest.mark.parametrize(("gain", "marked"), [(0.6, "**+"), (0.0, ""), (-0.6, "**-")])
def test_the_fresh_seeds_give_the_result_whichever_way_it_goes(tmp_path: Path, gain: float, marked: str) -> None:
    seeds = {"confirm_seeds": [10, 11, 12]}
    log = make_log(tmp_path / "sweep.jsonl", {"base": 0.0, "one": 0.6, "two": 0.1}, {"base": 0.0, "one": gain}, **seeds)
    (row,) = [
        row
        for row in table_under(markdown(log), "Confirmed on fresh seeds and fresh prompts: the result")
        if row["Trial"] == "label one"
    ]
    assert row["Change of τ (%)"].startswith(marked) and row["Change of τ (%)"].startswith("**") == bool(marked)
    assert (confirmed(log).seeds, confirmed(log).prompts) == ([10, 11, 12], 8)
    assert "Fresh seeds: 3 of 3 finished (10, 11, 12), 8 prompts" in markdown(log)
    assert len([line for line in to_csv(log).splitlines() if line.startswith("confirmation,")]) == 2


def test_a_seed_counts_once_every_trial_has_finished_it_and_nothing_is_confirmed_before_the_search_is_over(
    tmp_path: Path,
) -> None:
    whole = make_log(tmp_path / "whole.jsonl", {"base": 0.0, "one": 0.6, "two": 0.0})
    assert winner(whole) == "one"
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_text("".join(lines[:-1]))
    part = read_sweep(tmp_path / "part.jsonl")
    assert explored(part).seeds == [0, 1]
    assert winner(part) is None and confirmed(part).outcomes == []
    assert "Seeds of the search: 2 of 3 finished (0, 1)" in markdown(part)


def test_before_any_seed_is_finished_the_table_says_so(tmp_path: Path) -> None:
    log = open_sweep(tmp_path / "sweep.jsonl", {"kind": "sweep", "schema": 1, "target": "tiny", "identity": IDENTITY})
    log.append(grid_line())
    assert "no seed is finished yet" in markdown(log)


def test_one_seed_has_no_interval_and_distinguishes_nothing(tmp_path: Path) -> None:
    log = make_log(tmp_path / "sweep.jsonl", {"base": 0.0, "one": 0.6, "two": 0.0}, seeds=[0])
    assert "**+" not in markdown(log)
    assert "nan" not in markdown(log) + to_csv(log)


def test_the_table_comes_again_from_the_lines_byte_for_byte_and_without_torch(tmp_path: Path, koala: Koala) -> None:
    log = make_log(tmp_path / "sweep.jsonl", {"base": 0.0, "one": 0.6, "two": 0.0})
    log.trained.clear()  # as nothing wrote it to the file
    again = read_sweep(tmp_path / "sweep.jsonl")
    assert (markdown(log), to_csv(log)) == (markdown(again), to_csv(again))
    code = "import sys, koala_bench.sweeps.grid, koala_bench.sweeps.results; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    result = koala("sweep", "--records", str(tmp_path / "sweep.jsonl"), "--out", str(tmp_path / "again"))
    assert result.out.strip() == markdown(log).strip() == (tmp_path / "again" / "sweep.md").read_text().strip()
    assert (tmp_path / "again" / "sweep.csv").read_text() == to_csv(log)


def test_a_half_written_last_line_is_cut_off_and_other_damage_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    log = make_log(path, {"base": 0.0, "one": 0.6, "two": 0.0})
    before = path.read_bytes()
    path.write_bytes(before + b'{"kind":"answer","trial":"o')
    assert read_sweep(path).answers == log.answers
    open_sweep(path, log.header)
    assert path.read_bytes() == before
    path.write_bytes(before + b'{"kind":"answer"}\n')
    with pytest.raises(KoalaBenchError, match=r"sweep\.jsonl:\d+: "):
        read_sweep(path)
    path.write_bytes(b"")
    with pytest.raises(KoalaBenchError, match="holds no sweep"):
        read_sweep(path)


def test_numbers_that_were_made_otherwise_are_refused(tmp_path: Path) -> None:
    log = make_log(tmp_path / "sweep.jsonl", {"base": 0.0, "one": 0.6, "two": 0.0})
    with pytest.raises(KoalaBenchError, match="holds another sweep: its depth differ"):
        open_sweep(log.path, {**log.header, "identity": {**IDENTITY, "depth": 3}})


# --------------------------------------------------------------------------------------------- from a grid to a verdict


def write_grid(folder: Path, target_folder: Path, steps: int = 3, **changes: Any) -> Path:
    """A grid on the tiny target of the tests, with data whose held-out part is known."""
    data = conversations(folder, 160)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text(
        "".join(
            json.dumps({**row, "split": "held_out" if index % 20 == 0 else "train"}) + "\n"
            for index, row in enumerate(rows)
        )
    )
    overrides = [
        f"target.name='{target_folder}'", "target.engine=eager", f"data.source='{data}'", "data.max_tokens=192",
        "data.probes=1", "training.batch_tokens=256",
        f"training.steps={steps}", "training.checkpoint_every=1", "training.held_out_evaluations=1",
        "training.precision=no",
    ]  # fmt: skip
    values: dict[str, Any] = {
        "preset": "tiny",
        "overrides": overrides,
        "baseline": "eagle+layers",
        "method": "eagle+koala",
        "seeds": [0, 1],
    }
    values |= {"prompts": 3, "confirm_prompts": 2, "new_tokens": 6, "depth": 2, **changes}
    path = folder / "grid.toml"
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
    path.write_text(
        f'{text}[axes]\n"objective_options.weight" = [0.1, 0.9]\n[[trial]]\n"objective_options.discriminator" ='
        ' "sequence"\n'
    )
    return path


def numbers(path: Path) -> dict[tuple[str, int, int], list[int]]:
    """What was measured, without how long it took; every prompt once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    answers = [line for line in lines if line["kind"] == "answer"]
    found = {(line["trial"], line["seed"], line["prompt"]): line["accepted"] for line in answers}
    assert len(found) == len(answers)
    return found


def same_as_whole(done: Path, log: Path) -> None:
    """Hold the first seed's numbers and heads against those of the sweep that nobody disturbed."""
    whole, found = numbers(done / "out" / "sweep.jsonl"), numbers(log)
    assert len(found) == 12 and all(whole[key] == accepted for key, accepted in found.items())
    heads = [path.parent for path in log.parent.rglob("model.safetensors")]
    assert len(heads) == 4
    assert all(equal(head, done / "out" / "heads" / "seed-0" / "group-0" / head.name) for head in heads)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, target_folder: Path) -> Path:
    """A finished sweep of three trials with confirmation."""
    from koala_bench.sweeps.loop import run_sweep

    folder = tmp_path_factory.mktemp("sweep")
    run_sweep(read_grid(write_grid(folder, target_folder, confirm_seeds=[7, 8])), [], folder / "out")
    return folder


def test_a_sweep_trains_and_measures_every_trial_on_every_seed_and_confirms_the_best(done: Path) -> None:
    log = read_sweep(done / "out" / "sweep.jsonl")
    names = [trial["name"] for trial in log.grid["trials"]]
    found = numbers(log.path)
    assert len(names) == 4
    assert {key for key in found if key[1] in (0, 1)} == {
        (name, seed, prompt) for name in names for seed in (0, 1) for prompt in range(3)
    }
    base, best = log.grid["baseline"]["name"], winner(log)
    assert {key for key in found if key[1] in (7, 8)} == {
        (name, seed, prompt) for name in (base, best) for seed in (7, 8) for prompt in (3, 4)
    }
    assert (done / "out" / "sweep.md").read_text() == markdown(log)
    assert (done / "out" / "sweep.csv").read_text() == to_csv(log)
    assert "loss" in log.trained[names[1], 0]
    assert not list((done / "out").rglob("checkpoint.pt"))


def test_trials_are_what_training_them_by_hand_gives(done: Path, target_folder: Path, tmp_path: Path) -> None:
    """The sweep's head of the baseline is the head that ``train`` makes of the same method from the same seed."""
    from tests.training.test_training import run

    grid = read_grid(done / "grid.toml")
    run(load_preset("tiny", [*grid.overrides, "training.seed=1"]), ["eagle+layers"], tmp_path)
    base = read_sweep(done / "out" / "sweep.jsonl").grid["baseline"]["name"]
    assert equal(tmp_path / "eagle+layers", done / "out" / "heads" / "seed-1" / "group-0" / base)


def test_a_finished_sweep_trains_nothing_again_and_a_new_trial_alone_is_added(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import koala_bench.sweeps.loop as sweep

    path = done / "out" / "sweep.jsonl"
    before = path.read_bytes()
    trained: list[list[str]] = []
    real = sweep.train_heads

    def watched(preset: Any, names: list[str], *rest: Any) -> None:
        trained.append(names)
        real(preset, names, *rest)

    monkeypatch.setattr(sweep, "train_heads", watched)
    sweep.run_sweep(read_grid(done / "grid.toml"), [], done / "out")
    assert trained == [] and path.read_bytes() == before
    larger = done / "larger.toml"
    larger.write_text(
        (done / "grid.toml").read_text().replace("confirm_seeds = [7, 8]", "confirm_seeds = []")
        + '[[trial]]\n"objective_options.r1" = 1.0\n'
    )
    log = sweep.run_sweep(read_grid(larger), [], done / "out")
    assert [len(names) for names in trained] == [1, 1]
    assert "r1 = 1.0" in markdown(log)
    assert path.read_bytes().startswith(before)


@pytest.mark.parametrize("place", ["training", "decoding"])
def test_an_interrupted_sweep_goes_on_to_the_same_numbers(
    done: Path, target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Here with two heads at a time instead of four, which must not move a number either."""
    import koala_bench.sweeps.loop as sweep
    import koala_bench.training.loop as training

    grid = read_grid(write_grid(tmp_path, target_folder, seeds=[0], arms=2))
    module, name, fatal = (training, "train_step", 5) if place == "training" else (sweep, "decode", 5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, module, name, fatal)
        sweep.run_sweep(grid, [], tmp_path / "out")
    log = sweep.run_sweep(grid, [], tmp_path / "out")
    assert [len(group["trials"]) for group in log.groups[0]] == [2, 2]
    same_as_whole(done, log.path)


def test_the_memory_of_an_arm_is_counted_with_its_discriminator(target: Any) -> None:
    from koala_bench.sweeps.loop import arm_bytes
    from koala_bench.training.loop import make_arm

    preset = load_preset("tiny", ["training.precision=no"])
    plain, adversarial = (
        make_arm(target, name, preset.method(name), preset.training) for name in ("eagle+layers", "eagle+koala")
    )
    own = sum(p.numel() for p in adversarial.objective.parameters())
    assert arm_bytes(adversarial) == arm_bytes(plain) + 16 * own > 16 * plain.parameters
    assert arm_bytes(plain) == 16 * plain.parameters


def test_the_command_refuses_mistakes_in_one_line(koala: Koala, tmp_path: Path, target_folder: Path) -> None:
    assert "needs a grid" in koala("sweep").complaint
    path = write_grid(tmp_path, target_folder, prompts=300)
    assert (
        "decodes 300 held-out prompts, the data has 8"
        in koala("sweep", str(path), "--out", str(tmp_path / "out")).complaint
    )
    path.write_text(path.read_text().replace("discriminator", "discriminater"))
    result = koala("sweep", str(path), "--out", str(tmp_path / "out"))
    assert result.code == 2 and "Did you mean discriminator?" in result.complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_numbers(done: Path, target_folder: Path, tmp_path: Path) -> None:
    from koala_bench.sweeps.loop import run_sweep
    from tests.support.processes import killed

    grid = read_grid(write_grid(tmp_path, target_folder, seeds=[0]))
    out = tmp_path / "out" / "sweep.jsonl"
    for ready in (
        lambda: bool(list(out.parent.rglob("checkpoint.pt"))),
        lambda: out.exists() and out.read_text().count('"answer"') >= 4,
    ):
        assert killed(ready, run_sweep, grid, [], out.parent), "the sweep ended before it could be killed"
    run_sweep(grid, [], out.parent)
    same_as_whole(done, out)
