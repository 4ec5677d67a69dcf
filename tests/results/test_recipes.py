"""What each recipe runs: methods, seeds, question files and folders; and the whole way of `reproduce all` on a tiny
target.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from koala_bench.errors import KoalaBenchError
from koala_bench.presets import load_preset, usual_methods
from koala_bench.records.reading import read_run
from koala_bench.results.integrity import verify
from koala_bench.results.making import FIGURES, RECORD
from koala_bench.results.recipes import Plan, layers_of_variants, plan, with_layers
from tests.support.commands import Koala, decoding, settings
from tests.support.markdown import table_rows
from tests.support.small_runs import write_questions

TABLES = ("table1", "table2", "table3")
FOUR = ["medusa", "medusa+koala", "eagle", "eagle+koala"]
PARTS = [
    "medusa",
    "medusa+layers",
    "medusa+adversarial",
    "medusa+koala",
    "eagle",
    "eagle+layers",
    "eagle+adversarial",
    "eagle+koala",
]


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KOALA_BENCH_DATA", raising=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("spec_bench", "humaneval"):
        (tmp_path / "eval" / name).mkdir(parents=True)
        write_questions(tmp_path / "eval" / name / "question.jsonl", [("code", ["count 5"])])
    return tmp_path


USUAL_FIGURES = tuple(
    name for name in FIGURES if name not in ("cost", "tokens", "vocabulary")
)  # these take trainings of their own


def planned(what: str, data_dir: Path | None = None, preset: str = "tiny", **options: object) -> Plan:
    chosen = {"methods": None, "questions_given": False, "seeds": True, **options}
    return plan(what, load_preset(preset), preset, Path("F"), data_dir, **chosen)  # type: ignore[arg-type]


def places(of: Plan) -> list[tuple[str, str]]:
    return [(str(job.record), str(job.heads)) for job in of.jobs]


def test_table_1_runs_the_usual_methods_with_the_preset_as_it_is() -> None:
    found = planned("table1")
    assert places(found) == [("F/records.jsonl", "F/heads")]
    assert list(found.jobs[0].methods) == ["vanilla", *FOUR]
    assert found.jobs[0].preset == load_preset("tiny")
    assert (found.products, found.remarks) == (("table1",), ())


def test_table_3_runs_every_part_from_every_seed() -> None:
    found = planned("table3")
    assert places(found) == [
        ("F/records.jsonl", "F/heads"),
        ("F/seed-1/records.jsonl", "F/seed-1/heads"),
        ("F/seed-2/records.jsonl", "F/seed-2/heads"),
    ]
    assert [job.preset.training.seed for job in found.jobs] == [0, 1, 2]
    assert {job.methods for job in found.jobs} == {("vanilla", *PARTS)}
    assert len(planned("table3", seeds=False).jobs) == 1
    some = planned("table3", methods=["vanilla", "eagle", "eagle+layers"])
    assert {job.methods for job in some.jobs} == {("vanilla", "eagle", "eagle+layers")}


def test_table_2_takes_the_files_of_a_data_folder(data: Path) -> None:
    found = planned("table2", data)
    assert places(found) == [
        ("F/tasks/spec_bench/records.jsonl", "F/heads"),
        ("F/tasks/humaneval/records.jsonl", "F/heads"),
    ]
    assert [(job.preset.evaluation.questions, job.preset.evaluation.limit) for job in found.jobs] == [
        ("spec_bench", 10),
        ("humaneval", 10),
    ]
    assert found.remarks == (
        f"Left out of Table 2: alpaca, gsm8k, not in {data}.",
        "Table 2 is on the first 10 questions of each category.",
    )
    assert len(found.trainings) == 1, "the heads are trained once"
    whole = planned("table2", data, preset="vicuna-7b")
    assert {job.preset.evaluation.limit for job in whole.jobs} == {None}


def test_the_leaderboard_takes_what_the_preset_lists_and_its_temperature_allows(data: Path) -> None:
    (data / "eval" / "humaneval" / "question.jsonl").unlink()
    found = planned("leaderboard", data)
    assert places(found) == [("F/tasks/spec_bench/records.jsonl", "F/heads")]
    assert found.products == ("leaderboard",)
    preset = load_preset(
        "tiny", ['methods."medusa+typical".head_of=medusa', 'methods."medusa+typical".typical.threshold=0.09']
    )
    for temperature, more in ((0.0, []), (0.7, ["medusa+typical"])):
        warm = preset.model_copy(
            update={"evaluation": preset.evaluation.model_copy(update={"temperature": temperature})}
        )
        jobs = plan("leaderboard", warm, "tiny", Path("F"), data, methods=None, questions_given=False, seeds=True)
        assert [name for name in jobs.jobs[0].methods if name.endswith("typical")] == more
        assert any("Left out at temperature 0" in line for line in jobs.remarks) == (not more)
    assert planned("leaderboard", data, methods=["vanilla", "eagle"]).jobs[0].methods == ("vanilla", "eagle")


def test_table_2_without_data_says_that_it_is_by_category(tmp_path: Path) -> None:
    found = planned("table2")
    assert places(found) == [("F/records.jsonl", "F/heads")]
    (remark,) = found.remarks
    assert remark.startswith("Table 2 is by the categories of the questions 'bundled': no data folder is set")
    (remark,) = planned("table2", tmp_path).remarks
    assert f"{tmp_path} has none of spec_bench, humaneval, gsm8k, alpaca" in remark
    assert planned("table2", questions_given=True).remarks == (), "who names the questions knows what they are"
    with pytest.raises(KoalaBenchError, match="There is no data folder"):
        planned("table2", tmp_path / "nowhere")


def test_figures_run_k_1_to_5_and_reuse_what_has_a_name() -> None:
    (job,) = planned("figures").jobs
    curve = [
        "medusa",
        "medusa+layers",
        "medusa@3",
        "medusa@4",
        "medusa@5",
        "eagle",
        "eagle+layers",
        "eagle@3",
        "eagle@4",
        "eagle@5",
    ]
    assert set(job.methods) == {"vanilla", *FOUR, *curve}
    assert [job.preset.method(name).layers for name in curve] == [1, 2, 3, 4, 5] * 2
    assert {job.preset.method(name).objective for name in curve} == {None}
    assert planned("figures").products == USUAL_FIGURES
    without = planned("figures", methods=["vanilla", "medusa+koala"])
    assert "layers" not in without.products
    assert without.remarks == ("No curve over K: none of medusa, eagle is among the methods.",)


def test_the_cost_of_a_draft_takes_heads_of_its_own_with_other_layers() -> None:
    found = planned("cost")
    names = [head + k for head in ("eagle", "eagle3", "p-eagle", "dflash") for k in ("", "@2", "@4")]
    names[1] = "eagle+layers"
    assert (found.products, found.jobs[0].methods) == (("cost",), ("vanilla", *names))
    assert [found.jobs[0].preset.method(name).layers for name in names] == 4 * [1, 2, 4]


def test_objectives_stand_beside_layers_on_each_head_from_three_seeds() -> None:
    found = planned("objectives")
    parts = ("", "+layers", "+adversarial", "+koala", "+lk", "+lk+layers")
    wanted = ("vanilla", *(head + part for head in ("medusa", "eagle") for part in parts), "eagle+lk-hybrid", "hass")
    assert [job.methods for job in found.jobs] == 3 * [wanted]
    assert [job.preset.training.seed for job in found.jobs] == [0, 1, 2]
    assert places(found) == places(planned("table3"))
    assert found.products == ("table-objectives",)


def test_all_trains_and_decodes_once_what_several_need() -> None:
    found = planned("all")
    assert found.products == (*TABLES, *USUAL_FIGURES)
    assert places(found) == places(planned("table3"))
    assert set(found.jobs[0].methods) == {*planned("figures").jobs[0].methods, *planned("table3").jobs[0].methods}
    assert found.trainings[Path("F/heads")][1] == list(found.jobs[0].methods)


def test_a_method_of_ones_own_is_usual_and_no_part_of_the_ablation(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "koala_bench" / "presets" / "tiny.toml").read_text(encoding="utf-8")
    (tmp_path / "mine.toml").write_text(text + '\n[methods.mine]\nhead = "eagle"\ntree = "chain-2"\n')
    preset = load_preset(str(tmp_path / "mine.toml"))
    assert "mine" in usual_methods(preset)
    assert (
        "mine"
        not in plan("table3", preset, "mine.toml", Path("F"), None, methods=None, questions_given=False, seeds=False)
        .jobs[0]
        .methods
    )


def test_a_preset_without_the_parts_is_refused(tmp_path: Path) -> None:
    preset = load_preset("tiny")
    fewer = preset.model_copy(update={"methods": {name: preset.methods[name] for name in FOUR}})
    with pytest.raises(KoalaBenchError, match=r"Unknown method 'medusa\+layers'"):
        plan("table3", fewer, "tiny", Path("F"), None, methods=None, questions_given=False, seeds=True)


def test_other_layers_are_those_of_the_variants() -> None:
    variants = [
        *(f"{head}+{part}" for head in ("medusa", "eagle") for part in ("koala", "layers")),
        *(f"{head}+lk+layers" for head in ("medusa", "eagle")),
        "eagle2+koala",
        "eagle3+koala",
        "hydra+koala",
    ]
    assert set(layers_of_variants("tiny", 4)) == {f'methods."{name}".layers=4' for name in variants}
    preset = load_preset("tiny", layers_of_variants("tiny", 4))
    assert with_layers(preset, ["eagle"], [1, 2, 4])[1] == ["eagle", "eagle@2", "eagle+layers"]


@pytest.mark.slow
def test_the_figure_of_length_against_cost_comes_from_its_own_recipe(
    koala: Koala, cli_folder: Path, tmp_path: Path
) -> None:
    result = koala(
        "reproduce", "cost", *settings(cli_folder), *decoding(cli_folder), "--methods", "eagle,dflash", "--out",
        str(tmp_path),
    )  # fmt: skip
    assert result.code == 0, result.err
    assert [path.name for path in sorted(tmp_path.glob("figure-*"))] == ["figure-cost.pdf", "figure-cost.png"]
    names = ["vanilla", *(head + k for head in ("eagle", "dflash") for k in ("", "@2", "@4"))]
    names[2] = "eagle+layers"
    assert list(read_run(tmp_path / RECORD).methods) == names


@pytest.mark.slow
def test_all_tables_and_figures_come_in_one_go_and_verify(koala: Koala, cli_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "humaneval").mkdir(parents=True)
    write_questions(tmp_path / "data" / "humaneval" / "question.jsonl", [("code", ["count 5"]), ("code", ["count 6"])])
    options = [*decoding(cli_folder), "--seed", "3", "--out", str(tmp_path / "out")]
    without_questions = [
        *options[2:],
        "--set",
        f"evaluation.questions={cli_folder / 'questions.jsonl'}",
        "--data-dir",
        str(tmp_path / "data"),
    ]
    result = koala("reproduce", "all", *settings(cli_folder), *without_questions)
    assert result.code == 0, result.err
    assert "Left out of Table 2: alpaca, gsm8k, spec_bench" in result.err
    for name in (
        *(f"{table}.{kind}" for table in TABLES for kind in ("md", "tex", "csv")),
        *(f"figure-{f}.{k}" for f in USUAL_FIGURES for k in ("pdf", "png")),
    ):
        assert (tmp_path / "out" / name).is_file(), name
        assert name in result.err
    assert "# Table 1" in result.out and "# Table 2" in result.out and "# Table 3" in result.out
    assert read_run(tmp_path / "out" / RECORD).training_seed == 3
    table = table_rows((tmp_path / "out" / "table2.md").read_text())
    assert ["code", "eagle+koala"] in [row[:2] for row in table]
    states = {check.subject: check.state for check in verify(tmp_path / "out")[1]}
    assert "differs" not in states.values()
    assert {
        "table1.md",
        "table2.tex",
        "table3.csv",
        "figure-layers.pdf",
        "figure-training.png",
        "record of tasks/humaneval",
    } <= states.keys()
    again = koala("reproduce", "all", *settings(cli_folder), *without_questions)
    assert again.code == 0 and again.err.count("Reusing") == 3
