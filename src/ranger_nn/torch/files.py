"""The loop over regions between files: slots that hold handles instead of tensors.

    input    Handle --narrow--> Handle of a region --> tensor, read ahead by a thread (`Feed`)
    stored   a value between two sweeps: a file in the working folder, read and written by region (`Stored`)
    output   narrow, then written: reduced and handed to a thread that writes (`Outlet`)

The program is the same as in memory; only what `narrow`, `join` and the kernels are given differs. Enter at `FileEngine`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ranger_nn.core import program as P
from ranger_nn.core.graph import Graph
from ranger_nn.core.program import Instruction, Read
from ranger_nn.core.reach import Box
from ranger_nn.io.protocol import Array
from ranger_nn.io.rows import RowFile
from ranger_nn.torch.engine import TorchEngine

AHEAD = 1
"""Regions that are read, and written, beside the one that is computed."""


class Handle:
    """A region of something that lives in a file; `narrow` gives a smaller one, `load` its tensor."""

    def __init__(self, owner: Any, box: Box) -> None:
        self.owner, self.box = owner, box

    def narrow(self, dim: int, start: int, length: int) -> Handle:
        """The part [start, start + length) along `dim`."""
        lo = self.box[dim][0] + start
        return Handle(self.owner, (*self.box[:dim], (lo, lo + length), *self.box[dim + 1 :]))

    def load(self) -> Tensor:
        """The region as a tensor."""
        return self.owner.load(self.box)


class Feed:
    """The input: regions in the order in which the program reads them, one read ahead.

    Args:
        boxes: regions of the input value, in order.
        read: gives the array of a region, ready for the model.
        device, dtype: of the tensors.
    """

    def __init__(
        self, boxes: Iterable[Box], read: Callable[[Box], Array], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.waited = 0.0
        self._device, self._dtype = device, dtype
        self._queue: queue.Queue[Any] = queue.Queue(AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(list(boxes), read), name="ranger-reader", daemon=True)
        self._thread.start()

    def _work(self, boxes: Sequence[Box], read: Callable[[Box], Array]) -> None:
        for box in boxes:
            try:
                item: Any = (box, read(box))
            except BaseException as error:
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if self._stop.is_set() or isinstance(item, BaseException):
                return
            del item

    def load(self, box: Box) -> Tensor:
        """The next region, which must be this one."""
        start = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        if item[0] != box:
            raise AssertionError(f"region {box} was asked for, {item[0]} was read ahead")
        return torch.from_numpy(item[1]).to(self._device, self._dtype)

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        self._thread.join()


class Stored:
    """A value between two sweeps, in a file."""

    def __init__(self, path: Path, shape: Sequence[int], dtype: torch.dtype, device: torch.device, again: bool) -> None:
        self._dtype, self._device = dtype, device
        self._plain = torch.int16 if dtype == torch.bfloat16 else dtype
        sized = (1, *shape)  # the file keeps its first axis whole; none of the value's is
        self.file = RowFile(path, sized, torch.empty((), dtype=self._plain).numpy().dtype, again=again)

    def load(self, box: Box) -> Tensor:
        """Read a region."""
        return torch.from_numpy(self.file.read(box)[0]).view(self._dtype).to(self._device)

    def write(self, box: Box, region: Tensor) -> None:
        """Write a region."""
        self.file.write(box, region.contiguous().view(self._plain).cpu().numpy()[np.newaxis])


class Outlet:
    """Jobs done in order by one thread: rows written, journals saved. What fails there is raised here."""

    def __init__(self) -> None:
        self.waited = 0.0
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(AHEAD)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="ranger-writer", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._error is None:
                try:
                    job()
                except BaseException as error:
                    self._error = error

    def put(self, job: Callable[[], None]) -> None:
        """Do it after those before; wait while too many are waiting."""
        if self._error is not None:
            raise self._error
        start = time.perf_counter()
        self._queue.put(job)
        self.waited += time.perf_counter() - start

    def close(self, quiet: bool = False) -> None:
        """Wait for what was put; raise what failed, unless `quiet`."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and not quiet:
            raise self._error


class FileEngine(TorchEngine):
    """`TorchEngine` whose stored values and outputs are handles.

    Args:
        graph: the network.
        device: where kernels run.
        allocate: the owner (`Stored`, or an output) of a value that is written by region.
    """

    def __init__(self, graph: Graph, device: torch.device, allocate: Callable[[int], Any]) -> None:
        super().__init__(graph, device)
        self._allocate = allocate

    @staticmethod
    def narrow(x: Any, dim: int, start: int, length: int) -> Any:
        """View of a tensor, or a handle of the part."""
        return x.narrow(dim, start, length)

    @staticmethod
    def join(parts: Any, dim: int) -> Tensor:
        """Concatenation; what is in files is read."""
        return torch.cat([p.load() if isinstance(p, Handle) else p for p in parts], dim)

    def bind(self, instruction: Instruction) -> Callable[..., Any]:
        """The closure of one instruction; what it reads from files is loaded before."""
        i = instruction
        if i.op == P.ALLOC:
            owner, whole = self._allocate(i.value), tuple((0, n) for n in i.shape)
            return lambda: Handle(owner, whole)
        if i.op == P.WRITE:
            return _write
        function = super().bind(i)
        if not any(read.loaded for read in i.reads):
            return function

        def loaded(*args: Any) -> Any:
            return function(*[a.load() if isinstance(a, Handle) else a for a in args])

        return loaded


def _write(target: Handle, source: Tensor) -> None:
    target.owner.write(target.box, source)


def loaded_boxes(instructions: Iterable[Instruction], slot: int, shape: Sequence[int]) -> list[Box]:
    """Regions of the value in `slot` that instructions load, in order.

    Raises:
        AssertionError: a region is put together from several parts of the slot.
    """
    found = []
    for i in instructions:
        for read in i.reads:
            for source, cuts in read.parts:
                if source == slot:
                    found.append(_cut(read, cuts, shape))
    return found


def written_boxes(instructions: Iterable[Instruction]) -> dict[int, list[Box]]:
    """Of each value that is written by region, the regions in order."""
    found: dict[int, list[Box]] = {}
    made: dict[int, Instruction] = {}
    for i in instructions:
        if i.op == P.ALLOC:
            made[i.outs[0]] = i
            found.setdefault(i.value, [])
        elif i.op == P.WRITE:
            ((slot, cuts),) = i.reads[0].parts
            found[made[slot].value].append(_cut(i.reads[0], cuts, made[slot].shape))
    return found


def _cut(read: Read, cuts: Iterable[tuple[int, int, int]], shape: Sequence[int]) -> Box:
    box = [(0, n) for n in shape]
    for dim, start, length in cuts:
        box[dim] = (box[dim][0] + start, box[dim][0] + start + length)
    return tuple(box)
