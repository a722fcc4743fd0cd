"""Sums, products and extrema of all rows so far: each row needs those before it, and nothing behind.

    carried     x [0, c) -> x [c, 2c) -> ...                  the last row of each region goes along: a slide, no gradient
    in blocks   x -> totals of blocks -> before each block -> y         three operators, of which only the one in the
                |                                             |         middle reads all of its input: a row for each block
                +---------------------------------------------+

In blocks a gradient flows back the same way, and tiles are independent. Which of them is taken: `bounds/scans.py`.
"""

from __future__ import annotations

from math import isqrt

from ranger_nn.core.graph import Rule
from ranger_nn.core.reach import Link, Reach
from ranger_nn.ops.pointwise import Row, Shape


def along(shape: Shape, dim: int, reach: Reach) -> Row:
    """Local, but for `dim`."""
    return tuple(Link(d, reach) if d == dim else Link(d) for d in range(len(shape)))


def block_length(size: int) -> int:
    """Rows of a block: about as many as there are blocks, so that both what is kept and what is read besides are short."""
    return max(2, isqrt(size))


def so_far(shape: Shape) -> Rule:
    """Before it is known which form is taken: rows follow rows."""
    return Rule((tuple(Link(d) for d in range(len(shape))),))


def carried(shape: Shape, dim: int) -> Rule:
    """In order along `dim`, with the last row as state."""
    return Rule((tuple(Link(d) for d in range(len(shape))),), ordered=dim)


def totals(shape: Shape, dim: int, block: int) -> Rule:
    """One row for each block."""
    return Rule((along(shape, dim, Reach(block, 0, block - 1)),))


def before(shape: Shape, dim: int) -> Rule:
    """Of each block what comes before it."""
    return Rule((tuple(Link(d) if d != dim else None for d in range(len(shape))),))


def joined(shape: Shape, dim: int, block: int) -> Rule:
    """Rows of the block so far, and what comes before the block."""
    return Rule((along(shape, dim, Reach(1, 1 - block, 0)), along(shape, dim, Reach(1, 0, 0, block))))
