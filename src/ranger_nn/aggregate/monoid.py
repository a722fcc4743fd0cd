"""Aggregators: commutative monoids over regions, written once for every framework.

    empty(like)             -> state        what no region gives: merging it changes nothing
    lift(region)            -> state        what one region gives, or a batch of regions along an axis
    merge(state, state)     -> state        in any order, in any grouping
    finish(state)           -> result       what the untouched operator gives on the whole

A state is a tuple of arrays. The number of elements behind it travels beside it, as an integer where shapes decide
it (the exact engine) or as an array where a mask does (layers with absent regions). `xp` is an array namespace
(Python array API standard). Moments merge by Chan, Golub & LeVeque 1979. What needs weights is in `pooling.py`,
what keeps the regions apart in `pieces.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ranger_nn.errors import PartitionError

State = tuple[Any, ...]


class Monoid(Protocol):
    """A reduction whose regions may come in any order. Implement these four and it streams."""

    def empty(self, xp: Any, like: Any) -> State:
        """State of no region; `like`: an array of the reduced shape (dimensions kept)."""
        ...

    def lift(self, xp: Any, x: Any, axis: tuple[int, ...], where: Any = None) -> State:
        """State of `x`, reduced over `axis` with the dimensions kept; `where` (bool, broadcast): what is present."""
        ...

    def merge(self, xp: Any, a: State, b: State, n_a: Any, n_b: Any) -> State:
        """State of two regions of n_a and n_b elements together."""
        ...

    def finish(self, xp: Any, state: State, n: Any) -> Any:
        """Result from the state of all n elements."""
        ...


@dataclass(frozen=True)
class Sum:
    """Sum; with `mean` divided by the number of elements (a weighted mean of regional means)."""

    mean: bool = False

    def empty(self, xp: Any, like: Any) -> State:
        """Zero."""
        return (xp.zeros_like(like),)

    def lift(self, xp: Any, x: Any, axis: tuple[int, ...], where: Any = None) -> State:
        """Sum over `axis`."""
        return (xp.sum(present(xp, x, where, 0.0), axis=axis, keepdims=True),)

    def merge(self, xp: Any, a: State, b: State, n_a: Any, n_b: Any) -> State:
        """Add."""
        return (a[0] + b[0],)

    def finish(self, xp: Any, state: State, n: Any) -> Any:
        """The sum, or the mean (zero of nothing)."""
        return state[0] / at_least_one(xp, n) if self.mean else state[0]


@dataclass(frozen=True)
class Extremum:
    """Maximum (sign 1) or minimum (sign -1), with the number of elements that attain it."""

    sign: int = 1

    def __post_init__(self) -> None:
        """Refuse what would scale the result."""
        if self.sign not in (1, -1):
            raise PartitionError(f"the sign of an extremum is 1 (maximum) or -1 (minimum); got {self.sign!r}")

    def empty(self, xp: Any, like: Any) -> State:
        """Minus infinity, attained by nothing."""
        return xp.zeros_like(like) - float("inf"), xp.zeros_like(like)

    def lift(self, xp: Any, x: Any, axis: tuple[int, ...], where: Any = None) -> State:
        """Maximum over `axis`, and how many attain it."""
        x = present(xp, self.sign * x, where, -float("inf"))
        top = xp.max(x, axis=axis, keepdims=True)
        return top, xp.sum(xp.astype(x == top, x.dtype), axis=axis, keepdims=True)

    def merge(self, xp: Any, a: State, b: State, n_a: Any, n_b: Any) -> State:
        """The larger one; counts add where equal. NaN wins, as in the untouched operator."""
        top = xp.maximum(a[0], b[0])
        zero = xp.zeros_like(a[1])
        return top, xp.where(a[0] == top, a[1], zero) + xp.where(b[0] == top, b[1], zero)

    def finish(self, xp: Any, state: State, n: Any) -> Any:
        """The extremum."""
        return self.sign * state[0]


@dataclass(frozen=True)
class Moments:
    """Mean and variance (divided by n - correction)."""

    correction: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no correction."""
        if not isinstance(self.correction, int | float) or not 0 <= self.correction < float("inf"):
            raise PartitionError(f"the correction of moments is a number, 0 or more; got {self.correction!r}")

    def empty(self, xp: Any, like: Any) -> State:
        """Zero of both."""
        return xp.zeros_like(like), xp.zeros_like(like)

    def lift(self, xp: Any, x: Any, axis: tuple[int, ...], where: Any = None) -> State:
        """Mean and sum of squared deviations."""
        if where is None:
            mean = xp.mean(x, axis=axis, keepdims=True)
        else:
            n = xp.sum(xp.astype(where, x.dtype), axis=axis, keepdims=True) * _repeats(where.shape, x.shape, axis)
            x = present(xp, x, where, 0.0)  # also for the gradient: zero times NaN is NaN
            mean = xp.sum(x, axis=axis, keepdims=True) / at_least_one(xp, n)
        return mean, xp.sum(present(xp, (x - mean) ** 2, where, 0.0), axis=axis, keepdims=True)

    def merge(self, xp: Any, a: State, b: State, n_a: Any, n_b: Any) -> State:
        """Chan, Golub & LeVeque 1979, equations 2.1."""
        n = at_least_one(xp, n_a + n_b)
        delta = b[0] - a[0]
        return a[0] + delta * (n_b / n), a[1] + b[1] + delta**2 * (n_a * n_b / n)

    def finish(self, xp: Any, state: State, n: Any) -> Any:
        """(mean, variance)."""
        if not isinstance(n, int):
            return state[0], state[1] / at_least_one(xp, n - self.correction)
        return state[0], state[1] / max(n - self.correction, 0) if n - self.correction > 0 else state[1] * float("nan")


def present(xp: Any, x: Any, where: Any, other: float) -> Any:
    """`x`, and `other` in place of what is absent."""
    return x if where is None else xp.where(where, x, xp.zeros_like(x) + other)


def at_least_one(xp: Any, n: Any) -> Any:
    """A divisor: n, or 1 where there is nothing to divide."""
    return max(n, 1) if isinstance(n, int) else xp.maximum(n, xp.zeros_like(n) + 1)


def _repeats(mask: Sequence[int], shape: Sequence[int], axis: Sequence[int]) -> int:
    """Elements of `shape` for which one entry of a mask stands, over `axis`."""
    full = (1,) * (len(shape) - len(mask)) + tuple(mask)
    return count(shape, [d for d in axis if full[d] == 1 and shape[d] != 1])


def count(shape: Sequence[int], axis: Sequence[int]) -> int:
    """Elements behind one entry of a reduction of `shape` over `axis`."""
    n = 1
    for d in axis:
        n *= shape[d]
    return n
