"""Trace a function's tensor operations once and replay them without the Python of the modules it goes through.

The CPU's counterpart of a CUDA graph: a small target spends more time between its operations than in them. A trace is
a straight line of aten operations, which ``lowering`` rewrites into fewer and faster ones. Sizes
that differ from call to call stay symbolic, so one trace serves them all.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy.printers import PythonPrinter

from koala_bench.common.hub_errors import first_line
from koala_bench.common.progress import log_line
from koala_bench.engine.graphs.lowering import Layouts, lower

Argument = torch.Tensor | int | None
_MAX_TRACES = 16  # for one key; each takes a moment to make
_HALF = (torch.bfloat16, torch.float16)
# Largest error of a trace, relative to the largest value.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


class UntraceableError(Exception):
    """Why a function cannot be traced, or that its trace is wrong."""


@dataclass(frozen=True)
class _Recording:
    """One trace of a function.

    Attributes:
        guards: whether every branch on a size or int would go for these arguments as it did when traced.
        versions: of the parameters whose values were copied into the trace.
    """

    replay: Callable[..., Any]
    guards: Callable[..., bool]
    versions: list[tuple[torch.nn.Parameter, int]]

    def current(self) -> bool:
        """Whether no parameter was modified in place since."""
        return all(parameter._version == version for parameter, version in self.versions)


class Recorded:
    """A function of tensors, ints and None, traced at its first call and replayed after.

    One trace serves all calls with the same None pattern, dtypes and static sizes; dynamic sizes are specialised at 0
    and 1. Where the function branches on a size or int, the trace is guarded, and another branch gets a trace of its
    own. Host code runs while tracing only. Parameters are copied into the trace, in a layout of its own; a parameter
    modified in place, as by an optimiser, causes a new trace.

    A new trace is compared with the function itself, which must therefore be repeatable. A function that cannot be
    traced, or whose trace is wrong, is called from then on, after one message.

    Args:
        function: of positional arguments; returns a tensor or a tuple of tensors. It may write into its arguments.
        dynamic_dims: for each argument the dimensions whose sizes may differ between calls; empty for an int, which is
            always dynamic and must not be negative.
        layouts: of the weights, shared with other traces.

    Attributes:
        refusal: why the function is not traced; None while it is.
    """

    def __init__(self, function: Callable[..., Any], dynamic_dims: Sequence[Sequence[int]], layouts: Layouts) -> None:
        self._function, self._layouts = function, layouts
        self._dynamic_dims = tuple(tuple(each) for each in dynamic_dims)
        self._recordings: dict[tuple[object, ...], list[_Recording]] = {}
        self.refusal: str | None = None

    def __call__(self, *arguments: Argument) -> Any:
        if self.refusal is not None:
            return self._function(*arguments)
        recordings = self._recordings.setdefault(self._key(arguments), [])
        for recording in recordings:
            if recording.guards(*arguments):
                if recording.current():
                    return recording.replay(*arguments)
                recordings.remove(recording)
                break
        try:
            return self._first_call(recordings, arguments)
        except UntraceableError as error:
            self.refusal = str(error)
            self._recordings.clear()
            log_line(f"koala-bench: a pass cannot be traced and runs as with --engine eager: {error}")
            return self._function(*arguments)

    def _first_call(self, recordings: list[_Recording], arguments: Sequence[Argument]) -> Any:
        if len(recordings) == _MAX_TRACES:
            raise UntraceableError(f"it branches on sizes, and {_MAX_TRACES} traces do not cover them")
        recording = self._record(arguments)
        half = any(isinstance(each, torch.Tensor) and each.dtype in _HALF for each in arguments)
        compare(self._function(*arguments), recording.replay(*arguments), half)
        recordings.append(recording)
        return recording.replay(*arguments)

    def _key(self, arguments: Sequence[Argument]) -> tuple[object, ...]:
        key: list[object] = []
        for argument, dynamic in zip(arguments, self._dynamic_dims, strict=True):
            if isinstance(argument, torch.Tensor):
                sizes = (min(size, 2) if dim in dynamic else size for dim, size in enumerate(argument.shape))
                key += [argument.dtype, *sizes]
            else:
                key.append(argument is None)
        return tuple(key)

    def _record(self, arguments: Sequence[Argument]) -> _Recording:
        # duck_shape: two sizes that happen to be equal now do not share a symbol.
        shapes = ShapeEnv(duck_shape=False, specialize_zero_one=True)
        mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
        fakes, symbols = self._fake_arguments(arguments, shapes, mode)

        def function(*arguments: Any) -> Any:  # make_fx miscounts the arguments of a method
            return self._function(*arguments)

        try:
            with torch.no_grad(), mode, _quiet():
                traced = make_fx(function, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
        except Exception as error:  # a model's code may raise anything
            raise UntraceableError(first_line(error)) from error
        guards = _compile_guards([guard.expr for guard in shapes.guards], symbols, len(arguments))
        names = (str(node.target) for node in traced.graph.nodes if node.op == "get_attr")
        constants = {name: _attribute(traced, name) for name in names}
        graph = torch.fx.Graph()  # one without an owning module may read other constants
        graph.output(graph.graph_copy(traced.graph, {}))
        parameters = (value for value in constants.values() if isinstance(value, torch.nn.Parameter))
        versions = [(each, each._version) for each in parameters if not each.is_inference()]
        with torch.inference_mode():
            constants = lower(graph, constants, self._layouts)
        return _Recording(_compiled(graph, constants), guards, versions)

    def _fake_arguments(
        self, arguments: Sequence[Argument], shapes: ShapeEnv, mode: FakeTensorMode
    ) -> tuple[list[Any], dict[Any, str]]:
        """Symbolic stand-ins for the arguments, and for each symbol the code that reads its value from them."""
        fakes: list[Any] = []
        symbols: dict[Any, str] = {}
        for index, (argument, dynamic) in enumerate(zip(arguments, self._dynamic_dims, strict=True)):
            source = ConstantSource(f"argument_{index}")
            if argument is None:
                fakes.append(None)
            elif isinstance(argument, torch.Tensor):
                dims = range(argument.ndim)
                sizes = [DimDynamic.DYNAMIC if dim in dynamic else DimDynamic.STATIC for dim in dims]
                context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
                fakes.append(mode.from_tensor(argument, source=source, symbolic_context=context))
                for code, value in _sizes_and_strides(fakes[-1]):
                    if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
                        symbols.setdefault(value.node.expr, f"a{index}.{code}")
            else:
                symbol = shapes.create_symbol(
                    argument, source, dynamic_dim=DimDynamic.DYNAMIC, do_not_specialize_zero_one=True
                )
                fakes.append(shapes.create_symintnode(symbol, hint=argument, source=source))
                symbols[symbol] = f"a{index}"
        return fakes, symbols


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the traceback that torch logs of what cannot be traced: one line says it, see ``Recorded``."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def _sizes_and_strides(tensor: torch.Tensor) -> list[tuple[str, Any]]:
    """Sizes and strides of a tensor, each after the code that reads it."""
    sizes = [(f"shape[{dim}]", size) for dim, size in enumerate(tensor.shape)]
    strides = [(f"stride({dim})", stride) for dim, stride in enumerate(tensor.stride())]
    return [*sizes, *strides, ("storage_offset()", tensor.storage_offset())]


def _compile_guards(guards: Sequence[Any], symbols: dict[Any, str], count: int) -> Callable[..., bool]:
    """A function of ``count`` arguments that says whether all guards, sympy expressions, hold."""
    names = {symbol: f"n{index}" for index, symbol in enumerate(symbols)}
    renamed = {symbol: sympy.Symbol(name, integer=True) for symbol, name in names.items()}
    tests, used = [], {}
    for guard in dict.fromkeys(guards):
        if unknown := guard.free_symbols - symbols.keys():
            raise UntraceableError(f"a branch depends on {min(map(str, unknown))}, which is no size of an argument")
        used.update({names[symbol]: symbols[symbol] for symbol in guard.free_symbols})
        tests.append(f"({PythonPrinter().doprint(guard.xreplace(renamed))})")
    # An inner lambda, so that each size is read once.
    inner = f"(lambda {', '.join(used)}: {' and '.join(tests) or True})({', '.join(used.values())})"
    code = f"lambda {', '.join(f'a{index}' for index in range(count))}: {inner}"
    holds: Callable[..., bool] = eval(code, {"math": math, "torch": torch})
    return holds


def compare(expected: Any, replayed: Any, half: bool) -> None:
    """Compare a trace's results with the function's, up to rounding. Of integers half must agree: ties between tokens
    may fall either way.

    In half precision a tie at the first token may change all later ones. That only costs acceptance, and is logged.

    Raises:
        UntraceableError: they are further apart.
    """
    pairs = zip(expected, replayed, strict=True) if isinstance(expected, tuple) else [(expected, replayed)]
    for wanted, actual in pairs:
        if not wanted.is_floating_point():
            same = int((wanted == actual).sum())
            if 2 * same >= wanted.numel():
                continue
            if not half:
                raise UntraceableError("its trace drafts other tokens, please report this")
            log_line(
                f"koala-bench: {same} of {wanted.numel()} tokens of a traced draft are the eager draft's: ties, rounded"
            )
        elif wanted.numel():
            # Scores of tokens that are not drafted are -inf on both sides.
            error = (wanted.double() - actual.double()).masked_fill(wanted == actual, 0.0).abs().max()
            largest = float(wanted.double().masked_fill(wanted.isinf(), 0.0).abs().max())
            if not error <= _TOLERANCE[wanted.dtype] * max(1.0, largest):
                raise UntraceableError(f"its trace is off by {float(error):.1e}, please report this")


def _attribute(module: torch.nn.Module, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def _compiled(graph: torch.fx.Graph, constants: dict[str, Any]) -> Callable[..., Any]:
    """The graph as a Python function. Its constants are plain attributes: a module would look each up among its
    parameters and buffers."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, "<recorded>", "exec"), names)
    return partial(names["forward"], SimpleNamespace(**constants))
