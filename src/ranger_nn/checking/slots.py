"""What each slot holds while a program is followed, and the bytes that are held in all.

A value is held as the region that it is (its numbers follow from what it was made of, which was checked when it was made);
what adds up is held as fingerprints, an array with one number for each row that is cut:

    VALUE     a region of a value, right on all of it        GRADIENT  sums of what was given back to each row so far
    BUFFER    a value, right where it was written: 1         STATE     the sum of what a reduction has met
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ranger_nn.checking.numbers import Numbers
from ranger_nn.core.graph import Graph
from ranger_nn.core.program import Cut, Read
from ranger_nn.core.reach import Box
from ranger_nn.errors import PlanError

VALUE, BUFFER, GRADIENT, STATE = "a value", "a buffer", "a gradient", "a state"


@dataclass(slots=True)
class Held:
    """One slot: `value` and its `box` (VALUE, BUFFER), `numbers` (BUFFER, GRADIENT) or `total` (STATE).

    `upto`: steps behind which a state of an ordered operator stands, or elements that a reduction has met.
    """

    kind: str
    value: int
    box: Box = ()
    numbers: Numbers | None = None
    total: int = 0
    upto: int = 0
    storage: int = -1


def volume(box: Box) -> int:
    """Elements of a region."""
    return prod(hi - lo for lo, hi in box)


def narrowed(box: Box, cuts: Sequence[Cut], slot: int) -> Box:
    """A region inside of a region; raises PlanError where it is not."""
    if not cuts:
        return box
    found = list(box)
    for dim, start, length in cuts:
        lo, hi = found[dim]
        if start < 0 or length < 0 or lo + start + length > hi:
            raise PlanError(f"[{start}, {start + length}) of {hi - lo} is read of slot {slot}")
        found[dim] = (lo + start, lo + start + length)
    return tuple(found)


class Slots:
    """Slots by their number, and the storages in which they lie: several slots may be views of one."""

    def __init__(self, graph: Graph) -> None:
        """Nothing is held yet."""
        self.graph = graph
        self.held: dict[int, Held] = {}
        self.sizes: list[int] = []
        self.users: list[int] = []
        self.live = 0

    def __getitem__(self, slot: int) -> Held:
        """What a slot holds; PlanError where that is nothing."""
        found = self.held.get(slot)
        if found is None:
            raise PlanError(f"slot {slot} is read and holds nothing")
        return found

    def hold(self, slot: int, held: Held, nbytes: int, of: int | None = None) -> None:
        """Put something into a slot: in a storage of its own, or in that of slot `of`."""
        if slot in self.held:
            raise PlanError(f"slot {slot} is written while it holds something")
        if of is None:
            held.storage = len(self.sizes)
            self.sizes.append(nbytes)
            self.users.append(1)
            self.live += nbytes
        else:
            held.storage = self[of].storage
            self.users[held.storage] += 1
        self.held[slot] = held

    def free(self, slot: int) -> None:
        """Nothing is in the slot any more."""
        held = self.held.pop(slot, None)
        if held is None:
            raise PlanError(f"slot {slot} is freed and holds nothing")
        self.users[held.storage] -= 1
        if not self.users[held.storage]:
            self.live -= self.sizes[held.storage]

    def nbytes(self, v: int, box: Box) -> int:
        """Of a region of a value."""
        return volume(box) * self.graph.values[v].itemsize

    def joined(self, reads: Sequence[Read]) -> int:
        """Bytes of what is copied together, or fetched from a file, to be read."""
        return sum(r.nbytes for r in reads if len(r.parts) > 1 or r.loaded)
