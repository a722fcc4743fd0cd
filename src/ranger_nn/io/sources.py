"""`open_source`: a path or an array-like as a `Source`.

.npy                memory map                     .zarr      Zarr (zarr)
.tif .tiff          tifffile; GeoTIFF: rasterio    .h5 .hdf5  HDF5 (h5py), file.h5:name of the data set
.svs .ndpi ...      openslide                      .png .jpg  Pillow, decoded whole
"""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ranger_nn.errors import InputError, MissingExtraError
from ranger_nn.io.arrays import ArraySource, FileArraySource
from ranger_nn.io.colour import seen
from ranger_nn.io.extras import import_extra
from ranger_nn.io.image import read_image
from ranger_nn.io.naming import shown
from ranger_nn.io.protocol import Source
from ranger_nn.io.slides import SLIDES, RasterSource, SlideSource
from ranger_nn.io.tiff import DamagedError, TiffSource

HDF5 = (".h5", ".hdf5", ".hdf")
PICTURES = (".png", ".jpg", ".jpeg")
TIFFS = (".tif", ".tiff", ".btf")
KNOWN = (".npy", ".zarr", *HDF5, *TIFFS, *SLIDES, *PICTURES)


def open_source(given: Any, axes: str | None = None, level: int = 0, limit: int | None = None) -> Source:
    """The source that a path or an array means.

    Args:
        given: path, or anything with shape, dtype and slicing (NumPy, memmap, Zarr, h5py, Dask), or a `Source`.
        axes: names of an array's axes, such as "YXC"; None: see `ranger_nn.io.arrays`.
        level: of a pyramid (slides, TIFF).
        limit: most bytes that a picture which must be decoded whole may take; None: no limit.

    Raises:
        InputError: no such file, an unknown format, damaged, larger than `limit`.
        MissingExtraError: the format needs a package that is not installed.
    """
    if hasattr(given, "read") and hasattr(given, "identity"):
        return given
    if not isinstance(given, str | os.PathLike):
        return ArraySource(given, axes)
    text = os.fspath(given)
    stem, colon, inner = text.rpartition(":")
    if colon and Path(stem).suffix.lower() in HDF5:
        return _hdf5(Path(stem), inner, axes)
    path = Path(text)
    try:
        there = path.exists()
    except (OSError, ValueError) as error:  # an over-long name, a folder that may not be entered
        raise InputError(f"cannot read {text[:80]!r}: {getattr(error, 'strerror', None) or error}.") from error
    if not there:
        raise InputError(f"cannot read {shown(text)!r}: there is no such file.")
    suffix = path.suffix.lower()
    if suffix in HDF5:
        return _hdf5(path, None, axes)
    if suffix == ".zarr" or any((path / name).is_file() for name in ("zarr.json", ".zarray")):
        return _zarr(path, axes)
    if suffix == ".npy":
        return _npy(path, axes)
    if suffix in TIFFS:
        return _tiff(path, level)
    if suffix in SLIDES:
        return SlideSource(path, level)
    if suffix in PICTURES:
        return _picture(path, limit)
    raise InputError(f"cannot read {text!r}: the name must end in one of {', '.join(KNOWN)}.")


def _npy(path: Path, axes: str | None) -> Source:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:
        raise InputError(f"cannot read {str(path)!r}: {error}. The file is damaged or no .npy array.") from error
    return FileArraySource(array, path, axes)


def _tiff(path: Path, level: int) -> Source:
    """GeoTIFF through rasterio where it is installed, else by tiles; what only one of both can open, through that one."""
    try:
        plain = TiffSource(path, level)
    except DamagedError as error:
        if not _is_tiff(path):
            raise
        return _plain_raster(path, level, error)
    try:
        return seen(_through(plain, path, level), plain.colour)
    except BaseException:
        plain.close()
        raise


def _through(plain: TiffSource, path: Path, level: int) -> Any:
    """`plain` itself, or the same picture through rasterio."""
    if level or (plain.geography() is None and plain.decodable):
        plain.check_compression()
        return plain
    try:
        raster = RasterSource(path, stored=plain.colour.kind == "inks")
    except (MissingExtraError, InputError):
        plain.check_compression()
        return plain
    if raster.shape != plain.shape:  # pages that are channels or depth: rasterio sees the first one
        raster.close()
        plain.check_compression()
        return plain
    plain.close()
    return raster


def _is_tiff(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _plain_raster(path: Path, level: int, why: InputError) -> Source:
    """What tifffile does not open, where rasterio does and the bands are grey, colours or undefined."""
    try:
        raster = RasterSource(path)
    except (MissingExtraError, InputError):
        raise why from None
    if level or not raster.as_seen():
        raster.close()
        raise why
    return raster


def _hdf5(path: Path, inner: str | None, axes: str | None) -> Source:
    h5py = import_extra("h5py", "hdf5", "HDF5 files")
    if not path.is_file():
        raise InputError(f"cannot read {str(path)!r}: there is no such file.")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error}. The file is damaged or no HDF5.") from error
    found: list[str] = []
    # only data sets inside this file: links to others are not followed
    file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    if inner is None and len(found) == 1:
        inner = found[0]
    if inner is None or inner.strip("/") not in found:
        file.close()
        raise InputError(
            f"{str(path)!r} has the data sets {', '.join(found) or '(none)'}; name one of them: {path}:{(found or ['name'])[0]}"
        )
    if file[inner].external or file[inner].is_virtual:
        file.close()
        raise InputError(
            f"{str(path)!r}: data set {inner!r} lives in other files, which are not followed. Copy it first."
        )
    return FileArraySource(file[inner], path, axes, closer=file)


def _zarr(path: Path, axes: str | None) -> Source:
    zarr = import_extra("zarr", "zarr", "Zarr arrays")
    try:
        found = zarr.open(store=str(path), mode="r")
    except Exception as error:
        raise InputError(f"cannot read {str(path)!r}: {error}. It is no Zarr array.") from error
    if not hasattr(found, "shape"):
        names = ", ".join(sorted(found.array_keys()))
        raise InputError(f"{str(path)!r} is a group with the arrays {names or '(none)'}; give the path of one of them")
    return FileArraySource(found, path, axes)


def _picture(path: Path, limit: int | None) -> Source:
    """PNG and JPEG are decoded whole, once: held in memory."""
    array = read_image(path, limit)
    source = FileArraySource(array, path, "CYX")
    source.resident = prod(array.shape) * array.itemsize
    return source
