"""Read an image as an array (channels, rows, columns), and write one.

Formats by the end of the name: PNG and JPEG (Pillow), TIFF (tifffile: any depth, floating point,
volumes), `.npy` (NumPy). Values keep the type that the file has; nothing is scaled on reading.

The size of the pixels is known from the header and checked before they are decoded, so that a small
file that would unfold to hundreds of gigabytes is refused, not tried.
"""

from __future__ import annotations

import importlib
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ranger_nn.errors import InputError, MissingExtraError
from ranger_nn.io.atomic import atomic_write
from ranger_nn.io.colour import colour_of, seen_bytes
from ranger_nn.io.extras import import_extra
from ranger_nn.io.naming import checked_path

Array = NDArray[Any]

DEFAULT_LIMIT = 16 * 2**30
"""Most bytes of pixels that are read unless the caller says otherwise."""

READABLE = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy")
WRITABLE = (".png", ".tif", ".tiff", ".npy")

_pillow_limit = threading.Lock()


def read_image(path: str | os.PathLike[str], memory_limit: int | None = DEFAULT_LIMIT) -> Array:
    """The pixels of `path` as (channels, rows, columns); a TIFF volume as (channels, ..., rows, columns).

    A `.npy` array is returned in the shape it has, mapped from the disk rather than read.

    Raises:
        InputError: no such file, not an image that can be read, or larger than `memory_limit` bytes.
        MissingExtraError: the format needs a package that is not installed.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix not in READABLE:
        raise InputError(f"cannot read {str(file)!r}: the name must end in one of {', '.join(READABLE)}.")
    if not os.path.isfile(file):
        raise InputError(f"cannot read {str(file)!r}: there is no such file.")
    try:
        if suffix == ".npy":
            return _read_npy(file, memory_limit)
        if suffix in (".tif", ".tiff"):
            return _read_tiff(file, memory_limit)
        return _read_with_pillow(file, memory_limit)
    except (InputError, MissingExtraError, MemoryError):
        raise
    except Exception as error:
        # Decoders raise whatever they like on a damaged file.
        raise InputError(
            f"cannot read {str(file)!r}: {error}. The file is damaged or not of the format it is named for."
        ) from error


def write_image(path: str | os.PathLike[str], array: Array) -> None:
    """Write `array`, of shape (channels, rows, columns) or (rows, columns), to `path`, all or nothing.

    - `.npy`: any shape and type, as it is.
    - `.tif`: any number of channels, any numeric type (float16 is widened), volumes too.
    - `.png`: 1, 3 or 4 channels; uint8, or uint16 with one channel; bool becomes 0 and 255. Floating
      point is taken to lie in 0..1: it is clipped to that and scaled to 0..255; NaN becomes 0.

    Leading axes of length 1 (a batch of one) are dropped for TIFF and PNG.

    Raises:
        InputError: the format cannot hold the array, or the place cannot be written.
        MissingExtraError: the format needs a package that is not installed.
    """
    check_writable(path)
    suffix = Path(path).suffix.lower()
    if suffix == ".npy":
        with atomic_write(path) as file:
            np.save(file, array, allow_pickle=False)
        return
    pixels = _drop_batch(array)
    if suffix == ".png":
        picture = _as_png_pixels(pixels)
        with atomic_write(path) as file:
            _pillow().fromarray(picture).save(file, format="PNG")
        return
    _check_tiff(pixels)
    with atomic_write(path) as file:
        _write_tiff(file, pixels)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out before the work is done, not after, that `write_image` could not write to `path`.

    Raises:
        InputError: the format is not one of `WRITABLE`, or there is no such folder.
        MissingExtraError: the format needs a package that is not installed.
    """
    file = checked_path(path)
    suffix = file.suffix.lower()
    if suffix not in WRITABLE:
        raise InputError(f"cannot write {str(file)!r}: the name must end in one of {', '.join(WRITABLE)}.")
    if not file.parent.is_dir():
        raise InputError(f"cannot write {str(file)!r}: there is no folder {str(file.parent)!r}. Make it first.")
    if file.is_dir():
        raise InputError(f"cannot write {str(file)!r}: it is a folder. Give the name of a file in it.")
    if suffix == ".png":
        _pillow()
    if suffix in (".tif", ".tiff"):
        _tifffile()


def _read_npy(file: Path, memory_limit: int | None) -> Array:
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    _check_size(file, array.shape, array.dtype.itemsize, memory_limit)
    return array


def _read_tiff(file: Path, memory_limit: int | None) -> Array:
    with _tifffile().TiffFile(file) as tiff:
        series = tiff.series[0]
        axes, page = series.axes, series.keyframe
        channels = [axis for axis, name in enumerate(axes) if name in "CS"]
        if len(channels) > 1:
            raise InputError(
                f"cannot read {str(file)!r}: its axes {axes!r} hold channels twice. Save them as one axis."
            )
        colour = colour_of(page, repr(str(file)), len(series.pages))
        if colour.depth:
            raise InputError(
                f"cannot read {str(file)!r}: it has {colour.depth} bits in {series.dtype}, so that its largest value is not that "
                "of its type. Scale it, or save the model's input as .npy."
            )
        stored = series.shape[channels[0]] if channels else 1
        size = seen_bytes(colour, series.shape, stored, np.dtype(series.dtype))
        _check_size(file, series.shape, size // math.prod(series.shape) or 1, memory_limit)
        array = np.asarray(series.asarray())
    found = np.moveaxis(array, channels[0], 0) if channels else array[np.newaxis]
    return found if colour.plain else np.ascontiguousarray(colour.turned(colour.apply(found)))


def _read_with_pillow(file: Path, memory_limit: int | None) -> Array:
    pillow = _pillow()
    with _without_pillow_limit(pillow):
        image = pillow.open(file)
    with image:
        bands = 4 if image.mode == "P" else len(image.getbands())
        itemsize = 4 if image.mode in ("I", "F") else 2 if image.mode.startswith("I;16") else 1
        _check_size(file, (bands, image.height, image.width), itemsize, memory_limit)
        if any("16" in str(tile[3]) for tile in image.tile) and bands > 1:
            raise InputError(
                f"cannot read {str(file)!r}: Pillow would cut its 16 bits per channel to 8. Save it as TIFF."
            )
        array = np.asarray(_in_a_plain_mode(image))
    return array[np.newaxis] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def _in_a_plain_mode(image: Any) -> Any:
    """The picture as a viewer shows it: turned upright, without palette, one byte per bit."""
    upright = importlib.import_module("PIL.ImageOps").exif_transpose(image)
    if upright.mode == "P":
        return upright.convert("RGBA" if "transparency" in upright.info else "RGB")
    plain = {"1": "L", "PA": "RGBA", "RGBa": "RGBA", "La": "LA", "RGBX": "RGB"}
    plain |= dict.fromkeys(("CMYK", "YCbCr", "LAB", "HSV"), "RGB")
    return upright.convert(plain[upright.mode]) if upright.mode in plain else upright


def _check_size(file: Path, shape: tuple[int, ...], itemsize: int, memory_limit: int | None) -> None:
    size = math.prod(shape) * itemsize
    if memory_limit is None or size <= memory_limit:
        return
    raise InputError(
        f"{str(file)!r} holds {'x'.join(map(str, shape))} pixels, {size} bytes when decoded; the limit is "
        f"{memory_limit} bytes. Give a larger limit if the file can be trusted."
    )


def _drop_batch(array: Array) -> Array:
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim in (2, 3, 4) and array.size > 0:
        return array
    raise InputError(
        f"an array of shape {array.shape} is not one picture. Write it to a name that ends in .npy instead."
    )


def _as_png_pixels(pixels: Array) -> Array:
    if pixels.ndim == 4 or (pixels.ndim == 3 and pixels.shape[0] not in (1, 3, 4)):
        raise InputError(
            f"PNG holds 1, 3 or 4 channels; the picture has shape {pixels.shape}. "
            "Write it to a name that ends in .tif or .npy instead."
        )
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    elif np.issubdtype(pixels.dtype, np.floating):
        scaled = np.clip(np.nan_to_num(pixels.astype(np.float32), posinf=1.0, neginf=0.0), 0, 1) * 255
        pixels = np.rint(scaled).astype(np.uint8)
    plane = pixels[0] if pixels.ndim == 3 and pixels.shape[0] == 1 else pixels
    if plane.dtype != np.uint8 and not (plane.dtype == np.uint16 and plane.ndim == 2):
        raise InputError(
            f"PNG holds uint8, or uint16 with one channel; the picture is {pixels.dtype} of shape "
            f"{pixels.shape}. Write it to a name that ends in .tif or .npy instead."
        )
    return np.ascontiguousarray(plane if plane.ndim == 2 else np.moveaxis(plane, 0, -1))


def _check_tiff(pixels: Array) -> None:
    if pixels.dtype.kind not in "buif":
        raise InputError(f"TIFF cannot hold {pixels.dtype}. Write it to a name that ends in .npy instead.")


def _write_tiff(file: BinaryIO, pixels: Array) -> None:
    if pixels.dtype == np.float16:
        pixels = pixels.astype(np.float32)
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    writer = _tifffile()
    if pixels.ndim == 3 and pixels.shape[0] in (3, 4) and pixels.dtype in (np.uint8, np.uint16):
        writer.imwrite(file, np.moveaxis(pixels, 0, -1), photometric="rgb")
        return
    axes = {2: "YX", 3: "CYX", 4: "CZYX"}[pixels.ndim]
    writer.imwrite(file, np.ascontiguousarray(pixels), photometric="minisblack", metadata={"axes": axes})


@contextmanager
def _without_pillow_limit(pillow: Any) -> Iterator[None]:
    """Lift Pillow's own limit on pixels, which large images exceed; `_check_size` stands in for it."""
    with _pillow_limit:
        limit = pillow.MAX_IMAGE_PIXELS
        pillow.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            pillow.MAX_IMAGE_PIXELS = limit


def _pillow() -> Any:
    return import_extra("PIL.Image", "images", "PNG and JPEG files", "Pillow")


def _tifffile() -> Any:
    return import_extra("tifffile", "images", "TIFF files")
