"""The work of one run: what an earlier one left, the loop over regions, and the final names.

    journal    whether to go on, and where                               `earlier.py`
    sinks      rows in the working folder, held to what the journal says  `results.py`
    loop       after each region: rows to the disk, then into the journal
    names      final forms in the working folder, then one rename each    `results.py`

Enter at `Work.run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ranger_nn.core.program import FINISH, RUN, Instruction
from ranger_nn.core.reach import Box
from ranger_nn.errors import InputError
from ranger_nn.execute.files.absent import absent_file
from ranger_nn.execute.files.earlier import Earlier
from ranger_nn.execute.files.feed import Feed
from ranger_nn.execute.files.handle import FileEngine, Handle, loaded_boxes
from ranger_nn.execute.files.outlet import Outlet
from ranger_nn.execute.files.prepared import Prepared
from ranger_nn.execute.files.reduction import Reduction
from ranger_nn.execute.files.report import FEW, Report
from ranger_nn.execute.files.results import Results
from ranger_nn.execute.files.stored import Stored
from ranger_nn.execute.guard import guarded
from ranger_nn.execute.machine import bind
from ranger_nn.execute.machine import run as loop
from ranger_nn.execute.resume import Boundary
from ranger_nn.io.journal import Journal
from ranger_nn.io.overlap import in_same_files
from ranger_nn.io.protocol import Array
from ranger_nn.io.rows import RowFile
from ranger_nn.io.workplace import Workplace


class Work:
    """One run: where things are, then the loop, then the final names."""

    def __init__(
        self,
        made: Prepared,
        target: Any,
        reduced: Reduction,
        statistics: tuple[str, ...],
        on_region: Callable[[int, int], None] | None,
        overwrite: bool,
    ) -> None:
        self.made, self.target, self.on_region = made, target, on_region
        self.options = {"reduce": reduced.identity(), "statistics": list(statistics), "skip_bad": made.reader.skip_bad}
        self.stored: list[Stored] = []
        self.absent: RowFile | None = None
        self.earlier: Earlier | None = None
        self.workplace = Workplace(target) if isinstance(target, Path) else None
        self.results = Results(made, target, self.workplace, reduced, statistics, overwrite)
        self.outlet = Outlet()

    def run(self, resume: bool) -> Report:
        """From the start, or from where the journal says."""
        start = time.perf_counter()
        feed = None
        try:
            before = self._standing()
            options = self.options | self.made.framework.setting()
            self.earlier = earlier = Earlier.found(self.made, self.workplace, options, resume)
            self.absent = absent_file(self.made, self.workplace, earlier)
            self.results.open(earlier, self.outlet, self.absent)
            instructions = self.made.rest(earlier.end)
            feed = self._feed(instructions)
            slots = self._loop(feed, instructions, earlier)
            self.outlet.close()
            values = self.results.values(self.made.program, slots)
            self._check_input(before)
            files = self.results.finish(values)
            if self.workplace is not None:
                self.workplace.remove()
        except BaseException:
            self.outlet.close(quiet=True)
            self._leave_no_trace()
            raise
        finally:
            if feed is not None:
                feed.close()
            self._close()
        return self._report(earlier, files, values, time.perf_counter() - start, feed.waited + self.outlet.waited)

    def _standing(self) -> Any:
        """What tells whether the input is still what it was; nothing where results go into its own files."""
        source = self.made.source
        return None if in_same_files(source, self.target) else getattr(source, "standing", source.identity)()

    def _check_input(self, before: Any) -> None:
        """Before a result takes its name.

        Raises:
            InputError: the input has changed since the run began.
        """
        try:
            same = before is None or self._standing() == before
        except OSError:  # it is gone
            same = False
        if not same:
            raise InputError(
                f"{self.made.source.name} changed while the run read it, so that regions of the result are of one and of the "
                "other: it does not take its name. Leave the input as it is meanwhile, and start anew: overwrite=True "
                "(--overwrite)."
            )

    def _report(
        self, earlier: Earlier, files: list[str], values: dict[str, Array], seconds: float, waited: float
    ) -> Report:
        made, pictures = self.made, self.results.pictures.values()
        return Report(
            files=tuple(files),
            statistics={p.name: p.tally.result() for p in pictures},
            values={k: v.tolist() for k, v in values.items() if v.size <= FEW},
            regions=len(earlier.ends),
            resumed_at=earlier.first,
            bytes_read=made.reader.taken,
            bytes_written=sum(p.written for p in pictures),
            seconds=seconds,
            waited=waited,
            allowed=made.allowed,
            projected=made.projected,
            bad=tuple(made.reader.bad),
            notes=tuple(made.notes()),
        )

    def _leave_no_trace(self) -> None:
        """Where this run began anew and did no region there is nothing to go on with: no working folder is left."""
        if self.workplace is not None and self.earlier is not None and self.earlier.nothing_done:
            with suppress(OSError):
                self.workplace.remove()

    # ---- the loop

    def _owner(self, v: int, earlier: Earlier) -> Any:
        """Where a value is written by region: a picture, or a file between sweeps."""
        if v in self.results.pictures:
            return self.results.pictures[v]
        if self.workplace is None:
            raise InputError(
                f"{self.made.graph.name} needs several sweeps, with values between them in files: give the result a path"
            )
        path = self.workplace.folder / f"stored-{v}"
        stored = Stored(path, self.made.graph.values[v], self.made.framework, earlier.again)
        self.stored.append(stored)
        if earlier.again:
            stored.file.verify(earlier.sum(path.name), earlier.written.get(v, []))
        return stored

    def _feed(self, instructions: list[Instruction]) -> Feed:
        made = self.made
        (v,) = made.graph.inputs
        value = made.graph.values[v]
        dtype = np.dtype(np.float64 if value.dtype == "float64" else np.float32)

        def read(box: Box) -> Array:
            place = made.order.spatial(box)
            x, absent = made.pixels.applied(made.reader.read(place), dtype)
            if self.absent is not None and absent is not None:
                self.absent.write(place, absent[np.newaxis])
            return made.order.value(x)

        boxes = loaded_boxes(instructions, made.program.external[v], value.shape)
        return Feed(boxes, read, lambda block: made.framework.tensor(block, value.dtype))

    def _loop(self, feed: Feed, instructions: list[Instruction], earlier: Earlier) -> list[Any]:
        """Run; the slots as they are at the end."""
        made = self.made
        slots: list[Any] = [None] * made.program.slots
        for (v, slot), tensor in zip(made.program.external.items(), made.framework.externals(), strict=True):
            whole = tuple((0, n) for n in made.graph.values[v].shape)
            slots[slot] = Handle(feed, whole) if tensor is None else tensor
        if earlier.journal is not None and earlier.first:
            self._restore(slots, earlier.journal)
        engine = FileEngine(made.framework.engine, lambda v: self._owner(v, earlier))
        by_region = {end.region: (k, end) for k, end in enumerate(earlier.ends)}
        with made.framework.quiet():
            steps = guarded(bind(instructions, engine), instructions, made.graph, engine.form)
            loop(steps, slots, engine, lambda region: self._ended(*by_region[region], slots, earlier))
        return slots

    def _restore(self, slots: list[Any], journal: Journal) -> None:
        """States of the earlier run: values of the graph as runs and finishes give them, tuples as lifts and merges do."""
        framework = self.made.framework
        for slot, parts in journal.states().items():
            dtype = self.types.get(slot)
            slots[slot] = tuple(map(framework.tensor, parts)) if dtype is None else framework.restored(parts[0], dtype)

    @cached_property
    def types(self) -> dict[int, str]:
        """Of slots that hold one value of the graph its type."""
        graph = self.made.graph
        found: dict[int, str] = {}
        for i in self.made.program.instructions:
            values = graph.nodes[i.node].outputs if i.op == RUN else (i.value,)
            if i.op in (RUN, FINISH):
                found |= {slot: graph.values[v].dtype for slot, v in zip(i.outs, values, strict=True)}
        return found

    def _kept(self, slot: int, state: Any) -> list[Array]:
        """What the journal keeps of a slot."""
        framework = self.made.framework
        return [framework.array(t) for t in state] if slot not in self.types else [framework.kept(state)]

    def _ended(self, k: int, end: Boundary, slots: list[Any], earlier: Earlier) -> None:
        """After a region that was not done before: its rows to the disk, then into the journal."""
        if k < earlier.first:
            return
        if earlier.journal is not None:
            kept = {s: self._kept(s, slots[s]) for s in end.states}
            sums = {s.file.path.name: s.file.sum for s in self.stored}
            bad = list(self.made.reader.bad)
            self.outlet.put(self._commit(earlier.journal, k + 1, kept, self.results.tallies(), bad, sums))
        if self.on_region is not None:
            self.on_region(k + 1, len(earlier.ends))

    def _commit(
        self,
        journal: Journal,
        done: int,
        states: dict[int, list[Array]],
        tally: dict[str, Any],
        bad: list[Any],
        sums: dict[str, int],
    ) -> Callable[[], None]:
        def save() -> None:
            self.results.durable()
            for file in self._files():
                file.sync()
            assert self.workplace is not None
            self.workplace.check()
            journal.done, journal.tally, journal.bad = done, tally, bad
            journal.files = sums | self.results.sums()
            journal.save(states)

        return save

    def _close(self) -> None:
        self.results.close()
        for file in self._files():
            file.close()
        if self.workplace is not None:
            self.workplace.close()

    def _files(self) -> list[RowFile]:
        """Files of the working folder beside the pictures' own."""
        return [stored.file for stored in self.stored] + ([] if self.absent is None else [self.absent])
