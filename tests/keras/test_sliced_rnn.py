"""SlicedRNN in Keras: by hand, fillings and masks, saved and loaded, fitted, compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

from ranger_nn.keras import SlicedRNN

BACKEND = keras.backend.backend()
CELLS: dict[str, Callable[[], Any]] = {
    "gru": lambda: layers.GRU(4),
    "lstm": lambda: layers.LSTM(4, return_sequences=True),
    "simple": lambda: layers.SimpleRNN(4),
    "cell": lambda: layers.GRUCell(4, reset_after=False),
}


def sequence(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


def by_hand(net: SlicedRNN, x: np.ndarray, level: int = 0) -> np.ndarray:
    """(time, features) -> (state,): slice by slice, nothing filled up."""
    last = level == len(net.slices) - 1
    length = len(x) if last else net.slices[level]
    states = [ops.convert_to_numpy(net.levels[level](x[None, i : i + length]))[0] for i in range(0, len(x), length)]
    return states[0] if last else by_hand(net, np.stack(states), level + 1)


@pytest.mark.parametrize("name", CELLS)
def test_equals_an_explicit_loop(name: str) -> None:
    """Also where steps at the end are masked."""
    keras.utils.set_random_seed(0)
    net, x = SlicedRNN(CELLS[name](), (4, 3, 2)), sequence(2, 19, 3)
    theirs = np.stack([by_hand(net, ops.convert_to_numpy(x[i])) for i in range(2)]) if net(x) is not None else None
    np.testing.assert_allclose(ops.convert_to_numpy(net(x)), theirs, rtol=1e-4, atol=1e-5)
    mask = np.arange(19) < np.array([[19], [7]])
    masked = ops.convert_to_numpy(net(x, mask=mask))
    np.testing.assert_allclose(masked[1], by_hand(net, x[1, :7]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("jit", [False, True])
def test_fit_save_load(jit: bool, tmp_path: Path) -> None:
    if jit and BACKEND == "torch":
        pytest.skip("Keras compiles on torch through inductor, which needs a C++ compiler")
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16, 3))
    model = keras.Model(inputs, layers.Dense(1)(SlicedRNN(layers.GRU(4), (4, 4))(inputs)))
    model.compile("adam", "mse", jit_compile=jit)
    x = sequence(8, 16, 3)
    before = model.evaluate(x, x[:, 0, :1], verbose=0)
    model.fit(x, x[:, 0, :1], epochs=10, verbose=0)
    assert model.evaluate(x, x[:, 0, :1], verbose=0) < before
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-6)
    assert model.layers[1].compute_output_shape((None, 16, 3)) == (None, 4)


def test_shared_and_mixed_precision() -> None:
    net = SlicedRNN(layers.GRU(3), (4, 4), shared=True)
    net(sequence(2, 16, 3))
    assert len(net.weights) == len(layers.GRU(3).weights or net.levels[0].weights)
    half = SlicedRNN(layers.GRU(4, dtype="mixed_bfloat16"), (4, 4), dtype="mixed_bfloat16")
    assert keras.backend.standardize_dtype(half(sequence(2, 16, 3)).dtype) == "bfloat16"


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda: SlicedRNN(layers.GRU(4), (0, 2)), "positive integers"),
        (lambda: SlicedRNN(layers.Bidirectional(layers.GRU(4))), "one direction"),
        (lambda: SlicedRNN(layers.Dense(4)), "got Dense"),
        (lambda: SlicedRNN(layers.GRU(4), shared=True)(sequence(2, 8, 3)), "3 features, the state 4"),
        (lambda: SlicedRNN(layers.GRU(4))(keras.Input((None, 3))), "known number of steps"),
    ],
)
def test_wrong_use(use: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        use()
