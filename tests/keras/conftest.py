"""Keras reads its back end once, when it is imported; tests print which one they run on."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def pytest_report_header() -> str:
    """The back end, on top of the report."""
    return f"keras back end: {os.environ['KERAS_BACKEND']}"


@pytest.fixture
def numpy_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """First weights drawn by NumPy: JAX compiles Keras's own draws for each shape, about a second each."""
    import keras
    import numpy as np

    def drawn(self: Any, shape: Any, dtype: Any = None) -> Any:
        width = 1.0 / np.sqrt(max(1, int(np.prod(shape[:-1]))))
        found = np.random.default_rng(int(np.prod(shape))).uniform(-1.7 * width, 1.7 * width, shape)
        return keras.ops.convert_to_tensor(found.astype("float32"), dtype)

    monkeypatch.setattr(keras.initializers.VarianceScaling, "__call__", drawn)
