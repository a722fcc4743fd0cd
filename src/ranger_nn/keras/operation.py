"""One call of a Keras operation, as the rules in `lowering*.py` are given it, and the table of these rules.

Enter at `Call` and `rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from ranger_nn.core.graph import Rule
from ranger_nn.keras.kernels import Kernel
from ranger_nn.keras.lower import Lower, bound

RULES: dict[str, Callable[[Call], Any]] = {}

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
