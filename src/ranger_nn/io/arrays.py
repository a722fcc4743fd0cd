"""Sources of arrays: NumPy, memory maps, Zarr, h5py, Dask, and anything with `shape`, `dtype` and slicing.

`axes` names the axes of the array by one letter each: C channels, Z depth, Y rows, X columns, N a batch of one. Left
out, two axes are YX, three are CYX (or YXC where only the last one is 4 or less), four NCYX.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from ranger_nn.errors import InputError
from ranger_nn.io.protocol import Array, BadRegionError, Box

SAMPLES = 64
FEW = 4
"""Channels of a picture, at most, where they come last."""


class ArraySource:
    """An array-like as a `Source`."""

    def __init__(self, array: Any, axes: str | None = None, name: str = "the array") -> None:
        if not all(hasattr(array, a) for a in ("shape", "dtype", "__getitem__")):
            raise InputError(
                f"{name} has no shape, dtype and slicing; got {type(array).__name__}. Give an array or a path."
            )
        shape = tuple(int(n) for n in array.shape)
        self.axes = _checked_axes(axes or _guess(shape, name), shape, name)
        self.array, self.name, self.resident = array, name, 0
        self.batched = "N" in self.axes
        order = [a for a in ("C", "Z", "Y", "X") if a in self.axes]
        self._spatial = [a for a in order if a != "C"]
        sizes = dict(zip(self.axes, shape, strict=True))
        self.shape = (sizes.get("C", 1), *(sizes[a] for a in self._spatial))
        self.dtype = _plain_dtype(array.dtype, name)
        self.chunks = self._chunks(array, shape)

    def _chunks(self, array: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial chunk sizes; ones where any slice is as cheap as another."""
        given = getattr(array, "chunks", None)
        if given is None:
            return (1,) * len(self._spatial)
        first = [c[0] if isinstance(c, tuple) else c for c in given]
        return tuple(int(dict(zip(self.axes, first, strict=True))[a]) for a in self._spatial)

    def read(self, box: Box) -> Array:
        """A slice, channels first."""
        picks = dict(zip(self._spatial, (slice(lo, hi) for lo, hi in box), strict=True))
        index = tuple(0 if a == "N" else picks.get(a, slice(None)) for a in self.axes)
        try:
            found = np.asarray(self.array[index])
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise BadRegionError(
                f"{self.name}: region {box} cannot be read: {type(error).__name__}: {error}"
            ) from error
        left = [a for a in self.axes if a != "N"]
        if "C" not in left:
            found, left = found[np.newaxis], ["C", *left]
        found = found.transpose([left.index(a) for a in ("C", *self._spatial)])
        return np.array(found, dtype=self.dtype, order="C", copy=True)

    def identity(self) -> dict[str, Any]:
        """Shape, dtype and a hash of samples: arrays in memory carry no date."""
        digest = hashlib.sha256()
        rng = np.random.default_rng(0)
        for _ in range(SAMPLES):
            corner = [int(rng.integers(0, n)) for n in self.shape[1:]]
            digest.update(self.read(tuple((i, i + 1) for i in corner)).tobytes())
        return {"name": self.name, "shape": list(self.shape), "dtype": str(self.dtype), "samples": digest.hexdigest()}

    def close(self) -> None:
        """Nothing is open."""


class FileArraySource(ArraySource):
    """An array that lives in a file or folder: told apart by path, size and date."""

    def __init__(self, array: Any, path: Path, axes: str | None = None, closer: Any = None) -> None:
        super().__init__(array, axes, repr(str(path)))
        self.path, self._closer = path, closer

    def identity(self) -> dict[str, Any]:
        """Path, size, date, shape, dtype."""
        return {"shape": list(self.shape), "dtype": str(self.dtype)} | file_identity(self.path)

    def close(self) -> None:
        """Close the file."""
        if self._closer is not None:
            self._closer.close()


def file_identity(path: Path) -> dict[str, Any]:
    """Path, size and date of a file; of a folder, of all files in it together."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    stats = [p.stat() for p in files]
    newest = max((s.st_mtime_ns for s in stats), default=0)
    return {"path": str(path.resolve()), "bytes": sum(s.st_size for s in stats), "changed": newest}


def _plain_dtype(dtype: Any, name: str) -> np.dtype[Any]:
    found = np.dtype(dtype)
    if found.kind not in "buif":
        raise InputError(f"{name} holds {found}; pixels are bool, integers or floating point. Convert it first.")
    return found.newbyteorder("=")


def _guess(shape: tuple[int, ...], name: str) -> str:
    if len(shape) == 3:
        return "YXC" if shape[2] <= FEW < shape[0] else "CYX"
    found = {2: "YX", 4: "NCYX"}.get(len(shape))
    if found is None:
        raise InputError(f"{name} has shape {shape}: name its axes, for example axes='CZYX' (N C Z Y X are known).")
    return found


def _checked_axes(axes: str, shape: tuple[int, ...], name: str) -> str:
    axes = axes.upper()
    wrong = sorted(set(axes) - set("NCZYX"))
    if wrong or len(set(axes)) != len(axes) or len(axes) != len(shape) or not {"Y", "X"} <= set(axes):
        raise InputError(
            f"axes={axes!r} do not name the axes of {name}, shape {shape}: one letter each of N C Z Y X, with Y and X"
        )
    if "N" in axes and shape[axes.index("N")] != 1:
        raise InputError(
            f"{name} has a batch of {shape[axes.index('N')]} in shape {shape}: a run takes one picture. Give one at a time."
        )
    return axes
