"""Figures: what is drawn, and that the same record gives the same bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure

from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import read_run
from koala_bench.records.schema import RunHeader, TurnLine
from koala_bench.records.summaries import sample
from koala_bench.results.figures.bars import write_figure1
from koala_bench.results.figures.layers import curves, has_curves, write_layers
from koala_bench.results.figures.style import bars, looks
from koala_bench.results.figures.tokens import has_token_curves, token_curves
from koala_bench.results.figures.vocabulary import has_vocabulary_curves, vocabulary_curves
from koala_bench.results.integrity import verify
from koala_bench.results.making import FIGURES, make_figure
from koala_bench.training.log import read_training
from tests.support.commands import Koala
from tests.support.synthetic_run import make_header, write_run


def test_the_same_record_gives_the_same_bytes_whatever_style_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = read_run(write_run(tmp_path / "run.jsonl"))
    first = write_figure1([run], tmp_path / "one")
    assert [path.name for path in first] == ["figure1.pdf", "figure1.png"]
    monkeypatch.setitem(rcParams, "font.size", 20)
    second = write_figure1([run], tmp_path / "two")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert rcParams["font.size"] == 20, "the user's style is as it was"
    assert first[0].read_bytes().startswith(b"%PDF")
    assert b"CreationDate" not in first[0].read_bytes()
    assert first[1].read_bytes().startswith(b"\x89PNG")


def test_methods_and_targets_are_drawn_as_asked(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / f"{name}.jsonl", header=make_header(target=name)))
        for name in ("tiny", "vicuna-7b")
    ]
    one = write_figure1(runs[:1], tmp_path / "one", methods=["vanilla", "eagle"])[1].read_bytes()
    two = write_figure1(runs, tmp_path / "two", methods=["vanilla", "eagle"])[1].read_bytes()
    width, heights = (
        [int.from_bytes(png[16:20], "big") for png in (one, two)],
        [int.from_bytes(png[20:24], "big") for png in (one, two)],
    )
    assert width[0] == width[1] == 1400  # 7 inches at 200 dots
    assert heights[1] == 2 * heights[0]


def test_one_question_is_drawn_without_intervals(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run.jsonl", lambda turn: turn if turn["question_id"] == 81 else None))
    assert all(path.stat().st_size > 5000 for path in write_figure1([run], tmp_path))


def test_a_record_of_vanilla_alone_has_nothing_to_draw(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run.jsonl", header=make_header(["vanilla"])))
    with pytest.raises(KoalaBenchError, match="no method beside vanilla"):
        write_figure1([run], tmp_path)


def test_no_two_methods_have_bars_of_the_same_colour_and_hatching() -> None:
    """Three variants of a head share a dark hue, and the sixth head has the light hue of the first."""
    names = ["medusa", "medusa+koala", "eagle", "eagle+koala", "eagle+lk", "eagle+lk+layers", "hass", "prompt_lookup"]
    names += ["suffix_lookup", "token_recycling", "token_recycling+own", "suffix_lookup+eagle"]
    drawn = [(look.colour, look.hatch) for look in looks(names)]
    assert len(set(drawn)) == len(names)
    assert [hatch for _, hatch in drawn[:4]] == [""] * 4, "the usual pairs are as they were"
    axes = Figure().subplots()
    bars(axes, range(len(names)), [1.0] * len(names), looks(names), 0.8)
    assert [patch.get_hatch() or "" for patch in axes.patches] == [hatch for _, hatch in drawn]


# ---------------------------------------------------------------------------------------------- the other figures

OVER_K = ["vanilla", "eagle", "eagle+layers", "eagle@3", "eagle@4", "eagle+adversarial", "eagle+koala"]


def timed(turn: TurnLine) -> TurnLine:
    """A turn whose steps were timed in parts, vanilla's too."""
    return turn | {"draft_s": turn["draft_s"] or 0.0, "verify_s": turn["verify_s"] or 0.95 * (turn["decode_s"] or 0.0)}


def training_log(path: Path) -> Path:
    lines = []
    for step in (1, 10, 20):
        for method in ("eagle", "eagle+koala"):
            line = {"kind": "step", "step": step, "method": method, "loss": 2.0 / step}
            lines.append(
                line
                | (
                    {"discriminator_loss": 0.69, "discriminator_accuracy": 0.5, "adversarial": 0.7}
                    if method != "eagle" and step > 1
                    else {}
                )
            )
    lines += [
        {"kind": "held_out", "step": 20, "method": method, "acceptance_length": 1.5}
        for method in ("eagle", "eagle+koala")
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def of_two_trainings() -> RunHeader:
    """``eagle@3`` and ``eagle@4`` as one kind of head of different trainings; the others are of one each."""
    header = make_header(OVER_K)
    shorter, longer = (each for each in header["methods"] if each["name"] in ("eagle@3", "eagle@4"))
    longer.update(layers=shorter["layers"], parameters=shorter["parameters"])
    assert shorter["training"] is not None
    longer["training"] = {**shorter["training"], "tokens": 2 * shorter["training"]["tokens"]}
    return header


def of_cut_heads() -> RunHeader:
    """``eagle`` on the whole vocabulary and cut, and ``eagle@3`` as one of its kind that was trained on a cut one."""
    header = make_header(["vanilla", "eagle", "eagle+vocab8k", "eagle@3", "medusa"])
    for name, size in (("eagle+vocab8k", 8192), ("eagle@3", 4096), ("medusa", 4096)):
        next(each for each in header["methods"] if each["name"] == name).update(draft_vocabulary=size, layers=1)
    return header


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_gives_the_same_bytes_for_the_same_record(tmp_path: Path, name: str) -> None:
    own = {"tokens": of_two_trainings, "vocabulary": of_cut_heads}
    header = make_header(OVER_K) if name in ("layers", "cost") else own[name]() if name in own else None
    source = (
        training_log(tmp_path / "training.jsonl")
        if name == "training"
        else write_run(tmp_path / "run.jsonl", timed, header=header)
    )
    first, second = (make_figure(name, [source], tmp_path / folder) for folder in ("one", "two"))
    assert [path.name for path in first] == [f"figure-{name}.pdf", f"figure-{name}.png"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert all(path.stat().st_size > 5000 for path in first)


def test_a_curve_over_tokens_is_of_heads_that_differ_in_their_training_alone(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run.jsonl", header=of_two_trainings()))
    ((_, name, points),) = token_curves([run])
    chosen = sample([run])
    lengths = [chosen.value(chosen.length(each)) for each in ("eagle@3", "eagle@4")]
    assert (name, [tokens for tokens, _ in points]) == ("eagle@4", [600_000, 1_200_000])
    assert [length.value for _, length in points] == lengths and has_token_curves([run])
    single = read_run(write_run(tmp_path / "single.jsonl"))
    assert not has_token_curves([single])
    with pytest.raises(KoalaBenchError, match="tokens of its training alone"):
        token_curves([single])


def test_a_curve_over_the_vocabulary_is_of_one_head_beside_others_trained_on_a_cut_one(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run.jsonl", header=of_cut_heads()))
    (curve,) = vocabulary_curves([run])
    assert (curve.head, list(curve.points), list(curve.trained)) == ("eagle", [8192, math.inf], [4096])
    assert [each.name for each in curve.points.values()] == ["eagle+vocab8k", "eagle"]
    assert curve.trained[4096].name == "eagle@3" and has_vocabulary_curves([run])
    cut = make_header(["vanilla", "eagle+vocab8k"])
    for name, header in (("whole", make_header()), ("cut", cut)):  # nothing is cut, or what is cut stands alone
        single = read_run(write_run(tmp_path / f"{name}.jsonl", header=header))
        assert not has_vocabulary_curves([single])
    with pytest.raises(KoalaBenchError, match="several draft vocabularies"):
        vocabulary_curves([single])


@pytest.mark.parametrize("name", ["depth", "categories"])
def test_figures_change_with_the_record_and_take_one_question_and_two_targets(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run.jsonl", timed)
    other = write_run(
        tmp_path / "other.jsonl",
        lambda turn: timed(turn) if turn["question_id"] == 81 else None,
        header=make_header(target="vicuna-7b"),
    )
    drawn = [
        make_figure(name, paths, tmp_path / str(place))[1].read_bytes()
        for place, paths in enumerate(([run], [other], [run, other]))
    ]
    assert len(set(drawn)) == 3


def test_curves_over_k_come_from_one_record_or_from_one_per_k(tmp_path: Path) -> None:
    (curve,) = curves([read_run(write_run(tmp_path / "run.jsonl", header=make_header(OVER_K)))], ["medusa", "eagle"])
    assert (curve.head, curve.adversarial, [point.method["layers"] for point in curve.points]) == (
        "eagle",
        False,
        [1, 2, 3, 4],
    )
    single = []
    for k, name in ((1, "eagle"), (3, "eagle@3")):
        single.append(read_run(write_run(tmp_path / f"{k}.jsonl", header=make_header(["vanilla", name]))))
    (curve,) = curves(single, ["eagle"])
    assert [point.method["layers"] for point in curve.points] == [1, 3]
    with pytest.raises(KoalaBenchError, match="eagle has K = 1, as eagle has"):
        curves([single[0], single[0]], ["eagle"])
    with pytest.raises(KoalaBenchError, match="has no head with several numbers of layers"):
        curves(single[:1], ["eagle"])


def test_methods_that_share_a_head_have_a_curve_each(tmp_path: Path) -> None:
    header = make_header([*OVER_K, "eagle2", "eagle2@3", "eagle2@4"])
    for method in header["methods"]:
        method["head"] = "eagle" if method["head"] == "eagle2" else method["head"]
    run = read_run(write_run(tmp_path / "run.jsonl", header=header))
    found = [(curve.label, [point.method["layers"] for point in curve.points]) for curve in curves([run], ["eagle"])]
    assert found == [("eagle", [1, 2, 3, 4]), ("eagle2", [1, 3, 4])]
    write_layers([run], tmp_path, ["eagle"])
    header["methods"] = [each for each in header["methods"] if each["name"] in ("vanilla", "eagle", "eagle2@3")]
    assert not has_curves([read_run(write_run(tmp_path / "two.jsonl", header=header))], ["eagle"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has none of the methods"),
        ("not json\n", "training.jsonl:1: not a line of JSON"),
        ('{"kind": "run"}\n', "training.jsonl:1: not a line of a training log"),
        ("[]\n", "training.jsonl:1: not a JSON object"),
    ],
)
def test_what_is_no_training_log_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "training.jsonl").write_text(text)
    with pytest.raises(KoalaBenchError, match=message):
        make_figure("training", [tmp_path / "training.jsonl"], tmp_path)


def test_a_half_written_last_line_of_a_training_log_is_left_out(tmp_path: Path) -> None:
    log = training_log(tmp_path / "training.jsonl")
    lines = len(read_training(log))
    with open(log, "a", encoding="utf-8") as handle:
        handle.write('{"kind": "st')
    assert len(read_training(log)) == lines


def test_the_command_draws_one_figure_or_all_of_a_folder(koala: Koala, tmp_path: Path) -> None:
    run = write_run(tmp_path / "results" / "records.jsonl", timed)
    training_log(tmp_path / "results" / "training.jsonl")
    one = koala("figure", "depth", str(run), "--out", str(tmp_path / "one"))
    assert one.code == 0 and one.out.split() == [
        str(tmp_path / "one" / f"figure-depth.{kind}") for kind in ("pdf", "png")
    ]
    every = koala("figure", "all", str(tmp_path / "results"))
    found = {Path(line).stem for line in every.out.split()}
    assert found == {"figure-depth", "figure-categories", "figure-training", "figure-oracle"}
    assert (tmp_path / "results" / "figure-depth.png").read_bytes() == (
        tmp_path / "one" / "figure-depth.png"
    ).read_bytes()
    states = {check.subject: check.state for check in verify(tmp_path / "results")[1]}
    assert states["figure-training.pdf"] == "matches"
    assert "table1.md" not in states, "tables and figures that are not there are not missed where others are"
    (tmp_path / "results" / "figure-depth.png").write_bytes(b"other")
    (tmp_path / "results" / "figure-depth.pdf").unlink()
    states = {check.subject: check.state for check in verify(tmp_path / "results")[1]}
    assert (states["figure-depth.png"], states["figure-depth.pdf"]) == ("differs", "not here")
    for arguments, words in (
        (["radar", str(run)], "There is no figure 'radar'"),
        (["layers", str(run)], "no head with several numbers of layers"),
        (["all", str(run)], "drawn from a folder"),
        (["training", str(tmp_path)], "There is nothing to make training from"),
        (["depth", str(tmp_path / "nowhere.jsonl")], "Cannot read the run record"),
    ):
        result = koala("figure", *arguments)
        assert result.code == 2 and words in result.complaint, result.err
