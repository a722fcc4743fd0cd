"""A raw array in a file, written at its places without holding it: `.npy`, and the store of what is not finished.

header | channel 0: row 0, row 1, ... | channel 1: ...        each strip goes to its offset by pwrite
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ranger_nn.errors import InputError
from ranger_nn.io.protocol import Array, Box


class RowFile:
    """An array (channels, rows, ...) in a file, made anew or gone on with.

    Args:
        path: the file.
        shape: of the array.
        dtype: of its elements.
        header: bytes before the array.
        again: the file is there and is gone on with.

    Raises:
        InputError: the place cannot be written.
    """

    def __init__(self, path: Path, shape: Sequence[int], dtype: Any, header: bytes = b"", again: bool = False) -> None:
        self.path, self.shape, self.dtype, self._start = path, tuple(shape), np.dtype(dtype), len(header)
        flags = os.O_RDWR | (0 if again else os.O_CREAT | os.O_TRUNC)
        try:
            self._file = os.open(path, flags, 0o666)
        except OSError as error:
            raise InputError(
                f"cannot write {str(path)!r}: {error.strerror}. Choose a folder that can be written."
            ) from error
        if not again:
            os.pwrite(self._file, header, 0)
            os.ftruncate(self._file, self._start + self.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return prod(self.shape) * self.dtype.itemsize

    def _runs(self, box: Box) -> tuple[list[int], int]:
        """(byte offsets, bytes) of the contiguous runs that make up (all channels, *box)."""
        sizes = self.shape[1:]
        last = max((d for d, (lo, hi) in enumerate(box) if hi - lo < sizes[d]), default=0)
        length = prod(hi - lo for lo, hi in box[last:]) * self.dtype.itemsize
        starts = [0]
        for d in range(last):
            starts = [s * sizes[d] + i for s in starts for i in range(*box[d])]
        rest = prod(sizes[last + 1 :])
        plane = prod(sizes)
        at = [c * plane + (s * sizes[last] + box[last][0]) * rest for c in range(self.shape[0]) for s in starts]
        return [self._start + a * self.dtype.itemsize for a in at], length

    def write(self, box: Box, pixels: Array) -> None:
        """Put (channels, *lengths of box) in place."""
        offsets, length = self._runs(box)
        view = _bytes(np.ascontiguousarray(pixels, self.dtype))
        for k, offset in enumerate(offsets):
            _write_all(self._file, view[k * length : (k + 1) * length], offset)

    def read(self, box: Box) -> Array:
        """(channels, *lengths of box)."""
        out = np.empty((self.shape[0], *(hi - lo for lo, hi in box)), self.dtype)
        view = _bytes(out)
        offsets, length = self._runs(box)
        for k, offset in enumerate(offsets):
            _read_all(self._file, view[k * length : (k + 1) * length], offset)
        return out

    def read_channel(self, channel: int, box: Box) -> Array:
        """(lengths of box) of one channel."""
        out = np.empty([hi - lo for lo, hi in box], self.dtype)
        view = _bytes(out)
        offsets, length = self._runs(box)
        runs = len(offsets) // self.shape[0]
        for k, offset in enumerate(offsets[channel * runs : (channel + 1) * runs]):
            _read_all(self._file, view[k * length : (k + 1) * length], offset)
        return out

    def sync(self) -> None:
        """To the disk."""
        os.fdatasync(self._file)

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _bytes(array: Array) -> memoryview:
    """The memory of a contiguous array, byte by byte."""
    return memoryview(array.reshape(-1).view(np.uint8).data) if array.size else memoryview(b"")


def _write_all(file: int, view: memoryview, offset: int) -> None:
    while view:
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done


def _read_all(file: int, view: memoryview, offset: int) -> None:
    while view:
        done = os.preadv(file, [view], offset)
        if done == 0:
            raise OSError(f"the file ends before byte {offset + len(view)}")
        view, offset = view[done:], offset + done


def npy_header(shape: Sequence[int], dtype: Any) -> bytes:
    """The header of a `.npy` file."""
    from io import BytesIO

    out = BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(out, described)
    return out.getvalue()
