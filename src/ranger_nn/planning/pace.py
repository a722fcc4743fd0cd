"""How far each value of a sweep has come at each step of a slide: the sweep's table.

Results advance evenly. A value that they need runs ahead of them (its lead, the halos added up on the way); in
backward the gradient of a value falls behind (its lag). Were the first step to ask for the first rows of a result,
it would have to compute all leads at once, and the last step of backward all lags. So the clock starts before row
0 and ends after the last row: every step moves every value by about the same share of its rows.

    clock   -lead                0                              1           1+lag
    result                       |==============================|
    input   |==============================|
    gradient of the input                  |==============================|

Positions on the clock are not clipped to the value: a reach is affine, so it can be followed outside. What is
really produced is clipped, and never less than the rows that readers take. All steps are worked out at once: a row of the
table is an array over them. Enter at `ForwardPace` and `BackwardPace`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from ranger_nn.bounds.arrays import Rows
from ranger_nn.bounds.infer import Bounds
from ranger_nn.core.graph import PARAMETER
from ranger_nn.planning.stages import REDUCE, Stages

FOREVER = 1 << 30
"""A row, or a level, that is never reached."""

Users = Mapping[int, Sequence[tuple[int, int]]]
Ends = dict[int, int]
Table = dict[int, Rows]
"""Of each value a row for every step."""


class Clock:
    """`steps` for the results, `lead` before and `lag` after them."""

    def __init__(self, steps: int) -> None:
        """A clock without lead and lag."""
        self.steps, self.lead, self.lag = steps, 0, 0

    @property
    def total(self) -> int:
        """All steps."""
        return self.steps + self.lead + self.lag

    def virtual(self, size: int, t: Rows) -> Rows:
        """Rows that a dimension of `size` has come to after steps t; below 0 before, above `size` afterwards."""
        return size * (t + 1 - self.lead) // self.steps

    def end(self, size: int, t: int) -> int:
        """The same of one step, clipped to the dimension."""
        return min(max(size * (t + 1 - self.lead) // self.steps, 0), size)


class Pace(ABC):
    """Positions of the values that one sweep produces, along the sliding axis (`axis` None: no slide, one step)."""

    def __init__(
        self,
        bounds: Bounds,
        stages: Stages,
        nodes: Sequence[int],
        users: Users,
        sinks: Collection[int],
        axis: int | None,
        steps: int,
        grain: bool = False,
        active: Collection[int] = (),
    ) -> None:
        """`nodes`: the sweep's nodes in order; `sinks`: its results, which come in `steps` steps; `grain`: let rows
        gather before heavy weights; `active`: nodes that a gradient reaches. Lead and lag are worked out here.
        """
        self.bounds, self.stages = bounds, stages
        self.users, self.sinks, self.axis, self.active = users, sinks, axis, active
        self.graph = bounds.graph
        self.regional = [k for k in nodes if stages.kind[k] != REDUCE]
        self.sizes = {v: bounds.size(v, axis) if axis is not None else 1 for v in self._met(nodes)}
        self.clock = Clock(steps if axis is not None else 1)
        self.grain = self._grains() if grain else {}
        self.final = self._finals()
        if axis is not None and steps > 1:
            self._set_clock()
        self._shares: dict[int, list[int]] = {}
        self._tabulate()

    def _met(self, nodes: Sequence[int]) -> set[int]:
        return {v for k in nodes for v in (*self.graph.nodes[k].inputs, *self.graph.nodes[k].outputs)}

    @abstractmethod
    def _finals(self) -> Ends:
        """Rows to which each value is produced in all."""

    @abstractmethod
    def _set_clock(self) -> None:
        """Lead and lag of the clock, from the positions at its two ends."""

    @abstractmethod
    def _tabulate(self) -> None:
        """Work out the table."""

    def _steps(self, rows: Ends) -> int:
        """Steps of the clock in which every value gets at least its `rows` (those not above 0 take none)."""
        shares = [(row, self.sizes[v]) for v, row in rows.items() if row > 0 and self._on_axis(v)]
        return max((-(-row * self.clock.steps // size) for row, size in shares), default=0)

    def _grains(self) -> dict[int, int]:
        """Rows that a value waits for before it advances: a call should move no less data than its weights' share.

        What waits is at most a quarter of the weights' bytes, and an eighth of the rows.
        """
        values = self.graph.values
        found: dict[int, int] = {}
        for k in self.regional:
            node = self.graph.nodes[k]
            v = node.outputs[0]
            if not self._on_axis(v):
                continue
            rows = self.sizes[v]
            weights = sum(values[u].nbytes for u in node.inputs if values[u].kind == PARAMETER)
            own = min(weights * rows // (4 * max(1, values[v].nbytes)), rows // 8)
            same = [found[u] for u in node.inputs if u in found and self.sizes[u] == rows]
            found[v] = max([1, own, *same])
        return found

    @property
    def every(self) -> Rows:
        """All steps of the clock."""
        return np.arange(self.clock.total)

    def floor(self, v: int, rows: Rows) -> Rows:
        """The last rows at or before `rows` to which v advances of its own accord."""
        grain = self.grain.get(v, 1)
        return rows if grain == 1 else np.where(rows >= self.sizes[v], rows, rows // grain * grain)

    def due(self, v: int, t: Rows) -> Rows:
        """Rows of a result that must be there after steps t."""
        end = np.minimum(np.maximum(self.clock.virtual(self.sizes[v], t), 0), self.sizes[v])
        return np.where(t >= self.clock.total - 1, end, self.floor(v, end))

    def share(self, v: int, t: int) -> tuple[int, int]:
        """Rows of a result that step t adds."""
        if v not in self._shares:
            self._shares[v] = self.due(v, np.arange(-1, self.clock.total)).tolist()
        return self._shares[v][t], self._shares[v][t + 1]

    def size(self, v: int) -> int:
        """Rows of a value (1 where it does not lie on the axis)."""
        return self.sizes[v]

    def needs(self, k: int, i: int, start: Rows, stop: Rows) -> tuple[Rows, Rows]:
        """Rows of input i that rows [start, stop) of node k's output read."""
        if self.axis is None:
            return np.zeros_like(stop), (stop > start).astype(stop.dtype)
        return self.bounds.all_needs(self.graph.nodes[k], i, self.axis, start, stop)

    def _follow(self, k: int, i: int, row: Rows, end: bool) -> Rows:
        if self.axis is None:
            return row
        return self.bounds.follow(self.graph.nodes[k], i, self.axis, row, end)

    def _on_axis(self, v: int) -> bool:
        return self.axis is not None and self.bounds.dim(v, self.axis) is not None

    def _out(self, k: int) -> int:
        return self.graph.nodes[k].outputs[0]

    def _behind_all(self, keep: Rows, size: int) -> list[int]:
        """First rows that are still read, FOREVER where there are none."""
        return np.where(keep >= size, FOREVER, keep).tolist()


class ForwardPace(Pace):
    """`end[v][t]`: rows to which v is produced after step t; `keep[v][t]`: the first of them that is still to be read then,
    FOREVER where there is none.
    """

    end: dict[int, list[int]]
    keep: dict[int, list[int]]

    def _tabulate(self) -> None:
        rows = self._rows(self.every, self._virtual(self.every))
        self.end = {v: r.tolist() for v, r in rows.items()}
        self.keep = {v: self._kept(v, rows) for v in self.users}

    def _finals(self) -> Ends:
        return {v: int(rows[0]) for v, rows in self._rows(None, {}).items()}

    def _set_clock(self) -> None:
        ahead = self._virtual(np.array([-1]))
        self.clock.lead = self._steps({v: min(int(rows[0]), self.final[v]) for v, rows in ahead.items()})

    def _virtual(self, t: Rows) -> Table:
        found: Table = {}
        for k in reversed(self.regional):
            v = self._out(k)
            if not self._on_axis(v):
                found[v] = np.ones_like(t)
                continue
            own = self.clock.virtual(self.sizes[v], t)
            rows = own if v in self.sinks else np.full_like(t, -self.sizes[v])
            for u, i in self.users.get(v, ()):
                reduced = self.stages.kind[u] == REDUCE
                rows = np.maximum(rows, own if reduced else self._follow(u, i, found[self._out(u)], True))
            found[v] = rows
        return found

    def _rows(self, t: Rows | None, ahead: Table) -> Table:
        """Rows produced after all steps t of the clock (None: in all)."""
        new: Table = {}
        zero = np.zeros(1 if t is None else len(t), np.int64)
        for k in reversed(self.regional):
            v = self._out(k)
            if not self._on_axis(v):
                new[v] = zero + 1
                continue
            due = zero + self.sizes[v] if t is None else self.due(v, t)
            end = due if v in self.sinks else zero
            for u, i in self.users.get(v, ()):
                reduced = self.stages.kind[u] == REDUCE
                end = np.maximum(end, due if reduced else self.needs(u, i, zero, new[self._out(u)])[1])
            if t is not None:
                end = np.maximum(end, self.floor(v, np.minimum(ahead[v], self.final[v])))
                end = np.maximum.accumulate(end)
            new[v] = end
        return new

    def _kept(self, v: int, rows: Table) -> list[int]:
        t = self.every
        if self.axis is None:
            return [FOREVER] * len(t)
        keep = np.full_like(t, self.sizes[v])
        for k, i in self.users[v]:
            if self.stages.kind[k] == REDUCE:
                keep = np.minimum(keep, self.due(v, t))
                continue
            done, total = rows[self._out(k)], self.sizes[self._out(k)]
            first = self.needs(k, i, done, np.full_like(t, total))[0]
            keep = np.where(done < total, np.minimum(keep, first), keep)
        return self._behind_all(keep, self.sizes[v])


class BackwardPace(Pace):
    """`back[v][t]`: rows to which v's gradient is complete after step t; `front[v][t]`: rows to which v is computed again for
    that; `keep[v][t]`: the first of them that is still to be read then, FOREVER where there is none.
    """

    back: dict[int, list[int]]
    front: dict[int, list[int]]
    keep: dict[int, list[int]]

    def _tabulate(self) -> None:
        t = self.every
        behind = self._behind(t)
        back = self._back(t, behind)
        front = self._front(back, self._ahead(behind, t))
        self.back = {v: rows.tolist() for v, rows in back.items()}
        self.front = {v: rows.tolist() for v, rows in front.items()}
        self.keep = {v: self._kept(v, back, front) for v in front if v in self.users}

    def _finals(self) -> Ends:
        whole = {self._out(k): np.array([self.sizes[self._out(k)]]) for k in self.regional}
        return {v: int(rows[0]) for v, rows in self._front(whole, None).items()}

    def _set_clock(self) -> None:
        behind = self._behind(np.array([self.clock.steps - 1]))
        self.clock.lag = self._steps({v: self.sizes[v] - max(int(rows[0]), 0) for v, rows in behind.items()})
        before = np.array([-1])
        ahead = self._ahead(self._behind(before), before)
        self.clock.lead = self._steps({v: min(int(rows[0]), self.final[v]) for v, rows in ahead.items()})

    def _readers(self, v: int) -> list[tuple[int, int]]:
        return [(u, i) for u, i in self.users.get(v, ()) if u in self.active]

    def _behind(self, t: Rows) -> Table:
        found: Table = {}
        for k in reversed(self.regional):
            if k not in self.active:
                continue
            v = self._out(k)
            readers, own = self._readers(v), self.clock.virtual(self.sizes[v], t)
            rows = np.full_like(t, 2 * self.sizes[v]) if readers else own
            for u, i in readers:
                reduced = self.stages.kind[u] == REDUCE
                rows = np.minimum(rows, own if reduced else self._follow(u, i, found[self._out(u)], False))
            found[v] = rows
        return found

    def _ahead(self, behind: Table, t: Rows) -> Table:
        found: Table = {}
        for k in reversed(self.regional):
            v = self._out(k)
            rows = np.full_like(t, -self.sizes[v])
            for u, i in self.users.get(v, ()):
                if self.stages.kind[u] == REDUCE:
                    if u in self.active:
                        rows = np.maximum(rows, self.clock.virtual(self.sizes[v], t))
                    continue
                out = self._out(u)
                if self.final[out] > 0:
                    rows = np.maximum(rows, self._follow(u, i, found[out], True))
                if u in self.active and i in self.graph.nodes[u].vjp_reads:
                    rows = np.maximum(rows, self._follow(u, i, behind[out], True))
            found[v] = rows
        return found

    def _back(self, t: Rows, behind: Table) -> Table:
        new: Table = {}
        last = t == self.clock.total - 1
        for k in reversed(self.regional):
            if k not in self.active:
                continue
            v = self._out(k)
            readers, size = self._readers(v), self.sizes[v]
            end = np.full_like(t, size) if readers else self.due(v, t)
            for u, i in readers:
                if self.stages.kind[u] == REDUCE:
                    end = np.minimum(end, self.due(v, t))
                    continue
                done, total = new[self._out(u)], self.sizes[self._out(u)]
                first = self.needs(u, i, done, np.full_like(t, total))[0]
                end = np.where(done < total, np.minimum(end, first), end)
            if self._on_axis(v):
                end = np.where(last, end, self.floor(v, np.minimum(end, np.maximum(behind[v], 0))))
            new[v] = np.maximum.accumulate(end)
        return new

    def _front(self, back: Table, ahead: Table | None) -> Table:
        """Rows computed for gradients that are complete to `back`; `ahead` None: in all."""
        new: Table = {}
        for k in reversed(self.regional):
            v = self._out(k)
            zero = np.zeros_like(next(iter(back.values()))) if ahead is None else np.zeros_like(ahead[v])
            end = zero
            for u, i in self.users.get(v, ()):
                if self.stages.kind[u] == REDUCE:
                    if u in self.active:
                        end = np.maximum(end, self.sizes[v] if ahead is None else self.due(v, self.every))
                    continue
                out = self._out(u)
                end = np.maximum(end, self.needs(u, i, zero, new[out])[1])
                if u in self.active and i in self.graph.nodes[u].vjp_reads:
                    end = np.maximum(end, self.needs(u, i, zero, back[out])[1])
            if ahead is not None:
                own = self.floor(v, np.minimum(ahead[v], self.final[v])) if self._on_axis(v) else zero
                end = np.maximum.accumulate(np.maximum(end, own))
            new[v] = end
        return new

    def _kept(self, v: int, back: Table, front: Table) -> list[int]:
        t = self.every
        keep = np.full_like(t, self.sizes[v])
        for u, i in self.users[v]:
            if self.stages.kind[u] == REDUCE:
                if u in self.active:
                    keep = np.minimum(keep, self.due(v, t))
                continue
            out = self._out(u)
            stop, total = np.full_like(t, self.final[out]), np.full_like(t, self.sizes[out])
            first = self.needs(u, i, front[out], stop)[0]
            keep = np.where(front[out] < stop, np.minimum(keep, first), keep)
            if u in self.active and i in self.graph.nodes[u].vjp_reads:
                first = self.needs(u, i, back[out], total)[0]
                keep = np.where(back[out] < total, np.minimum(keep, first), keep)
        return self._behind_all(keep, self.sizes[v])
