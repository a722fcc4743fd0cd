"""A raw array in a file, written at its places without holding it: `.npy`, and the store of what is not finished.

header | channel 0: row 0, row 1, ... | channel 1: ...        each strip goes to its offset by pwrite

`sum` is a checksum of all that was written, in the order in which it was: a run that goes on holds the file to it.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ranger_nn.errors import InputError, WriteError
from ranger_nn.io.protocol import Array, Box

ANEW = "the unfinished run cannot go on. Start anew: overwrite=True (--overwrite)."


class RowFile:
    """An array (channels, rows, ...) in a file, made anew or gone on with.

    Args:
        path: the file.
        shape: of the array.
        dtype: of its elements.
        header: bytes before the array.
        again: the file is there and is gone on with.

    Raises:
        InputError: what is to be gone on with is missing, or has another size or header.
        WriteError: the place cannot be written.
    """

    def __init__(self, path: Path, shape: Sequence[int], dtype: Any, header: bytes = b"", again: bool = False) -> None:
        self.path, self.shape, self.dtype, self._start = path, tuple(shape), np.dtype(dtype), len(header)
        self.sum = 0
        flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | (0 if again else os.O_CREAT | os.O_TRUNC)
        try:
            self._file = os.open(path, flags, 0o666)
        except OSError as error:
            if again and isinstance(error, FileNotFoundError):
                raise InputError(f"{str(path)!r} is missing: {ANEW}") from error
            raise unwritten(path, error) from error
        try:
            if again:
                self._check(header)
                return
            _write_all(self._file, memoryview(header), 0)
            os.ftruncate(self._file, self._start + self.nbytes)
        except OSError as error:
            self.close()
            raise unwritten(path, error) from error
        except InputError:
            self.close()
            raise

    def _check(self, header: bytes) -> None:
        """The file is one of ours and whole in size; what it holds is the affair of `verify`."""
        found, expected = os.fstat(self._file), self._start + self.nbytes
        if not stat.S_ISREG(found.st_mode) or found.st_size != expected:
            raise InputError(f"{str(self.path)!r} has {found.st_size} bytes, not {expected}: {ANEW}")
        if os.pread(self._file, self._start, 0) != header:
            raise InputError(f"{str(self.path)!r} begins as the file of another array: {ANEW}")

    def verify(self, expected: int, boxes: Iterable[Box]) -> None:
        """Take up the checksum of an earlier run, which wrote `boxes` in this order.

        Raises:
            InputError: the file holds something else.
        """
        self.sum = 0
        for box in boxes:
            self.sum = zlib.crc32(_bytes(self.read(box)), self.sum)
        if self.sum != expected:
            raise InputError(f"{str(self.path)!r} does not hold what was written there: {ANEW}")

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
        try:
            for k, offset in enumerate(offsets):
                _write_all(self._file, view[k * length : (k + 1) * length], offset)
        except OSError as error:
            raise unwritten(self.path, error) from error
        self.sum = zlib.crc32(view, self.sum)

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
        try:
            os.fdatasync(self._file)
        except OSError as error:
            raise unwritten(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def unwritten(path: Path, error: Exception) -> WriteError:
    """The error of a file that could not be written."""
    found = WriteError(
        f"cannot write {str(path)!r}: {getattr(error, 'strerror', None) or error}. What is done stays: make room, or make the "
        "folder writable, and give the same call again."
    )
    found.errno = getattr(error, "errno", None)
    return found


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
