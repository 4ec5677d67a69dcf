"""Conversations from data sets on the Hugging Face hub: ``hub:OWNER/NAME``, or ``hub:OWNER/NAME:FILE`` where there are several files."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download

from koala_bench.errors import KoalaBenchError
from koala_bench.progress import say

HUB = "hub:"
_KINDS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def fetch_dialogues(source: str) -> Path:
    """The file of a data set, in the hub's cache; it is downloaded once.

    Raises:
        KoalaBenchError: the hub cannot be asked, there is no such data set or file, or several files could be meant.
    """
    name, _, file = source.removeprefix(HUB).partition(":")
    try:
        if not file:
            found = [each for each in HfApi().list_repo_files(name, repo_type="dataset") if each.endswith(_KINDS)]
            if len(found) != 1:
                said = ", ".join(found[:4]) or "none"
                raise KoalaBenchError(f"The data set {name} has {len(found)} files of conversations: {said}.", f"Name one: data.source={HUB}{name}:FILE.")
            file = found[0]
        say(f"Fetching {file} of the data set {name} ...")
        return Path(hf_hub_download(name, file, repo_type="dataset"))
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors, a name that can be none is a ValueError
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise KoalaBenchError(
            f"Cannot fetch {source}: {first}", "Check the name and the network, log in with HF_TOKEN for a gated data set, or give a downloaded file."
        ) from error
