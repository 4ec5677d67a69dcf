"""What each recipe runs: which heads from which seeds, on which questions, and into which folders."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from koala_bench.common.bundled import RECIPES
from koala_bench.dialogues.downloads import data_folder, places_of
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import Preset, load_preset, usual_methods
from koala_bench.results.making import FIGURES, RECORD
from koala_bench.results.tables.published import read_figure_spec, read_table_spec

TITLES = {"table1": "Table 1", "table2": "Table 2", "table3": "Table 3", "leaderboard": "The leaderboard"} | {
    "objectives": "The table of objectives", "figures": "All figures", "cost": "Length against cost of a draft",
    "all": "All tables and figures",
}  # fmt: skip
RECIPE_NAMES = tuple(TITLES)
_BY_PARTS = {"table3": "table3", "objectives": "table-objectives"}  # tables over several training seeds
_USUAL_FIGURES = tuple(
    name for name in FIGURES if name not in ("cost", "tokens", "vocabulary")
)  # these take trainings of their own


@dataclass(frozen=True)
class Job:
    """One evaluation."""

    record: Path
    heads: Path
    preset: Preset
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What there is to run and to make.

    Attributes:
        jobs: in their order; the first is that of the folder itself where it has one.
        products: tables and figures, as ``making.make`` calls them.
        remarks: sentences on what runs otherwise than its recipe says.
    """

    jobs: tuple[Job, ...]
    products: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def trainings(self) -> dict[Path, tuple[Preset, list[str]]]:
        """Preset and methods of each folder of heads, which are trained together on the same batches."""
        found: dict[Path, tuple[Preset, list[str]]] = {}
        for job in self.jobs:
            _, methods = found.setdefault(job.heads, (job.preset, []))
            methods += [name for name in job.methods if name not in methods]
        return found


def layers_of_variants(preset: str, layers: int) -> list[str]:
    """Overrides with another K for a preset's variants that have more layers than the same head otherwise has."""
    methods = load_preset(preset).methods
    single = [(method.head, method.options) for method in methods.values() if method.layers == 1]
    return [
        f'methods."{name}".layers={layers}'
        for name, method in methods.items()
        if method.layers > 1 and (method.head, method.options) in single
    ]


def with_layers(preset: Preset, heads: Sequence[str], counts: Sequence[int]) -> tuple[Preset, list[str]]:
    """The same heads with each number of layers, for a curve over K: the preset with these methods, and their names.

    A method that the preset lists with these settings already keeps its name, so that its trained head serves both;
    any other is called ``HEAD@K``.

    Raises:
        KoalaBenchError: the preset has no such method.
    """
    methods, names = dict(preset.methods), []
    for head in heads:
        for count in counts:
            wanted = preset.method(head).model_copy(update={"layers": count})
            alike = (
                name
                for name, method in preset.methods.items()
                if method.model_copy(update={"usual": wanted.usual}) == wanted
            )
            name = next(alike, f"{head}@{count}")
            methods[name] = wanted
            names.append(name)
    return preset.model_copy(update={"methods": methods}), names


def plan(
    what: str,
    preset: Preset,
    name: str,
    folder: Path,
    data_dir: Path | None,
    *,
    methods: Sequence[str] | None,
    questions_given: bool,
    seeds: bool,
) -> Plan:
    """Lay out a recipe.

    Args:
        what: out of ``RECIPE_NAMES``. ``all`` trains and decodes what several tables need once.
        name: of the preset, which may have a smaller share of the questions of a table by task.
        methods: what to run in place of the recipe's methods; None for those.
        questions_given: whether --questions replaces the tasks' files.
        seeds: whether the other training seeds of a table by part are run too.

    Raises:
        KoalaBenchError: the preset lacks a method of the recipe.
    """
    wanted = ["table1", "table2", "table3", "figures"] if what == "all" else [what]
    made = {"figures": _USUAL_FIGURES, "objectives": ("table-objectives",)}
    products = [product for each in wanted for product in made.get(each, (each,))]
    remarks: list[str] = []
    over_k = "cost" if what == "cost" else "layers"
    by_parts = next((_BY_PARTS[each] for each in wanted if each in _BY_PARTS), None)
    curve = read_figure_spec(RECIPES / f"figure-{over_k}.toml")
    part = read_table_spec(RECIPES / f"{by_parts or 'table3'}.toml")
    extended, of_curve = preset, list[str]()
    if over_k in products:
        heads = [head for head in curve.methods if head in (preset.methods if methods is None else methods)]
        extended, of_curve = with_layers(preset, heads, curve.layers)
        if not of_curve:
            products.remove(over_k)
            remarks.append(f"No curve over K: none of {', '.join(curve.methods)} is among the methods.")
    if methods is not None:
        usual = parts = list(dict.fromkeys(["vanilla", *methods]))
    else:
        usual, parts = usual_methods(preset), [*part.methods]
        if what == "leaderboard":
            usual, remarks = _ranked(preset)
    by_task = next((table for table in ("table2", "leaderboard") if table in wanted), None)
    if what == "cost":
        usual = ["vanilla"]
    files: list[tuple[str, int | None]] = []
    if by_task and not questions_given:
        files, more = _question_files(by_task, name, preset, data_dir)
        remarks += more
    main = usual if {"table1", "figures", "cost"} & {*wanted} or (by_task and not files) else []
    main = list(dict.fromkeys([*main, *(parts if by_parts else []), *of_curve]))
    for method in (*main, *usual):
        if method != "vanilla":
            extended.method(method)

    jobs = [Job(folder / RECORD, folder / "heads", extended, tuple(main))] if main else []
    for seed in part.seeds if by_parts and seeds else ():
        if seed != preset.training.seed:
            other = extended.model_copy(update={"training": extended.training.model_copy(update={"seed": seed})})
            below = folder / f"seed-{seed}"
            jobs.append(Job(below / RECORD, below / "heads", other, tuple(parts)))
    for questions, limit in files:
        evaluation = extended.evaluation.model_copy(update={"questions": questions, "limit": limit})
        of_task = extended.model_copy(update={"evaluation": evaluation})
        jobs.append(Job(folder / "tasks" / questions / RECORD, folder / "heads", of_task, tuple(usual)))
    return Plan(tuple(jobs), tuple(products), tuple(remarks))


def _ranked(preset: Preset) -> tuple[list[str], list[str]]:
    """The leaderboard's methods that the preset has and its temperature allows, and remarks on the others."""
    named = read_table_spec(RECIPES / "leaderboard.toml").methods
    listed = [name for name in named if name == "vanilla" or name in preset.methods]
    greedy = not preset.evaluation.temperature
    lossy = [name for name in listed if greedy and name != "vanilla" and preset.method(name).typical is not None]
    absent = [name for name in named if name not in listed]
    remarks = [f"Not in the preset: {', '.join(absent)}."] if absent else []
    if lossy:
        remarks.append(f"Left out at temperature 0, where typical acceptance has no meaning: {', '.join(lossy)}.")
    return [name for name in listed if name not in lossy], remarks


def _question_files(
    table: str, name: str, preset: Preset, data_dir: Path | None
) -> tuple[list[tuple[str, int | None]], list[str]]:
    """The question files of a table by task that are there, with their limits, and remarks on the others."""
    spec = read_table_spec(RECIPES / f"{table}.toml")
    title = TITLES[table]
    wanted = list(dict.fromkeys(task.questions for task in spec.tasks))
    there: list[str] = []
    place: Path | None = None
    with contextlib.suppress(KoalaBenchError):
        place = data_folder(data_dir)
    if place is not None:
        if not place.is_dir():
            raise KoalaBenchError(
                f"There is no data folder {place}.",
                "Correct --data-dir or KOALA_BENCH_DATA, or unset it to use the preset's own questions.",
            )
        there = [each for each in wanted if any(path.is_file() for path in places_of(each, place))]
    if not there:
        why = "no data folder is set" if place is None else f"{place} has none of {', '.join(wanted)}"
        own = f"{title} is by the categories of the questions '{preset.evaluation.questions}': {why}"
        return [], [f"{own} (`koala-bench data` fetches the tasks' files)."]
    limit = preset.evaluation.limit or spec.limit.get(name)
    absent = sorted(set(wanted) - set(there))
    remarks = [f"Left out of {title}: {', '.join(absent)}, not in {place}."] if absent else []
    if limit is not None:
        remarks.append(f"{title} is on the first {limit} questions of each category.")
    return [(questions, limit) for questions in there], remarks
