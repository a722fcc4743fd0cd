"""Aggregators as monoids: empty, lift, merge, finish. `aggregator("max")` gives one by its name."""

from ranger_nn.aggregate.affine import Affine
from ranger_nn.aggregate.monoid import Extremum, Moments, Sum
from ranger_nn.aggregate.names import aggregator
from ranger_nn.aggregate.pieces import Call, Concat, Stitch
from ranger_nn.aggregate.pooling import LogSumExp, Softmax, WeightedMean

__all__ = [
    "Affine",
    "Call",
    "Concat",
    "Extremum",
    "LogSumExp",
    "Moments",
    "Softmax",
    "Stitch",
    "Sum",
    "WeightedMean",
    "aggregator",
]
