"""`regionalize` as Keras users meet it: one model among others, in `fit`, `predict`, files, policies and errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import ranger_nn
from ranger_nn.errors import BudgetError, InputError, VerificationError
from ranger_nn.keras.model import Regional
from ranger_nn.planning.report import Plan
from tests.keras.nets import chain, images, net
from tests.keras.regions import apart

BACKEND = keras.backend.backend()


def test_the_variables_are_the_same() -> None:
    """Shared, under the same names, and no others."""
    model = net()
    small = ranger_nn.regionalize(model, regions=(8,))
    assert isinstance(small, keras.Model)
    assert [id(v) for v in small.variables] == [id(v) for v in model.variables]
    assert small.count_params() == model.count_params()
    x = images()
    before = ops.convert_to_numpy(small(x))
    model.layers[1].kernel.assign(2.0 * model.layers[1].kernel)
    assert apart(small(x), before) > 1e-3
    assert apart(small(x), model(x)) < 1e-5


def test_saved_and_loaded(tmp_path: Path) -> None:
    """A `.keras` file holds the untouched model and the options."""
    small = ranger_nn.regionalize(net(), regions=(8,))
    x = images()
    expected = small.predict(x, verbose=0)
    small.save(tmp_path / "small.keras")
    again = keras.saving.load_model(tmp_path / "small.keras")
    assert isinstance(again, Regional)
    assert again.get_config()["regions"] == (8,) or list(again.get_config()["regions"]) == [8]
    assert apart(again.predict(x, verbose=0), expected) < 1e-6


def test_inside_another_model() -> None:
    """It is a layer like others, in functional models too."""
    model = net()
    inputs = keras.Input((24, 16, 3))
    outer = keras.Model(inputs, ranger_nn.regionalize(model, regions=(8,))(L.Rescaling(2.0)(inputs)))
    assert outer.output_shape == (None, 24, 16, 2)
    x = images()
    assert apart(outer.predict(x, verbose=0), model.predict(2.0 * x, verbose=0)) < 1e-5


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64"])
def test_policies(policy: str) -> None:
    """Results are in the dtype in which the untouched model gives them."""
    if policy == "float64" and BACKEND == "jax":
        pytest.skip("JAX computes in 64 bits only where jax_enable_x64 is set for the process")
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = net()
        x = images().astype("float64" if policy == "float64" else "float32")
        ours, theirs = ranger_nn.regionalize(model, regions=(8,))(x), model(x)
        assert ours.dtype == theirs.dtype
        assert apart(ops.cast(ours, "float32"), ops.cast(theirs, "float32")) < (1e-6 if policy == "float64" else 5e-2)
        if policy == "float64":
            assert apart(ours, theirs) < 1e-11
    finally:
        keras.config.set_dtype_policy(before)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras compiles nothing on PyTorch unless asked")
@pytest.mark.parametrize("options", [{"jit_compile": True}, {"jit_compile": False}, {"run_eagerly": True}])
def test_modes(options: dict[str, bool]) -> None:
    """XLA, graphs, and line by line."""
    model = net()
    small = ranger_nn.regionalize(model, regions=(12,))
    small.compile("sgd", "mse", **options)
    x = images()
    assert apart(small.predict(x, verbose=0), model.predict(x, verbose=0)) < 1e-5
    y = np.zeros((1, 24, 16, 2), "float32")
    assert np.isfinite(small.train_on_batch(x, y))


def test_the_trace_does_not_grow_with_the_regions() -> None:
    """One body for each sweep, whatever the number of steps."""
    if BACKEND != "jax":
        pytest.skip("counted on JAX's own representation")
    import jax

    model, x = net(), images(rows=128)
    sizes = []
    for rows in (32, 4):
        small = ranger_nn.regionalize(model, regions=(rows,))
        sizes.append(len(str(jax.make_jaxpr(lambda x, small=small: small(x))(x))))
    assert sizes[1] < 1.3 * sizes[0]


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_memory_falls_in_the_compiled_program(axis: str) -> None:
    """XLA's own count of temporary bytes, forward and training, against the plan's: of a long image and a wide one."""
    if BACKEND != "jax":
        pytest.skip("XLA's analysis")
    import jax
    import jax.numpy as jnp

    model, x = net(16), images(rows=1024)
    x = np.swapaxes(x, 1, 2) if axis == "columns" else x
    allowed = ranger_nn.plan(model, x.shape).untouched // 6
    small = ranger_nn.regionalize(model, allowed)
    assert small.plan_for(x).axes == (axis,)
    weights = [[v.value for v in vs] for vs in (model.trainable_variables, model.non_trainable_variables)]

    def temporary(run: Any, training: bool) -> int:
        def loss(t: Any, r: Any, x: Any) -> Any:
            return jnp.mean(run.stateless_call(t, r, x, training=training)[0])

        work = jax.value_and_grad(loss) if training else loss
        return int(jax.jit(work).lower(*weights, x).compile().memory_analysis().temp_size_in_bytes)

    results = 1024 * 16 * 2 * 4
    assert temporary(small, False) - 2 * results <= small.plan_for(x).projected
    assert temporary(small, False) < temporary(model, False) / 3
    share = ranger_nn.regionalize(model, ranger_nn.plan(model, x.shape, training=True).untouched * 2 // 5)
    assert temporary(share, True) - 2 * results <= share.plan_for(x, training=True).projected
    assert temporary(share, True) < temporary(model, True) / 1.5


def plain() -> keras.Model:
    """Convolutions, one after the other."""
    conv = [L.Conv2D(16, 3, padding="same", activation="relu") for _ in range(4)]
    return keras.Sequential([keras.Input((256, 64, 3)), *conv], name="plain")


def depthwise() -> keras.Model:
    """Strides, expanded and depthwise, as in MobileNet."""
    inputs = x = keras.Input((256, 64, 3))
    for width, stride in ((16, 2), (24, 1), (24, 2)):
        x = L.ReLU(6.0)(L.BatchNormalization()(L.Conv2D(4 * width, 1)(x)))
        x = L.DepthwiseConv2D(3, stride, padding="same", activation="relu")(x)
        x = L.Conv2D(width, 1)(x)
    return keras.Model(inputs, x, name="depthwise")


def wide_net() -> keras.Model:
    """See `net`."""
    return keras.Sequential([keras.Input((256, 64, 3)), net(16)])


def panorama() -> keras.Model:
    """Convolutions, of a wide image."""
    conv = [L.Conv2D(16, 3, padding="same", activation="relu") for _ in range(4)]
    return keras.Sequential([keras.Input((64, 256, 3)), *conv], name="panorama")


def volume() -> keras.Model:
    """Convolutions of a volume: PyTorch unfolds small ones, to 27 times their input."""
    conv = [L.Conv3D(8, 3, padding="same", activation="relu") for _ in range(3)]
    return keras.Sequential([keras.Input((64, 24, 24, 4)), *conv], name="volume")


def thick() -> keras.Model:
    """Larger windows, strides and more samples."""
    conv = [L.Conv3D(8, (5, 3, 3), padding="same"), L.Conv3D(12, 3, 2, padding="same"), L.Conv3D(4, 2)]
    return keras.Sequential([keras.Input((48, 20, 24, 6)), *conv], name="thick")


def enlarged() -> keras.Model:
    """Bilinear resizing, up and down."""
    steps = [
        L.Conv2D(12, 3, padding="same"),
        L.UpSampling2D(2, interpolation="bilinear"),
        L.Conv2D(4, 3, padding="same"),
    ]
    return keras.Sequential([keras.Input((128, 48, 8)), *steps, L.Resizing(160, 40)], name="enlarged")


@pytest.mark.skipif(BACKEND != "torch", reason="counted by PyTorch's allocator")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", [plain, depthwise, wide_net, panorama, volume, thick, enlarged])
def test_measured_is_at_most_projected(build: Any, training: bool) -> None:
    """Every byte of PyTorch's allocator, results left out."""
    model = build()
    x = ops.convert_to_tensor(np.ones((1, *model.input_shape[1:]), "float32"))
    untouched = ranger_nn.plan(model, x.shape, training=training).untouched
    small = ranger_nn.regionalize(model, int(untouched * (0.9 if training else 0.5)))
    try:
        projected = small.plan_for(x, training).projected
    except ranger_nn.BudgetError as error:
        small = ranger_nn.regionalize(model, error.least)
        projected = small.plan_for(x, training).projected

    def once() -> int:
        import torch

        with torch.set_grad_enabled(training), ranger_nn.measure() as used:
            y = small(x, training=training)
            used.leave_out(y)
            if training:
                y.sum().backward()
        return used.peak

    once()
    assert once() <= projected <= small.plan_for(x, training).allowed


def test_the_plan_of_a_shape() -> None:
    """Printed without running anything."""
    found = ranger_nn.plan(net(), (1, 256, 64, 3), regions=(16,))
    assert found.steps == 16
    assert "net, inference" in str(found)
    assert Plan.from_json(found.to_json()) == found


def test_verify() -> None:
    """A model whose numbers depend on how often it was called is found out."""

    class Counting(L.Layer):
        def build(self, _: Any) -> None:
            self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x: Any) -> Any:
            self.calls.assign_add(1.0)
            return x + self.calls

    ranger_nn.regionalize(net(), regions=(8,), verify=True)(images())
    wrong = keras.Sequential([keras.Input((24, 16, 3)), L.Conv2D(2, 3), Counting()])
    with pytest.raises(VerificationError, match="differs from the untouched model"):
        ranger_nn.regionalize(wrong, regions=(8,), verify=True)(images())


def test_errors() -> None:
    """The rule, the value, the way out."""
    with pytest.raises(InputError, match=r"a torch\.nn\.Module or a keras\.Model, got int"):
        ranger_nn.regionalize(3)
    with pytest.raises(InputError, match="slid along, not tiled"):
        ranger_nn.plan(net(), (1, 64, 64, 3), schedule="tile")
    with pytest.raises(BudgetError, match="the least that a plan needs") as caught:
        ranger_nn.regionalize(net(), "1kB")(images())
    assert isinstance(caught.value, ValueError)
    with pytest.raises(BudgetError, match="positive amount"):
        ranger_nn.regionalize(net(), "no memory")


def test_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    """Importing `ranger_nn.keras` is enough."""
    ranger_nn.regionalize(net(), regions=(8,)).save(tmp_path / "small.keras")
    code = (
        "import sys, ranger_nn.keras, keras\n"
        "m = keras.saving.load_model(sys.argv[1])\n"
        "assert type(m).__name__ == 'Regional', type(m)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "small.keras")], check=True, timeout=120)


def test_torch_is_not_loaded_for_keras() -> None:
    """The adapter of another framework stays on disk."""
    if BACKEND == "torch":
        pytest.skip("the back end itself is PyTorch")
    code = (
        "import sys, keras, ranger_nn\n"
        "m = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(1, 3)])\n"
        "ranger_nn.plan(m, (1, 8, 8, 1))\n"
        "assert 'ranger_nn.torch.module' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="oneDNN's joined operators are TensorFlow's")
def test_depthwise_with_bias_where_tensorflow_uses_onednn() -> None:
    """Joined with its bias, a depthwise convolution of explicit padding aborts the process."""
    code = (
        "import keras, numpy as np, ranger_nn\n"
        "L = keras.layers\n"
        "m = keras.Sequential([keras.Input((64, 64, 3)), L.Conv2D(8, 3, padding='same', activation='relu'),\n"
        "    L.DepthwiseConv2D(3, padding='same', activation='relu6', bias_initializer='ones'), L.Conv2D(4, 1)])\n"
        "x = np.random.default_rng(0).standard_normal((1, 64, 64, 3)).astype('float32')\n"
        "y = ranger_nn.regionalize(m, regions=(16,)).predict(x, verbose=0)\n"
        "assert abs(y - m.predict(x, verbose=0)).max() < 1e-5\n"
    )
    environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="other back ends know when gradients are asked for")
def test_predict_saves_nothing_for_gradients() -> None:
    """A graph that anyone may differentiate keeps the rows of every step; that of `predict` does not, nor parts of results."""
    import tensorflow as tf

    model, shape = chain(L.Conv2D(4, 3, padding="same"), L.Conv2D(4, 3, padding="same"), shape=(1, 64, 8, 3))
    regional = ranger_nn.regionalize(model, regions=(8,))
    spec = tf.TensorSpec(shape)

    def lists(function: Any) -> int:
        graph = tf.function(function).get_concrete_function(spec).graph.as_graph_def()
        every = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
        return sum(n.op == "TensorListReserve" for n in every)

    assert lists(lambda x: regional(x, training=False)) > lists(regional.predict_step) == 0
    x = tf.random.normal(shape)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = regional(x, training=False)
    assert tape.gradient(y, x) is not None
    np.testing.assert_allclose(regional(x, training=False), model(x), atol=1e-5)
