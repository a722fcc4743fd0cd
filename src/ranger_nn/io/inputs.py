"""What a model is fed from the command line: a shape such as "1x3x4096x4096", or a file.

A shape stands for an input whose values do not matter (planning) or are drawn at random (running).
A file is an image or a `.npy` array:

- an image becomes (1, channels, rows, columns) in floating point, with whole numbers scaled to 0..1
  by the largest value of their type (255 for uint8, 65535 for uint16);
- a `.npy` array is taken as it is, batch axis included.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from ranger_nn.errors import InputError
from ranger_nn.io.image import DEFAULT_LIMIT, READABLE, Array, read_image
from ranger_nn.io.naming import shown

_SHAPE = re.compile(r"[0-9]{1,12}(x[0-9]{1,12})+", re.IGNORECASE)


def parse_input(text: str) -> tuple[int, ...] | Path:
    """The shape that `text` states, or the path that it names.

    Raises:
        InputError: `text` is neither a shape nor the path of a file.
    """
    path = Path(text)
    if os.path.isfile(text):  # unlike the method of a path, it takes any text
        return path
    if _SHAPE.fullmatch(text):
        return tuple(int(length) for length in text.lower().split("x"))
    if path.suffix.lower() in READABLE:
        raise InputError(f"cannot read {shown(text)!r}: there is no such file.")
    raise InputError(
        f"{shown(text)!r} is neither a file nor a shape. Give the path of an image ({', '.join(READABLE)}) "
        "or a shape such as 1x3x4096x4096."
    )


def load_input(path: str | os.PathLike[str], memory_limit: int | None = DEFAULT_LIMIT) -> Array:
    """The array that a model is fed for the file `path`, as the module's docstring states.

    Raises:
        InputError: see `read_image`.
    """
    array = read_image(path, memory_limit)
    if Path(path).suffix.lower() == ".npy":
        return array
    return _to_floating(array)[np.newaxis]


def _to_floating(array: Array) -> Array:
    if np.issubdtype(array.dtype, np.floating):
        return array
    if array.dtype == bool:
        return array.astype(np.float32)
    if np.issubdtype(array.dtype, np.unsignedinteger):
        return array.astype(np.float32) / np.float32(np.iinfo(array.dtype).max)
    raise InputError(
        f"an image of {array.dtype} has no agreed scale. Convert it to uint8, uint16 or floating point, "
        "or save the model's input as .npy."
    )
