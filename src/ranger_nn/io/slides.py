"""Whole slides through openslide (read only) and GeoTIFF windows through rasterio."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ranger_nn.errors import InputError
from ranger_nn.io.arrays import file_identity
from ranger_nn.io.extras import import_extra
from ranger_nn.io.protocol import Array, BadRegionError, Box
from ranger_nn.io.tiff import mask_note, nodata_note, scaling_note

SLIDES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide")
SPLIT = (".mrxs",)
"""Formats that keep their pixels in a folder beside; of others a folder of that name may be where results go."""
TILE = 256
STRUCTURE = "IMAGE_STRUCTURE"
"""Where GDAL tells how samples are stored."""


class SlideSource:
    """A whole slide at one of its levels: red, green, blue, uint8; what was not scanned is white.

    Raises:
        InputError: no slide that openslide reads, no such level.
        MissingExtraError: openslide is not installed.
    """

    batched = False
    resident = 0
    depth: int | None = None
    dtype = np.dtype(np.uint8)

    def __init__(self, path: Path, level: int = 0) -> None:
        openslide = import_extra("openslide", "slides", "whole slides")
        self.path, self.name, self.level = path, repr(str(path)), level
        try:
            self._slide = openslide.OpenSlide(str(path))
        except Exception as error:
            raise InputError(f"cannot read {self.name}: {error}. It is no whole slide that openslide knows.") from error
        if not 0 <= level < self._slide.level_count:
            raise InputError(f"{self.name} has levels 0 to {self._slide.level_count - 1}; got level {level}")
        columns, rows = self._slide.level_dimensions[level]
        self._zoom = self._slide.level_downsamples[level]
        self.shape: tuple[int, ...] = (3, int(rows), int(columns))
        names = [f"openslide.level[{level}].tile-{side}" for side in ("height", "width")]
        self.chunks = tuple(int(self._slide.properties.get(n, TILE)) for n in names)

    def read(self, box: Box) -> Array:
        """(3, rows, columns)."""
        (top, bottom), (left, right) = box
        corner = (round(left * self._zoom), round(top * self._zoom))
        try:
            found = np.asarray(self._slide.read_region(corner, self.level, (right - left, bottom - top)))
        except Exception as error:
            raise BadRegionError(f"{self.name}: region {box} cannot be read: {error}") from error
        alpha = found[..., 3:].astype(np.uint16)
        mixed = (found[..., :3].astype(np.uint16) * alpha + 255 * (255 - alpha) + 127) // 255
        return np.ascontiguousarray(mixed.astype(np.uint8).transpose(2, 0, 1))

    def identity(self) -> dict[str, Any]:
        """Path, size, dates, samples, level; of formats that keep their pixels in a folder beside, of that folder too."""
        beside = self.path.with_suffix("")
        split = self.path.suffix.lower() in SPLIT and beside.is_dir()
        folder = {"beside": file_identity(beside)} if split else {}
        return {"shape": list(self.shape), "level": self.level} | folder | file_identity(self.path)

    def close(self) -> None:
        """Close the slide."""
        self._slide.close()


class RasterSource:
    """A GeoTIFF (or any raster that GDAL reads from one local file) through rasterio, window by window.

    Args:
        path: the file.
        stored: numbers as they are stored; else GDAL turns inks and the like into red, green, blue and alpha.

    Raises:
        InputError: rasterio cannot open it, bands of different types.
        MissingExtraError: rasterio is not installed.
    """

    batched = False
    resident = 0

    def __init__(self, path: Path, stored: bool = False) -> None:
        self._rasterio = import_extra("rasterio", "geo", "GeoTIFF files")
        self.path, self.name = path, repr(str(path))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it has no place on the earth is no matter here
                named = f"GTIFF_RAW:{path.resolve()}" if stored else path.resolve()
                self._data = self._rasterio.open(named, driver="GTiff")
        except Exception as error:
            raise InputError(f"cannot read {self.name}: {error}") from error
        if len(set(self._data.dtypes)) != 1:
            raise InputError(f"{self.name} has bands of types {', '.join(self._data.dtypes)}: a run needs one type")
        self.dtype = np.dtype(self._data.dtypes[0])
        self.shape: tuple[int, ...] = (int(self._data.count), int(self._data.height), int(self._data.width))
        self.chunks = tuple(int(n) for n in self._data.block_shapes[0])
        self.depth = self._depth()
        self._lock = threading.Lock()

    def read(self, box: Box) -> Array:
        """(bands, rows, columns)."""
        (top, bottom), (left, right) = box
        window = self._rasterio.windows.Window(left, top, right - left, bottom - top)
        try:
            with self._lock:
                return np.asarray(self._data.read(window=window))
        except Exception as error:
            raise BadRegionError(f"{self.name}: region {box} cannot be read: {error}") from error

    def geography(self) -> dict[str, Any] | None:
        """CRS and transform, for the output; None where the file has neither."""
        if self._data.crs is None and self._data.transform.is_identity:
            return None
        return {"crs": self._data.crs, "transform": self._data.transform, "size": self.shape[1:]}

    def _depth(self) -> int | None:
        """Of unsigned integers whose bits are not those of their type."""
        bits = max(int(self._data.tags(band, ns=STRUCTURE).get("NBITS", 0)) for band in self._data.indexes)
        return bits if self.dtype.kind == "u" and bits not in (0, 8 * self.dtype.itemsize) else None

    def as_seen(self) -> bool:
        """No band holds indices, inks or the like, nor alpha: whether colours are multiplied by it GDAL does not tell."""
        told = self._data.tags(ns=STRUCTURE).keys() & {"MINISWHITE", "SOURCE_COLOR_SPACE"}
        return not told and {i.name for i in self._data.colorinterp} <= {"gray", "red", "green", "blue", "undefined"}

    def notes(self) -> list[str]:
        """What the header says of the numbers that a run does not act upon."""
        data = self._data
        found = [nodata_note(self.name, f"{v:.17g}") for v in dict.fromkeys(data.nodatavals) if v is not None]
        if any(s != 1 for s in data.scales) or any(o != 0 for o in data.offsets):
            found.append(scaling_note(self.name, data.scales, data.offsets))
        if (
            any(flag.name == "per_dataset" for flags in data.mask_flag_enums for flag in flags)
            and not self._has_alpha()
        ):
            found.append(mask_note(self.name))
        return found

    def _has_alpha(self) -> bool:
        return any(i.name == "alpha" for i in self._data.colorinterp)

    def identity(self) -> dict[str, Any]:
        """Path, size, dates, samples."""
        plain = {"shape": list(self.shape), "dtype": str(self.dtype), "reader": "rasterio"}
        return plain | file_identity(self.path)

    def close(self) -> None:
        """Close the file."""
        self._data.close()
