"""CUDA graphs: a function's kernels, captured once for each set of shapes and started together from then on.

A graph reads and writes where it did when it was captured. So arguments are copied into inputs of the graph's own, but
for those that stay where they are, and what comes back is overwritten by the next call. On the CPU, where there are no
graphs, the same function is called on the same inputs: what a graph needs of a function can be tried there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from koala_bench.common.hub_errors import first_line
from koala_bench.common.progress import say

Argument = torch.Tensor | int | None
_MOST = 64  # graphs kept of a function; each keeps its outputs and whatever lies between
_WARM_UP = 2  # calls before a capture, in which libraries set themselves up


@dataclass(frozen=True)
class _Graph:
    """One captured call; ``inputs`` are its own, None in the place of those that stay where they are, ``copied`` what
    they were copied from last. ``replay`` is given the arguments that stay.

    It does not hold these: a cache that was outgrown should go, and one that comes to lie where it lay, with the same
    sizes, is as good.
    """

    inputs: tuple[torch.Tensor | None, ...]
    copied: list[Argument]
    outputs: Any
    replay: Callable[[Sequence[Argument]], None]


class Captured:
    """A function of tensors, numbers and None, replayed as a graph where one of its shapes was captured before.

    No shape inside the function may depend on the value of a number, and nothing that it does on the host is done
    again. Numbers reach it as int64 tensors []. It must do the same if it is called again with the same arguments.

    Args:
        kept: places of the arguments that stay where they are, because the function writes into them or because they
            are large.
        steady: places of tensors that nobody changes once they are made: copied only where another one came before.
        made: called for each graph that is captured.

    What cannot be captured is said, and called as it is.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        kept: Sequence[int],
        steady: Sequence[int],
        device: torch.device,
        made: Callable[[], None],
    ) -> None:
        self._function, self._kept, self._steady, self._device, self._made = (
            function,
            frozenset(kept),
            frozenset(steady),
            device,
            made,
        )
        self._graphs: dict[tuple[object, ...], _Graph] = {}

    def __call__(self, *arguments: Argument) -> Any:
        key = self._key(arguments)
        graph = self._graphs.get(key)
        if graph is None:
            if len(self._graphs) == _MOST:
                del self._graphs[next(iter(self._graphs))]
            graph = self._graphs[key] = self._capture(arguments)
            self._made()
        for place, (own, argument) in enumerate(zip(graph.inputs, arguments, strict=True)):
            if own is None or argument is None or (place in self._steady and argument is graph.copied[place]):
                continue
            graph.copied[place] = argument if place in self._steady else None
            if isinstance(argument, torch.Tensor):
                own.copy_(argument)
            else:
                own.fill_(argument)
        graph.replay(arguments)
        return graph.outputs

    def _key(self, arguments: Sequence[Argument]) -> tuple[object, ...]:
        key: list[object] = []
        for place, argument in enumerate(arguments):
            if not isinstance(argument, torch.Tensor):
                key.append(argument is None)
            elif place in self._kept:
                key += [argument.data_ptr(), argument.shape, argument.stride(), argument.dtype]
            else:
                key += [argument.shape, argument.dtype]
        return tuple(key)

    def _capture(self, arguments: Sequence[Argument]) -> _Graph:
        inputs: list[torch.Tensor | None] = []
        for place, argument in enumerate(arguments):
            if argument is None:
                inputs.append(None)
            elif isinstance(argument, torch.Tensor):
                inputs.append(
                    argument if place in self._kept else argument.clone(memory_format=torch.contiguous_format)
                )
            else:
                inputs.append(torch.tensor(argument, device=self._device))
        given = tuple(inputs)
        own = tuple(None if place in self._kept else each for place, each in enumerate(given))
        if self._device.type != "cuda":
            return self._called(own, given)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._function(*given)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                outputs = self._function(*given)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a model may ask the device for a value, or wait for it
            torch.cuda.synchronize(self._device)
            say(f"koala-bench: a pass is not captured as a CUDA graph but called: {first_line(error)}")
            return self._called(own, given)
        return _Graph(own, [None] * len(own), outputs, lambda arguments: graph.replay())

    def _called(self, own: tuple[torch.Tensor | None, ...], given: tuple[torch.Tensor | None, ...]) -> _Graph:
        outputs = self._function(*given)
        several = isinstance(outputs, tuple)

        def replay(arguments: Sequence[Argument]) -> None:
            mixed = [argument if place in self._kept else own[place] for place, argument in enumerate(arguments)]
            again = self._function(*mixed)
            for there, here in zip(outputs if several else [outputs], again if several else [again], strict=True):
                there.copy_(here)

        return _Graph(own, [None] * len(own), outputs, replay)
