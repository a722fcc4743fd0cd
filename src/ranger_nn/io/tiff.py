"""TIFF, BigTIFF and OME-TIFF read tile by tile through tifffile.

    series (C, Y, X)         pages = channels, or depth, or both; a page has tiles or strips
    read(box)                the segments that overlap it, decoded one by one

Files are untrusted: only compressions whose growth is bounded are decoded, sizes that a header claims are held against
the memory before anything is decoded, and the paths of other files that OME metadata may name are not followed. Enter at
`TiffSource`.
"""

from __future__ import annotations

import re
import threading
import zlib
from collections.abc import Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ranger_nn.errors import InputError
from ranger_nn.io.arrays import file_identity
from ranger_nn.io.colour import colour_of
from ranger_nn.io.extras import import_extra
from ranger_nn.io.protocol import Array, BadRegionError, Box

DEFLATE = (8, 32946)
DECODED = {1: "none", 5: "LZW", 7: "JPEG", **dict.fromkeys(DEFLATE, "deflate"), 32773: "PackBits"}
"""Compressions by TIFF number: those whose output is bounded by what can be checked before decoding."""
SAFE_GROWTH = 3000
"""No more than this many bytes come out of one byte of LZW or deflate."""
JPEG_SIZES = range(0xC0, 0xD0)
JPEG_NO_SIZE = (0xC4, 0xC8, 0xCC)


class DamagedError(InputError):
    """tifffile cannot make sense of the file; another reader may."""


class TiffSource:
    """The first series of a TIFF, or the pyramid level asked for.

    Args:
        path: the file.
        level: of a pyramid, 0 the largest.

    Raises:
        InputError: damaged, axes that are no picture or volume, colours that are not taken.
        MissingExtraError: tifffile is not installed.

    Its numbers are as they are stored; `colour` says what they mean.
    """

    batched = False
    resident = 0

    def __init__(self, path: Path, level: int = 0) -> None:
        self.path, self.name = path, repr(str(path))
        tifffile = import_extra("tifffile", "images", "TIFF files")
        try:
            self._file = tifffile.TiffFile(path, _multifile=False)
            series = self._file.series[0]
        except Exception as error:
            raise DamagedError(f"cannot read {self.name}: {error}. The file is damaged or is no TIFF.") from error
        if not 0 <= level < len(series.levels):
            raise InputError(
                f"{self.name} has {len(series.levels)} pyramid levels, 0 to {len(series.levels) - 1}; got {level}"
            )
        self.level = level
        self._full, self._series = series.levels[0], series.levels[level]
        self._lock = threading.Lock()
        try:
            self._set_layout()
            self.colour = colour_of(self._series.keyframe, self.name, len(self._series.pages))
            self.depth = self.colour.depth
        except InputError:
            self.close()
            raise
        except Exception as error:  # a header may hold anything: a tile of no width, an axis of no length
            self.close()
            raise DamagedError(
                f"cannot read {self.name}: its header makes no sense ({type(error).__name__}: {error}). The file is damaged."
            ) from error

    def _set_layout(self) -> None:
        key, series = self._series.keyframe, self._series
        pages = [(_letter(a), n) for a, n in zip(series.axes, series.shape, strict=True)]
        inside = len(key.shape)
        self._leading = [(a, n) for a, n in pages[:-inside] if inside < len(pages)]
        inner = pages[len(pages) - inside :]
        names = [a for a, _ in (*self._leading, *inner)]
        sizes = [n for _, n in (*self._leading, *inner)]
        kept = [(a, n) for a, n in zip(names, sizes, strict=True) if n > 1 or a in "YX"]
        letters = [a for a, _ in kept]
        if len(set(letters)) != len(letters) or not set(letters) <= set("CZYX") or not {"Y", "X"} <= set(letters):
            raise InputError(
                f"{self.name} has axes {series.axes} of sizes {series.shape}: a run takes channels, depth, rows and columns, "
                "each once. Save one time point, or one picture."
            )
        self._inner = inner
        by = dict(kept)
        self._spatial = [a for a in ("Z", "Y", "X") if a in by]
        self.shape = (by.get("C", 1), *(by[a] for a in self._spatial))
        self.dtype = np.dtype(series.dtype).newbyteorder("=")
        if self.dtype.kind not in "buif":
            raise InputError(f"{self.name} holds {self.dtype}; pixels are bool, integers or floating point.")
        # planes that lie apart have segments of one plane
        self._segments = (1,) * (inside - len(key.chunks)) + tuple(key.chunks)
        segment = dict(zip([a for a, _ in self._inner], self._segments, strict=True))
        self.chunks = tuple(int(segment.get(a, 1)) for a in self._spatial)
        if min(self.shape) < 1 or min(self.chunks) < 1:
            raise InputError(
                f"{self.name} has a picture of {series.shape} in tiles of {tuple(key.chunks)}: none of them may be 0. The file "
                "is damaged."
            )
        if len(series.pages) * prod(key.shape) != prod(series.shape):
            raise InputError(
                f"{self.name} has {len(series.pages)} pages of {key.shape} for axes {series.axes} {series.shape}."
            )

    @property
    def decodable(self) -> bool:
        """Its compression is one of those decoded here."""
        return int(self._series.keyframe.compression) in DECODED

    def check_compression(self) -> None:
        """Before anything is read.

        Raises:
            InputError: a compression that is not decoded here.
            MissingExtraError: what decodes it is not installed.
        """
        number = int(self._series.keyframe.compression)
        if number not in DECODED:
            raise InputError(
                f"{self.name} is compressed by method {number}; decoded are {', '.join(sorted(set(DECODED.values())))}, and by "
                "rasterio, if it is installed (pip install 'ranger-nn[geo]'), what GDAL knows. Convert it, or install that."
            )
        if DECODED[number] in ("LZW", "JPEG"):
            import_extra("imagecodecs", "images", f"TIFF files compressed with {DECODED[number]}")

    def read(self, box: Box) -> Array:
        """(channels, *lengths of box)."""
        absent = self._series.keyframe.nodata  # 0, unless the header says what stands in tiles that are left out
        out = np.full((self.shape[0], *(hi - lo for lo, hi in box)), absent, self.dtype)
        wanted = dict(zip(self._spatial, box, strict=True)) | {"C": (0, self.shape[0])}
        for page, at in self._pages(wanted):
            self._read_page(page, at, wanted, out)
        return out

    def _pages(self, wanted: dict[str, tuple[int, int]]) -> list[tuple[Any, dict[str, int]]]:
        """Pages that overlap, and where they lie on the axes that run over pages."""
        found = []
        names = [a for a, _ in self._leading]
        for k, index in enumerate(product(*(range(n) for _, n in self._leading))):
            at = dict(zip(names, index, strict=True))
            if all(
                n == 1 or wanted[a][0] <= at[a] < wanted[a][1] for a, (_, n) in zip(names, self._leading, strict=True)
            ):
                found.append((self._series.pages[k], at))
        return found

    def _read_page(self, page: Any, at: dict[str, int], wanted: dict[str, tuple[int, int]], out: Array) -> None:
        key = self._series.keyframe
        grid = [
            range(wanted[a][0] // c, -(-wanted[a][1] // c)) if a in wanted else range(n)
            for (a, _), c, n in zip(self._inner, self._segments, key.chunked, strict=True)
        ]
        for index in product(*grid):
            number = int(np.ravel_multi_index(index, key.chunked))
            starts = {a: i * c for (a, _), i, c in zip(self._inner, index, self._segments, strict=True)}
            pixels = self._segment(page, number, starts)
            if pixels is None:
                continue
            self._paste(out, pixels, starts | {a: v for a, v in at.items() if a in wanted}, wanted)

    def _paste(self, out: Array, pixels: Array, starts: dict[str, int], wanted: dict[str, tuple[int, int]]) -> None:
        """Copy what a segment (axes of `_inner`) shares with the region."""
        names = [a for a, _ in self._inner]
        lengths = dict(zip(names, pixels.shape, strict=True))
        cut: list[Any] = []
        to = {}
        for a in names:
            lo, hi = wanted.get(a, (0, lengths[a]))
            start, stop = max(lo, starts[a]), min(hi, starts[a] + lengths[a])
            cut.append(slice(start - starts[a], stop - starts[a]))
            to[a] = slice(start - lo, stop - lo)
        for a in ("C", *self._spatial):
            if a not in to:  # runs over pages
                to[a] = slice(starts.get(a, 0) - wanted[a][0], starts.get(a, 0) - wanted[a][0] + 1)
        part = pixels[tuple(cut)]
        order = [a for a in ("C", *self._spatial) if a in names]
        part = part.transpose([names.index(a) for a in order] + [i for i, a in enumerate(names) if a not in order])
        shape = [to[a].stop - to[a].start for a in ("C", *self._spatial)]
        out[tuple(to[a] for a in ("C", *self._spatial))] = part.reshape(shape)

    def _segment(self, page: Any, number: int, starts: dict[str, int]) -> Array | None:
        """One decoded tile or strip; None where the file leaves it out."""
        offset, count = int(page.dataoffsets[number]), int(page.databytecounts[number])
        if count == 0:
            return None
        place = f"{self.name}: the tile at {', '.join(f'{a} {n}' for a, n in starts.items())}"
        with self._lock:
            handle = self._file.filehandle
            if offset + count > handle.size:
                raise BadRegionError(
                    f"{place} ends at byte {offset + count} of a file of {handle.size} bytes: the file is truncated"
                )
            handle.seek(offset)
            data = handle.read(count)
        key = self._series.keyframe
        _refuse_bomb(data, int(key.compression), int(prod(key.chunks)) * self.dtype.itemsize, key, place)
        try:
            decoded, _, shape = key.decode(data, number, jpegtables=key.jpegtables)
        except Exception as error:
            raise BadRegionError(f"{place} cannot be decoded: {type(error).__name__}: {error}") from error
        if decoded is None:
            return None
        # (depth, rows, columns, samples) -> the axes of the page
        pixels = decoded[: shape[0], : shape[1], : shape[2], : shape[3]]
        by = {"Z": pixels.shape[0], "Y": pixels.shape[1], "X": pixels.shape[2], "C": pixels.shape[3]}
        moved = pixels.transpose([{"Z": 0, "Y": 1, "X": 2, "C": 3}[a] for a, _ in self._inner] + [
            i for i, a in enumerate("ZYXC") if a not in dict(self._inner)
        ])  # fmt: skip
        return moved.reshape([by[a] for a, _ in self._inner])

    def identity(self) -> dict[str, Any]:
        """Path, size, date, level."""
        return {"shape": list(self.shape), "dtype": str(self.dtype), "level": self.level} | file_identity(self.path)

    def geography(self) -> dict[str, Any] | None:
        """GeoTIFF tags as they stand, number to value, and the pixels that they speak of; None: there are none."""
        tags = self._file.pages[0].tags
        found = {n: tags[n] for n in GEO_TAGS if n in tags}
        if not found:
            return None
        sizes = dict(zip(self._full.axes, self._full.shape, strict=True))
        return {
            "tags": {n: (int(t.dtype), t.count, t.value) for n, t in found.items()},
            "size": (int(sizes["Y"]), int(sizes["X"])),
        }

    def notes(self) -> list[str]:
        """What the header says of the numbers that a run does not act upon."""
        tags = self._series.keyframe.tags
        found = [nodata_note(self.name, str(tags[GDAL_NODATA].value).strip("\0 "))] if GDAL_NODATA in tags else []
        found += [mask_note(self.name)] if self._has_mask() else []
        scales, offsets = self._scaling()
        return [*found, scaling_note(self.name, scales, offsets)] if scales or offsets else found

    def _has_mask(self) -> bool:
        """A page that says which pixels of another one are there."""
        try:
            return any(int(page.subfiletype) & MASK_PAGE for page in self._file.pages)
        except Exception:  # pages that no one asked for may be damaged
            return False

    def _scaling(self) -> tuple[list[float], list[float]]:
        """(scales, offsets) of GDAL's metadata that are none of 1 and 0, in the order of bands."""
        tags = self._file.pages[0].tags
        text = str(tags[GDAL_METADATA].value) if GDAL_METADATA in tags else ""
        found = {role: [float(v) for v in _items(text, role)] for role in ("scale", "offset")}
        return [v for v in found["scale"] if v != 1], [v for v in found["offset"] if v != 0]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


GDAL_METADATA, GDAL_NODATA = 42112, 42113
MASK_PAGE = 4
"""Bit of NewSubfileType."""
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
"""ModelPixelScale, ModelTiepoint, ModelTransformation, GeoKeyDirectory, GeoDoubleParams, GeoAsciiParams."""


def nodata_note(name: str, value: str) -> str:
    """What the report says of a value of no data that nobody has declared."""
    return f"{name} says that {value} stands for no data; it was taken as a number. To leave it out: nodata={value} (--nodata)"


def mask_note(name: str) -> str:
    """What the report says of a mask inside of the file."""
    return (
        f"{name} holds a mask that says which of its pixels are there; all were taken. To leave some out: give them a value "
        "of their own and nodata= (--nodata)"
    )


def scaling_note(name: str, scales: Sequence[float], offsets: Sequence[float]) -> str:
    """What the report says of factors that were not applied."""
    return (
        f"{name} says that its numbers are to be taken times {list(scales)} plus {list(offsets)}; they were taken as they are "
        "stored. To scale them: scale=, mean= and std= (--scale, --mean, --std)"
    )


def _items(text: str, role: str) -> list[str]:
    """Numbers of a role in GDAL's metadata; it is not read as XML, which may name other files."""
    tags = re.findall(r"<Item\b([^<>]{0,400})>\s*([-+.0-9eE]{1,40})\s*</Item>", text)
    return [value for inside, value in tags if f'role="{role}"' in inside and _is_number(value)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _letter(axis: str) -> str:
    """C channels (samples too), Z depth (a series of pages too), others as they are."""
    return "C" if axis in "CS" else "Z" if axis in "ZI" else axis


def _refuse_bomb(data: bytes, compression: int, expected: int, key: Any, place: str) -> None:
    """Refuse a segment that would decode to more than its tile holds."""
    if compression in DEFLATE and len(data) * SAFE_GROWTH > 64 * expected:
        engine = zlib.decompressobj()
        try:
            engine.decompress(data, expected + 1)
            rest = len(engine.unconsumed_tail)
        except zlib.error as error:
            raise BadRegionError(f"{place} cannot be decoded: {error}") from error
        if rest:
            raise BadRegionError(f"{place} decodes to more than the {expected} bytes that its tile holds: refused")
    elif compression == 5 and len(data) > 2 * expected + 4096:
        raise BadRegionError(f"{place} has {len(data)} bytes of LZW for a tile of {expected} bytes: refused")
    elif compression == 7:
        rows, columns = _jpeg_size(data)
        if rows > max(key.tilelength or key.rowsperstrip, 1) or columns > max(key.tilewidth or key.imagewidth, 1):
            raise BadRegionError(f"{place} holds a JPEG of {rows} x {columns}, larger than its tile: refused")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """(rows, columns) that the frame header of a JPEG stream claims; zeros without one."""
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in JPEG_SIZES and marker not in JPEG_NO_SIZE:
            return int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
        at += 2 + length
    return 0, 0
