"""Rows that are made of one row: it lies on no axis, and what is made of it is cut all the same by its readers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import ranger_nn
from tests.keras.regions import apart

X = np.random.default_rng(0).random((1, 16, 3)).astype("float32")


def mean(h: Any) -> Any:
    """One row."""
    return L.GlobalAveragePooling1D(keepdims=True)(h)


NETS: dict[str, Callable[[Any], Any]] = {
    "repeated in front": lambda h: ops.concatenate([ops.repeat(h[:, :1], 2, 1), h], 1),
    "repeated behind": lambda h: ops.concatenate([h, ops.repeat(h[:, -1:], 3, 1)], 1),
    "transposed in front": lambda h: ops.concatenate([L.Conv1DTranspose(4, 6)(mean(h)), h], 1),
    "transposed and added": lambda h: h + L.Conv1DTranspose(4, 16)(mean(h)),
    "padded and added": lambda h: h + L.ZeroPadding1D((5, 10))(mean(h)),
    "padded and convolved": lambda h: h + L.Conv1D(4, 3)(L.ZeroPadding1D((7, 10))(mean(h))),
}


@pytest.mark.parametrize("name", NETS)
def test_equals_untouched(name: str) -> None:
    """In regions of one row and of four."""
    inputs = keras.Input(X.shape[1:])
    h = L.Conv1D(4, 3, padding="same")(inputs)
    model = keras.Model(inputs, L.Conv1D(2, 3, padding="same")(NETS[name](h)))
    for regions in (1, 4):
        assert apart(ranger_nn.regionalize(model, regions=(regions,))(X), model(X)) < 1e-5
