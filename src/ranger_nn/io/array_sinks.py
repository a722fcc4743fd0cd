"""Sinks that are arrays of the caller's, filled in place. Enter at `ArraySink`, and `HeldSink` where the array may hold the input."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ranger_nn.errors import InputError, WriteError
from ranger_nn.io.protocol import Array, Box
from ranger_nn.io.rows import RowFile

BAND = 1 << 22
"""Bytes that are moved from a file to an array at once."""


class ArraySink:
    """An array-like that is filled in place: a `Sink` that lasts as long as the array."""

    path = None

    def __init__(self, array: Any, dtype: np.dtype[Any]) -> None:
        self.array, self.name = array, "the array"
        _check_array(array, dtype)

    def write(self, box: Box, pixels: Array) -> None:
        """Assign the slice."""
        index = tuple(slice(lo, hi) for lo, hi in box)
        try:
            if len(self.array.shape) == len(index):
                self.array[index] = pixels[0]
            else:
                self.array[(slice(None), *index)] = pixels
        except MemoryError:
            raise
        except Exception as error:
            raise WriteError(f"the array cannot be written at {box}: {type(error).__name__}: {error}") from error

    def durable(self) -> None:
        """The array's own affair."""

    def finish(self) -> None:
        """Nothing to rename."""

    def close(self) -> None:
        """Nothing is open."""


class HeldSink(ArraySink):
    """An array that may hold the input as well: rows wait in a file until all of the input has been read."""

    def __init__(self, array: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        super().__init__(array, dtype)
        self._folder = tempfile.TemporaryDirectory(prefix="ranger-")
        self._rows = RowFile(Path(self._folder.name) / "rows", shape, dtype)

    def write(self, box: Box, pixels: Array) -> None:
        """Put it aside."""
        self._rows.write(box, pixels)

    def finish(self) -> None:
        """Fill the array, row by row."""
        rows, *rest = self._rows.shape[1:]
        step = max(1, BAND * rows // max(1, self._rows.nbytes))
        for top in range(0, rows, step):
            box = ((top, min(top + step, rows)), *((0, n) for n in rest))
            super().write(box, self._rows.read(box))

    def close(self) -> None:
        """Remove the file."""
        self._rows.close()
        self._folder.cleanup()


def _check_array(array: Any, dtype: np.dtype[Any]) -> None:
    """Refuse an array that does not take the result as it is.

    Raises:
        InputError: read-only, or of a type that would cut numbers off.
    """
    flags = getattr(array, "flags", None)
    if flags is not None and not getattr(flags, "writeable", True):
        raise InputError("the array that the result is written to is read-only. Give one that can be written.")
    try:
        held = np.dtype(array.dtype)
    except TypeError as error:
        raise InputError(f"the array that the result is written to holds {array.dtype}, no type of NumPy's") from error
    if not np.can_cast(dtype, held, "safe") and not (dtype.kind == held.kind == "f"):
        raise InputError(
            f"the result is {dtype}, and the array that it is written to is {held}, which would cut numbers off. Give an array of "
            f"{dtype}, or reduce= that gives {held}."
        )
