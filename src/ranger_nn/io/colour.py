"""What the numbers of a TIFF mean: its header may say that they are indices, inks, or upside down.

    stored (channels, rows, columns) --Colour--> the numbers that a PNG or JPEG of the same picture gives --Upright--> as it is seen

Palette, CMYK, MinIsWhite, few bits and premultiplied alpha become what Pillow makes of them; what has no one agreed meaning
here (Lab, raw mosaics, uncompressed YCbCr) is refused by name. Enter at `colour_of`; `seen` wraps a source.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from ranger_nn.errors import InputError
from ranger_nn.io.protocol import Array, Box, Source

MIN_IS_WHITE, MIN_IS_BLACK, RGB, PALETTE, MASK, SEPARATED, YCBCR = 0, 1, 2, 3, 4, 5, 6
PHOTOMETRIC = {MASK: "a transparency mask", SEPARATED: "inks", YCBCR: "YCbCr", 8: "CIE Lab", 9: "ICC Lab", 10: "ITU Lab", 32803: "a raw mosaic of colour filters", 34892: "raw linear colours"}  # fmt: skip
JPEG = (6, 7, 34892)
"""Compressions by TIFF number whose decoder turns YCbCr into RGB itself."""
INK_SET, NUMBER_OF_INKS, DOT_RANGE, ORIENTATION = 332, 334, 336, 274
PREMULTIPLIED = 1
"""Of ExtraSamples: alpha by which the colours are multiplied already."""
FEW_BITS = (1, 2, 4)
"""Become 0 to 255, as in PNG."""
WHOLE_BITS = (8, 16, 32, 64)
TURNS = {2: (0, 0, 1), 3: (0, 1, 1), 4: (0, 1, 0), 5: (1, 0, 0), 6: (1, 0, 1), 7: (1, 1, 1), 8: (1, 1, 0)}
"""Orientation -> (rows and columns change places, then rows run backwards, columns run backwards)."""


@dataclass(frozen=True)
class Colour:
    """From stored numbers to those that are meant.

    Attributes:
        kind: "plain", "white" (small numbers are bright), "palette", "inks", "premultiplied".
        bits: of a sample, of unsigned integers; 0: no such.
        colours: channels that are colours; what follows are extra samples.
        table: of a palette: (3, entries), uint8.
        orientation: 1 to 8, as in EXIF.
    """

    kind: str = "plain"
    bits: int = 0
    colours: int = 0
    table: Array | None = None
    orientation: int = 1

    @property
    def plain(self) -> bool:
        """The stored numbers are what is meant, at their places."""
        return self.kind == "plain" and self.orientation == 1 and self.bits not in FEW_BITS

    @property
    def depth(self) -> int | None:
        """Bits of unsigned integers that their type does not tell: the largest value is 2**bits - 1."""
        return self.bits if self.bits and self.bits not in (*FEW_BITS, *WHOLE_BITS) and self.kind != "palette" else None

    def channels(self, stored: int) -> int:
        """Channels that are seen."""
        return {"palette": 3, "inks": 3}.get(self.kind, stored)

    def dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        """Type of what is seen."""
        return np.dtype(np.uint8) if self.kind == "palette" or self.bits in FEW_BITS else stored

    def apply(self, x: Array) -> Array:
        """(channels that are seen, ...) from (stored channels, ...)."""
        if self.table is not None:
            return np.ascontiguousarray(self.table[:, x[0]])
        if self.bits in FEW_BITS:
            x = x.astype(np.uint8) * np.uint8(255 // (2**self.bits - 1))
        if self.kind == "white":
            top = np.array(255 if self.bits in FEW_BITS else 2**self.bits - 1, x.dtype)
            x = np.concatenate([top - x[: self.colours], x[self.colours :]])
        if self.kind == "inks":
            return _rgb_of_inks(x)
        return _divided(x) if self.kind == "premultiplied" else x

    def turned(self, x: Array) -> Array:
        """Upright, of (..., rows, columns)."""
        swap, rows, columns = TURNS.get(self.orientation, (0, 0, 0))
        x = np.swapaxes(x, -1, -2) if swap else x
        x = x[..., ::-1, :] if rows else x
        return x[..., ::-1] if columns else x


def _rgb_of_inks(x: Array) -> Array:
    """255 less black, less what the ink leaves of that: the rounding is Pillow's."""
    light = 255 - x[3].astype(np.int32)
    product = x[:3].astype(np.int32) * light + 128
    return np.asarray(np.clip(light - (((product >> 8) + product) >> 8), 0, 255), np.uint8)


def _divided(x: Array) -> Array:
    """Colours by alpha, as Pillow does: nothing where alpha is 0."""
    alpha = x[3:4].astype(np.int32)
    colours = np.where(alpha > 0, np.minimum(255, x[:3].astype(np.int32) * 255 // np.maximum(alpha, 1)), 0)
    return np.concatenate([colours.astype(np.uint8), x[3:]])


def colour_of(page: Any, name: str, pages: int = 1) -> Colour:
    """What the header of `page` (of tifffile) says.

    Raises:
        InputError: something that is not taken here.
    """
    photometric = int(page.photometric)
    tag = {n: page.tags[n].value for n in (INK_SET, NUMBER_OF_INKS, DOT_RANGE, ORIENTATION) if n in page.tags}
    turn = tag.get(ORIENTATION, 1)
    turn = turn if turn in TURNS else 1
    unsigned = int(page.sampleformat) == 1 if isinstance(page.sampleformat, int) else False
    bits = page.bitspersample if isinstance(page.bitspersample, int) and unsigned else 0
    found = Colour("plain", bits, int(page.samplesperpixel) - len(page.extrasamples), None, turn)
    if photometric == MIN_IS_BLACK:
        return found
    if photometric == MIN_IS_WHITE:
        if not bits:
            raise _refused(
                name, f"says that its smallest numbers are white, and holds {page.dtype}, which has no largest one"
            )
        return replace(found, kind="white")
    if photometric == RGB:
        return _rgb(page, found, name)
    if photometric == PALETTE:
        return _palette(page, found, name, pages)
    if photometric == SEPARATED:
        return _inks(page, found, tag, name)
    if photometric == YCBCR and int(page.compression) in JPEG:
        return found
    said = PHOTOMETRIC.get(photometric, f"a colour space of number {photometric}")
    raise _refused(name, f"holds {said}" + (" without JPEG" if photometric == YCBCR else ""))


def _rgb(page: Any, found: Colour, name: str) -> Colour:
    if not any(int(e) == PREMULTIPLIED for e in page.extrasamples):
        return found
    if found.bits != 8 or page.samplesperpixel != 4:
        raise _refused(
            name, f"holds colours that are multiplied by alpha, in {page.samplesperpixel} samples of {page.dtype}"
        )
    return replace(found, kind="premultiplied")


def _palette(page: Any, found: Colour, name: str, pages: int) -> Colour:
    table = page.colormap
    if table is None or page.samplesperpixel != 1 or not found.bits or table.shape[-1] < 2**found.bits:
        raise _refused(name, "says that it has a palette, and has none for all its indices")
    if pages > 1:
        raise _refused(name, f"has {pages} pages with a palette each")
    return replace(found, kind="palette", table=np.asarray(np.asarray(table) // 256, np.uint8))


def _inks(page: Any, found: Colour, tag: dict[int, Any], name: str) -> Colour:
    dots = tag.get(DOT_RANGE, (0, 255))
    usual = tag.get(INK_SET, 1) == 1 and tag.get(NUMBER_OF_INKS, 4) == 4 and tuple(np.ravel(dots)[:2]) == (0, 255)
    if not usual or page.samplesperpixel != 4 or found.bits != 8:
        raise _refused(
            name, f"holds inks other than four of 8 bits, of 0 to 255 ({page.samplesperpixel} of {page.dtype})"
        )
    return replace(found, kind="inks", colours=3)


def _refused(name: str, what: str) -> InputError:
    return InputError(f"{name} {what}: that is not taken here. Convert it to RGB or grey values.")


class Seen:
    """A source as its header says that it is to be seen.

    Args:
        inner: gives the numbers as they are stored.
        colour: what they mean.
    """

    def __init__(self, inner: Source, colour: Colour) -> None:
        self.inner, self.colour, self.name = inner, colour, inner.name
        self.path, self.batched, self.resident = getattr(inner, "path", None), inner.batched, inner.resident
        self._swap, self._rows, self._columns = TURNS.get(colour.orientation, (0, 0, 0))
        self.dtype, self.depth = colour.dtype(inner.dtype), colour.depth
        self.shape = (colour.channels(inner.shape[0]), *self._swapped(inner.shape[1:]))
        self.chunks = self._swapped(inner.chunks)

    def _swapped(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return (*sizes[:-2], sizes[-1], sizes[-2]) if self._swap else sizes

    def read(self, box: Box) -> Array:
        """(channels, *lengths of box)."""
        *front, rows, columns = box
        height, width = self.shape[-2:]
        rows = (height - rows[1], height - rows[0]) if self._rows else rows
        columns = (width - columns[1], width - columns[0]) if self._columns else columns
        stored = (*front, columns, rows) if self._swap else (*front, rows, columns)
        return np.ascontiguousarray(self.colour.turned(self.colour.apply(self.inner.read(stored))))

    def geography(self) -> dict[str, Any] | None:
        """That of the file, which has no other orientation: see `seen`."""
        found: dict[str, Any] | None = self.inner.geography()  # type: ignore[attr-defined]
        return found

    def notes(self) -> list[str]:
        """What else the header says."""
        found: list[str] = self.inner.notes()  # type: ignore[attr-defined]
        return found

    def identity(self) -> dict[str, Any]:
        """That of the file."""
        return self.inner.identity() | {
            "seen": f"{self.colour.kind} {self.colour.orientation}",
            "size": list(self.shape),
        }

    def close(self) -> None:
        """Close the file."""
        self.inner.close()


def seen(inner: Any, colour: Colour) -> Source:
    """The source as it is to be seen.

    Raises:
        InputError: it is turned, and has a place on the earth as well.
    """
    if colour.orientation != 1 and inner.geography() is not None:
        raise _refused(
            inner.name, f"has orientation {colour.orientation} and a place on the earth, which contradict each other"
        )
    return inner if colour.plain else Seen(inner, colour)


def seen_bytes(colour: Colour, shape: tuple[int, ...], stored: int, dtype: np.dtype[Any]) -> int:
    """Bytes of a whole picture, where `stored` channels among `shape` become those that are seen."""
    return (
        prod(shape)
        // max(1, stored)
        * max(stored, colour.channels(stored))
        * max(dtype.itemsize, colour.dtype(dtype).itemsize)
    )
