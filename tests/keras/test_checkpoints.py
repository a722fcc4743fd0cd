"""Checkpoints in training: whatever the segments, weights after a step are those of the untouched model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers as L
from keras import ops, tree

import ranger_nn
import ranger_nn.keras.model as wrapped
from ranger_nn.keras.model import regionalize
from ranger_nn.planning.rolled_search import Rolled, make_rolled
from tests.keras.nets import chain, shaken, unet
from tests.keras.regions import error

pytestmark = pytest.mark.usefixtures("numpy_weights")

BACKEND = keras.backend.backend()
MODES = {
    "tensorflow": [{"jit_compile": False}, {"run_eagerly": True}, {"jit_compile": True}],
    "jax": [{}],
    "torch": [{}],
}[BACKEND]


def segmented(patch: pytest.MonkeyPatch, segment: int) -> list[int]:
    """Every sweep of training gets checkpoints this far apart; returns where the lengths of its loops are noted."""
    lengths: list[int] = []

    def make(graph: Any, options: Any, training: bool) -> Rolled:
        found = make_rolled(graph, options, training)
        if not training:
            return found
        lengths.extend(loop.stop - loop.start for loop in found.loops if loop)
        return replace(found, loops=tuple(loop and replace(loop, segment=segment) for loop in found.loops))

    patch.setattr(wrapped, "make_rolled", make)
    return lengths


def moved(model: keras.Model, shape: Any, options: Any = None) -> list[np.ndarray]:
    """Weights after a step of training."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(keras.config.floatx())
    results = tree.map_structure(
        lambda t: rng.standard_normal(t.shape), model.compute_output_spec(keras.KerasTensor(shape))
    )
    model.compile(keras.optimizers.SGD(0.05), tree.map_structure(lambda _: "mse", results), **(options or {}))
    model.train_on_batch(x, results)
    return [np.array(w) for w in model.get_weights()]


def apart(model: keras.Model, shape: Any, rows: int, segment: int, options: Any = None) -> float:
    """Difference between the weights after a step, with segments and untouched."""
    twin = keras.models.clone_model(shaken(model))
    twin.set_weights(model.get_weights())
    before = model.get_weights()
    with pytest.MonkeyPatch.context() as patch:
        lengths = segmented(patch, segment)
        ours = moved(regionalize(twin, regions=(rows,)), shape, options)
        assert lengths
        assert max(lengths) > segment
    theirs = moved(model, shape)
    assert max(error(a, b) for a, b in zip(theirs, before, strict=True)) > 1e-4
    return max(error(a, b) for a, b in zip(ours, theirs, strict=True))


def net() -> Any:
    """A skip connection, statistics of a batch, a maximum over all rows, and rows that do not divide evenly."""
    start = skip = x = L.Input((21, 6, 2))
    x = skip = L.ReLU()(L.BatchNormalization()(L.Conv2D(3, 3, padding="same")(x)))
    x = L.ZeroPadding2D(((0, 1), (0, 0)))(x)
    x = L.Conv2DTranspose(3, 2, strides=2, padding="same")(L.Conv2D(4, 3, padding="same")(L.MaxPooling2D(2)(x)))
    x = L.Concatenate()([L.Cropping2D(((0, 1), (0, 0)))(x), skip])
    return keras.Model(start, [L.Conv2D(2, 3, padding="same")(x), L.GlobalMaxPooling2D()(x)]), (2, 21, 6, 2)


@pytest.mark.parametrize("options", MODES)
def test_one_step_as_untouched(options: Any) -> None:
    """The last segment is shorter than the others."""
    keras.utils.set_random_seed(0)
    assert apart(*net(), 2, 4, options) < 1e-5


@st.composite
def nets(draw: st.DrawFn) -> tuple[keras.Model, Any]:
    """Windows of all kinds, a way around some of them, and a scale that changes and comes back."""
    rows = 2 * draw(st.integers(6, 14))
    start = x = L.Input((rows, 5, 2))
    skips = [x := L.Conv2D(3, draw(st.integers(1, 4)), padding="same")(x)]
    for kind in draw(st.lists(st.sampled_from(["conv", "dilated", "pool", "add"]), min_size=1, max_size=4)):
        if kind == "conv":
            x = L.Conv2D(3, (draw(st.integers(1, 5)), 1), padding="same", activation="tanh")(x)
        elif kind == "dilated":
            x = L.Conv2D(3, (3, 1), dilation_rate=(draw(st.integers(1, 3)), 1), padding="same")(x)
        elif kind == "pool":
            x = L.Conv2DTranspose(3, (2, 1), strides=(2, 1))(L.MaxPooling2D((2, 1))(x))
        else:
            x = L.Add()([x, draw(st.sampled_from(skips))])
        skips.append(x)
    return keras.Model(start, L.Concatenate()([x, skips[0]])), (1, rows, 5, 2)


@settings(
    max_examples={"torch": 25, "tensorflow": 2, "jax": 1}[BACKEND], deadline=None, derandomize=True, database=None
)
@given(made=nets(), rows=st.integers(1, 3), segment=st.integers(1, 3))
def test_any_segments_of_any_net(made: Any, rows: int, segment: int) -> None:
    """Segments of a step and of a few."""
    assert apart(*made, rows, segment, {"run_eagerly": True} if BACKEND == "tensorflow" else {}) < 1e-5


@pytest.mark.skipif(BACKEND != "tensorflow", reason="Keras has float64 throughout on TensorFlow alone")
def test_double_precision() -> None:
    """To the last digits."""
    before = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_dtype_policy("float64")
    keras.config.set_floatx("float64")
    try:
        assert apart(*net(), 2, 3, {"run_eagerly": True}) < 1e-11
    finally:
        keras.config.set_dtype_policy(before[0])
        keras.config.set_floatx(before[1])


def test_noise_is_the_same_once_more() -> None:
    """A layer that draws noise draws the same in each pass: with checkpoints, without, and of another length."""
    found = []
    for segment in (0, 2, 3):
        model, shape = chain(
            L.Conv1D(4, 3, padding="same"), L.Dropout(0.5, seed=2), L.Conv1D(2, 3, padding="same"), shape=(1, 16, 3)
        )
        with pytest.MonkeyPatch.context() as patch:
            segmented(patch, segment)
            found.append(moved(regionalize(shaken(model), regions=(2,)), shape))
    assert max(error(a, b) for again in found[1:] for a, b in zip(again, found[0], strict=True)) < 1e-5


def test_windows_of_integers() -> None:
    """They have no gradient, and are put together again all the same."""
    start = L.Input((18, 3))
    numbers = ops.cast(ops.clip(start * 3 + 5, 0, 10), "int32")
    embedded = L.Embedding(11, 4)
    x = L.Add()([embedded(numbers[:, 3:, 0]), embedded(numbers[:, :-3, 1])])
    assert apart(keras.Model(start, L.Conv1D(2, 3)(x)), (1, 18, 3), 2, 3) < 1e-5


@pytest.mark.skipif(BACKEND != "torch", reason="counted by PyTorch's allocator")
def test_measured_is_at_most_projected() -> None:
    """Every byte of a step of training in the least memory, which needs checkpoints."""
    model, shape = unet(shape=(1, 512, 256, 3), norm=False)
    with pytest.raises(ranger_nn.BudgetError, match="the least that a plan needs") as caught:
        ranger_nn.plan(model, shape, "1kB", training=True)
    small = regionalize(model, caught.value.least)
    x = ops.convert_to_tensor(np.ones(shape, "float32"))
    plan = small.plan_for(x, True)
    assert any(r.checkpoint for r in plan.sweeps)

    def once() -> int:
        with ranger_nn.measure() as used:
            y = small(x, training=True)
            used.leave_out(y)
            y.sum().backward()
        return int(used.peak)

    once()
    assert once() <= plan.projected <= caught.value.least


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the other back ends run in order by themselves")
def test_operators_of_a_body_run_one_after_the_other() -> None:
    """Two products that do not need each other, in a loop and in a condition."""
    import tensorflow as tf

    from ranger_nn.keras.loops_here import loops

    def products(x: Any) -> Any:
        return tf.matmul(x, x) + tf.matmul(x, x)

    @tf.function
    def run(x: Any) -> Any:
        x = loops().loop(0, 2, lambda t, x: products(x), x)
        return loops().branch(x[0, 0] > 0, lambda: [products(x)], lambda: [x])[0]

    bodies = run.get_concrete_function(tf.zeros((64, 64))).graph.as_graph_def().library.function
    found = [[n for n in f.node_def if n.op == "MatMul"] for f in bodies]
    pairs = [nodes for nodes in found if len(nodes) == 2]
    assert len(pairs) == 2
    assert all(f"^{first.name}" in second.input for first, second in pairs)
