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
from ranger_nn.io.overlap import inner_name, stored_at
from ranger_nn.io.protocol import Array, BadRegionError, Box

SAMPLES = 64
"""Places at which an input that cannot be read through is looked at."""
SPAN = 1 << 16
"""Bytes of a file that are looked at in each place."""
BAND = 1 << 24
"""Bytes of an array in memory that are hashed at once."""
FEW = 4
"""Channels of a picture, at most, where they come last."""


class ArraySource:
    """An array-like as a `Source`."""

    depth: int | None = None

    def __init__(self, array: Any, axes: str | None = None, name: str = "the array") -> None:
        if not all(hasattr(array, a) for a in ("shape", "dtype", "__getitem__")):
            raise InputError(
                f"{name} has no shape, dtype and slicing; got {type(array).__name__}. Give an array or a path."
            )
        shape = tuple(int(n) for n in array.shape)
        self.axes = _checked_axes(axes or _guess(shape, name), shape, name)
        self.array, self.name, self.resident = array, name, 0
        self.guessed = axes is None
        self.batched = "N" in self.axes
        order = [a for a in ("C", "Z", "Y", "X") if a in self.axes]
        self._spatial = [a for a in order if a != "C"]
        sizes = dict(zip(self.axes, shape, strict=True))
        self.shape = (sizes.get("C", 1), *(sizes[a] for a in self._spatial))
        self.dtype = _plain_dtype(array.dtype, name)
        if 0 in shape:
            raise InputError(f"{name} has shape {shape}: it holds no pixels")
        self.chunks = self._chunks(array, shape)

    def notes(self) -> list[str]:
        """How the axes were taken, where they may be those of a volume as well."""
        if not self.guessed or self.shape[0] <= FEW or len(self.array.shape) < 3:
            return []
        sizes = ", ".join(f"{a} {n}" for a, n in zip(self.axes, self.array.shape, strict=True))
        return [f"{self.name} was taken as {sizes}; of a volume name the axes: axes='ZYX' or 'CZYX' (--axes)"]

    def _chunks(self, array: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial chunk sizes; ones where any slice is as cheap as another."""
        given = getattr(array, "chunks", None)
        if given is None:
            return (1,) * len(self._spatial)
        first = [c[0] if isinstance(c, tuple) else c for c in given]
        if len(first) != len(shape) or any(c < 1 for c in first):
            raise InputError(
                f"{self.name} has shape {shape} in chunks of {tuple(given)}: a chunk holds one element or more"
            )
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
        """Shape, dtype, axes and what the array holds: arrays in memory carry no date.

        An array in memory is hashed whole; one that lives in a file has the file's size, dates and samples; one that is
        computed when it is read (Dask, a remote store) is looked at in some places.
        """
        plain = {"name": self.name, "shape": list(self.shape), "dtype": str(self.dtype), "axes": self.axes}
        file = stored_at(self.array)
        if file is not None:
            return plain | {"inner": inner_name(self.array)} | self._view() | file_identity(file)
        whole = isinstance(self.array, np.ndarray)
        return plain | {"samples": self._hash(whole), "token": "" if whole else inner_name(self.array)}

    def standing(self) -> dict[str, Any]:
        """What tells, at little cost, whether the input changes: of an array in memory, what it holds in some places."""
        if not isinstance(self.array, np.ndarray) or stored_at(self.array) is not None:
            return self.identity()
        return {"samples": self._hash(False)}

    def _view(self) -> dict[str, Any]:
        """Of a memory map: where in the file it begins, and how it goes on."""
        found = getattr(self.array, "__array_interface__", None)
        if not isinstance(self.array, np.ndarray) or found is None:
            return {}
        root = self.array
        while isinstance(root.base, np.ndarray):
            root = root.base
        begin = found["data"][0] - root.__array_interface__["data"][0] + getattr(root, "offset", 0)
        return {"begin": begin, "strides": list(self.array.strides)}

    def _hash(self, whole: bool) -> str:
        digest = hashlib.sha256()
        rows, rest = self.shape[1], self.shape[2:]
        if whole:
            step = max(1, BAND * rows // max(1, self.array.nbytes))
            boxes = [((top, min(top + step, rows)), *((0, n) for n in rest)) for top in range(0, rows, step)]
        else:
            rng = np.random.default_rng(0)
            corners = [[int(rng.integers(0, n)) for n in self.shape[1:]] for _ in range(SAMPLES)]
            boxes = [tuple((i, min(i + 8, n)) for i, n in zip(c, self.shape[1:], strict=True)) for c in corners]
        for box in boxes:
            digest.update(self.read(box).tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        """Nothing is open."""


class FileArraySource(ArraySource):
    """An array that lives in a file or folder: told apart by path, size and date."""

    def __init__(self, array: Any, path: Path, axes: str | None = None, closer: Any = None) -> None:
        super().__init__(array, axes, repr(str(path)))
        self.path, self._closer = path, closer

    def identity(self) -> dict[str, Any]:
        """Path, size, dates, samples; shape, dtype, axes, and which array of the file it is."""
        plain = {"shape": list(self.shape), "dtype": str(self.dtype), "axes": self.axes}
        return plain | {"inner": inner_name(self.array)} | file_identity(self.path)

    def standing(self) -> dict[str, Any]:
        """As `identity`, which looks at the file only."""
        return self.identity()

    def close(self) -> None:
        """Close the file."""
        if self._closer is not None:
            self._closer.close()


def file_identity(path: Path) -> dict[str, Any]:
    """Path, size, dates and samples of a file; of a folder, of all files in it together.

    The date of change of the inode is among them: unlike the file's own it cannot be set back.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    stats = [p.stat() for p in files]
    told = hashlib.sha256()
    for file, s in zip(files, stats, strict=True):
        inside = str(file.relative_to(path)) if file != path else ""
        told.update(f"{inside}\0{s.st_size} {s.st_mtime_ns} {s.st_ctime_ns} {s.st_ino}\n".encode())
    newest = max((s.st_mtime_ns for s in stats), default=0)
    total = sum(s.st_size for s in stats)
    return {
        "path": str(path.resolve()),
        "bytes": total,
        "changed": newest,
        "files": told.hexdigest(),
        "contents": _samples(files, [s.st_size for s in stats]),
    }


def _samples(files: list[Path], sizes: list[int]) -> str:
    """A hash of some spans of bytes, the first and the last among them; of small files, of all."""
    digest = hashlib.sha256()
    every = max(1, len(files) // SAMPLES)
    for file, size in list(zip(files, sizes, strict=True))[::every]:
        count = max(2, SAMPLES // len(files))
        with open(file, "rb") as opened:
            for k in range(count):
                opened.seek(max(0, size - SPAN) * k // (count - 1))
                digest.update(opened.read(SPAN))
    return digest.hexdigest()


def _plain_dtype(dtype: Any, name: str) -> np.dtype[Any]:
    try:
        found = np.dtype(dtype)
    except TypeError as error:
        raise InputError(
            f"{name} holds {dtype}, which NumPy does not know. Convert it: a tensor with .numpy()."
        ) from error
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
            f"{name} has a batch of {shape[axes.index('N')]} in shape {shape}, as axes={axes!r}: a run takes one picture. Give "
            "one at a time; of a volume name the axes, for example axes='CZYX'."
        )
    return axes
