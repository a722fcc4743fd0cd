"""Rules of reductions, and of norms and softmax over channels. See `lowering.py`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import inf, isinf
from typing import Any

import keras
from keras import ops

from ranger_nn.aggregate.monoid import Extremum, Moments, Sum
from ranger_nn.core.graph import Rule
from ranger_nn.core.reach import Link
from ranger_nn.keras.kernels import Kernel
from ranger_nn.keras.kernels_cumulative import Cumulative
from ranger_nn.keras.kernels_reduce import Reduce, Spread, root
from ranger_nn.keras.lower import ITEMSIZE
from ranger_nn.keras.operation import Call, rule
from ranger_nn.ops import cumulative, reduction
from ranger_nn.ops.pointwise import local_except, pointwise


@rule("Mean", "Sum", "Max", "Min", "Amax", "Amin")
def _reduction(call: Call) -> Any:
    x = call.arg("x")
    monoid: Any = {
        "Mean": Sum(mean=True),
        "Sum": Sum(),
        "Max": Extremum(),
        "Amax": Extremum(),
        "Min": Extremum(-1),
        "Amin": Extremum(-1),
    }[call.name]
    axes = _axes(call.op.axis, len(call.shape(x)))
    if getattr(call.op, "initial", None) is not None:
        return None
    if not call.dtype.startswith(("float", "bfloat")):
        return _over(call)
    kern = _reduce(call, x, monoid, axes, call.op.keepdims)
    return call.emit([x], reduction.reduction(call.shape(x), axes, call.op.keepdims), kern)


@rule("Var", "Std")
def _spread(call: Call) -> Any:
    """The operator itself; from moments of regions where a reduced axis is cut."""
    x = call.arg("x")
    if call.lower.values[x].dtype != call.dtype or not call.dtype.startswith(("float", "bfloat")):
        return _over(call)
    axes, keepdims = _axes(call.op.axis, len(call.shape(x))), call.op.keepdims
    shape, dtype = call.shape(x), call.lower.values[x].dtype
    wide = wide_of(dtype)
    kern = Spread(call.function()[0], shape, axes, bool(keepdims), call.dtype, wide, call.name == "Std")
    return call.emit([x], reduction.reduction(shape, axes, keepdims), kern)


def _axes(axis: Any, rank: int) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(rank))
    return tuple(sorted(a % rank for a in ([axis] if isinstance(axis, int) else axis)))


def wide_of(dtype: str) -> str:
    """What sums are computed in."""
    return "float32" if dtype in {"float16", "bfloat16"} else dtype


def _reduce(call: Call, x: int, monoid: Any, axes: tuple[int, ...], keepdims: bool) -> Reduce:
    dtype = call.lower.values[x].dtype
    wide = wide_of(dtype)
    function = call.function()[0]
    if isinstance(monoid, Moments):
        moments = function
        function = lambda t: ops.stack(moments(t))  # noqa: E731
    return Reduce(function, monoid, call.shape(x), axes, bool(keepdims), call.dtype, wide)


@rule("Norm")
def _norm(call: Call) -> Any:
    """Root of a sum of powers of magnitudes, or their extremum; of a matrix the extremum of sums along its other axis."""
    x = call.arg("x")
    rank, flat = len(call.shape(x)), call.op.ord in (None, "fro")
    axes = [a % rank for a in (range(rank) if call.op.axis is None else call.op.axis)]
    p, matrix = 2 if flat else call.op.ord, len(axes) > 1 and not flat
    if not _is_summed(p, matrix) or call.lower.values[x].dtype != call.dtype:
        return _over(call)
    if not (matrix or isinf(p)):
        total = _folded(call, _each(call, x, lambda t: _power(t, p)), Sum(), axes)
        return _squeezed(call, total, axes, lambda t: t if p in (0, 1) else root(t, p))
    found, over = _each(call, x, ops.abs), axes
    if matrix:
        found, over = _folded(call, found, Sum(), [axes[isinf(p)]]), [axes[not isinf(p)]]
    return _squeezed(call, _folded(call, found, Extremum(1 if p > 0 else -1), over), axes, lambda t: t)


def _is_summed(p: Any, matrix: bool) -> bool:
    """Whether a norm is made of sums and extrema; of powers below one derivatives at zero are the back end's own."""
    return p != "nuc" and (p in (1, -1, inf, -inf) if matrix else p in (0, -inf) or p >= 1)


def _power(x: Any, p: float) -> Any:
    """The p-th power of magnitudes; of p = 0 whether there is any."""
    if p == 0:
        return ops.cast(ops.not_equal(x, 0), x.dtype)
    return ops.abs(x) if p == 1 else ops.square(x) if p == 2 else ops.power(ops.abs(x), p)


def _each(call: Call, x: int, function: Any) -> int:
    """A pointwise node, in the dtype of sums."""
    shape, wide = call.shape(x), wide_of(call.dtype)
    kern = Kernel(lambda t: function(ops.cast(t, wide)), tame=True)
    return int(call.lower.emit("norm", [x], [(shape, wide)], pointwise([shape], shape), kern)[0])


def _folded(call: Call, x: int, monoid: Any, axes: Sequence[int]) -> int:
    """A reduction of a value in the dtype of sums; its axes stay, of length one."""
    shape, wide = call.shape(x), call.lower.values[x].dtype
    name = "sum" if isinstance(monoid, Sum) else "max" if monoid.sign > 0 else "min"
    kern = Reduce(partial(getattr(ops, name), axis=tuple(axes), keepdims=True), monoid, shape, axes, True, wide, wide)
    out = tuple(1 if d in axes else n for d, n in enumerate(shape))
    return int(call.lower.emit(name, [x], [(out, wide)], reduction.reduction(shape, axes, True), kern)[0])


def _squeezed(call: Call, x: int, axes: Sequence[int], function: Any) -> list[int]:
    """The result, from a value whose reduced axes are still there."""
    rank, away = len(call.shape(x)), () if call.op.keepdims else tuple(axes)
    kept = [d for d in range(rank) if d not in away]
    row = tuple(Link(kept.index(d)) if d in kept and d not in axes else None for d in range(rank))
    return call.emit(
        [x], Rule((row,)), Kernel(lambda t: ops.cast(function(ops.squeeze(t, away) if away else t), call.dtype))
    )


@rule("Moments")
def _moments(call: Call) -> Any:
    x = call.arg("x")
    axes = _axes(call.op.axes, len(call.shape(x)))
    both = _both_moments(call, x, axes, _reduce(call, x, Moments(), axes, call.op.keepdims))
    first = _one_moment(call, both, "mean", lambda t: t[0])
    return first + _one_moment(call, both, "variance", lambda t: t[1])


def _both_moments(call: Call, x: int, axes: tuple[int, ...], kern: Reduce) -> int:
    row = reduction.reduction(call.shape(x), axes, kern.keepdims).links[0]
    links = tuple(None if link is None else Link(link.out_dim + 1) for link in row)
    stacked = (2, *call.out)
    return int(call.lower.emit("moments", [x], [(stacked, call.dtype)], Rule((links,), reduces=True), kern)[0])


def _one_moment(call: Call, both: int, name: str, function: Any) -> list[int]:
    chosen = Rule(((None, *(Link(d) for d in range(len(call.out)))),))
    return call.lower.emit(name, [both], [(call.out, call.dtype)], chosen, Kernel(function))


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


# ---------------------------------------------------------------- along axes of which all is read


ALONG = ("Argsort", "Nancumprod", "Nancumsum", "Sort")
"""Operations that keep the shape; everything where they have no axis."""

OVER = (
    *(
        "All",
        "Any",
        "Argmax",
        "Argmin",
        "CountNonzero",
        "Logsumexp",
        "Median",
        "Nanargmax",
        "Nanargmin",
        "Nanmax",
        "Nanmean",
    ),
    *("Nanmedian", "Nanmin", "Nanprod", "Nanstd", "Nansum", "Nanvar", "Prod", "Ptp", "Average"),
)
"""Operations that leave axes out, or with one index in them."""


@rule(*ALONG)
def _along(call: Call) -> Any:
    function, inputs = call.function()
    if len(inputs) != 1 or call.op.axis is None or not call.as_declared():
        return None
    axes = _axes(call.op.axis, len(call.out))
    return call.emit(inputs, local_except([call.shape(inputs[0])], call.out, set(axes)), Kernel(function))


@rule("Cumsum", "Cumprod")
def _cumulative(call: Call) -> Any:
    """All rows so far; which form of them, the axes of the network decide."""
    function, inputs = call.function()
    axis = None if call.op.axis is None else call.op.axis % len(call.out)
    if not axis or call.lower.values[inputs[0]].dtype != call.dtype or not call.as_declared():
        return _along(call)
    wide = wide_of(call.dtype)
    kern = Cumulative(function, call.name == "Cumprod", axis, call.out, call.dtype, wide, ITEMSIZE.get(wide, 4))
    return call.emit(inputs, cumulative.so_far(call.out), kern)


@rule(*OVER)
def _over(call: Call) -> Any:
    function, inputs = call.function()
    if len(inputs) != 1 or call.op.axis is None or not call.as_declared():
        return None
    shape = call.shape(inputs[0])
    axes = _axes(call.op.axis, len(shape))
    kept = [d for d in range(len(shape)) if d not in axes]
    if len(call.out) == len(shape):
        row = tuple(None if d in axes else Link(d) for d in range(len(shape)))
    elif len(call.out) == len(kept):
        row = tuple(Link(kept.index(d)) if d in kept else None for d in range(len(shape)))
    else:
        return None
    return call.emit(inputs, Rule((row,)), Kernel(function))
