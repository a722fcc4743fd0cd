"""What `Regional.export` does beyond `keras.Model.export`: sizes, loops that a format can hold, and clear refusals.

    back end      tf_saved_model           onnx                    torch (.pt2)        litert
    tensorflow    a loop                   written out             -                   by TensorFlow's converter
    jax           a loop                   written out             -                   -
    torch         needs torch_xla          written out             written out         -

Enter at `exporting`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, cast

import keras
from keras import tree

from ranger_nn.errors import MissingExtraError
from ranger_nn.keras.loops import Loops, tracing

NEEDED = {
    ("tensorflow", "onnx"): "tf2onnx",
    ("torch", "onnx"): "onnxscript",
    ("jax", "onnx"): "jax2onnx",
    ("jax", "tf_saved_model"): "tensorflow",
    ("torch", "tf_saved_model"): "torch_xla",
}
"""The package through which Keras writes a format from a back end."""


def check(model: Any, format: str) -> None:
    """Refuse a format whose package is not there, before anything is traced."""
    backend = keras.backend.backend()
    needed = NEEDED.get((backend, format))
    if needed is None or find_spec(needed) is not None:
        return
    other = "tensorflow" if backend != "tensorflow" else "torch"
    raise MissingExtraError(
        f"Keras writes {format!r} from the back end {backend} through the package {needed}, which is not installed: install "
        f"it, or save {model.name} to a .keras file, load it in a process with KERAS_BACKEND={other} (the file holds "
        "weights and options alike) and export it there"
    )


def signature(model: Any, shapes: Any, format: str) -> list[Any] | None:
    """An input signature from the shapes of the first call; the batch is open where the format and the back end hold a loop over samples, else one.

    None: as Keras itself does.
    """
    if shapes is None:
        return None
    open_batch = keras.backend.backend() == "tensorflow" and format == "tf_saved_model"
    batch = None if open_batch else 1
    given = getattr(model.untouched, "inputs", None)
    names = iter(given if given is not None else [])

    def spec(shape: Any) -> Any:
        known = next(names, None)
        dtype = model.input_dtype if known is None else known.dtype
        return keras.InputSpec(shape=(batch, *shape[1:]), dtype=dtype, name=None if known is None else known.name)

    return [tree.map_shape_structure(spec, shapes)]


@contextlib.contextmanager
def exporting(model: Any, unrolled: Any, format: str) -> Iterator[None]:
    """Plans made while this is open have loops that the format can hold; `unrolled.value` says so to the model."""
    unrolled.value = keras.backend.backend() != "torch" and format == "onnx"  # PyTorch's loops are written out anyway
    try:
        with tracing(gradients=format != "onnx", executor=False):  # ONNX holds no gradients
            yield
    finally:
        unrolled.value = False


def unrolled() -> Loops:
    """Loops that are written out, step by step."""
    from ranger_nn.keras.loops_unrolled import UnrolledLoops

    return cast(Loops, UnrolledLoops())
