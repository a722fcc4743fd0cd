"""A plan is for the model as it is: what `call` reads in Python may change between calls, and the numbers with it."""

from __future__ import annotations

import array
import functools
import itertools
import os
import sys
import threading
import weakref
from collections import ChainMap, UserDict
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType, SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import ranger_nn
from ranger_nn.errors import InputError
from ranger_nn.keras.identity import identity
from tests.keras.regions import apart

SHAPE = (2, 9, 4)
FACTOR = [2.0]
BACKEND = keras.backend.backend()


def series(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype("float32")


def after(*layers: Any) -> keras.Model:
    """A convolution, and these."""
    return keras.Sequential([keras.Input(SHAPE[1:]), L.Conv1D(4, 3, padding="same"), *layers])


def times_factor(x: Any) -> Any:
    return x * FACTOR[0]


class Scaled(L.Layer):
    """Reads all that a layer of a user's may read."""

    shared = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.table, self.helper = 1.0, np.ones(4, "float32"), SimpleNamespace(offset=0.0)
        self.kept = [0.5]
        self.inner = functools.partial(ops.multiply, x2=2.0)

    def call(self, x: Any) -> Any:
        x = ops.add(x * self.scale + self.kept[0] + self.shared, ops.convert_to_tensor(self.table))
        return self.inner(x) + self.helper.offset


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "slope": (lambda: L.LeakyReLU(0.1), lambda la: setattr(la, "negative_slope", 0.9)),
    "epsilon": (L.LayerNormalization, lambda la: setattr(la, "epsilon", 5.0)),
    "momentum": (L.BatchNormalization, lambda la: setattr(la, "momentum", 0.5)),
    "trainable": (
        lambda: L.BatchNormalization(center=False, scale=False),
        lambda la: setattr(la, "trainable", False),
    ),
    "activation": (lambda: L.Conv1D(3, 3, activation="relu"), lambda la: setattr(la, "activation", ops.tanh)),
    "strides": (lambda: L.Conv1D(3, 3), lambda la: setattr(la, "strides", (2,))),
    "rate": (lambda: L.Dropout(0.5), lambda la: setattr(la, "rate", 0.0)),
    "policy": (lambda: L.Dense(3), lambda la: setattr(la, "dtype_policy", "mixed_bfloat16")),
    "call": (L.ReLU, lambda la: setattr(la, "call", lambda x: 3.0 * x)),
    "closure": (lambda: L.Lambda(times_factor), lambda _: FACTOR.__setitem__(0, FACTOR[0] + 1.0)),
    "number": (Scaled, lambda la: setattr(la, "scale", 2.0)),
    "number of another type": (Scaled, lambda la: setattr(la, "scale", True)),
    "minus zero": (Scaled, lambda la: setattr(la.helper, "offset", -0.0)),
    "list": (Scaled, lambda la: la.kept.__setitem__(0, 3.0)),
    "array written in place": (Scaled, lambda la: la.table.__setitem__(0, 9.0)),
    "helper": (Scaled, lambda la: setattr(la.helper, "offset", 1.0)),
    "class": (Scaled, lambda _: setattr(Scaled, "shared", Scaled.shared + 1.0)),
    "partial": (Scaled, lambda la: setattr(la, "inner", functools.partial(ops.multiply, x2=3.0))),
}


class Slot:
    """A slot of its own, in a class above the one that is used."""

    __slots__ = "k"


class Slotted(Slot):
    __slots__ = ()


class Meta(type):
    """A class of classes."""

    k = 2.0


class OfMeta(metaclass=Meta):
    """Reads its class's class."""


class Weight(keras.Loss):
    """A loss that nobody trains by."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return y_pred


SETTINGS = ModuleType("settings_of_a_test")
SETTINGS.k = 2.0  # type: ignore[attr-defined]
sys.modules[SETTINGS.__name__] = SETTINGS
CONTEXT = ContextVar("CONTEXT", default=2.0)
HELD = SimpleNamespace(k=2.0)


@functools.lru_cache
def remembered() -> Any:
    return SimpleNamespace(k=2.0)


def rule() -> Any:
    return rule.k  # type: ignore[attr-defined]


rule.k = 2.0  # type: ignore[attr-defined]


def imported() -> Any:
    import settings_of_a_test as s

    return s.k


class Reads(L.Layer):
    """A layer that reads a number by `read`, from what it holds."""

    def __init__(self, read: Callable[[Any], Any], **held: Any) -> None:
        super().__init__()
        self.read = read
        for name, value in held.items():
            setattr(self, name, value)

    def __getitem__(self, index: int) -> Any:
        return HELD.k

    def call(self, x: Any) -> Any:
        return x * float(self.read(self))


def slotted() -> Any:
    found = Slotted()
    found.k = 2.0  # type: ignore[attr-defined]
    return found


PLACES: dict[str, tuple[Callable[[], Reads], Callable[[Any], Any]]] = {
    "key named loss": (lambda: Reads(lambda s: s.d["loss"], d={"loss": 2.0}), lambda la: la.d.__setitem__("loss", 5.0)),
    "attribute named loss": (lambda: Reads(lambda s: s.loss, loss=2.0), lambda la: setattr(la, "loss", 5.0)),
    "attribute named history": (
        lambda: Reads(lambda s: s.history, history=2.0),
        lambda la: setattr(la, "history", 5.0),
    ),
    "attribute named training": (
        lambda: Reads(lambda s: s.training, training=2.0),
        lambda la: setattr(la, "training", 5.0),
    ),
    "helper's name": (
        lambda: Reads(lambda s: s.h.name, h=SimpleNamespace(name=2.0)),
        lambda la: vars(la.h).update(name=5),
    ),
    "loss": (
        lambda: Reads(lambda s: s.h.k, h=vars(w := Weight()).update(k=2.0) or w),
        lambda la: setattr(la.h, "k", 5.0),
    ),
    "initialiser": (
        lambda: Reads(lambda s: s.h.value, h=keras.initializers.Constant(2.0)),
        lambda la: setattr(la.h, "value", 5.0),
    ),
    "bytes": (lambda: Reads(lambda s: s.h[0], h=bytearray([2])), lambda la: la.h.__setitem__(0, 5)),
    "array": (lambda: Reads(lambda s: s.h[0], h=array.array("d", [2.0])), lambda la: la.h.__setitem__(0, 5.0)),
    "UserDict": (lambda: Reads(lambda s: s.h["k"], h=UserDict(k=2.0)), lambda la: la.h.update(k=5.0)),
    "ChainMap": (lambda: Reads(lambda s: s.h["k"], h=ChainMap({}, {"k": 2.0})), lambda la: la.h.update(k=5.0)),
    "weak reference": (
        lambda: Reads(lambda s: s.h().k, h=weakref.ref(OfMeta)),
        lambda _: setattr(Meta, "k", Meta.k + 7.0),
    ),
    "lru_cache": (lambda: Reads(lambda s: remembered().k), lambda _: setattr(remembered(), "k", 5.0)),
    "of a thread": (lambda: Reads(lambda s: s.h.k, h=local(2.0)), lambda la: setattr(la.h, "k", 5.0)),
    "of a function": (lambda: Reads(lambda s: rule()), lambda _: setattr(rule, "k", 5.0)),
    "dunder": (lambda: Reads(lambda s: s[0]), lambda _: setattr(HELD, "k", HELD.k + 7.0)),
    "module": (lambda: Reads(lambda s: s.h.k, h=SETTINGS), lambda _: setattr(SETTINGS, "k", 5.0)),
    "imported": (lambda: Reads(lambda s: imported()), lambda _: setattr(SETTINGS, "k", SETTINGS.k + 7.0)),
    "slot": (lambda: Reads(lambda s: s.h.k, h=slotted()), lambda la: setattr(la.h, "k", 5.0)),
    "class of a class": (lambda: Reads(lambda s: OfMeta.k), lambda _: setattr(Meta, "k", 5.0)),
    "context": (lambda: Reads(lambda s: CONTEXT.get()), lambda _: CONTEXT.set(5.0)),
    "environment": (
        lambda: Reads(lambda s: os.environ.get("RANGER_TEST_K", 2.0)),
        lambda _: os.environ.update(RANGER_TEST_K="5"),
    ),
}


def local(k: float) -> Any:
    found = threading.local()
    found.k = k
    return found


@pytest.mark.parametrize("name", PLACES)
def test_numbers_wherever_they_are_kept(name: str) -> None:
    """In dictionaries, helpers, modules, functions and objects in C: identities follow, and come back to rest."""
    make, change = PLACES[name]
    layer = make()
    model, x = after(layer), series()
    ours, again = identity(model), identity(model)
    assert ours == again
    first = model(x)
    change(layer)
    assert apart(model(x), first) > 0.1
    assert identity(model) != ours
    os.environ.pop("RANGER_TEST_K", None)


class Remembers(L.Layer):
    """What its next call does depends on its last."""

    taken = 0

    def __init__(self, step: Callable[[Any], Any]) -> None:
        super().__init__()
        self.step, self.n, self.d, self.log, self.ema = step, 0, {"n": 0}, [], np.zeros(())
        self.it, self.queue, self.draw = itertools.count(1), [float(k) for k in range(1, 12)], np.random.default_rng(3)
        self.inner = L.ReLU()

    def call(self, x: Any) -> Any:
        return self.inner(x) * float(self.step(self))


def counted(layer: Any) -> Any:
    layer.n += 1
    return layer.n


def counted_in_class(layer: Any) -> Any:
    Remembers.taken = Remembers.taken % 4 + 1
    return Remembers.taken


def counted_inside(layer: Any) -> Any:
    layer.inner.n = getattr(layer.inner, "n", 0) + 1
    return layer.inner.n


def grown(layer: Any) -> Any:
    layer.log.append(1.0)
    return len(layer.log)


MEMORIES: dict[str, Callable[[Any], Any]] = {
    "attribute": counted,
    "dictionary": lambda s: s.d.__setitem__("n", s.d["n"] + 1) or s.d["n"],
    "list": grown,
    "array": lambda s: s.ema.__iadd__(1.0),
    "class": counted_in_class,
    "inner layer": counted_inside,
    "iterator": lambda s: next(s.it),
    "queue": lambda s: s.queue.pop(0),
    "generator": lambda s: s.draw.random(),
}


@pytest.mark.parametrize("name", MEMORIES)
def test_layers_that_remember_are_called_as_they_are(name: str) -> None:
    """Each call counts once, also where it is planned."""
    x, found = series(), []
    for regional in (False, True):
        layer = Remembers(MEMORIES[name])
        model, Remembers.taken = after(layer), 0
        model.layers[0].kernel.assign(np.ones((3, 4, 4), "float32"))
        run = ranger_nn.regionalize(model, regions=(3,)) if regional else model
        found.append([run(x) for _ in range(3)])
    assert all(apart(ours, theirs) < 1e-5 for ours, theirs in zip(*found[::-1], strict=True))


def test_notes_that_change_nothing_are_traced() -> None:
    """A cache leaves a layer on regions; a model that counts is refused by name."""

    class Notes(L.Layer):
        def call(self, x: Any) -> Any:
            self.size = x.shape
            if not hasattr(self, "table"):
                self.table = np.arange(4, dtype="float32")
            return x * self.table

    model, x = after(Notes()), series()
    plan = ranger_nn.regionalize(model, regions=(3,)).plan_for(x)
    assert "depends on its last" not in str(plan)

    class Counts(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.n = L.Conv1D(4, 3, padding="same"), 0

        def call(self, x: Any) -> Any:
            self.n += 1
            return self.conv(x) * self.n

    counts = Counts()
    counts(x)
    called = counts.n
    with pytest.raises(ranger_nn.CaptureError, match="changes n of Counts"):
        ranger_nn.regionalize(counts, regions=(3,))(x)
    assert counts.n == called


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_call_reads_is_part_of_the_identity(name: str) -> None:
    """Equal as long as nothing changes, and other as soon as something does."""
    make, change = CHANGES[name]
    layer = make()
    model = after(layer)
    before = identity(model)
    assert identity(model) == before
    change(layer)
    assert identity(model) != before


@pytest.mark.parametrize("name", ["slope", "activation", "strides", "call", "closure", "number", "helper", "class"])
def test_a_change_between_calls_counts(name: str) -> None:
    """The regional model gives what the untouched one gives now, not what it gave at its first call."""
    make, change = CHANGES[name]
    layer, x = make(), series()
    model = after(layer)
    small = ranger_nn.regionalize(model, regions=(3,))
    first = small(x)
    change(layer)
    assert tuple(small(x).shape) != tuple(first.shape) or apart(small(x), first) > 1e-3
    assert apart(small(x), model(x)) < 1e-5


def test_training_changes_nothing_of_the_identity() -> None:
    """Fitting, and new numbers in weights, make no new plan."""
    model = after(L.BatchNormalization(), L.Dropout(0.1))
    before = identity(model)
    model.compile("sgd", "mse")
    model.train_on_batch(series(), series())
    model.layers[0].kernel.assign(2.0 * model.layers[0].kernel)
    model.predict(series(), verbose=0)
    assert identity(model) == before


def test_layers_added_later_are_seen() -> None:
    """A Sequential model grows."""
    model, x = after(), series()
    small = ranger_nn.regionalize(model, regions=(3,))
    small(x)
    model.add(L.ReLU())
    assert apart(small(x), model(x)) < 1e-6


class Modes(keras.Model):
    """Tells every mode that it is called with from every other."""

    def __init__(self, default: Any = None) -> None:
        super().__init__()
        self.conv = L.Conv1D(4, 3, padding="same")

    def call(self, x: Any, training: Any = None) -> Any:
        return self.conv(x) * {"None": 1.0, "True": 2.0, "False": 3.0, "1": 4.0, "1.0": 5.0, "0": 6.0}[str(training)]


class TrainsByDefault(keras.Model):
    """A mode by default."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = L.Conv1D(4, 3, padding="same")

    def call(self, x: Any, training: Any = True) -> Any:
        return self.conv(x) * (2.0 if training else 1.0)


def test_modes_that_compare_equal() -> None:
    """None, False, True, 1, 1.0 and 0 reach `call` as they are given, and a default as Keras gives it."""
    model, x = Modes(), series()
    model(x)
    small = ranger_nn.regionalize(model, regions=(3,))
    for mode in (None, False, True, 1, 1.0, 0):
        assert apart(small(x, training=mode), model(x, training=mode)) < 1e-6, mode
    model = TrainsByDefault()
    model(x)
    small = ranger_nn.regionalize(model, regions=(3,))
    assert apart(small(x), model(x)) < 1e-6
    assert apart(small(x, training=ops.convert_to_tensor(False)), model(x, training=False)) < 1e-6
    with pytest.raises(InputError, match="leave it out for the default"):
        small(x, training=None)


def test_the_mode_goes_from_layer_to_layer_as_in_keras() -> None:
    """Keras hands the mode of the layer called before on to the next: a frozen norm turns a later dropout off."""

    class Frozen(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = L.BatchNormalization(), L.Dropout(0.9)

        def call(self, x: Any) -> Any:
            return self.drop(self.norm(x, training=False))

    model, x = Frozen(), series()
    model(x)
    small = ranger_nn.regionalize(model, regions=(3,))
    small.plan_for(x, training=True)  # planned where nothing is being called
    assert apart(small(x, training=True), model(x, training=True)) < 1e-6


def test_plans_that_are_not_used_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those used last are kept."""
    monkeypatch.setattr("ranger_nn.keras.model.PLANS", 3)
    model, x = after(L.LeakyReLU(0.1)), series()
    small = ranger_nn.regionalize(model, regions=(3,))
    for n in (0, 1, 2, 0, 3):
        model.layers[-1].negative_slope = n / 100.0
        small.plan_for(x)
        last = list(small._plans.value)[-2:]
    assert len(small._plans.value) == 3
    model.layers[-1].negative_slope = 0.0
    small.plan_for(x)
    assert list(small._plans.value)[-2:] == last[::-1]


def test_activity_regularisers_count_in_training_and_evaluation() -> None:
    """Their loss is summed up region by region."""
    model = after(L.Conv1D(3, 3, activity_regularizer="l2"), L.Dropout(0.0, activity_regularizer="l1"))
    losses = []
    for run in (model, ranger_nn.regionalize(model, regions=(3,))):
        run.compile(keras.optimizers.SGD(0.0), "mse")
        wanted = np.zeros((2, 7, 3), "float32")
        losses.append([float(run.test_on_batch(series(), wanted)), float(run.train_on_batch(series(), wanted))])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert losses[0][0] > 0.1


def held_tensors() -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]]:
    """Tensors that are no Variables: made, used and written past what counts writes."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        made = lambda: tf.Variable([2.0, 3.0, 4.0, 5.0])  # noqa: E731
        return {"variable": (made, lambda t: t * 2, lambda t: t.assign(t * 2))}
    if BACKEND == "torch":
        import torch

        plain = lambda: torch.tensor([2.0, 3.0, 4.0, 5.0])  # noqa: E731
        twice = lambda t: t.data.mul_(2)  # noqa: E731
        shared = lambda: torch.from_numpy(np.ones(4, "float32"))  # noqa: E731
        return {
            "derived": (plain, lambda t: t * 2, twice),
            "one number": (lambda: torch.tensor(2.0), lambda t: t, twice),
            "float": (plain, lambda t: float(t.sum()), twice),
            "shared with NumPy": (shared, lambda t: t + 1, lambda t: t.numpy().__imul__(2)),
            "trained": (lambda: plain().requires_grad_(), lambda t: (t * 2).detach(), twice),
        }
    return {}


@pytest.mark.parametrize("name", held_tensors())
def test_numbers_computed_from_tensors_follow_them(name: str) -> None:
    """In a plan as in the model: nothing that may change is frozen."""
    made, use, write = held_tensors()[name]

    class Uses(L.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.held = SimpleNamespace(t=made())

        def call(self, x: Any) -> Any:
            return x * use(self.held.t)

    layer, x = Uses(), series()
    model = after(layer)
    small = ranger_nn.regionalize(model, regions=(3,))
    for _ in range(2):
        assert apart(small(x), model(x)) < 1e-5
        write(layer.held.t)
    assert apart(small(x), model(x)) < 1e-5


@pytest.mark.skipif(BACKEND != "torch", reason="tensors that are trained and no Variables")
def test_tensors_of_the_back_end_get_their_gradient() -> None:
    """Prompts in a list, and parameters that Keras does not track."""
    import torch

    class Prompt(L.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.kept = [torch.ones(4, requires_grad=True)]

        def call(self, x: Any) -> Any:
            return x * self.kept[0]

    layer, x = Prompt(), ops.convert_to_tensor(series())
    model = after(layer)
    grads = []
    for run in (model, ranger_nn.regionalize(model, regions=(3,))):
        layer.kept[0].grad = None
        (run(x) ** 2).sum().backward()
        grads.append(layer.kept[0].grad.clone())
    assert apart(grads[1], grads[0]) < 1e-5


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's hooks")
def test_hooks_run_or_are_refused() -> None:
    """A layer with a hook stays whole; a model with one is refused by name."""
    model, x = after(L.ReLU()), series()
    small = ranger_nn.regionalize(model, regions=(3,))
    small(x)
    handle = model.layers[0].register_forward_hook(lambda module, given, found: 2.0 * found)
    assert apart(small(x), model(x)) < 1e-6
    handle.remove()
    model.register_forward_hook(lambda module, given, found: 2.0 * found)
    with pytest.raises(ranger_nn.CaptureError, match="has hooks"):
        small(x)
