"""Whether a result would be written over the input that is still read: halos would hold results in place of pixels.

    arrays in memory      the bytes that both may touch
    memory maps           the same file, and bytes of it that both may touch
    Zarr, HDF5            the same array of the same store
    a path                the file itself, under whatever name (links are followed)

Enter at `overlap`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.exceptions import TooHardError

WORK = 10_000
"""Steps that NumPy takes to find out whether two views share an element; beyond it they are taken to do."""


def overlap(source: Any, target: Any) -> bool:
    """Whether writing `target` (a path or an array) could change what is read from `source` (a `Source`).

    Of arrays that do not say where they live (Dask, objects of the caller's own) it could.
    """
    path, array = getattr(source, "path", None), getattr(source, "array", None)
    if isinstance(target, str | os.PathLike):
        return any(_same_file(file, Path(target)) for file in _files(source, path))
    if array is not None and path is None:
        return _touch(array, target)
    held = stored_at(target)
    if array is not None and stored_at(array) is not None:
        return _touch(array, target)
    if path is None:
        return True
    return held is not None and _same_file(Path(path), held)


def _files(source: Any, path: Any) -> list[Path]:
    held = stored_at(getattr(source, "array", None))
    return [Path(p) for p in (path, held) if p is not None]


def _same_file(a: Path, b: Path) -> bool:
    """The same file or folder, or one inside of the other."""
    try:
        if a.exists() and b.exists() and os.path.samefile(a, b):
            return True
        inner, outer = a.resolve(), b.resolve()
    except OSError:
        return False
    return b.is_dir() and outer in inner.parents


def stored_at(array: Any) -> Path | None:
    """The file or folder in which an array-like lives, where it says so."""
    if isinstance(array, np.ndarray):
        root = _root(array)
        return None if not isinstance(root, np.memmap) or root.filename is None else Path(root.filename)
    store = getattr(array, "store", None)
    root_path = getattr(store, "root", None) or getattr(store, "path", None)
    held = root_path if isinstance(root_path, str | Path) else None
    if held is None:
        held = getattr(getattr(array, "file", None), "filename", None)
    return Path(held) if isinstance(held, str | Path) and os.path.exists(held) else None


def in_same_files(source: Any, target: Any) -> bool:
    """Whether what is written lies in the file or folder that the input is read from, beside the input."""
    read = getattr(source, "path", None) or stored_at(getattr(source, "array", None))
    written = target if isinstance(target, Path) else stored_at(target)
    if read is None or written is None:
        return False
    one, other = Path(read).resolve(), written.resolve()
    return one == other or one in other.parents or other in one.parents


def inner_name(array: Any) -> str:
    """Its name inside of that file."""
    return str(getattr(array, "path", None) or getattr(array, "name", None) or "")


def _touch(a: Any, b: Any) -> bool:
    if a is b:
        return True
    x, y = _memory(a), _memory(b)
    if x is not None and y is not None:
        return _share(x, y) or _same_bytes_of_a_file(x, y)
    if type(a) is type(b) and hasattr(a, "id") and a == b:  # HDF5: one data set may have several names
        return True
    one, other = stored_at(a), stored_at(b)
    if one is not None and other is not None:
        return _same_file(one, other) and inner_name(a).strip("/") == inner_name(b).strip("/")
    if (one is not None or x is not None) and (other is not None or y is not None):
        return False  # one in memory, one in a file
    stores = [None if callable(s := getattr(array, "store", None)) else s for array in (a, b)]
    if None in stores:
        known = one is not None or x is not None or other is not None or y is not None
        return not (known and any(s is not None for s in stores))
    return bool(stores[0] == stores[1]) and inner_name(a).strip("/") == inner_name(b).strip("/")


def _memory(array: Any) -> Any:
    """The memory of an array-like as an array; None: it has none of its own."""
    if isinstance(array, np.ndarray):
        return array
    if any(hasattr(array, name) for name in ("__array_interface__", "__dlpack__")) and not hasattr(array, "dask"):
        try:
            return np.asarray(array)
        except Exception:
            return None
    return None


def _share(a: Any, b: Any) -> bool:
    try:
        return bool(np.shares_memory(a, b, max_work=WORK))  # type: ignore[arg-type]
    except TooHardError:
        return True


def _root(array: Any) -> Any:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _same_bytes_of_a_file(a: Any, b: Any) -> bool:
    """Two maps of one file lie at different addresses: what counts is where in the file they look."""
    one, other = _root(a), _root(b)
    if one is other or not (isinstance(one, np.memmap) and isinstance(other, np.memmap)):
        return False
    if one.filename is None or other.filename is None or not _same_file(Path(one.filename), Path(other.filename)):
        return False
    (start, stop), (first, last) = _place(a, one), _place(b, other)
    return start < last and first < stop


def _place(array: Any, root: Any) -> tuple[int, int]:
    """Bytes of the file that a view of a map lies between."""
    start = _bounds(root)[0] - root.offset
    low, high = _bounds(array)
    return low - start, high - start


def _bounds(array: Any) -> tuple[int, int]:
    """Addresses of the first byte and after the last one."""
    at = array.__array_interface__["data"][0]
    spans = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    return at + sum(s for s in spans if s < 0), at + sum(s for s in spans if s > 0) + array.itemsize
