"""One step of a rolled plan: rows of each value from the rows at hand.

    windows before step t, slices of stored values, whole values
        -> the calls, group by group (groups that have nothing to do in a step are left out: `Loops.branch`)
        -> windows after step t, new rows of each result, rows that each reduction takes

Where a gradient may follow, rows outside are made safe around every operator that could make them infinite (`_safe`): the
gradient of what lies outside is zero, but zero times an infinite derivative is not a number.

Everything that depends on shapes is decided when a `Step` is made; it is traced once, whatever the number of steps, and once
more in backward, where it is differentiated. Enter at `Step`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import keras
from keras import ops

from ranger_nn.core.graph import Graph
from ranger_nn.keras.guard import held
from ranger_nn.keras.loops import Loops, inside
from ranger_nn.keras.pieces import Pieces, cut
from ranger_nn.keras.saved import block
from ranger_nn.planning.rolled import SLICE, WHOLE, WINDOW, Call, Flow, Group, Loop, Take

ORDINARY = 0.7306
"""What rows outside hold where no row inside is at hand: away from 0 and 1, where logarithms, roots and quotients end."""

Made = Callable[[], list[Any]]
Rows = tuple[int, int, int, int, int]
"""A slice that a step takes of a stored value: (value, dim, rate, first, length)."""


class Step:
    """The step of one sweep, bound."""

    def __init__(self, graph: Graph, loop: Loop, on: Loops) -> None:
        """Which rows go where, and the function of each node on its rows."""
        self.graph, self.loop, self.on = graph, loop, on
        self.flows = [f for f in loop.flows.values() if f.kept]
        self.slices: dict[Rows, None] = {}
        self.wholes: dict[int, None] = {}
        for call in loop.calls:
            for take in call.takes:
                if take.source == SLICE:
                    self.slices[_rows(take)] = None
                elif take.source == WHOLE:
                    self.wholes[take.value] = None
        self.lifts = [c for c in loop.calls if c.lifts]
        self.functions = {c.node: self._function(c) for c in loop.calls if not c.lifts}
        self.groups = [g for g in loop.groups if any(not c.lifts for c in g.calls)]
        self.exports = [self._exports(g) for g in self.groups]
        self.places = {f.value: places for f in self.flows if (places := self._places(f)) is not None}

    def _places(self, flow: Flow) -> list[int] | None:
        """Where readers' rows begin and end within the window; None where it is read as a whole with the new rows."""
        if any(exports.get(flow.value, False) for exports in self.exports):
            return None
        takes = [t for c in self.loop.calls if not c.lifts for t in c.takes if t.value == flow.value]
        spans = [(t.first - flow.ahead + flow.kept, t.length) for t in takes if t.source == WINDOW]
        if (0, flow.rows) in spans:
            return None
        ends = {flow.rate, *(n for start, length in spans for n in (start, start + length))}
        return sorted(n for n in ends if 0 < n < flow.kept)

    def _function(self, call: Call) -> Any:
        node = self.graph.nodes[call.node]
        flow = self.loop.flows[node.outputs[0]]
        return node.kernel.region(flow.dim, flow.rate, flow.ahead)

    def _exports(self, group: Group) -> dict[int, bool]:
        """Values of a group that are used beyond it: True where with their windows, False where the new rows alone."""
        own = {self.graph.nodes[c.node].outputs[0] for c in group.calls if not c.lifts}
        beyond = {t.value for g in self.groups if g is not group for c in g.calls if not c.lifts for t in c.takes} & own
        rows = (set(self.loop.sinks) | {c.takes[0].value for c in self.lifts}) & own
        return {v: v in beyond for v in sorted(beyond | rows)}

    def fetch(self, t: Any, by_value: Mapping[int, Any]) -> list[Any]:
        """The slices of stored values that step t takes."""
        return [self.on.take(by_value[v], dim, rate * t + first, length) for v, dim, rate, first, length in self.slices]

    def __call__(
        self, t: Any, windows: Sequence[Any], slices: Sequence[Any], wholes: Sequence[Any], safe: bool = False
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """(windows after step t, new rows of each result, rows that each reduction takes); `safe`: for gradients."""
        before = dict(zip([f.value for f in self.flows], windows, strict=True))
        self.on.used_all(windows)
        outside: dict[Any, Any] = dict(zip(self.slices, slices, strict=True)) | dict(
            zip(self.wholes, wholes, strict=True)
        )
        after: dict[int, Any] = {}
        shown: dict[int, Any] = {}
        for group, exports in zip(self.groups, self.exports, strict=True):
            run = partial(self._calls, group, exports, t, before, outside, shown, safe)
            found = self._group(group, t, run, partial(self._idle, group, exports, before))
            kept = [f.value for f in self._kept(group)]
            after |= zip(kept, found, strict=False)
            shown |= zip(exports, found[len(kept) :], strict=True)
        rows = [self._new(v, shown) for v in self.loop.sinks]
        lifted = [
            self._new(c.takes[0].value, shown) if c.takes[0].source == WINDOW else outside[_rows(c.takes[0])]
            for c in self.lifts
        ]
        return [after[f.value] for f in self.flows], rows, lifted

    def _new(self, v: int, shown: Mapping[int, Any]) -> Any:
        """The rows of v that the step made."""
        flow = self.loop.flows[v]
        with_window = any(exports.get(v, False) for exports in self.exports)
        return cut(shown[v], flow.dim or 0, flow.kept, flow.rate) if with_window else shown[v]

    def _kept(self, group: Group) -> list[Flow]:
        own = {self.graph.nodes[c.node].outputs[0] for c in group.calls if not c.lifts}
        return [f for f in self.flows if f.value in own]

    def _group(self, group: Group, t: Any, run: Made, idle: Made) -> list[Any]:
        """What the group makes in step t: `run` where it has something to do."""
        if group.start <= self.loop.start and group.stop >= self.loop.stop:
            return run()
        on = (t >= group.start) & (t < group.stop)
        return self.on.branch(on, run, idle)

    def _calls(
        self,
        group: Group,
        exports: Mapping[int, bool],
        t: Any,
        before: Mapping[int, Any],
        outside: Mapping[Any, Any],
        shown: Mapping[int, Any],
        safe: bool,
    ) -> list[Any]:
        """Windows of the group, then what is used beyond it."""
        calls = [c for c in group.calls if not c.lifts]
        last = {take.value: c.node for c in calls for take in c.takes if take.source == WINDOW}
        full: dict[int, Pieces] = {v: Pieces(self.loop.flows[v].dim or 0, [x]) for v, x in shown.items()}
        after: dict[int, Any] = {}
        given: dict[int, Any] = {}
        for call in calls:
            node = self.graph.nodes[call.node]
            flow = self.loop.flows[node.outputs[0]]
            wild = safe and not node.kernel.tame
            xs = [self._read(take, t, full, outside) for take in call.takes]
            if wild:
                xs = [self._safe_take(x, take, t, group) for x, take in zip(xs, call.takes, strict=True)]
            options = {"position": flow.rate * t + flow.ahead} if node.kernel.positional else {}
            y = held(self.graph, node, flow, t, self.functions[call.node](*xs, **options))
            del xs
            if wild and flow.dim is not None:
                y = self._safe(y, flow.dim, flow.rate, flow.ahead, flow.needed, t, group)
            if flow.masked and self._hangs_over(flow, group):
                y = self.on.mask(y, flow.dim or 0, flow.rate * t + flow.ahead, flow.size, 0.0)
            rows, y = self._at_hand(flow, before, y if flow.kept else self.on.own(y)), None
            if flow.kept:
                after[flow.value] = self.on.own(rows.rows(flow.rate, flow.kept))
            if flow.value in exports:
                given[flow.value] = rows.rows(0, flow.rows) if exports[flow.value] else rows.rows(flow.kept, flow.rate)
            if flow.value in last:
                full[flow.value] = rows
            del rows  # what is dropped below must not live on in a name
            for v in [v for v, k in last.items() if k == call.node]:
                del full[v]
        return [after[f.value] for f in self._kept(group)] + [given[v] for v in exports]

    def _idle(self, group: Group, exports: Mapping[int, bool], before: Mapping[int, Any]) -> list[Any]:
        """Windows move on, with rows of zeros."""
        made = {}
        for call in group.calls:
            if call.lifts:
                continue
            flow = self.loop.flows[self.graph.nodes[call.node].outputs[0]]
            if flow.kept or flow.value in exports:
                made[flow.value] = self._at_hand(flow, before, self.zeros(flow, flow.rate))
        after = [self.on.own(made[f.value].rows(f.rate, f.kept)) for f in self._kept(group)]
        given = []
        for v, all_rows in exports.items():
            flow = self.loop.flows[v]
            given.append(made[v].rows(0, flow.rows) if all_rows else made[v].rows(flow.kept, flow.rate))
        return after + given

    def _at_hand(self, flow: Flow, before: Mapping[int, Any], rows: Any) -> Pieces:
        """The window and the new rows."""
        dim = flow.dim or 0
        if not flow.kept:
            return Pieces(dim, [rows])
        window, places = before[flow.value], self.places.get(flow.value)
        self.on.used(before, flow.value)
        if places is None:
            return Pieces(dim, [ops.concatenate([window, rows], axis=dim)])
        return Pieces(dim, [*self.on.split(window, dim, places), rows])

    def _read(self, take: Take, t: Any, full: Mapping[int, Pieces], outside: Mapping[Any, Any]) -> Any:
        if take.source == WHOLE:
            return outside[take.value]
        if take.source == WINDOW:
            flow = self.loop.flows[take.value]
            x = full[take.value].rows(take.first - flow.ahead + flow.kept, take.length)
        else:
            x = outside[_rows(take)]
        if take.fill is None:
            return x
        size = self.graph.values[take.value].shape[take.dim]
        return self.on.mask(x, take.dim, take.rate * t + take.first, size, take.fill)

    def _safe_take(self, x: Any, take: Take, t: Any, group: Group) -> Any:
        """What a node reads, safe; where rows outside hold what the node asks for, they are."""
        if take.source == WHOLE or take.fill is not None:
            return x
        flow = self.loop.flows.get(take.value) if take.source == WINDOW else None
        if flow is not None and flow.dim is None:
            return x
        rows = (0, self.graph.values[take.value].shape[take.dim]) if flow is None else flow.needed
        return self._safe(x, take.dim, take.rate, take.first, rows, t, group)

    def _safe(self, x: Any, dim: int, rate: int, first: int, rows: tuple[int, int], t: Any, group: Group) -> Any:
        """x, in whose rows outside of `rows` stands the first row inside, and whose gradient there is zero whatever comes."""
        (lo, hi), length, place = rows, x.shape[dim], rate * t + first
        if rate * group.start + first >= lo and rate * (group.stop - 1) + first + length <= hi:
            return x
        if "float" not in keras.backend.standardize_dtype(x.dtype):
            return x
        there = inside(place - lo, length, hi - lo, dim, len(x.shape))
        fixed = ops.stop_gradient(x)
        if isinstance(t, int):
            if lo <= place and place + length <= hi:
                return x
            near = cut(fixed, dim, min(max(lo - place, 0), length - 1), 1)
            near = near if place < hi and place + length > lo else ops.full_like(near, ORDINARY)
        else:
            at = ops.reshape(ops.clip(lo - place, 0, length - 1), (1,))
            some = ops.logical_and(place < hi, place + length > lo)
            near = ops.where(some, ops.take(fixed, at, axis=dim), ops.cast(ORDINARY, x.dtype))
        return ops.where(there, x, near)

    @staticmethod
    def _hangs_over(flow: Flow, group: Group) -> bool:
        return flow.rate * group.start + flow.ahead < 0 or flow.rate * group.stop + flow.ahead > flow.size

    def zeros(self, flow: Flow, rows: int) -> Any:
        """So many rows of a value."""
        return self.on.zeros(*block(self.graph, flow, rows))


def _rows(take: Take) -> Rows:
    return take.value, take.dim, take.rate, take.first, take.length
