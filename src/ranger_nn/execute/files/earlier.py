"""What earlier runs of the same work left: where the journal says that this one goes on. Enter at `Earlier.found`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ranger_nn.core.reach import Box
from ranger_nn.errors import InputError
from ranger_nn.execute.files.handle import written_boxes
from ranger_nn.execute.files.prepared import Prepared
from ranger_nn.execute.resume import Boundary
from ranger_nn.io.journal import Journal
from ranger_nn.io.rows import ANEW
from ranger_nn.io.workplace import Workplace


@dataclass
class Earlier:
    """`first`: regions that are done; `again`: there is a journal to go on with, be it of none; `journal`: None where the
    result is an array, which nothing is kept for.
    """

    made: Prepared
    ends: list[Boundary]
    journal: Journal | None = None
    again: bool = False
    first: int = field(default=0)

    @classmethod
    def found(cls, made: Prepared, workplace: Workplace | None, options: dict[str, Any], resume: bool) -> Earlier:
        """What the working folder holds, or with `resume` off, or where it holds none, an empty one.

        Raises:
            InputError: the journal is of other work.
        """
        ends = made.boundaries()
        if workplace is None:
            return cls(made, ends)
        journal = Journal(workplace.folder, made.identity() | {"options": options})
        if not (resume and journal.resume(len(ends))):
            workplace.clear()
            return cls(made, ends, journal)
        expected = ends[journal.done - 1].states if journal.done else ()
        if journal.slots != set(expected):
            raise InputError(f"the journal in {str(workplace.folder)!r} keeps states of another plan: {ANEW}")
        made.reader.bad = list(journal.bad)
        return cls(made, ends, journal, True, journal.done)

    @property
    def end(self) -> Boundary | None:
        """Of the last region that is done."""
        return self.ends[self.first - 1] if self.first else None

    @property
    def nothing_done(self) -> bool:
        """Neither by earlier runs, nor by this one."""
        return not self.again and (self.journal is None or self.journal.done == 0)

    @cached_property
    def written(self) -> dict[int, list[Box]]:
        """What was written of each value, in order."""
        at = self.end.at if self.end is not None else 0
        return written_boxes(self.made.program.instructions[:at])

    def sum(self, file: str) -> int:
        """What the journal says that the file holds."""
        assert self.journal is not None
        return self.journal.files.get(file, 0)
