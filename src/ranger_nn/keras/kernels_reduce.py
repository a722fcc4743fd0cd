"""Kernels of reductions: lift a region, merge states, finish.

The monoids are `ranger_nn.aggregate`'s; here they meet Keras. A state is a tuple of tensors with the dimensions kept.

    state = kernel.lift(x, valid)                  `valid`: bool, broadcast against x, or None: all rows count
    state = kernel.merge(a, b, n_a, n_b)           n: elements behind one entry: rows * kernel.per_row(dim)
    result = kernel.finish(state)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import keras
from keras import ops

from ranger_nn.aggregate.monoid import Moments, Monoid, State, count
from ranger_nn.keras import namespace as xp
from ranger_nn.keras.kernels import Kernel


class Reduce(Kernel):
    """A reduction over `axis` of `shape`. Moments give (mean, variance) stacked in front."""

    tame = True

    def __init__(
        self,
        function: Callable[..., Any],
        monoid: Monoid,
        shape: Sequence[int],
        axis: Sequence[int],
        keepdims: bool,
        dtype: str,
        wide: str,
    ) -> None:
        """`shape`: whole shape of the input; `dtype`: of the result; `wide`: what states are computed in."""
        super().__init__(function)
        self.monoid, self.shape, self.axis, self.keepdims = monoid, tuple(shape), tuple(sorted(axis)), keepdims
        self.dtype, self.wide = dtype, wide
        self.total = count(self.shape, self.axis)

    def per_row(self, dim: int) -> int:
        """Elements behind one entry for each row along input dimension `dim`."""
        return prod(self.shape[d] for d in self.axis if d != dim)

    def lift(self, x: Any, valid: Any = None) -> State:
        """State of one region; rows where `valid` is False do not count."""
        return self.monoid.lift(xp, ops.cast(x, self.wide), self.axis, valid)

    def empty(self, like: Any) -> State:
        """State of no region; `like`: a tensor of the reduced shape, dimensions kept."""
        return self.monoid.empty(xp, like)

    def merge(self, a: State, b: State, n_a: Any, n_b: Any) -> State:
        """State of two regions of n_a and n_b elements (integers, or tensors in the state's dtype)."""
        return self.monoid.merge(xp, a, b, n_a, n_b)

    def finish(self, state: State) -> Any:
        """The result, in the untouched operator's shape and dtype."""
        result = self.monoid.finish(xp, state, self.total)
        parts = result if isinstance(self.monoid, Moments) else (result,)
        if not self.keepdims:
            parts = tuple(ops.squeeze(p, self.axis) for p in parts)
        parts = tuple(ops.cast(p, self.dtype) for p in parts)
        return ops.stack(parts) if isinstance(self.monoid, Moments) else parts[0]

    def scratch(self, out_bytes: int, in_bytes: Sequence[int]) -> int:
        """Deviations and their squares."""
        return 2 * in_bytes[0]

    def tape(self, out_bytes: int, in_bytes: Sequence[int]) -> int:
        """On PyTorch deviations, and the gradient of the rows."""
        return 2 * in_bytes[0] if keras.backend.backend() == "torch" else 0


class Spread(Reduce):
    """Variance, or with `root` standard deviation."""

    def __init__(
        self,
        function: Callable[..., Any],
        shape: Sequence[int],
        axis: Sequence[int],
        keepdims: bool,
        dtype: str,
        wide: str,
        root: bool,
    ) -> None:
        """As for any reduction."""
        super().__init__(function, Moments(), shape, axis, keepdims, dtype, wide)
        self.root, self.tame = root, not root

    def finish(self, state: State) -> Any:
        """The second moment, or its root."""
        found = self.monoid.finish(xp, state, self.total)[1]
        found = root(found) if self.root else found
        return ops.cast(found if self.keepdims else ops.squeeze(found, self.axis), self.dtype)


def root(x: Any, p: float = 2) -> Any:
    """The p-th root; at zero its gradient is what the back end's own deviations and norms have: none on PyTorch."""
    square_root = p == 2
    if keras.backend.backend() != "torch":
        return ops.sqrt(x) if square_root else ops.power(x, 1 / p)
    none = x == 0
    safe = ops.where(none, ops.ones_like(x), x)
    return ops.where(none, ops.zeros_like(x), ops.sqrt(safe) if square_root else ops.power(safe, 1 / p))
