"""Read each piece of a store once: pieces that are decoded as a whole wait for the rows that come next.

    box        rows 70 .. 148 of all columns
    chunks     0 .. 64 | 64 .. 128 | 128 .. 192        the last one is kept: the next box begins in it

`taken` counts the bytes decoded. Pieces that end inside of the box that was asked for last are let go. A piece that
cannot be read is an error that names it, or, if asked for, is filled with zeros and listed. Enter at `Reader.read`.
"""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np

from ranger_nn.errors import InputError
from ranger_nn.io.protocol import Array, BadRegionError, Box, Source, clipped, nbytes


class Reader:
    """One pass, or several, over a source.

    Args:
        source: what is read.
        limit: most bytes of one piece of the store, decoded; None: no limit.
        skip_bad: fill what cannot be read with zeros and list it in `bad`.

    Raises:
        InputError: a piece of the store is larger than `limit`.
    """

    def __init__(self, source: Source, limit: int | None = None, skip_bad: bool = False) -> None:
        self.source, self.skip_bad = source, skip_bad
        self.sizes = source.shape[1:]
        self.channels = source.shape[0]
        self.taken = 0
        self.bad: list[Box] = []
        self._kept: dict[tuple[int, ...], Array] = {}
        self._check(limit)

    @property
    def held(self) -> int:
        """Bytes that may wait here: two rows of pieces across all columns, and what the source itself holds."""
        if self._in_one_piece():
            return self.source.resident
        rows = tuple((0, min(2 * c, n)) for c, n in zip(self.source.chunks[:1], self.sizes[:1], strict=True))
        across = tuple((0, n) for n in self.sizes[1:])
        return self.source.resident + nbytes(rows + across, self.channels, self.source.dtype.itemsize)

    def _in_one_piece(self) -> bool:
        return self.source.chunks == (1,) * len(self.sizes)

    def _check(self, limit: int | None) -> None:
        piece = min(prod(self.source.chunks), prod(self.sizes)) * self.channels * self.source.dtype.itemsize
        if limit is None or max(piece, self.source.resident) <= limit:
            return
        raise InputError(
            f"{self.source.name} keeps its pixels in pieces of {'x'.join(map(str, self.source.chunks))}, which take "
            f"{max(piece, self.source.resident)} bytes when decoded; the memory allowed for reading is {limit} bytes. "
            "Save it as a tiled TIFF or Zarr with tiles of 256 x 256, or allow more memory."
        )

    def read(self, box: Box) -> Array:
        """(channels, *lengths of box), its own memory.

        Raises:
            BadRegionError: a piece cannot be read, and `skip_bad` is off.
        """
        if self._in_one_piece():
            self.taken += nbytes(box, self.channels, self.source.dtype.itemsize)
            return self._attempt(box)
        chunks = self.source.chunks
        out = np.empty((self.channels, *(hi - lo for lo, hi in box)), self.source.dtype)
        before, self._kept = self._kept, {}
        for index in product(*(range(lo // c, -(-hi // c)) for (lo, hi), c in zip(box, chunks, strict=True))):
            place = clipped(index, chunks, self.sizes)
            piece = before.pop(index, None)
            if piece is None:
                piece = self._attempt(place)
                self.taken += piece.nbytes
            _paste(out, box, piece, place)
            if any(stop > hi for (_, stop), (_, hi) in zip(place, box, strict=True)):
                self._kept[index] = piece
        return out

    def _attempt(self, box: Box) -> Array:
        try:
            return self.source.read(box)
        except BadRegionError:
            if not self.skip_bad:
                raise
            self.bad.append(box)
            return np.zeros((self.channels, *(hi - lo for lo, hi in box)), self.source.dtype)


def _paste(out: Array, box: Box, piece: Array, place: Box) -> None:
    """Copy what `piece` at `place` shares with `box`."""
    to, cut = [slice(None)], [slice(None)]
    for (lo, hi), (a, b) in zip(box, place, strict=True):
        start, stop = max(lo, a), min(hi, b)
        to.append(slice(start - lo, stop - lo))
        cut.append(slice(start - a, stop - a))
    out[tuple(to)] = piece[tuple(cut)]
