"""Aggregators: commutative monoids over regions, written once for every framework.

    lift(region)            -> state        what one region gives
    merge(state, state)     -> state        in any order, in any grouping
    finish(state)           -> result       what the untouched operator gives on the whole

A state is a tuple of arrays; `n` counts the elements behind it. `xp` is an array namespace (Python array API
standard: `sum`, `max`, `where` with `axis` and `keepdims`). Moments merge by Chan, Golub & LeVeque 1979.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

State = tuple[Any, ...]


class Monoid(Protocol):
    """A reduction whose regions may come in any order. Implement these three and it streams."""

    def lift(self, xp: Any, x: Any, axis: tuple[int, ...]) -> State:
        """State of one region, reduced over `axis` with the dimensions kept."""
        ...

    def merge(self, xp: Any, a: State, b: State, n_a: int, n_b: int) -> State:
        """State of two regions of n_a and n_b elements together."""
        ...

    def finish(self, xp: Any, state: State, n: int) -> Any:
        """Result from the state of all n elements."""
        ...


@dataclass(frozen=True)
class Sum:
    """Sum; with `mean` divided by the number of elements (a weighted mean of regional means)."""

    mean: bool = False

    def lift(self, xp: Any, x: Any, axis: tuple[int, ...]) -> State:
        """Sum over `axis`."""
        return (xp.sum(x, axis=axis, keepdims=True),)

    def merge(self, xp: Any, a: State, b: State, n_a: int, n_b: int) -> State:
        """Add."""
        return (a[0] + b[0],)

    def finish(self, xp: Any, state: State, n: int) -> Any:
        """The sum, or the mean."""
        return state[0] / n if self.mean else state[0]


@dataclass(frozen=True)
class Extremum:
    """Maximum (sign 1) or minimum (sign -1), with the number of elements that attain it."""

    sign: int = 1

    def lift(self, xp: Any, x: Any, axis: tuple[int, ...]) -> State:
        """Maximum over `axis`, and how many attain it."""
        top = xp.max(self.sign * x, axis=axis, keepdims=True)
        return top, xp.sum(xp.astype(self.sign * x == top, x.dtype), axis=axis, keepdims=True)

    def merge(self, xp: Any, a: State, b: State, n_a: int, n_b: int) -> State:
        """The larger one; counts add where equal. NaN wins, as in the untouched operator."""
        top = xp.maximum(a[0], b[0])
        zero = xp.zeros_like(a[1])
        return top, xp.where(a[0] == top, a[1], zero) + xp.where(b[0] == top, b[1], zero)

    def finish(self, xp: Any, state: State, n: int) -> Any:
        """The extremum."""
        return self.sign * state[0]


@dataclass(frozen=True)
class Moments:
    """Mean and variance (divided by n - correction)."""

    correction: float = 0.0

    def lift(self, xp: Any, x: Any, axis: tuple[int, ...]) -> State:
        """Mean and sum of squared deviations."""
        mean = xp.mean(x, axis=axis, keepdims=True)
        return mean, xp.sum((x - mean) ** 2, axis=axis, keepdims=True)

    def merge(self, xp: Any, a: State, b: State, n_a: int, n_b: int) -> State:
        """Chan, Golub & LeVeque 1979, equations 2.1."""
        n = n_a + n_b
        delta = b[0] - a[0]
        return a[0] + delta * (n_b / n), a[1] + b[1] + delta**2 * (n_a * n_b / n)

    def finish(self, xp: Any, state: State, n: int) -> Any:
        """(mean, variance)."""
        return state[0], state[1] / max(n - self.correction, 0) if n - self.correction > 0 else state[1] * float("nan")


def count(shape: Sequence[int], axis: Sequence[int]) -> int:
    """Elements behind one entry of a reduction of `shape` over `axis`."""
    n = 1
    for d in axis:
        n *= shape[d]
    return n
