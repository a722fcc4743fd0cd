"""Whole networks region by region: what they give, and what three steps of training make of their weights."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import applications, ops, tree

from ranger_nn.keras.model import regionalize
from tests.keras.nets import LOCAL, MODELS, Subclassed, shaken
from tests.keras.regions import compiled, error, inputs_for

pytestmark = pytest.mark.usefixtures("numpy_weights")

FEW = ("MobileNetV2", "ResNet50", "EfficientNetB0")
"""One with inverted residuals, one with padding layers, one with squeeze-and-excitation."""

ALL = sorted(
    name
    for name in dir(applications)
    if name[0].isupper() and callable(getattr(applications, name)) and name not in FEW
)
if keras.backend.backend() == "torch":
    ALL = [name for name in ALL if not name.startswith("NASNet")]  # Keras itself refuses these on PyTorch


QUICK = {"u-net", "tcn", "3-d", "two inputs", "vision transformer", "MobileNetV2"}
TRAINED = ("u-net", "tcn", "two inputs", "3-d", "subclassed", "state", "words")


def chosen(names: Any, quick: Any = QUICK) -> list[Any]:
    """All names; on JAX, which compiles each network twice, those that are not quick are marked slow."""
    slow = [] if keras.backend.backend() != "jax" else [n for n in names if n not in quick]
    return [pytest.param(n, marks=pytest.mark.slow) if n in slow else n for n in names]


def forward_error(model: keras.Model, shape: Any, *regions: int) -> float:
    """Largest relative error, region by region against untouched."""
    x = inputs_for(shaken(model), shape)
    small, whole = compiled(regionalize(model, regions=regions)), compiled(model)
    found = _difference(small(x), whole(x))
    if found < 1e-5 or not hasattr(x, "shape"):
        return found
    # a deep network makes more of rounding: as it does of a change of its input in the last bit
    return min(found, 1e-6 * found / _difference(whole(x * (1 + 2.0**-23)), whole(x)))


def _difference(ours: Any, theirs: Any) -> float:
    return max(error(a, b) for a, b in zip(tree.flatten(ours), tree.flatten(theirs), strict=True))


@pytest.mark.parametrize("name", chosen(MODELS))
def test_forward(name: str) -> None:
    """U-Nets, a TCN, two inputs, 3-D, subclassed, attention, layers that stay whole."""
    keras.utils.set_random_seed(0)
    assert forward_error(*MODELS[name](), 4) < 1e-5


def twin(model: keras.Model, name: str) -> keras.Model:
    """The same network again, with the same weights."""
    again = MODELS[name]()[0] if isinstance(model, Subclassed) else keras.models.clone_model(model)
    again.set_weights(model.get_weights())
    return again


def trained(given: Any, wanted: Any, model: keras.Model, small: keras.Model) -> tuple[float, float]:
    """(largest difference between the weights of both after three steps, how far they moved)."""
    before = [np.array(w) for w in model.get_weights()]
    for run in (model, small):
        run.compile(keras.optimizers.SGD(0.002, momentum=0.9), tree.map_structure(lambda _: "mse", wanted))
        for _ in range(3):
            run.train_on_batch(given, wanted)
    pairs = list(zip(small.get_weights(), model.get_weights(), before, strict=True))
    return max(error(a, b) for a, b, _ in pairs), max(error(b, c) for _, b, c in pairs)


def training_error(name: str, *regions: int) -> float:
    """Difference between the weights after three steps of training."""
    keras.utils.set_random_seed(0)
    model, shape = MODELS[name]()
    small = regionalize(twin(shaken(model), name), regions=regions)
    rng = np.random.default_rng(0)
    given = tree.map_structure(lambda t: ops.convert_to_numpy(t).astype("float32"), inputs_for(model, shape))
    results = model(tree.map_structure(ops.convert_to_tensor, given))
    wanted = tree.map_structure(lambda t: rng.standard_normal(t.shape).astype("float32"), results)
    found, moved = trained(given, wanted, model, small)
    assert moved > 1e-4
    return found


@pytest.mark.parametrize("name", chosen(TRAINED, {"two inputs", "state"}))
def test_three_steps_of_training(name: str) -> None:
    """Weights, momentum's work on them, and running statistics, as untouched."""
    assert training_error(name, 4) < 1e-5


@pytest.mark.parametrize("name", chosen(["u-net", "subclassed", "channels first"]))
def test_along_columns(name: str) -> None:
    """Regions that have all rows, and a few columns."""
    keras.utils.set_random_seed(0)
    model, shape = (MODELS | LOCAL)[name]()
    x = inputs_for(model, shape)
    assert regionalize(model, regions=(99, 4)).plan_for(x).axes == ("columns",)
    assert forward_error(model, shape, 99, 4) < 1e-5


@pytest.mark.parametrize("name", chosen(["subclassed", "state"], {"state"}))
def test_three_steps_of_training_along_columns(name: str) -> None:
    """As along rows."""
    assert training_error(name, 99, 4) < 1e-5


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="Keras takes nothing for a bias on other back ends")
@pytest.mark.parametrize("regions", [(4,), (9, 4)])
@pytest.mark.parametrize("along", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 8, 8, 4), (1, 4, 8, 8), (1, 8, 4, 6), (1, 9, 8, 4), (1, 8, 9, 4)])
def test_a_vector_is_added_as_the_untouched_model_does(
    shape: tuple[int, ...], along: int, regions: tuple[int, ...]
) -> None:
    """Keras on TensorFlow goes by lengths to tell a bias, and a region's are others: as long as another dimension, or not."""
    vector = np.arange(1.0, shape[along] + 1, dtype="float32").reshape([-1 if d == along else 1 for d in range(4)])
    start = keras.Input(shape[1:])
    model = keras.Model(start, ops.add(ops.square(start), vector))
    assert forward_error(model, shape, *regions) == 0.0


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="JAX computes in double precision by a global switch alone"
)
def test_double_precision() -> None:
    """On TensorFlow to its last digits; on PyTorch Keras itself computes some operators in single precision."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        exact = keras.backend.backend() == "tensorflow"
        assert forward_error(*MODELS["u-net"](), 4) < (1e-11 if exact else 1e-6)
        assert training_error("tcn", 4) < (1e-11 if exact else 1e-6)
    finally:
        keras.config.set_dtype_policy(before)


def test_masks_reach_the_loss() -> None:
    """Steps that an embedding masks do not count."""
    start = keras.layers.Input((9,), dtype="int32")
    x = keras.layers.Embedding(5, 4, mask_zero=True)(start)
    model = keras.Model(start, keras.layers.Dense(2)(keras.layers.LSTM(3, return_sequences=True)(x)))
    given = np.random.default_rng(0).integers(0, 5, (3, 9)).astype("int32")
    wanted = np.random.default_rng(1).standard_normal((3, 9, 2)).astype("float32")
    losses = []
    for run in (model, regionalize(model, regions=(4,))):
        run.compile("sgd", "mse")
        losses.append(run.test_on_batch(given, wanted))
    assert abs(losses[0] - losses[1]) < 1e-6
    unmasked = np.mean((ops.convert_to_numpy(model(given)) - wanted) ** 2)
    assert abs(losses[0] - unmasked) > 1e-3


def application(name: str) -> float:
    """An application without weights or top, at an odd size."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    make = getattr(applications, name)
    model = make(weights=None, include_top=False, input_shape=(79, 77, 3))
    return forward_error(model, (1, 79, 77, 3), 16)


@pytest.mark.parametrize("name", chosen(FEW))
def test_applications(name: str) -> None:
    """Exact to rounding."""
    assert application(name) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_all_other_applications(name: str) -> None:
    """All of `keras.applications` that the back end offers."""
    assert application(name) < 1e-5
