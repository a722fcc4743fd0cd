"""Operators that move elements: views, permutations, slices, pads, concatenation, pixel shuffles, roll.

A view is split into groups of dimensions with equal products; inside a group the leading dimension stays
recognisable, because memory order makes it the slowest:

    (N, C, H, W) -> (N, C, H*W)      group (H, W) -> (HW): out [p, q) reads rows [p//W, (q-1)//W + 1)
    (N, H, 7, W...) <- (N, 7H, W...) group (7H) -> (H, 7): out [p, q) reads rows [7p, 7q)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fractions import Fraction
from math import prod

import numpy as np

from ranger_nn.core.graph import Rule
from ranger_nn.core.reach import Border, Link, Reach
from ranger_nn.ops.pointwise import Shape

Group = tuple[tuple[int, ...], tuple[int, ...]]


def view_groups(shape: Shape, out: Shape) -> list[Group] | None:
    """Pairs (dims of `shape`, dims of `out`) of equal product, in order; None where there is nothing to match."""
    if 0 in shape or prod(shape) != prod(out):
        return None
    groups: list[Group] = []
    i = j = 0
    while i < len(shape) or j < len(out):
        left, right = [], []
        a = b = 1
        if i < len(shape):
            left.append(i)
            a, i = shape[i], i + 1
        if j < len(out) and (a != 1 or not left or out[j] == 1):
            right.append(j)
            b, j = out[j], j + 1
        while a != b:
            if a < b and i < len(shape):
                left.append(i)
                a, i = a * shape[i], i + 1
            elif j < len(out):
                right.append(j)
                b, j = b * out[j], j + 1
            else:
                return None
        groups.append((tuple(left), tuple(right)))
    return groups


def leading(dims: Sequence[int], shape: Shape) -> int | None:
    """The slowest dimension of a group that is longer than one."""
    return next((d for d in dims if shape[d] > 1), None)


def inner(dims: Sequence[int], lead: int | None, shape: Shape) -> int:
    """Elements of a group for one step of its leading dimension."""
    return prod(shape[d] for d in dims if lead is not None and d > lead)


def view(shape: Shape, out: Shape) -> Rule:
    """Reshape: the leading dimension of each group is linked, the others are read whole."""
    row: list[Link | None] = [None] * len(shape)
    for left, right in view_groups(shape, out) or []:
        lead_in, lead_out = leading(left, shape), leading(right, out)
        if lead_in is None or lead_out is None:
            continue
        step_in, step_out = inner(left, lead_in, shape), inner(right, lead_out, out)
        row[lead_in] = Link(lead_out, Reach(step_out, 0, step_out - 1, step_in))
    return Rule((tuple(row),))


def permute(order: Sequence[int]) -> Rule:
    """Output dimension j is input dimension order[j]."""
    where = {d: j for j, d in enumerate(order)}
    return Rule((tuple(Link(where[d]) for d in range(len(order))),))


def crop(shape: Shape, dim: int, start: int, step: int) -> Rule:
    """Output index o of `dim` is input index start + o*step."""
    row = [Link(d) if d != dim else Link(d, Reach(step, start, start)) for d in range(len(shape))]
    return Rule((tuple(row),))


def windows(shape: Shape, dim: int, size: int, step: int) -> Rule:
    """Windows of `size` indices of `dim`, `step` apart; what they hold lies along a new last dimension."""
    row = [Link(d) if d != dim else Link(d, Reach(step, 0, size - 1)) for d in range(len(shape))]
    return Rule((tuple(row),))


def select(shape: Shape, dim: int) -> Rule:
    """One index of `dim`: the dimension is gone and read whole."""
    return Rule((tuple(None if d == dim else Link(d - (d > dim)) for d in range(len(shape))),))


SLOPES = (1, 2, 4, 8, 16)
"""Denominators of the lines that are tried along indices: small ones, so that steps stay even."""


def line(places: Sequence[int]) -> Reach:
    """The four integers that cover output index o reading input index places[o], with the least that is read besides.

    A slice or a repetition is met exactly; indices near a line get a halo; those that run backwards a negative slope; and
    where no line is near, each output reads all from the least of them to the greatest.
    """
    n, least, most = len(places), min(places), max(places)
    ends = [
        Fraction(places[-1] - places[0], max(1, n - 1)),
        Fraction(most + 1 - least, n),
        Fraction(least - most - 1, n),
    ]
    covers = [_cover(places, slope) for slope in {end.limit_denominator(den) for end in ends for den in SLOPES}]
    widths = {r: Fraction(r.last - r.first, r.den) for r in covers if 2 * (r.last - r.first) <= (most - least) * r.den}
    if not widths:
        return Reach(0, least, most)
    closest = min(widths.values())
    enough = 2 * closest + 2 if closest else 0  # an even slope keeps step with the values around, for a row or two
    return min((r for r, w in widths.items() if w <= enough), key=lambda r: (r.den, widths[r], not r.advances))


def _cover(places: Sequence[int], slope: Fraction) -> Reach:
    num, den = slope.numerator, slope.denominator
    off = np.asarray(places) * den - np.arange(len(places)) * num
    last = int(off.max())
    return Reach(num, min(int(off.min()) + den - 1, last), last, den)


def pick(shape: Shape, dim: int, places: Sequence[int]) -> Rule:
    """Output index o of `dim` is input index places[o]."""
    return Rule((tuple(Link(d) if d != dim else Link(d, line(places)) for d in range(len(shape))),))


def flip(shape: Shape, dims: Collection[int]) -> Rule:
    """`dims` run the other way."""
    return Rule((tuple(Link(d, Reach(-1, n - 1, n - 1)) if d in dims else Link(d) for d, n in enumerate(shape)),))


def pad(shape: Shape, before: Sequence[int], border: Border) -> Rule:
    """`before[d]` indices are put in front of dimension d (negative: cut off)."""
    return Rule((tuple(Link(d, Reach(1, -before[d], -before[d]), border) for d in range(len(shape))),))


def concatenate(shapes: Sequence[Shape], dim: int) -> Rule:
    """Input j stands at its offset along `dim`."""
    rows, offset = [], 0
    for shape in shapes:
        rows.append(tuple(Link(d, Reach(1, -offset, -offset)) if d == dim else Link(d) for d in range(len(shape))))
        offset += shape[dim]
    return Rule(tuple(rows))


def stack(shapes: Sequence[Shape], dim: int) -> Rule:
    """A new dimension `dim` with one index for each input."""
    return Rule(tuple(tuple(Link(d + (d >= dim)) for d in range(len(s))) for s in shapes))


def roll(shape: Shape, shifts: dict[int, int]) -> Rule:
    """Output index o is input index (o - shift) modulo the size."""
    row = [
        Link(d, Reach(1, -shifts[d], -shifts[d]), Border.CIRCULAR) if shifts.get(d) else Link(d)
        for d in range(len(shape))
    ]
    return Rule((tuple(row),))


def pixel_shuffle(rank: int, factor: int) -> Rule:
    """(..., C*r*r, H, W) -> (..., C, H*r, W*r)."""
    lead: list[Link | None] = [Link(d) for d in range(rank - 3)]
    return Rule(((*lead, None, *(Link(d, Reach(1, 0, 0, factor)) for d in (rank - 2, rank - 1))),))


def pixel_unshuffle(rank: int, factor: int) -> Rule:
    """(..., C, H*r, W*r) -> (..., C*r*r, H, W)."""
    lead: list[Link | None] = [Link(d) for d in range(rank - 3)]
    return Rule(((*lead, None, *(Link(d, Reach(factor, 0, factor - 1)) for d in (rank - 2, rank - 1))),))
