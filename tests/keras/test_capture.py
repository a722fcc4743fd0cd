"""Capture: each layer on regions against the whole layer, models run whole against themselves, what stays whole."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import KerasTensor, ops, tree
from keras import layers as L

import ranger_nn.keras
from ranger_nn.bounds.axes import find_axes
from ranger_nn.errors import CaptureError
from ranger_nn.keras.capture import Captured, capture
from ranger_nn.keras.model import regionalize
from tests.keras.nets import LOCAL, MODELS, Blur, Foreign, chain, shaken
from tests.keras.regions import captured, check_region, evaluate, inputs_for, whole_error

pytestmark = pytest.mark.usefixtures("numpy_weights")


@pytest.mark.parametrize("name", LOCAL)
def test_each_layer_on_regions(name: str) -> None:
    """Any rows of any node, also beyond the edges, where what lies outside and must not matter is noise."""
    keras.utils.set_random_seed(0)
    model, shape = LOCAL[name]()
    x = inputs_for(shaken(model), shape)
    found = captured(model, x)
    assert whole_error(found, model, x) < 1e-5
    known = evaluate(found, x)
    axis = find_axes(found.graph)[0]
    nodes = [n for n in found.graph.nodes if n.outputs[0] in axis.dims and not n.rule.reduces]
    assert nodes

    @settings(max_examples=1 if keras.backend.backend() == "jax" else 3, deadline=None, derandomize=True, database=None)
    @given(st.integers(-3, 12), st.integers(2, 6))
    def rows(start: int, count: int) -> None:
        for node in nodes:
            wrong = check_region(found, node, known, axis.dims[node.outputs[0]], start, count)
            assert wrong is not None and wrong < 1e-5, (node.name, start, count, wrong)

    rows()
    assert not [n.rule.reason for n in found.graph.nodes if n.rule.reason]


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="traces nothing")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LOCAL | MODELS)
def test_a_plan_belongs_to_no_trace(name: str, training: bool) -> None:
    """A plan that is made while one function is traced runs in others as well: making it leaves no tensor in it."""
    model, shape = (LOCAL | MODELS)[name]()
    like = tree.map_structure(lambda t: KerasTensor(t.shape, dtype=t.dtype), inputs_for(model, shape))
    regional = ranger_nn.regionalize(model, regions=(4,))
    assert not made_by(lambda: regional.prepared(like, [None] * len(tree.flatten(like)), training))


def made_by(run: Callable[[], Any]) -> list[Any]:
    """Operations that `run` leaves in the function that is being traced around it."""
    if keras.backend.backend() == "jax":
        import jax

        return list(jax.make_jaxpr(lambda: (run(), 0)[1])().eqns)
    import tensorflow as tf

    found: list[Any] = []

    @tf.function(autograph=False)
    def traced() -> None:
        run()
        found.extend(tf.compat.v1.get_default_graph().get_operations())

    traced.get_concrete_function()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_models_run_whole(name: str) -> None:
    """The captured graph gives what the model gives."""
    keras.utils.set_random_seed(0)
    model, shape = MODELS[name]()
    x = inputs_for(shaken(model), shape)
    found = captured(model, x)
    assert whole_error(found, model, x) < 1e-5
    assert found.pack(list(found.outputs)) is not None
    assert _structure(found.pack(list(found.outputs))) == _structure(model(x))


def _structure(nest: Any) -> Any:
    if isinstance(nest, dict):
        return dict.fromkeys(nest)
    return len(nest) if isinstance(nest, (list, tuple)) else None


def _reasons(found: Captured) -> dict[str, str]:
    return {n.where: n.rule.reason for n in found.graph.nodes if n.rule.reason}


def test_a_layer_that_leaves_keras_stays_whole_and_is_reported() -> None:
    """Its name, its class and why."""
    model, shape = chain(L.Conv2D(4, 3), Foreign(name="odd"), L.ReLU())
    assert next(iter(_reasons(captured(model, inputs_for(model, shape))).items()))[0] == "odd (Foreign)"
    assert "TypeError: numbers only" in _reasons(captured(model, inputs_for(model, shape)))["odd (Foreign)"]


def test_a_declared_layer_runs_on_regions() -> None:
    """One line gives a layer its rule."""
    model, shape = chain(L.Conv2D(4, 3), Blur(), L.ReLU())
    x = inputs_for(model, shape)
    assert _reasons(captured(model, x))
    ranger_nn.keras.declare(Blur, ranger_nn.keras.Local(before=1, after=1))
    try:
        found = captured(model, x)
        assert not _reasons(found)
        assert whole_error(found, model, x) < 1e-6
        known, node = evaluate(found, x), next(n for n in found.graph.nodes if n.op == "blur")
        for start in (-1, 0, 3, 8):
            assert check_region(found, node, known, 1, start, 4) < 1e-6
    finally:
        ranger_nn.keras.lowering_layers.DECLARED.clear()


@pytest.mark.parametrize(
    ("given_class", "rule", "text"),
    [
        (object, None, "subclass of keras.layers.Layer; got <class 'object'>"),
        (Blur, "pointwise", "as rule; got 'pointwise'"),
    ],
)
def test_declare_refuses(given_class: Any, rule: Any, text: str) -> None:
    """What is no layer, and what is no rule."""
    with pytest.raises(ValueError, match=text):
        ranger_nn.keras.declare(given_class, rule)


def test_a_declaration_that_does_not_fit() -> None:
    """The error names the layer and its config."""

    class Half(Blur):
        def call(self, x: Any) -> Any:
            return x[:, ::2]

        def compute_output_shape(self, shape: Any) -> Any:
            return (shape[0], (shape[1] + 1) // 2, *shape[2:])

    ranger_nn.keras.declare(Half, ranger_nn.keras.Local())
    model, shape = chain(Half(name="half"))
    try:
        with pytest.raises(
            ValueError, match=r"Half 'half' is declared .* makes \(1, 7, 11, 4\) of \(1, 13, 11, 4\).*Config"
        ):
            captured(model, inputs_for(model, shape))
    finally:
        ranger_nn.keras.lowering_layers.DECLARED.clear()


def test_a_model_that_branches_on_numbers() -> None:
    """The line at which it does is named."""

    class Branching(keras.Model):
        def call(self, x: Any) -> Any:
            return x if float(ops.sum(x)) > 0 else -x

    model = Branching(name="branching")
    model(np.zeros((1, 8, 8, 3), "float32"))
    with pytest.raises(
        CaptureError, match=r"(?s)Branching 'branching' cannot be captured.*test_capture.py.*keras.ops.where"
    ):
        capture(model, KerasTensor((1, 8, 8, 3)))


def test_an_input_that_the_model_refuses() -> None:
    """Keras's own words, and the config of the layer that they name."""
    model, _ = chain(L.Conv2D(4, 3, name="first"), shape=(1, None, None, 4))
    with pytest.raises(
        ValueError, match=r"refuses inputs of shape \(1, 9, 9, 3\).*Config of input_layer\w*: \{'batch_shape'"
    ):
        capture(model, KerasTensor((1, 9, 9, 3)))


def test_capture_leaves_no_trace_on_the_model() -> None:
    """Layers have as many nodes and the same attributes as before."""
    model, shape = MODELS["two inputs"]()
    before = {op.name: (len(op._inbound_nodes), len(op._outbound_nodes)) for op in model.operations}
    kernels = [layer.kernel for layer in model.layers if hasattr(layer, "kernel")]
    captured(model, inputs_for(model, shape))
    assert {op.name: (len(op._inbound_nodes), len(op._outbound_nodes)) for op in model.operations} == before
    assert all(
        a is b for a, b in zip(kernels, [la.kernel for la in model.layers if hasattr(la, "kernel")], strict=True)
    )


def test_statistics_are_updates_while_training() -> None:
    """Batch norm: moments of the whole area end a sweep; the new running statistics are given once."""
    model, shape = chain(L.Conv2D(4, 3), L.BatchNormalization(momentum=0.5), L.ReLU())
    x = inputs_for(shaken(model), shape)
    found = captured(model, x, training=True)
    known = evaluate(found, x)
    updates = {variable.path.split("/")[-1]: ops.convert_to_numpy(known[v]) for variable, v in found.updates}
    theirs = ops.convert_to_numpy(model(x, training=True))
    np.testing.assert_allclose(ops.convert_to_numpy(known[found.outputs[0]]), theirs, atol=1e-5)
    assert sorted(updates) == ["moving_mean", "moving_variance"]
    for variable, _ in found.updates:
        np.testing.assert_allclose(updates[variable.path.split("/")[-1]], ops.convert_to_numpy(variable), rtol=1e-5)
    assert any(n.rule.reduces for n in found.graph.nodes)


def test_noise_is_drawn_by_rows() -> None:
    """The same rows get the same noise; other rows and other passes other noise; a spatial dropout shares its mask."""
    layers = L.Dropout(0.5), L.SpatialDropout2D(0.5), L.GaussianNoise(0.1), L.GaussianDropout(0.1)
    model, _ = chain(*layers, shape=(1, 13, 11, 64))  # so many channels do not draw the same mask twice
    found = capture(model, KerasTensor((1, 13, 11, 64)), training=True)
    noisy = [n for n in found.graph.nodes if n.op == "noise"]
    seeds = [n for n in found.graph.nodes if n.op == "seed"]
    assert [n.where.split("(")[1] for n in noisy] == [
        "Dropout)",
        "SpatialDropout2D)",
        "GaussianNoise)",
        "GaussianDropout)",
    ]
    assert all(n.random for n in seeds)
    x = ops.ones((1, 5, 11, 64))
    for node, seed in zip(noisy, seeds, strict=True):
        drawn = seed.kernel.whole()
        run = node.kernel.region(1, 5, 0)
        at = [ops.convert_to_numpy(run(x, drawn, position=ops.convert_to_tensor(p, "int32"))) for p in (5, 5, 10)]
        np.testing.assert_array_equal(at[0], at[1])
        assert (np.array_equal(at[0], at[2])) == ("Spatial" in node.where)
        assert not np.array_equal(
            at[0], ops.convert_to_numpy(run(x, seed.kernel.whole(), position=ops.convert_to_tensor(5)))
        )


def test_masks_reach_the_layers_that_take_them() -> None:
    """A masking layer before a recurrent one."""
    model, shape = chain(L.Masking(0.0), L.Conv1D(4, 1), shape=(2, 9, 3))
    recurrent = keras.Model(model.input, L.LSTM(3)(L.Masking(0.0)(model.input)))
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    x[:, 6:] = 0.0
    x = ops.convert_to_tensor(x)
    assert whole_error(captured(recurrent, x), recurrent, x) < 1e-6


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_policies(policy: str) -> None:
    """Values have the dtypes that the model computes in."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model, shape = chain(
            L.Conv2D(4, 3), L.BatchNormalization(), L.GlobalAveragePooling2D(), L.Dense(3, dtype="float32")
        )
        x = inputs_for(shaken(model), shape)
        found = captured(model, x)
        assert whole_error(found, model, x) < 1e-2
        assert found.graph.values[next(n for n in found.graph.nodes if n.op == "conv").outputs[0]].dtype == policy[6:]
        assert found.graph.values[found.outputs[0]].dtype == "float32"
    finally:
        keras.config.set_dtype_policy(before)


class Remembering(L.Layer):
    """Puts what it computes into its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.log = None, []

    def call(self, x: Any) -> Any:
        self.last = 2.0 * x
        self.log.append(1)
        self.new = x
        return self.last


def test_capture_leaves_attributes_alone() -> None:
    """No symbolic tensor stays behind, in a layer or in a list."""
    layer = Remembering()
    model, shape = chain(L.Conv1D(4, 3), layer, shape=(1, 9, 4))
    layer.last = None
    del layer.new
    layer.log.clear()
    captured(model, inputs_for(model, shape))
    assert layer.last is None and not hasattr(layer, "new") and not layer.log


def test_python_random_numbers_are_not_frozen() -> None:
    """A layer that draws from NumPy stays whole, and the generator stays where it was."""

    class Depth(L.Layer):
        def call(self, x: Any) -> Any:
            return x * float(np.random.rand() < 0.5)

    model, shape = chain(L.Conv1D(4, 3), Depth(), shape=(1, 9, 4))
    state = np.random.get_state()[2]
    found = captured(model, inputs_for(model, shape))
    assert np.random.get_state()[2] == state
    assert any("NumPy" in node.rule.reason for node in found.graph.nodes)


def test_threads_that_meet_new_shapes_and_the_untouched_model() -> None:
    """Captures and plans of several threads, while another one runs the untouched model."""
    inputs = keras.Input((None, 3))
    model = keras.Model(inputs, L.Conv1D(3, 3, padding="same")(L.BatchNormalization()(inputs)))
    small, x = regionalize(model, regions=(4,)), np.ones((1, 9, 3), "float32")
    expected, wrong, done = ops.convert_to_numpy(model(x)), [], threading.Event()

    def untouched() -> None:
        while not done.is_set():
            if not np.allclose(ops.convert_to_numpy(model(x)), expected, atol=1e-6):
                wrong.append("untouched")

    def each(rows: int) -> None:
        given = np.random.default_rng(rows).standard_normal((1, rows, 3)).astype("float32")
        if not np.allclose(ops.convert_to_numpy(small(given)), ops.convert_to_numpy(model(given)), atol=1e-5):
            wrong.append(rows)

    with ThreadPoolExecutor(5) as pool:
        other = pool.submit(untouched)
        found = [pool.submit(each, rows) for rows in range(9, 13)]
        for future in found:
            future.result()
        done.set()
        other.result()
    assert not wrong
