"""Recording a function's tensor operations once and replaying them: a pass without the Python of the modules it goes
through.

The CPU's counterpart of a CUDA graph. A small target spends more time between its operations than in them; a recorded
pass is one straight line of operations, rewritten by ``koala_bench.engine.lowering`` into fewer and faster ones that
compute the same. Sizes that change from call to call stay symbols, so one recording serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from koala_bench.common.progress import say
from koala_bench.engine.lowering import Layouts, lower
from koala_bench.errors import KoalaBenchError

Argument = torch.Tensor | int | None
_REMEDY = "Decode with --engine eager."
_HALF = (torch.bfloat16, torch.float16)
# How far a recording may be from what it records, as a part of the largest value.
_APART = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


class Recorded:
    """A function of tensors, numbers and None that is recorded when it is first called with arguments of a new kind,
    and replayed after.

    A new recording is compared with the function itself, which must therefore do the same if called again.

    Arguments are of one kind if the same ones are None and dtypes and sizes agree, but for the sizes that may move, of
    which only 0 and 1 are kinds of their own. What the function does must follow from that alone: it is not run again.
    Parameters that it reads are copied into the recording, in a layout of its own; one that is changed in place since,
    as by an optimiser, is noticed.

    Args:
        function: of positional arguments; returns a tensor or a tuple of them. It may write into its arguments.
        moving: for each argument the dimensions whose sizes may differ from call to call; none for a number, which
            always may.
        layouts: of the weights, shared with other recordings.
    """

    def __init__(self, function: Callable[..., Any], moving: Sequence[Sequence[int]], layouts: Layouts) -> None:
        self._function, self._moving, self._layouts = function, tuple(tuple(each) for each in moving), layouts
        self._recordings: dict[tuple[object, ...], tuple[Callable[..., Any], list[tuple[torch.nn.Parameter, int]]]] = {}

    def __call__(self, *arguments: Argument) -> Any:
        kind = self._kind(arguments)
        found = self._recordings.get(kind)
        if found is None or any(parameter._version != version for parameter, version in found[1]):
            found = self._recordings[kind] = self._record(arguments)
            half = any(isinstance(each, torch.Tensor) and each.dtype in _HALF for each in arguments)
            _check(self._function(*arguments), found[0](*arguments), half)
        return found[0](*arguments)

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

    def _record(self, arguments: Sequence[Argument]) -> tuple[Callable[..., Any], list[tuple[torch.nn.Parameter, int]]]:
        # No two sizes share a symbol because they happen to be equal now.
        shapes = ShapeEnv(duck_shape=False, specialize_zero_one=True)
        mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
        given: list[Any] = []
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
            elif argument is None:
                given.append(None)
            else:
                symbol = shapes.create_symbol(
                    argument, source, dynamic_dim=DimDynamic.DYNAMIC, do_not_specialize_zero_one=True
                )
                given.append(shapes.create_symintnode(symbol, hint=argument, source=source))

        def called(*arguments: Any) -> Any:  # make_fx counts the arguments of a method wrongly
            return self._function(*arguments)

        try:
            with torch.no_grad(), mode:
                traced = make_fx(called, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(*given)
        except Exception as error:  # a model may do whatever it likes
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise KoalaBenchError(f"A pass of this model cannot be recorded: {first}", _REMEDY) from error
        # Sizes may be tied to one another, as the mask's to the rows': then they are in every call. A size that is tied
        # to a number is not.
        for symbol, value in shapes.replacements.items():
            if value.is_number:
                raise KoalaBenchError(f"A recorded pass holds for {symbol} = {value} only.", _REMEDY)
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
        return _compiled(graph, constants), versions


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
                raise KoalaBenchError(
                    "A recorded pass finds other tokens.",
                    "Decode with --engine eager, and report this with the target's name.",
                )
            continue
        apart = (one.double() - other.double()).abs().max() if one.numel() else torch.zeros(())
        most = _APART[one.dtype] * max(1.0, float(one.double().abs().max())) if one.numel() else 1.0
        if not apart <= most:
            raise KoalaBenchError(
                f"A recorded pass is off by {float(apart):.1e}.",
                "Decode with --engine eager, and report this with the target's name.",
            )


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
