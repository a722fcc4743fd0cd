"""Rules of reductions, and of norms and softmax over channels. See `lowering.py`."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from ranger_nn.aggregate.monoid import Extremum, Moments, Sum
from ranger_nn.core.graph import Rule
from ranger_nn.core.reach import Link
from ranger_nn.keras.kernels import Kernel
from ranger_nn.keras.kernels_reduce import Reduce
from ranger_nn.keras.lowering import Call, rule
from ranger_nn.ops import reduction
from ranger_nn.ops.pointwise import local_except


@rule("Mean", "Sum", "Max", "Min", "Amax", "Amin", "Var")
def _reduction(call: Call) -> Any:
    x = call.arg("x")
    monoid: Any = {
        "Mean": Sum(mean=True),
        "Sum": Sum(),
        "Max": Extremum(),
        "Amax": Extremum(),
        "Min": Extremum(-1),
        "Amin": Extremum(-1),
    }.get(call.name)
    if (
        monoid is None
        or getattr(call.op, "initial", None) is not None
        or not call.dtype.startswith(("float", "bfloat"))
    ):
        return None
    axes = _axes(call.op.axis, len(call.shape(x)))
    kern = _reduce(call, x, monoid, axes, call.op.keepdims)
    return call.emit([x], reduction.reduction(call.shape(x), axes, call.op.keepdims), kern)


def _axes(axis: Any, rank: int) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(rank))
    return tuple(sorted(a % rank for a in ([axis] if isinstance(axis, int) else axis)))


def _reduce(call: Call, x: int, monoid: Any, axes: tuple[int, ...], keepdims: bool) -> Reduce:
    dtype = call.lower.values[x].dtype
    wide = "float32" if dtype in {"float16", "bfloat16"} else dtype
    function, _ = call.function()
    if isinstance(monoid, Moments):
        moments = function
        function = lambda t: ops.stack(moments(t))  # noqa: E731
    return Reduce(function, monoid, call.shape(x), axes, bool(keepdims), call.dtype, wide)


@rule("Moments")
def _moments(call: Call) -> Any:
    x = call.arg("x")
    shape, axes = call.shape(x), _axes(call.op.axes, len(call.shape(x)))
    kern = _reduce(call, x, Moments(), axes, call.op.keepdims)
    row = reduction.reduction(shape, axes, call.op.keepdims).links[0]
    links = tuple(None if link is None else Link(link.out_dim + 1) for link in row)
    stacked = (2, *call.out)
    both = call.lower.emit("moments", [x], [(stacked, call.dtype)], Rule((links,), reduces=True), kern)[0]
    chosen = Rule(((None, *(Link(d) for d in range(len(call.out)))),))
    first = call.lower.emit("mean", [both], [(call.out, call.dtype)], chosen, Kernel(lambda t: t[0]))
    return first + call.lower.emit("variance", [both], [(call.out, call.dtype)], chosen, Kernel(lambda t: t[1]))


# ----------------------------------------------------------------------------- norms over channels


@rule("BatchNorm")
def _batch_norm(call: Call) -> Any:
    """On TensorFlow scale and shift are made before the sweep: its graphs hoist nothing out of a loop."""
    rank = len(call.out)
    axis = call.op.axis % rank
    row = tuple(None if d == axis else Link(d) for d in range(rank))
    if keras.backend.backend() != "tensorflow":
        function, inputs = call.function()
        return call.emit(inputs, Rule((row, *((None,) for _ in inputs[1:])), pointwise=True), Kernel(function))
    mean, variance, offset, scale = (call.arg(name) for name in ("mean", "variance", "offset", "scale"))
    shape = tuple(n if d == axis else 1 for d, n in enumerate(call.out))
    epsilon = call.op.epsilon

    def small(name: str, inputs: list[int], function: Any) -> int:
        """One number for each channel."""
        specs = [(shape, call.lower.values[inputs[0]].dtype)]
        rows = Rule(tuple((None,) * len(call.shape(v)) for v in inputs))
        return int(call.lower.emit(name, inputs, specs, rows, Kernel(function))[0])

    def scaled(variance: Any, *scale: Any) -> Any:
        found = ops.rsqrt(ops.reshape(variance, shape) + epsilon)
        return found * ops.reshape(scale[0], shape) if scale else found

    def shifted(mean: Any, factor: Any, *offset: Any) -> Any:
        mean = ops.reshape(mean, shape)
        return ops.reshape(offset[0], shape) - mean * factor if offset else -mean * factor

    factor = small("scale", [variance] if scale is None else [variance, scale], scaled)
    shift = small("shift", [mean, factor] if offset is None else [mean, factor, offset], shifted)
    whole: tuple[None, ...] = (None,) * rank
    return call.emit(
        [call.arg("x"), factor, shift],
        Rule((row, whole, whole), pointwise=True),
        Kernel(lambda x, factor, shift: x * ops.cast(factor, x.dtype) + ops.cast(shift, x.dtype)),
    )


@rule("Softmax", "LogSoftmax", "Sparsemax", "Glu")
def _softmax(call: Call) -> Any:
    function, inputs = call.function()
    rank = len(call.out)
    axis = getattr(call.op, "axis", -1)
    axis = -1 if axis is None else axis
    whole = {a % rank for a in ([axis] if isinstance(axis, int) else axis)}
    return call.emit(inputs, local_except([call.shape(v) for v in inputs], call.out, whole), Kernel(function))


@rule("LayerNorm", "RMSNorm", "Normalize")
def _channel_norm(call: Call) -> Any:
    function, inputs = call.function()
    rank, axis = len(call.out), call.op.axis
    if axis is None:
        return None
    whole = {a % rank for a in ([axis] if isinstance(axis, int) else axis)}
    row = tuple(None if d in whole else Link(d) for d in range(rank))
    others = tuple((None,) * len(call.shape(v)) for v in inputs[1:])
    return call.emit(inputs, Rule((row, *others)), Kernel(function))
