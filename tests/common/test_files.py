"""Files: never half written, whatever happens, and one clear error where they cannot be."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from koala_bench.common.files import make_folder, replacing, sha256_of, write_text
from koala_bench.errors import KoalaBenchError


def test_a_file_takes_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, KoalaBenchError("a", "b")])
def test_what_was_there_stays_if_writing_fails(tmp_path: Path, error: type[BaseException] | BaseException) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(type(error) if isinstance(error, BaseException) else error), replacing(path) as temporary:
        temporary.write_text("new")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with (
        pytest.raises(KoalaBenchError, match=r"Cannot write .*file\.txt: No space left on device\. Free space"),
        replacing(path) as temporary,
    ):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["x.txt", "a/b/x.txt"])
def test_a_path_below_a_file_is_one_clear_error(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(KoalaBenchError, match="Cannot make the folder"):
        write_text(tmp_path / "file" / below, "text")
    with pytest.raises(KoalaBenchError, match="Cannot make the folder"):
        make_folder(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_the_place_of_the_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "name" / "inside").mkdir(parents=True)
    with pytest.raises(KoalaBenchError, match=r"Cannot write .*name: it is a folder\. Name a file"):
        write_text(tmp_path / "name", "text")
    assert list(tmp_path.iterdir()) == [tmp_path / "name"]


def test_text_is_utf_8_with_plain_line_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "file.txt", "τ\r\né\n")
    assert (tmp_path / "file.txt").read_bytes() == "τ\r\né\n".encode()


def test_the_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000  # more than one piece
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()
