"""Sends training curves to TensorBoard or Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from koala_bench.errors import KoalaBenchError

SERVICES = ("tensorboard", "wandb")
_PROJECT = "koala-bench"


def check_service(service: str | None) -> None:
    """Raise ``KoalaBenchError`` if curves cannot be sent to ``service``: it is not known, or not installed."""
    if service is None:
        return
    if service not in SERVICES:
        raise KoalaBenchError(f"--log-with {service} is not known.", f"Use {' or '.join(SERVICES)}.")
    if importlib.util.find_spec(service) is None:
        raise KoalaBenchError(f"--log-with {service}: it is not installed.", f"pip install {service}.")


def tracked_accelerator(service: str | None, out: Path, **options: Any) -> Accelerator:
    """An accelerator that can send curves to ``service``; TensorBoard's files go to ``out/tensorboard``."""
    if service is None:
        return Accelerator(**options)
    places = ProjectConfiguration(str(out), str(out / "tensorboard"))
    return Accelerator(log_with=service, project_config=places, **options)


@contextmanager
def curves(accelerator: Accelerator, service: str | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that sends a line of the training log. Raises KoalaBenchError where the service refuses to
    begin, for example because nobody is logged in."""
    if service is None:
        yield lambda line: None
        return
    try:
        accelerator.init_trackers(_PROJECT)
    except Exception as error:  # whatever the service's own library raises
        said = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise KoalaBenchError(
            f"--log-with {service} cannot begin: {said}.", "Check its settings, or leave --log-with out."
        ) from error
    try:
        yield lambda line: accelerator.log(_scalars(line), step=line["step"])
    finally:
        for tracker in accelerator.trackers:  # end_training would take the process group with it
            tracker.finish()


def _scalars(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line, ``METHOD/NAME`` or ``METHOD/held_out/NAME``; of a list each by its depth from 1."""
    prefix = f"{line['method']}/{'held_out/' if line['kind'] == 'held_out' else ''}"
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, list):
            found |= {f"{prefix}{name}/{depth}": each for depth, each in enumerate(value, 1) if each is not None}
        elif isinstance(value, (int, float)) and name != "step":
            found[prefix + name] = value
    return found
