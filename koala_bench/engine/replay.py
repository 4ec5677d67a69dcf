"""Recording a function's tensor operations once and replaying them: a pass without the Python of the modules it goes
through.

The CPU's counterpart of a CUDA graph. A small target spends more time between its operations than in them; a recorded
pass is one straight line of operations, rewritten by ``koala_bench.engine.lowering`` into fewer and faster ones that
compute the same. Sizes that change from call to call stay symbols, so one recording serves all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from koala_bench.common.progress import say
from koala_bench.engine.lowering import Layouts, lower

Argument = torch.Tensor | int | None
_MOST = 16  # recordings of arguments of one kind; each takes a moment to make
_HALF = (torch.bfloat16, torch.float16)
# How far a recording may be from what it records, as a part of the largest value.
_APART = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


class _UnrecordableError(Exception):
    """Why a function cannot be recorded."""


@dataclass(frozen=True)
class _Recording:
    """One trace of a function.

    Attributes:
        holds: of the arguments: whether what the function asked of sizes and numbers when it was traced would be
            answered alike.
        versions: of the parameters that it has copies of.
    """

    replay: Callable[..., Any]
    holds: Callable[..., bool]
    versions: list[tuple[torch.nn.Parameter, int]]

    def current(self) -> bool:
        """Whether no parameter was changed in place since."""
        return all(parameter._version == version for parameter, version in self.versions)


class Recorded:
    """A function of tensors, numbers and None that is recorded when it is first called with arguments of a new kind,
    and replayed after.

    Arguments are of one kind if the same ones are None and dtypes and sizes agree, but for the sizes that may move, of
    which only 0 and 1 are kinds of their own. A branch that the function takes by a size or number is part of its
    recording: where another one would be taken it is recorded anew. Host code runs while a recording is made only.
    Parameters that it reads are copied into the recording, in a layout of its own; one that is changed in place since,
    as by an optimiser, is noticed.

    A new recording is compared with the function itself, which must therefore do the same if called again. What cannot
    be recorded, or is recorded wrongly, is said once and called as it is from then on.

    Args:
        function: of positional arguments; returns a tensor or a tuple of them. It may write into its arguments.
        moving: for each argument the dimensions whose sizes may differ from call to call; none for a number, which
            always may, and is not negative.
        layouts: of the weights, shared with other recordings.

    Attributes:
        refusal: why the function is not recorded; None as long as it is.
    """

    def __init__(self, function: Callable[..., Any], moving: Sequence[Sequence[int]], layouts: Layouts) -> None:
        self._function, self._moving, self._layouts = function, tuple(tuple(each) for each in moving), layouts
        self._recordings: dict[tuple[object, ...], list[_Recording]] = {}
        self.refusal: str | None = None

    def __call__(self, *arguments: Argument) -> Any:
        if self.refusal is not None:
            return self._function(*arguments)
        known = self._recordings.setdefault(self._kind(arguments), [])
        for recording in known:
            if recording.holds(*arguments):
                if recording.current():
                    return recording.replay(*arguments)
                known.remove(recording)
                break
        try:
            return self._new(known, arguments)
        except _UnrecordableError as error:
            self.refusal = str(error)
            self._recordings.clear()
            say(f"koala-bench: a pass is not recorded but runs as with --engine eager: {error}")
            return self._function(*arguments)

    def _new(self, known: list[_Recording], arguments: Sequence[Argument]) -> Any:
        if len(known) == _MOST:
            raise _UnrecordableError(f"what it does depends on sizes, {_MOST} recordings of it are not enough")
        made = self._record(arguments)
        half = any(isinstance(each, torch.Tensor) and each.dtype in _HALF for each in arguments)
        _check(self._function(*arguments), made.replay(*arguments), half)
        known.append(made)
        return made.replay(*arguments)

    def _kind(self, arguments: Sequence[Argument]) -> tuple[object, ...]:
        kind: list[object] = []
        for argument, moving in zip(arguments, self._moving, strict=True):
            if isinstance(argument, torch.Tensor):
                kind += [
                    argument.dtype,
                    *(min(size, 2) if place in moving else size for place, size in enumerate(argument.shape)),
                ]
            else:
                kind.append(argument is None)
        return tuple(kind)

    def _record(self, arguments: Sequence[Argument]) -> _Recording:
        # No two sizes share a symbol because they happen to be equal now.
        shapes = ShapeEnv(duck_shape=False, specialize_zero_one=True)
        mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
        given: list[Any] = []
        symbols: dict[Any, str] = {}  # and what they are of the arguments
        for place, (argument, moving) in enumerate(zip(arguments, self._moving, strict=True)):
            source = ConstantSource(f"argument_{place}")
            if isinstance(argument, torch.Tensor):
                sizes = [
                    DimDynamic.DYNAMIC if dimension in moving else DimDynamic.STATIC
                    for dimension in range(argument.ndim)
                ]
                given.append(
                    mode.from_tensor(
                        argument, source=source, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)
                    )
                )
                for asked, found in _properties(given[-1]):
                    if isinstance(found, torch.SymInt) and isinstance(found.node.expr, sympy.Symbol):
                        symbols.setdefault(found.node.expr, f"a{place}.{asked}")
            elif argument is None:
                given.append(None)
            else:
                symbol = shapes.create_symbol(
                    argument, source, dynamic_dim=DimDynamic.DYNAMIC, do_not_specialize_zero_one=True
                )
                given.append(shapes.create_symintnode(symbol, hint=argument, source=source))
                symbols[symbol] = f"a{place}"

        def called(*arguments: Any) -> Any:  # make_fx counts the arguments of a method wrongly
            return self._function(*arguments)

        try:
            with torch.no_grad(), mode:
                traced = make_fx(called, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(*given)
        except Exception as error:  # a model may do whatever it likes
            raise _UnrecordableError(first_line(error)) from error
        holds = _holding([guard.expr for guard in shapes.guards], symbols, len(arguments))
        constants = {
            str(node.target): _attribute(traced, str(node.target))
            for node in traced.graph.nodes
            if node.op == "get_attr"
        }
        graph = (
            torch.fx.Graph()
        )  # of its own, so that it may read other constants than the module it was traced into has
        graph.output(graph.graph_copy(traced.graph, {}))
        versions = [
            (value, value._version)
            for value in constants.values()
            if isinstance(value, torch.nn.Parameter) and not value.is_inference()
        ]
        with torch.inference_mode():
            constants = lower(graph, constants, self._layouts)
        return _Recording(_compiled(graph, constants), holds, versions)


def _properties(tensor: torch.Tensor) -> list[tuple[str, Any]]:
    """Sizes and strides of a tensor, each behind the code that asks for it."""
    sizes = [(f"shape[{place}]", size) for place, size in enumerate(tensor.shape)]
    strides = [(f"stride({place})", stride) for place, stride in enumerate(tensor.stride())]
    return [*sizes, *strides, ("storage_offset()", tensor.storage_offset())]


def _holding(guards: Sequence[Any], symbols: dict[Any, str], count: int) -> Callable[..., bool]:
    """Whether all guards of a trace, sympy's expressions, hold for the ``count`` arguments that it is called with."""
    names = {symbol: f"n{at}" for at, symbol in enumerate(symbols)}
    renamed = {symbol: sympy.Symbol(name, integer=True) for symbol, name in names.items()}
    tests, used = [], {}
    for guard in dict.fromkeys(guards):
        if unknown := guard.free_symbols - symbols.keys():
            raise _UnrecordableError(f"a branch depends on {min(map(str, unknown))}, which is no size of an argument")
        used.update({names[symbol]: symbols[symbol] for symbol in guard.free_symbols})
        tests.append(f"({PythonPrinter().doprint(guard.xreplace(renamed))})")
    # Each size is read once, as the default of a parameter cannot be: a function within the function.
    inner = f"(lambda {', '.join(used)}: {' and '.join(tests) or True})({', '.join(used.values())})"
    code = f"lambda {', '.join(f'a{place}' for place in range(count))}: {inner}"
    found: Callable[..., bool] = eval(code, {"math": math, "torch": torch})
    return found


def _check(called: Any, replayed: Any, half: bool) -> None:
    """Make sure that a recording computes what the function does, up to rounding: of tokens most, since ties may fall
    either way.

    In half precision a tie at the first token may change all others. That costs no more than acceptance, and is said.
    """
    pairs = zip(called, replayed, strict=True) if isinstance(called, tuple) else [(called, replayed)]
    for one, other in pairs:
        if not one.is_floating_point():
            same = int((one == other).sum())
            if half and 2 * same < one.numel():
                say(
                    f"koala-bench: a recorded draft has {same} of {one.numel()} tokens in common with the draft itself,"
                    " which half precision can do."
                )
            elif 2 * same < one.numel():
                raise _UnrecordableError("a recording of it finds other tokens, which should be reported")
            continue
        apart = (one.double() - other.double()).abs().max() if one.numel() else torch.zeros(())
        most = _APART[one.dtype] * max(1.0, float(one.double().abs().max())) if one.numel() else 1.0
        if not apart <= most:
            raise _UnrecordableError(f"a recording of it is off by {float(apart):.1e}, which should be reported")


def _attribute(module: torch.nn.Module, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def _compiled(graph: torch.fx.Graph, constants: dict[str, Any]) -> Callable[..., Any]:
    """The graph as a Python function. Its constants are plain attributes: a module would look for each among parameters
    and buffers.
    """
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, "<recorded>", "exec"), names)
    return partial(names["forward"], SimpleNamespace(**constants))
