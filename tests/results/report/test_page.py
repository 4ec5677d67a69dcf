"""The HTML report: one page with everything inside, true to the record, safe with any text."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from koala_bench.dialogues.questions import bundled_questions, questions_sha256
from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import read_run
from koala_bench.records.schema import RunHeader, TurnLine
from koala_bench.results.report import write_report
from koala_bench.results.report.outliers import outliers_of
from koala_bench.results.report.trees import draw_trees
from koala_bench.training.log import agreements
from tests.support.commands import Koala
from tests.support.synthetic_run import make_header, make_turn, with_chain, write_run, write_sampled

_VOID = {"meta", "img", "line", "circle", "br", "wbr", "link", "input"}


class Page(HTMLParser):
    """What a browser would load, see and complain about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.targets: list[str] = []
        self.ids: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.loaded += [values[name] for name in ("src", "srcset", "data", "poster") if name in values]
        self.targets += [values["href"]] if "href" in values else []
        self.ids |= {values["id"]} if "id" in values else set()
        assert not [name for name in values if name.startswith("on")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def kept(turn: TurnLine) -> TurnLine:
    """The same turn, saying which node of a chain it kept."""
    return turn | {"kept_node": turn["accepted"]} if turn["method"] != "vanilla" else turn


def held_out(method: str, forced: list[Any], decoded: list[Any], step: int = 100) -> dict[str, Any]:
    return {
        "kind": "held_out", "step": step, "method": method, "loss": 1.0, "acceptance_length": 1.5,
        "acceptance_rate_by_depth": decoded,
        "teacher_forced_rate_by_depth": forced, "decoded_rate_by_depth": decoded,
    }  # fmt: skip


def header_of_bundled() -> RunHeader:
    header = with_chain(make_header())
    header["questions"]["sha256"] = questions_sha256(bundled_questions())
    return header


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder of results with a log of the training."""
    write_run(tmp_path / "records.jsonl", kept, header=header_of_bundled())
    lines = [
        held_out("medusa", [0.6, 0.4], [0.6, 0.4]),
        held_out("eagle", [0.8], [0.3], 50),
        held_out("eagle", [0.8], [0.7]),
    ]
    (tmp_path / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_page_needs_nothing_beside_it(results: Path) -> None:
    page = Page(write_report(results, results / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert page.loaded and all(each.startswith("data:image/png;base64,") for each in page.loaded)
    assert page.targets and all(each[0] == "#" and each[1:] in page.ids for each in page.targets)


def test_the_page_says_what_the_record_says(results: Path) -> None:
    page = Page(write_report(results, results / "report.html").read_text(encoding="utf-8"))
    run = read_run(results / "records.jsonl")
    compared = 4 * sum(1 for turn in run.turns if turn["method"] == "vanilla")
    assert f"{compared} of {compared} answers are vanilla's." in page.text
    assert "Table 1: speedup and acceptance length, tiny on bundled" in page.text
    assert "Example CPU @ 2.0 GHz" in page.text and "torch" in page.text
    assert run.header["run_id"] in page.text and run.header["target"]["weights_sha256"] in page.text  # type: ignore[operator]


def test_the_page_leads_with_the_verdict_and_the_picture_and_folds_the_notes(results: Path) -> None:
    text = write_report(results, results / "report.html").read_text(encoding="utf-8")
    head, body = text.split("</header>")
    assert head.count('<p class="verdict">') == 2 and "Speed with KOALA: medusa " in head
    assert "<img" in head and "<table>" not in head
    first = body.split("</table>")[0]
    assert "<details>" not in first and first.count("<th") == 8  # the head of the table, and its seven columns
    for note in ("Definitions", "How it was measured"):
        before = body.split(f"<h3>{note}</h3>")[0]
        assert before.count("<details>") == before.count("</details>") + 1


def test_a_narrow_screen_has_the_whole_table_in_a_fold(results: Path) -> None:
    """Columns 5 and up of a first table are not shown there."""
    text = write_report(results, results / "report.html").read_text(encoding="utf-8")
    first, rest = text.split('<div class="wide first">')[1].split('<div class="narrow">')
    assert first.count("<th") == rest.split("</table>")[0].count("<th") == 8 and "All 7 columns" in rest
    narrow = text.split("@media (max-width: 40rem)")[1].split("@media")[0]
    assert ".narrow { display: block; }" in narrow and ".narrow { display: none; }" in text


def test_the_fastest_is_called_so_where_the_others_differ_from_it(tmp_path: Path) -> None:
    """With answers of the same length in nearly the same time it may be none of them."""
    write_run(tmp_path / "records.jsonl")
    clear = Page(write_report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "Fastest lossless method: eagle+koala, " in clear

    def level(turn: TurnLine) -> TurnLine:
        if turn["method"] == "vanilla":
            return turn
        seconds = 1.0 + 0.1 * ((len(turn["method"]) + turn["question_id"]) % 3)  # by turns one is ahead
        return turn | {
            "decode_s": seconds,
            "new_token_ids": list(range(8)),
            "accepted": [3, 3],
            "drafted_depth": [4, 4],
        }

    write_run(tmp_path / "level" / "records.jsonl", level)
    close = Page(write_report(tmp_path / "level", tmp_path / "level.html").read_text(encoding="utf-8")).text
    assert "Highest lossless speed: " in close and "not distinguishable from " in close
    assert " and 2 more." in close and "Fastest lossless" not in close


def test_a_folder_of_tasks_alone_is_reported_on_as_one(tmp_path: Path, koala: Koala) -> None:
    """As `reproduce table2` and `leaderboard` write it: question files number their questions alike."""
    for name, sha256 in (("spec_bench", "55" * 32), ("humaneval", "77" * 32)):
        header = make_header()
        header["questions"] = {"name": name, "sha256": sha256, "count": 8}
        write_run(tmp_path / "tasks" / name / "records.jsonl", header=header)
    done = koala("report", str(tmp_path))
    assert done.code == 0, done.err
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == [] and "tiny on humaneval, spec_bench" in page.text and ", 16 questions, " in page.text
    turns = 2 * 16  # of each method
    assert f"{4 * turns} of {4 * turns} answers are vanilla's." in page.text
    assert "Table 2: speedup by task" in page.text and "Table 1" not in page.text


def test_the_same_record_gives_the_same_bytes(results: Path) -> None:
    first = write_report(results, results / "one.html").read_bytes()
    assert first == write_report(results, results / "two.html").read_bytes()


def test_texts_of_answers_cannot_become_part_of_the_page(tmp_path: Path) -> None:
    nasty = "</pre><script>alert(1)</script><img src='http://example.org/x.png' onerror=alert(1)> & \u202e {{ 7 * 7 }}"
    write_run(tmp_path / "records.jsonl", lambda turn: turn | {"text": nasty}, header=make_header())  # type: ignore[arg-type, return-value]
    page = Page(write_report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8"))
    assert nasty in page.text and not [each for each in page.loaded if "example.org" in each]


def test_a_tree_shows_how_often_each_node_was_accepted(tmp_path: Path) -> None:
    header = make_header(["vanilla", "eagle"])
    # The root has three children, the best of them two, whose first has one.
    header["methods"][1]["tree"] = {"name": "mine", "nodes": 7, "depth": 3, "parents": [-1, 0, 0, 0, 1, 1, 4]}
    nodes = [0, 1, 2, 4, 5, 6, 6, 6]
    depths = [0, 1, 1, 2, 2, 3, 3, 3]
    taken = {
        "accepted": depths,
        "drafted_depth": [3] * 8,
        "kept_node": nodes,
        "new_token_ids": list(range(sum(depths) + 8)),
    }
    path = write_run(
        tmp_path / "records.jsonl", lambda turn: turn | taken if turn["method"] == "eagle" else turn, header=header
    )  # type: ignore[arg-type, return-value]
    (tree,) = draw_trees(read_run(path))
    turns = tree.steps // 8
    assert [node.path for node in tree.nodes] == ["root", "0", "1", "2", "0.0", "0.1", "0.0.0"]
    assert [node.steps // turns for node in tree.nodes] == [8, 6, 1, 0, 4, 1, 3]
    assert [node.share for node in tree.nodes] == [1.0, 6 / 8, 1 / 8, 0.0, 4 / 8, 1 / 8, 3 / 8]
    assert [node.given_parent for node in tree.nodes] == [None, 6 / 8, 1 / 8, 0.0, 4 / 6, 1 / 6, 3 / 4]
    places = [(node.x, node.y) for node in tree.nodes]
    assert len(set(places)) == 7 and max(x for x, _ in places) < tree.width and max(y for _, y in places) < tree.height


def test_steps_without_room_for_a_draft_and_records_without_nodes_say_nothing_about_a_tree(tmp_path: Path) -> None:
    def last_step_bare(turn: TurnLine) -> TurnLine:
        nodes, depths = list(turn["accepted"] or []), list(turn["drafted_depth"] or [])
        committed = turn["new_token_ids"] or []
        cut = len(committed) - nodes[-1]
        nodes[-1] = depths[-1] = 0
        return (
            turn | {"accepted": nodes, "kept_node": nodes, "drafted_depth": depths, "new_token_ids": committed[:cut]}
            if turn["method"] == "eagle"
            else turn
        )  # type: ignore[return-value]

    path = write_run(tmp_path / "records.jsonl", last_step_bare, header=with_chain(make_header()))
    run = read_run(path)
    (tree,) = draw_trees(run)
    assert tree.method == "eagle" and tree.steps == sum(
        len(turn["accepted"] or []) - 1 for turn in run.turns_of("eagle")
    )
    page = Page(write_report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "eagle: chain-4, 5 nodes" in page.text and "There is no log of the training" in page.text


def test_a_gap_between_training_and_decoding_is_flagged(results: Path) -> None:
    found = {
        (each.method, each.depth): each
        for each in agreements([json.loads(line) for line in (results / "training.jsonl").open()])
    }
    assert [found[key].flagged for key in (("medusa", 1), ("medusa", 2), ("eagle", 1))] == [False, False, True]
    assert found["eagle", 1].step == 100 and found["eagle", 1].gap == pytest.approx(-0.125)
    page = Page(write_report(results, results / "report.html").read_text(encoding="utf-8"))
    assert "-12.5 flagged" in page.text and page.text.count(" flagged") == 3  # and the explanation, and what is folded


@pytest.mark.parametrize(
    ("forced", "decoded", "flagged"),
    [
        ([0.5], [0.549], False),
        ([0.5], [0.551], True),
        ([0.0], [0.0], False),
        ([0.0], [0.1], True),
        ([0.1], [0.0], True),
    ],
)
def test_the_gap_is_relative(forced: list[float], decoded: list[float], flagged: bool) -> None:
    assert [each.flagged for each in agreements([held_out("m", forced, decoded)])] == [flagged]


def test_depths_without_a_trial_and_logs_of_before_are_passed_over() -> None:
    assert [each.depth for each in agreements([held_out("m", [0.5, None], [0.5, None])])] == [1]
    assert (
        agreements(
            [{"kind": "held_out", "step": 1, "method": "m", "loss": 1.0}, {"kind": "step", "step": 1, "method": "m"}]
        )
        == []
    )


def test_the_slowest_and_fastest_questions_are_found_with_their_texts(tmp_path: Path) -> None:
    slow, fast = {"decode_s": 9.0, "text": "slow <b>"}, {"decode_s": 0.001, "text": "fast"}

    def spread(turn: TurnLine) -> TurnLine:
        special = slow if turn["question_id"] == 83 else fast if turn["question_id"] == 86 else {}
        return turn | special if turn["method"] == "eagle" else turn  # type: ignore[return-value]

    run = read_run(write_run(tmp_path / "records.jsonl", spread, header=make_header()))
    found = next(each for each in outliers_of(run, {83: ("first?", "second?")}, most=2) if each.method == "eagle")
    assert found.slowest[0].question_id == 83 and found.fastest[0].question_id == 86
    assert list(found.slowest[0].turns) == [("first?", "slow <b>"), ("second?", "slow <b>")]
    assert list(found.fastest[0].turns) == [(None, "fast"), (None, "fast")]
    assert found.slowest[0].speedup < found.median < found.fastest[0].speedup
    assert not {each.question_id for each in found.slowest} & {each.question_id for each in found.fastest}


def test_the_command_writes_the_page_and_says_where(results: Path, koala: Koala) -> None:
    done = koala("report", str(results))
    assert done.code == 0 and done.out.strip().endswith("report.html")
    assert (results / "report.html").stat().st_size > 50_000


def sampled_page(folder: Path, lossy: str, methods: list[str] | None = None) -> str:
    write_sampled(folder / "records.jsonl", lossy, methods)
    return write_report(folder, folder / "report.html").read_text(encoding="utf-8")


def test_the_fastest_is_lossless_and_a_lossy_one_is_called_so_everywhere(tmp_path: Path) -> None:
    text = sampled_page(tmp_path, "eagle+koala")
    page, label = Page(text).text, "eagle+koala (lossy, total variation 0.30)"
    assert "Fastest lossless method: eagle, " in page and f"Fastest lossy method: {label}, " in page
    losslessness = page.split("Losslessness\n")[-1]
    assert losslessness.lstrip().startswith("Above temperature 0 answers are draws") and f"{label}no0" in losslessness
    assert "Lossy, by typical acceptance: eagle+koala (threshold" in page
    assert f"{label}: median" in page
    captions = [part.split("</figcaption>")[0] for part in text.split("<figcaption>")[1:]]
    assert captions[0].endswith(f" Among the methods: {label}.")


def test_draws_are_not_counted_as_answers_of_vanillas(tmp_path: Path) -> None:
    page = Page(sampled_page(tmp_path, "medusa")).text
    assert "Fastest lossless method: eagle+koala, " in page
    assert "answers are vanilla's" not in page and "Answers compared" not in page


def test_where_every_method_is_lossy_the_headline_says_so(tmp_path: Path) -> None:
    page = Page(sampled_page(tmp_path, "eagle", ["vanilla", "eagle"])).text
    assert "Fastest lossy method: eagle (lossy, total variation 0.30), " in page
    assert "Fastest lossless" not in page


def test_a_folder_without_a_record_is_refused_in_a_line(tmp_path: Path, koala: Koala) -> None:
    with pytest.raises(KoalaBenchError, match=r"has no records\.jsonl to report on"):
        write_report(tmp_path, tmp_path / "report.html")
    write_run(
        tmp_path / "records.jsonl",
        lambda turn: turn if turn["method"] == "vanilla" else None,
        header=make_header(["vanilla"]),
    )
    done = koala("report", str(tmp_path))
    assert done.code == 2 and "has no method beside vanilla" in done.err and not (tmp_path / "report.html").exists()


def test_differences_from_vanilla_are_counted_and_the_first_are_listed(tmp_path: Path) -> None:
    def other(turn: TurnLine) -> TurnLine:
        return (
            turn | {"new_token_ids": [7, *(turn["new_token_ids"] or [])[1:]]}
            if turn["method"] in ("eagle", "medusa")
            else turn
        )  # type: ignore[return-value]

    write_run(
        tmp_path / "records.jsonl",
        lambda turn: other(turn) if turn["method"] == "eagle" or turn["question_id"] < 83 else turn,
    )
    page = Page(write_report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "44 of 64 answers are vanilla's" in page.text
    assert page.text.count("not recorded") == 20  # gaps of 4 of medusa's, and 16 of eagle's


def test_an_unfinished_record_and_failed_turns_are_said_first(tmp_path: Path) -> None:
    from tests.support.synthetic_run import failed

    write_run(
        tmp_path / "records.jsonl",
        lambda turn: failed(turn) if (turn["method"], turn["question_id"]) == ("eagle", 84) else turn,
        finish=False,
    )
    page = Page(write_report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Failed turns, which have no numbers: 2." in page.text and "The record is unfinished" in page.text
    assert make_turn("eagle", 84, 0)["text"] not in page.text.split("Outliers")[0]
    place = tmp_path / "one"
    write_run(
        place / "records.jsonl",
        lambda turn: failed(turn) if (turn["method"], turn["question_id"], turn["turn"]) == ("eagle", 84, 1) else turn,
    )
    assert (
        "Failed turns, which have no numbers: 1."
        in Page(write_report(place, place / "report.html").read_text(encoding="utf-8")).text
    )
