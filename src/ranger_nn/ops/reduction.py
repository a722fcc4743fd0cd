"""Reductions over dimensions: local in the kept ones, a monoid over the reduced ones."""

from __future__ import annotations

from collections.abc import Collection

from ranger_nn.core.graph import Rule
from ranger_nn.core.reach import Link
from ranger_nn.ops.pointwise import Shape


def reduction(shape: Shape, dims: Collection[int], keepdim: bool) -> Rule:
    """Sum, mean, maximum, variance over `dims`."""
    row: list[Link | None] = []
    kept = 0
    for d in range(len(shape)):
        if d in dims:
            row.append(None)
            kept += keepdim
        else:
            row.append(Link(kept))
            kept += 1
    return Rule((tuple(row),), reduces=True)


def moments(shape: Shape) -> Rule:
    """Mean and variance of groups of channels over space: nothing of the input's dimensions is kept."""
    return Rule(((None,) * len(shape),), reduces=True, indivisible=(1,))
