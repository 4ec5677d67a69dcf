"""The processes that train or decode together under ``accelerate launch`` or ``torchrun``; most often one.

A step's micro-batches and a record's questions are dealt out in turn, so that results do not depend on their number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from accelerate import PartialState
from torch import nn

from koala_bench.errors import KoalaBenchError


@dataclass(frozen=True)
class ProcessGroup:
    """This process and the size of its group.

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
        """Indices, out of ``count``, of this process's share."""
        return range(self.rank, count, self.size)

    def wait(self) -> None:
        """Barrier: return once all processes have called it."""
        if self.size > 1:
            PartialState().wait_for_everyone()

    def agree(self, measure: Callable[[], float | None]) -> float | None:
        """Measure on the first process only and broadcast the value. All processes must call it equally often."""
        if self.size == 1:
            return measure()
        value = measure() if self.first else None
        message = torch.tensor(
            [float("nan") if value is None else value], dtype=torch.float64, device=PartialState().device
        )
        torch.distributed.broadcast(message, src=0)
        return None if message.isnan() else float(message)

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


SINGLE_PROCESS = ProcessGroup()


def find_process_group(device: torch.device) -> ProcessGroup:
    """The group that this process was started in. Raises KoalaBenchError if there are more processes than GPUs on this
    machine, or they cannot connect."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return SINGLE_PROCESS
    if device.type == "cuda" and (local := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > (
        gpus := torch.cuda.device_count()
    ):
        raise KoalaBenchError(
            f"{local} processes were started for {gpus} GPUs.", f"Launch at most {gpus}, or use --device cpu."
        )
    try:
        state = PartialState(cpu=device.type == "cpu")
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise KoalaBenchError(
            f"The processes of this run cannot find each other: {first}",
            "Start it again with `accelerate launch` or `torchrun`.",
        ) from error
    return ProcessGroup(state.process_index, state.num_processes)


def local_device(device: torch.device) -> torch.device:
    """This process's own GPU, where several share a machine."""
    local = os.environ.get("LOCAL_RANK")
    return (
        torch.device("cuda", int(local))
        if device.type == "cuda" and device.index is None and local is not None
        else device
    )
