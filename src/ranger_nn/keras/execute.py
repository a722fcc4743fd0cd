"""Run a rolled plan: prologues as they are, sweeps in a loop of the back end.

Everything that depends on shapes is decided when a `Sweep` is made; its step is traced once, whatever the number of
steps. In training the step is computed again in backward, from the rows by which its windows moved on:

    forward     t = start ... stop - 1     windows, rows -> windows'             saved: the new rows of each window
    backward    t = stop - 1 ... start     windows (from what is saved) -> the step again -> gradients

With checkpoints forward saves the windows at the beginning of each segment alone, and backward, segment by segment from
the last, runs the steps of a segment forward once more, saves their new rows and goes through them in reverse.

Enter at `Runner`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from ranger_nn.aggregate.monoid import Extremum, Moments
from ranger_nn.core.graph import Graph
from ranger_nn.keras.loops import inside, loops
from ranger_nn.keras.pieces import Pieces, cut
from ranger_nn.keras.saved import Checkpoints, Saved, block
from ranger_nn.planning.rolled import SLICE, WHOLE, WINDOW, Call, Flow, Group, Loop, Take
from ranger_nn.planning.rolled_search import Rolled
from ranger_nn.planning.stages import REDUCE

Rows = tuple[int, int, int, int, int]
"""A slice that a step takes of a stored value: (value, dim, rate, first, length)."""


class Runner:
    """A plan made ready to run on the running back end."""

    def __init__(self, rolled: Rolled) -> None:
        """Kernels are bound here."""
        self.rolled, self.graph = rolled, rolled.graph
        self.sweeps = [None if loop is None else Sweep(rolled.graph, loop, rolled.training) for loop in rolled.loops]

    def __call__(self, known: dict[int, Any]) -> dict[int, Any]:
        """All values that are left: `known` has those that are not computed, and is used up."""
        results = set(self.graph.outputs)
        for at, (level, wanted, sweep) in enumerate(
            zip(self.rolled.stages.levels, self.rolled.demand.sweeps, self.sweeps, strict=True)
        ):
            for k in level.prologue:
                self._whole(k, known)
            if sweep is not None:
                known |= sweep(known)
            elif wanted.nodes:
                self._in_one(wanted.nodes, wanted.sinks, known)
            for v in [v for v in known if self.rolled.last.get(v, -1) <= at and v not in results]:
                del known[v]
        return known

    def _whole(self, k: int, known: dict[int, Any]) -> None:
        node = self.graph.nodes[k]
        found = node.kernel.whole(*[known[v] for v in node.inputs])
        known |= zip(node.outputs, found if len(node.outputs) > 1 else (found,), strict=True)

    def _in_one(self, nodes: Sequence[int], sinks: set[int], known: dict[int, Any]) -> None:
        last = {v: k for k in nodes for v in self.graph.nodes[k].inputs}
        made = {v for k in nodes for v in self.graph.nodes[k].outputs if self.rolled.stages.kind[k] != REDUCE} - sinks
        for k in nodes:
            self._whole(k, known)
            for v in {*self.graph.nodes[k].inputs, *self.graph.nodes[k].outputs} & made:
                if last.get(v, k) == k:
                    del known[v]


class Sweep:
    """One sweep, bound: `sweep(known)` gives its results."""

    def __init__(self, graph: Graph, loop: Loop, training: bool) -> None:
        """Which rows go where, and the function of each node on its rows."""
        self.graph, self.rolled, self.on, self.training = graph, loop, loops(), training
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
        self.saved = Saved(graph, self.flows, self.on)
        self.checkpoints = Checkpoints(graph, self.flows, self.on)
        self.reads = tuple(dict.fromkeys([s[0] for s in self.slices] + list(self.wholes)))
        self.places = {f.value: places for f in self.flows if (places := self._places(f)) is not None}

    def _places(self, flow: Flow) -> list[int] | None:
        """Where readers' rows begin and end within the window; None where it is read as a whole with the new rows."""
        if any(exports.get(flow.value, False) for exports in self.exports):
            return None
        takes = [t for c in self.rolled.calls if not c.lifts for t in c.takes if t.value == flow.value]
        spans = [(t.first - flow.ahead + flow.kept, t.length) for t in takes if t.source == WINDOW]
        if (0, flow.rows) in spans:
            return None
        ends = {flow.rate, *(n for start, length in spans for n in (start, start + length))}
        return sorted(n for n in ends if 0 < n < flow.kept)

    def _function(self, call: Call) -> Any:
        node = self.graph.nodes[call.node]
        flow = self.rolled.flows[node.outputs[0]]
        return node.kernel.region(flow.dim, flow.rate, flow.ahead)

    def _exports(self, group: Group) -> dict[int, bool]:
        """Values of a group that are used beyond it: True where with their windows, False where the new rows alone."""
        own = {self.graph.nodes[c.node].outputs[0] for c in group.calls if not c.lifts}
        beyond = {t.value for g in self.groups if g is not group for c in g.calls if not c.lifts for t in c.takes} & own
        rows = (set(self.rolled.sinks) | {c.takes[0].value for c in self.lifts}) & own
        return {v: v in beyond for v in sorted(beyond | rows)}

    def __call__(self, known: Mapping[int, Any]) -> dict[int, Any]:
        """Values of the sweep's results and reductions."""
        args = [known[v] for v in self.reads]
        found = self.on.differentiable(self._forward, self._backward, args)
        results = dict(zip(self.rolled.sinks, found, strict=False))
        rest = found[len(self.rolled.sinks) :]
        for call in self.lifts:
            kernel = self.graph.nodes[call.node].kernel
            count = _entries(kernel)
            results[self.graph.nodes[call.node].outputs[0]] = kernel.finish(tuple(rest[:count]))
            rest = rest[count:]
        return results

    # ---- one step -----------------------------------------------------------------------------------------

    def step(
        self, t: Any, windows: Sequence[Any], slices: Sequence[Any], wholes: Sequence[Any]
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """(windows after step t, new rows of each result, rows that each reduction takes)."""
        before = dict(zip([f.value for f in self.flows], windows, strict=True))
        self.on.used_all(windows)
        outside: dict[Any, Any] = dict(zip(self.slices, slices, strict=True)) | dict(
            zip(self.wholes, wholes, strict=True)
        )
        after: dict[int, Any] = {}
        shown: dict[int, Any] = {}
        for group, exports in zip(self.groups, self.exports, strict=True):
            found = self._group(group, exports, t, before, outside, shown)
            kept = [f.value for f in self._kept(group)]
            after |= zip(kept, found, strict=False)
            shown |= zip(exports, found[len(kept) :], strict=True)
        rows = [self._new(v, shown) for v in self.rolled.sinks]
        lifted = [
            self._new(c.takes[0].value, shown) if c.takes[0].source == WINDOW else outside[_rows(c.takes[0])]
            for c in self.lifts
        ]
        return [after[f.value] for f in self.flows], rows, lifted

    def _new(self, v: int, shown: Mapping[int, Any]) -> Any:
        """The rows of v that the step made."""
        flow = self.rolled.flows[v]
        with_window = any(exports.get(v, False) for exports in self.exports)
        return cut(shown[v], flow.dim or 0, flow.kept, flow.rate) if with_window else shown[v]

    def _kept(self, group: Group) -> list[Flow]:
        own = {self.graph.nodes[c.node].outputs[0] for c in group.calls if not c.lifts}
        return [f for f in self.flows if f.value in own]

    def _group(
        self,
        group: Group,
        exports: Mapping[int, bool],
        t: Any,
        before: Mapping[int, Any],
        outside: Mapping[Any, Any],
        shown: Mapping[int, Any],
    ) -> list[Any]:
        """Windows of the group, then what is used beyond it."""

        def run() -> list[Any]:
            return self._calls(group, exports, t, before, outside, shown)

        if group.start <= self.rolled.start and group.stop >= self.rolled.stop:
            return run()
        on = (t >= group.start) & (t < group.stop)
        return self.on.branch(on, run, lambda: self._idle(group, exports, before))

    def _calls(
        self,
        group: Group,
        exports: Mapping[int, bool],
        t: Any,
        before: Mapping[int, Any],
        outside: Mapping[Any, Any],
        shown: Mapping[int, Any],
    ) -> list[Any]:
        calls = [c for c in group.calls if not c.lifts]
        last = {take.value: c.node for c in calls for take in c.takes if take.source == WINDOW}
        full: dict[int, Pieces] = {v: Pieces(self.rolled.flows[v].dim or 0, [x]) for v, x in shown.items()}
        after: dict[int, Any] = {}
        given: dict[int, Any] = {}
        for call in calls:
            node = self.graph.nodes[call.node]
            flow = self.rolled.flows[node.outputs[0]]
            xs = [self._read(take, t, full, outside) for take in call.takes]
            options = {"position": flow.rate * t + flow.ahead} if node.kernel.positional else {}
            y = self.functions[call.node](*xs, **options)
            del xs
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
            flow = self.rolled.flows[self.graph.nodes[call.node].outputs[0]]
            if flow.kept or flow.value in exports:
                made[flow.value] = self._at_hand(flow, before, self._zeros(flow, flow.rate))
        after = [self.on.own(made[f.value].rows(f.rate, f.kept)) for f in self._kept(group)]
        given = []
        for v, all_rows in exports.items():
            flow = self.rolled.flows[v]
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
            flow = self.rolled.flows[take.value]
            x = full[take.value].rows(take.first - flow.ahead + flow.kept, take.length)
        else:
            x = outside[_rows(take)]
        if take.fill is None:
            return x
        size = self.graph.values[take.value].shape[take.dim]
        return self.on.mask(x, take.dim, take.rate * t + take.first, size, take.fill)

    @staticmethod
    def _hangs_over(flow: Flow, group: Group) -> bool:
        return flow.rate * group.start + flow.ahead < 0 or flow.rate * group.stop + flow.ahead > flow.size

    def _zeros(self, flow: Flow, rows: int) -> Any:
        return self.on.zeros(*block(self.graph, flow, rows))

    # ---- forward ------------------------------------------------------------------------------------------

    def _fetch(self, t: Any, by_value: Mapping[int, Any]) -> list[Any]:
        return [self.on.take(by_value[v], dim, rate * t + first, length) for v, dim, rate, first, length in self.slices]

    def _forward(self, args: Sequence[Any], saving: bool) -> tuple[list[Any], Any]:
        loop, on = self.rolled, self.on
        by_value = dict(zip(self.reads, args, strict=True))
        sinks = [loop.flows[v] for v in loop.sinks]
        windows = [self._zeros(f, f.kept) for f in self.flows]
        results, states = [self._open(f) for f in sinks], [self._empty(c) for c in self.lifts]
        saved: list[Any] = []
        if saving and loop.segment:
            saved = self.checkpoints.open(loop.segments)

            def segment(n: Any, carry: Any) -> Any:
                windows, results, states, saved = carry
                saved = self.checkpoints.add(saved, n, windows)
                windows, results, states, _ = self._walk(self._segment(n), by_value, (windows, results, states, []))
                return windows, results, states, saved

            _, results, states, saved = on.loop(0, loop.segments, segment, (windows, results, states, saved))
        else:
            saved = self.saved.open(loop.stop - loop.start) if saving else []
            carry = (windows, results, states, saved)
            _, results, states, saved = self._walk((loop.start, loop.stop), by_value, carry)
        found = [
            on.close(r, f.dim or 0, f.rate * f.start + f.ahead, f.size) for r, f in zip(results, sinks, strict=True)
        ]
        return found + [part for state in states for part in state], [on.full(s, not self.training) for s in saved]

    def _walk(self, steps: tuple[Any, Any], by_value: Mapping[int, Any], carry: Any) -> Any:
        """Steps [first, last); `carry`: windows, and results, states of reductions, stacks: none, where not wanted."""
        on, (first, last) = self.on, steps
        sinks = [self.rolled.flows[v] for v in self.rolled.sinks]
        wholes = [by_value[v] for v in self.wholes]

        def body(t: Any, carry: Any) -> Any:
            windows, results, states, stacks = carry
            windows, rows, lifted = self.step(t, windows, self._fetch(t, by_value), wholes)
            results = [
                on.put(r, f.dim or 0, t - f.start, f.stop - f.start, x, f.rate * t + f.ahead)
                for r, f, x in zip(results, sinks, rows, strict=False)
            ]
            del rows
            states = [self._lift(c, t, s, x) for c, s, x in zip(self.lifts, states, lifted, strict=False)]
            stacks = self.saved.add(stacks, t - first, windows) if stacks else []
            return windows, results, states, stacks

        return on.loop(first, last, body, carry)

    def _segment(self, n: Any) -> tuple[Any, Any]:
        """Steps of segment n."""
        loop = self.rolled
        first = loop.start + n * loop.segment
        if (loop.stop - loop.start) % loop.segment == 0:
            return first, first + loop.segment
        last = first + loop.segment
        return first, min(last, loop.stop) if isinstance(n, int) else ops.minimum(last, loop.stop)

    def _again(self, n: Any, saved: Sequence[Any], by_value: Mapping[int, Any]) -> list[Any]:
        """What the steps of segment n save, from its checkpoint."""
        windows = self.checkpoints.windows(saved, n)
        stacks = self.saved.begin(self.saved.open(self.rolled.segment), windows)
        *_, stacks = self._walk(self._segment(n), by_value, (windows, [], [], stacks))
        return [self.on.full(s, False) for s in stacks]

    def _open(self, flow: Flow) -> Any:
        value = self.graph.values[flow.value]
        return self.on.open(value.shape, value.dtype, flow.dim or 0, flow.rate, flow.stop - flow.start, flow.size)

    # ---- reductions ---------------------------------------------------------------------------------------

    def _empty(self, call: Call) -> tuple[Any, ...]:
        kernel = self.graph.nodes[call.node].kernel
        shape = [1 if d in kernel.axis else n for d, n in enumerate(kernel.shape)]
        return tuple(kernel.empty(ops.zeros(shape, kernel.wide)))

    def _lift(self, call: Call, t: Any, state: Any, x: Any) -> tuple[Any, ...]:
        kernel, take = self.graph.nodes[call.node].kernel, call.takes[0]
        size, first, per_row = kernel.shape[take.dim], take.rate * t + take.first, kernel.per_row(take.dim)
        so_far, new = (ops.clip(first, 0, size), ops.clip(first + take.length, 0, size))
        if isinstance(t, int):
            so_far, new = min(max(first, 0), size), min(max(first + take.length, 0), size)
            if new <= so_far:
                return tuple(state)
            valid = None if new - so_far == take.length else self._valid(call, first)
            n_a, n_b = so_far * per_row, (new - so_far) * per_row
        else:
            valid = self._valid(call, first)
            n_a, n_b = (ops.cast(n, kernel.wide) * per_row for n in (so_far, new - so_far))
        return tuple(kernel.merge(state, kernel.lift(x, valid), n_a, n_b))

    def _valid(self, call: Call, first: Any) -> Any:
        kernel, take = self.graph.nodes[call.node].kernel, call.takes[0]
        return inside(first, take.length, kernel.shape[take.dim], take.dim, len(kernel.shape))

    def _unlift(self, call: Call, t: Any, x: Any, state: Sequence[Any], grads: Sequence[Any]) -> Any:
        """Gradient of the rows that a reduction takes, from the final state and its gradient."""
        kernel, take = self.graph.nodes[call.node].kernel, call.takes[0]
        y, monoid = ops.cast(x, kernel.wide), kernel.monoid
        if isinstance(monoid, Extremum):
            top = monoid.sign * y == state[0]
            found = ops.where(top, monoid.sign * grads[0] / state[1], ops.zeros_like(y))
        elif isinstance(monoid, Moments):
            found = grads[0] / kernel.total + 2.0 * (y - state[0]) * grads[1]
        else:  # Sum; a mean is divided when it is finished
            found = grads[0] + ops.zeros_like(y)
        found = ops.cast(found, x.dtype)
        return self.on.mask(found, take.dim, take.rate * t + take.first, kernel.shape[take.dim], 0.0)

    # ---- backward -----------------------------------------------------------------------------------------

    def _backward(
        self, args: Sequence[Any], saved: Any, results: Sequence[Any], grads: Sequence[Any], wanted: Sequence[bool]
    ) -> list[Any]:
        loop, on = self.rolled, self.on
        by_value = dict(zip(self.reads, args, strict=True))
        asked = {v for v, w in zip(self.reads, wanted, strict=True) if w}
        grads = [
            ops.zeros_like(r) if g is None and _floating(r.dtype) else g for g, r in zip(grads, results, strict=True)
        ]
        sinks = [(n, loop.flows[v]) for n, v in enumerate(loop.sinks) if _floating(self.graph.values[v].dtype)]
        states = self._states(results[len(loop.sinks) :])
        state_grads = self._states(grads[len(loop.sinks) :])
        moving = [n for n, f in enumerate(self.flows) if _floating(self.graph.values[f.value].dtype)]
        cut = [n for n, s in enumerate(self.slices) if s[0] in asked]
        whole = [n for n, v in enumerate(self.wholes) if v in asked]
        sliced = tuple(dict.fromkeys(list(self.slices)[n][0] for n in cut))
        carry = (
            [self._zeros(self.flows[n], self.flows[n].kept) for n in moving],
            [on.zeros(by_value[v].shape, _wide(by_value[v].dtype)) for v in sliced],
            [on.zeros(by_value[v].shape, _wide(by_value[v].dtype)) for v in map(list(self.wholes).__getitem__, whole)],
        )

        def step(t: Any, windows: list[Any], carry: Any) -> Any:
            onward, into_slices, into_wholes = carry
            slices, wholes = self._fetch(t, by_value), [by_value[v] for v in self.wholes]
            chosen = [windows[n] for n in moving] + [slices[n] for n in cut] + [wholes[n] for n in whole]

            def again(*chosen: Any) -> list[Any]:
                w, s, p, given = list(windows), list(slices), list(wholes), iter(chosen)
                for target, places in ((w, moving), (s, cut), (p, whole)):
                    for n in places:
                        target[n] = next(given)
                after, rows, lifted = self.step(t, w, s, p)
                return [after[n] for n in moving] + [rows[n] for n, _ in sinks] + lifted

            found, pull = on.vjp(again, chosen)
            lifted = found[len(found) - len(self.lifts) :]
            given = [
                on.mask(
                    on.take(grads[n], f.dim or 0, f.rate * t + f.ahead, f.rate),
                    f.dim or 0,
                    f.rate * t + f.ahead,
                    f.size,
                    0.0,
                )
                for n, f in sinks
            ]
            down = [
                self._unlift(c, t, x, s, g) for c, x, s, g in zip(self.lifts, lifted, states, state_grads, strict=True)
            ]
            pulled = pull([*onward, *given, *down])
            onward = pulled[: len(moving)]
            into_slices = self._scatter(t, sliced, cut, into_slices, pulled[len(moving) :])
            rest = pulled[len(moving) + len(cut) :]
            into_wholes = [a + ops.cast(g, a.dtype) for a, g in zip(into_wholes, rest, strict=True)]
            return onward, into_slices, into_wholes

        def steps(first: Any, last: Any, stacks: Sequence[Any], carry: Any) -> Any:
            def body(i: Any, carry: Any) -> Any:
                t = last - 1 - i
                return step(t, self.saved.windows(stacks, t - first), carry)

            return on.loop(0, last - first, body, carry)

        def segment(i: Any, carry: Any) -> Any:
            n = loop.segments - 1 - i
            return steps(*self._segment(n), self._again(n, saved, by_value), carry)

        if loop.segment:
            _, into_slices, into_wholes = on.loop(0, loop.segments, segment, carry)
        else:
            _, into_slices, into_wholes = steps(loop.start, loop.stop, saved, carry)
        total: dict[int, Any] = dict(zip(sliced, into_slices, strict=True))
        for n, g in zip(whole, into_wholes, strict=True):
            v = list(self.wholes)[n]
            total[v] = total[v] + g if v in total else g
        return [ops.cast(total[v], by_value[v].dtype) if v in total else None for v in self.reads]

    def _states(self, parts: Sequence[Any]) -> list[Sequence[Any]]:
        found = []
        for call in self.lifts:
            n = _entries(self.graph.nodes[call.node].kernel)
            found.append(parts[:n])
            parts = parts[n:]
        return found

    def _scatter(
        self, t: Any, values: Sequence[int], places: Sequence[int], into: Sequence[Any], grads: Sequence[Any]
    ) -> list[Any]:
        found = dict(zip(values, into, strict=True))
        for n, grad in zip(places, grads, strict=False):
            v, dim, rate, first, _ = list(self.slices)[n]
            found[v] = self.on.add(found[v], dim, rate * t + first, grad)
        return [found[v] for v in values]


def _rows(take: Take) -> Rows:
    return take.value, take.dim, take.rate, take.first, take.length


def _entries(kernel: Any) -> int:
    """Arrays in the state of a reduction."""
    return 2 if isinstance(kernel.monoid, Extremum | Moments) else 1


def _floating(dtype: Any) -> bool:
    return "float" in keras.backend.standardize_dtype(dtype)


def _wide(dtype: Any) -> str:
    name = keras.backend.standardize_dtype(dtype)
    return "float32" if name in ("float16", "bfloat16") else name
