"""`keras.ops` under the names of the Python array API standard: what the neutral code of `aggregate` and `layers` calls.

Only what is called is here. A function missing here is added here, never worked around in neutral code.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from keras import backend, ops

abs = ops.abs
all = ops.all
any = ops.any
argmax = ops.argmax
argmin = ops.argmin
argsort = ops.argsort
astype = ops.cast
broadcast_to = ops.broadcast_to
exp = ops.exp
expand_dims = ops.expand_dims
isfinite = ops.isfinite
log = ops.log
logical_and = ops.logical_and
logical_not = ops.logical_not
matmul = ops.matmul
max = ops.max
mean = ops.mean
min = ops.min
ones_like = ops.ones_like
reshape = ops.reshape
sqrt = ops.sqrt
sum = ops.sum
take = ops.take
take_along_axis = ops.take_along_axis
zeros = ops.zeros
zeros_like = ops.zeros_like


def searchsorted(given: Any, values: Any, side: str = "left") -> Any:
    """Where `values` go in sorted `given`; JAX's own takes no symbolic length, as there is when shapes are inferred."""
    if given.shape[0] is None or isinstance(given.shape[0], int):
        return ops.searchsorted(given, values, side=side)
    below = given[None, :] < values[:, None] if side == "left" else given[None, :] <= values[:, None]
    return ops.sum(ops.cast(below, values.dtype), axis=1)


def arange(stop: Any, dtype: Any = None, **_: Any) -> Any:
    """0 ... stop - 1; devices are Keras's affair."""
    return ops.arange(stop, dtype=dtype)


def _double(x: Any) -> bool:
    return bool(ops.is_tensor(x)) and backend.standardize_dtype(x.dtype) == "float64"


def _native(x: Any, y: Any) -> Any:
    """The back end's own namespace for two arrays of float64: where two arrays meet, Keras takes it for float32."""
    name = backend.backend()
    if name == "tensorflow" or not (_double(x) and _double(y)):
        return ops
    return import_module("torch" if name == "torch" else "jax.numpy")


def maximum(x: Any, y: Any) -> Any:
    """The larger of each two."""
    return _native(x, y).maximum(x, y)


def minimum(x: Any, y: Any) -> Any:
    """The smaller of each two."""
    return _native(x, y).minimum(x, y)


def where(condition: Any, x: Any, y: Any) -> Any:
    """x where the condition holds, y elsewhere."""
    return _native(x, y).where(condition, x, y)


def asarray(x: Any, dtype: Any = None, **_: Any) -> Any:
    """An array from numbers; devices are Keras's affair."""
    return ops.convert_to_tensor(x, dtype=dtype)


def concat(arrays: Sequence[Any], axis: int = 0) -> Any:
    """One after the other."""
    return ops.concatenate(arrays, axis=axis)


def cumulative_sum(x: Any, axis: int = 0) -> Any:
    """Running sum."""
    return ops.cumsum(x, axis=axis)


def permute_dims(x: Any, axes: Sequence[int]) -> Any:
    """Transpose."""
    return ops.transpose(x, axes)


def stack(arrays: Sequence[Any], axis: int = 0) -> Any:
    """On top of each other."""
    return ops.stack(arrays, axis=axis)


def unstack(x: Any, axis: int = 0) -> Sequence[Any]:
    """The slices along an axis."""
    return ops.unstack(x, axis=axis)
