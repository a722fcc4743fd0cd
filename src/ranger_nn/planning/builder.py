"""Slots and their bytes, while a program is being written: every instruction is charged when it is emitted.

    live      bytes of all storages that some slot still refers to
    temporary joined reads and workspace of the instruction that runs
    peak      the largest live + temporary + results

A view shares its source's storage; a storage is free when its last slot is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from ranger_nn.core.graph import Graph
from ranger_nn.core.program import Binding, Instruction, Part, Program, Read
from ranger_nn.core.reach import Box


@dataclass(slots=True)
class Page:
    """Rows [lo, hi) of a value; `base` is the row at index 0 of the slot."""

    lo: int
    hi: int
    slot: int
    base: int


@dataclass(slots=True)
class Located:
    """Where a value is: one slot that holds it whole (`pages` None), or pages along `dim` of a window.

    `origin` gives, for each other cut dimension of a window, the index at which it starts, and its length. `on_disk`:
    it takes no memory, but each region that is read does.
    """

    slot: int = -1
    dim: int | None = None
    pages: list[Page] | None = None
    origin: dict[int, tuple[int, int]] = field(default_factory=dict)
    on_disk: bool = False


def box_bytes(box: Box, itemsize: int) -> int:
    """Bytes of a region."""
    return prod(hi - lo for lo, hi in box) * itemsize


class Builder:
    """Writes one program. `peaks`: of each sweep; `binding`: where the peak of all stands;
    `charged`: instructions so far.
    """

    writes = True
    """False: instructions are charged and forgotten, so that those which hold no bytes need not be made."""

    def __init__(self, graph: Graph, first_slot: int = 0) -> None:
        """Slots are numbered from `first_slot`."""
        self.graph = graph
        self.instructions: list[Instruction] = []
        self.next_slot = first_slot
        self.storage: dict[int, int] = {}
        self.bytes: dict[int, int] = {}
        self.refs: dict[int, int] = {}
        self.parent: dict[int, int] = {}
        self.live = 0
        self.peak = 0
        self.peaks: dict[int, int] = {}
        self.binding = Binding()
        self.charged = 0
        self.macs = 0
        self.sweep = 0
        self.region = 0

    def slot(self, nbytes: int, share: int | None = None, parent: int | None = None) -> int:
        """A new slot with storage of its own, or sharing the storage of slot `share`, or holding `parent`'s."""
        s = self.next_slot
        self.next_slot += 1
        if share is not None:
            self.storage[s] = self.storage[share]
            self.refs[self.storage[s]] += 1
            return s
        self.storage[s] = s
        self.bytes[s] = nbytes
        self.refs[s] = 1
        self.live += nbytes
        if parent is not None:
            up = self.storage[parent]
            self.parent[s] = up
            self.refs[up] += 1
        return s

    def owns(self, slot: int) -> bool:
        """True where the slot is the only one on its storage."""
        storage = self.storage[slot]
        return self.refs[storage] == 1 and storage not in self.parent

    def drop(self, slot: int) -> None:
        """Free a slot after the last instruction emitted."""
        if self.instructions:
            self.instructions[-1].frees.append(slot)
        self._release(self.storage.pop(slot))

    def _release(self, storage: int) -> None:
        self.refs[storage] -= 1
        if self.refs[storage]:
            return
        self.live -= self.bytes.pop(storage)
        del self.refs[storage]
        if storage in self.parent:
            self._release(self.parent.pop(storage))

    def read(self, place: Located, box: Box, itemsize: int, shape: Sequence[int]) -> Read:
        """Parts that make up `box` of a located value."""
        size = box_bytes(box, itemsize)
        if size == 0 and 0 not in shape:
            return Read((), 0, 0, box)
        if place.pages is None:
            cuts = tuple((d, lo, hi - lo) for d, (lo, hi) in enumerate(box) if hi - lo != shape[d])
            return Read(((place.slot, cuts),), 0, size, box, place.on_disk)
        cross = tuple(
            (d, box[d][0] - lo, box[d][1] - box[d][0])
            for d, (lo, length) in place.origin.items()
            if box[d][1] - box[d][0] != length
        )
        if place.dim is None:
            return Read(((place.pages[0].slot, cross),), 0, size, box)
        a, b = box[place.dim]
        parts: list[Part] = []
        for page in place.pages:
            lo, hi = max(a, page.lo), min(b, page.hi)
            if hi > lo:
                parts.append((page.slot, (*cross, (place.dim, lo - page.base, hi - lo))))
        if not parts:
            raise AssertionError(f"nothing holds {box} (pages {place.pages})")
        return Read(tuple(parts), place.dim, size, box)

    def emit(
        self,
        op: str,
        node: int,
        reads: Sequence[Read],
        results: Sequence[tuple[int, int | None, bool]] = (),
        *,
        scratch: int = 0,
        **options: object,
    ) -> list[int]:
        """Write an instruction; `results`: (bytes, slot that it is a view of, may be a copy). Gives the slots."""
        joined = sum(r.nbytes for r in reads if len(r.parts) > 1 or r.loaded)
        before = self.live
        value = options.get("value", -1)
        outs = self.charge(node, joined + scratch, results, value if isinstance(value, int) else -1)
        now = self.live + joined + scratch
        place = {"sweep": self.sweep, "region": self.region, "live": now, "grows": now - before}
        self.instructions.append(Instruction(op, node, tuple(reads), tuple(outs), **place, **options))  # type: ignore[arg-type]
        return outs

    def charge(
        self, node: int, extra: int, results: Sequence[tuple[int, int | None, bool]], value: int = -1
    ) -> list[int]:
        """Slots for the results of an instruction of a node (-1: on a value) that takes `extra` bytes while it runs."""
        outs = []
        for nbytes, view_of, may_copy in results:
            if view_of is None or view_of not in self.storage:
                outs.append(self.slot(nbytes))
            elif may_copy:
                outs.append(self.slot(nbytes, parent=view_of))
            else:
                outs.append(self.slot(0, share=view_of))
        now = self.live + extra
        self.charged += 1
        if now > self.peaks.get(self.sweep, -1):
            self.peaks[self.sweep] = now
        if now > self.peak:
            self.peak, self.binding = now, Binding(self.sweep, node, value)
        return outs

    def program(self, external: dict[int, int]) -> Program:
        """The finished program."""
        return Program(
            self.instructions,
            self.next_slot,
            external,
            peak=self.peak,
            peaks=self.peaks,
            binding=self.binding,
            macs=self.macs,
            regions=self.region,
        )
