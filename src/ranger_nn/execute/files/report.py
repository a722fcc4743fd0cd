"""What a run did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FEW = 1000
"""Numbers of an output that is no picture which the report holds."""


@dataclass(frozen=True)
class Report:
    """What a run did. Bytes are int, times in seconds.

    Attributes:
        files: what was written.
        statistics: of each picture, by its name ("output 0"), see `run`.
        values: outputs that are no pictures (class scores, say), by name, where they are few.
        regions, resumed_at: regions in all, and how many were done by earlier runs of the same work.
        bytes_read, bytes_written: of pixels, decoded and raw, by this run.
        seconds, waited: of this run, and of it the time that kernels waited for files.
        allowed, projected: bytes of memory.
        bad: regions of the input that could not be read and were filled with zeros.
        notes: what the input's header says and was not acted upon (a value of no data that was not declared).
    """

    files: tuple[str, ...]
    statistics: dict[str, Any]
    values: dict[str, Any]
    regions: int
    resumed_at: int
    bytes_read: int
    bytes_written: int
    seconds: float
    waited: float
    allowed: int | None
    projected: int
    bad: tuple[Any, ...]
    notes: tuple[str, ...] = ()
