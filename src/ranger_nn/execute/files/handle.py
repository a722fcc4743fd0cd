"""The loop over regions between files: slots that hold handles instead of tensors.

    input    Handle --narrow--> Handle of a region --> tensor, read ahead by a thread (`Feed`)
    stored   a value between two sweeps: a file in the working folder, read and written by region (`Stored`)
    output   narrow, then written: reduced and handed to a thread that writes (`Picture`, `Outlet`)

The program is the same as in memory; only what `narrow`, `join` and the kernels are given differs. Enter at `FileEngine`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from ranger_nn.core import program as P
from ranger_nn.core.program import Instruction, Read
from ranger_nn.core.reach import Box
from ranger_nn.execute.files.framework import FormedEngine, Tensor
from ranger_nn.execute.guard import Form


class Owner(Protocol):
    """Something in a file that is read, or written, by region: a `Feed`, a `Stored` value, a `Picture`."""

    def load(self, box: Box) -> Tensor:
        """The region as a tensor."""
        ...

    def write(self, box: Box, region: Tensor) -> None:
        """Put the region in place."""
        ...


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


class FileEngine:
    """A framework's engine whose stored values and outputs are handles.

    Args:
        engine: the framework's.
        allocate: the owner of a value that is written by region.
    """

    def __init__(self, engine: FormedEngine, allocate: Callable[[int], Any]) -> None:
        self.engine, self._allocate = engine, allocate

    def narrow(self, x: Any, dim: int, start: int, length: int) -> Any:
        """View of a tensor, or a handle of the part."""
        return x.narrow(dim, start, length) if isinstance(x, Handle) else self.engine.narrow(x, dim, start, length)

    def join(self, parts: Sequence[Any], dim: int) -> Tensor:
        """Concatenation; what is in files is read."""
        return self.engine.join([p.load() if isinstance(p, Handle) else p for p in parts], dim)

    def form(self, x: Tensor) -> Form:
        """The framework's."""
        return self.engine.form(x)

    def bind(self, instruction: Instruction) -> Callable[..., Any]:
        """The closure of one instruction; what it reads from files is loaded before."""
        i = instruction
        if i.op == P.ALLOC:
            owner, whole = self._allocate(i.value), tuple((0, n) for n in i.shape)
            return lambda: Handle(owner, whole)
        if i.op == P.WRITE:
            return _write
        function = self.engine.bind(i)
        if not any(read.loaded for read in i.reads):
            return function

        def loaded(*args: Any) -> Any:
            return function(*[a.load() if isinstance(a, Handle) else a for a in args])

        return loaded


def _write(target: Handle, source: Tensor) -> None:
    target.owner.write(target.box, source)


def loaded_boxes(instructions: Iterable[Instruction], slot: int, shape: Sequence[int]) -> list[Box]:
    """Regions of the value in `slot` that instructions load, in order."""
    found = []
    for i in instructions:
        for read in i.reads:
            for source, cuts in read.parts:
                if source == slot:
                    found.append(_cut(cuts, shape))
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
            found[made[slot].value].append(_cut(cuts, made[slot].shape))
    return found


def written_bytes(reads: Sequence[Read]) -> int:
    """Bytes that a WRITE puts in place."""
    return sum(r.nbytes for r in reads[1:])


def _cut(cuts: Iterable[tuple[int, int, int]], shape: Sequence[int]) -> Box:
    box = [(0, n) for n in shape]
    for dim, start, length in cuts:
        box[dim] = (box[dim][0] + start, box[dim][0] + start + length)
    return tuple(box)
