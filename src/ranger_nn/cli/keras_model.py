"""A `.keras` file as MODEL: runs from file to file alone take it, on the back end that KERAS_BACKEND names.

Nothing of Keras is imported before a command runs. Enter at `load_keras`.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from ranger_nn.errors import InputError, MissingExtraError


def is_keras(chosen: argparse.Namespace) -> bool:
    """Whether MODEL is a file of Keras's."""
    return str(chosen.model).lower().endswith(".keras")


def load_keras(chosen: argparse.Namespace) -> Any:
    """The model; no code out of the file is run (`safe_mode`).

    Raises:
        InputError: no such file, one that Keras cannot load, or an option that is PyTorch's alone.
        MissingExtraError: there is no Keras.
    """
    for name in ("dtype", "threads"):
        if getattr(chosen, name) is not None:
            raise InputError(f"--{name} is for PyTorch's models: a .keras file says its own, and its back end decides")
    path = Path(chosen.model)
    if not path.is_file():
        raise InputError(f"MODEL {chosen.model!r}: there is no such file.")
    try:
        keras = importlib.import_module("keras")
    except ImportError as error:
        raise MissingExtraError(
            "a .keras file needs Keras, which is not installed, or its back end, which KERAS_BACKEND names. Install them with: "
            "pip install 'ranger-nn[keras]' and tensorflow, jax or torch"
        ) from error
    importlib.import_module("ranger_nn.keras")  # a regional model in the file is known by its class
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:
        raise InputError(f"MODEL {chosen.model!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
