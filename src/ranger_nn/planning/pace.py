"""How far each value of a sweep has come at each step of a slide.

Results advance evenly. A value that they need runs ahead of them (its lead, the halos added up on the way); in
backward the gradient of a value falls behind (its lag). Were the first step to ask for the first rows of a result,
it would have to compute all leads at once, and the last step of backward all lags. So the clock starts before row
0 and ends after the last row: every step moves every value by about the same share of its rows.

    clock   -lead                0                              1           1+lag
    result                       |==============================|
    input   |==============================|
    gradient of the input                  |==============================|

Positions on the clock are not clipped to the value: a reach is affine, so it can be followed outside. What is
really produced is clipped, and never less than the rows that readers take.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

from ranger_nn.bounds.infer import Bounds
from ranger_nn.core.graph import PARAMETER
from ranger_nn.planning.stages import REDUCE, Stages

Users = Mapping[int, Sequence[tuple[int, int]]]
Ends = dict[int, int]


class Clock:
    """`steps` for the results, `lead` before and `lag` after them."""

    def __init__(self, steps: int) -> None:
        """A clock without lead and lag."""
        self.steps, self.lead, self.lag = steps, 0, 0

    @property
    def total(self) -> int:
        """All steps."""
        return self.steps + self.lead + self.lag

    def virtual(self, size: int, t: int) -> int:
        """Row that a dimension of `size` has come to after step t; below 0 before, above `size` afterwards."""
        return size * (t + 1 - self.lead) // self.steps

    def end(self, size: int, t: int) -> int:
        """The same, clipped to the dimension."""
        return min(max(self.virtual(size, t), 0), size)


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
        self.clock = Clock(steps if axis is not None else 1)
        self.grain = self._grains() if grain else {}
        self.final = self._finals()
        if axis is not None and steps > 1:
            self._set_clock()

    @abstractmethod
    def _finals(self) -> Ends:
        """Rows to which each value is produced in all."""

    @abstractmethod
    def _set_clock(self) -> None:
        """Lead and lag of the clock, from the positions at its two ends."""

    def _steps(self, rows: Ends) -> int:
        """Steps of the clock in which every value gets at least its `rows` (those not above 0 take none)."""
        shares = [(row, self.size(v)) for v, row in rows.items() if row > 0 and self._on_axis(v)]
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
            rows = self.size(v)
            weights = sum(values[u].nbytes for u in node.inputs if values[u].kind == PARAMETER)
            own = min(weights * rows // (4 * max(1, values[v].nbytes)), rows // 8)
            same = [found[u] for u in node.inputs if u in found and self.size(u) == rows]
            found[v] = max([1, own, *same])
        return found

    def floor(self, v: int, row: int) -> int:
        """The last row at or before `row` to which v advances of its own accord."""
        grain = self.grain.get(v, 1)
        return row if row >= self.size(v) else row // grain * grain

    def due(self, v: int, t: int) -> int:
        """Rows of a result that must be there after step t."""
        end = self.clock.end(self.size(v), t)
        return end if t >= self.clock.total - 1 else self.floor(v, end)

    def share(self, v: int, t: int) -> tuple[int, int]:
        """Rows of a result that step t adds."""
        return self.due(v, t - 1), self.due(v, t)

    def size(self, v: int) -> int:
        """Rows of a value (1 where it does not lie on the axis)."""
        if self.axis is None or self.bounds.dim(v, self.axis) is None:
            return 1
        return self.bounds.size(v, self.axis)

    def needs(self, k: int, i: int, start: int, stop: int) -> tuple[int, int]:
        """Rows of input i that rows [start, stop) of node k's output read."""
        if self.axis is None:
            return (0, 1) if stop > start else (0, 0)
        return self.bounds.needs(self.graph.nodes[k], i, self.axis, start, stop)

    def _follow(self, k: int, i: int, row: int, end: bool) -> int:
        if self.axis is None:
            return row
        return self.bounds.follow(self.graph.nodes[k], i, self.axis, row, end)

    def _on_axis(self, v: int) -> bool:
        return self.axis is not None and self.bounds.dim(v, self.axis) is not None


class ForwardPace(Pace):
    """Rows to which each value is produced."""

    def _finals(self) -> Ends:
        return self.at(None, {})

    def _set_clock(self) -> None:
        ahead = self._virtual(-1)
        self.clock.lead = self._steps({v: min(row, self.final[v]) for v, row in ahead.items()})

    def _virtual(self, t: int) -> Ends:
        found: Ends = {}
        for k in reversed(self.regional):
            v = self.graph.nodes[k].outputs[0]
            if not self._on_axis(v):
                found[v] = 1
                continue
            row = self.clock.virtual(self.size(v), t) if v in self.sinks else -self.size(v)
            for u, i in self.users.get(v, ()):
                if self.stages.kind[u] == REDUCE:
                    row = max(row, self.clock.virtual(self.size(v), t))
                else:
                    row = max(row, self._follow(u, i, found[self.graph.nodes[u].outputs[0]], True))
            found[v] = row
        return found

    def at(self, t: int | None, before: Ends) -> Ends:
        """Rows produced after step t (None: in all), `before` after the step before."""
        new: Ends = {}
        ahead = self._virtual(t) if t is not None else {}
        for k in reversed(self.regional):
            v = self.graph.nodes[k].outputs[0]
            if not self._on_axis(v):
                new[v] = 1
                continue
            size = self.size(v)
            due = size if t is None else self.due(v, t)
            end = due if v in self.sinks else 0
            for u, i in self.users.get(v, ()):
                if self.stages.kind[u] == REDUCE:
                    end = max(end, due)
                else:
                    end = max(end, self.needs(u, i, 0, new[self.graph.nodes[u].outputs[0]])[1])
            if t is not None:
                end = max(end, self.floor(v, min(ahead[v], self.final[v])), before.get(v, 0))
            new[v] = end
        return new


class BackwardPace(Pace):
    """Rows to which each gradient is complete, and rows to which each value is computed again for that."""

    def _finals(self) -> Ends:
        values = [self.graph.nodes[k].outputs[0] for k in self.regional]
        return self._front({v: self.size(v) for v in values}, None, {})

    def _set_clock(self) -> None:
        behind = self._behind(self.clock.steps - 1)
        self.clock.lag = self._steps({v: self.size(v) - max(row, 0) for v, row in behind.items()})
        ahead = self._ahead(self._behind(-1), -1)
        self.clock.lead = self._steps({v: min(row, self.final[v]) for v, row in ahead.items()})

    def _behind(self, t: int) -> Ends:
        found: Ends = {}
        for k in reversed(self.regional):
            if k not in self.active:
                continue
            v = self.graph.nodes[k].outputs[0]
            readers = [(u, i) for u, i in self.users.get(v, ()) if u in self.active]
            row = 2 * self.size(v) if readers else self.clock.virtual(self.size(v), t)
            for u, i in readers:
                if self.stages.kind[u] == REDUCE:
                    row = min(row, self.clock.virtual(self.size(v), t))
                else:
                    row = min(row, self._follow(u, i, found[self.graph.nodes[u].outputs[0]], False))
            found[v] = row
        return found

    def _ahead(self, behind: Ends, t: int) -> Ends:
        found: Ends = {}
        for k in reversed(self.regional):
            v = self.graph.nodes[k].outputs[0]
            row = -self.size(v)
            for u, i in self.users.get(v, ()):
                if self.stages.kind[u] == REDUCE:
                    if u in self.active:
                        row = max(row, self.clock.virtual(self.size(v), t))
                    continue
                out = self.graph.nodes[u].outputs[0]
                if self.final[out] > 0:
                    row = max(row, self._follow(u, i, found[out], True))
                if u in self.active and i in self.graph.nodes[u].vjp_reads:
                    row = max(row, self._follow(u, i, behind[out], True))
            found[v] = row
        return found

    def _back(self, t: int, before: Ends) -> Ends:
        new: Ends = {}
        last = t == self.clock.total - 1
        behind = {} if last else self._behind(t)
        for k in reversed(self.regional):
            if k not in self.active:
                continue
            v = self.graph.nodes[k].outputs[0]
            readers = [(u, i) for u, i in self.users.get(v, ()) if u in self.active]
            size = self.size(v)
            end = size if readers else self.due(v, t)
            for u, i in readers:
                if self.stages.kind[u] == REDUCE:
                    end = min(end, self.due(v, t))
                    continue
                out = self.graph.nodes[u].outputs[0]
                total = self.size(out)
                if new[out] < total:
                    end = min(end, self.needs(u, i, new[out], total)[0])
            if not last and self._on_axis(v):
                end = self.floor(v, min(end, max(behind[v], 0)))
            new[v] = max(end, before.get(v, 0))
        return new

    def _front(self, back: Ends, t: int | None, before: Ends) -> Ends:
        new: Ends = {}
        ahead = self._ahead(self._behind(t), t) if t is not None else {}
        for k in reversed(self.regional):
            v = self.graph.nodes[k].outputs[0]
            size = self.size(v)
            end = 0
            for u, i in self.users.get(v, ()):
                if self.stages.kind[u] == REDUCE:
                    if u in self.active:
                        end = max(end, size if t is None else self.due(v, t))
                    continue
                out = self.graph.nodes[u].outputs[0]
                if new[out] > 0:
                    end = max(end, self.needs(u, i, 0, new[out])[1])
                if u in self.active and i in self.graph.nodes[u].vjp_reads and back[out] > 0:
                    end = max(end, self.needs(u, i, 0, back[out])[1])
            if t is not None:
                own = self.floor(v, min(ahead[v], self.final[v])) if self._on_axis(v) else 0
                end = max(end, own, before.get(v, 0))
            new[v] = end
        return new

    def at(self, t: int, back: Ends, front: Ends) -> tuple[Ends, Ends]:
        """(gradients complete to, values computed to) after step t, given those after the step before."""
        new = self._back(t, back)
        return new, self._front(new, t, front)
