"""Standard streams that may be closed, full or left by their reader.

A process started with `>&-` has no file descriptor 1: Python's `sys.stdout` is None, and the next file
that is opened, such as the result, would get that number and with it all that C code prints.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


@contextmanager
def usable_streams() -> Iterator[bool]:
    """Streams that take whatever is written inside the `with` block; yields whether standard output reaches anyone."""
    before = sys.stdout, sys.stderr
    _fill_descriptors()
    open_for_all = not _is_closed(before[0])
    with open(os.devnull, "w") as nowhere:
        sys.stdout, sys.stderr = (nowhere if _is_closed(stream) else stream for stream in before)
        try:
            yield open_for_all
        finally:
            sys.stdout, sys.stderr = before


def say(text: str) -> None:
    """A message on standard error; if nobody can be told, the exit status still can."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def silence(stream: TextIO) -> None:
    """Keep the interpreter from complaining when it flushes at exit a stream that failed."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fill_descriptors() -> None:
    """Open what is closed of 0, 1 and 2: a new descriptor is always the lowest that is free."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _is_closed(stream: TextIO | None) -> bool:
    return stream is None or stream.closed
