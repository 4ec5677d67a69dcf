"""Resolves the options --device, --dtype, --engine and threads; describes the machine for records."""

from __future__ import annotations

from typing import Literal

import torch

from koala_bench.common.process_group import local_device
from koala_bench.common.provenance import Environment, driver_version, environment
from koala_bench.errors import KoalaBenchError

# Bytes of weights up to which a second thread gains a tenth at most on an idle machine, and costs several times as much
# beside any other process.
_FEW = 64 << 20
Engine = Literal["eager", "graph"]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device that exists; of several GPUs each process of a group
    gets its own. Raises KoalaBenchError where CUDA is asked for and there is none, or the name is no device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = local_device(torch.device(name))
    except RuntimeError as error:
        raise KoalaBenchError(f"'{name}' is not a device.", "Use --device auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise KoalaBenchError(f"Decoding on '{name}' has not been tried.", "Use --device auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise KoalaBenchError(
            f"There is no CUDA device '{name}' on this machine.",
            "Use --device cpu, or install a CUDA build of torch and a driver.",
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn a name into a dtype; ``auto`` is float32 on the CPU and float16 on CUDA, as the papers use."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if name not in DTYPES:
        raise KoalaBenchError(
            f"'{name}' is not a dtype that decoding knows.", f"Use --dtype auto, {', '.join(DTYPES)}."
        )
    return DTYPES[name]


def pick_engine(name: str, device: torch.device) -> Engine:
    """Turn a name into an engine; ``auto`` is ``graph`` on the CPU and ``eager`` on CUDA, as the papers decode. Raises
    KoalaBenchError where there is no such engine, or not on this device."""
    if name == "auto":
        return "graph" if device.type == "cpu" else "eager"
    if name not in ("eager", "graph"):
        raise KoalaBenchError(f"'{name}' is no engine.", "Use --engine auto, eager or graph.")
    return "graph" if name == "graph" else "eager"


def pick_threads(wanted: int | None, device: torch.device, weights: int) -> int | None:
    """CPU threads to decode with, None for torch's default. With several, each operation waits for the slowest core.

    A target of a few million parameters is decoded on one thread unless a number is given. Measured on two cores with
    one other busy process: a step of 7 million parameters took three times as long with two threads, and as long as
    ever with one.

    Args:
        weights: size of the target in bytes.
    """
    return wanted if wanted is not None or device.type != "cpu" or weights > _FEW else 1


def machine(device: torch.device) -> Environment:
    """This machine and its installed versions, for records of measurements on a device of it."""
    if device.type != "cuda":
        return environment(torch.get_num_threads())
    return environment(torch.get_num_threads(), torch.cuda.get_device_name(device), driver_version())
