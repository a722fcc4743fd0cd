"""The work of one run: what an earlier one left, the loop over regions, and the final names.

    journal    whether to go on, and where
    sinks      rows in the working folder, held to what the journal says
    loop       after each region: rows to the disk, then into the journal
    names      final forms in the working folder, then one rename each

Enter at `Work.run`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ranger_nn.core.program import FINISH, RUN, Instruction
from ranger_nn.core.reach import Box
from ranger_nn.errors import InputError
from ranger_nn.execute.guard import guarded
from ranger_nn.execute.machine import bind
from ranger_nn.execute.machine import run as loop
from ranger_nn.execute.resume import Boundary, boundaries, replay
from ranger_nn.io.journal import Journal
from ranger_nn.io.naming import check_free, checked_path, numbered, place
from ranger_nn.io.overlap import in_same_files, overlap
from ranger_nn.io.protocol import Array
from ranger_nn.io.reader import Reader
from ranger_nn.io.rows import ANEW, RowFile, unwritten
from ranger_nn.io.sinks import FileSink
from ranger_nn.io.tally import Tally
from ranger_nn.io.workplace import Workplace
from ranger_nn.torch.files import Feed, FileEngine, Handle, Outlet, Stored, loaded_boxes, written_boxes
from ranger_nn.torch.pictures import ArraySink, HeldSink, Picture, PlacedSink, check_nodata
from ranger_nn.torch.prepare import Prepared
from ranger_nn.torch.reduce import Reduction

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
        self.made, self.target, self.reduced, self.statistics = made, target, reduced, statistics
        self.on_region, self.overwrite = on_region, overwrite
        self.journal: Journal | None = None
        self.first, self.fresh = 0, False
        self.pictures: dict[int, Picture] = {}
        self.stored: list[Stored] = []
        self.absent: RowFile | None = None
        self.labels = made.labels()
        self.ends = boundaries(made.program, made.lasting())
        self.workplace = Workplace(target) if isinstance(target, Path) else None
        self.folder = self.workplace.folder if self.workplace is not None else None
        self.outlet = Outlet()

    def run(self, resume: bool) -> Report:
        """From the start, or from where the journal says."""
        start = time.perf_counter()
        feed = None
        try:
            before = self._standing()
            again = self._open_journal(resume)
            self._open_absent(again)
            self._open_pictures(again)
            instructions = self._instructions()
            feed = self._feed(instructions)
            slots = self._loop(feed, instructions, again)
            self.outlet.close()
            values = self._values(slots)
            self._check_input(before)
            files = self._finish(values)
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
        return self._report(files, values, time.perf_counter() - start, feed.waited + self.outlet.waited)

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

    def _report(self, files: list[str], values: dict[str, Array], seconds: float, waited: float) -> Report:
        made = self.made
        return Report(
            files=tuple(files),
            statistics={p.name: p.tally.result() for p in self.pictures.values()},
            values={k: v.tolist() for k, v in values.items() if v.size <= FEW},
            regions=len(self.ends),
            resumed_at=self.first,
            bytes_read=made.reader.taken,
            bytes_written=sum(p.written for p in self.pictures.values()),
            seconds=seconds,
            waited=waited,
            allowed=made.allowed,
            projected=made.projected,
            bad=tuple(made.reader.bad),
            notes=tuple(made.notes()),
        )

    def _leave_no_trace(self) -> None:
        """Where this run began anew and did no region there is nothing to go on with: no working folder is left."""
        if self.workplace is not None and self.fresh and (self.journal is None or self.journal.done == 0):
            with suppress(OSError):
                self.workplace.remove()

    # ---- what is there before the loop

    def _open_journal(self, resume: bool) -> bool:
        """Whether the work goes on with what an earlier run did."""
        if self.workplace is None:
            return False
        options = {
            "reduce": self.reduced.identity(),
            "statistics": list(self.statistics),
            "skip_bad": self.made.reader.skip_bad,
            "threads": torch.get_num_threads(),
            "device": str(self.made.device),
        }
        self.journal = Journal(self.workplace.folder, self.made.identity() | {"options": options})
        if resume and self.journal.resume(len(self.ends)):
            self.first = self.journal.done
            expected = self.ends[self.first - 1].states if self.first else ()
            if self.journal.slots != set(expected):
                raise InputError(f"the journal in {str(self.folder)!r} keeps states of another plan: {ANEW}")
            self.made.reader.bad = list(self.journal.bad)
            return True
        self.workplace.clear()
        self.fresh = True
        return False

    def _open_absent(self, again: bool) -> None:
        """Where the input has no data: a file, since the rows of the result come later than those of the input."""
        if self.made.pixels.result is None:
            return
        if self.folder is None:
            raise InputError("result= of Pixels keeps where the input has no data in a file: give the result a path")
        sizes = self.made.source.shape[1:]
        for v in self.made.pictures():
            if self.made.graph.values[v].shape[2:] != tuple(sizes):
                raise InputError(
                    f"result= of Pixels stands where the input has no data, and {self.made.graph.name} gives "
                    f"{self.made.graph.values[v].shape[2:]} from {tuple(sizes)}: leave it out where the sizes differ"
                )
        self.absent = RowFile(self.folder / "absent", (1, *sizes), np.uint8)
        if again and self.first:
            self._find_absent_again(self.absent)

    def _find_absent_again(self, absent: RowFile) -> None:
        """From the input as far as it was read: what an earlier run noted is not trusted."""
        made = self.made
        (v,) = made.graph.inputs
        before = made.program.instructions[: self.ends[self.first - 1].at]
        reader = Reader(made.source, None, made.reader.skip_bad)
        for box in loaded_boxes(before, made.program.external[v], made.graph.values[v].shape):
            found = made.pixels.applied(reader.read(box[2:]), np.dtype(np.float32))[1]
            assert found is not None
            absent.write(box[2:], found[np.newaxis])

    def _open_pictures(self, again: bool) -> None:
        values, found = self.made.graph.values, self.made.pictures()
        if not found and not (isinstance(self.target, Path) and self.target.suffix.lower() == ".npy"):
            raise InputError(
                f"{type(self.made.model).__name__} gives no picture on {self.made.source.name}, only numbers for the whole: "
                "write them to a name that ends in .npy"
            )
        for k, v in enumerate(found):
            small = [values[v].shape[1], *(min(2, n) for n in values[v].shape[2:])]
            probe = self.reduced(torch.zeros(small, dtype=getattr(torch, values[v].dtype)))
            probe = probe.float() if probe.dtype == torch.bfloat16 else probe
            name, shape = self._title(v), (probe.shape[0], *values[v].shape[2:])
            tally = self._tally(name, v)
            dtype, nodata = probe.numpy().dtype, self.made.pixels.result
            check_nodata(nodata, dtype)
            if "histogram" in self.statistics and dtype.kind not in "bui":
                raise InputError(
                    f"the histogram counts classes, and {name} is {dtype}: reduce it, or leave the histogram out"
                )
            sink = self._sink(k, v, len(found), shape, dtype, again)
            if again and isinstance(sink, FileSink):
                sink.rows.verify(self._sum(f"rows-{k}"), [box[2:] for box in self.written.get(v, [])])
            self.pictures[v] = Picture(name, sink, self.reduced, tally, self.outlet, self.absent, nodata)

    def _tally(self, name: str, v: int) -> Tally:
        """What earlier runs counted of what they wrote."""
        tally = Tally(self.statistics)
        if self.journal is None or not self.first:
            return tally
        pixels = sum(prod(hi - lo for lo, hi in box[2:]) for box in self.written.get(v, []))
        try:
            state, channels = self.journal.tally.get(name), self.made.graph.values[v].shape[1]
            tally.take(state, channels, pixels, self.absent is not None)
        except ValueError as error:
            raise InputError(f"the journal in {str(self.folder)!r} is none of this run ({error}): {ANEW}") from error
        return tally

    def _title(self, v: int) -> str:
        label = self.labels[v]
        return f"output {label}" if label.isdigit() else label

    @cached_property
    def written(self) -> dict[int, list[Box]]:
        """What earlier runs wrote of each value, in order."""
        end = self.ends[self.first - 1].at if self.first else 0
        return written_boxes(self.made.program.instructions[:end])

    def _sum(self, file: str) -> int:
        """What the journal says that the file holds."""
        assert self.journal is not None
        return self.journal.files.get(file, 0)

    def _sink(self, k: int, v: int, count: int, shape: tuple[int, ...], dtype: Any, again: bool) -> Any:
        if self.folder is None:
            if count > 1 or tuple(self.target.shape) not in (shape, shape[1:] if shape[0] == 1 else shape):
                raise InputError(
                    f"the array has shape {tuple(self.target.shape)}; the model gives {count} picture(s) of shape {shape}"
                )
            over = overlap(self.made.source, self.target)
            return HeldSink(self.target, shape, dtype) if over else ArraySink(self.target, dtype)
        source = self.made.source
        where = source.geography() if hasattr(source, "geography") else None
        where = None if where is None else {"size": source.shape[-2:], **where}
        final = self._free(self.target if count == 1 else numbered(self.target, self.labels[v]))
        rows = self.folder / f"rows-{k}.npy"
        if self._is_placed(final) and not rows.exists():
            return PlacedSink(final)
        return FileSink(final, shape, dtype, where, again, rows, self.made.pixels.result)

    def _is_placed(self, final: Path) -> bool:
        """An earlier run, which ended right after that, gave the result its name."""
        known = self.journal.placed.get(final.name) if self.journal is not None else None
        return known is not None and os.path.lexists(final) and final.lstat().st_ino == known

    def _free(self, final: Path) -> Path:
        """The name of one of several results, which nothing else has."""
        if final != self.target and not self._is_placed(final):
            if overlap(self.made.source, final):
                raise InputError(f"the result {str(final)!r} would take the place of the input. Give another name.")
            check_free(checked_path(final), self.overwrite)
        return final

    def _owner(self, v: int, again: bool) -> Any:
        """Where a value is written by region: a picture, or a file between sweeps."""
        if v in self.pictures:
            return self.pictures[v]
        folder = self.folder
        if folder is None:
            raise InputError(
                f"{self.made.graph.name} needs several sweeps, with values between them in files: give the result a path"
            )
        value, path = self.made.graph.values[v], folder / f"stored-{v}"
        device = self.made.device
        stored = Stored(path, value.shape, getattr(torch, value.dtype), device, again)
        self.stored.append(stored)
        if again:
            stored.file.verify(self._sum(path.name), self.written.get(v, []))
        return stored

    # ---- the loop

    def _instructions(self) -> list[Instruction]:
        """All, or what must run again and the rest."""
        program = self.made.program
        if not self.first:
            return program.instructions
        end = self.ends[self.first - 1]
        return [*replay(program, end), *program.instructions[end.at :]]

    def _feed(self, instructions: list[Instruction]) -> Feed:
        made = self.made
        (v,) = made.graph.inputs
        value = made.graph.values[v]
        dtype = np.dtype(np.float64 if value.dtype == "float64" else np.float32)

        def read(box: Box) -> Array:
            x, absent = made.pixels.applied(made.reader.read(box[2:]), dtype)
            if self.absent is not None and absent is not None:
                self.absent.write(box[2:], absent[np.newaxis])
            return x[np.newaxis]

        boxes = loaded_boxes(instructions, made.program.external[v], value.shape)
        return Feed(boxes, read, made.device, getattr(torch, value.dtype))

    def _loop(self, feed: Feed, instructions: list[Instruction], again: bool) -> list[Any]:
        """Run; the slots as they are at the end."""
        made = self.made
        slots: list[Any] = [None] * made.program.slots
        for (v, slot), tensor in zip(made.program.external.items(), made.externals(), strict=True):
            whole = tuple((0, n) for n in made.graph.values[v].shape)
            slots[slot] = Handle(feed, whole) if tensor is None else tensor
        if self.journal is not None and self.first:
            self._restore(slots, self.journal)
        engine = FileEngine(made.graph, made.device, lambda v: self._owner(v, again))
        by_region = {end.region: (k, end) for k, end in enumerate(self.ends)}
        with torch.no_grad():
            steps = guarded(bind(instructions, engine), instructions, made.graph, engine.form)
            loop(steps, slots, engine, lambda region: self._ended(*by_region[region], slots))
        return slots

    def _restore(self, slots: list[Any], journal: Journal) -> None:
        """States of the earlier run: tensors as runs and finishes give them, tuples as lifts and merges do."""
        single = {slot for i in self.made.program.instructions if i.op in (RUN, FINISH) for slot in i.outs}
        for slot, parts in journal.states().items():
            loaded = tuple(torch.from_numpy(a).to(self.made.device) for a in parts)
            slots[slot] = loaded[0] if slot in single else loaded

    def _ended(self, k: int, end: Boundary, slots: list[Any]) -> None:
        """After a region that was not done before: its rows to the disk, then into the journal."""
        if k < self.first:
            return
        if self.journal is not None:
            states = {s: slots[s] if isinstance(slots[s], tuple) else (slots[s],) for s in end.states}
            kept = {s: [t.cpu().numpy() for t in parts] for s, parts in states.items()}
            tally = {p.name: p.tally.state() for p in self.pictures.values()}
            sums = {s.file.path.name: s.file.sum for s in self.stored}
            self.outlet.put(self._commit(self.journal, k + 1, kept, tally, list(self.made.reader.bad), sums))
        if self.on_region is not None:
            self.on_region(k + 1, len(self.ends))

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
            for picture in self.pictures.values():
                picture.sink.durable()
            for file in self._files():
                file.sync()
            assert self.workplace is not None
            self.workplace.check()
            rows = {p.sink.rows.path.stem: p.sink.rows.sum for p in self.pictures.values()}
            journal.done, journal.tally, journal.bad, journal.files = done, tally, bad, sums | rows
            journal.save(states)

        return save

    # ---- after the loop

    def _values(self, slots: list[Any]) -> dict[str, Array]:
        """Outputs that are no pictures."""
        program, outputs = self.made.program, dict.fromkeys(self.made.graph.outputs)
        rest = [v for v in outputs if v not in self.pictures and v in program.results]
        found = [slots[program.results[v]] for v in rest]
        return {
            self._title(v): (t.float() if t.is_floating_point() else t).cpu().numpy()
            for v, t in zip(rest, found, strict=True)
        }

    def _finish(self, values: dict[str, Array]) -> list[str]:
        """Final forms, then final names."""
        if self.workplace is None or self.journal is None:
            for picture in self.pictures.values():
                picture.sink.finish()
            return []
        ready: list[tuple[Path | None, Path]] = []
        for picture in self.pictures.values():
            final = picture.sink.path
            ready.append((None if self._is_placed(final) else picture.sink.form(), final))
        ready += [(self._save_value(k, array, final), final) for k, (array, final) in enumerate(self._saved(values))]
        self.journal.placed |= {final.name: made.stat().st_ino for made, final in ready if made is not None}
        self.workplace.check()
        if len(ready) > 1:
            self.journal.save()
        for made, final in ready:
            if made is not None:
                try:
                    place(made, final, self.overwrite)
                except OSError as error:
                    raise unwritten(final, error) from error
        return [str(final) for _, final in ready]

    def _saved(self, values: dict[str, Array]) -> list[tuple[Array, Path]]:
        """Values that go to files of their own: those that are no few numbers, or all there is."""
        found = []
        for name, array in values.items():
            if self.pictures and array.size <= FEW:
                continue
            alone = not self.pictures and len(values) == 1
            part = name.removeprefix("output ")
            found.append((array, self.target if alone else numbered(self.target.with_suffix(".npy"), part)))
        return found

    def _save_value(self, k: int, array: Array, final: Path) -> Path | None:
        assert self.folder is not None
        if self._is_placed(self._free(final)):
            return None
        path = self.folder / f"value-{k}.npy"
        try:
            np.save(path, array, allow_pickle=False)
        except OSError as error:
            raise unwritten(path, error) from error
        return path

    def _close(self) -> None:
        for picture in self.pictures.values():
            picture.sink.close()
        for file in self._files():
            file.close()
        if self.workplace is not None:
            self.workplace.close()

    def _files(self) -> list[RowFile]:
        """Files of the working folder beside the pictures' own."""
        return [stored.file for stored in self.stored] + ([] if self.absent is None else [self.absent])
