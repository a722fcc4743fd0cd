"""Which region rule and kernel each Keras operation gets. To add one, add a function under `@rule("ClassName")`.

A rule function receives a `Call` (arguments by name, value indices for tensors) and returns the list of result
values, or None to say "this form has no rule": the operation then stays whole. Names are those of the operations'
classes in `keras.ops`. Enter at `lower_operation`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import keras
from keras import ops, tree

from ranger_nn.core.graph import Rule
from ranger_nn.keras.kernels import Kernel
from ranger_nn.keras.lower import Lower, bound
from ranger_nn.keras.trace import Untraceable
from ranger_nn.ops.pointwise import pointwise

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


TAME = frozenset(
    [
        "Absolute",
        "Abs",
        "Add",
        "BatchNorm",
        "Cast",
        "Celu",
        "Ceil",
        "Clip",
        "ConvertToTensor",
        "Copy",
        "CountNonzero",
        "Cos",
        "Deg2rad",
        "Diff",
        "Dot",
        "DotProductAttention",
        "Einsum",
        "Elu",
        "Equal",
        "Erf",
        "Erfc",
        "Fabs",
        "Flip",
        "Floor",
        "FullLike",
        "Gelu",
        "Glu",
        "Greater",
        "GreaterEqual",
        "HardShrink",
        "HardSigmoid",
        "HardSilu",
        "HardTanh",
        "Inner",
        "LayerNorm",
        "LeakyRelu",
        "Less",
        "LessEqual",
        "LogSigmoid",
        "LogSoftmax",
        "LogicalAnd",
        "LogicalNot",
        "LogicalOr",
        "LogicalXor",
        "Matmul",
        "Maximum",
        "Minimum",
        "Moveaxis",
        "Multiply",
        "Negative",
        "NotEqual",
        "OneHot",
        "OnesLike",
        "Rad2deg",
        "Relu",
        "ReLU",
        "Relu6",
        "RMSNorm",
        "Roll",
        "Round",
        "Selu",
        "Sigmoid",
        "Sign",
        "Silu",
        "Sin",
        "Softmax",
        "Softplus",
        "SoftShrink",
        "Softsign",
        "SpaceToDepth",
        "Sparsemax",
        "SparsePlus",
        "SparseSigmoid",
        "Square",
        "Stack",
        "StopGradient",
        "Subtract",
        "Swapaxes",
        "Take",
        "Tanh",
        "TanhShrink",
        "Tensordot",
        "Threshold",
        "Tile",
        "Transpose",
        "Trunc",
        "Where",
        "ZerosLike",
    ]
)
"""Operations that give finite numbers and derivatives wherever their inputs are finite: see `Kernel.tame`."""

SIZED_BY_NUMBERS = frozenset(["Nonzero", "Unique", "Argwhere"])
"""Operations whose result's size depends on what is in their input."""


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

    def as_declared(self) -> bool:
        """Whether the back end gives the shapes and dtypes that Keras declares."""

        def specs(outs: Sequence[Any]) -> list[Any]:
            return [(tuple(o.shape), keras.backend.standardize_dtype(o.dtype)) for o in outs]

        return specs(self.lower.inferred(self.op.call, self.args, self.kwargs, self.outs)) == specs(self.outs)

    def emit(self, inputs: Sequence[int], region: Rule, kernel: Kernel, **options: Any) -> list[int]:
        """Add the node."""
        specs = [(o.shape, str(keras.backend.standardize_dtype(o.dtype))) for o in self.outs]
        kernel.tame = kernel.tame or self.name in TAME or self._by_number()
        return self.lower.emit(self.name.lower(), inputs, specs, region, kernel, **options)

    def _by_number(self) -> bool:
        """Divided by a number that is not zero, or multiplied with itself."""
        number = self.named.get("x2")
        if not isinstance(number, (int, float)):
            return False
        return (self.name in {"Divide", "TrueDivide"} and number != 0) or (
            self.name == "Power" and number >= 1 and number == int(number)
        )

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
    _refuse_hidden(op, name, args, kwargs, named)
    outs = lower.specs(op.call, args, kwargs, outs)
    return emit_call(Call(lower, op, name, args, kwargs, outs, named))


def _refuse_hidden(op: Any, name: str, args: Any, kwargs: Any, named: dict[str, Any]) -> None:
    """What a graph of known shapes cannot hold: sizes that the numbers decide, tensors that only a function's closure reads."""
    sized = name in SIZED_BY_NUMBERS and getattr(op, "size", None) is None
    if sized or (name == "Where" and named.get("x1") is None):
        raise Untraceable(f"uses {name.lower()}, whose result's size depends on the numbers")
    functions = [
        x for x in (*tree.flatten((args, kwargs)), *vars(op).values()) if isinstance(x, (FunctionType, MethodType))
    ]
    if type(op).__module__.startswith("keras.") and not all(map(_alone, functions)):
        raise Untraceable(f"hands {name.lower()} a function that reads more than its arguments")


def _alone(function: Any) -> bool:
    """Whether a function reads nothing but its arguments and numbers: tensors in its closure are no inputs of the operation."""
    if isinstance(function, MethodType):
        return False
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    return all(
        isinstance(x, (int, float, str, type(None))) or (isinstance(x, FunctionType) and _alone(x)) for x in held
    )


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
    if call.name == "Add" and len(inputs) == 2 and keras.backend.backend() == "tensorflow":
        function, inputs = _added(call, function, inputs)
    return call.emit(inputs, pointwise([call.shape(v) for v in inputs], call.out), Kernel(function))


def _added(call: Call, function: Callable[..., Any], inputs: list[int]) -> tuple[Callable[..., Any], list[int]]:
    """Keras on TensorFlow takes a vector in any dimension for a bias of the last, or else the second, where that is as long.

    A region may be as long where the whole is not. So a vector is laid along the dimension that the untouched operator takes
    it for, right or wrong, and unless that is the last it comes first, where nothing is taken for a bias.
    """
    x, vector = (call.shape(v) for v in inputs)
    own = [d - len(vector) for d, n in enumerate(vector) if n > 1]
    if len(own) != 1:
        return function, inputs
    length = vector[own[0]]
    along = next((d for d in (-1, 1 - len(x)) if len(x) > 1 and x[d] == length), own[0])
    if along != own[0]:
        shape = tuple(length if d == along else 1 for d in range(-len(x), 0))
        dtype = call.lower.values[inputs[1]].dtype
        laid = call.lower.emit(
            "reshape",
            [inputs[1]],
            [(shape, dtype)],
            Rule(((None,) * len(vector),)),
            Kernel(lambda v: ops.reshape(v, shape)),
        )
        inputs = [inputs[0], laid[0]]
    return function if along == -1 else lambda x, vector: ops.add(vector, x), inputs


# each registers its rules
from ranger_nn.keras import lowering_contraction, lowering_movement, lowering_reduce, lowering_window  # noqa: E402, F401
