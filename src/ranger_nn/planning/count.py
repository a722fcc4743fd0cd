"""Count what a schedule holds without writing it down: the search tries many, and writes the one that it takes.

The same lowering runs, with two parts exchanged: a `Counter` charges instructions and forgets them, and what each call reads,
makes and takes is worked out for all steps of a sweep at once, as arrays (`Calls`). What is counted is what the written
program says, byte for byte; tests hold the one to the other. Enter at `count`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import numpy as np

from ranger_nn.bounds.arrays import Rows, reached
from ranger_nn.bounds.infer import Bounds
from ranger_nn.core.graph import Node
from ranger_nn.core.program import Cut, Extent, Part, Read
from ranger_nn.core.reach import Box, Interval
from ranger_nn.planning.backward import BackwardLowering, BackwardStrip
from ranger_nn.planning.builder import Builder, Located, Page
from ranger_nn.planning.forward import ForwardLowering, Schedule, Strip, Sweep, state_bytes
from ranger_nn.planning.pace import BackwardPace, ForwardPace
from ranger_nn.planning.stages import Stages

Users = dict[int, list[tuple[int, int]]]

Region = Callable[[int, Interval], Box]


class Memo(dict[tuple[Any, ...], int]):
    """What was worked out for one graph: workspace of calls by their geometry; values that backward reads (`used`); tables of
    sweeps and the calls in them, most of which a schedule has from the one before.
    """

    def __init__(self) -> None:
        """Nothing is known."""
        super().__init__()
        self.used: dict[Schedule, frozenset[int]] = {}
        self.paces: dict[tuple[Any, ...], ForwardPace | BackwardPace] = {}
        self.calls: dict[tuple[Any, ...], Calls] = {}


class Counter(Builder):
    """Charges what a builder would write."""

    writes = False

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
        """Charge an instruction; see `Builder.emit`."""
        joined = 0
        for r in reads:
            if len(r.parts) > 1 or r.loaded:
                joined += r.nbytes
        value = options.get("value", -1)
        return self.charge(node, joined + scratch, results, value if isinstance(value, int) else -1)

    def drop(self, slot: int) -> None:
        """Free a slot."""
        self._release(self.storage.pop(slot))


@dataclass(slots=True)
class Input:
    """What a call reads of one input: rows at every step, and how they are held.

    `windowed`: in pages along the sliding axis, of which `parts` are read; `row`: bytes of one row, or of all of the region
    where it does not lie on the axis; `border`: rows missing before and behind.
    """

    box: Box
    dim: int | None
    lo: Rows
    hi: Rows
    parts: Rows
    row: int
    border: tuple[Rows, Rows]
    cross: tuple[Cut, ...]
    windowed: bool
    loaded: bool

    def nbytes(self) -> Rows:
        """Bytes of the region at every step."""
        return self.row * (self.hi - self.lo) if self.dim is not None else np.full_like(self.lo, self.row)

    def read(self, t: int, shape: Sequence[int]) -> Read:
        """As it would be written for step t."""
        box, size = self.at(t), 0
        size = self.row * (box[self.dim][1] - box[self.dim][0]) if self.dim is not None else self.row
        if any(hi <= lo for lo, hi in box) and 0 not in shape:
            return Read((), 0, 0, box)
        if not self.windowed:
            cuts = tuple((d, lo, hi - lo) for d, (lo, hi) in enumerate(box) if hi - lo != shape[d])
            return Read(((0, cuts),), 0, size, box, self.loaded)
        own: tuple[Cut, ...] = () if self.dim is None else ((self.dim, 0, box[self.dim][1] - box[self.dim][0]),)
        part: Part = (0, (*self.cross, *own))
        return Read((part,) * int(self.parts[t]), self.dim or 0, size, box)

    def at(self, t: int) -> Box:
        """The region at step t."""
        if self.dim is None:
            return self.box
        side = (int(self.lo[t]), int(self.hi[t]))
        return (*self.box[: self.dim], side, *self.box[self.dim + 1 :])


class Calls:
    """One node in all steps of a strip: `start` and `stop` of the rows that it makes, or whose gradient it pulls back."""

    def __init__(self, strip: Counting, k: int, stop: Rows, region: Region) -> None:
        """`stop`: rows after every step; `region`: the region of the output that rows of it stand for."""
        self.strip, self.k, self.node = strip, k, strip.graph.nodes[k]
        self.start = np.concatenate([np.zeros(1, stop.dtype), stop[:-1]])
        self.stop = stop
        self.v = self.node.outputs[0]
        self.made = stop > self.start
        first = int(self.made.argmax())
        self.out = region(self.v, (int(self.start[first]), int(stop[first])))
        self.slide = None if strip.p.slide is None else strip.bounds.dim(self.v, strip.p.slide)
        value = strip.graph.values[self.v]
        self.row = self._row_bytes(self.out, self.slide, value.itemsize)
        self.inputs = [self._input(i) for i in range(len(self.node.inputs))]
        self.in_bytes = [x.nbytes() for x in self.inputs]
        self.joined = [np.where((x.parts > 1) | x.loaded, n, 0) for x, n in zip(self.inputs, self.in_bytes)]
        self.keys = self._keys()

    @staticmethod
    def _row_bytes(box: Box, dim: int | None, itemsize: int) -> int:
        return prod(hi - lo for d, (lo, hi) in enumerate(box) if d != dim) * itemsize

    def out_bytes(self) -> Rows:
        """Bytes that the call makes at every step."""
        return self.row * (self.stop - self.start) if self.slide is not None else self.row * self.made

    def _input(self, i: int) -> Input:
        strip, node = self.strip, self.node
        u, axis = node.inputs[i], strip.p.slide
        value = strip.graph.values[u]
        box = strip.bounds.box(node, i, self.out)
        dim = None if axis is None else strip.bounds.dim(u, axis)
        zero = np.zeros_like(self.stop)
        lo, hi, border = zero, zero, (zero, zero)
        if dim is not None and axis is not None:
            lo, hi = strip.bounds.all_needs(node, i, axis, self.start, self.stop)
            link = node.rule.links[i][dim]
            if link is not None:
                raw = reached(link.reach, self.start, self.stop)
                border = (lo - raw[0], raw[1] - hi)
        ends = strip.ends_of(u)
        parts = zero + 1
        if ends is not None and dim is not None:
            parts = np.searchsorted(ends, hi - 1, "right") - np.searchsorted(ends, lo, "right") + 1
            parts = np.where(hi > lo, parts, 0)
        cross = strip.cross_of(u, box) if ends is not None else ()
        place = strip.p.places.get(u)
        loaded = ends is None and place is not None and place.on_disk
        row = self._row_bytes(box, dim, value.itemsize)
        return Input(box, dim, lo, hi, parts, row, border, cross, ends is not None, loaded)

    def _keys(self) -> list[tuple[int, ...]]:
        """What tells one step's geometry from another's."""
        rows = [self.stop - self.start]
        for x in self.inputs:
            if x.dim is not None:
                rows += [x.hi - x.lo, x.parts, *x.border]
        return list(zip(*(r.tolist() for r in rows)))

    def out_box(self, t: int) -> Box:
        """Region of the output at step t."""
        if self.slide is None:
            return self.out
        side: Interval = (int(self.start[t]), int(self.stop[t]))
        return (*self.out[: self.slide], side, *self.out[self.slide + 1 :])

    def reads(self, t: int) -> tuple[Read, ...]:
        """Of all inputs at step t."""
        values = self.strip.graph.values
        return tuple(x.read(t, values[u].shape) for x, u in zip(self.inputs, self.node.inputs, strict=True))

    def shape(self) -> tuple[Any, ...]:
        """The call beside its rows: with a step's key it says all that a kernel may look at."""
        cut = tuple(tuple(hi - lo for lo, hi in x.box[: x.dim] + x.box[(x.dim or 0) + 1 :]) for x in self.inputs)
        held = tuple((x.windowed, x.cross, x.loaded) for x in self.inputs)
        edges = tuple(
            (lo == 0, hi == n)
            for x, u in zip(self.inputs, self.node.inputs)
            for d, ((lo, hi), n) in enumerate(zip(x.box, self.strip.graph.values[u].shape))
            if d != x.dim
        )
        return self.k, tuple(b for d, b in enumerate(self.out) if d != self.slide), cut, held, edges


class RunCalls(Calls):
    """A node run in all steps: bytes made, bytes taken beside (joined reads, workspace), and whether the result is a view."""

    def __init__(self, strip: Counting, k: int, stop: Rows, memo: Memo) -> None:
        """`memo`: workspace that is known."""
        super().__init__(strip, k, stop, strip.out_box)
        self.size = self.out_bytes().tolist()
        joined: Rows = sum(self.joined, np.zeros_like(stop))
        shape = self.shape()
        extra = []
        for t, (key, made) in enumerate(zip(self.keys, self.made.tolist())):
            extra.append(self._scratch(memo, ("run", *shape, key), t) if made else 0)
        self.extra = (joined + np.array(extra)).tolist()
        self.views = self._views(memo, shape) if self.node.alias is not None else None

    def _scratch(self, memo: Memo, key: tuple[Any, ...], t: int) -> int:
        if key not in memo:
            reads = self.reads(t)
            extent = Extent(self.out_box(t), self.size[t], tuple(r.nbytes for r in reads), reads)
            memo[key] = int(self.node.kernel.scratch(extent))
        return memo[key]

    def _views(self, memo: Memo, shape: tuple[Any, ...]) -> list[tuple[bool, bool]]:
        """Whether the result of each step is a view of the input, and whether it may be a copy as well."""
        alias = self.node.alias or 0
        found = []
        for t, (key, made) in enumerate(zip(self.keys, self.made.tolist())):
            if (
                not made
                or len(self.inputs[alias].read(t, self.strip.graph.values[self.node.inputs[alias]].shape).parts) != 1
            ):
                found.append((False, False))
                continue
            place = ("copies", *shape, key)
            if place not in memo:
                copies = self.node.kernel.copies(self.out_box(t), [x.at(t) for x in self.inputs])
                memo[place] = -1 if copies is None else int(copies)
            may_copy = self.node.may_copy if memo[place] < 0 else bool(memo[place])
            found.append((memo[place] != 1, may_copy))
        return found


class PullCalls(Calls):
    """A node pulled back in all steps: bytes of all inputs' gradients, and of joined reads."""

    def __init__(self, strip: Counting, k: int, stop: Rows, region: Region, wanted: tuple[bool, ...]) -> None:
        """`wanted`: inputs whose gradient is asked for."""
        super().__init__(strip, k, stop, region)
        self.wanted = wanted
        zero = np.zeros_like(stop)
        self.read_joined = sum((self.joined[i] for i in self.node.vjp_reads), zero).tolist()
        self.sizes = list(zip(*(n.tolist() for n in self.in_bytes))) if self.in_bytes else [()] * len(stop)
        self.same = self.shape()

    def scratch(self, t: int, grad: Read, memo: Memo) -> int:
        """Workspace of step t; `grad`: the gradient that is read."""
        held = tuple((d, start == 0) for d, start, _ in grad.parts[0][1]) if len(grad.parts) == 1 else ()
        key = ("pull", *self.same, self.keys[t], self.wanted, len(grad.parts), held, grad.nbytes)
        if key not in memo:
            reads = [
                read if i in self.node.vjp_reads else Read((), 0, 0, read.box) for i, read in enumerate(self.reads(t))
            ]
            extent = Extent(self.out_box(t), grad.nbytes, self.sizes[t], (*reads, grad), self.wanted)
            memo[key] = int(self.node.kernel.vjp_scratch(extent))
        return memo[key]


C = TypeVar("C", bound=Calls)


class Counting(Strip):
    """A strip that charges its calls."""

    def __init__(self, parent: ForwardLowering, *rest: Any) -> None:
        """See `Strip`."""
        super().__init__(parent, *rest)
        self.memo = parent.memo if isinstance(parent, ForwardCount) else Memo()
        self.known: dict[int, Rows | None] = {}
        self.across = tuple((a, *sorted(sides.items())) for a, sides in self.intervals.items())
        self.runs: dict[int, RunCalls] = {}

    def ends_of(self, u: int) -> Rows | None:
        """Rows at which the pages of a value end; None where it is held whole."""
        if u not in self.known:
            place = self.p.places.get(u)
            if u in self.produced:
                self.known[u] = np.unique(np.array(self.front_of(u)))
            elif place is not None and place.pages is not None:
                self.known[u] = np.array([page.hi for page in place.pages])
            else:
                self.known[u] = None
        return self.known[u]

    def cross_of(self, u: int, box: Box) -> tuple[Cut, ...]:
        """How a region is cut out of a window across the sliding axis."""
        found: list[Cut] = []
        for a, sides in self.intervals.items():
            d = self.bounds.dim(u, a)
            if d is None or u not in sides:
                continue
            lo, hi = sides[u]
            if box[d][1] - box[d][0] != hi - lo:
                found.append((d, box[d][0] - lo, box[d][1] - box[d][0]))
        return tuple(found)

    def front_of(self, v: int) -> list[int]:
        """Rows to which a value is computed after every step."""
        raise NotImplementedError

    def calls(self, key: tuple[Any, ...], k: int, make: Callable[[], C]) -> C:
        """Of node k: made once for all schedules in which this sweep has this table and its inputs lie alike."""
        held = tuple(self._held(u) for u in self.graph.nodes[k].inputs)
        place = (*key, id(self.pace), self.across, held)
        if place not in self.memo.calls:
            self.memo.calls[place] = make()
        return self.memo.calls[place]  # type: ignore[return-value]

    def _held(self, u: int) -> bytes | str:
        """How a value lies: in the sweep's own pages, in others, whole, in a file."""
        ends, place = self.ends_of(u), self.p.places.get(u)
        if u in self.produced:
            return "made"
        if ends is not None:
            return ends.tobytes()
        return "disk" if place is not None and place.on_disk else "whole"

    def _run(self, k: int, node: Node, v: int, rows: Interval) -> None:
        if any(found[v][1] <= found[v][0] for found in self.intervals.values()):
            return
        if k not in self.runs:
            self.runs[k] = self.calls(("run", k), k, lambda: RunCalls(self, k, np.array(self.front_of(v)), self.memo))
        calls, t, builder, values = self.runs[k], self.t, self.builder, self.graph.values
        lent = self.p.remade.lend(builder, node.inputs, self.p.places)
        view, may_copy = self._view(calls, node, t)
        before = self.states.get(k, [])
        results = [(calls.size[t], view, may_copy), *((values[u].nbytes, None, False) for u in node.states)]
        slot, *behind = builder.charge(k, calls.extra[t], results, v)
        whole = max(1, prod(values[v].shape))
        elements = calls.size[t] // max(1, values[v].itemsize)
        builder.macs += node.macs * elements // whole
        self.p.remade.back(builder, lent)
        for old in before:
            builder.drop(old)
        if node.states:
            self.states[k] = behind
        self._place(v, slot, rows, calls.out)

    def _view(self, calls: RunCalls, node: Node, t: int) -> tuple[int | None, bool]:
        """The slot of which the result is a view, and whether it may be a copy as well."""
        if calls.views is None or not calls.views[t][0]:
            return None, node.may_copy
        alias, may_copy = node.alias or 0, calls.views[t][1]
        u = node.inputs[alias]
        place = self.windows.get(u) or self.p.places[u]
        slot = place.slot if place.pages is None else _page(place, int(calls.inputs[alias].lo[t])).slot
        if may_copy and self.builder.bytes.get(self.builder.storage[slot], 0) == 0:
            return None, may_copy
        return slot, may_copy

    def _write(self, v: int, box: Box) -> None:
        pass

    def _lift(self, k: int, node: Node, t: int) -> None:
        v = node.inputs[0]
        box = self.lifted(v, t)
        if box is None:
            return
        d = None if self.p.slide is None else self.bounds.dim(v, self.p.slide)
        pages = (self.windows.get(v) or self.p.places[v]).pages or []
        lo, hi = box[d] if d is not None else (0, 1)
        parts = sum(1 for page in pages if page.lo < hi and page.hi > lo)
        key = ("lift", k, tuple(hi - lo for lo, hi in box), parts)
        if key not in self.memo:
            read = self.p.read(v, box, self.windows)
            extra = int(node.kernel.scratch(Extent((), 0, (read.nbytes,), (read,))))
            self.memo[key] = extra + (read.nbytes if len(read.parts) > 1 or read.loaded else 0)
        small = state_bytes(self.graph, node)
        (part,) = self.builder.charge(k, self.memo[key], [(small, None, False)])
        self.p.lifted[k] = 0
        if k not in self.p.states:
            self.p.states[k] = part
            return
        (merged,) = self.builder.charge(k, 0, [(small, None, False)])
        self.builder.drop(self.p.states[k])
        self.builder.drop(part)
        self.p.states[k] = merged


def _page(place: Located, row: int) -> Page:
    pages = place.pages or []
    if place.dim is None:
        return pages[0]
    return next(page for page in reversed(pages) if page.lo <= row)


class CountedStrip(Counting):
    """A strip of a forward sweep."""

    pace: ForwardPace

    def front_of(self, v: int) -> list[int]:
        """Rows to which a value is computed after every step."""
        return self.pace.end[v]


class CountedBackwardStrip(BackwardStrip, Counting):
    """A strip of a backward sweep."""

    def __init__(self, *args: Any) -> None:
        """See `BackwardStrip`."""
        super().__init__(*args)
        self.pulls: dict[int, PullCalls] = {}

    def front_of(self, v: int) -> list[int]:
        """Rows to which a value is computed after every step."""
        return self.pace.front[v]

    def _vjp(self, k: int, v: int, rows: Interval) -> None:
        if any(found[v][1] <= found[v][0] for found in self.intervals.values()) or self._idle(v, rows):
            return
        node, t = self.graph.nodes[k], self.t
        grad, out, place = self._gradient(v, rows)
        wanted = tuple(self.graph.values[u].differentiable for u in node.inputs)
        if k not in self.pulls:
            own = out == self._own_box(v, rows)
            region = self._own_box if own else self.out_box
            self.pulls[k] = self.calls(
                ("pull", k, own), k, lambda: PullCalls(self, k, np.array(self.pace.back[v]), region, wanted)
            )
        calls = self.pulls[k]
        slots: list[int] = []
        if any(wanted):
            reads = [node.inputs[i] for i in node.vjp_reads]
            lent = self.p.remade.lend(self.builder, reads, self.p.places)
            self.b.used.update(u for u in reads if u not in self.windows and u not in lent)
            extra = (
                calls.read_joined[t] + (grad.nbytes if len(grad.parts) > 1 else 0) + calls.scratch(t, grad, self.memo)
            )
            results = [(n, None, False) for n, w in zip(calls.sizes[t], wanted, strict=True) if w]
            slots = self.builder.charge(k, extra, results, v)
            self.p.remade.back(self.builder, lent)
        self.builder.macs += 2 * node.macs * prod(hi - lo for lo, hi in out) // max(1, prod(self.graph.values[v].shape))
        self._pulled(v, place, rows)
        outs = iter(slots)
        for u, given, w in zip(node.inputs, calls.inputs, wanted, strict=True):
            if w:
                self._contribute(u, given.at(t), next(outs))


class ForwardCount(ForwardLowering):
    """Lowering of forward that charges and forgets."""

    def __init__(
        self, bounds: Bounds, stages: Stages, schedule: Schedule, keep: Collection[int], streaming: bool, memo: Memo
    ) -> None:
        """`memo`: workspace that is known; see `ForwardLowering` for the rest."""
        self.memo = memo
        super().__init__(bounds, stages, schedule, keep, streaming, Counter(bounds.graph))

    def strip(self, *args: Any) -> Strip:
        """One tile of a sweep."""
        return CountedStrip(self, *args)

    def sweep_key(self, at: int) -> tuple[Any, ...]:
        """All that the table of a sweep depends on."""
        sweep, schedule = self.demand.sweeps[at], self.schedule
        cut = (self.slide, schedule.steps, schedule.grain, schedule.halvings, self.bounds.circle, len(self.bounds.axes))
        return (*cut, *self.tile_axes, tuple(sweep.nodes), frozenset(sweep.sinks), frozenset(sweep.finals))

    def pace(self, at: int, users: Users) -> ForwardPace:
        """The table of the sweep at a level, from another schedule where it is the same."""
        key = ("forward", *self.sweep_key(at))
        if key not in self.memo.paces:
            self.memo.paces[key] = super().pace(at, users)
        return self.memo.paces[key]  # type: ignore[return-value]


class BackwardCount(BackwardLowering):
    """Lowering of backward that charges and forgets."""

    def __init__(self, forward: ForwardCount) -> None:
        """`forward`: what was counted of it."""
        super().__init__(forward, Counter(forward.graph, forward.builder.next_slot))

    def strip(self, *args: Any) -> BackwardStrip:
        """One tile of a sweep."""
        return CountedBackwardStrip(self, *args)

    def pace(self, at: int, sweep: Sweep, users: Users, active: set[int]) -> BackwardPace:
        """The table of the sweep at a level, from another schedule where it is the same."""
        assert isinstance(self.f, ForwardCount)
        memo, key = self.f.memo, ("backward", *self.f.sweep_key(at), frozenset(active))
        if key not in memo.paces:
            memo.paces[key] = super().pace(at, sweep, users, active)
        return memo.paces[key]  # type: ignore[return-value]
