"""The documentation corpus: docstrings of three styles, dialogues, a held-out part that stays apart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from koala_bench.dialogues.conversations import Conversations
from koala_bench.errors import KoalaBenchError
from koala_bench.pretraining.corpus import answers_of, corpus_sha256, dialogues_of, read_documentation
from koala_bench.pretraining.documentation import Entry, read_entries, split_docstring

SMALL = ("jinja2", "requests")

NUMPY = """
    Solve a linear system.

    The matrix must have :class:`~numpy.ndarray` as its type.

    Parameters
    ----------
    a : array
        The ``matrix``.
    b : array

    Returns
    -------
    x : array

    See Also
    --------
    inv : something else

    Examples
    --------
    >>> solve(a, b)
    """

GOOGLE = """Open a file.

    .. versionadded:: 2.0

    Args:
        path (str): Where it lies,
            in one line.
        mode: How.

    Returns:
        A handle.

    Raises:
        OSError: There is none.

    Example::

        >>> open_it("x")
    """

SPHINX = """Send a request.

    Waits for the answer.

    :param url: Where to.
    :param data: What.
    :returns: the answer
    :rtype: Response
    """


# ------------------------------------------------------------------------------ docstrings


def test_a_docstring_of_numpys_style_is_split() -> None:
    assert split_docstring(NUMPY) == {
        "summary": "Solve a linear system.\n\nThe matrix must have `numpy.ndarray` as its type.",
        "Parameters": "a : array\n    The `matrix`.\nb : array",
        "Returns": "x : array",
        "Examples": ">>> solve(a, b)",
    }


def test_a_docstring_of_googles_style_is_split() -> None:
    assert split_docstring(GOOGLE) == {
        "summary": "Open a file.",
        "Parameters": "path (str): Where it lies,\n    in one line.\nmode: How.",
        "Returns": "A handle.",
        "Raises": "OSError: There is none.",
        "Examples": '>>> open_it("x")',
    }


def test_a_docstring_of_sphinxs_style_is_split() -> None:
    found = split_docstring(SPHINX)
    assert found["summary"] == "Send a request.\n\nWaits for the answer."
    assert found["Parameters"] == ":param url: Where to.\n:param data: What.\n:returns: the answer\n:rtype: Response"


@pytest.mark.parametrize("docstring", ["One line.", "Two\nlines.", "A paragraph.\n\nAnother one: with a colon."])
def test_a_docstring_without_headings_is_all_summary(docstring: str) -> None:
    assert split_docstring(docstring) == {"summary": docstring}


def test_an_empty_docstring_has_an_empty_summary() -> None:
    assert split_docstring("") == {"summary": ""}
    assert split_docstring("Args:\n    x: first thing")["summary"] == ""


def test_the_first_of_two_sections_of_one_kind_counts() -> None:
    assert split_docstring("Do it.\n\nArgs:\n    a: one\n\nArguments:\n    b: two")["Parameters"] == "a: one"


# ------------------------------------------------------------------------------ entries


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that must be read without being run."""
    root = tmp_path / "made_up_library"
    for folder in (root, root / "tests", root / "_inner"):
        folder.mkdir()
    (root / "__init__.py").write_text('"""A library that must never be imported."""\nraise SystemExit("imported")\n')
    (root / "shapes.py").write_text(
        '"""Shapes of all kinds, and what to do with them."""\n'
        "def area(shape, unit):\n"
        '    """Measure how large a shape is.\n\n    Args:\n        shape: which one\n    """\n'
        "    return shape.width * shape.height\n"
        "def same(shape, unit):\n"
        '    """Measure how large a shape is.\n\n    Args:\n        shape: which one\n    """\n'
        "def _hidden():\n"
        '    """This is nobody\'s business but ours."""\n'
        "def short():\n"
        '    """Too short."""\n'
        "def undocumented():\n    pass\n"
        "class Circle:\n"
        '    """A shape without corners, as round as can be."""\n'
        "    def __init__(self, radius):\n        self.radius = radius\n"
        "    def grow(self, by):\n"
        '        """Make the circle larger than it was before."""\n'
        "        self.radius += by\n"
        "    async def shrink(self):\n"
        '        """Make the circle smaller than it was before."""\n'
    )
    (root / "_inner" / "parts.py").write_text('def turn():\n    """Turn a shape around its own centre."""\n')
    (root / "template.py").write_text("def {name}(:\n")
    (root / "latin.py").write_bytes(b"# \xe9\n")
    (root / "tests" / "helpers.py").write_text('def check():\n    """Check that everything is as it should be."""\n')
    (root / "test_shapes.py").write_text('def check():\n    """Check that everything is as it should be."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    return root.name


def test_sources_are_read_without_being_run(package: str) -> None:
    entries, versions = read_entries((package,))
    assert {(entry.kind, entry.name) for entry in entries} == {
        ("function", "parts.turn"), ("module", "made_up_library.shapes"), ("function", "shapes.area"),
        ("class", "shapes.Circle"), ("method", "Circle.grow"),
        ("method", "Circle.shrink"),
    }  # fmt: skip
    assert versions == {package: "unknown"}
    assert package not in sys.modules


def test_an_entry_holds_its_source_without_the_docstring(package: str) -> None:
    entries = {entry.name: entry for entry in read_entries((package,))[0]}
    assert entries["shapes.area"].source == "def area(shape, unit):\n    return shape.width * shape.height"
    assert entries["shapes.area"].sections["Parameters"] == "shape: which one"
    assert entries["shapes.Circle"].source == "def __init__(self, radius):\n    self.radius = radius"
    assert entries["shapes.Circle"].methods == ("__init__", "grow", "shrink")[1:]
    assert entries["Circle.shrink"].source == ""  # nothing but its docstring


def test_missing_packages_are_named(package: str) -> None:
    with pytest.raises(KoalaBenchError, match=r"surely_not_installed, nor_this_one .*pip install"):
        read_entries(("surely_not_installed", package, "nor_this_one"))


# ------------------------------------------------------------------------------ dialogues


def entry(**sections: str) -> Entry:
    return Entry(
        "library",
        "shapes.area",
        "function",
        {"summary": "Measure how large a shape is.", **sections},
        "def area(): ...",
        ("grow",),
    )


def test_dialogues_cover_every_topic_of_an_entry() -> None:
    one = entry(
        Parameters="shape: which",
        Returns="a number",
        Examples=">>> area(x)",
        Raises="ValueError",
        Notes="none",
        Attributes="x",
        Shape="(n,)",
    )
    dialogues, answers = dialogues_of(one), answers_of(one)
    assert set(answers) == {
        "summary",
        "Parameters",
        "Returns",
        "Examples",
        "Raises",
        "Notes",
        "Attributes",
        "Shape",
        "source",
        "methods",
    }
    assert {answer for dialogue in dialogues for answer in dialogue[1::2]} == set(answers.values())
    assert all(
        len(dialogue) == 4 and "`shapes.area`" in dialogue[0] and "library" in dialogue[0] for dialogue in dialogues
    )
    assert dialogues[0][1] == answers["summary"]


def test_an_entry_with_a_summary_alone_gives_a_single_question() -> None:
    one = Entry("library", "shapes", "module", {"summary": "Shapes of all kinds."}, "")
    assert [dialogue[1:] for dialogue in dialogues_of(one)] == [["Shapes of all kinds."]]


def test_answers_are_cut_at_a_boundary() -> None:
    paragraphs = "\n\n".join("word " * 60 for _ in range(10))
    cut = answers_of(Entry("p", "n", "module", {"summary": paragraphs}, ""))["summary"]
    assert 130 < len(cut) <= 400
    assert paragraphs.startswith(cut) and paragraphs[len(cut) :].lstrip(" ").startswith("\n\n")


@pytest.fixture(scope="module")
def small() -> Conversations:
    return read_documentation(SMALL)


def test_dialogues_alternate_and_have_at_most_two_turns(small: Conversations) -> None:
    assert len(small.train) > 500
    for dialogue in [*small.train, *small.held_out]:
        assert len(dialogue) in (2, 4)
        assert all(isinstance(text, str) and text.strip() for text in dialogue)
        assert any(package in dialogue[0] for package in SMALL)
    assert sum(len(dialogue) == 4 for dialogue in small.train) > len(small.train) * 0.8


def test_held_out_entries_never_occur_in_training_dialogues(small: Conversations) -> None:
    entries = read_entries(SMALL)[0]
    held = [entry for entry in entries if entry.held_out]
    assert 0.01 < len(held) / len(entries) < 0.06
    asked = {dialogue[0] for dialogue in small.train}
    said = {answer for dialogue in small.train for answer in dialogue[1::2]}
    for entry in held:
        assert not [
            question for question in asked if f"`{entry.name}`" in question and f" {entry.package}" in question
        ], entry.name
        assert answers_of(entry)["summary"] not in said
    expected = sorted(dialogue for entry in held for dialogue in dialogues_of(entry))
    assert sorted(small.held_out) == expected


def test_whether_an_entry_is_held_out_depends_on_its_name_alone() -> None:
    names = [f"thing_{i}" for i in range(4000)]
    held = [name for name in names if Entry("p", name, "function", {"summary": "x"}, "").held_out]
    assert held == [
        name for name in names if Entry("p", name, "class", {"summary": "other"}, "source", ("m",)).held_out
    ]
    assert 60 <= len(held) <= 140  # one in forty


def test_the_corpus_is_the_same_in_every_process(small: Conversations) -> None:
    code = f"import koala_bench.pretraining.corpus as c; print(c.corpus_sha256(c.read_documentation({SMALL!r})))"
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONHASHSEED": other}
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert answer.stdout.strip() == corpus_sha256(small) == small.provenance["corpus_sha256"]


def test_the_hash_tells_training_from_held_out_and_knows_the_order() -> None:
    parts: list[tuple[list[list[str]], list[list[str]]]] = [
        ([["a", "b"]], []),
        ([], [["a", "b"]]),
        ([["a"], ["b"]], []),
        ([["b", "a"]], []),
        ([["a", "b"], ["c", "d"]], []),
        ([["c", "d"], ["a", "b"]], []),
    ]
    corpora = [Conversations(train, [], held_out, {}) for train, held_out in parts]
    assert len({corpus_sha256(corpus) for corpus in corpora}) == len(corpora)
    assert corpus_sha256(Conversations([["a", "b"]], ["x"], [], {"source": "y"})) == corpus_sha256(corpora[0])
