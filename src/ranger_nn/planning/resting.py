"""The garbage collector rests while a plan is made: what planning makes is kept, and looked through again and again in vain."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def resting() -> Iterator[None]:
    """Without the garbage collector; also a decorator. Of several threads in it the first to enter lets it go on."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
