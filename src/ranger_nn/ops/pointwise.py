"""Elementwise operators with broadcasting, and operators local in every dimension but some."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ranger_nn.core.graph import Rule
from ranger_nn.core.reach import Link

Shape = Sequence[int]
Row = tuple[Link | None, ...]


def aligned(shape: Shape, out: Shape, whole: Collection[int] = ()) -> Row:
    """Links of an input that broadcasts against `out` from the right; output dims in `whole` are not cut."""
    shift = len(out) - len(shape)
    return tuple(
        Link(d + shift) if size == out[d + shift] and (d + shift) not in whole else None for d, size in enumerate(shape)
    )


def pointwise(shapes: Sequence[Shape], out: Shape) -> Rule:
    """Every output element depends on the input elements at its own place (NumPy broadcasting)."""
    return Rule(tuple(aligned(s, out) for s in shapes), pointwise=True)


def local_except(shapes: Sequence[Shape], out: Shape, whole: Collection[int]) -> Rule:
    """Pointwise but along the output dims `whole`, of which all is read (softmax or a norm over channels)."""
    return Rule(tuple(aligned(s, out, whole) for s in shapes))


def opaque(shapes: Sequence[Shape], reason: str) -> Rule:
    """No region rule: all of every input is read. `reason` is shown in the plan."""
    return Rule(tuple((None,) * len(s) for s in shapes), reason=reason)
