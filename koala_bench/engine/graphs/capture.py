"""CUDA graphs: a function is captured once for each set of shapes and replayed from then on.

A graph reads and writes fixed addresses. Arguments are copied into its static input buffers, except those in static
memory already; its outputs are overwritten by the next replay. On the CPU the function is called on the same buffers
instead, so that tests without a GPU show whether a function can be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from koala_bench.common.hub_errors import first_line
from koala_bench.common.progress import log_line

Argument = torch.Tensor | int | None
_MAX_GRAPHS = 64  # of one function; each keeps its outputs and intermediate buffers
_WARM_UP = 2  # calls before a capture, in which libraries initialise


@dataclass(frozen=True)
class _Graph:
    """One captured call.

    It holds no reference to static arguments: an outgrown cache can be freed, and a new one at the same address with
    the same strides serves as well.

    Attributes:
        inputs: input buffers, None for static arguments.
        sources: what each constant input was last copied from.
        replay: takes the arguments and writes ``outputs``.
    """

    inputs: tuple[torch.Tensor | None, ...]
    sources: list[Argument]
    outputs: Any
    replay: Callable[[Sequence[Argument]], None]


class Captured:
    """A function of tensors, ints and None, replayed as a CUDA graph for every set of shapes seen before.

    No shape inside the function may depend on the value of an int, and it must be repeatable. Host code runs at capture
    time only; ints arrive as 0-d int64 tensors. A function that cannot be captured is called, after one message.

    Args:
        static: indices of arguments used in place, because the function writes into them or they are large.
        constant: indices of tensors that are never modified, copied only when another tensor is passed.
        on_capture: called after each capture.
    """

    def __init__(
        self, function: Callable[..., Any], static: Sequence[int], constant: Sequence[int], device: torch.device,
        on_capture: Callable[[], None],
    ) -> None:  # fmt: skip
        self._function, self._device, self._on_capture = function, device, on_capture
        self._static, self._constant = frozenset(static), frozenset(constant)
        self._graphs: dict[tuple[object, ...], _Graph] = {}

    def __call__(self, *arguments: Argument) -> Any:
        key = self._key(arguments)
        graph = self._graphs.get(key)
        if graph is None:
            if len(self._graphs) == _MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            graph = self._graphs[key] = self._capture(arguments)
            self._on_capture()
        for index, (buffer, argument) in enumerate(zip(graph.inputs, arguments, strict=True)):
            constant = index in self._constant
            if buffer is None or argument is None or (constant and argument is graph.sources[index]):
                continue
            graph.sources[index] = argument if constant else None
            if isinstance(argument, torch.Tensor):
                buffer.copy_(argument)
            else:
                buffer.fill_(argument)
        graph.replay(arguments)
        return graph.outputs

    def _key(self, arguments: Sequence[Argument]) -> tuple[object, ...]:
        key: list[object] = []
        for index, argument in enumerate(arguments):
            if not isinstance(argument, torch.Tensor):
                key.append(argument is None)
            elif index in self._static:
                key += [argument.data_ptr(), argument.shape, argument.stride(), argument.dtype]
            else:
                key += [argument.shape, argument.dtype]
        return tuple(key)

    def _input(self, index: int, argument: Argument) -> torch.Tensor | None:
        """What the captured function reads: a static argument itself, or a new buffer with the argument's value."""
        if argument is None or (index in self._static and isinstance(argument, torch.Tensor)):
            return argument
        if isinstance(argument, torch.Tensor):
            return argument.clone(memory_format=torch.contiguous_format)
        return torch.tensor(argument, device=self._device)

    def _capture(self, arguments: Sequence[Argument]) -> _Graph:
        inputs = [self._input(index, argument) for index, argument in enumerate(arguments)]
        buffers = tuple(None if index in self._static else each for index, each in enumerate(inputs))
        if self._device.type != "cuda":
            return self._called(buffers, inputs)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._function(*inputs)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                outputs = self._function(*inputs)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a model may read a value from the device, or synchronise
            torch.cuda.synchronize(self._device)
            log_line(f"koala-bench: a pass runs without a CUDA graph, its capture failed: {first_line(error)}")
            return self._called(buffers, inputs)
        return _Graph(buffers, [None] * len(buffers), outputs, lambda arguments: graph.replay())

    def _called(self, buffers: tuple[torch.Tensor | None, ...], inputs: Sequence[torch.Tensor | None]) -> _Graph:
        """A stand-in that calls the function on the buffers and copies its results to one place."""
        outputs = self._function(*inputs)
        several = isinstance(outputs, tuple)

        def replay(arguments: Sequence[Argument]) -> None:
            mixed = [each if index in self._static else buffers[index] for index, each in enumerate(arguments)]
            results = self._function(*mixed)
            for output, result in zip(
                outputs if several else [outputs], results if several else [results], strict=True
            ):
                output.copy_(result)

        return _Graph(buffers, [None] * len(buffers), outputs, replay)
