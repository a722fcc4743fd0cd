"""Which region rule and kernel each Keras operation gets. To add one, add a function under `@rule("ClassName")`.

A rule function receives a `Call` (arguments by name, value indices for tensors) and returns the list of result
values, or None to say "this form has no rule": the operation then stays whole. Names are those of the operations'
classes in `keras.ops`. Enter at `lower_operation`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any

import keras
from keras import ops, tree

from ranger_nn.core.graph import Rule
from ranger_nn.keras import (  # each registers its rules
    lowering_contraction,  # noqa: F401
    lowering_movement,  # noqa: F401
    lowering_reduce,  # noqa: F401
    lowering_window,  # noqa: F401
)
from ranger_nn.keras.kernels import Kernel
from ranger_nn.keras.lower import Lower
from ranger_nn.keras.operation import RULES, Call
from ranger_nn.keras.trace import Untraceable
from ranger_nn.ops.pointwise import pointwise

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


SIZED_BY_NUMBERS = frozenset(["Nonzero", "Unique", "Argwhere"])
"""Operations whose result's size depends on what is in their input."""


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
