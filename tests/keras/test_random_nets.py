"""Random networks with the joins, slices and views in which one row is a piece of its own, against the untouched model."""

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

BACKEND = keras.backend.backend()
FEW = {"torch": 10, "tensorflow": 2, "jax": 1}[BACKEND]
"""Networks that are not slow: compilers take long for each."""
ALL = 40
WIDTH = 4


class Prefix(L.Layer):
    """Tokens of its own before all, or after."""

    def __init__(self, count: int, behind: bool) -> None:
        super().__init__()
        self.count, self.behind = count, behind

    def build(self, shape: Any) -> None:
        self.tokens = self.add_weight(shape=(1, self.count, shape[-1]), initializer="normal", name="tokens")

    def call(self, x: Any) -> Any:
        tokens = ops.broadcast_to(self.tokens, (x.shape[0] or ops.shape(x)[0], self.count, x.shape[-1]))
        return ops.concatenate([x, tokens] if self.behind else [tokens, x], axis=1)


class Does(L.Layer):
    """Any function."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def call(self, x: Any) -> Any:
        return self.function(x)


def wrapped(rng: Any, n: int) -> Any:
    before, after = (int(k) for k in rng.integers(1, 3, 2))
    return Does(lambda x: ops.concatenate([x[:, n - before :], x, x[:, :after]], axis=1))


def one_row(rng: Any, n: int) -> Any:
    i, kind = int(rng.integers(n)), int(rng.integers(3))
    spread = (
        lambda x: x + x[:, i : i + 1],
        lambda x: x * ops.expand_dims(x[:, i], 1),
        lambda x: x - ops.repeat(x[:, i : i + 1], n, axis=1),
    )
    return Does(spread[kind])


def inserted(rng: Any, n: int) -> Any:
    at = int(rng.integers(1, n))
    return Does(lambda x: ops.concatenate([x[:, :at], ops.mean(x, axis=1, keepdims=True), x[:, at:]], axis=1))


def mapped_and_back(rng: Any, n: int) -> Any:
    """Tokens to a map and back, from an odd offset."""
    columns = int(rng.integers(2, 4))
    rows = n // columns
    first = int(rng.integers(0, n - rows * columns + 1))
    size = rows * columns
    into = Does(lambda x: ops.reshape(x[:, first : first + size], (-1, rows, columns, WIDTH)))
    return keras.Sequential([into, L.Conv2D(WIDTH, 3, padding="same"), L.Reshape((size, WIDTH))])


PIECES: list[Callable[[Any, int], Any]] = [
    wrapped,
    one_row,
    inserted,
    mapped_and_back,
    lambda rng, n: L.Conv1D(WIDTH, int(rng.integers(1, 4)), padding="same", activation="tanh"),
    lambda rng, n: L.Conv1D(WIDTH, 3, padding="causal", dilation_rate=int(rng.integers(1, 3))),
    lambda rng, n: Prefix(int(rng.integers(1, 3)), bool(rng.integers(2))),
    lambda rng, n: Does(lambda x: ops.concatenate([x[:, :1], x[:, 1:] - x[:, :-1]], axis=1)),
    lambda rng, n: Does(lambda x: ops.concatenate([x[:, 1:] - x[:, :-1], x[:, -1:]], axis=1)),
    lambda rng, n: Does(lambda x: ops.concatenate([ops.zeros_like(x[:, :1]), x[:, :-1]], axis=1)),
    lambda rng, n: Does(lambda x: ops.flip(ops.diff(ops.flip(x, 1), axis=1), 1)),
    lambda rng, n: Does(lambda x: ops.reshape(ops.stack([x, -x], axis=2), (-1, 2 * n, WIDTH))),
    lambda rng, n: Does(lambda x: x[:, int(n % 2) :: 2]),
    lambda rng, n: Does(lambda x: (x - ops.mean(x, 1, keepdims=True)) / (ops.std(x, 1, keepdims=True) + 0.1)),
]


def drawn(rng: Any) -> tuple[keras.Model, tuple[int, ...]]:
    """Three to six pieces in a row."""
    shape = (2, int(rng.integers(9, 20)), WIDTH)
    x = start = keras.Input(shape[1:])
    for _ in range(int(rng.integers(3, 7))):
        n = x.shape[1]
        x = PIECES[int(rng.integers(len(PIECES)))](rng, n)(x) if 6 <= n <= 40 else L.Conv1D(WIDTH, 3, padding="same")(x)
    model = keras.Model(start, x)
    for w in model.weights:
        w.assign(rng.normal(0.0, 0.4, w.shape).astype("float32"))
    return model, shape


@pytest.mark.parametrize("seed", [pytest.param(n, marks=pytest.mark.slow) if n >= FEW else n for n in range(ALL)])
def test_forward_and_a_step_of_training(seed: int) -> None:
    """Numbers and weights after a step, in regions of one row and more."""
    rng = np.random.default_rng(seed)
    model, shape = drawn(rng)
    small = ranger_nn.regionalize(model, regions=(int(rng.integers(1, 6)),))
    x = rng.standard_normal(shape).astype("float32")
    expected = model.predict(x, verbose=0)
    assert apart(small.predict(x, verbose=0), expected) < 1e-4
    wanted, before, after = rng.standard_normal(expected.shape).astype("float32"), model.get_weights(), []
    for run in (model, small):
        model.set_weights(before)
        run.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=False if BACKEND == "tensorflow" else "auto")
        run.train_on_batch(x, wanted)
        after.append([np.array(w) for w in model.get_weights()])
    for theirs, ours, start in zip(*after, before, strict=True):
        np.testing.assert_allclose(ours - start, theirs - start, atol=1e-3 * float(np.abs(theirs - start).max()) + 1e-6)
