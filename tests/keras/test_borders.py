"""Borders that are mirrored, repeat the edge or go round: cut like the network around them."""

from __future__ import annotations

from typing import Any

import keras
import pytest
from keras import ops

from tests.keras.between import check

JAX = keras.backend.backend() == "jax"
SHAPE = (2, 13, 6, 3)
MODES = ("reflect", "symmetric", *(("edge",) if JAX else ()))
WIDTHS = [(2, 15) if JAX else (12, 12), pytest.param((0, 3), marks=pytest.mark.slow)]
"""As wide as may be (JAX mirrors wider ones again), and on one side only."""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_outside(mode: str, width: tuple[int, int]) -> None:
    """Nothing is whole, also where the border is as wide as may be (JAX mirrors wider ones again)."""
    check(lambda h: ops.pad(h, ((0, 0), width, (1, 2), (0, 0)), mode=mode), SHAPE, 4)


def test_around_columns() -> None:
    """An axis that is not cut may go round."""

    def around(h: Any) -> Any:
        return ops.roll(ops.concatenate([h[:, :, -1:], h, h[:, :, :1]], axis=2), 2, axis=2)

    check(around, SHAPE, 4)


def test_rolled_rows() -> None:
    """What is rolled is finished before."""
    check(lambda h: ops.roll(h, -3, axis=1), SHAPE, 4, whole=1)
