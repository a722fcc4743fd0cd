"""Exported artefacts: run by their stock runtimes, with the numbers of the untouched model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import ranger_nn
from ranger_nn.errors import MissingExtraError
from ranger_nn.keras import exporting
from tests.keras.nets import images, net
from tests.keras.regions import apart

BACKEND = keras.backend.backend()

WORKS = {
    "tensorflow": ("tf_saved_model", "onnx", "litert"),
    "jax": ("tf_saved_model", "onnx"),
    "torch": ("onnx", "torch"),
}[BACKEND]
"""As documented; ONNX from JAX only where jax2onnx is installed."""

FILES = {"tf_saved_model": "small", "onnx": "small.onnx", "torch": "small.pt2", "litert": "small.tflite"}


def _saved_model(path: Path, *given: Any) -> Any:
    import tensorflow as tf

    served = tf.saved_model.load(path)
    return served.serve(given[0] if len(given) == 1 else list(given))


def _onnx(path: Path, *given: Any) -> Any:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path)
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], given, strict=True)))


def _torch(path: Path, *given: Any) -> Any:
    import torch

    program = torch.export.load(path).module()
    return program(*map(torch.as_tensor, given))


def _litert(path: Path, *given: Any) -> Any:
    import tensorflow as tf

    lite = tf.lite.Interpreter(str(path))
    lite.allocate_tensors()
    for place, x in zip(lite.get_input_details(), given, strict=True):
        lite.set_tensor(place["index"], x)
    lite.invoke()
    return [lite.get_tensor(place["index"]) for place in lite.get_output_details()]


RUN: dict[str, Callable[..., Any]] = {
    "tf_saved_model": _saved_model,
    "onnx": _onnx,
    "torch": _torch,
    "litert": _litert,
}


def exported(small: keras.Model, format: str, folder: Path, *given: Any, **options: Any) -> Any:
    """What the stock runtime makes of the artefact."""
    needed = exporting.NEEDED.get((BACKEND, format))
    if needed is not None:
        pytest.importorskip(needed)
    small.export(folder / FILES[format], format=format, verbose=False, **options)
    found = RUN[format](folder / FILES[format], *given)
    return found[0] if isinstance(found, list | tuple) and len(found) == 1 else found


def batch_sizes(path: Path) -> list[Any]:
    """The first size of each input of an ONNX file."""
    runtime = pytest.importorskip("onnxruntime")
    return [i.shape[0] for i in runtime.InferenceSession(path).get_inputs()]


@pytest.mark.parametrize("format", WORKS)
def test_exported(format: str, tmp_path: Path) -> None:
    """For the size of the first call; three sweeps, each with its loop."""
    # ONNX Runtime refuses the pooling that jax2onnx writes, in untouched models too
    model = net(pooled=(BACKEND, format) != ("jax", "onnx"))
    small = ranger_nn.regionalize(model, regions=(8,))
    x = images(1)
    small(x)
    assert apart(exported(small, format, tmp_path, x), model(x)) < 1e-5
    assert apart(small.predict(images(2), verbose=0), model(images(2))) < 1e-5  # it goes on as before


@pytest.mark.parametrize("format", WORKS[:1])
def test_exported_for_a_batch(format: str, tmp_path: Path) -> None:
    """Of two images of another size, as the signature says, with the mean of each channel subtracted."""
    inputs = keras.Input((None, None, 3))
    x = L.Conv2D(4, 3, padding="same")(inputs)
    model = keras.Model(inputs, x - ops.mean(x, axis=(1, 2), keepdims=True))
    small = ranger_nn.regionalize(model, regions=(8,))
    small(images(1))
    x = images(2, rows=32)
    signature = [keras.InputSpec(shape=x.shape, dtype="float32")]
    assert apart(exported(small, format, tmp_path, x, input_signature=signature), model(x)) < 1e-5


@pytest.mark.skipif(BACKEND != "tensorflow", reason="Keras exports an open batch from TensorFlow alone")
def test_an_open_batch(tmp_path: Path) -> None:
    """A SavedModel takes any number of samples, and never runs two at a time."""
    model = net()
    small = ranger_nn.regionalize(model, regions=(8,))
    small(images(1))
    assert apart(exported(small, "tf_saved_model", tmp_path, images(3)), model(images(3))) < 1e-5


def test_two_inputs_and_outputs(tmp_path: Path) -> None:
    """Lists stay lists."""
    first, second = keras.Input((16, 12, 3)), keras.Input((16, 12, 2))
    x = L.Conv2D(4, 3, padding="same")(first)
    model = keras.Model([first, second], [x, L.Concatenate()([x, second])])
    small = ranger_nn.regionalize(model, regions=(4,))
    rng = np.random.default_rng(0)
    given = [rng.standard_normal((1, 16, 12, n)).astype("float32") for n in (3, 2)]
    small(given)
    found = exported(small, WORKS[0], tmp_path, *given)
    for ours, theirs in zip(found, model(given), strict=True):
        assert apart(ours, theirs) < 1e-5


@pytest.mark.parametrize(("backend", "format"), [("torch", "tf_saved_model"), ("jax", "onnx"), ("tensorflow", "onnx")])
def test_a_package_that_is_missing(backend: str, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package and the way around it."""
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    monkeypatch.setattr(keras.backend, "backend", lambda: backend)
    other = "torch" if backend == "tensorflow" else "tensorflow"
    with pytest.raises(
        MissingExtraError, match=rf"{exporting.NEEDED[backend, format]}.*\.keras.*KERAS_BACKEND={other}"
    ):
        exporting.check(net(), format)
