"""Aggregators by name: what a user may write instead of an object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ranger_nn.aggregate.monoid import Extremum, Moments, Sum
from ranger_nn.aggregate.pieces import Call, Concat, Stitch
from ranger_nn.aggregate.pooling import LogSumExp, Softmax, WeightedMean
from ranger_nn.errors import PartitionError
from ranger_nn.names import nearest

Aggregator = Sum | Extremum | Moments | LogSumExp | WeightedMean | Softmax | Stitch | Concat | Call

BY_NAME: dict[str, Callable[[], Aggregator]] = {
    "sum": Sum,
    "mean": lambda: Sum(mean=True),
    "weighted_mean": WeightedMean,
    "max": Extremum,
    "min": lambda: Extremum(-1),
    "logsumexp": LogSumExp,
    "softmax": Softmax,
    "moments": Moments,
    "stitch": Stitch,
    "concat": Concat,
}


def aggregator(given: Any) -> Aggregator:
    """The aggregator that a name, an object or a callable means.

    Raises:
        PartitionError: an unknown name (with the near match), or none of the three.
    """
    if isinstance(given, Aggregator):
        return given
    if isinstance(given, str):
        if given not in BY_NAME:
            raise PartitionError(
                f"unknown aggregator {given!r}{nearest(given, BY_NAME)}; known are {', '.join(BY_NAME)}, or give a callable"
            )
        return BY_NAME[given]()
    if callable(given):
        return Call(given)
    raise PartitionError(f"an aggregator is a name, an object of ranger_nn.aggregate or a callable; got {given!r}")
