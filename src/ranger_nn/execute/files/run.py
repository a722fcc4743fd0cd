"""`run`: from file to file, region by region, inside a stated memory, and on again after a crash.

    source --Reader--> pixels --Pixels--> tensor --program--> output --Reduction--> rows --FileSink--> result
              once        declared                                    + Tally

After each region the rows are on the disk and the journal says so; a run that finds a journal of the same model, input,
plan and options goes on there (`execute/resume.py`). The dry run is an adapter's `prepare`. Enter at `run`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranger_nn.errors import InputError
from ranger_nn.execute.files.prepared import Prepared
from ranger_nn.execute.files.reduction import Reduction, reduction
from ranger_nn.execute.files.report import Report
from ranger_nn.execute.files.work import Work
from ranger_nn.io.overlap import overlap
from ranger_nn.io.protocol import Array
from ranger_nn.io.sinks import check_sink
from ranger_nn.io.tally import Tally


@dataclass(frozen=True)
class Wanted:
    """What a run is to give: `target` a path or an array, the reduction of pictures, the names of statistics."""

    target: Any
    reduced: Reduction
    statistics: tuple[str, ...]
    overwrite: bool

    @classmethod
    def checked(
        cls,
        sink: Any,
        reduce: str | Callable[[Array], Array] | None,
        statistics: Sequence[str] | None,
        overwrite: bool,
    ) -> Wanted:
        """Validate, before anything is opened or planned; arguments and errors as for `ranger_nn.run`."""
        chosen = reduction(reduce)
        counted = chosen.given is None and chosen.name.startswith(("argmax", "threshold"))
        default = ("histogram",) if counted else ("mean", "max")
        names = default if statistics is None else tuple(statistics)
        Tally(names)
        return cls(_target(sink, overwrite), chosen, names, overwrite)


def run(made: Prepared, wanted: Wanted, resume: bool, on_region: Callable[[int, int], None] | None) -> Report:
    """Run what is prepared; the source is closed at the end. Arguments and errors as for `ranger_nn.run`."""
    try:
        if isinstance(wanted.target, Path) and overlap(made.source, wanted.target):
            raise InputError(
                f"the result {str(wanted.target)!r} would take the place of its own input, {made.source.name}. Give it another name."
            )
        work = Work(made, wanted.target, wanted.reduced, wanted.statistics, on_region, wanted.overwrite)
        return work.run(resume and not wanted.overwrite)
    finally:
        made.source.close()


def _target(sink: Any, overwrite: bool) -> Any:
    """A path, or an array that can be filled.

    Raises:
        InputError: neither, or the path cannot be written.
    """
    if isinstance(sink, str | os.PathLike):
        return check_sink(sink, overwrite)
    if all(hasattr(sink, a) for a in ("shape", "dtype", "__setitem__")):
        return sink
    raise InputError(f"a result is a path, or an array with shape, dtype and slicing; got {type(sink).__name__}")
