"""Norms over what is cut: sums of powers and extrema of regions, joined."""

from __future__ import annotations

from functools import reduce
from typing import Any

import keras
from keras import ops

from tests.keras.between import check

SHAPE = (2, 17, 7, 3)
INF = float("inf")


def vectors(h: Any) -> Any:
    """Along the rows."""
    kept = [ops.norm(h, p, (1,), keepdims=True) for p in (None, 0, 1, 2.5, INF)]
    flat = [ops.norm(h, p, (1,))[:, None] for p in (2, 3, -INF)]
    return h * reduce(ops.add, kept + flat)


def matrices(h: Any) -> Any:
    """Rows and columns, in both orders."""
    kept = [ops.norm(h, p, (1, 2), keepdims=True) for p in (None, 1, -INF)]
    turned = [ops.norm(h, p, (-2, 1), keepdims=True) for p in ("fro", INF)]
    flat = [ops.norm(h, p, axes)[:, None, None] for p, axes in ((-1, (2, 1)), (INF, (1, 2)), ("fro", (1, 2)))]
    return h * reduce(ops.add, kept + turned + flat)


def test_of_vectors() -> None:
    """Every power from one on, and how many are not zero."""
    check(vectors, SHAPE, 4)


def test_of_matrices() -> None:
    """Largest and smallest sums."""
    check(matrices, SHAPE, 4)


def test_of_all() -> None:
    """One number, where the back end has it; powers below one stay whole."""
    total = (lambda h: 0.0) if keras.backend.backend() == "tensorflow" else ops.norm
    check(lambda h: h * (total(h) + ops.norm(h, 0.5, (1,), keepdims=True)), SHAPE, 4, whole=1)
