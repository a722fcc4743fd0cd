"""What Keras keeps to itself and the adapter cannot do without: every such name is here, with its reason.

Keras records calls, attaches masks and casts Variables by names that begin with an underscore or live in `keras.src`,
and they may change with any version. One that is gone is an error that says which versions have it. Nothing else in the
adapter uses such a name (`loops_tensorflow.py` uses two of TensorFlow's, `convolve.py` one). Enter anywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from ranger_nn.errors import MissingExtraError

SUPPORTED = "keras>=3.15"
"""As in pyproject.toml."""


def _private(owner: Any, path: str) -> Any:
    """An attribute, by a dotted path."""
    found = owner
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise MissingExtraError(
                f"ranger_nn goes by {getattr(owner, '__name__', type(owner).__name__)}.{path} of Keras, which Keras "
                f"{keras.__version__} does not have: it is supported on {SUPPORTED}, tested on 3.15. Install one of these"
            ) from error
    return found


# ------------------------------------------------------------------------- calls that Keras recorded


def calls_into(operation: Any) -> list[Any]:
    """Recorded calls of a layer or operation: capture reads them, and takes its own away again."""
    return list(_private(operation, "_inbound_nodes"))


def recorded(operation: Any) -> tuple[Any, int, int]:
    """How many calls of an operation, and of its results, are recorded: see `forget`."""
    return operation, len(_private(operation, "_inbound_nodes")), len(_private(operation, "_outbound_nodes"))


def forget(operation: Any, inbound: int, outbound: int) -> None:
    """Take away what was recorded since `recorded`: there is no public way to trace a layer without leaving nodes on it."""
    del _private(operation, "_inbound_nodes")[inbound:]
    del _private(operation, "_outbound_nodes")[outbound:]


def history(tensor: Any) -> Any:
    """The call that made a symbolic tensor, or None for one that Keras did not record."""
    found = getattr(tensor, "_keras_history", None)
    if found is None or found.operation is None:
        return None
    return calls_into(found.operation)[found.node_index]


def layers_of(layer: Any) -> list[Any]:
    """A layer and every layer inside: `Model.layers` goes one level deep, and layers have no such list."""
    return list(_private(layer, "_flatten_layers")())


def seeds_of(layer: Any) -> list[Any]:
    """The variables that random layers inside draw from."""
    return [g.state for sub in layers_of(layer) for g in _private(sub, "_seed_generators")]


@contextlib.contextmanager
def readable(variables: Sequence[Any]) -> Iterator[None]:
    """On JAX `fit` takes the values out of Variables while it is traced, and a layer without `compute_output_shape` reads
    them to infer its shape: zeros stand in. No number enters a capture, which would refuse it.
    """
    empty = [v for v in variables if keras.backend.backend() == "jax" and _private(v, "_value") is None]
    for v in empty:
        v._value = np.broadcast_to(np.zeros((), keras.backend.standardize_dtype(v.dtype)), v.shape)
    try:
        yield
    finally:
        for v in empty:
            v._value = None


# --------------------------------------------------------------------------------------------- masks


def get_mask(tensor: Any) -> Any:
    """The mask attached to a tensor, or None."""
    return _private(keras, "src.backend.get_keras_mask")(tensor)


def set_mask(tensor: Any, mask: Any) -> None:
    """Attach a mask: the loss and later layers read it there, and public Keras only attaches what `compute_mask` gives."""
    _private(keras, "src.backend.set_keras_mask")(tensor, mask)


# -------------------------------------------------------------------------------------------- dtypes


def casts(variable: Any) -> bool:
    """Whether a mixed policy casts this Variable where a layer reads it (statistics of a normalisation stay as they are)."""
    return bool(_private(variable, "_autocast"))


def converts_inputs(layer: Any) -> bool:
    """Whether a layer casts its inputs to its compute dtype (preprocessing and embedding layers do not)."""
    return bool(_private(layer, "_convert_input_args"))


def cast_to(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Variables are read in `dtype`, as in a layer of a mixed policy."""
    scope: contextlib.AbstractContextManager[Any] = _private(keras, "src.backend.AutocastScope")(dtype)
    return scope


@contextlib.contextmanager
def torch_device() -> Iterator[None]:
    """PyTorch's device of the process: Keras may be on the meta device, where it only builds."""
    from keras.src.backend.torch import core

    with keras.device(_private(core, "DEFAULT_DEVICE")):
        yield
