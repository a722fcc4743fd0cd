"""How far a run is, region by region, with the time left; on standard error.

On a terminal with rich installed a bar, else a line of text every few seconds, which suits log
files. Results go to standard output and are never mixed with it.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TextIO

SECONDS_BETWEEN_LINES = 5.0
SECONDS_TO_FIRST_LINE = 1.0


class Progress(Protocol):
    """Told after each region how many of how many are done. The bar and the lines are two ways to show it."""

    def step(self, done: int, total: int) -> None: ...


@contextmanager
def show_progress(quiet: bool = False, stream: TextIO | None = None, size: int | None = None) -> Iterator[Progress]:
    """The progress to tell, shown on `stream` (standard error) until the `with` block ends; `size`: bytes of the input."""
    out = sys.stderr if stream is None else stream
    if quiet:
        yield _Silent()
        return
    rich = _rich_progress() if out.isatty() else None
    if rich is None:
        yield _Lines(out, size)
        return
    with _bar(rich, out) as bar:
        yield _Bar(bar, size)


class _Silent:
    def step(self, done: int, total: int) -> None:
        return


class _Lines:
    """A line after the first second, then at most every few seconds, and one at the end."""

    def __init__(self, out: TextIO, size: int | None) -> None:
        self._out, self._size = out, size
        self._first: int | None = None
        self._start = time.monotonic()
        self._last = self._start - SECONDS_BETWEEN_LINES + SECONDS_TO_FIRST_LINE

    def step(self, done: int, total: int) -> None:
        now = time.monotonic()
        self._first = done - 1 if self._first is None else self._first  # regions of an earlier run
        if done < total and now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        left = time_left(now - self._start, done - self._first, total - self._first)
        ending = f"{clock(left)} left" if done < total else f"took {clock(now - self._start)}"
        if self._size is not None:
            ending = f"{rate(self._size, done - self._first, total, now - self._start)}, {ending}"
        with suppress(OSError, ValueError):  # a log whose reader left, or whose disk is full, stops no run
            print(f"region {done}/{total}, {ending}", file=self._out, flush=True)


class _Bar:
    """A bar of rich, whose total is known at the first region."""

    def __init__(self, bar: Any, size: int | None) -> None:
        self._bar, self._size, self._start = bar, size, time.monotonic()
        self._first: int | None = None
        self._task = bar.add_task("regions", total=None)

    def step(self, done: int, total: int) -> None:
        self._first = done - 1 if self._first is None else self._first
        if self._size is not None:
            taken = rate(self._size, done - self._first, total, time.monotonic() - self._start)
            self._bar.update(self._task, description=f"regions, {taken}")
        self._bar.update(self._task, completed=done, total=total)


def time_left(elapsed: float, done: int, total: int) -> float:
    """Seconds left if the other regions take as long as those done did on average."""
    return elapsed * (total - done) / done if done else 0.0


def rate(size: int, done: int, total: int, elapsed: float) -> str:
    """MB of input in a second."""
    return f"{size * done / total / max(elapsed, 1e-3) / 1e6:.1f} MB/s"


def clock(seconds: float) -> str:
    """Seconds as "0:07", "12:34" or "1:02:03"."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _rich_progress() -> Any:
    try:
        return importlib.import_module("rich.progress")
    except ImportError:
        return None


def _bar(rich: Any, out: TextIO) -> Any:
    console = importlib.import_module("rich.console").Console(file=out)
    return rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
        console=console,
    )
