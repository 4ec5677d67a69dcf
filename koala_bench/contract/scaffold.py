"""A new draft head as a package to start from: module, entry point, test and README, written by ``koala-bench
new-head``."""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import shutil
from importlib import resources
from pathlib import Path

from koala_bench.common.files import doing, make_folder, write_text
from koala_bench.errors import KoalaBenchError
from koala_bench.registry import HEADS, OBJECTIVES, installed

# File of the package -> template in koala_bench/contract/new_head.
_FILES = {
    "pyproject.toml": "pyproject.toml.txt",
    "README.md": "README.md.txt",
    "@NAME@.py": "head.py.txt",
    "test_@NAME@.py": "test.py.txt",
}
# A module for Python and a project for pip, which wants a letter or digit at the end.
_NAME = re.compile(r"[a-z][a-z0-9_]*[a-z0-9]")


def new_head(name: str, folder: Path | None = None) -> list[Path]:
    """Write a working example package of a head.

    Args:
        name: of the head, its module and its project.
        folder: to be made; ``./NAME`` by default.

    Returns:
        the files.

    Raises:
        KoalaBenchError: the name is no name or is taken, the folder exists already or cannot be written.
    """
    _check_name(name)
    folder = Path(name) if folder is None else folder
    if os.path.lexists(folder):
        raise KoalaBenchError(f"{folder} exists already; nothing was written.", "Choose another folder with --out.")
    # It ends with Head so that it is never one of the names that the module imports.
    class_name = "".join(part.capitalize() for part in name.removesuffix("_head").split("_")) + "Head"
    templates = resources.files("koala_bench.contract") / "new_head"

    def filled(text: str) -> str:
        return text.replace("@NAME@", name).replace("@CLASS@", class_name)

    # Made beside its place and moved there as a whole: no half package is left behind.
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    make_folder(unfinished)
    try:
        for file, template in _FILES.items():
            write_text(unfinished / filled(file), filled((templates / template).read_text(encoding="utf-8")))
        with doing("write", folder, "Choose another folder with --out."):
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return [folder / filled(file) for file in _FILES]


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise KoalaBenchError(
            f"'{name}' cannot be the name of a head.",
            "Use two or more lower-case letters, digits and inner underscores, e.g. koala-bench new-head my_head.",
        )
    owners = [
        f"an installed {kind}, {installed(group)[name].value}"
        for kind, group in (("head", HEADS), ("objective", OBJECTIVES))
        if name in installed(group)
    ]
    found = importlib.util.find_spec(name)
    if found is not None and found.origin is not None:  # a folder that only happens to lie here has no origin
        owners.append(f"the module {found.origin}")
    if name == "vanilla":
        owners.append("decoding without a head")
    if owners:
        raise KoalaBenchError(f"'{name}' is taken by {owners[0]}.", "Choose another name.")
