"""Skip connections that are made again in place of being kept: the same numbers, forward and after a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L

import ranger_nn
from ranger_nn.keras.model import regionalize
from ranger_nn.planning import rolled_search
from tests.keras.nets import shaken
from tests.keras.regions import error

pytestmark = pytest.mark.usefixtures("numpy_weights")

SHAPE = (1, 64, 8, 2)


def net(norm: bool = False, rate: float = 0.0) -> keras.Model:
    """A light way down and heavy work below it."""
    start = x = L.Input(SHAPE[1:])
    x = L.Conv2D(3, 3, padding="same")(x)
    x = L.BatchNormalization()(x) if norm else x
    x = skip = L.Dropout(rate, seed=1)(L.ReLU()(x))
    x = L.MaxPooling2D(2)(x)
    for _ in range(5):
        x = L.Conv2D(6, 3, padding="same", activation="relu")(x)
    x = L.Conv2DTranspose(3, 2, strides=2)(x)
    return keras.Model(start, L.Conv2D(2, 3, padding="same")(L.Concatenate()([x, skip])))


def copied(patch: pytest.MonkeyPatch, segment: int = 0) -> None:
    """Every plan makes again what it can; in training with checkpoints, where `segment` is their distance."""
    run = rolled_search.Search.run

    def with_copies(self: Any) -> Any:
        plain = run(self)
        *_, found = [plain, *rolled_search.with_copies(plain, self.training)]
        if self.training and segment:
            found = replace(found, loops=tuple(loop and replace(loop, segment=segment) for loop in found.loops))
        return found

    patch.setattr(rolled_search.Search, "run", with_copies)


@pytest.mark.parametrize(("norm", "segment"), [(False, 0), (False, 3), (True, 0)])
def test_forward_and_a_step_as_untouched(norm: bool, segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, loss and weights."""
    keras.utils.set_random_seed(0)
    copied(monkeypatch, segment)
    model = shaken(net(norm))
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    small = regionalize(twin, regions=(4,))
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(SHAPE, dtype="float32"), rng.standard_normal((*SHAPE[:3], 2), dtype="float32")
    assert all(small.plan_for(x, training=training).again for training in (False, True))
    assert error(small.predict(x, verbose=0), model.predict(x, verbose=0)) < 1e-5
    assert stepped(small, x, y) == pytest.approx(stepped(model, x, y), rel=1e-5, abs=1e-6)
    pairs = zip(small.get_weights(), model.get_weights(), strict=True)
    assert max(error(a, b) for a, b in pairs) < 1e-5


def stepped(model: keras.Model, x: Any, y: Any) -> float:
    """Loss of a step of training."""
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return float(model.train_on_batch(x, y))


def test_noise_is_not_drawn_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A skip connection behind a layer that draws noise stays kept."""
    copied(monkeypatch)
    for training, expected in ((False, True), (True, False)):
        plan = ranger_nn.plan(net(rate=0.5), SHAPE, regions=(4,), training=training)
        assert bool(plan.again) == expected
