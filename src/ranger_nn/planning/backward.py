"""Lower a schedule to the backward program: sweeps in reverse, each recomputes its local forward and pulls back.

Within a sweep rows go the same way as in forward. At each step the gradients of the results are known up to some
row; the gradient of a value is complete up to the first row that an unfinished reader reaches, and its operator is
pulled back that far. Forward values are recomputed as far as that needs, and kept until the last pull-back that
reads them. Nothing is computed twice within a sweep, and no activation outlives its window.

    rows ->   ==========forward==========|
              =====pulled back====|<-lag->|          windows hold the lag only

Enter at `lower_backward`.
"""

from __future__ import annotations

from itertools import product
from math import prod

from ranger_nn.bounds.circle import pieces
from ranger_nn.bounds.infer import share
from ranger_nn.core.graph import COMPUTED, INPUT, Node
from ranger_nn.core.program import ADD, REDUCE_VJP, TRIM, VJP, ZEROS, Cut, Extent, Program, Read
from ranger_nn.core.reach import Box
from ranger_nn.planning.builder import Builder, Located, Page, box_bytes
from ranger_nn.planning.forward import (
    ForwardLowering,
    Strip,
    Sweep,
    drop_rows,
    sweep_users,
)
from ranger_nn.planning.pace import BackwardPace
from ranger_nn.planning.stages import REDUCE, REGIONAL

NOTHING = Read(())


class NotKept(Exception):
    """Backward reads a value that forward was not told to keep."""


class BackwardLowering:
    """State of lowering backward: where gradients are. `forward` tells where kept values are."""

    def __init__(self, forward: ForwardLowering, builder: Builder | None = None) -> None:
        """Slots go on from those of the forward program."""
        self.f = forward
        self.graph, self.bounds, self.stages = forward.graph, forward.bounds, forward.stages
        self.builder = builder or Builder(self.graph, forward.builder.next_slot)
        self.paces: dict[int, BackwardPace] = {}
        self.used: set[int] = set()
        self.grads: dict[int, Located] = {}
        self.readonly: set[int] = set()
        self.given: dict[int, int] = {}
        self._adopt()

    def _adopt(self) -> None:
        b, old = self.builder, self.f.builder
        slots = [self.f.external[v] for v in self.f.external]
        for place in self.f.places.values():
            slots += [place.slot] if place.pages is None else [p.slot for p in place.pages]
        slots += list(self.f.states.values())
        for s in slots:
            if s in b.storage or s not in old.storage:
                continue
            storage = old.storage[s]
            b.storage[s] = storage
            b.refs[storage] = b.refs.get(storage, 0) + 1
            if storage not in b.bytes:
                b.bytes[storage] = old.bytes[storage]
                b.live += old.bytes[storage]
                up = old.parent.get(storage)
                while up is not None and up not in b.bytes:
                    b.bytes[up], b.refs[up] = old.bytes[up], 1
                    b.live += old.bytes[up]
                    up = old.parent.get(up)
        b.peak = b.live

    def lower(self) -> Program:
        """The whole program."""
        b = self.builder
        for v in self.graph.outputs:
            if self.graph.values[v].differentiable:
                slot = b.slot(0)
                self.given[v] = slot
                self.grads[v] = Located(slot)
                self.readonly.add(v)
        first_read = self._first_reads()
        for at in reversed(range(len(self.stages.levels))):
            b.sweep = at
            sweep = self.f.demand.sweeps[at]
            if sweep.nodes:
                self._sweep(at, sweep)
            for k in reversed(self.stages.levels[at].prologue):
                self._prologue(k)
            self._free(at, first_read)
        for v in sorted(self._reached()):
            if self._is_leaf(v) and v not in self.grads:
                self.whole_grad(v)
        program = b.program(self.f.external)
        program.results = {v: place.slot for v, place in self.grads.items() if self._is_leaf(v)}
        program.grads = dict(self.given)
        return program

    def _reached(self) -> set[int]:
        """Differentiable values on which a differentiable output depends: autograd gives them zeros, not None."""
        values = self.graph.values
        reached = {v for v in self.graph.outputs if values[v].differentiable}
        for node in reversed(self.graph.nodes):
            if reached & set(node.outputs):
                reached |= {v for v in node.inputs if values[v].differentiable}
        return reached

    def _is_leaf(self, v: int) -> bool:
        return self.graph.values[v].kind != COMPUTED

    def _first_reads(self) -> dict[int, int]:
        first: dict[int, int] = {}
        for at in reversed(range(len(self.stages.levels))):
            for k in (*self.stages.levels[at].prologue, *self.f.demand.sweeps[at].nodes):
                for v in (*self.graph.nodes[k].inputs, *self.graph.nodes[k].outputs):
                    first[v] = at
        return first

    def _free(self, at: int, first_read: dict[int, int]) -> None:
        for v, place in list(self.f.places.items()):
            if self._is_leaf(v) or first_read.get(v, -1) < at or v in self.graph.outputs:
                continue
            for slot in [place.slot] if place.pages is None else [p.slot for p in place.pages]:
                if slot in self.builder.storage:
                    self.builder.drop(slot)
            del self.f.places[v]
        for v, place in list(self.grads.items()):
            if self._is_leaf(v) or self.stages.level[self.stages.producer[v]] < at:
                continue
            for slot in [place.slot] if place.pages is None else [p.slot for p in place.pages]:
                if slot in self.builder.storage and v not in self.readonly:
                    self.builder.drop(slot)
            del self.grads[v]

    def read(self, v: int, box: Box, windows: dict[int, Located] | None = None) -> Read:
        """A region of a forward value (an empty one is all border: nothing has to hold it)."""
        if any(hi <= lo for lo, hi in box) and 0 not in self.graph.values[v].shape:
            return Read((), 0, 0, box)
        if not (windows and v in windows):
            self.used.add(v)
        return self.f.read(v, box, windows) if v in (windows or {}) or v in self.f.places else self._absent(v)

    def _absent(self, v: int) -> Read:
        raise NotKept(f"value {v} is read by backward but was not kept")

    # ---- gradients of whole values ------------------------------------------------------------------------

    def whole_grad(self, v: int) -> Located:
        """A gradient buffer for all of a value, zero at first."""
        place = self.grads.get(v)
        value = self.graph.values[v]
        if place is None:
            (slot,) = self.builder.emit(ZEROS, -1, [], [(value.nbytes, None, False)], value=v, shape=value.shape)
            place = self.grads[v] = Located(slot)
        elif v in self.readonly:
            read = Read(((place.slot, ()),), 0, value.nbytes)
            (slot,) = self.builder.emit(TRIM, -1, [read], [(value.nbytes, None, False)], value=v)
            self.readonly.discard(v)
            place = self.grads[v] = Located(slot)
        return place

    def add_whole(self, v: int, box: Box, slot: int) -> None:
        """Add the contribution in `slot` to the region `box` of v's gradient; the slot is used up."""
        value = self.graph.values[v]
        if v not in self.grads and box == tuple((0, n) for n in value.shape):
            self.grads[v] = Located(slot)
            return
        place = self.whole_grad(v)
        for part, cuts in self._pieces(v, box) if self.builder.writes else ():
            target = self.builder.read(place, part, value.itemsize, value.shape)
            self.builder.emit(ADD, -1, [target, Read(((slot, cuts),), 0, target.nbytes)], value=v)
        self.builder.drop(slot)

    def _pieces(self, v: int, box: Box) -> list[tuple[Box, tuple[Cut, ...]]]:
        """Regions of v to which `box` belongs, and where in it: several across the seam of an axis that goes round."""
        seam = self.bounds.across(v, box)
        if seam is None:
            return [(box, ())]
        dim, period = seam
        found: list[tuple[Box, tuple[Cut, ...]]] = []
        for at, start, length in pieces(box[dim], period):
            part = tuple((start, start + length) if d == dim else b for d, b in enumerate(box))
            found.append((part, ((dim, at - box[dim][0], length),)))
        return found

    # ---- prologue -----------------------------------------------------------------------------------------

    def _prologue(self, k: int) -> None:
        node = self.graph.nodes[k]
        wanted = tuple(self.graph.values[v].differentiable for v in node.inputs)
        if not any(self.graph.values[v].differentiable and v in self.grads for v in node.outputs) or not any(wanted):
            return
        full = [tuple((0, n) for n in self.graph.values[v].shape) for v in node.inputs]
        lent = self.f.remade.lend(self.builder, [node.inputs[i] for i in node.vjp_reads], self.f.places)
        reads = [
            self.read(v, box, lent) if i in node.vjp_reads else Read((), 0, 0, box)
            for i, (v, box) in enumerate(zip(node.inputs, full, strict=True))
        ]
        kept = [node.outputs[p] for p in node.vjp_outputs]
        reads += [self.read(v, tuple((0, n) for n in self.graph.values[v].shape)) for v in kept]
        grads = []
        for v in node.outputs:
            value = self.graph.values[v]
            box = tuple((0, n) for n in value.shape)
            if v not in self.grads:
                grads.append(NOTHING)
                continue
            self._complete(v)
            grads.append(self.builder.read(self.grads[v], box, value.itemsize, value.shape))
        sizes = [self.graph.values[v].nbytes for v in node.inputs]
        out_bytes = sum(self.graph.values[v].nbytes for v in node.outputs)
        results = [(n, None, False) for n, w in zip(sizes, wanted, strict=True) if w]
        out_box = tuple((0, n) for n in self.graph.values[node.outputs[0]].shape)
        outs = self.builder.emit(
            VJP,
            k,
            [*reads, *grads],
            results,
            scratch=node.kernel.vjp_scratch(Extent(out_box, out_bytes, tuple(sizes), (*reads, *grads), wanted)),
            out_box=out_box,
            wanted=wanted,
            value=node.outputs[0],
        )
        self.f.remade.back(self.builder, lent)
        if node.kernel.chunk:
            self.builder.macs += 3 * node.macs
        slots = iter(outs)
        for v, box, w in zip(node.inputs, full, wanted, strict=True):
            if w:
                self.add_any(v, box, next(slots))

    def _complete(self, v: int) -> None:
        place = self.grads[v]
        if place.pages is not None:
            GradWindow(self, v, place, {}).fill(self.graph.values[v].shape[place.dim or 0])

    def add_any(self, v: int, box: Box, slot: int) -> None:
        """Add to a gradient kept whole or in pages."""
        place = self.grads.get(v)
        if place is not None and place.pages is not None:
            GradWindow(self, v, place, {}).add(box, slot)
        elif place is None and v in self.f.places and self.f.places[v].pages is not None:
            dim = self.f.places[v].dim
            self.grads[v] = Located(-1, dim, [])
            GradWindow(self, v, self.grads[v], {}).add(box, slot)
        else:
            self.add_whole(v, box, slot)

    # ---- sweeps -------------------------------------------------------------------------------------------

    def _sweep(self, at: int, sweep: Sweep) -> None:
        users = sweep_users(self.graph, sweep.nodes)
        active = self._active(sweep, users)
        if not active:
            return
        for tile in product(*(range(self.f.schedule.tiles[a]) for a in self.f.tile_axes)):
            self.strip(at, sweep, users, active, dict(zip(self.f.tile_axes, tile, strict=True))).run()

    def strip(
        self, at: int, sweep: Sweep, users: dict[int, list[tuple[int, int]]], active: set[int], tile: dict[int, int]
    ) -> BackwardStrip:
        """One tile of a sweep."""
        return BackwardStrip(self, at, sweep, users, active, tile)

    def pace(self, at: int, sweep: Sweep, users: dict[int, list[tuple[int, int]]], active: set[int]) -> BackwardPace:
        """The table of the sweep at a level: the same for all of its tiles."""
        if at not in self.paces:
            schedule = self.f.schedule
            self.paces[at] = BackwardPace(
                self.bounds,
                self.stages,
                sweep.nodes,
                users,
                sweep.sinks,
                self.f.slide,
                schedule.steps,
                schedule.grain,
                active,
            )
        return self.paces[at]

    def _active(self, sweep: Sweep, users: dict[int, list[tuple[int, int]]]) -> set[int]:
        active: set[int] = set()
        for k in reversed(sweep.nodes):
            (v,) = self.graph.nodes[k].outputs
            if not self.graph.values[v].differentiable:
                continue
            known = v in self.grads and (v in sweep.sinks or self.stages.kind[k] == REDUCE)
            if known or any(u in active for u, _ in users.get(v, []) if self.stages.kind[k] == REGIONAL):
                active.add(k)
        return active


class GradWindow:
    """Gradient of a value in pages: contributions are added where rows exist, appended where they do not."""

    def __init__(self, parent: BackwardLowering, v: int, place: Located, origin: dict[int, tuple[int, int]]) -> None:
        """`origin`: start and length of the window on tiled dimensions."""
        self.p, self.v, self.place = parent, v, place
        place.origin = origin or place.origin
        self.builder = parent.builder
        self.shape = parent.graph.values[v].shape
        self.itemsize = parent.graph.values[v].itemsize

    @property
    def end(self) -> int:
        """Row up to which pages exist."""
        pages = self.place.pages or []
        return pages[-1].hi if pages else -1

    def _row_bytes(self) -> int:
        n = self.itemsize
        for d, size in enumerate(self.shape):
            if d != self.place.dim:
                n *= self.place.origin.get(d, (0, size))[1]
        return n

    def _zeros(self, lo: int, hi: int) -> None:
        shape = [self.place.origin.get(d, (0, n))[1] for d, n in enumerate(self.shape)]
        if self.place.dim is not None:
            shape[self.place.dim] = hi - lo
        (slot,) = self.builder.emit(
            ZEROS, -1, [], [(self._row_bytes() * (hi - lo), None, False)], value=self.v, shape=tuple(shape)
        )
        assert self.place.pages is not None
        self.place.pages.append(Page(lo, hi, slot, lo))

    def fill(self, upto: int, start: int = 0) -> None:
        """Zero rows where nothing was contributed."""
        at = max(self.end, start) if self.end >= 0 else start
        if upto > at:
            self._zeros(at, upto)

    def add(self, box: Box, slot: int, start: int = 0) -> None:
        """Add the contribution in `slot` on `box`; the slot is used up (or becomes a page)."""
        dim, pages = self.place.dim, self.place.pages
        assert pages is not None
        lo, hi = box[dim] if dim is not None else (0, 1)
        exact = all(box[d] == (o, o + n) for d, (o, n) in self.place.origin.items())
        if lo == hi:
            self.builder.drop(slot)
            return
        end = self.end
        if end < 0:
            end = min(start, lo)
        if lo > end:
            self._zeros(end, lo)
            end = lo
        if not exact and hi > end:
            self._zeros(end, hi)
            end = hi
        kept = False
        for page in list(pages) if self.builder.writes else ():
            a, b = max(lo, page.lo), min(hi, page.hi)
            if b <= a:
                continue
            region = list(box)
            if dim is not None:
                region[dim] = (a, b)
            target = self.builder.read(
                Located(-1, dim, [page], self.place.origin), tuple(region), self.itemsize, self.shape
            )
            cuts = ((dim, a - lo, b - a),) if dim is not None and (a, b) != (lo, hi) else ()
            self.builder.emit(ADD, -1, [target, Read(((slot, cuts),), 0, target.nbytes)], value=self.v)
        if hi > end:
            a = max(lo, end)
            pages.append(Page(a, hi, slot, lo))
            kept = True
        if not kept:
            self.builder.drop(slot)


class BackwardStrip(Strip):
    """One tile of a backward sweep: recompute forward, pull back, step by step."""

    pace: BackwardPace

    def __init__(
        self,
        parent: BackwardLowering,
        at: int,
        sweep: Sweep,
        users: dict[int, list[tuple[int, int]]],
        active: set[int],
        tile: dict[int, int],
    ) -> None:
        """`active`: nodes that a gradient reaches."""
        super().__init__(parent.f, at, sweep, users, {}, tile)
        self.sweep = Sweep(sweep.nodes, set(), sweep.stored_reads)  # results are computed again, not written again
        self.b, self.active, self.sinks = parent, active, sweep.sinks
        self.builder = parent.builder
        self.back: dict[int, int] = {}
        self.grads: dict[int, Located] = {}
        self.back_order = [k for k in reversed(sweep.nodes) if k in active]
        self.slide = parent.f.slide
        self.pace = parent.pace(at, sweep, users, active)
        self.final = self.pace.final

    # -- steps

    def run(self) -> None:
        """All steps."""
        events = self._last_events()
        pace = self.pace
        rerun = [(k, self.graph.nodes[k], events.get(("f", k), ())) for k in self.sweep.nodes]
        for t in range(pace.clock.total):
            self.t = t
            for k, node, dropped in rerun:
                if self.p.stages.kind[k] == REGIONAL:
                    v = node.outputs[0]
                    front = pace.front[v]
                    start = front[t - 1] if t else 0
                    if front[t] > start:
                        self._run(k, node, v, (start, front[t]))
                self._drop_all(dropped, t)
            for k in self.back_order:
                if self.p.stages.kind[k] == REDUCE:
                    self._reduce_vjp(k, t)
                else:
                    v = self.graph.nodes[k].outputs[0]
                    stop = pace.back[v][t]
                    if stop > self.back.get(v, 0):
                        self._vjp(k, v, (self.back.get(v, 0), stop))
                self._drop_all(events.get(("b", k), ()), t)
            self.back = {v: rows[t] for v, rows in pace.back.items()}
            self.builder.region += 1
        for place in (*self.windows.values(), *self.grads.values()):
            for page in place.pages or []:
                self.builder.drop(page.slot)

    def _run(self, k: int, node: Node, v: int, rows: tuple[int, int]) -> None:
        for u in node.inputs:
            if u not in self.windows and u not in self.p.remade.producer:
                self.b.used.add(u)
        super()._run(k, node, v, rows)

    def _last_events(self) -> dict[tuple[str, int], tuple[int, ...]]:
        events: dict[tuple[str, int], list[int]] = {}
        for v in self.produced:
            if not self.final.get(v):
                continue
            pulled = [
                u
                for u, i in self.users[v]
                if u in self.active and (self.p.stages.kind[u] == REDUCE or i in self.graph.nodes[u].vjp_reads)
            ]
            rerun = [
                u
                for u, _ in self.users[v]
                if self.p.stages.kind[u] == REGIONAL and self.final.get(self.graph.nodes[u].outputs[0])
            ]
            key = (
                ("b", min(pulled, key=self.order.__getitem__))
                if pulled
                else ("f", max(rerun, key=self.order.__getitem__))
            )
            events.setdefault(key, []).append(v)
        return {k: tuple(v) for k, v in events.items()}

    def _drop_all(self, values: tuple[int, ...], t: int) -> None:
        for v in values:
            if v in self.windows:
                drop_rows(self.builder, v, self.windows[v], self.pace.keep[v][t])

    # -- pulling back

    def _grad_place(self, v: int) -> Located:
        """Where the sweep gathers the gradient of a value that it produces."""
        shared = self.b.grads.get(v)
        if shared is not None and shared.pages is not None:
            return shared
        if v not in self.grads:
            dim = self.bounds.dim(v, self.slide) if self.slide is not None else None
            origin = {}
            for a in self.intervals:
                d = self.bounds.dim(v, a)
                if d is not None:
                    lo, hi = self.intervals[a][v]
                    origin[d] = (lo, hi - lo)
            self.grads[v] = Located(-1, dim, [], origin)
        return self.grads[v]

    def _own_box(self, v: int, rows: tuple[int, int]) -> Box:
        box = [(0, n) for n in self.graph.values[v].shape]
        for a in range(len(self.bounds.axes)):
            d = self.bounds.dim(v, a)
            if a == self.slide:
                own = rows
            elif a in self.tile:
                own = share(self.bounds.size(v, a), self.tile[a], self.p.schedule.tiles[a])
            else:
                continue
            if d is not None:
                box[d] = own
            elif own[1] <= own[0]:
                return ((0, 0),) * max(1, len(box))
        return tuple(box)

    def _gradient(self, v: int, rows: tuple[int, int]) -> tuple[Read, Box, Located | None]:
        """Read of the complete gradient of rows of v, its box, and the pages to drop afterwards."""
        value = self.graph.values[v]
        readers = any(u in self.active for u, _ in self.users.get(v, []))
        shared = self.b.grads.get(v) if v in self.sinks else None
        if shared is not None and not readers:
            box = self._own_box(v, rows)
            if shared.pages is not None:
                GradWindow(self.b, v, shared, {}).fill(rows[1], rows[0])
            return self.builder.read(shared, box, value.itemsize, value.shape), box, shared
        box = self.out_box(v, rows)
        place = self._grad_place(v)
        window = GradWindow(self.b, v, place, {})
        window.fill(rows[1] if place.dim is not None else 1, self.back.get(v, 0))
        if shared is not None and shared.pages is None:
            own = self._own_box(v, rows)
            if all(hi > lo for lo, hi in own):
                source = self.builder.read(shared, own, value.itemsize, value.shape)
                (copy,) = self.builder.emit(TRIM, -1, [source], [(source.nbytes, None, False)], value=v)
                window.add(own, copy, self.back.get(v, 0))
        return self.builder.read(place, box, value.itemsize, value.shape), box, place

    def _idle(self, v: int, rows: tuple[int, int]) -> bool:
        """Whether this tile has nothing of the gradient of these rows."""
        readers = any(u in self.active for u, _ in self.users.get(v, []))
        return not readers and any(hi <= lo for lo, hi in self._own_box(v, rows))

    def _vjp(self, k: int, v: int, rows: tuple[int, int]) -> None:
        node = self.graph.nodes[k]
        if any(found[v][1] <= found[v][0] for found in self.intervals.values()):
            return
        if self._idle(v, rows):
            return
        grad, out, place = self._gradient(v, rows)
        wanted = tuple(self.graph.values[u].differentiable for u in node.inputs)
        boxes = [self.bounds.box(node, i, out) for i in range(len(node.inputs))]
        if any(wanted):
            lent = self.p.remade.lend(self.builder, [node.inputs[i] for i in node.vjp_reads], self.p.places)
            held = {**self.windows, **lent}
            reads = [
                self.b.read(u, box, held) if i in node.vjp_reads else Read((), 0, 0, box)
                for i, (u, box) in enumerate(zip(node.inputs, boxes, strict=True))
            ]
            sizes = [box_bytes(b, self.graph.values[u].itemsize) for u, b in zip(node.inputs, boxes, strict=True)]
            results = [(n, None, False) for n, w in zip(sizes, wanted, strict=True) if w]
            scratch = node.kernel.vjp_scratch(Extent(out, grad.nbytes, tuple(sizes), (*reads, grad), wanted))
            outs = iter(
                self.builder.emit(VJP, k, [*reads, grad], results, scratch=scratch, out_box=out, wanted=wanted, value=v)
            )
            self.p.remade.back(self.builder, lent)
        self.builder.macs += 2 * node.macs * prod(hi - lo for lo, hi in out) // max(1, prod(self.graph.values[v].shape))
        self._pulled(v, place, rows)
        for u, box, w in zip(node.inputs, boxes, wanted, strict=True):
            if w:
                self._contribute(u, box, next(outs))

    def _pulled(self, v: int, place: Located | None, rows: tuple[int, int]) -> None:
        """The gradient of rows of v is not read again."""
        if place is not None and place.dim is not None and place.pages is not None:
            self._drop_grad(place, rows[1])
        elif place is not None and place.dim is None and place is self.grads.get(v):
            for page in place.pages or []:
                self.builder.drop(page.slot)
            place.pages = []

    def _drop_grad(self, place: Located, upto: int) -> None:
        pages = place.pages
        if pages is None:
            return
        while pages and pages[0].hi <= upto:
            self.builder.drop(pages.pop(0).slot)
        if pages and pages[0].lo < upto:
            pages[0].lo = upto

    def _contribute(self, u: int, box: Box, slot: int) -> None:
        if any(hi <= lo for lo, hi in box):
            self.builder.drop(slot)
            if self.graph.values[u].kind != COMPUTED and u not in self.b.grads:
                self.b.whole_grad(u)
            return
        if u in self.produced:
            place = self._grad_place(u)
            GradWindow(self.b, u, place, {}).add(box, slot, self.back.get(u, 0))
            return
        paged = u in self.p.places and self.p.places[u].pages is not None
        if paged and u not in self.b.grads:
            self.b.grads[u] = Located(-1, self.p.places[u].dim, [])
        if paged:
            GradWindow(self.b, u, self.b.grads[u], {}).add(box, slot)
        elif self.graph.values[u].kind == INPUT or any(
            hi - lo != n for (lo, hi), n in zip(box, self.graph.values[u].shape, strict=True)
        ):
            self.b.whole_grad(u)
            self.b.add_whole(u, box, slot)
        else:
            self.b.add_whole(u, box, slot)

    def _reduce_vjp(self, k: int, t: int) -> None:
        node = self.graph.nodes[k]
        u, out = node.inputs[0], node.outputs[0]
        if not self.graph.values[u].differentiable:
            return
        rows = self.pace.share(u, t)
        box = self._own_box(u, rows)
        if any(hi <= lo for lo, hi in box):
            return
        value = self.graph.values[out]
        grad = self.builder.read(self.b.grads[out], tuple((0, n) for n in value.shape), value.itemsize, value.shape)
        self.b.used.add(out)
        read = self.b.read(u, box, self.windows)
        state = Read(((self.p.states[k], ()),))
        scratch = node.kernel.vjp_scratch(Extent((), 0, (read.nbytes,), (read,)))
        (slot,) = self.builder.emit(REDUCE_VJP, k, [read, state, grad], [(read.nbytes, None, False)], scratch=scratch)
        self._contribute(u, box, slot)


def lower_backward(forward: ForwardLowering) -> tuple[Program, set[int]]:
    """The backward program, and the values that it reads from the forward program."""
    lowering = BackwardLowering(forward)
    return lowering.lower(), lowering.used
