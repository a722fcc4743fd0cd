"""A kernel that gives what its region does not ask for is found out in its first run, and named."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import ranger_nn
from ranger_nn.errors import LayerError, PlanError, VerificationError
from ranger_nn.keras import kernels_movement, kernels_window
from ranger_nn.keras.kernels import Kernel
from tests.keras.nets import chain, functional

SHAPE = (1, 17, 4)


def joined() -> Any:
    """Pieces of one row around all."""
    model, _ = functional(lambda x: ops.concatenate([x[:, -1:], L.Conv1D(4, 3, padding="same")(x), x[:, :1]], 1), SHAPE)
    return ranger_nn.regionalize(model, regions=(4,))


def damaged(kernel: type, monkeypatch: pytest.MonkeyPatch, harm: Any) -> None:
    """Every region of a kernel gives something else."""
    region = kernel.region

    def other(self: Any, dim: Any, rows: int, start: int = 0) -> Any:
        run = region(self, dim, rows, start)
        return lambda *xs, **options: harm(run(*xs, **options))

    monkeypatch.setattr(kernel, "region", other)


@pytest.mark.parametrize(
    "harm", [lambda y: y[:, :1], lambda y: ops.concatenate([y, y], 1), lambda y: ops.cast(y, "bfloat16")]
)
def test_a_wrong_shape_or_dtype_is_an_error_that_names_node_and_region(
    harm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the next operator would stretch it."""
    damaged(kernels_movement.Concatenate, monkeypatch, harm)
    with pytest.raises(
        PlanError,
        match=r"concatenate \(concatenate.*\) gave \(1, .*\) \w+ for \d+ rows from .* of dimension 1, which asks",
    ):
        joined()(np.zeros(SHAPE, "float32"))


def test_undamaged() -> None:
    """Nothing is said of what is right."""
    joined()(np.zeros(SHAPE, "float32"))


def test_verify_finds_wrong_numbers_of_any_number_of_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of one region is right where several would not be: `verify` looks at both."""
    model, shape = chain(L.Conv1D(4, 3, padding="same"), shape=SHAPE)
    whole = ranger_nn.regionalize(model, verify=True)
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    assert whole.plan_for(x).steps == 1
    whole(x)
    damaged(kernels_window.Convolution, monkeypatch, lambda y: 1.5 * y)
    with pytest.raises(VerificationError, match="in 4 regions"):
        ranger_nn.regionalize(model, verify=True)(x)


class Sized(L.Layer):
    """As many rows as there are positive numbers."""

    def call(self, x: Any) -> Any:
        return ops.nonzero(x[0, :, 0] > 0)[0]


def test_sizes_that_the_numbers_decide_are_refused_by_name() -> None:
    """Neither a wrong shape nor the back end's own exception."""
    inputs = keras.Input(SHAPE[1:])
    x = np.random.default_rng(0).standard_normal(SHAPE).astype("float32")
    try:
        model = keras.Model(inputs, Sized(name="positive")(inputs))
    except Exception:
        pytest.skip("Keras itself does not build it on this back end")
    with pytest.raises(LayerError, match="positive"):
        ranger_nn.regionalize(model, regions=(4,))(x)


def test_a_condition_reads_tensors_of_its_functions() -> None:
    """`cond` hides what its functions read: the layer stays whole, with the right branch."""

    class Either(L.Layer):
        def call(self, x: Any) -> Any:
            return ops.cond(ops.mean(x) > 0, lambda: x, lambda: -x)

    model, _ = chain(Either(), shape=SHAPE)
    small = ranger_nn.regionalize(model, regions=(4,))
    for sign in (1.0, -1.0):
        x = np.full(SHAPE, sign, "float32")
        np.testing.assert_array_equal(ops.convert_to_numpy(small(x)), 1.0)


def test_a_shape_that_the_back_end_gives_and_keras_does_not_declare() -> None:
    """Such an operator runs whole: Keras on PyTorch transposes a count along an axis."""
    inputs = keras.Input((17, 7, 4), batch_size=2)
    model = keras.Model(inputs, ops.count_nonzero(inputs > 0, axis=1))
    x = np.random.default_rng(0).standard_normal((2, 17, 7, 4)).astype("float32")
    for regions in ((5,), (17,)):
        found = ranger_nn.regionalize(model, regions=regions)(x)
        np.testing.assert_array_equal(ops.convert_to_numpy(found), ops.convert_to_numpy(model(x)))


def test_the_way_out_is_none_that_fails_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a whole operator gives does not hang on the regions."""
    inputs = keras.Input((17, 4), batch_size=2)
    model = keras.Model(inputs, ops.flip(inputs, 1))
    monkeypatch.setattr(Kernel, "whole", lambda self, x: x[:, 1:])
    with pytest.raises(PlanError, match=r"for the whole.*call the untouched model meanwhile"):
        ranger_nn.regionalize(model, regions=(17,))(np.zeros((2, 17, 4), "float32"))
