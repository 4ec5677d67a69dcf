"""Conversations from data sets on the Hugging Face hub: ``hub:OWNER/NAME``, or ``hub:OWNER/NAME:FILE`` where there are
several files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from koala_bench.common.hub_errors import HUB_ERRORS, first_line
from koala_bench.common.progress import log_line
from koala_bench.errors import KoalaBenchError

HUB = "hub:"
_KINDS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
_PATIENCE = 5.0  # timeout in seconds for asking the hub whether something exists


def fetch_dialogues(source: str) -> Path:
    """The file of a data set, in the hub's cache; it is downloaded once. Raises KoalaBenchError where the hub cannot be
    asked, there is no such data set or file, or several files could be meant."""
    name, file = _name_and_file(source)
    try:
        if not file:
            file = _only_file(name, HfApi().list_repo_files(name, repo_type="dataset"))
        log_line(f"Fetching {file} of the data set {name} ...")
        return Path(hf_hub_download(name, file, repo_type="dataset"))
    except HUB_ERRORS as error:
        raise KoalaBenchError(
            f"Cannot fetch {source}: {first_line(error)}",
            "Check the name and the network, log in with HF_TOKEN for a gated one, or give a downloaded file.",
        ) from error


@dataclass(frozen=True)
class HubAnswer:
    """The hub's answer about a model or data set.

    Attributes:
        reached: whether it answered at all.
        sizes: of the files in bytes, by name; empty if the hub lacks it or refuses access.
        refusal: why, in its words, or None where it does.
    """

    reached: bool
    sizes: dict[str, int]
    refusal: str | None


def ask_hub(name: str, kind: Literal["model", "dataset"], revision: str | None = None) -> HubAnswer:
    """Ask about a model or data set once, with a short timeout: downloads retry many times, with a message each."""
    try:
        found = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=_PATIENCE, files_metadata=True)
    except HUB_ERRORS as error:
        return HubAnswer(isinstance(error, HfHubHTTPError), {}, first_line(error))
    return HubAnswer(True, {each.rfilename: each.size or 0 for each in getattr(found, "siblings", None) or []}, None)


def dialogues_at_hand(source: str) -> bool:
    """Whether a named file of a data set is in the hub's cache; without a name only the hub knows the file."""
    name, file = _name_and_file(source)
    try:
        return bool(file) and isinstance(try_to_load_from_cache(name, file, repo_type="dataset"), str)
    except ValueError:  # no name
        return False


def dialogues_on_hub(source: str) -> tuple[HubAnswer, int]:
    """The hub's answer about a data set, and the bytes to download. Raises KoalaBenchError where the hub has it, and no
    such file, or several files could be meant."""
    name, file = _name_and_file(source)
    answer = ask_hub(name, "dataset")
    if answer.refusal is not None:
        return answer, 0
    file = file or _only_file(name, list(answer.sizes))
    if file not in answer.sizes:
        raise KoalaBenchError(
            f"The data set {name} has no file {file}.", f"It has: {', '.join(list(answer.sizes)[:4]) or 'none'}."
        )
    return answer, answer.sizes[file]


def _name_and_file(source: str) -> tuple[str, str]:
    name, _, file = source.removeprefix(HUB).partition(":")
    return name, file


def _only_file(name: str, files: Sequence[str]) -> str:
    found = [each for each in files if each.endswith(_KINDS)]
    if len(found) != 1:
        raise KoalaBenchError(
            f"The data set {name} has {len(found)} files of conversations: {', '.join(found[:4]) or 'none'}.",
            f"Name one: data.source={HUB}{name}:FILE.",
        )
    return found[0]
