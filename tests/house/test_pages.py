"""The pages: links lead somewhere, functions are where a page says, commands parse, and the README stays short."""

from __future__ import annotations

import ast
import csv
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer

from koala_bench.cli import app
from koala_bench.presets import Preset, preset_names
from koala_bench.pretraining.options import SETTABLE
from koala_bench.results.recipes import RECIPE_NAMES

ROOT = Path(__file__).parents[2]
FOLDERS = (".github", "heads", "koala_bench", "reproduce", "results", "tests")
MOST_WORDS, MOST_NUMBERS = 900, 120  # of the README

_FENCE = re.compile(r"^(```+|~~~+)[^\n]*\n(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:\A|\n[ \t]*\n)((?: {4}[^\n]*\n)+)")
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_LINK = re.compile(r"\]\(<?([^)\s>]+)>?\)")
_NAMED = re.compile(r"\]\(([^)\s#]+\.py)\):?\s+`([A-Za-z_]\w*)`")


def pages() -> list[Path]:
    below = (path for folder in FOLDERS for kind in ("*.md", "*.md.txt") for path in (ROOT / folder).rglob(kind))
    return sorted([*ROOT.glob("*.md"), *(path for path in below if ROOT / "results" / "runs" not in path.parents)])


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", pages(), ids=name_of)


# ------------------------------------------------------------------------------------ links


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?)[ #]*$", _FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        repeated = sum(
            anchor == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", anchor) is not None for anchor in found
        )
        found.add(f"{slug}-{repeated}" if repeated else slug)
    return found


def dead_links(page: Path, text: str) -> Iterator[str]:
    for link in _LINK.findall(_INLINE.sub("", _FENCE.sub("", text))):
        if re.match(r"[a-z]+:", link):
            continue  # a site: not for a test that needs no network
        place, _, anchor = link.partition("#")
        aim = (page.parent / unquote(place)).resolve() if place else page
        if not aim.exists():
            yield f"{link}: there is no {place}"
        elif anchor and (aim.suffix != ".md" or anchor not in anchors(aim.read_text(encoding="utf-8"))):
            yield f"{link}: no heading of {aim.name} is called so"


def lost_names(page: Path, text: str) -> Iterator[str]:
    """Functions and classes named behind a link to their file: ``[loop.py](decoding/loop.py) `decode` ``."""
    for place, name in _NAMED.findall(_FENCE.sub("", text)):
        aim = page.parent / place
        if aim.exists():
            tree = ast.parse(aim.read_text(encoding="utf-8"))
            defined = {
                node.name
                for node in ast.walk(tree)
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            }
            if name not in defined:
                yield f"{place} defines no {name}"


@each_page
def test_links_lead_somewhere_and_names_are_where_the_page_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [*dead_links(page, text), *lost_names(page, text)] == []


PACKAGES = sorted(path for name in ("heads", "koala_bench") for path in (ROOT / name).rglob("__init__.py"))


@pytest.mark.parametrize("init", PACKAGES, ids=lambda path: name_of(path.parent))
def test_each_folder_says_what_comes_in_and_out_and_names_the_file_to_read_first(init: Path) -> None:
    words = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
    assert re.search(r"\bIn:\s", words) and re.search(r"\bOut:\s", words)
    first = re.search(r"\bRead\s``(\w+)``", words)
    assert first is not None
    assert (init.parent / f"{first[1]}.py").exists()


# ------------------------------------------------------------------------------------ commands


def shown(text: str) -> Iterator[tuple[list[str], bool]]:
    """The words of each command in a page's code, and whether it stands in a block, so that it can be run as it is."""
    blocks = [block for _, block in _FENCE.findall(text)]
    rest = _FENCE.sub("", text)
    blocks += _INDENTED.findall(rest)
    lines = [(line, True) for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    lines += [(" ".join(code.split()), False) for code in _INLINE.findall(_INDENTED.sub("\n\n", rest))]
    for line, whole in lines:
        if re.match(r"(\w+=\S+ )*(\$ )?(koala-bench|python|accelerate|torchrun|nox|pytest)\b ?", line.strip()):
            for part in re.split(r" (?:&&|\||;) ", line.strip().removeprefix("$ ")):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words = words[1:]
                yield words, whole


def sessions() -> dict[str, list[str]]:
    """The sessions of the noxfile, each with the constant first words of what it runs with the options after ``--``."""
    found: dict[str, list[str]] = {}
    for node in ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and any("session" in ast.unparse(each) for each in node.decorator_list):
            found[node.name] = []
            for call in (each for each in ast.walk(node) if isinstance(each, ast.Call)):
                passes = any(isinstance(arg, ast.Starred) and "posargs" in ast.unparse(arg) for arg in call.args)
                if passes and ast.unparse(call.func) == "session.run":
                    found[node.name] = [arg.value for arg in call.args[:2] if isinstance(arg, ast.Constant)]
    return found


COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def setting_exists(key: str, command: str) -> bool:
    if command == "pretrain":
        return key in SETTABLE
    section, _, name = key.partition(".")
    model: Any = Preset.model_fields[section].annotation if section in Preset.model_fields else None
    return section == "methods" or name in getattr(model, "model_fields", ())


def complaints(words: list[str], whole: bool) -> Iterator[str]:
    """What is wrong with ``koala-bench WORDS``, found by parsing it and running nothing.

    Args:
        whole: whether these are all its words, so that a missing argument counts.
    """
    if not words or words == ["--help"]:
        return
    command = COMMANDS.get(words[0])
    if command is None:
        yield f"there is no command {words[0]}"
        return
    context = command.make_context(words[0], [], resilient_parsing=True)
    context.resilient_parsing = False  # it is the parser that shall not be lenient
    try:
        values, left, _ = command.make_parser(context).parse_args(words[1:])
    except Exception as error:  # the class of a usage error is public in no version of typer
        yield f"{words[0]}: {error}"
        return
    if left:
        yield f"{words[0]} takes no {left}"
    for parameter in command.params:
        if whole and parameter.required and values.get(parameter.name) in (None, (), []):
            yield f"{words[0]} needs {parameter.name}"
    for setting in values.get("settings") or ():
        if not setting_exists(setting.partition("=")[0], words[0]):
            yield f"{words[0]} --set: there is no {setting.partition('=')[0]}"
    preset = values.get("preset")
    if isinstance(preset, str) and not preset.endswith(".toml") and preset not in preset_names():
        yield f"there is no preset {preset}"
    recipe = values.get("what") if words[0] == "reproduce" else None
    if recipe and recipe not in RECIPE_NAMES:
        yield f"reproduce knows no {recipe}"


def wrong(words: list[str], whole: bool) -> Iterator[str]:
    """What is wrong with a command of a page; see ``shown``."""
    if words[0] == "python" and words[1:2] == ["-m"]:
        words = words[2:]
    if words[0] == "koala-bench":
        yield from complaints(words[1:], whole)
    elif words[0] in ("accelerate", "torchrun", "koala_bench.cli"):
        if "koala_bench.cli" in words:
            yield from complaints(words[words.index("koala_bench.cli") + 1 :], whole)
    elif words[0] == "nox":
        options, _, passed = (" ".join(words)).partition(" -- ")
        known = sessions()
        for name in re.findall(r"-s (\S+)", options):
            if name not in known:
                yield f"the noxfile has no session {name}"
            elif passed and known[name][:1] == ["koala-bench"]:
                yield from complaints([known[name][1], *words[words.index("--") + 1 :]], whole=False)
    elif words[0] == "pytest":
        for word in words[1:]:
            if ("/" in word or word.endswith(".py")) and not (ROOT / word.partition("::")[0]).exists():
                yield f"there is no {word}"


# Result tables and bundled targets name the command and commit that made them; options may have gone since.
SHOWING = [
    page
    for page in pages()
    if ROOT / "koala_bench" / "targets" not in page.parents
    and (ROOT / "results" not in page.parents or page.name == "README.md")
]


@pytest.mark.parametrize("page", SHOWING, ids=name_of)
def test_commands_exist_with_their_options(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [f"{shlex.join(words)}: {found}" for words, whole in shown(text) for found in wrong(words, whole)] == []


def test_a_number_of_table_1_follows_from_its_record_as_the_page_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code shown for readers who distrust the package: what the record gives and what the table says are equal."""
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "koala_bench" / "README.md").read_text("utf-8"), re.DOTALL)
    exec(code, {})
    of_record, of_table = map(float, capsys.readouterr().out.split())
    assert of_record == pytest.approx(of_table, rel=1e-9)


# ------------------------------------------------------------------------------------ the README is a door


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= MOST_WORDS
    assert len(re.findall(r"\d[\d.,]*", text)) <= MOST_NUMBERS


def test_the_readmes_table_holds_the_numbers_of_the_folder_that_its_picture_is_from() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (folder,) = set(re.findall(r"!\[[^\]]*\]\((results/[\w/-]+)/[\w.-]+\)", text))
    with (ROOT / folder / "table1.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    table = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    shown_rows = [cells for cells in table if cells[0] in rows]
    assert shown_rows
    for method, speedup, length, equal in shown_rows:
        row = rows[method]
        numbers = [float(row[name]) for name in ("speedup", "speedup_low", "speedup_high", "acceptance_length")]
        assert speedup.replace("*", "") == "{:.2f} [{:.2f}, {:.2f}]".format(*numbers[:3])
        assert length == f"{numbers[3]:.2f}"
        assert equal == f"{row['turns_equal_to_vanilla']} of {row['turns_compared_with_vanilla']}"


# ------------------------------------------------------------------------------------ these tests can fail


@pytest.mark.parametrize(
    "line",
    [
        "koala-bench reproduce table1 --presett tiny",
        "koala-bench reproduce tabel1",
        "koala-bench reproduce table1 --preset vicuna-8b",
        "koala-bench reproduce table1 --set target.thread=1",
        "koala-bench pretrain --out small --set breadth=512",
        "koala-bench verify results/table1-tiny results/all-tiny extra --nothing",
        "koala-bench measure",
        "python -m koala_bench.cli train --no-such-option",
        "accelerate launch --num_processes 4 -m koala_bench.cli train --no-such-option",
        "python -m pip install nox && python -m nox -s reproduce_table9",
        "nox -s reproduce_table1 -- --quicker",
        "pytest tests/gate/test_nothing.py",
    ],
)
@pytest.mark.parametrize("page", ["Text.\n\n```sh\n{}\n```\n", "Text.\n\n    {}\n\nMore.\n", "See `{}` for more.\n"])
def test_a_wrong_command_is_found(line: str, page: str) -> None:
    assert [found for words, whole in shown(page.format(line)) for found in wrong(words, whole)]


@pytest.mark.parametrize("link", ["nowhere.md", "README.md#no-such-heading", "heads/medusa.py#line", "#nothing"])
def test_a_dead_link_is_found(link: str) -> None:
    assert list(dead_links(ROOT / "README.md", f"See [this]({link})."))


def test_a_moved_function_is_found() -> None:
    text = "See [loop.py](koala_bench/decoding/loop.py) `{}`."
    assert list(lost_names(ROOT / "README.md", text.format("decoded_nowhere")))
    assert not list(lost_names(ROOT / "README.md", text.format("decode")))
