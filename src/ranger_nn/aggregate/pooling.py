"""Aggregators whose regions carry a weight or a score: log-sum-exp, weighted mean, softmax (attention pooling).

A softmax over regions is a weighted mean with weights exp(score); its state keeps the largest score apart, so that
nothing overflows (the online softmax of Milakov & Gimelshein 2018):

    (top, total, weighted)   total = sum exp(score - top),   weighted = sum exp(score - top) * x
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ranger_nn.aggregate.monoid import State, present
from ranger_nn.errors import PartitionError
from ranger_nn.names import nearest

WEIGHTS = ("learned", "predicted", "size")


@dataclass(frozen=True)
class LogSumExp:
    """log(sum(exp(x))): a smooth maximum. State: the largest element, and the sum relative to it."""

    def empty(self, xp: Any, like: Any) -> State:
        """Minus infinity, and nothing."""
        return xp.zeros_like(like) - float("inf"), xp.zeros_like(like)

    def lift(self, xp: Any, x: Any, axis: tuple[int, ...], where: Any = None) -> State:
        """Largest element, and the sum relative to it."""
        top = xp.max(present(xp, x, where, -float("inf")), axis=axis, keepdims=True)
        terms = present(xp, xp.exp(present(xp, x, where, 0.0) - finite(xp, top)), where, 0.0)
        return top, xp.sum(terms, axis=axis, keepdims=True)

    def merge(self, xp: Any, a: State, b: State, n_a: Any = 0, n_b: Any = 0) -> State:
        """Rescale both sums to the larger top."""
        top = xp.maximum(a[0], b[0])
        return top, a[1] * rescale(xp, a[0], top) + b[1] * rescale(xp, b[0], top)

    def finish(self, xp: Any, state: State, n: Any = 0) -> Any:
        """top + log(sum); minus infinity of nothing."""
        some = state[1] > 0
        one = xp.zeros_like(state[1]) + 1
        total = finite(xp, state[0]) + xp.log(xp.where(some, state[1], one))
        return xp.where(some, total, xp.zeros_like(total) - float("inf"))


@dataclass(frozen=True)
class WeightedMean:
    """sum(w x) / sum(w). State: both sums.

    Args:
        weights: "learned": one positive weight for each region, trained, at first its share of the elements (so that
            the untrained layer gives the mean of the whole); "predicted": from the region's own result, through a
            trained linear map and a sigmoid; "size": the number of elements; or numbers, one for each region.
    """

    weights: str | tuple[float, ...] = "learned"

    def __post_init__(self) -> None:
        """Refuse unknown kinds and weights that are not positive."""
        if isinstance(self.weights, str):
            if self.weights not in WEIGHTS:
                raise PartitionError(
                    f"weights of a weighted mean are {', '.join(WEIGHTS)} or numbers; "
                    f"got {self.weights!r}{nearest(self.weights, WEIGHTS)}"
                )
            return
        try:
            object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))
        except (TypeError, ValueError) as error:
            raise PartitionError(
                f"weights of a weighted mean are {', '.join(WEIGHTS)} or numbers; got {self.weights!r}"
            ) from error
        if not all(0 <= w < float("inf") for w in self.weights) or not any(w > 0 for w in self.weights):
            raise PartitionError(
                f"weights of a weighted mean are finite, at least 0, and not all 0; got {self.weights}"
            )

    def empty(self, xp: Any, like: Any) -> State:
        """No weight."""
        return xp.zeros_like(like), xp.zeros_like(like)

    def lift(self, xp: Any, x: Any, axis: tuple[int, ...], where: Any = None, weight: Any = 1.0) -> State:
        """Both sums over `axis`."""
        w = present(xp, xp.zeros_like(x) + weight, where, 0.0)
        return xp.sum(present(xp, x, where, 0.0) * w, axis=axis, keepdims=True), xp.sum(w, axis=axis, keepdims=True)

    def merge(self, xp: Any, a: State, b: State, n_a: Any = 0, n_b: Any = 0) -> State:
        """Add both."""
        return a[0] + b[0], a[1] + b[1]

    def finish(self, xp: Any, state: State, n: Any = 0) -> Any:
        """Their quotient; zero of nothing."""
        return state[0] / xp.where(state[1] > 0, state[1], xp.zeros_like(state[1]) + 1)


@dataclass(frozen=True)
class Softmax:
    """Attention pooling: the mean of the regions' results weighted by softmax over their scores.

    A score is a learned query times the result; with `hidden` it is w tanh(V x), and gated w (tanh(V x) * sigmoid(U x))
    (Ilse, Tomczak & Welling 2018, Attention-based deep multiple instance learning, equations 8 and 9).

    Args:
        hidden: width of V; None: a query.
        gated: with the gate U.
    """

    hidden: int | None = None
    gated: bool = False

    def __post_init__(self) -> None:
        """Refuse a gate without a hidden width."""
        if self.gated and self.hidden is None:
            raise PartitionError("a gated softmax needs a hidden width; for example Softmax(hidden=128, gated=True)")
        if self.hidden is not None and (not isinstance(self.hidden, int) or self.hidden < 1):
            raise PartitionError(f"the hidden width of a softmax is an integer, at least 1; got {self.hidden!r}")

    def empty(self, xp: Any, like: Any) -> State:
        """No score."""
        return xp.zeros_like(like) - float("inf"), xp.zeros_like(like), xp.zeros_like(like)

    def lift(self, xp: Any, x: Any, axis: tuple[int, ...], where: Any = None, weight: Any = 0.0) -> State:
        """(top, total, weighted) of scores `weight`."""
        score = xp.zeros_like(x) + weight
        top = xp.max(present(xp, score, where, -float("inf")), axis=axis, keepdims=True)
        w = present(xp, xp.exp(present(xp, score, where, 0.0) - finite(xp, top)), where, 0.0)
        x = present(xp, x, where, 0.0)
        return top, xp.sum(w, axis=axis, keepdims=True), xp.sum(w * x, axis=axis, keepdims=True)

    def merge(self, xp: Any, a: State, b: State, n_a: Any = 0, n_b: Any = 0) -> State:
        """Rescale both to the larger top."""
        top = xp.maximum(a[0], b[0])
        left, right = rescale(xp, a[0], top), rescale(xp, b[0], top)
        return top, a[1] * left + b[1] * right, a[2] * left + b[2] * right

    def finish(self, xp: Any, state: State, n: Any = 0) -> Any:
        """weighted / total; zero of nothing."""
        return state[2] / xp.where(state[1] > 0, state[1], xp.zeros_like(state[1]) + 1)


def finite(xp: Any, top: Any) -> Any:
    """`top`, and zero where it is infinite: there is nothing to subtract it from, or nothing left when it is."""
    return xp.where(xp.abs(top) < float("inf"), top, xp.zeros_like(top))


def rescale(xp: Any, old: Any, new: Any) -> Any:
    """exp(old - new); zero where there was nothing."""
    return xp.where(old > -float("inf"), xp.exp(finite(xp, old) - finite(xp, new)), xp.zeros_like(old))
