"""Where a run writes: rows go into a raw file in a working folder beside the result, which takes its final form and name
when all are there.

    .labels.zarr.partial/      rows.npy (raw), journal.json, spilled values
    labels.zarr                appears at the end, by one rename

The last step reads the rows band by band and writes each tile or shard once, by one writer. It needs no memory for the
whole, costs one more pass over the output on disk, and starts again if it is interrupted. Enter at `FileSink`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ranger_nn.errors import InputError, RangerError
from ranger_nn.io.extras import import_extra
from ranger_nn.io.naming import MARK, check_free, checked_path, place
from ranger_nn.io.protocol import Array, Box
from ranger_nn.io.rows import RowFile, npy_header, unwritten
from ranger_nn.io.workplace import remove
from ranger_nn.io.workplace import working_folder as working_folder

TIFFS = (".tif", ".tiff", ".btf")
KNOWN = (".zarr", ".npy", *TIFFS)
TILE = 256
BAND_BYTES = 32 << 20
"""A band of tiles across all columns that takes more has flatter tiles."""
GDAL_NODATA = 42113
"""The TIFF tag by which GDAL tells the value of no data, as text."""
BIG = 1 << 32
"""TIFF offsets have 32 bits below this."""


def check_sink(given: str | os.PathLike[str], overwrite: bool) -> Path:
    """The path of a result that may be written.

    Raises:
        InputError: an unknown format, no such folder, a read-only one, a name that is none, something that is there already.
        MissingExtraError: the format needs a package that is not installed.
    """
    path = checked_path(given)
    suffix = path.suffix.lower()
    if suffix not in KNOWN:
        raise InputError(f"cannot write {str(path)!r}: the name must end in one of {', '.join(KNOWN)}.")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}. Make it first.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write {str(path)!r}: {str(path.parent)!r} is read-only. Choose another folder.")
    check_free(path, overwrite)
    if suffix == ".zarr":
        import_extra("zarr", "zarr", "Zarr results")
    if suffix in TIFFS:
        import_extra("tifffile", "images", "TIFF results")
    return path


class FileSink:
    """A result in the making: see the module.

    Args:
        path: the final name.
        shape: (channels, *spatial).
        dtype: of its elements.
        geography: CRS and transform of the input, or None.
        again: go on with the rows that are there.
        rows: file of the rows, in the working folder.
        nodata: value that stands for no data, told to those who read the result; None: there is none.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        dtype: Any,
        geography: dict[str, Any] | None,
        again: bool,
        rows: Path,
        nodata: float | None = None,
    ) -> None:
        self.path, self.name, self.shape, self.dtype = path, repr(str(path)), shape, np.dtype(dtype)
        self.geography, self.nodata = geography, nodata
        self._made = rows.with_name(f"{rows.stem}-result{path.suffix}")
        self.rows = RowFile(rows, shape, dtype, npy_header(self.shape, self.dtype), again)

    def write(self, box: Box, pixels: Array) -> None:
        """Put (channels, *lengths of box) in place."""
        self.rows.write(box, pixels)

    def durable(self) -> None:
        """To the disk."""
        self.rows.sync()

    def finish(self, overwrite: bool = False) -> None:
        """Take the final form and name."""
        place(self.form(), self.path, overwrite)

    def form(self) -> Path:
        """Take the final form, in the working folder: the file that is to take the final name."""
        self.rows.sync()
        made = self._made
        remove(made)
        suffix = self.path.suffix.lower()
        if suffix == ".npy":
            return self.rows.path
        try:
            if suffix == ".zarr":
                self._as_zarr(made)
            else:
                self._as_tiff(made)
        except (RangerError, MemoryError):
            raise
        except Exception as error:  # GDAL, zarr and tifffile each have their own errors of a full disk
            remove(made)
            raise unwritten(made, error) from error
        return made

    def close(self) -> None:
        """Let go of the file."""
        self.rows.close()

    # ---- final forms

    def _bands(self, rows: int) -> Iterator[tuple[Box, Array]]:
        """Bands of so many rows (of the last but one axis), in order."""
        *front, height, width = self.shape[1:]
        for corner in np.ndindex(*front):
            for top in range(0, height, rows):
                bottom = min(top + rows, height)
                box = (*((i, i + 1) for i in corner), (top, bottom), (0, width))
                yield box, self.rows.read(box)

    def _as_zarr(self, made: Path) -> None:
        zarr = import_extra("zarr", "zarr", "Zarr results")
        row = self.shape[0] * self.shape[-1] * self.dtype.itemsize
        tile = TILE if row * TILE <= BAND_BYTES else TILE // 4
        front = (1,) * (len(self.shape) - 3)
        width = -(-self.shape[-1] // TILE) * TILE
        array = zarr.create_array(
            store=str(made),
            shape=self.shape,
            dtype=self.dtype,
            chunks=(self.shape[0], *front, tile, TILE),
            shards=(self.shape[0], *front, tile, width),
            fill_value=self.nodata,
            attributes={MARK: True},
            dimension_names=["channel", *["depth"] * len(front), "row", "column"],
        )
        for box, pixels in self._bands(tile):
            array[(slice(None), *(slice(lo, hi) for lo, hi in box))] = pixels

    def _as_tiff(self, made: Path) -> None:
        if self.geography is not None and "crs" in self.geography:
            self._as_geotiff(made)
            return
        tifffile = import_extra("tifffile", "images", "TIFF results")
        dtype = np.dtype(np.uint8) if self.dtype == bool else self.dtype
        shape = self.shape if self.shape[0] > 1 else self.shape[1:]
        pages = {2: "YX", 3: "CYX" if self.shape[0] > 1 else "ZYX", 4: "CZYX"}[len(shape)]
        tifffile.imwrite(
            made,
            self._tiles(dtype),
            shape=shape,
            dtype=dtype,
            tile=(TILE, TILE),
            photometric="minisblack",
            planarconfig="separate" if len(shape) == 3 and self.shape[0] > 1 else None,
            compression="zlib",
            bigtiff=self.rows.nbytes > BIG // 2,
            metadata={"axes": pages},
            extratags=self._geo_tags(),
        )

    def _tiles(self, dtype: np.dtype[Any]) -> Iterator[Array]:
        """Tiles in the order of the file: channel, depth, rows, columns."""
        height, width = self.shape[-2:]
        for c, *front in np.ndindex(self.shape[0], *self.shape[1:-2]):
            for top in range(0, height, TILE):
                box = (*((i, i + 1) for i in front), (top, min(top + TILE, height)), (0, width))
                band = self.rows.read_channel(c, box).reshape(-1, width).astype(dtype)
                for left in range(0, width, TILE):
                    yield np.ascontiguousarray(band[:, left : left + TILE])

    def _geo_tags(self) -> list[tuple[int, int, int, Any, bool]]:
        found: list[tuple[int, int, int, Any, bool]] = []
        if self.nodata is not None:
            found.append((GDAL_NODATA, 2, 0, f"{self.nodata:.17g}", True))
        if self.geography is None:
            return found
        zoom = [a / b for a, b in zip(self.geography["size"], self.shape[-2:], strict=True)]
        for number, (dtype, count, value) in self.geography["tags"].items():
            if number == 33550:  # ModelPixelScale: x, y, z
                value = (value[0] * zoom[1], value[1] * zoom[0], *value[2:])
            found.append((number, dtype, count, value, True))
        return found

    def _as_geotiff(self, made: Path) -> None:
        rasterio = import_extra("rasterio", "geo", "GeoTIFF results")
        assert self.geography is not None
        rows, columns = (a / b for a, b in zip(self.geography["size"], self.shape[-2:], strict=True))
        dtype = "uint8" if self.dtype == bool else self.dtype.name
        with rasterio.open(
            made, "w", driver="GTiff", count=self.shape[0], height=self.shape[-2], width=self.shape[-1], dtype=dtype,
            crs=self.geography["crs"], transform=self.geography["transform"] @ rasterio.Affine.scale(columns, rows),
            nodata=self.nodata, tiled=True, blockxsize=TILE, blockysize=TILE, compress="deflate", BIGTIFF="IF_SAFER", interleave="band",
        ) as file:  # fmt: skip
            for box, pixels in self._bands(TILE):
                top, bottom = box[-2]
                window = rasterio.windows.Window(0, top, self.shape[-1], bottom - top)
                file.write(pixels.reshape(self.shape[0], bottom - top, -1).astype(dtype), window=window)


class PlacedSink:
    """A result that has its final name already: an earlier run of the same work ended after that."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, repr(str(path))

    def close(self) -> None:
        """Nothing is open."""
