"""The results of a run: pictures on their way into a file or an array, other outputs, and the final names.

    open      for each output a sink, whose rows are held to what the journal says
    finish    final forms in the working folder, then one rename each

Enter at `Results`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ranger_nn.core.program import Program
from ranger_nn.errors import InputError
from ranger_nn.execute.files.earlier import Earlier
from ranger_nn.execute.files.outlet import Outlet
from ranger_nn.execute.files.picture import Picture, check_nodata, reduced_pixels
from ranger_nn.execute.files.prepared import Prepared
from ranger_nn.execute.files.reduction import Reduction
from ranger_nn.execute.files.report import FEW
from ranger_nn.io.array_sinks import ArraySink, HeldSink
from ranger_nn.io.naming import check_free, checked_path, numbered, place
from ranger_nn.io.overlap import overlap
from ranger_nn.io.protocol import Array
from ranger_nn.io.rows import ANEW, RowFile, unwritten
from ranger_nn.io.sinks import FileSink, PlacedSink
from ranger_nn.io.tally import Tally
from ranger_nn.io.workplace import Workplace


class Results:
    """Outputs, by value, and where they go.

    Args:
        made: the run.
        target: a path, or an array that is filled.
        workplace: its working folder; None for an array.
        reduced, statistics: what is done to pictures, and counted of them.
        overwrite: replace results that are there.
    """

    def __init__(
        self,
        made: Prepared,
        target: Any,
        workplace: Workplace | None,
        reduced: Reduction,
        statistics: tuple[str, ...],
        overwrite: bool,
    ) -> None:
        self.made, self.target, self.workplace = made, target, workplace
        self.folder = workplace.folder if workplace is not None else None
        self.reduced, self.statistics, self.overwrite = reduced, statistics, overwrite
        self.pictures: dict[int, Picture] = {}
        self.earlier = Earlier(made, [])

    # ---- before the loop

    def open(self, earlier: Earlier, outlet: Outlet, absent: RowFile | None) -> None:
        """Sinks of all pictures; `absent`: where the input has no data."""
        self.earlier = earlier
        found, made = self.made.pictures(), self.made
        if not found and not (isinstance(self.target, Path) and self.target.suffix.lower() == ".npy"):
            raise InputError(
                f"{type(made.model).__name__} gives no picture on {made.source.name}, only numbers for the whole: "
                "write them to a name that ends in .npy"
            )
        for k, v in enumerate(found):
            name, (shape, dtype) = self.title(v), self._form(v)
            tally, nodata = self._tally(name, v, absent is not None), made.pixels.result
            check_nodata(nodata, dtype)
            if "histogram" in self.statistics and dtype.kind not in "bui":
                raise InputError(
                    f"the histogram counts classes, and {name} is {dtype}: reduce it, or leave the histogram out"
                )
            sink = self._sink(k, v, len(found), shape, dtype)
            if earlier.again and isinstance(sink, FileSink):
                boxes = [made.order.spatial(box) for box in earlier.written.get(v, [])]
                sink.rows.verify(earlier.sum(f"rows-{k}"), boxes)
            self.pictures[v] = Picture(name, sink, self.reduced, tally, outlet, made.framework, absent, nodata)

    def _form(self, v: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape (channels, *spatial) and dtype of what is written of a value: asked of a few of its pixels."""
        value, order, framework = self.made.graph.values[v], self.made.order, self.made.framework
        sizes = order.spatial(value.shape)
        small = order.shape(order.channels(value.shape), [min(2, n) for n in sizes])
        probe = reduced_pixels(framework, self.reduced, framework.picture(framework.stand_in(value, small)))
        return (probe.shape[0], *sizes), probe.dtype

    def _tally(self, name: str, v: int, some: bool) -> Tally:
        """What earlier runs counted of what they wrote; `some` pixels may be left out."""
        tally, earlier = Tally(self.statistics), self.earlier
        if earlier.journal is None or not earlier.first:
            return tally
        order = self.made.order
        pixels = sum(prod(hi - lo for lo, hi in order.spatial(box)) for box in earlier.written.get(v, []))
        try:
            tally.take(earlier.journal.tally.get(name), order.channels(self.made.graph.values[v].shape), pixels, some)
        except ValueError as error:
            raise InputError(f"the journal in {str(self.folder)!r} is none of this run ({error}): {ANEW}") from error
        return tally

    def title(self, v: int) -> str:
        """What the report calls an output."""
        label = self.made.labels[v]
        return f"output {label}" if label.isdigit() else label

    def _sink(self, k: int, v: int, count: int, shape: tuple[int, ...], dtype: Any) -> Any:
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
        final = self._free(self.target if count == 1 else numbered(self.target, self.made.labels[v]))
        rows = self.folder / f"rows-{k}.npy"
        if self._is_placed(final) and not rows.exists():
            return PlacedSink(final)
        return FileSink(final, shape, dtype, where, self.earlier.again, rows, self.made.pixels.result)

    def _is_placed(self, final: Path) -> bool:
        """An earlier run, which ended right after that, gave the result its name."""
        journal = self.earlier.journal
        known = journal.placed.get(final.name) if journal is not None else None
        return known is not None and os.path.lexists(final) and final.lstat().st_ino == known

    def _free(self, final: Path) -> Path:
        """The name of one of several results, which nothing else has."""
        if final != self.target and not self._is_placed(final):
            if overlap(self.made.source, final):
                raise InputError(f"the result {str(final)!r} would take the place of the input. Give another name.")
            check_free(checked_path(final), self.overwrite)
        return final

    # ---- after a region

    def durable(self) -> None:
        """Everything written so far survives the end of this process."""
        for picture in self.pictures.values():
            picture.sink.durable()

    def sums(self) -> dict[str, int]:
        """Of each file of rows what it holds, for the journal."""
        return {p.sink.rows.path.stem: p.sink.rows.sum for p in self.pictures.values()}

    def tallies(self) -> dict[str, Any]:
        """What is counted so far, for the journal."""
        return {p.name: p.tally.state() for p in self.pictures.values()}

    # ---- after the loop

    def values(self, program: Program, slots: Sequence[Any]) -> dict[str, Array]:
        """Outputs that are no pictures."""
        rest = [v for v in dict.fromkeys(self.made.graph.outputs) if v not in self.pictures and v in program.results]
        found = {self.title(v): self.made.framework.array(slots[program.results[v]]) for v in rest}
        return {k: x.astype(np.float32) if x.dtype.kind == "f" else x for k, x in found.items()}

    def finish(self, values: dict[str, Array]) -> list[str]:
        """Final forms, then final names."""
        journal = self.earlier.journal
        if self.workplace is None or journal is None:
            for picture in self.pictures.values():
                picture.sink.finish()
            return []
        ready: list[tuple[Path | None, Path]] = []
        for picture in self.pictures.values():
            final = picture.sink.path
            ready.append((None if self._is_placed(final) else picture.sink.form(), final))
        ready += [(self._save_value(k, array, final), final) for k, (array, final) in enumerate(self._saved(values))]
        journal.placed |= {final.name: made.stat().st_ino for made, final in ready if made is not None}
        self.workplace.check()
        if len(ready) > 1:
            journal.save()
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

    def close(self) -> None:
        """Let go of the files as they are."""
        for picture in self.pictures.values():
            picture.sink.close()
