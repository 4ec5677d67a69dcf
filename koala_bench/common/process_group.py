"""The processes that train or decode together under ``accelerate launch`` or ``torchrun``; by far the usual team is one
process.

A step's micro-batches and a record's questions are dealt out in turn, so that what comes out does not depend on how
many there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from accelerate import PartialState
from torch import nn

from koala_bench.common.hub_errors import first_line
from koala_bench.errors import KoalaBenchError


@dataclass(frozen=True)
class Team:
    """This process and how many there are.

    Attributes:
        rank: of this process, from 0; the first one writes the files.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def own(self, count: int) -> range:
        """Which of ``count`` things are this process's."""
        return range(self.rank, count, self.size)

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            PartialState().wait_for_everyone()

    def agree(self, measure: Callable[[], float | None]) -> float | None:
        """What the first process measures, for all; it alone does. All must come here the same number of times."""
        if self.size == 1:
            return measure()
        value = measure() if self.first else None
        told = torch.tensor(
            [float("nan") if value is None else value], dtype=torch.float64, device=PartialState().device
        )
        torch.distributed.broadcast(told, src=0)
        return None if told.isnan() else float(told)

    def sum_gradients(self, parameters: Iterable[nn.Parameter], losses: torch.Tensor) -> torch.Tensor:
        """Add up the gradients of all processes in place, and with them ``losses``, a vector, which is returned.

        One message for all of them. A parameter without a gradient here gets one where there are several processes.
        """
        if self.size == 1:
            return losses
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in wanted:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        message = torch.cat(
            [
                losses.detach().float(),
                *(parameter.grad.flatten().float() for parameter in wanted if parameter.grad is not None),
            ]
        )
        torch.distributed.all_reduce(message)
        pieces = message.split([losses.numel(), *(parameter.numel() for parameter in wanted)])
        for parameter, piece in zip(wanted, pieces[1:], strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(piece.view_as(parameter.grad))
        return pieces[0]


ALONE = Team()


def find_team(device: torch.device) -> Team:
    """The team that this process was started in; processes find each other here. Raises KoalaBenchError where there are
    more processes on this machine than GPUs, or they cannot find each other."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    if device.type == "cuda" and (local := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > (
        gpus := torch.cuda.device_count()
    ):
        raise KoalaBenchError(
            f"{local} processes were started for {gpus} GPUs.", f"Launch at most {gpus}, or use --device cpu."
        )
    try:
        state = PartialState(cpu=device.type == "cpu")
    except (RuntimeError, ValueError) as error:
        raise KoalaBenchError(
            f"The processes of this run cannot find each other: {first_line(error)}",
            "Start it again with `accelerate launch` or `torchrun`.",
        ) from error
    return Team(state.process_index, state.num_processes)


def local_device(device: torch.device) -> torch.device:
    """This process's own GPU, where several share a machine."""
    local = os.environ.get("LOCAL_RANK")
    return (
        torch.device("cuda", int(local))
        if device.type == "cuda" and device.index is None and local is not None
        else device
    )
