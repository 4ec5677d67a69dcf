"""The public question files: where each comes from, how to fetch it, and whether it is the pinned one.

None of them is part of this project. A file is pinned by repository, commit and the hash of its bytes, so
that a table made from it can be compared with one made elsewhere. Where no hash is known, the record's own hash of the
file is what tells.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from koala_bench.common.files import doing, replacing, sha256_of
from koala_bench.common.progress import log_line
from koala_bench.common.suggestions import did_you_mean
from koala_bench.errors import KoalaBenchError

DATA_DIR_VARIABLE = "KOALA_BENCH_DATA"
_TIMEOUT_S = 30.0
_LARGEST_BYTES = 64 << 20  # the largest file has 0.7 MB; what is far beyond that is not one of them

_EAGLE = ("SafeAILab/EAGLE", "cb7e0841fe0c206c6ed74a197ad5e2a1f13f5a2b")
_FASTCHAT = ("lm-sys/FastChat", "587d5cfa1609a43d192cedb8441cac3c17db105d")
_PRM800K = ("openai/prm800k", "00811d6de065642a6967b9017d4cee59550c0ef4")
_GOOGLE = ("google-research/google-research", "2251e8c67a7fe7d6348714967ee101080b28e956")
_ARENA = ("lmarena/arena-hard-auto", "6c82720015d5da7b8795b809b91f63ef74abbf6a")
_G_KV = ("microsoft/G-KV", "680bd1a0783ec711ec2ac7c7fd7eefc0e764d336")
_SPEC_BENCH = ("hemingkx/Spec-Bench", "fd2c1cd7d2201ef71db4c5f4e455008f017967bf")
SPEED_BENCH = (
    "Run NVIDIA's examples/specdec_bench/prepare_data.py --dataset speed --config qualitative (Model-Optimizer), which"
    " fetches the texts, and save its rows as JSON lines"
)
_APACHE = "Apache-2.0 (LICENSE of the repository, which says nothing separate about this file)"


@dataclass(frozen=True)
class Dataset:
    """One public question file, pinned by its hash, or where that is not known by its commit alone."""

    name: str  # as given to --questions
    repository: str  # owner/name on github.com
    commit: str  # full hash
    path: str  # inside the repository
    sha256: str | None  # of the file's bytes
    rows: int
    about: str
    licence: str
    host: str = "https://raw.githubusercontent.com"
    by_hand: str | None = None  # how to make a file that cannot be downloaded whole

    @property
    def url(self) -> str:
        """Where the file is downloaded from."""
        return f"{self.host}/{self.repository}/{self.commit}/{self.path}"


@dataclass(frozen=True)
class FileStatus:
    """What a data folder holds under the name of a public question file."""

    dataset: Dataset
    place: Path  # where the file is, or where it would be put
    state: Literal["present", "present, unpinned", "missing", "different hash"]
    found_sha256: str | None  # None where the file is missing


DATASETS = (
    Dataset(
        "mt_bench", *_FASTCHAT, "fastchat/llm_judge/data/mt_bench/question.jsonl",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7", 80,
        "MT-bench, two turns, 8 categories of 10", _APACHE,
    ),
    Dataset(
        "vicuna_bench", *_FASTCHAT, "fastchat/llm_judge/data/vicuna_bench/question.jsonl",
        "c248c5c98ba45bb0c2aadae2f270e643bd32679c6c306a3b2a503ac4254cdaa5", 80,
        "Vicuna bench, one turn, 9 categories", _APACHE,
    ),
    Dataset(
        "spec_bench", *_SPEC_BENCH, "data/spec_bench/question.jsonl",
        "4b6d33e79484f9841c487ee87d1cf6aa8c6066f61d5d482ff09e5a007fafdf04", 480,
        "Spec-Bench: MT-bench and 80 each of translation, summarization, qa, math_reasoning, rag", _APACHE,
    ),
    Dataset(
        "alpaca", *_EAGLE, "eagle/data/alpaca/question.jsonl",
        "8ad3e5a7fc61b88d8e25edb81a52a2ce00a04494d5694c122cb11a5cc26a00df", 80,
        "EAGLE's set of Alpaca instructions",
        f"{_APACHE}; the instructions are Alpaca data, CC BY-NC 4.0: research use only",
    ),
    Dataset(
        "gsm8k", *_EAGLE, "eagle/data/gsm8k/question.jsonl",
        "a55920b2f2aac724241124c59e5b8e8168dbbeb2ab0fdbee17d5b0ab6db5ff27", 80,
        "EAGLE's set of GSM8K test problems", _APACHE,
    ),
    Dataset(
        "humaneval", *_EAGLE, "eagle/data/humaneval/question.jsonl",
        "ce0244e2b228339e9a11afc63a151719beede1e389fdaec7cd9751d33902180e", 80,
        "EAGLE's set of HumanEval problems", _APACHE,
    ),
    Dataset(
        "qa", *_EAGLE, "eagle/data/qa/question.jsonl",
        "04252e41ab00bcc03b11940b4a3766cf40ae0b76a09c4f56968ba952f0b029f3", 80,
        "EAGLE's set of open questions, the qa part of Spec-Bench", _APACHE,
    ),
    Dataset(
        "sum", *_EAGLE, "eagle/data/sum/question.jsonl",
        "916876f0c42f938a944de96eed16e51425f29f27438cca5c9ef4737c0fedf771", 80,
        "EAGLE's set of articles to summarise, the summarization part of Spec-Bench", _APACHE,
    ),
    Dataset(  # the hash stands in the repository, as the file's name in Git LFS
        "math500", *_PRM800K, "prm800k/math_splits/test.jsonl",
        "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132", 500,
        "MATH500: the 500 problems of MATH's test split that PRM800K keeps, by subject", "MIT (LICENSE)",
        "https://media.githubusercontent.com/media",
    ),
    Dataset(
        "mbpp", *_GOOGLE, "mbpp/mbpp.jsonl", None, 974, "MBPP, all of its problems, each with its tests",
        "Apache-2.0 (LICENSE of the repository); its README says CC BY 4.0 of data",
    ),
    Dataset(
        "arena_hard", *_ARENA, "data/arena-hard-v0.1/question.jsonl", None, 500, "Arena-Hard-Auto v0.1, one turn",
        _APACHE,
    ),
    Dataset(
        "aime24", *_G_KV, "data/aime24.jsonl", None, 30, "AIME 2024, both papers",
        "MIT (LICENSE); the problems are the Mathematical Association of America's",
    ),
    Dataset(
        "speed_bench", "NVIDIA/Model-Optimizer", "c777c44c3b4e41b2b5c70b0e5576a5fda8445c55",
        "examples/specdec_bench/prepare_data.py", None, 880, "SPEED-Bench's qualitative split, 11 categories of 80",
        "NVIDIA Evaluation Dataset License; what it fetches has licences of its own", by_hand=SPEED_BENCH,
    ),
)  # fmt: skip


def data_folder(data_dir: Path | None) -> Path:
    """The given folder, else the one that KOALA_BENCH_DATA names. It need not exist. Raises KoalaBenchError where
    neither is set."""
    if data_dir is not None:
        return data_dir
    value = os.environ.get(DATA_DIR_VARIABLE, "")
    if not value:
        raise KoalaBenchError(
            "No data folder is set.", f"Name it with --data-dir or in the environment variable {DATA_DIR_VARIABLE}."
        )
    return Path(value)


def places_of(name: str, data_dir: Path) -> tuple[Path, ...]:
    """Where a question file of this name may lie in a data folder; the first is where ``fetch`` puts it."""
    return data_dir / "eval" / name / "question.jsonl", data_dir / name / "question.jsonl", data_dir / f"{name}.jsonl"


def _status_of(dataset: Dataset, data_dir: Path) -> FileStatus:
    places = places_of(dataset.name, data_dir)
    place = next((path for path in places if path.is_file()), None)
    if place is None:
        return FileStatus(dataset, places[0], "missing", None)
    with doing("read", place, "Check its permissions."):
        found = sha256_of(place)
    if dataset.sha256 is None:
        return FileStatus(dataset, place, "present, unpinned", found)
    return FileStatus(dataset, place, "present" if found == dataset.sha256 else "different hash", found)


def status(data_dir: Path | None, datasets: Sequence[Dataset] = DATASETS) -> list[FileStatus]:
    """What the data folder holds of each public question file, in the order of ``datasets``. Raises KoalaBenchError
    where no data folder is set, or a file in it cannot be read."""
    folder = data_folder(data_dir)
    return [_status_of(dataset, folder) for dataset in datasets]


def fetch(names: Sequence[str], data_dir: Path | None, datasets: Sequence[Dataset] = DATASETS) -> list[Path]:
    """Download public question files into ``<data_dir>/eval/<name>/question.jsonl`` and verify them.

    A file that is there already and is the pinned one is left alone; nothing is ever overwritten. All names
    and all files present are checked before the first download.

    Returns the place of every named file, in the order of ``names``. Raises KoalaBenchError where a name is unknown, no
    data folder is set, a present file differs from the pinned one, a download fails (the error lists every address and
    the place for its file), or what arrived is not the pinned file."""
    known = {dataset.name: dataset for dataset in datasets}
    for name in names:
        if name not in known:
            remedy = did_you_mean(name.lower(), known, f"Known are: {', '.join(known)}.")
            raise KoalaBenchError(f"There is no public question file {name!r}.", remedy)
    folder = data_folder(data_dir)
    found = {name: _status_of(known[name], folder) for name in dict.fromkeys(names)}
    for one in found.values():
        if one.state == "different hash":
            raise KoalaBenchError(
                f"{one.place} is not the pinned file: its sha256 is {one.found_sha256}, that of {one.dataset.url} is"
                f" {one.dataset.sha256}.",
                "Move it away to fetch the pinned file, or give its path to --questions to use it as it is.",
            )
    missing = [one for one in found.values() if one.state == "missing"]
    for one in (one for one in missing if one.dataset.by_hand):
        raise KoalaBenchError(f"{one.dataset.name} cannot be downloaded whole.", f"{one.dataset.by_hand}: {one.place}.")
    for index, one in enumerate(missing):
        dataset = one.dataset
        try:
            with urllib.request.urlopen(dataset.url, timeout=_TIMEOUT_S) as response:
                content: bytes = response.read(_LARGEST_BYTES)
        # The timeout while reading and a cut connection are not wrapped by urllib as the failure to connect is.
        except (OSError, http.client.HTTPException) as error:
            by_hand = "; ".join(f"{left.dataset.url} as {left.place}" for left in missing[index:])
            reason = error.reason if type(error) is urllib.error.URLError else error
            raise KoalaBenchError(
                f"Cannot download {dataset.name} from {dataset.url}: {reason}.", f"Download by hand and save: {by_hand}"
            ) from error
        arrived = hashlib.sha256(content).hexdigest()
        if dataset.sha256 is None:
            log_line(f"{dataset.name}: no hash is known to check it by; that of what arrived is {arrived}")
        elif arrived != dataset.sha256:
            raise KoalaBenchError(
                f"What {dataset.url} answered is not the pinned file: its sha256 is {arrived}, expected"
                f" {dataset.sha256}.",
                "The download was cut, or a proxy or sign-in page answered: try again, or download it by hand and save"
                f" it as {one.place}.",
            )
        with replacing(one.place) as temporary:
            temporary.write_bytes(content)
        log_line(f"{dataset.name}: {dataset.rows} questions saved as {one.place}")
    return [found[name].place for name in names]
