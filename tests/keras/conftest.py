"""Keras reads its back end once, when it is imported; tests print which one they run on."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# on a processor without AVX-512 TensorFlow leaves oneDNN out, and without it convolves no channels that come first
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


HEAVY = (
    "test_zoo.py::test_three_steps_of_training[u-net",
    "test_zoo.py::test_three_steps_of_training[tcn",
    "test_recurrence.py::test_fit_save_load[gated",
    "test_recurrence.py::test_fit_save_load[minGRU-True",
    "test_recurrence.py::test_layers_equal_their_papers_stream_and_mask[gated",
    "test_recurrence.py::test_layers_equal_their_papers_stream_and_mask[linear",
    "test_attention.py::test_fit_save_load[True",
    "test_sliced_rnn.py::test_fit_save_load[False",
    "test_citizens.py::test_a_mask_goes_through_layers_that_keep_the_steps",
    "test_citizens.py::test_masks_reach_what_they_should",
    "test_regional.py::test_balanced_clusters_equal_pytorch",
)
"""Compiled for more than some fifteen seconds by XLA and tf.function: slow there, run by `make test` on PyTorch."""


LAYERS = ("test_regional", "test_experts", "test_recurrence", "test_citizens", "test_attention")
"""Tests of layers: most of their time is compiling, so that the first case of each is quick there, and the others are slow."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is heavy on this back end."""
    if os.environ["KERAS_BACKEND"] == "torch":
        return
    met: set[str] = set()
    for item in items:
        function = item.nodeid.partition("[")[0]
        again = function in met and item.path.stem in LAYERS
        if again or any(name in item.nodeid for name in HEAVY):
            item.add_marker(pytest.mark.slow)
        met.add(function)


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
