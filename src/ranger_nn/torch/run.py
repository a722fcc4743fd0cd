"""`run`: from file to file, region by region, inside a stated memory, and on again after a crash.

    source --Reader--> pixels --Pixels--> tensor --program--> output --Reduction--> rows --FileSink--> result
              once        declared                                    + Tally

After each region the rows are on the disk and the journal says so; a run that finds a journal of the same model, input,
plan and options goes on there (`execute/resume.py`). The dry run is `prepare`. Enter at `run`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ranger_nn.core.program import FINISH, RUN, Instruction
from ranger_nn.core.reach import Box
from ranger_nn.errors import InputError
from ranger_nn.execute.guard import guarded
from ranger_nn.execute.machine import bind
from ranger_nn.execute.machine import run as loop
from ranger_nn.execute.resume import Boundary, boundaries, replay
from ranger_nn.io.atomic import atomic_write
from ranger_nn.io.journal import Journal
from ranger_nn.io.pixels import Pixels
from ranger_nn.io.protocol import Array
from ranger_nn.io.rows import RowFile
from ranger_nn.io.sinks import FileSink, check_sink, working_folder
from ranger_nn.io.tally import Tally
from ranger_nn.torch.files import Feed, FileEngine, Handle, Outlet, Stored, loaded_boxes
from ranger_nn.torch.module import Memory
from ranger_nn.torch.pictures import ArraySink, Picture, check_nodata
from ranger_nn.torch.prepare import Prepared, prepare
from ranger_nn.torch.reduce import Reduction, reduction

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


def run(
    model: nn.Module,
    source: Any,
    sink: Any,
    memory: Memory = None,
    *,
    reduce: str | Callable[[Array], Array] | None = None,
    pixels: Pixels | None = None,
    statistics: Sequence[str] | None = None,
    axes: str | None = None,
    level: int = 0,
    regions: Sequence[int] | None = None,
    schedule: str | None = None,
    resume: bool = True,
    overwrite: bool = False,
    skip_bad: bool = False,
    device: str | torch.device = "cpu",
    on_region: Callable[[int, int], None] | None = None,
    prepared: Prepared | None = None,
) -> Report:
    """Apply `model` to an image that need not fit in memory, and write what it gives.

    Args:
        model: a `torch.nn.Module` that takes (1, channels, rows, columns) (or with depth), in the mode that it is to run in
            (`model.eval()`).
        source: path (TIFF, GeoTIFF, whole slides, Zarr, HDF5, `.npy`, PNG, JPEG), or anything with shape, dtype and slicing.
        sink: path that ends in .zarr, .tif, .npy; or a writable array-like (channels, *spatial) or (*spatial), filled in
            place, which cannot be resumed. Several pictures: NAME-0.zarr, NAME-1.zarr, ...
        memory: bytes, or "2GB": allowed for activations, carried rows, workspace, regions read ahead and written. Values
            between sweeps go to files in the working folder. None: no limit.
        reduce: "argmax", "threshold:0.5", "uint8", a callable of the (channels, rows, columns) of one region, or None.
        pixels: scale, mean, std, bands, nodata; None: unsigned integers become 0..1.
        statistics: of "histogram", "mean", "max", "min", "mean_probability", over the whole output; None: the histogram for
            argmax and threshold, else mean and max.
        axes: axes of an array-like source, such as "YXC".
        level: of a pyramid.
        regions, schedule: as in `regionalize`.
        resume: go on with an unfinished run of the same work; False: start it anew.
        overwrite: replace a result that is there, and start anew.
        skip_bad: fill regions that cannot be read with zeros and list them, instead of stopping.
        device: where kernels run.
        on_region: called with (regions done, regions in all).
        prepared: from `prepare` with the same arguments, if it was made already.

    Raises:
        BudgetError: nothing fits into `memory`.
        InputError: a source or sink that cannot be used, a result that exists, an unfinished run of other work.
        BadRegionError: a region of the source cannot be read; what is done stays, and the run can go on.
        MissingExtraError: a format needs a package that is not installed.
    """
    chosen = reduction(reduce)
    default = ("histogram",) if chosen.name.startswith(("argmax", "threshold")) else ("mean", "max")
    names = default if statistics is None else tuple(statistics)
    Tally(names)
    target = check_sink(sink, overwrite) if not hasattr(sink, "__setitem__") else sink
    made = prepared or prepare(
        model, source, memory, pixels=pixels, axes=axes, level=level, regions=regions, schedule=schedule,
        skip_bad=skip_bad, device=device,
    )  # fmt: skip
    try:
        return _Work(made, target, chosen, names, on_region).run(resume and not overwrite)
    finally:
        made.source.close()


class _Work:
    """One run: where things are, then the loop, then the final names."""

    def __init__(
        self,
        made: Prepared,
        target: Any,
        reduced: Reduction,
        statistics: tuple[str, ...],
        on_region: Callable[[int, int], None] | None,
    ) -> None:
        self.made, self.target, self.reduced, self.statistics = made, target, reduced, statistics
        self.on_region = on_region
        self.folder = working_folder(target) if isinstance(target, Path) else None
        self.journal: Journal | None = None
        self.first = 0
        self.outlet = Outlet()
        self.pictures: dict[int, Picture] = {}
        self.stored: list[Stored] = []
        self.absent: RowFile | None = None
        self.ends = boundaries(made.program, made.lasting())

    def run(self, resume: bool) -> Report:
        """From the start, or from where the journal says."""
        start = time.perf_counter()
        feed = None
        try:
            again = self._open_journal(resume)
            self._open_absent(again)
            self._open_pictures(again)
            instructions = self._instructions()
            feed = self._feed(instructions)
            slots = self._loop(feed, instructions, again)
            self.outlet.close()
            values = self._values(slots)
            files = self._finish(values)
        except BaseException:
            self.outlet.close(quiet=True)
            self._leave_no_trace()
            raise
        finally:
            if feed is not None:
                feed.close()
            self._close()
        if self.folder is not None:
            shutil.rmtree(self.folder)
        return self._report(files, values, time.perf_counter() - start, feed.waited + self.outlet.waited)

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
        )

    def _leave_no_trace(self) -> None:
        """Where no region was done there is nothing to go on with: no working folder is left."""
        if self.folder is not None and self.journal is not None and self.journal.done == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    # ---- what is there before the loop

    def _open_journal(self, resume: bool) -> bool:
        """Whether the work goes on with what an earlier run did."""
        if self.folder is None:
            return False
        options = {
            "reduce": self.reduced.name,
            "statistics": list(self.statistics),
            "skip_bad": self.made.reader.skip_bad,
            "threads": torch.get_num_threads(),
            "device": str(self.made.device),
            "PyTorch": torch.__version__,
        }
        self.journal = Journal(self.folder, self.made.identity() | {"options": options})
        if resume and self.journal.resume():
            self.first = self.journal.done
            self.made.reader.bad = [tuple((lo, hi) for lo, hi in box) for box in self.journal.bad]
            return True
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
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
        self.absent = RowFile(self.folder / "absent", (1, *sizes), np.uint8, again=again)

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
            name, shape = f"output {k}", (probe.shape[0], *values[v].shape[2:])
            tally = Tally(self.statistics, self.journal.tally.get(name) if self.journal is not None and again else None)
            dtype, nodata = probe.numpy().dtype, self.made.pixels.result
            check_nodata(nodata, dtype)
            sink = self._sink(k, len(found), shape, dtype, again)
            self.pictures[v] = Picture(name, sink, self.reduced, tally, self.outlet, self.absent, nodata)

    def _sink(self, k: int, count: int, shape: tuple[int, ...], dtype: Any, again: bool) -> Any:
        if self.folder is None:
            if count > 1 or tuple(self.target.shape) not in (shape, shape[1:] if shape[0] == 1 else shape):
                raise InputError(
                    f"the array has shape {tuple(self.target.shape)}; the model gives {count} picture(s) of shape {shape}"
                )
            return ArraySink(self.target)
        source = self.made.source
        place = source.geography() if hasattr(source, "geography") else None
        place = None if place is None else {"size": source.shape[-2:], **place}
        final = self.target if count == 1 else _numbered(self.target, k)
        rows = self.folder / f"rows-{k}.npy"
        return FileSink(final, shape, dtype, place, again, rows, self.made.pixels.result)

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
        self.stored.append(Stored(path, value.shape, getattr(torch, value.dtype), device, again and path.is_file()))
        return self.stored[-1]

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
            self.outlet.put(self._commit(self.journal, k + 1, kept, tally, list(self.made.reader.bad)))
        if self.on_region is not None:
            self.on_region(k + 1, len(self.ends))

    def _commit(
        self, journal: Journal, done: int, states: dict[int, list[Array]], tally: dict[str, Any], bad: list[Any]
    ) -> Callable[[], None]:
        def save() -> None:
            for picture in self.pictures.values():
                picture.sink.durable()
            for file in self._files():
                file.sync()
            journal.done, journal.tally, journal.bad = done, tally, bad
            journal.save(states)

        return save

    # ---- after the loop

    def _values(self, slots: list[Any]) -> dict[str, Array]:
        """Outputs that are no pictures."""
        program, outputs = self.made.program, dict.fromkeys(self.made.graph.outputs)
        rest = [v for v in outputs if v not in self.pictures and v in program.results]
        found = [slots[program.results[v]] for v in rest]
        return {
            f"output {len(self.pictures) + k}": (t.float() if t.is_floating_point() else t).cpu().numpy()
            for k, t in enumerate(found)
        }

    def _finish(self, values: dict[str, Array]) -> list[str]:
        """Final names."""
        files = []
        for picture in self.pictures.values():
            picture.sink.finish()
            files += [str(picture.sink.path)] if picture.sink.path is not None else []
        if not isinstance(self.target, Path):
            return files
        for k, array in enumerate(values.values()):
            if self.pictures and array.size <= FEW:
                continue
            alone = not self.pictures and len(values) == 1
            path = self.target if alone else _numbered(self.target.with_suffix(".npy"), len(self.pictures) + k)
            with atomic_write(path) as file:
                np.save(file, array, allow_pickle=False)
            files.append(str(path))
        return files

    def _close(self) -> None:
        for picture in self.pictures.values():
            picture.sink.close()
        for file in self._files():
            file.close()

    def _files(self) -> list[RowFile]:
        """Files of the working folder beside the pictures' own."""
        return [stored.file for stored in self.stored] + ([] if self.absent is None else [self.absent])


def _numbered(path: Path, k: int) -> Path:
    return path.with_name(f"{path.stem}-{k}{path.suffix}")
