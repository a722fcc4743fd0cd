"""Which region rule and kernel each Keras operation gets. To add one, add a function under `@rule("ClassName")`.

A rule function receives a `Call` (arguments by name, value indices for tensors) and returns the list of result
values, or None to say "this form has no rule": the operation then stays whole. Names are those of the operations'
classes in `keras.ops`. Enter at `lower_operation`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import keras
from keras import ops

from ranger_nn.aggregate.monoid import Extremum, Moments, Sum
from ranger_nn.core.graph import Rule
from ranger_nn.core.reach import Link
from ranger_nn.keras import kernels_window as W
from ranger_nn.keras.convolve import convolve, pool
from ranger_nn.keras.kernels import Kernel
from ranger_nn.keras.kernels_reduce import Reduce
from ranger_nn.keras.lower import Lower, Ref, bound
from ranger_nn.ops import contraction, reduction
from ranger_nn.ops.pointwise import local_except, pointwise

RULES: dict[str, Callable[[Call], Any]] = {}

POINTWISE = frozenset(
    [
        "Absolute",
        "Abs",
        "Add",
        "Arccos",
        "Arccosh",
        "Arcsin",
        "Arcsinh",
        "Arctan",
        "Arctan2",
        "Arctanh",
        "BitwiseAnd",
        "BitwiseInvert",
        "BitwiseNot",
        "BitwiseOr",
        "BitwiseXor",
        "Cast",
        "Cbrt",
        "Ceil",
        "Celu",
        "Clip",
        "ConvertToTensor",
        "Copy",
        "Cos",
        "Cosh",
        "Deg2rad",
        "Divide",
        "DivideNoNan",
        "Elu",
        "Equal",
        "Erf",
        "Erfc",
        "Erfinv",
        "Exp",
        "Exp2",
        "Expm1",
        "Fabs",
        "Floor",
        "FloorDivide",
        "Fmax",
        "Fmin",
        "Fmod",
        "FullLike",
        "Gelu",
        "Greater",
        "GreaterEqual",
        "HardShrink",
        "HardSigmoid",
        "HardSilu",
        "HardTanh",
        "Heaviside",
        "Hypot",
        "I0",
        "Isclose",
        "Isfinite",
        "Isinf",
        "Isnan",
        "Isneginf",
        "Isposinf",
        "Ldexp",
        "LeakyRelu",
        "Less",
        "LessEqual",
        "Log",
        "Log10",
        "Log1p",
        "Log2",
        "LogSigmoid",
        "Logaddexp",
        "Logaddexp2",
        "LogicalAnd",
        "LogicalNot",
        "LogicalOr",
        "LogicalXor",
        "Maximum",
        "Minimum",
        "Mod",
        "Multiply",
        "NanToNum",
        "Negative",
        "Nextafter",
        "NotEqual",
        "OnesLike",
        "Power",
        "Rad2deg",
        "Reciprocal",
        "Relu",
        "ReLU",
        "Relu6",
        "Round",
        "Rsqrt",
        "SaturateCast",
        "Selu",
        "Sigmoid",
        "Sign",
        "Signbit",
        "Silu",
        "Sin",
        "Sinc",
        "Sinh",
        "SoftShrink",
        "Softplus",
        "Softsign",
        "SparsePlus",
        "SparseSigmoid",
        "Sqrt",
        "Square",
        "Squareplus",
        "StopGradient",
        "Subtract",
        "Tan",
        "Tanh",
        "TanhShrink",
        "Threshold",
        "TrueDivide",
        "Trunc",
        "Where",
        "ZerosLike",
    ]
)


def rule(*names: str) -> Callable[[Callable[[Call], Any]], Callable[[Call], Any]]:
    """Register a rule function for classes of operations."""

    def register(function: Callable[[Call], Any]) -> Callable[[Call], Any]:
        for name in names:
            RULES[name] = function
        return function

    return register


@dataclass
class Call:
    """One call of an operation: `arg(name)` by the names of its `call`; tensors come as value indices."""

    lower: Lower
    op: Any
    name: str
    args: Any
    kwargs: Any
    outs: Sequence[Any]
    named: dict[str, Any]

    def arg(self, name: str, default: Any = None) -> Any:
        """The argument, a tensor as its value index."""
        found = self.named.get(name, default)
        return found if isinstance(found, (list, tuple, dict)) else self.lower.resolve(found)

    @property
    def out(self) -> tuple[int, ...]:
        """Shape of the first result."""
        return tuple(self.outs[0].shape)

    @property
    def dtype(self) -> str:
        """Dtype of the first result."""
        return str(keras.backend.standardize_dtype(self.outs[0].dtype))

    def shape(self, v: int) -> tuple[int, ...]:
        """Shape of a value."""
        return self.lower.shape(v)

    def function(self) -> tuple[Callable[..., Any], list[int]]:
        """The operation with constants bound, and its tensors."""
        return bound(self.lower, self.op.call, self.args, self.kwargs)

    def emit(self, inputs: Sequence[int], region: Rule, kernel: Kernel, **options: Any) -> list[int]:
        """Add the node."""
        specs = [(o.shape, str(keras.backend.standardize_dtype(o.dtype))) for o in self.outs]
        return self.lower.emit(self.name.lower(), inputs, specs, region, kernel, **options)

    def channels_last(self) -> bool:
        """Where the channels of the first input are."""
        given = getattr(self.op, "data_format", None) or keras.config.image_data_format()
        self.lower.channels_last = given == "channels_last"
        return self.lower.channels_last

    def channel(self, rank: int) -> int:
        """The dimension of the channels."""
        return rank - 1 if self.channels_last() else 1

    def space(self, rank: int) -> tuple[int, ...]:
        """The dimensions of space (or time)."""
        return tuple(range(1, rank - 1)) if self.channels_last() else tuple(range(2, rank))


def lower_operation(lower: Lower, op: Any, args: Any, kwargs: Any, outs: Sequence[Any]) -> list[Any]:
    """Value indices of an operation's results."""
    name = type(op).__name__
    try:
        named = dict(inspect.signature(op.call).bind(*args, **kwargs).arguments)
    except TypeError:
        named = {}
    outs = lower.specs(op.call, args, kwargs, outs)
    return emit_call(Call(lower, op, name, args, kwargs, outs, named))


def emit_call(call: Call) -> list[Any]:
    """The nodes of a call: by its rule, pointwise, or whole."""
    ours = type(call.op).__module__.startswith(("keras.", "ranger_nn."))
    if ours and call.name in RULES:
        found = RULES[call.name](call)
        if found is not None:
            return list(found)
    elif ours and call.name in POINTWISE and len(call.outs) == 1:
        return _pointwise(call)
    reason = f"this form of {call.name} has no region rule" if call.name in RULES else f"{call.name} has no region rule"
    return call.lower.whole(call.name.lower(), call.op.call, call.args, call.kwargs, call.outs, reason)


def _pointwise(call: Call) -> list[int]:
    function, inputs = call.function()
    copies = call.name in {"Cast", "ConvertToTensor", "Copy"} and len(inputs) == 1
    if copies and call.lower.values[inputs[0]].dtype == call.dtype:
        return [inputs[0]]
    if call.name == "Add" and len(inputs) == 2 and _taken_for_bias(call, inputs):
        function = _swapped
    return call.emit(inputs, pointwise([call.shape(v) for v in inputs], call.out), Kernel(function))


def _taken_for_bias(call: Call, inputs: Sequence[int]) -> bool:
    """Keras on TensorFlow takes a vector in any dimension for a bias of the last, where the lengths are the same.

    False where the untouched operator does so as well, in a dimension that is not cut: that is what it gives.
    """
    shape, out = call.shape(inputs[1]), call.out
    long = [d for d, n in enumerate(shape) if n > 1]
    if keras.backend.backend() != "tensorflow" or len(long) != 1 or long[0] == len(shape) - 1:
        return False
    return len(out) < 4 or out[-1] != shape[long[0]]


def _swapped(x: Any, y: Any) -> Any:
    return ops.add(y, x)


def ints(value: Any, rank: int) -> tuple[int, ...]:
    """One integer for each of `rank` dimensions."""
    return (int(value),) * rank if isinstance(value, int) else tuple(int(v) for v in value)


# ----------------------------------------------------------------------------------- convolution


def _sides(call: Call, x: int, kernel: Sequence[int], stride: Any, dilation: Any, out: Sequence[int]) -> list[W.Side]:
    shape = call.shape(x)
    space = call.space(len(shape))
    strides, dilations = ints(stride, len(space)), ints(dilation, len(space))
    sides = []
    for i, d in enumerate(space):
        before, after = W.padding(shape[d], kernel[i], strides[i], dilations[i], call.op.padding)
        sides.append(W.Side(d, shape[d], out[d], kernel[i], strides[i], dilations[i], before, after))
    return sides


def windowed(call: Call, x: int, sides: Sequence[W.Side], reaches: Sequence[Any], others: Sequence[int]) -> Rule:
    """Rule of a window: the batch and space are local, channels and weights are read whole."""
    shape = call.shape(x)
    row: list[Link | None] = [Link(0)] + [None] * (len(shape) - 1)
    for side, reach in zip(sides, reaches, strict=True):
        row[side.dim] = Link(side.dim, reach)
    return Rule((tuple(row), *((None,) * len(call.shape(o)) for o in others)))


@rule("Conv")
def _convolution(call: Call) -> Any:
    return convolution(call, call.arg("inputs"), call.arg("kernel"), ops.conv, call.out)


@rule("DepthwiseConv")
def _depthwise(call: Call) -> Any:
    return convolution(call, call.arg("inputs"), call.arg("kernel"), ops.depthwise_conv, call.out)


@rule("SeparableConv")
def _separable(call: Call) -> Any:
    x, depthwise, point = call.arg("inputs"), call.arg("depthwise_kernel"), call.arg("pointwise_kernel")
    middle = list(call.out)
    middle[call.channel(len(middle))] = call.shape(point)[-2]
    between = convolution(call, x, depthwise, ops.depthwise_conv, middle)[0]
    return convolution(call, between, point, ops.conv, call.out, plain=True)


def convolution(call: Call, x: int, weight: int, operator: Any, out: Sequence[int], plain: bool = False) -> list[int]:
    """A convolution; `plain`: of stride 1 and size 1, whatever the operation's own strides are."""
    op = call.op
    rank = len(call.shape(x)) - 2
    kernel = call.shape(weight)[:rank]
    stride, dilation = (1, 1) if plain else (op.strides, op.dilation_rate)
    sides = _sides(call, x, kernel, stride, dilation, out)
    common = {
        "strides": ints(stride, rank),
        "data_format": "channels_last" if call.channels_last() else "channels_first",
        "dilation_rate": ints(dilation, rank),
    }

    def whole(inputs: Any, weights: Any) -> Any:
        return operator(inputs, weights, padding=op.padding, **common)

    last, depthwise = call.channels_last(), operator is ops.depthwise_conv

    def padded(inputs: Any, weights: Any, pads: Any) -> Any:
        return convolve(inputs, weights, ints(stride, rank), ints(dilation, rank), pads, last, depthwise)

    kern = W.Convolution(whole, padded, sides)
    region = windowed(call, x, sides, [s.reach for s in sides], [weight])
    name = "depthwise_conv" if depthwise else "conv"
    work = prod(kernel) if depthwise else prod(call.shape(weight)[:-1])
    return call.lower.emit(name, [x, weight], [(tuple(out), call.dtype)], region, kern, macs=prod(out) * work)


@rule("ConvTranspose")
def _transposed(call: Call) -> Any:
    x, weight, op = call.arg("inputs"), call.arg("kernel"), call.op
    rank = len(call.shape(x)) - 2
    kernel, strides, dilation = call.shape(weight)[:rank], ints(op.strides, rank), ints(op.dilation_rate, rank)
    shape, sides = call.shape(x), []
    for i, d in enumerate(call.space(rank + 2)):
        extra = op.output_padding if op.output_padding is None else ints(op.output_padding, rank)[i]
        cut = _cut_before(kernel[i], strides[i], dilation[i], op.padding, extra)
        sides.append(W.Side(d, shape[d], call.out[d], kernel[i], strides[i], dilation[i], cut, 0))
    common = {
        "strides": strides,
        "data_format": "channels_last" if call.channels_last() else "channels_first",
        "dilation_rate": dilation,
    }

    def valid(inputs: Any, weights: Any) -> Any:
        return ops.conv_transpose(inputs, weights, padding="valid", **common)

    def whole(inputs: Any, weights: Any) -> Any:
        return ops.conv_transpose(inputs, weights, padding=op.padding, output_padding=op.output_padding, **common)

    kern = W.Transposed(whole, valid, sides)
    region = windowed(call, x, sides, [kern.reach(s) for s in sides], [weight])
    macs = prod(shape) * prod(call.shape(weight)[:-1])
    return call.emit([x, weight], region, kern, macs=macs)


def _cut_before(kernel: int, stride: int, dilation: int, mode: str, extra: int | None) -> int:
    """Indices that "same" cuts off before the first of a transposed convolution."""
    if mode != "same":
        return 0
    span = dilation * (kernel - 1) + 1
    total = stride + span - 2 if extra is None else span + span % 2 - 2 + extra
    return span - 1 - min(total // 2 + total % 2, span - 1)


# --------------------------------------------------------------------------------------- pooling


@rule("MaxPool", "AveragePool")
def _pool(call: Call) -> Any:
    x, op = call.arg("inputs"), call.op
    shape = call.shape(x)
    rank = len(shape) - 2
    size = ints(op.pool_size, rank)
    stride = size if op.strides is None else ints(op.strides, rank)
    sides = _sides(call, x, size, stride, 1, call.out)
    function, _ = call.function()
    last, average = call.channels_last(), call.name == "AveragePool"

    def valid(inputs: Any) -> Any:
        return pool(inputs, size, stride, last, average)

    if not average:
        kern: W.Window = W.Window(function, valid, sides, -float("inf"))
    else:
        uneven = any(s.before != s.after for s in sides) and keras.backend.backend() == "torch"
        kern = W.AveragePool(function, valid, sides, uneven)
    row = [Link(d) for d in range(len(shape))]
    for side in sides:
        row[side.dim] = Link(side.dim, side.reach)
    return call.emit([x], Rule((tuple(row),)), kern)


# ------------------------------------------------------------------------------------- reduction


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
    function, inputs = call.function()
    rank = len(call.out)
    axis = call.op.axis % rank
    row = tuple(None if d == axis else Link(d) for d in range(rank))
    return call.emit(inputs, Rule((row, *((None,) for _ in inputs[1:])), pointwise=True), Kernel(function))


@rule("Softmax", "LogSoftmax", "Sparsemax", "Glu")
def _softmax(call: Call) -> Any:
    function, inputs = call.function()
    rank = len(call.out)
    axis = getattr(call.op, "axis", -1)
    axis = -1 if axis is None else axis
    whole = {a % rank for a in ([axis] if isinstance(axis, int) else axis)}
    return call.emit(inputs, local_except([call.shape(v) for v in inputs], call.out, whole), Kernel(function))


# ----------------------------------------------------------------------------------- contraction


@rule("Matmul", "Dot")
def _matmul(call: Call) -> Any:
    left, right = call.arg("x1"), call.arg("x2")
    if not isinstance(left, Ref) or not isinstance(right, Ref):
        return None
    a, b = call.shape(left), call.shape(right)
    if len(b) != 2 and (call.name == "Dot" or len(a) < 2 or len(b) < 2):
        return None
    function, inputs = call.function()
    macs = prod(call.out) * a[-1]
    if len(b) == 2:
        return call.emit(inputs, contraction.linear(a, [b]), Kernel(function), macs=macs)
    return call.emit(inputs, contraction.matmul(a, b, call.out, False), Kernel(function), macs=macs)


from ranger_nn.keras import lowering_movement as _more  # noqa: E402, F401  (registers its rules)
