"""Names of results: which may be written, what may be replaced, and how a file takes its name.

    labels.npy            one output
    labels-0.npy  ...     several
    labels-depth.npy      the output "depth" of a model that gives a dictionary

`overwrite=True` replaces a plain file, or a Zarr array that carries our mark; never a folder or a group with anything
else in it, however deep, and never what a symbolic link points to. Enter at `check_free` and `place`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ranger_nn.errors import InputError
from ranger_nn.io.atomic import sync_folder

MARK = "made by ranger_nn"
"""Attribute of a Zarr result: such a folder may be replaced."""
NAME_MAX = 255
"""Bytes of a name, where the file system does not say."""
LONGEST_SHOWN = 200
"""Characters of a name that an error repeats: one line of a terminal, or a few."""
LONGEST = len("..00000000.partial")
"""What is put around a name while its file is in the making."""
UNSAFE = re.compile(r"[^\w.+=@-]+|^\.+")
"""What does not stand in a part of a file's name: separators, blanks, a dot that hides it."""


def checked_path(given: str | os.PathLike[str]) -> Path:
    """A path whose name the file system takes, with what is put around it meanwhile.

    Raises:
        InputError: empty, over-long, with a null byte.
    """
    text = os.fsdecode(given)
    if not text or "\0" in text:
        raise InputError(f"cannot write {text!r}: that is no name of a file. Give one such as 'result.npy'.")
    path, most = Path(text), NAME_MAX
    with suppress(OSError, ValueError):
        most = os.pathconf(path.parent, "PC_NAME_MAX")
    length = len(os.fsencode(path.name))
    if length + LONGEST > most:
        raise InputError(
            f"cannot write {text[:40] + '...'!r}: its name has {length} bytes, and {most - LONGEST} are the most here "
            f"({most}, less {LONGEST} for the working folder). Give a shorter name."
        )
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"cannot write {text[:80]!r}: {error.strerror}. Give another name.") from error
    return path


def numbered(path: Path, part: str | int) -> Path:
    """The name of one of several outputs."""
    return path.with_name(f"{path.stem}-{part}{path.suffix}")


def labels(keys: Sequence[Sequence[object]]) -> list[str]:
    """Parts of names for outputs that lie at `keys` (of dictionaries, positions of lists): as they are called, or numbers.

    Numbers where no dictionary is, or where two outputs would have the same name.
    """
    plain = [str(k) for k in range(len(keys))]
    if not any(isinstance(k, str) for path in keys for k in path):
        return plain
    named = [UNSAFE.sub("_", "-".join(str(k) for k in path)) or str(n) for n, path in enumerate(keys)]
    return named if len({n.casefold() for n in named}) == len(named) else plain


def check_free(path: Path, overwrite: bool) -> None:
    """Nothing stands under the name, or what may be replaced and is to be.

    Raises:
        InputError: it says what stands there.
    """
    if path.is_symlink():
        raise InputError(
            f"{str(path)!r} is a symbolic link to {os.readlink(path)!r}, and a result does not replace a link. Give that name, "
            "or another one."
        )
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise InputError(f"{str(path)!r} is there already. Give another name, or overwrite=True (--overwrite).")
    reason = _not_ours(path)
    if reason:
        raise InputError(f"{str(path)!r} is not replaced: {reason}. Move it away, or give another name.")


def _not_ours(path: Path) -> str:
    """Why what stands there is not replaced; empty where it may be."""
    if not path.is_dir():
        return "" if stat.S_ISREG(path.lstat().st_mode) else "it is no plain file"
    entries = sorted(os.listdir(path))
    listed = ", ".join(map(repr, entries[:3])) or "nothing"
    if path.suffix.lower() != ".zarr" or "zarr.json" not in entries:
        return f"it is a folder that holds {listed}"
    with suppress(OSError, ValueError, AttributeError, KeyError, TypeError, ZeroDivisionError):
        found = json.loads((path / "zarr.json").read_bytes())
        if found.get("node_type") == "array" and MARK in found.get("attributes", {}):
            strange = _strange(path, _grid(found))
            return f"it holds {strange!r}, which no run wrote" if strange else ""
        return f"it is a Zarr {found.get('node_type')} that no run wrote; it holds {listed}"
    return f"it is a folder that holds {listed}"


def _grid(array: dict[str, Any]) -> list[int]:
    """Chunks along each axis of a Zarr array, from its zarr.json."""
    chunks = array["chunk_grid"]["configuration"]["chunk_shape"]
    return [-(-int(n) // int(c)) for n, c in zip(array["shape"], chunks, strict=True)]


def _strange(path: Path, grid: list[int]) -> str:
    """The first thing in the folder of a Zarr array that is no chunk of it; empty: there is none.

    Chunks are c/0/2/1 and the like: folders, a file at the end, each name the chunk's place along an axis.
    """
    for folder, folders, files in os.walk(path):
        depth = len(Path(folder).relative_to(path).parts)  # 0: here, 1: c, then the axes
        for name in sorted([*folders, *files]):
            there = Path(folder) / name
            inner = depth < len(grid) and (depth > 0 or name == "c")
            mode = there.lstat().st_mode
            known = _is_place(name, grid[depth - 1]) if depth else name in ("c", "zarr.json")
            if not known or not (stat.S_ISDIR(mode) if inner else stat.S_ISREG(mode)):
                return str(there.relative_to(path))
    return ""


def _is_place(name: str, count: int) -> bool:
    return name.isascii() and name.isdigit() and name == str(int(name)) and int(name) < count


def place(made: Path, path: Path, overwrite: bool) -> None:
    """Give `made` its final name; what stands there is replaced only as `check_free` allows.

    Raises:
        InputError: something stands there by now.
    """
    check_free(path, overwrite)
    if made.is_dir():
        if path.exists():
            os.rename(path, made.with_name(f"replaced-{made.stat().st_ino}"))
        os.rename(made, path)
    elif overwrite:
        os.replace(made, path)
    else:
        _link(made, path)
    sync_folder(path.parent)


def _link(made: Path, path: Path) -> None:
    """A rename that replaces nothing, also if it came there a moment ago."""
    try:
        os.link(made, path)
    except FileExistsError:
        check_free(path, False)
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES, errno.EXDEV):
            raise
        os.replace(made, path)  # no hard links here: the name was free a moment ago
        return
    made.unlink()


def shown(name: object) -> str:
    """A name as an error repeats it: cut where it is long."""
    text = str(name)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
