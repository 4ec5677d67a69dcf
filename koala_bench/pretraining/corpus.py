"""A text corpus that every machine with this project has: the documentation of its dependencies.

The sources of the installed packages are parsed (never imported or executed) and every documented
function, class and module becomes a few two-turn dialogues: what does it do, which arguments does it
take, show an example, show its source. The text depends only on the versions of the packages, so under
``constraints.txt`` it is the same everywhere, and its hash is kept in the manifest of what was trained on it.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import random
import re
import textwrap
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from koala_bench.common.files import replacing
from koala_bench.errors import KoalaBenchError

# Import name -> distribution name. All are run-time dependencies of this project, direct or not.
PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "numpy": "numpy",
    "scipy": "scipy",
    "pandas": "pandas",
    "matplotlib": "matplotlib",
    "sympy": "sympy",
    "networkx": "networkx",
    "pydantic": "pydantic",
    "rich": "rich",
    "typer": "typer",
    "huggingface_hub": "huggingface_hub",
    "jinja2": "Jinja2",
    "requests": "requests",
    "httpx": "httpx",
    "fontTools": "fonttools",
    "prompt_toolkit": "prompt_toolkit",
    "PIL": "pillow",
    "aiohttp": "aiohttp",
}

# Folders whose sources document nothing a user would ask about.
_SKIPPED_FOLDERS = {
    "models", "tests", "test", "testing", "_vendor", "vendored", "benchmarks", "__pycache__",
    # torch's compiler and second implementations: private, and namesakes of what users mean
    "_inductor", "_dynamo", "_export", "_higher_order_ops", "_refs", "_prims", "_prims_common", "_decomp", "_numpy", "ao", "onnx",
}  # fmt: skip
# A small target learns to end an answer only if answers end soon; what is longer it repeats.
_ANSWER_CHARACTERS = 400
_SOURCE_LINES = 10
_LISTED_METHODS = 8
# Answers that compress below this are tables of equal lines: they teach a small model to loop.
_SMALLEST_COMPRESSED_SHARE = 0.4
HELD_OUT_ONE_IN = 40


@dataclass(frozen=True)
class Entry:
    """One documented object: a module, a class or a function."""

    package: str
    name: str  # as a user would say it, e.g. `DataFrame.merge` or `linalg.solve`
    kind: str  # "module", "class", "function" or "method"
    sections: dict[str, str]  # "summary", "Parameters", "Returns", ... -> text
    source: str  # empty for modules
    methods: tuple[str, ...] = ()

    @property
    def held_out(self) -> bool:
        """Whether the entry is kept out of all training; decided by its name alone."""
        digest = hashlib.sha256(f"{self.package}:{self.name}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Corpus:
    """Dialogues to train a target on, and what they were made from: the installed libraries, or files of conversations."""

    train: list[list[str]]  # each dialogue alternates user, assistant, user, assistant
    held_out: list[list[str]]
    versions: dict[str, str]
    missing: tuple[str, ...] = field(default=())
    provenance: dict[str, Any] = field(default_factory=dict)  # of files of conversations; empty for the documentation

    @property
    def sha256(self) -> str:
        """Hash of all dialogues in their order."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            for dialogue in part:
                digest.update(json.dumps(dialogue, ensure_ascii=False).encode())
                digest.update(b"\n")
            digest.update(b"\x00")
        return digest.hexdigest()


# --------------------------------------------------------------------------------------------
# Docstrings


_NUMPY_HEADING = re.compile(r"^([A-Z][A-Za-z ]{2,30})\n(-{3,}|={3,})\s*$", re.MULTILINE)
_GOOGLE_HEADING = re.compile(
    r"^(Args|Arguments|Parameters|Returns?|Yields|Raises|Examples?|Notes?|Shape|Attributes|Inputs?|Keyword"
    r" args|Usage)\s*:{1,2}\s*$",
    re.MULTILINE | re.IGNORECASE,
)
_SPHINX_FIELD = re.compile(r"^:(param|type|returns?|rtype|raises?)\b[^:]*:", re.MULTILINE)
_ROLE = re.compile(r":[a-z:]+:`~?([^`<]+?)(?:\s*<[^`>]+>)?`")
_DOUBLE_BACKTICK = re.compile(r"(?<!`)``(?!`)")  # not the three of a code fence
_LINKED_NAME = re.compile(r"\[`[~!]?([^`]+)`\]")  # how transformers' documentation links a class
_CITATION = re.compile(r" ?\[\w+\]_(?!\w)")
_TAG_LINE = re.compile(r"^\s*(</?[A-Za-z]+>|\[\[.*\]\])\s*$")
_DIRECTIVE = re.compile(r"^(\s*)\.\. (?:([\w-]+)::)?")
_DIRECTIVE_OPTION = re.compile(r"^\s+:[\w-]+:")
# Directives whose body is text or code that a reader sees; of others the body goes too.
_SHOWN_DIRECTIVES = {"note", "warning", "tip", "hint", "important", "attention", "caution", "admonition", "code-block", "code", "sourcecode", "testcode",
                     "doctest", "ipython", "plot"}  # fmt: skip
_SECTION_NAMES = {
    "args": "Parameters", "arguments": "Parameters", "parameters": "Parameters", "keyword args": "Parameters",
    "other parameters": "Parameters", "inputs": "Parameters", "input": "Parameters",
    "return": "Returns", "returns": "Returns", "yields": "Returns",
    "raises": "Raises", "example": "Examples", "examples": "Examples", "usage": "Examples",
    "note": "Notes", "notes": "Notes", "shape": "Shape", "attributes": "Attributes",
}  # fmt: skip


def _without_directives(lines: Iterable[str]) -> Iterator[str]:
    """Lines of reStructuredText without directives: their heads and options go, and the body of those that show
    nothing.
    """
    margin: int | None = None  # of the directive whose body is being dropped
    options = False  # whether the last line was a directive's head or option
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if margin is not None and (not line.strip() or indent > margin):
            continue
        margin = None
        if found := _DIRECTIVE.match(line):
            options = True
            if found.group(2) not in _SHOWN_DIRECTIVES:
                margin = indent
        elif not (options and _DIRECTIVE_OPTION.match(line)) and not _TAG_LINE.match(line):
            options = False
            yield line


def _clean(text: str) -> str:
    """Plain text of a docstring section: roles and links become code, directives, citations and long blanks go."""
    text = _LINKED_NAME.sub(r"`\1`", _ROLE.sub(r"`\1`", _DOUBLE_BACKTICK.sub("`", text)))
    lines = [line.rstrip() for line in _without_directives(text.splitlines())]
    lines = [line[:-1] if line.endswith("::") else line for line in lines]
    text = _CITATION.sub("", textwrap.dedent("\n".join(lines)).strip("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def split_docstring(docstring: str) -> dict[str, str]:
    """Split a docstring of NumPy, Google or Sphinx style into named sections.

    Returns a mapping whose key ``summary`` holds what stands before the first heading.
    """
    text = inspect.cleandoc(docstring)
    headings = [(m.start(), m.end(), m.group(1)) for m in _NUMPY_HEADING.finditer(text)]
    if not headings:
        headings = [(m.start(), m.end(), m.group(1)) for m in _GOOGLE_HEADING.finditer(text)]
    if not headings and (found := _SPHINX_FIELD.search(text)):
        headings = [(found.start(), found.start(), "Parameters")]
    summary_end = headings[0][0] if headings else len(text)
    sections = {"summary": _clean(text[:summary_end])}
    for index, (_, end, title) in enumerate(headings):
        name = _SECTION_NAMES.get(title.strip().lower())
        stop = headings[index + 1][0] if index + 1 < len(headings) else len(text)
        body = _clean(text[end:stop])
        if name and body and name not in sections:
            sections[name] = body
    return sections


# --------------------------------------------------------------------------------------------
# Sources


def _python_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _SKIPPED_FOLDERS.intersection(parts[:-1]) and not parts[-1].startswith(("test_", "conftest", "version")):
            yield path


def _source_of(lines: Sequence[str], node: ast.AST) -> str:
    """The definition without its docstring, cut after a readable number of lines."""
    start, end = node.lineno - 1, node.end_lineno  # type: ignore[attr-defined]
    body = node.body  # type: ignore[attr-defined]
    if ast.get_docstring(node, clean=False) is not None:  # type: ignore[arg-type]
        kept = [*lines[start : body[0].lineno - 1], *lines[body[0].end_lineno : end]]
        if len(body) == 1:
            return ""
    else:
        kept = list(lines[start:end])
    kept = [line for line in kept if line.strip()]
    text = textwrap.dedent("\n".join(kept[:_SOURCE_LINES]))
    return text if len(kept) <= _SOURCE_LINES else text + "\n    ..."


def _entries_of_file(package: str, root: Path, path: Path) -> Iterator[Entry]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):
        return  # templates and Python 2 examples inside packages
    lines = text.splitlines()
    parts = [package, *path.relative_to(root).with_suffix("").parts]
    public = [part for part in parts if not part.startswith("_")]
    module = public[-1]
    docstring = ast.get_docstring(tree)
    if docstring and len(public) > 1:
        yield Entry(package, ".".join(public[-2:]), "module", split_docstring(docstring), "")
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if (docstring := ast.get_docstring(node)) and not node.name.startswith("_"):
                yield Entry(
                    package, f"{module}.{node.name}", "function", split_docstring(docstring), _source_of(lines, node)
                )
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            functions = [item for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))]
            documented = [
                (item, doc) for item in functions if not item.name.startswith("_") and (doc := ast.get_docstring(item))
            ]
            init = next((item for item in functions if item.name == "__init__"), None)
            if docstring := ast.get_docstring(node):
                methods = tuple(item.name for item in functions if not item.name.startswith("_"))
                source = _source_of(lines, init) if init is not None else ""
                yield Entry(package, f"{module}.{node.name}", "class", split_docstring(docstring), source, methods)
            for item, doc in documented:
                yield Entry(
                    package, f"{node.name}.{item.name}", "method", split_docstring(doc), _source_of(lines, item)
                )


def _version(package: str) -> str | None:
    try:
        # Without the build tag: the CPU and the CUDA build of torch have the same documentation.
        return importlib.metadata.version(PACKAGES.get(package, package)).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def read_entries(packages: Sequence[str] = tuple(PACKAGES)) -> tuple[list[Entry], dict[str, str], tuple[str, ...]]:
    """Read the documented objects of the installed packages.

    Returns the entries in a fixed order, the version of every package found, and the names of those missing.
    An entry is dropped where an earlier one has the same package and name, or the same summary and source.
    """
    entries: list[Entry] = []
    versions: dict[str, str] = {}
    missing: list[str] = []
    seen: set[tuple[str, ...]] = set()
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            missing.append(package)
            continue
        versions[PACKAGES.get(package, package)] = _version(package) or "unknown"
        root = Path(spec.origin).parent
        for path in _python_files(root):
            for entry in _entries_of_file(package, root, path):
                keys = {
                    (package, entry.name),
                    ("text", entry.sections["summary"], entry.sections.get("Parameters", "")),
                }
                if len(entry.sections["summary"]) < 20 or keys & seen:
                    continue
                seen |= keys
                entries.append(entry)
    return entries, versions, tuple(missing)


# --------------------------------------------------------------------------------------------
# Dialogues


def _cut(text: str, limit: int = _ANSWER_CHARACTERS) -> str:
    """Whole paragraphs, else whole lines, up to about ``limit`` characters."""
    if len(text) <= limit:
        return text
    head = text[:limit]
    for separator in ("\n\n", "\n", ". "):
        position = head.rfind(separator)
        if position > limit // 3:
            return head[: position + (1 if separator == ". " else 0)].rstrip()
    return head


def _fenced(code: str) -> str:
    return f"```python\n{_cut(code)}\n```"


_WHAT = (
    "What does `{n}` do in {p}?",
    "What is `{n}` in {p}?",
    "Explain `{n}` from {p}.",
    "Tell me about `{n}` in {p}.",
)
_FIRST = {
    "Parameters": (
        "Which arguments does `{n}` of {p} take?",
        "Explain the parameters of `{n}` from {p}.",
        "How do I call `{n}` in {p}?",
    ),
    "Returns": ("What does `{n}` from {p} return?", "Which value do I get from `{n}` in {p}?"),
    "Examples": ("Show me an example of `{n}` from {p}.", "How do I use `{n}` in {p}?"),
    "Raises": ("Which errors does `{n}` from {p} raise?", "When does `{n}` in {p} fail?"),
    "Notes": ("What should I know about `{n}` in {p}?", "Are there notes on `{n}` from {p}?"),
    "Attributes": ("Which attributes does `{n}` from {p} have?",),
    "Shape": ("Which shapes does `{n}` from {p} expect?",),
    "source": ("Show the source of `{n}` from {p}.", "How is `{n}` implemented in {p}?"),
    "methods": ("Which methods does `{n}` of {p} have?", "List the methods of `{n}` from {p}."),
}
_SECOND = {
    "summary": ("What does it do?", "And what is it for?"),
    "Parameters": ("Which arguments does it take?", "What are its parameters?"),
    "Returns": ("What does it return?",),
    "Examples": ("Show an example.", "Can you show me an example?"),
    "Raises": ("Which errors does it raise?",),
    "Notes": ("Is there anything else to know?", "Any notes?"),
    "Attributes": ("Which attributes does it have?",),
    "Shape": ("Which shapes does it expect?",),
    "source": ("Show its source.", "How is it implemented?", "Show the code."),
    "methods": ("Which methods does it have?",),
}


def _repeats_itself(text: str) -> bool:
    data = text.encode()
    return len(zlib.compress(data)) < _SMALLEST_COMPRESSED_SHARE * len(data)


def answers_of(entry: Entry) -> dict[str, str]:
    """What can be answered about an entry: topic -> answer. Answers that mostly repeat themselves are left out."""
    answers = {"summary": _cut(entry.sections["summary"])}
    for name, text in entry.sections.items():
        if name != "summary":
            answers[name] = _fenced(text) if name == "Examples" and "```" not in text else f"{name}:\n\n{_cut(text)}"
    if entry.source:
        answers["source"] = _fenced(entry.source)
    if entry.methods:
        answers["methods"] = f"The methods of `{entry.name}`:\n\n" + "\n".join(
            f"- `{name}`" for name in entry.methods[:_LISTED_METHODS]
        )
    return {topic: answer for topic, answer in answers.items() if topic == "summary" or not _repeats_itself(answer)}


def dialogues_of(entry: Entry) -> list[list[str]]:
    """Two-turn dialogues that cover every topic of the entry once as a first or a second turn.

    The wording is drawn from a generator seeded by the entry's name, so it does not depend on other entries.
    """
    draw = random.Random(f"{entry.package}:{entry.name}")
    answers = answers_of(entry)
    names = {"n": entry.name, "p": entry.package}
    others = [topic for topic in answers if topic != "summary"]
    draw.shuffle(others)
    dialogues = []
    first = [draw.choice(_WHAT).format(**names), answers["summary"]]
    if others:
        first += [draw.choice(_SECOND[others[0]]), answers[others[0]]]
    dialogues.append(first)
    rest = others[1:]
    while rest:
        topic = rest.pop(0)
        dialogue = [draw.choice(_FIRST[topic]).format(**names), answers[topic]]
        follow = rest.pop(0) if rest else "summary"
        dialogues.append([*dialogue, draw.choice(_SECOND[follow]), answers[follow]])
    return dialogues


def cached_corpus(cache: Path | None = None) -> Corpus:
    """The corpus of all packages, from a file in the user's cache folder if this version of it was built before.

    Parsing some 100 MB of sources takes half a minute; the file's name holds the versions and this module's own hash.
    """
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "koala-bench"
    found = {name: _version(name) for name in PACKAGES}
    key = hashlib.sha256(json.dumps([found, Path(__file__).read_text(encoding="utf-8")]).encode()).hexdigest()[:24]
    path = folder / f"corpus-{key}.json.gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8") as handle:
            kept = json.load(handle)
        return Corpus(kept["train"], kept["held_out"], kept["versions"], tuple(kept["missing"]))
    except (OSError, EOFError, ValueError, KeyError, zlib.error):
        pass  # not there yet, or damaged: build it
    corpus = read_corpus()
    try:
        with replacing(path) as temporary, gzip.open(temporary, "wt", encoding="utf-8", compresslevel=3) as handle:
            json.dump(
                {
                    "train": corpus.train,
                    "held_out": corpus.held_out,
                    "versions": corpus.versions,
                    "missing": corpus.missing,
                },
                handle,
            )
    except KoalaBenchError:
        pass  # a cache that cannot be written costs time, nothing else
    return corpus


def read_corpus(packages: Sequence[str] = tuple(PACKAGES)) -> Corpus:
    """Build the corpus from the installed packages.

    Raises:
        KoalaBenchError: none of the packages is installed.
    """
    entries, versions, missing = read_entries(packages)
    if not entries:
        raise KoalaBenchError(
            "None of the packages that the corpus is made from is installed.",
            "Install the project with its dependencies: pip install -e . -c constraints.txt",
        )
    train: list[list[str]] = []
    held_out: list[list[str]] = []
    for entry in entries:
        (held_out if entry.held_out else train).extend(dialogues_of(entry))
    # A fixed shuffle: neighbours in a file resemble each other, batches should not.
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(held_out)
    return Corpus(train, held_out, versions, missing)
