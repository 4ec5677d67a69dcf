"""Fetching the public question files: verified, never overwriting, and clear where there is no network."""

from __future__ import annotations

import functools
import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from koala_bench.dialogues.downloads import DATASETS, Dataset, data_folder, fetch, status
from koala_bench.errors import KoalaBenchError

CONTENT = b'{"question_id": 1, "category": "", "turns": ["Why?"]}\n'


def _dataset(name: str, host: str, content: bytes = CONTENT) -> Dataset:
    return Dataset(
        name, "someone/bench", "c" * 40, f"data/{name}.jsonl", hashlib.sha256(content).hexdigest(), 1, "", "", host
    )


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, asked: list[str], *arguments: object) -> None:
        self.asked = asked
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path.endswith("gone.jsonl"):
            self.send_error(404)
            return
        cut = self.path.endswith("cut.jsonl")
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:5] if cut else CONTENT)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KOALA_BENCH_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """The address of a local server and the list of paths that were asked for."""
    asked: list[str] = []
    with HTTPServer(("127.0.0.1", 0), functools.partial(_Handler, asked)) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}", asked
        http.shutdown()
        thread.join()


@pytest.fixture
def refused() -> str:
    """An address at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_the_pins_are_complete_and_the_names_distinct() -> None:
    datasets = DATASETS
    assert len({dataset.name for dataset in datasets}) == len(datasets) == 13
    for dataset in datasets:
        assert (len(dataset.sha256 or 64 * "?"), len(dataset.commit)) == (64, 40)
        assert dataset.url.startswith(("https://raw.githubusercontent.com/", "https://media.githubusercontent.com/"))
        assert dataset.url.endswith(f"/{dataset.repository}/{dataset.commit}/{dataset.path}")
        assert dataset.licence
    unpinned = [dataset.name for dataset in datasets if dataset.sha256 is None]
    assert unpinned == ["mbpp", "arena_hard", "aime24", "speed_bench"]


def test_fetch_downloads_verifies_and_places(
    tmp_path: Path, server: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = [_dataset("one", server[0]), _dataset("two", server[0])]
    places = fetch(["two", "one", "two"], tmp_path / "new", datasets)
    one, two = (tmp_path / "new" / "eval" / name / "question.jsonl" for name in ("one", "two"))
    assert places == [two, one, two]
    assert one.read_bytes() == two.read_bytes() == CONTENT
    assert server[1] == [f"/someone/bench/{'c' * 40}/data/{name}.jsonl" for name in ("two", "one")]
    assert "two: 1 questions saved" in capsys.readouterr().err
    assert not [path for path in one.parent.iterdir() if path != one]


def test_a_file_without_a_known_hash_is_fetched_and_its_hash_told(
    tmp_path: Path, server: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = replace(_dataset("one", server[0]), sha256=None)
    (place,) = fetch(["one"], tmp_path, [dataset])
    assert place.read_bytes() == CONTENT
    assert hashlib.sha256(CONTENT).hexdigest() in capsys.readouterr().err
    assert [one.state for one in status(tmp_path, [dataset])] == ["present, unpinned"]


def test_a_file_that_must_be_made_is_not_downloaded(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    dataset = replace(_dataset("one", server[0]), sha256=None, by_hand="Run the script")
    with pytest.raises(KoalaBenchError, match="cannot be downloaded whole") as caught:
        fetch(["one"], tmp_path, [dataset])
    assert caught.value.remedy.startswith("Run the script") and server[1] == []


def test_fetch_leaves_a_right_file_alone_wherever_it_lies(tmp_path: Path, refused: str) -> None:
    place = tmp_path / "one.jsonl"
    place.write_bytes(CONTENT)
    assert fetch(["one"], tmp_path, [_dataset("one", refused)]) == [place]


def test_fetch_refuses_to_overwrite_a_different_file_before_any_download(
    tmp_path: Path, server: tuple[str, list[str]]
) -> None:
    place = tmp_path / "eval" / "two" / "question.jsonl"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"mine")
    with pytest.raises(KoalaBenchError) as caught:
        fetch(["one", "two"], tmp_path, [_dataset("one", server[0]), _dataset("two", server[0])])
    assert hashlib.sha256(b"mine").hexdigest() in caught.value.message
    assert hashlib.sha256(CONTENT).hexdigest() in caught.value.message
    assert place.read_bytes() == b"mine"
    assert server[1] == []


def test_without_network_one_error_says_what_to_download_and_where_to_put_it(tmp_path: Path, refused: str) -> None:
    datasets = [_dataset("one", refused), _dataset("two", refused)]
    with pytest.raises(KoalaBenchError) as caught:
        fetch(["one", "two"], tmp_path, datasets)
    assert "refused" in caught.value.message
    for dataset in datasets:
        assert f"{dataset.url} as {tmp_path / 'eval' / dataset.name / 'question.jsonl'}" in caught.value.remedy
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "says"), [("gone", "404"), ("cut", "not the pinned file")])
def test_a_failed_download_leaves_nothing(tmp_path: Path, server: tuple[str, list[str]], name: str, says: str) -> None:
    with pytest.raises(KoalaBenchError, match=says):
        fetch([name], tmp_path, [_dataset(name, server[0])])
    assert list(tmp_path.iterdir()) == []


def test_another_file_at_the_address_is_refused_with_both_hashes(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    dataset = _dataset("one", server[0], b"the pinned one")
    with pytest.raises(KoalaBenchError) as caught:
        fetch(["one"], tmp_path, [dataset])
    assert hashlib.sha256(CONTENT).hexdigest() in caught.value.message
    assert dataset.sha256 in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_file_address_works_as_a_mirror(tmp_path: Path) -> None:
    dataset = _dataset("one", (tmp_path / "mirror").as_uri())
    source = tmp_path / "mirror" / dataset.repository / dataset.commit / dataset.path
    source.parent.mkdir(parents=True)
    source.write_bytes(CONTENT)
    (place,) = fetch(["one"], tmp_path / "data", [dataset])
    assert place.read_bytes() == CONTENT


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(KoalaBenchError, match="Did you mean mt_bench"):
        fetch(["mt-bench"], tmp_path)


def test_status_tells_present_missing_and_different(tmp_path: Path) -> None:
    datasets = [_dataset(name, "http://unused") for name in ("one", "two", "three")]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "question.jsonl").write_bytes(CONTENT)
    (tmp_path / "two.jsonl").write_bytes(b"mine")
    found = status(tmp_path, datasets)
    assert [one.state for one in found] == ["present", "different hash", "missing"]
    assert [one.place for one in found] == [
        tmp_path / "one" / "question.jsonl",
        tmp_path / "two.jsonl",
        tmp_path / "eval" / "three" / "question.jsonl",
    ]
    assert [one.found_sha256 for one in found] == [datasets[0].sha256, hashlib.sha256(b"mine").hexdigest(), None]


def test_the_data_folder_is_the_option_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KoalaBenchError, match="KOALA_BENCH_DATA"):
        data_folder(None)
    monkeypatch.setenv("KOALA_BENCH_DATA", str(tmp_path))
    assert data_folder(None) == tmp_path
    assert data_folder(tmp_path / "own") == tmp_path / "own"


_DATA = Path(os.environ.get("KOALA_BENCH_DATA", "/nonexistent"))


@pytest.mark.skipif(not (_DATA / "eval").is_dir(), reason="needs the data folder in KOALA_BENCH_DATA")
def test_the_pinned_hashes_and_row_counts_are_those_of_the_public_files() -> None:
    for one in status(_DATA):
        if one.state == "missing" and one.dataset.name in ("math500", "mbpp", "arena_hard", "aime24", "speed_bench"):
            continue
        assert one.state.startswith("present"), one
        assert sum(1 for line in one.place.read_text(encoding="utf-8").split("\n") if line) == one.dataset.rows
