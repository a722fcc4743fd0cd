"""What is read and written region by region: two protocols, which everything else here fulfils or takes.

    Source   pixels (channels, rows, columns) or (channels, depth, rows, columns), read by box
    Sink     the same shape, written by box, that takes its final name only when it is whole

Boxes are over the spatial axes; channels are always all there. The boundary exists because files are large, slow and
untrusted, and arrays are none of it: a run knows only these two.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ranger_nn.errors import InputError

Array = NDArray[Any]
Box = tuple[tuple[int, int], ...]


class Source(Protocol):
    """Pixels that are read region by region.

    Attributes:
        name: for messages.
        shape: (channels, *spatial).
        dtype: of the pixels.
        chunks: spatial sizes of what the store decodes at once; the spatial shape itself where it is one piece.
        resident: bytes that the source holds in memory all the time.
        batched: the array has a batch axis of one, as a model's own input (`.npy`): its values are taken as they are.
        depth: bits of unsigned integers where their type does not tell (12 in uint16); None: the type tells.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...]
    resident: int
    batched: bool
    depth: int | None

    def read(self, box: Box) -> Array:
        """(channels, *lengths of box); the caller may write into it."""
        ...

    def identity(self) -> dict[str, Any]:
        """What tells this input from another one: plain data for the journal."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


class Sink(Protocol):
    """An array that is written region by region, rows in order, each once.

    Attributes:
        name: for messages.
    """

    name: str

    def write(self, box: Box, pixels: Array) -> None:
        """Put (channels, *lengths of box) in place."""
        ...

    def durable(self) -> None:
        """Everything written so far survives the end of this process."""
        ...

    def finish(self) -> None:
        """Take the final name: the array is whole."""
        ...

    def close(self) -> None:
        """Let go of the file as it is; `finish` is not needed before."""
        ...


class BadRegionError(InputError):
    """A region of the input cannot be read. Repair the file, or ask for such regions to be skipped."""


def nbytes(box: Box, channels: int, itemsize: int) -> int:
    """Bytes of a region."""
    total = channels * itemsize
    for lo, hi in box:
        total *= hi - lo
    return total


def clipped(index: tuple[int, ...], chunks: tuple[int, ...], sizes: tuple[int, ...]) -> Box:
    """The box of one chunk, cut at the ends of the array."""
    return tuple((i * c, min((i + 1) * c, n)) for i, c, n in zip(index, chunks, sizes, strict=True))
