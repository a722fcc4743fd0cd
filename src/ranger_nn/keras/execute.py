"""Run a rolled plan: prologues as they are, sweeps in a loop of the back end.

In training the step of a sweep (`step.py`) is computed again in backward, from the rows by which its windows moved on:

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
from ranger_nn.keras.guard import held_whole
from ranger_nn.keras.loops import Loops, inside
from ranger_nn.keras.loops_here import loops
from ranger_nn.keras.saved import Checkpoints, Saved
from ranger_nn.keras.step import Step
from ranger_nn.planning.rolled import Call, Flow, Loop
from ranger_nn.planning.rolled_search import Rolled
from ranger_nn.planning.stages import REDUCE


class Runner:
    """A plan made ready to run on the running back end."""

    def __init__(self, rolled: Rolled, on: Loops | None = None) -> None:
        """Kernels are bound here. `on`: the loops that sweeps run in, if not the back end's own."""
        self.rolled, self.graph, on = rolled, rolled.graph, on or loops()
        self.sweeps = [None if loop is None else Sweep(self.graph, loop, rolled.training, on) for loop in rolled.loops]

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
        known |= zip(
            node.outputs, held_whole(self.graph, node, found if len(node.outputs) > 1 else (found,)), strict=True
        )

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

    def __init__(self, graph: Graph, loop: Loop, training: bool, on: Loops) -> None:
        """Its step, and what is saved for backward."""
        self.graph, self.loop, self.training, self.on = graph, loop, training, on
        self.step = Step(graph, loop, on)
        self.slices, self.wholes, self.lifts = list(self.step.slices), list(self.step.wholes), self.step.lifts
        self.reads = tuple(dict.fromkeys([s[0] for s in self.slices] + self.wholes))
        self.flows = self.step.flows
        self.saved = Saved(graph, self.flows, on)
        self.checkpoints = Checkpoints(graph, self.flows, on)

    def __call__(self, known: Mapping[int, Any]) -> dict[int, Any]:
        """Values of the sweep's results and reductions."""
        args = [known[v] for v in self.reads]
        found = self.on.differentiable(self._forward, self._backward, args)
        results = dict(zip(self.loop.sinks, found, strict=False))
        rest = found[len(self.loop.sinks) :]
        for call in self.lifts:
            node = self.graph.nodes[call.node]
            count = _entries(node.kernel)
            results |= zip(
                node.outputs, held_whole(self.graph, node, [node.kernel.finish(tuple(rest[:count]))]), strict=True
            )
            rest = rest[count:]
        return results

    # ---- forward ------------------------------------------------------------------------------------------

    def _forward(self, args: Sequence[Any], saving: bool) -> tuple[list[Any], Any]:
        loop, on = self.loop, self.on
        by_value = dict(zip(self.reads, args, strict=True))
        sinks = [loop.flows[v] for v in loop.sinks]
        windows = [self.step.zeros(f, f.kept) for f in self.flows]
        results, states = [self._open(f) for f in sinks], [self.empty(c) for c in self.lifts]
        saved: list[Any] = []
        if saving and loop.segment:
            saved = self.checkpoints.open(loop.segments)

            def segment(n: Any, carry: Any) -> Any:
                windows, results, states, saved = carry
                saved = self.checkpoints.add(saved, n, windows)
                windows, results, states, _ = self._walk(
                    self._segment(n), by_value, (windows, results, states, []), True
                )
                return windows, results, states, saved

            _, results, states, saved = on.loop(0, loop.segments, segment, (windows, results, states, saved))
        else:
            saved = self.saved.open(loop.stop - loop.start) if saving else []
            carry = (windows, results, states, saved)
            _, results, states, saved = self._walk((loop.start, loop.stop), by_value, carry, saving)
        found = [
            on.close(r, f.dim or 0, f.rate * f.start + f.ahead, f.size) for r, f in zip(results, sinks, strict=True)
        ]
        return found + [part for state in states for part in state], [on.full(s, not self.training) for s in saved]

    def _walk(self, steps: tuple[Any, Any], by_value: Mapping[int, Any], carry: Any, safe: bool) -> Any:
        """Steps [first, last); `carry`: windows, and results, states of reductions, stacks: none, where not wanted;
        `safe`: gradients will follow.
        """
        on, (first, last) = self.on, steps
        sinks = [self.loop.flows[v] for v in self.loop.sinks]
        wholes = [by_value[v] for v in self.wholes]

        def body(t: Any, carry: Any) -> Any:
            windows, results, states, stacks = carry
            windows, rows, lifted = self.step(t, windows, self.step.fetch(t, by_value), wholes, safe)
            results = [
                on.put(r, f.dim or 0, t - f.start, f.stop - f.start, x, f.rate * t + f.ahead)
                for r, f, x in zip(results, sinks, rows, strict=False)
            ]
            del rows
            states = [self.lift(c, t, s, x) for c, s, x in zip(self.lifts, states, lifted, strict=False)]
            stacks = self.saved.add(stacks, t - first, windows) if stacks else []
            return windows, results, states, stacks

        return on.loop(first, last, body, carry)

    def _segment(self, n: Any) -> tuple[Any, Any]:
        """Steps of segment n."""
        loop = self.loop
        first = loop.start + n * loop.segment
        if (loop.stop - loop.start) % loop.segment == 0:
            return first, first + loop.segment
        last = first + loop.segment
        return first, min(last, loop.stop) if isinstance(n, int) else ops.minimum(last, loop.stop)

    def _again(self, n: Any, saved: Sequence[Any], by_value: Mapping[int, Any]) -> list[Any]:
        """What the steps of segment n save, from its checkpoint."""
        windows = self.checkpoints.windows(saved, n)
        stacks = self.saved.begin(self.saved.open(self.loop.segment), windows)
        *_, stacks = self._walk(self._segment(n), by_value, (windows, [], [], stacks), True)
        return [self.on.full(s, False) for s in stacks]

    def _open(self, flow: Flow) -> Any:
        value = self.graph.values[flow.value]
        return self.on.open(value.shape, value.dtype, flow.dim or 0, flow.rate, flow.stop - flow.start, flow.size)

    # ---- reductions ---------------------------------------------------------------------------------------

    def empty(self, call: Call) -> tuple[Any, ...]:
        """State of a reduction before the first step."""
        kernel = self.graph.nodes[call.node].kernel
        shape = [1 if d in kernel.axis else n for d, n in enumerate(kernel.shape)]
        return tuple(kernel.empty(ops.zeros(shape, kernel.wide)))

    def lift(self, call: Call, t: Any, state: Any, x: Any) -> tuple[Any, ...]:
        """The state with the rows x that the reduction takes in step t."""
        kernel, take = self.graph.nodes[call.node].kernel, call.takes[0]
        size, first, per_row = kernel.shape[take.dim], take.rate * t + take.first, kernel.per_row(take.dim)
        if isinstance(t, int):
            so_far, new = min(max(first, 0), size), min(max(first + take.length, 0), size)
            if new <= so_far:
                return tuple(state)
            valid = None if new - so_far == take.length else self._valid(call, first)
            n_a, n_b = so_far * per_row, (new - so_far) * per_row
        else:
            so_far, new = (ops.clip(first, 0, size), ops.clip(first + take.length, 0, size))
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
        loop, on = self.loop, self.on
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
        sliced = tuple(dict.fromkeys(self.slices[n][0] for n in cut))
        carry = (
            [self.step.zeros(self.flows[n], self.flows[n].kept) for n in moving],
            [on.zeros(by_value[v].shape, _wide(by_value[v].dtype)) for v in sliced],
            [on.zeros(by_value[v].shape, _wide(by_value[v].dtype)) for v in (self.wholes[n] for n in whole)],
        )

        def step(t: Any, windows: list[Any], carry: Any) -> Any:
            onward, into_slices, into_wholes = carry
            slices, wholes = self.step.fetch(t, by_value), [by_value[v] for v in self.wholes]
            chosen = [windows[n] for n in moving] + [slices[n] for n in cut] + [wholes[n] for n in whole]

            def again(*chosen: Any) -> list[Any]:
                w, s, p, given = list(windows), list(slices), list(wholes), iter(chosen)
                for target, places in ((w, moving), (s, cut), (p, whole)):
                    for n in places:
                        target[n] = next(given)
                after, rows, lifted = self.step(t, w, s, p, True)
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
            v = self.wholes[n]
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
            v, dim, rate, first, _ = self.slices[n]
            found[v] = self.on.add(found[v], dim, rate * t + first, grad)
        return [found[v] for v in values]


def _entries(kernel: Any) -> int:
    """Arrays in the state of a reduction."""
    return 2 if isinstance(kernel.monoid, Extremum | Moments) else 1


def _floating(dtype: Any) -> bool:
    return "float" in keras.backend.standardize_dtype(dtype)


def _wide(dtype: Any) -> str:
    name = keras.backend.standardize_dtype(dtype)
    return "float32" if name in ("float16", "bfloat16") else name
