"""Lower a schedule to the forward program: prologues and sweeps, level after level.

Sliding along axis 0: at each step every value is produced up to the rows that its readers need, and keeps the rows
that they have yet to read. Tiles: for each tile the interval of every value is inferred backwards from the tile's
own share of the results. Enter at `lower_forward`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import product
from math import prod

from ranger_nn.bounds.circle import read_round
from ranger_nn.bounds.infer import Bounds, share
from ranger_nn.core.graph import COMPUTED, Graph, Node
from ranger_nn.core.program import ALLOC, FINISH, LIFT, MERGE, RUN, TRIM, WRITE, Extent, Program, Read
from ranger_nn.core.reach import Box, Interval
from ranger_nn.planning.builder import Builder, Located, Page, box_bytes
from ranger_nn.planning.pace import FOREVER, ForwardPace, Pace
from ranger_nn.planning.stages import REDUCE, REGIONAL, Stages
from ranger_nn.planning.weights import Remade


@dataclass(frozen=True)
class Schedule:
    """Decisions of the planner: sliding steps along axis 0 (0: no sliding), tiles per axis, cuts, holds.

    `holds[v]`: the last level at which v is read from memory; later levels compute it again, from what is in memory
    for another reader or from the input. `grain`: values with heavy weights advance by several rows at a time.
    `disk`: inputs and values between sweeps live in files.
    `halvings`: how often the chunks inside of operators that run whole are halved.
    `remake`: weights that forward computes are made again wherever they are read, not held through a sweep.
    """

    steps: int
    tiles: tuple[int, ...]
    cuts: tuple[int, ...] = ()
    holds: tuple[tuple[int, int], ...] = ()
    grain: bool = True
    disk: bool = False
    halvings: int = 0
    remake: bool = False

    @property
    def slides(self) -> bool:
        """True where axis 0 is slid along, False where it is tiled."""
        return self.steps > 0


@dataclass
class Sweep:
    """What runs in the sweep of one level: nodes and reductions in order, and the results it leaves.

    `finals`: values that run to their last row because a state behind it is asked for.
    """

    nodes: list[int] = field(default_factory=list)
    sinks: set[int] = field(default_factory=set)
    finals: set[int] = field(default_factory=set)
    stored_reads: set[int] = field(default_factory=set)


@dataclass
class Demand:
    """Sweeps of all levels, and the level at which each stored value is last read."""

    sweeps: list[Sweep]
    stored: dict[int, int]


def demand(bounds: Bounds, stages: Stages, schedule: Schedule) -> Demand:
    """Which nodes each sweep must run: from its results backwards to values in memory."""
    graph = bounds.graph
    holds = dict(schedule.holds)
    stored: dict[int, int] = {}
    for v, readers in stages.whole_reads.items():
        for k in readers:
            stored[v] = max(stored.get(v, 0), stages.level[k])
    sweeps = [Sweep() for _ in stages.levels]
    read = {v for node in graph.nodes for v in node.inputs} | set(graph.outputs)
    for k, node in enumerate(graph.nodes):
        if stages.kind[k] == REGIONAL:
            sweeps[stages.level[k]].sinks |= set(node.outputs[:1]) & set(graph.outputs)
            sweeps[stages.level[k]].finals |= set(node.outputs[:1] if read & set(node.states) else ())
    for at in reversed(range(len(sweeps))):
        sweep = sweeps[at]
        sweep.sinks |= {v for v in stored if stages.level[stages.producer[v]] == at}
        todo = [stages.producer[v] for v in sweep.sinks | sweep.finals] + stages.levels[at].reduces
        seen: set[int] = set()
        again: list[int] = []  # nodes of earlier levels: looked at last, when it is known what is in memory anyway
        while todo or again:
            k = todo.pop() if todo else again.pop()
            if k in seen:
                continue
            seen.add(k)
            native = stages.level[k] == at
            for i, v in enumerate(graph.nodes[k].inputs):
                p = stages.producer.get(v)
                if p is None or stages.kind[p] != REGIONAL or v in graph.nodes[p].states:
                    continue
                whole = any(bounds.blocked(graph.nodes[k], i, a) for a in range(len(bounds.axes)))
                whole = whole and stages.kind[k] == REGIONAL
                held = holds.get(v, FOREVER) >= at if native else max(stored.get(v, -1), holds.get(v, -1)) >= at
                if stages.level[p] == at and not whole:
                    todo.append(p)
                elif whole or held:
                    stored[v] = max(stored.get(v, 0), at)
                    sweep.stored_reads.add(v)
                else:
                    again.append(p)
        sweep.nodes = sorted(seen)
    return Demand(sweeps, stored)


class ForwardLowering:
    """State of lowering: where every value is."""

    def __init__(
        self,
        bounds: Bounds,
        stages: Stages,
        schedule: Schedule,
        keep: Collection[int],
        streaming: bool,
        builder: Builder | None = None,
    ) -> None:
        """`keep`: values that backward will read; `streaming`: paged values may be dropped as they are read."""
        self.bounds, self.stages, self.schedule, self.keep = bounds, stages, schedule, set(keep)
        self.graph = bounds.graph
        self.builder = builder or Builder(self.graph)
        self.paces: dict[int, ForwardPace] = {}
        self.demand = demand(bounds, stages, schedule)
        self.places: dict[int, Located] = {}
        self.states: dict[int, int] = {}
        self.lifted: dict[int, int] = {}
        self.streaming = streaming
        self.slide = 0 if schedule.slides else None
        self.tile_axes = [a for a in range(len(bounds.axes)) if a != self.slide and schedule.tiles[a] > 1]
        self.last_use = self._last_uses()
        self.external: dict[int, int] = {}
        self.remade = Remade(self.graph, stages.weights if schedule.remake else (), self.run_whole)
        for value in self.graph.values:
            if value.kind != COMPUTED:
                slot = self.builder.slot(0)
                self.external[value.index] = slot
                self.places[value.index] = Located(slot, on_disk=schedule.disk and value.index in self.graph.inputs)

    def _last_uses(self) -> dict[int, tuple[int, int, int]]:
        last: dict[int, tuple[int, int, int]] = {}

        def use(v: int, when: tuple[int, int, int]) -> None:
            last[v] = max(last.get(v, (-1, 0, 0)), when)

        for at, (level, sweep) in enumerate(zip(self.stages.levels, self.demand.sweeps, strict=True)):
            for k in level.prologue:
                for v in self.graph.nodes[k].inputs:
                    use(v, (at, 0, k))
            for k in sweep.nodes:
                for v in self.graph.nodes[k].inputs:
                    use(v, (at, 1, 0))
        for v in (*self.graph.outputs, *self.keep):
            last[v] = (FOREVER, 0, 0)
        return last

    def lower(self) -> Program:
        """The whole program."""
        for at, level in enumerate(self.stages.levels):
            self.builder.sweep = at
            for k in level.prologue:
                if self.graph.nodes[k].outputs[0] not in self.remade.producer:
                    self._prologue(at, k)
            if self.demand.sweeps[at].nodes:
                self._sweep(at)
            self._free_after((at, 1, 0))
        program = self.builder.program(self.external)
        for v in (*self.graph.outputs, *self.keep):
            place = self.places.get(v)
            if place is not None and place.pages is None:
                program.results[v] = place.slot
        program.kept = tuple(sorted(self.keep))
        return program

    def _free_after(self, when: tuple[int, int, int]) -> None:
        for v, place in list(self.places.items()):
            if self.graph.values[v].kind != COMPUTED or self.last_use.get(v, (-1, 0, 0)) > when:
                continue
            for slot in [place.slot] if place.pages is None else [p.slot for p in place.pages]:
                self.builder.drop(slot)
            del self.places[v]

    def full_box(self, v: int) -> Box:
        """All of a value."""
        return tuple((0, n) for n in self.graph.values[v].shape)

    def read(self, v: int, box: Box, window: dict[int, Located] | None = None) -> Read:
        """Read a region, from the sweep's window if it is there."""
        value = self.graph.values[v]
        place = (window or {}).get(v) or self.places.get(v)
        if any(hi <= lo for lo, hi in box) and (place is None or 0 not in value.shape):
            return Read((), 0, 0, box)
        assert place is not None, f"value {v} is read before it is made"
        seam = self.bounds.across(v, box) if place.pages is None else None
        if seam is None:
            return self.builder.read(place, box, value.itemsize, value.shape)
        rows = tuple((0, n) if d == seam[0] else b for d, (n, b) in enumerate(zip(value.shape, box, strict=True)))
        return read_round(self.builder.read(place, rows, value.itemsize, value.shape), box, *seam)

    def _prologue(self, at: int, k: int) -> None:
        node = self.graph.nodes[k]
        lent = self.remade.lend(self.builder, node.inputs, self.places)
        outs = self.run_whole(self.builder, k, {**self.places, **lent})
        self.remade.back(self.builder, lent)
        for v, slot in zip(node.outputs, outs, strict=True):
            self.places[v] = Located(slot)
        self._free_after((at, 0, k))

    def run_whole(self, builder: Builder, k: int, places: Mapping[int, Located]) -> list[int]:
        """Run a node on whole inputs that `places` hold; the slots of its results."""
        node, values = self.graph.nodes[k], self.graph.values
        reads = [builder.read(places[v], self.full_box(v), values[v].itemsize, values[v].shape) for v in node.inputs]
        out_bytes = [self.graph.values[v].nbytes for v in node.outputs]
        view = reads[node.alias].parts[0][0] if node.alias is not None and len(reads[node.alias].parts) == 1 else None
        extent = Extent(self.full_box(node.outputs[0]), sum(out_bytes), tuple(r.nbytes for r in reads), tuple(reads))
        scratch = node.kernel.scratch(extent)
        if node.kernel.chunk:  # a result as large as time: the caller's, where it is an output
            out_bytes = [0 if v in self.graph.outputs else n for v, n in zip(node.outputs, out_bytes, strict=True)]
        out_box = self.full_box(node.outputs[0])
        copies = node.kernel.copies(out_box, [r.box for r in reads]) if view is not None else None
        results = [(n, None if copies else view, node.may_copy if copies is None else copies) for n in out_bytes]
        builder.macs += node.macs
        return builder.emit(RUN, k, reads, results, scratch=scratch, out_box=out_box, value=node.outputs[0])

    # ---- sweeps -------------------------------------------------------------------------------------------

    def _paged(self, v: int) -> bool:
        whole = v in self.stages.whole_reads or v in self.graph.outputs
        return (
            self.slide is not None
            and not self.schedule.disk
            and not self.tile_axes
            and not whole
            and self.bounds.dim(v, 0) is not None
        )

    def _sweep(self, at: int) -> None:
        sweep = self.demand.sweeps[at]
        stores: dict[int, Located] = {}
        for v in sorted(sweep.sinks):
            value = self.graph.values[v]
            if not self._paged(v):
                elsewhere = self.schedule.disk or v in self.graph.outputs
                (slot,) = self.builder.emit(
                    ALLOC, -1, [], [(0 if elsewhere else value.nbytes, None, False)], value=v, shape=value.shape
                )
                stores[v] = Located(slot, on_disk=self.schedule.disk)
        users = sweep_users(self.graph, sweep.nodes)
        for tile in product(*(range(self.schedule.tiles[a]) for a in self.tile_axes)):
            strip = self.strip(at, sweep, users, stores, dict(zip(self.tile_axes, tile, strict=True)))
            strip.run()
            stores = strip.stores
            self._settle(at, strip)
        for k in sweep.nodes:
            if self.stages.kind[k] == REDUCE:
                self._finish(k)
        self.places.update(stores)

    def strip(
        self,
        at: int,
        sweep: Sweep,
        users: dict[int, list[tuple[int, int]]],
        stores: dict[int, Located],
        tile: dict[int, int],
    ) -> Strip:
        """One tile of a sweep."""
        return Strip(self, at, sweep, users, stores, tile)

    def pace(self, at: int, users: dict[int, list[tuple[int, int]]]) -> ForwardPace:
        """The table of the sweep at a level: the same for all of its tiles."""
        if at not in self.paces:
            sweep = self.demand.sweeps[at]
            self.paces[at] = ForwardPace(
                self.bounds,
                self.stages,
                sweep.nodes,
                users,
                sweep.sinks | sweep.finals,
                self.slide,
                self.schedule.steps,
                self.schedule.grain,
            )
        return self.paces[at]

    def _settle(self, at: int, strip: Strip) -> None:
        """Where the states behind the last steps are; those that nobody reads are dropped."""
        for k, slots in strip.states.items():
            for v, slot in zip(self.graph.nodes[k].states, slots, strict=True):
                if self.stages.level[k] == at and v in self.last_use and v not in self.places:
                    self.places[v] = Located(slot)
                else:
                    self.builder.drop(slot)

    def _finish(self, k: int) -> None:
        node = self.graph.nodes[k]
        state = self.states[k]
        (v,) = node.outputs
        read = Read(((state, ()),), 0, 0, ())
        (slot,) = self.builder.emit(FINISH, k, [read], [(self.graph.values[v].nbytes, None, False)], value=v)
        self.places[v] = Located(slot)
        if v not in self.keep:
            self.builder.drop(self.states.pop(k))


def state_bytes(graph: Graph, node: Node) -> int:
    """Of a reduction's state: of moments, their count and what a merge holds beside them."""
    return 4 * graph.values[node.outputs[0]].nbytes + 64


def sweep_users(graph: Graph, nodes: list[int]) -> dict[int, list[tuple[int, int]]]:
    """For each value: (node, input position) of its readers in a sweep."""
    users: dict[int, list[tuple[int, int]]] = {}
    for k in nodes:
        for i, v in enumerate(graph.nodes[k].inputs):
            users.setdefault(v, []).append((k, i))
    return users


class Strip:
    """One tile across the tiled axes, walked along the sliding axis if there is one."""

    pace: Pace

    def __init__(
        self,
        parent: ForwardLowering,
        at: int,
        sweep: Sweep,
        users: dict[int, list[tuple[int, int]]],
        stores: dict[int, Located],
        tile: dict[int, int],
    ) -> None:
        """`tile`: index on each tiled axis; `stores`: where the sweep's results go."""
        self.p, self.at, self.sweep, self.users, self.stores, self.tile = parent, at, sweep, users, stores, tile
        self.graph, self.bounds, self.builder = parent.graph, parent.bounds, parent.builder
        self.windows: dict[int, Located] = {}
        self.produced = {self.graph.nodes[k].outputs[0] for k in sweep.nodes if parent.stages.kind[k] == REGIONAL}
        self.intervals = {a: tile_intervals(parent, sweep, users, a, i) for a, i in tile.items()}
        self.order = {k: n for n, k in enumerate(sweep.nodes)}
        self.streamed: set[int] = set()
        self.t = 0
        self.states: dict[int, list[int]] = {}

    def _streamed_stores(self) -> set[int]:
        """Paged values that this sweep reads last: their pages are dropped as it goes."""
        p = self.p
        if p.slide is None or p.tile_axes or not p.streaming:
            return set()
        return {
            v
            for v in self.users
            if v in p.places and p.places[v].pages is not None and p.last_use.get(v) == (self.at, 1, 0)
        }

    def run(self) -> None:
        """All steps."""
        self.streamed = self._streamed_stores()
        pace = self.pace = self.p.pace(self.at, self.users)
        calls = [(k, self.graph.nodes[k], self._dropped(k)) for k in self.sweep.nodes]
        for t in range(pace.clock.total):
            self.t = t
            for k, node, dropped in calls:
                if self.p.stages.kind[k] == REDUCE:
                    self._lift(k, node, t)
                else:
                    v = node.outputs[0]
                    ends = pace.end[v]
                    start = ends[t - 1] if t else 0
                    if ends[t] > start:
                        self._run(k, node, v, (start, ends[t]))
                for v in dropped:
                    self._drop(v, pace.keep[v][t])
            self.builder.region += 1
        for v, place in list(self.windows.items()):
            if v in self.stores and self.stores[v] is place:
                continue
            for page in place.pages or []:
                self.builder.drop(page.slot)
        self.windows.clear()

    # -- boxes

    def out_box(self, v: int, rows: Interval) -> Box:
        """Region of an output: `rows` on the sliding axis, the tile's interval on the others."""
        box = [(0, n) for n in self.graph.values[v].shape]
        for a in range(len(self.bounds.axes)):
            d = self.bounds.dim(v, a)
            if d is None:
                continue
            if a == self.p.slide:
                box[d] = rows
            elif a in self.intervals:
                box[d] = self.intervals[a][v]
        return tuple(box)

    # -- instructions

    def _run(self, k: int, node: Node, v: int, rows: Interval) -> None:
        if any(found[v][1] <= found[v][0] for found in self.intervals.values()):
            return
        out = self.out_box(v, rows)
        value = self.graph.values[v]
        boxes = [self.bounds.box(node, i, out) for i in range(len(node.inputs))]
        lent = self.p.remade.lend(self.builder, node.inputs, self.p.places)
        held = {**self.windows, **lent}
        reads = [self.p.read(u, box, held) for u, box in zip(node.inputs, boxes, strict=True)]
        out_bytes = box_bytes(out, value.itemsize)
        view, may_copy = None, node.may_copy
        if node.alias is not None and len(reads[node.alias].parts) == 1:
            copies = node.kernel.copies(out, boxes)
            may_copy = node.may_copy if copies is None else copies
            view = None if copies else reads[node.alias].parts[0][0]
            if view is not None and may_copy and self.builder.bytes.get(self.builder.storage[view], 0) == 0:
                view = None
        scratch = node.kernel.scratch(Extent(out, out_bytes, tuple(r.nbytes for r in reads), tuple(reads)))
        before = self.states.get(k, [])
        reads += [self._all(u, slot) for u, slot in zip(node.states, before)]
        results = [(out_bytes, view, may_copy), *((self.graph.values[u].nbytes, None, False) for u in node.states)]
        slot, *behind = self.builder.emit(RUN, k, reads, results, scratch=scratch, out_box=out, value=v)
        whole = max(1, prod(value.shape))
        self.builder.macs += node.macs * prod(hi - lo for lo, hi in out) // whole
        self.p.remade.back(self.builder, lent)
        for old in before:
            self.builder.drop(old)
        if node.states:
            self.states[k] = behind
        self._place(v, slot, rows, out)

    def _all(self, v: int, slot: int) -> Read:
        """A value that a slot holds whole."""
        return Read(((slot, ()),), 0, self.graph.values[v].nbytes, self.p.full_box(v))

    def _place(self, v: int, slot: int, rows: Interval, out: Box) -> None:
        dim = self.bounds.dim(v, self.p.slide) if self.p.slide is not None else None
        window = self.windows.get(v)
        if window is None:
            origin = {}
            for a in self.intervals:
                d = self.bounds.dim(v, a)
                if d is not None:
                    origin[d] = (out[d][0], out[d][1] - out[d][0])
            window = self.windows[v] = Located(-1, dim, [], origin)
        assert window.pages is not None
        lo, hi = rows if dim is not None else (0, 1)
        window.pages.append(Page(lo, hi, slot, lo))
        if v not in self.sweep.sinks and v in self.users:
            return
        if v not in self.sweep.sinks:
            window.pages.pop()
            self.builder.drop(slot)
            return
        if self.p._paged(v):
            self.stores[v] = window
            return
        target = list(out)
        owned = True
        for a, index in self.tile.items():
            d = self.bounds.dim(v, a)
            own = share(self.bounds.size(v, a), index, self.p.schedule.tiles[a])
            owned = owned and own[1] > own[0]
            if d is not None:
                target[d] = own
        if not owned:
            if v not in self.users:
                window.pages.pop()
                self.builder.drop(slot)
            return
        self._write(v, tuple(target))
        if v not in self.users:
            window.pages.pop()
            self.builder.drop(slot)

    def _write(self, v: int, box: Box) -> None:
        reads = [self.p.read(v, box, {v: self.stores[v]}), self.p.read(v, box, self.windows)]
        self.builder.emit(WRITE, -1, reads, value=v, out_box=box)

    def lifted(self, v: int, t: int) -> Box | None:
        """The region of a value that a reduction takes at step t: the tile's own share; None where that is empty."""
        box = [(0, n) for n in self.graph.values[v].shape]
        for a in range(len(self.bounds.axes)):
            d = self.bounds.dim(v, a)
            if a == self.p.slide:
                own = self.pace.share(v, t)
            else:
                count = self.p.schedule.tiles[a] if a in self.tile else 1
                own = share(self.bounds.size(v, a), self.tile.get(a, 0), count)
            if own[1] <= own[0]:
                return None
            if d is not None:
                box[d] = own
        return tuple(box)

    def _lift(self, k: int, node: Node, t: int) -> None:
        v = node.inputs[0]
        box = self.lifted(v, t)
        if box is None:
            return
        read = self.p.read(v, box, self.windows)
        scratch = node.kernel.scratch(Extent((), 0, (read.nbytes,), (read,)))
        small = state_bytes(self.graph, node)
        (part,) = self.builder.emit(LIFT, k, [read], [(small, None, False)], scratch=scratch)
        n = node.kernel.count(box)
        if k not in self.p.states:
            self.p.states[k] = part
            self.p.lifted[k] = n
            return
        reads = [Read(((self.p.states[k], ()),)), Read(((part, ()),))]
        (merged,) = self.builder.emit(MERGE, k, reads, [(small, None, False)], count=(self.p.lifted[k], n))
        self.builder.drop(self.p.states[k])
        self.builder.drop(part)
        self.p.states[k] = merged
        self.p.lifted[k] += n

    # -- lifetimes

    def _dropped(self, k: int) -> list[int]:
        """Values of which node k is the last reader in a step."""
        return [
            v for v in set(self.graph.nodes[k].inputs) if max(self.order[u] for u, _ in self.users[v]) == self.order[k]
        ]

    def _drop(self, v: int, keep: int) -> None:
        """Rows of a value below `keep` were read by all."""
        if v in self.windows and self.stores.get(v) is not self.windows[v]:
            drop_rows(self.builder, v, self.windows[v], keep)
        elif v in self.streamed:
            drop_rows(self.builder, v, self.p.places[v], keep)


def drop_rows(builder: Builder, v: int, place: Located, keep: int) -> None:
    """Free the pages below row `keep`; copy out the rest of a page that is at least half dead."""
    pages = place.pages or []
    while pages and pages[0].hi <= keep:
        builder.drop(pages.pop(0).slot)
    if not pages or pages[0].lo >= keep or place.dim is None:
        return
    page = pages[0]
    if (keep - page.base) * 2 < page.hi - page.base or not builder.owns(page.slot):
        page.lo = max(page.lo, keep)
        return
    total = builder.bytes[builder.storage[page.slot]]
    nbytes = total * (page.hi - keep) // max(1, page.hi - page.base)
    if total < 4096:
        page.lo = keep
        return
    read = Read(((page.slot, ((place.dim, keep - page.base, page.hi - keep),)),), place.dim, nbytes)
    (slot,) = builder.emit(TRIM, -1, [read], [(nbytes, None, False)], value=v)
    builder.drop(page.slot)
    pages[0] = Page(keep, page.hi, slot, keep)


def tile_intervals(
    p: ForwardLowering, sweep: Sweep, users: dict[int, list[tuple[int, int]]], axis: int, index: int
) -> dict[int, Interval]:
    """Interval along a tiled axis of each value that the sweep produces: own share of results plus halo."""
    found: dict[int, Interval] = {}
    count = p.schedule.tiles[axis]
    for k in reversed(sweep.nodes):
        if p.stages.kind[k] == REDUCE:
            continue
        v = p.graph.nodes[k].outputs[0]
        size = p.bounds.size(v, axis)
        parts = [share(size, index, count)] if v in sweep.sinks | sweep.finals else []
        for u, i in users.get(v, []):
            if p.stages.kind[u] == REDUCE:
                parts.append(share(size, index, count))
            else:
                parts.append(p.bounds.needs(p.graph.nodes[u], i, axis, *found[p.graph.nodes[u].outputs[0]]))
        parts = [q for q in parts if q[1] > q[0]]
        found[v] = (min(lo for lo, _ in parts), max(hi for _, hi in parts)) if parts else (0, 0)
    return found


def lower_forward(
    bounds: Bounds, stages: Stages, schedule: Schedule, keep: Collection[int] = (), streaming: bool = True
) -> tuple[Program, ForwardLowering]:
    """The forward program of a schedule, and the state of its lowering (backward goes on from there)."""
    lowering = ForwardLowering(bounds, stages, schedule, keep, streaming)
    return lowering.lower(), lowering
