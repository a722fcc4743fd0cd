"""Write a file all or nothing: a reader sees the old file or the whole new one, never a part.

The bytes go to a hidden file in the same folder (the same file system, so that the last step is a
rename), are flushed to the disk, and only then take the final name. Whatever interrupts the writing
removes the hidden file.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ranger_nn.errors import InputError, RangerError, WriteError


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file, readable too, that becomes `path` when the `with` block ends without an error.

    Raises:
        InputError: the folder does not exist or cannot be written.
        WriteError: the disk is full, say.
    """
    final = Path(path)
    partial = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
    try:
        # Not tempfile: its mode 0600 would stay on the result; open() gives what the user's umask says.
        file = open(partial, "x+b")  # noqa: SIM115 (closed below, before the rename)
    except OSError as error:
        raise InputError(f"cannot write {str(final)!r}: {error.strerror}. Choose a folder that exists.") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, final)
    except OSError as error:
        with suppress(FileNotFoundError):
            partial.unlink()
        if isinstance(error, RangerError):
            raise
        raise WriteError(
            f"cannot write {str(final)!r}: {error.strerror or error}. Make room, or choose another place."
        ) from error
    except BaseException:
        with suppress(FileNotFoundError):
            partial.unlink()
        raise
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
