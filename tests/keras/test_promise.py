"""The promise of Keras on PyTorch, the back end whose bytes are counted one by one: measured <= projected <= allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import pytest
from keras import layers

import ranger_nn

pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="compilers plan their own buffers")

CASES: dict[str, tuple[Callable[[Any], Any], tuple[int, ...]]] = {
    "transposed, same": (lambda x: layers.Conv2DTranspose(8, 5, strides=2, padding="same")(x), (96, 96, 8)),
    "transposed, valid": (lambda x: layers.Conv2DTranspose(4, 3, strides=2)(x), (64, 50, 16)),
    "transposed, stride 3": (lambda x: layers.Conv2DTranspose(16, 7, strides=3, padding="same")(x), (40, 40, 2)),
    "transposed, then another": (
        lambda x: layers.Conv2D(4, 3)(layers.Conv2DTranspose(16, 4, strides=2, padding="same")(x)),
        (48, 48, 8),
    ),
    "transposed volume": (lambda x: layers.Conv3DTranspose(4, 3, strides=2, padding="same")(x), (12, 12, 12, 8)),
    "transposed series": (lambda x: layers.Conv1DTranspose(8, 5, strides=2, padding="same")(x), (500, 8)),
    "resized": (lambda x: layers.Conv2D(2, 3)(layers.Resizing(300, 310)(layers.Conv2D(8, 3)(x))), (200, 180, 3)),
    "made smaller": (lambda x: layers.Resizing(100, 90)(layers.Conv2D(8, 3)(x)), (200, 180, 8)),
}


def peak(work: Callable[[], Any]) -> int:
    """Bytes of a second call, its result left out."""
    work()
    with ranger_nn.measure() as used:
        used.leave_out(work())
    return used.peak


@pytest.mark.parametrize("case", CASES)
def test_measured_projected_allowed(case: str) -> None:
    """With no budget, the least, and twice and four times that."""
    import torch

    function, shape = CASES[case]
    given = keras.Input(shape, batch_size=1)
    model, x = keras.Model(given, function(given)), torch.randn(1, *shape)
    with pytest.raises(ranger_nn.BudgetError) as error:
        ranger_nn.plan(model, (1, *shape), memory=1)
    least = error.value.least or 0
    for memory in (None, least, 2 * least, 4 * least):
        plan = ranger_nn.plan(model, (1, *shape), memory=memory)
        small = ranger_nn.regionalize(model, memory=memory)
        with torch.no_grad():
            measured = peak(lambda small=small: small(x))
        assert measured <= plan.projected
        assert memory is None or plan.projected <= memory
