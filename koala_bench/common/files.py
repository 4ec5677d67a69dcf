"""Files that are never half written: contents go to a neighbour first and take the name at the end."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from koala_bench.errors import KoalaBenchError


def cannot(what: str, path: Path | str, error: OSError, remedy: str) -> KoalaBenchError:
    """The error of something that the system refuses to do with a file."""
    return KoalaBenchError(f"Cannot {what} {path}: {error.strerror or error}.", remedy)


@contextmanager
def doing(what: str, path: Path, remedy: str) -> Iterator[None]:
    """Turns what the system refuses within into the error of ``cannot``."""
    try:
        yield
    except OSError as error:
        raise cannot(what, path, error, remedy) from error


def cache_folder() -> Path:
    """The project's folder in the user's cache, ``XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "koala-bench"


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are not there yet. Raises KoalaBenchError where it cannot be made,
    or a file has its name."""
    with doing("make the folder", path, "Choose another folder with --out."):
        path.mkdir(parents=True, exist_ok=True)


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise KoalaBenchError(f"Cannot write {path}: it is a folder.", "Name a file.")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path``, on failure it is removed. Raises
    KoalaBenchError where it is a folder, the one above it cannot be written, or the disk is full."""
    _refuse_folder(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "r+b") as handle:  # Windows flushes no handle that cannot write
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        raise cannot(
            "write", path, error, "Free space or choose another folder with --out; what was there is unchanged."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file atomically, UTF-8 with ``\\n`` line ends."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write some text files, or none of them if one cannot be written. Raises KoalaBenchError where a folder cannot be
    written or has the name of a file, or the disk is full."""
    for path in texts:
        _refuse_folder(path)
    with ExitStack() as stack:
        for path, text in texts.items():
            stack.enter_context(replacing(path)).write_text(text, encoding="utf-8", newline="\n")


def readable_as_others(path: Path) -> None:
    """Give a file the mode that a new one has here. safetensors writes its own for their owner alone since 0.8, and
    whoever shares a machine could not read a trained head."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.mode")
    try:
        probe.touch()  # asking for the umask would change it for all threads
        path.chmod(probe.stat().st_mode & 0o777)
    finally:
        probe.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes, read in pieces.

    Raises:
        OSError: with the file's name, which Python leaves out where reading fails rather than opening.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    except OSError as error:
        error.filename = str(path)
        raise
    return digest.hexdigest()


@contextmanager
def continue_log(path: Path, done: int) -> Iterator[TextIO]:
    """Open a log of JSON lines to append to, cut back to step ``done``: lines of steps that will run again go. Raises
    KoalaBenchError where the log is damaged or cannot be written, or the disk is full."""
    kept = []
    if path.exists():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise KoalaBenchError(
                f"The log {path} is damaged: {error}.", "Delete it; the training itself goes on from its checkpoint."
            ) from error
        for line in text.splitlines():
            try:
                if json.loads(line)["step"] <= done:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # the line that a kill left half written
    write_text(path, "".join(line + "\n" for line in kept))
    try:
        with open(path, "a", encoding="utf-8") as log:
            yield log
    except OSError as error:  # what is buffered may be refused as late as here
        if path.is_file() and not path.stat().st_size:
            path.unlink()  # it says nothing
        raise cannot(
            "write", path, error, "Free space and start again; it goes on from the last checkpoint."
        ) from error
