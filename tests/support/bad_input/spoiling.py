"""Ways to spoil a folder of good input, and circumstances in which nothing works, for the table of bad input."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils._http as hub_http
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config

from koala_bench.testing import save_tiny_target, tiny_config
from tests.support.synthetic_run import make_header, write_run

Arrange = Callable[[Path], None]
Around = Callable[[], AbstractContextManager[None]]


# ---------------------------------------------------------------------------------------------- spoiling a room

NESTED = "[" * 100_000
DIGITS = "9" * 5000  # more than Python turns into a number
UNREADABLE = Path("/proc/self/mem")  # a file whose first byte nobody can read, the superuser included
UNWRITABLE = Path("/proc/self/task")  # a folder in which nobody can make a file


def put(name: str, content: str | bytes = "") -> Arrange:
    """Write a file."""

    def arrange(room: Path) -> None:
        (room / name).parent.mkdir(parents=True, exist_ok=True)
        (room / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return arrange


def lines(name: str, *rows: object) -> Arrange:
    """Write a file of JSON lines; a text is a line as it is."""
    return put(name, "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def cut(name: str, size: int) -> Arrange:
    """Keep the first bytes of a file only."""
    return lambda room: put(name, (room / name).read_bytes()[:size])(room)


def edit(name: str, **changes: Any) -> Arrange:
    """Change fields of a JSON file; None removes one."""

    def arrange(room: Path) -> None:
        contents = {**json.loads((room / name).read_text()), **changes}
        (room / name).write_text(
            json.dumps({key: value for key, value in contents.items() if changes.get(key, "") is not None})
        )

    return arrange


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Arrange:
    """Change the tensors of a safetensors file."""

    def arrange(room: Path) -> None:
        found = load_file(room / name)
        change(found)
        save_file(found, room / name, metadata={"format": "pt"})

    return arrange


def pickled(name: str, found: dict[str, torch.Tensor]) -> Arrange:
    """Write tensors as torch does."""

    def arrange(room: Path) -> None:
        (room / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, room / name)

    return arrange


def link(name: str, place: Path) -> Arrange:
    """Put a link in the place of a file or folder."""

    def arrange(room: Path) -> None:
        (room / name).unlink(missing_ok=True)
        (room / name).symlink_to(place)

    return arrange


def folder(name: str) -> Arrange:
    """Make an empty folder."""
    return lambda room: (room / name).mkdir(parents=True)


def copied(name: str, place: str) -> Arrange:
    """Copy a file over another."""
    return lambda room: shutil.copy(room / name, room / place) and None


def remove(name: str) -> Arrange:
    """Take a file or a folder away."""
    return lambda room: shutil.rmtree(room / name) if (room / name).is_dir() else (room / name).unlink()


def line(number: int, text: str, name: str = "record.jsonl") -> Arrange:
    """Replace a line of a file, counted from 1."""

    def arrange(room: Path) -> None:
        found = (room / name).read_text().splitlines()
        (room / name).write_text("\n".join([*found[: number - 1], text, *found[number:]]) + "\n")

    return arrange


def keep_lines(change: Callable[[list[str]], list[str]], name: str = "record.jsonl") -> Arrange:
    """Change the list of lines of a file."""
    return lambda room: put(name, "\n".join(change((room / name).read_text().splitlines())) + "\n")(room)


def turn(number: int = 2, **changes: Any) -> Arrange:
    """Change fields of a line of the record; of the header with number 1."""

    def arrange(room: Path) -> None:
        found = json.loads((room / "record.jsonl").read_text().splitlines()[number - 1])
        line(number, json.dumps({**found, **changes}))(room)

    return arrange


def state(content: object) -> Arrange:
    """An unfinished training whose checkpoint is this."""

    def arrange(room: Path) -> None:
        remove("done/heads/medusa/model.safetensors")(room)
        if isinstance(content, bytes):
            put("done/heads/checkpoint.pt", content)(room)
        else:
            torch.save(content, room / "done/heads/checkpoint.pt")

    return arrange


def state_without(key: str) -> Arrange:
    """An unfinished training whose checkpoint lacks what is under a key."""

    def arrange(room: Path) -> None:
        found = torch.load(room / "done/heads/checkpoint.pt")
        state({**found, key: {}})(room)

    return arrange


def both(*arrangements: Arrange) -> Arrange:
    """One after the other."""

    def arrange(room: Path) -> None:
        for each in arrangements:
            each(room)

    return arrange


def record(name: str, **header: Any) -> Arrange:
    """A record of another run."""
    return lambda room: write_run(room / name, header={**make_header(), "run_id": name, **header}) and None  # type: ignore[typeddict-item]


def encoder_decoder(name: str) -> Arrange:
    """The configuration of a model of another kind."""
    return lambda room: T5Config(d_model=32, num_layers=1).save_pretrained(room / name)


def target(folder: str, **config: Any) -> Arrange:
    """A target of another shape."""
    return lambda room: save_tiny_target(room / folder, tiny_config(**config)) and None


# ---------------------------------------------------------------------------------------------- circumstances


@contextmanager
def _patched(place: object, name: str, value: object) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, value)
        yield


def _refused(*_: object, **__: object) -> None:
    raise urllib.error.URLError("Connection refused")


class _Answer:
    def __enter__(self) -> _Answer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, _: int) -> bytes:
        return b"<html>Please sign in</html>"


def no_cuda() -> AbstractContextManager[None]:
    return _patched(torch.cuda, "is_available", lambda: False)


def offline() -> AbstractContextManager[None]:
    """As with HF_HUB_OFFLINE=1, which is read when the hub's client is imported."""
    return _patched(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@contextmanager
def no_hub() -> Iterator[None]:
    """A look-up that really fails, for nothing listens on the discard port; the pauses between its five tries are left
    out.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        patch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
        )
        patch.setattr(hub_http.time, "sleep", lambda _: None)
        yield


def no_network() -> AbstractContextManager[None]:
    return _patched(urllib.request, "urlopen", _refused)


def sign_in_page() -> AbstractContextManager[None]:
    return _patched(urllib.request, "urlopen", lambda *_, **__: _Answer())


@contextmanager
def full_disk(kilobytes: int = 0) -> Iterator[None]:
    """No file can grow beyond this: the system itself refuses the bytes, whoever writes them, torch and safetensors
    included.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
