"""A rolled plan (`planning/rolled.py`) written out as a program over files, so that its steps run one by one.

    level    prologue     RUN each node on whole values
             sweep        BEGIN windows | LIFT nothing | ALLOC results
                 step t   STEP (rows of stored values, windows) -> (windows, new rows of results, rows that reductions take)
                          WRITE rows of a result | MERGE rows into a reduction
                          FINISH reductions

Windows and states between two steps are the carry. What is lost of it in a crash is had again as `execute/resume.py` says:
states are kept, windows are made again in a few steps (`settles`). Enter at `written_out`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod

from ranger_nn.core.graph import Graph
from ranger_nn.core.program import ALLOC, BEGIN, FINISH, LIFT, MERGE, RUN, STEP, TRIM, WRITE, Instruction, Program, Read
from ranger_nn.core.reach import Box
from ranger_nn.planning.rolled import SLICE, WHOLE, WINDOW, Call, Loop, Take
from ranger_nn.planning.rolled_search import Rolled

Rows = tuple[int, int, int, int, int]
"""Rows of a stored value that a step takes: (value, dimension, rate, first, length)."""


def slices(loop: Loop) -> list[Rows]:
    """What each step takes of stored values, in the order in which it is given to STEP."""
    takes = [t for c in loop.calls for t in c.takes if t.source == SLICE]
    return list(dict.fromkeys((t.value, t.dim, t.rate, t.first, t.length) for t in takes))


def wholes(loop: Loop) -> list[int]:
    """Values that each step reads whole, in the order in which they are given to STEP, behind the slices."""
    return list(dict.fromkeys(t.value for c in loop.calls for t in c.takes if t.source == WHOLE))


def lifts(loop: Loop) -> list[Call]:
    """Reductions, in the order in which STEP gives their rows."""
    return [c for c in loop.calls if c.lifts]


def rows_at(rows: Rows, t: int, size: int) -> tuple[int, int]:
    """Of what step t takes, the part [lo, hi) that exists: never empty, for rows outside are the nearest one inside."""
    lo = rows[2] * t + rows[3]
    return min(max(lo, 0), size - 1), max(min(lo + rows[4], size), 1)


def settles(graph: Graph, loop: Loop) -> int:
    """Steps after which no window depends any more on what windows held before.

    `clean[v]`: the step, counted from one with windows of zeros, from which on the new rows of v are right: those that it reads
    must have been made in such steps themselves.
    """
    clean: dict[int, int] = {}
    for call in loop.calls:
        if call.lifts:
            continue
        (v,) = graph.nodes[call.node].outputs
        clean[v] = max((clean[t.value] + _back(loop, t) for t in call.takes if t.source == WINDOW), default=0)
    return max((clean[v] - (-flow.kept // flow.rate) for v, flow in loop.flows.items() if flow.kept), default=0)


def _back(loop: Loop, take: Take) -> int:
    """Steps since the oldest row of a window that is read was made."""
    flow = loop.flows[take.value]
    return -(-max(0, flow.ahead - take.first) // flow.rate)


def written_out(rolled: Rolled, external: Iterable[int]) -> Program:
    """The program; `external`: values that the caller gives, in order.

    Every result of a sweep is allocated and written by region: an output as a picture, any other as a file between sweeps.
    """
    return _Writer(rolled, list(external)).program()


class _Writer:
    """Writes instructions, level by level."""

    def __init__(self, rolled: Rolled, external: Sequence[int]) -> None:
        self.rolled, self.graph = rolled, rolled.graph
        self.external = {v: slot for slot, v in enumerate(external)}
        self.slot = dict(self.external)
        self.slots = len(external)
        self.in_files = set(self.graph.inputs)
        self.instructions: list[Instruction] = []
        self.sweep, self.region = 0, -1

    def program(self) -> Program:
        """All of it."""
        rolled = self.rolled
        settled = {}
        for at, (level, wanted, loop) in enumerate(
            zip(rolled.stages.levels, rolled.demand.sweeps, rolled.loops, strict=True)
        ):
            if not (level.prologue or wanted.nodes):
                continue
            self.sweep, self.region = at, self.region + 1
            for k in level.prologue:
                self._whole(k)
            if loop is not None:
                settled[at] = settles(self.graph, loop)
                self._loop(loop)
                continue
            for k in wanted.nodes:
                self._whole(k)
            for v in sorted(wanted.sinks):
                self._stored(v)
        results = {v: self.slot[v] for v in self.graph.outputs if v not in self.in_files}
        self._free(set(results.values()) | set(self.external.values()))
        macs = sum(n.macs for n in self.graph.nodes)
        return Program(
            self.instructions, self.slots, self.external, results, macs=macs, regions=self.region + 1, settles=settled
        )

    # ---- slots and reads

    def _new(self) -> int:
        self.slots += 1
        return self.slots - 1

    def _emit(
        self,
        op: str,
        reads: Sequence[Read] = (),
        outs: Sequence[int] = (),
        node: int = -1,
        value: int = -1,
        count: tuple[int, ...] = (),
        frees: Sequence[int] = (),
        out_box: Box = (),
    ) -> None:
        shape = self.graph.values[value].shape if op == ALLOC else ()
        self.instructions.append(
            Instruction(
                op,
                node,
                tuple(reads),
                tuple(outs),
                list(frees),
                out_box,
                value=value,
                shape=shape,
                count=count,
                sweep=self.sweep,
                region=self.region,
            )
        )

    def _read(self, v: int, dim: int = 0, rows: tuple[int, int] | None = None, slot: int | None = None) -> Read:
        """A value, or some of its rows, from its slot or another that holds it."""
        value, at = self.graph.values[v], self.slot[v] if slot is None else slot
        box = tuple((0, n) for n in value.shape)
        cuts: tuple[tuple[int, int, int], ...] = ()
        if rows is not None and rows != box[dim]:
            box = (*box[:dim], rows, *box[dim + 1 :])
            cuts = ((dim, rows[0], rows[1] - rows[0]),)
        size = value.itemsize * prod(hi - lo for lo, hi in box)
        return Read(((at, cuts),), nbytes=size, box=box, loaded=slot is None and v in self.in_files)

    @staticmethod
    def _carried(slot: int) -> Read:
        return Read(((slot, ()),))

    # ---- whole nodes

    def _whole(self, k: int) -> None:
        node = self.graph.nodes[k]
        for v in node.outputs:
            self.slot[v] = self._new()
        box = tuple((0, n) for n in self.graph.values[node.outputs[0]].shape)
        reads = [self._read(v) for v in node.inputs]
        self._emit(RUN, reads, [self.slot[v] for v in node.outputs], k, node.outputs[0], out_box=box)

    def _stored(self, v: int) -> None:
        """A result that was made whole goes where those of sweeps go."""
        made, handle = self.slot[v], self._new()
        self._emit(ALLOC, outs=[handle], value=v)
        self.slot[v] = handle
        self._emit(WRITE, [replace(self._read(v), loaded=False), self._read(v, slot=made)], value=v)
        self.in_files.add(v)

    # ---- sweeps

    def _loop(self, loop: Loop) -> None:
        given = [self._loaded(v) for v in wholes(loop)]
        for v in loop.sinks:
            self.slot[v] = self._new()
            self._emit(ALLOC, outs=[self.slot[v]], value=v)
        windows, states = self._new(), {c.node: self._new() for c in lifts(loop)}
        self._emit(BEGIN, outs=[windows])
        for k, slot in states.items():
            self._emit(LIFT, outs=[slot], node=k)
        for t in range(loop.start, loop.stop):
            self.region += t > loop.start
            self._step(loop, t, given, windows, states)
        for k, slot in states.items():
            (v,) = self.graph.nodes[k].outputs
            self.slot[v] = self._new()
            self._emit(FINISH, [self._carried(slot)], [self.slot[v]], k, v)
        self.in_files |= set(loop.sinks)

    def _loaded(self, v: int) -> Read:
        """A value that steps read whole is read from its file once."""
        if v not in self.in_files:
            return self._read(v)
        slot = self._new()
        self._emit(TRIM, [self._read(v)], [slot], value=v)
        return self._read(v, slot=slot)

    def _step(self, loop: Loop, t: int, given: Sequence[Read], windows: int, states: dict[int, int]) -> None:
        made = {v: self._new() for v in loop.sinks}
        lifted = {k: self._new() for k in states}
        at = {v: self._placed(loop, v, t) for v in loop.sinks}
        unread = [made[v] for v, rows in at.items() if rows is None]
        reads = [*(self._slice(loop, s, t) for s in slices(loop)), *given, self._carried(windows)]
        self._emit(STEP, reads, [windows, *made.values(), *lifted.values()], count=(t,), frees=unread)
        for v, rows in at.items():
            if rows is not None:
                self._write(loop, v, t, rows, made[v])
        for k, slot in lifted.items():
            before, states[k] = states[k], self._new()  # the journal takes a slot for what was there first
            self._emit(MERGE, [self._carried(before), self._carried(slot)], [states[k]], k, count=(t,), frees=[slot])

    def _slice(self, loop: Loop, rows: Rows, t: int) -> Read:
        """Rows of a stored value, as far as they exist; none where nothing that runs in step t reads them."""
        v, dim = rows[:2]
        if not any(g.start <= t < g.stop and any(_takes(c, rows) for c in g.calls) for g in loop.groups):
            return Read(())
        return self._read(v, dim, rows_at(rows, t, self.graph.values[v].shape[dim]))

    def _placed(self, loop: Loop, v: int, t: int) -> tuple[int, int] | None:
        """The rows of a result that step t makes; None where it makes none."""
        flow = loop.flows[v]
        first = flow.rate * t + flow.ahead
        lo, hi = max(first, 0), min(first + flow.rate, flow.size)
        return (lo, hi) if lo < hi else None

    def _write(self, loop: Loop, v: int, t: int, rows: tuple[int, int], made: int) -> None:
        flow = loop.flows[v]
        dim, first = flow.dim or 0, flow.rate * t + flow.ahead
        target = replace(self._read(v, dim, rows), loaded=False)
        cuts = () if rows[1] - rows[0] == flow.rate else ((dim, rows[0] - first, rows[1] - rows[0]),)
        source = Read(((made, cuts),), nbytes=target.nbytes, box=target.box)
        self._emit(WRITE, [target, source], value=v, frees=[made])

    # ---- frees

    def _free(self, kept: set[int]) -> None:
        """Drop each slot after the last instruction that touches it, but for those that are kept."""
        last: dict[int, Instruction] = {}
        for i in self.instructions:
            last.update(dict.fromkeys((*i.outs, *(slot for read in i.reads for slot, _ in read.parts)), i))
        for slot, i in last.items():
            if slot not in kept and slot not in i.frees:
                i.frees.append(slot)


def _takes(call: Call, rows: Rows) -> bool:
    return any(t.source == SLICE and (t.value, t.dim, t.rate, t.first, t.length) == rows for t in call.takes)
