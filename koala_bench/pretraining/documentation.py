"""The documented objects of installed packages: their docstrings, in sections, and their sources.

The sources are parsed, never imported or executed. What is found depends only on the versions of the packages.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koala_bench.errors import KoalaBenchError

# Import name -> distribution name. The project or its extra ``pretrain`` requires them all.
PACKAGES = {
    "torch": "torch", "transformers": "transformers", "accelerate": "accelerate", "numpy": "numpy", "scipy": "scipy",
    "pandas": "pandas", "matplotlib": "matplotlib", "sympy": "sympy", "networkx": "networkx", "pydantic": "pydantic",
    "rich": "rich", "typer": "typer", "huggingface_hub": "huggingface_hub", "jinja2": "Jinja2", "requests": "requests",
    "httpx": "httpx", "fontTools": "fonttools", "prompt_toolkit": "prompt_toolkit", "PIL": "pillow",
    "aiohttp": "aiohttp",
}  # fmt: skip

# Folders whose sources document nothing a user would ask about.
_SKIPPED_FOLDERS = {
    "models", "tests", "test", "testing", "_vendor", "vendored", "benchmarks", "__pycache__",
    # torch's compiler and second implementations: private, and namesakes of what users mean
    "_inductor", "_dynamo", "_export", "_higher_order_ops", "_refs", "_prims", "_prims_common", "_decomp", "_numpy",
    "ao", "onnx",
}  # fmt: skip
# A small target learns to end an answer only if answers end soon; what is longer it repeats.
_SOURCE_LINES = 10
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
_SHOWN_DIRECTIVES = {
    "note", "warning", "tip", "hint", "important", "attention", "caution", "admonition", "code-block", "code",
    "sourcecode", "testcode", "doctest", "ipython", "plot",
}  # fmt: skip
_SECTION_NAMES = {
    "args": "Parameters", "arguments": "Parameters", "parameters": "Parameters", "keyword args": "Parameters",
    "other parameters": "Parameters", "inputs": "Parameters", "input": "Parameters",
    "return": "Returns", "returns": "Returns", "yields": "Returns",
    "raises": "Raises", "example": "Examples", "examples": "Examples", "usage": "Examples",
    "note": "Notes", "notes": "Notes", "shape": "Shape", "attributes": "Attributes",
}  # fmt: skip


def _without_directives(lines: Iterable[str]) -> Iterator[str]:
    """Lines of reStructuredText without heads and options of directives, and without bodies that show nothing."""
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
    """Named sections of a docstring of NumPy, Google or Sphinx style; ``summary`` is what stands before them."""
    text = inspect.cleandoc(docstring)
    headings = [(m.start(), m.end(), m.group(1)) for m in _NUMPY_HEADING.finditer(text)]
    headings = headings or [(m.start(), m.end(), m.group(1)) for m in _GOOGLE_HEADING.finditer(text)]
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
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)

    def entry(owner: str, node: Any, kind: str, source: str, methods: tuple[str, ...] = ()) -> Iterator[Entry]:
        if docstring := ast.get_docstring(node):
            yield Entry(package, f"{owner}.{node.name}", kind, split_docstring(docstring), source, methods)

    for node in tree.body:
        if not isinstance(node, (*functions, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if not isinstance(node, ast.ClassDef):
            yield from entry(module, node, "function", _source_of(lines, node))
            continue
        inside = [item for item in node.body if isinstance(item, functions)]
        public_ones = [item for item in inside if not item.name.startswith("_")]
        init = next((item for item in inside if item.name == "__init__"), None)
        source = "" if init is None else _source_of(lines, init)
        yield from entry(module, node, "class", source, tuple(item.name for item in public_ones))
        for item in public_ones:
            yield from entry(node.name, item, "method", _source_of(lines, item))


def _version(package: str) -> str:
    try:
        # Without the build tag: the CPU and the CUDA build of torch have the same documentation.
        return importlib.metadata.version(PACKAGES.get(package, package)).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def read_entries(packages: Sequence[str] = tuple(PACKAGES)) -> tuple[list[Entry], dict[str, str]]:
    """The documented objects of the installed packages in a fixed order, and the version of every distribution.

    An entry is dropped where an earlier one has the same package and name, or the same summary and parameters. Raises
    KoalaBenchError where packages are not installed."""
    roots = {package: importlib.util.find_spec(package) for package in packages}
    if missing := [PACKAGES.get(name, name) for name, spec in roots.items() if spec is None or spec.origin is None]:
        raise KoalaBenchError(
            f"The documentation of {', '.join(missing)} cannot be read: not installed.",
            "Install what it is read from: pip install 'koala-bench[pretrain]', in a checkout with -c constraints.txt.",
        )
    entries: list[Entry] = []
    seen: set[tuple[str, ...]] = set()
    for package, spec in roots.items():
        assert spec is not None and spec.origin is not None
        root = Path(spec.origin).parent
        for path in _python_files(root):
            for entry in _entries_of_file(package, root, path):
                summary = entry.sections["summary"]
                keys = {(package, entry.name), ("text", summary, entry.sections.get("Parameters", ""))}
                if len(summary) < 20 or keys & seen:
                    continue
                seen |= keys
                entries.append(entry)
    return entries, {PACKAGES.get(package, package): _version(package) for package in packages}
