"""Choose a rolled slide: the longest steps, and the fewest cuts, whose projected peak is within what is allowed.

Where nothing is, long windows are made again in place of being kept (`rematerialise.py`), and in training sweeps are given
checkpoints, one after the other, which costs another forward of each.

Three things are chosen: the axis to slide along (a step and its windows are as long as the other one), `block`, the bytes
of a sweep's largest value that a step may make, and where sweeps end early. A sweep whose values are all light runs in
one step, so the first cuts to try are those that part the network's light end (small feature maps, heavy weights) from
its large beginning. Enter at `make_rolled`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ranger_nn.bounds.axes import Axis, find_axes
from ranger_nn.bounds.infer import Bounds
from ranger_nn.checking.check import Checked
from ranger_nn.core.graph import COMPUTED, PARAMETER, Graph
from ranger_nn.errors import BudgetError, InputError
from ranger_nn.planning.along import input_size, slide_first
from ranger_nn.planning.budget import format_bytes
from ranger_nn.planning.forward import Demand, Schedule, demand
from ranger_nn.planning.rematerialise import long_windows, remade, shifted, told
from ranger_nn.planning.report import Plan, SweepRow
from ranger_nn.planning.rolled import Loop, roll, rollable
from ranger_nn.planning.rolled_cost import Cost, checkpointed, cost, last_levels
from ranger_nn.planning.search import STEP_BYTES, Options, with_margin
from ranger_nn.planning.stages import REGIONAL, Stages, stage
from ranger_nn.planning.verify_rolled import verify_loop

LIGHT = 4
"""A sweep runs in one step where its largest value has at most this many blocks."""
LONGER = 8
"""How much longer the first steps of training are."""
FINEST = 9
"""How often the block is halved."""
COPIES = 3
"""How many long windows are made again in place of being kept, at most."""
CUTS = 6
"""How many cuts are added one after the other."""


@dataclass(frozen=True)
class Choice:
    """`block`: bytes of a sweep's largest value in one step; `rows`: input rows in one step (the user's)."""

    block: int
    cuts: tuple[int, ...] = ()
    holds: tuple[tuple[int, int], ...] = ()
    rows: int | None = None


@dataclass
class Rolled:
    """A plan and all that the executor needs: a loop for each level, None where it runs in one step."""

    plan: Plan
    graph: Graph
    stages: Stages
    demand: Demand
    loops: tuple[Loop | None, ...]
    last: dict[int, int]
    training: bool


@dataclass
class Candidate:
    """One choice, rolled."""

    choice: Choice
    bounds: Bounds
    stages: Stages
    demand: Demand
    loops: tuple[Loop | None, ...]
    cost: Cost
    again: tuple[str, ...] = ()
    """Which values are made again, and why."""


def lower(graph: Graph, axes: Sequence[Axis], choice: Choice, training: bool) -> Candidate:
    """Roll a choice and count its bytes."""
    bounds = Bounds(graph, tuple(axes[:1]))
    stages = stage(bounds, choice.cuts)
    wanted = demand(bounds, stages, Schedule(1, (1,) * len(axes[:1]), choice.cuts, choice.holds))
    loops: list[Loop | None] = []
    for sweep in wanted.sweeps:
        steps = _steps(bounds, sweep.nodes, choice) if sweep.nodes and axes else 1
        loop = roll(bounds, stages, sweep, steps, training) if steps > 1 else None
        loops.append(loop if loop is not None and loop.stop - loop.start > 1 else None)
    return Candidate(choice, bounds, stages, wanted, tuple(loops), cost(graph, stages, wanted, loops, training))


def checkpoints(found: Candidate) -> Iterator[Candidate]:
    """The same choice with checkpoints in one sweep more each time: first where they save the most bytes."""
    loops = [loop and checkpointed(found.bounds.graph, loop) for loop in found.loops]
    graph, before = found.bounds.graph, found
    now = list(found.loops)
    for at in sorted(range(len(loops)), key=lambda n: -found.cost.saved[n]):
        loop = loops[at]
        if loop is None or not loop.segment:
            continue
        now[at] = loop
        spent = cost(graph, found.stages, found.demand, now, True)
        if spent.peak < before.cost.peak:
            before = replace(found, loops=tuple(now), cost=spent)
            yield before
        else:
            now[at] = found.loops[at]


def with_copies(found: Candidate, training: bool) -> Iterator[Candidate]:
    """The same choice with one long window less each time: first the one that frees the most bytes."""
    for _ in range(COPIES):
        graph, axes = found.bounds.graph, found.bounds.axes
        options = [a for loop in found.loops if loop for a in long_windows(graph, loop)]
        if not options:
            return
        best = max(options, key=lambda a: a.nbytes)
        other = remade(graph, best)
        choice = replace(found.choice, cuts=shifted(found.choice.cuts, best))
        same = _same(other, axes[0])
        again = lower(other, same, choice, training)
        if again.cost.peak >= found.cost.peak:
            return
        found = replace(again, again=(*found.again, told(graph, best, axes[0].name)))
        yield found


def _steps(bounds: Bounds, nodes: Sequence[int], choice: Choice) -> int:
    values = bounds.graph.values
    touched = {v for k in nodes for v in (*bounds.graph.nodes[k].inputs, *bounds.graph.nodes[k].outputs)}
    touched = {v for v in touched if bounds.dim(v, 0) is not None and values[v].kind != PARAMETER}
    if choice.rows is not None:
        steps = -(-input_size(bounds.graph, bounds.axes[0]) // choice.rows)
        return min(steps, max((bounds.size(v, 0) for v in touched), default=1))
    heaviest = max((values[v].nbytes for v in touched), default=0)
    return 1 if heaviest <= LIGHT * choice.block else -(-heaviest // choice.block)


def choices(graph: Graph, rows: int | None, training: bool) -> Iterator[Choice]:
    """Ever shorter steps, each without a cut and with the light end cut off. Training begins with longer ones: what it
    saves is so many rows for each step.
    """
    if rows is not None:
        yield Choice(STEP_BYTES, rows=rows)
        return
    block = STEP_BYTES * (LONGER if training else 1)
    for _ in range(FINEST):
        found = Choice(block)
        end = _light_end(graph, LIGHT * block)
        if end:
            yield replace(found, cuts=(end,))
        yield found
        block //= 2


def _light_end(graph: Graph, limit: int) -> int:
    """Position after the last node that makes more than `limit` bytes; 0 where that is no cut."""
    heavy = [k for k, n in enumerate(graph.nodes) if any(graph.values[v].nbytes > limit for v in n.outputs)]
    at = heavy[-1] + 2 if heavy else 0
    return at if 0 < at < len(graph.nodes) else 0


class Search:
    """The first choice that fits; then cuts, one after the other; then the first choice that fits with long windows made
    again or, in training, with checkpoints; the least found where nothing does.
    """

    def __init__(
        self, graph: Graph, axes: Sequence[Axis], allowed: int | None, training: bool, rows: int | None = None
    ) -> None:
        """`axes`: the one to slide along, or none; `rows`: of one region, where the user says so."""
        self.graph, self.axes, self.allowed, self.training, self.rows = graph, axes, allowed, training, rows
        self.best: Candidate | None = None
        self.spare: Candidate | None = None
        """What to fall back on: the first that fits with more work, or the least."""

    def attempt(self, choice: Choice) -> bool:
        """Roll it; True where it fits."""
        found = lower(self.graph, self.axes, choice, self.training)
        if self.best is None or found.cost.peak < self.best.cost.peak:
            self.best = found
        if self.allowed is None:
            return True
        if self._fits(found):
            self.best = self.spare = found
            return True
        for other in self._smaller(found):
            if self.spare is None or other.cost.peak < self.spare.cost.peak:
                self.spare = other
            if self._fits(self.spare):
                break
        return False

    def _smaller(self, found: Candidate) -> Iterator[Candidate]:
        """The same choice for fewer bytes and more work: the least work first. None once something fits."""
        if self.spare is not None and self._fits(self.spare):
            return
        copies = []
        for other in with_copies(found, self.training):
            copies.append(other)
            yield other
        for other in (found, *copies) if self.training else ():
            yield from checkpoints(other)

    def _fits(self, found: Candidate) -> bool:
        return self.allowed is not None and with_margin(found.cost.peak) <= self.allowed

    def run(self) -> Candidate:
        """The choice."""
        if not self.axes:
            return lower(self.graph, self.axes, Choice(1), self.training)
        if any(self.attempt(choice) for choice in choices(self.graph, self.rows, self.training)):
            assert self.best is not None
            return self.best
        assert self.best is not None
        for _ in range(CUTS):
            start = self.best
            if any(self.attempt(choice) for choice in self._moves(start)) or self.best is start:
                break
        return min((c for c in (self.best, self.spare) if c is not None), key=lambda c: c.cost.peak)

    def _moves(self, start: Candidate) -> Iterator[Choice]:
        for cut in _cut_positions(self.graph, start):
            cuts = tuple(sorted({*start.choice.cuts, cut}))
            yield replace(start.choice, cuts=cuts)
            yield replace(start.choice, cuts=cuts, block=start.choice.block * 2)


def _cut_positions(graph: Graph, best: Candidate) -> list[int]:
    """One position in each eighth of the largest sweep: where the fewest bytes cross."""
    at = max(range(len(best.loops)), key=lambda n: best.cost.peaks[n])
    nodes = [k for k in best.demand.sweeps[at].nodes if best.stages.kind[k] == REGIONAL]
    if len(nodes) < 4:
        return []
    last = {v: k for k, node in enumerate(graph.nodes) for v in node.inputs}
    found: dict[int, tuple[int, int]] = {}
    for n, k in enumerate(nodes[:-1]):
        over = sum(
            graph.values[v].nbytes for j in nodes[: n + 1] for v in graph.nodes[j].outputs if last.get(v, -1) > k
        )
        part = 8 * n // len(nodes)
        found[part] = min(found.get(part, (over, k + 1)), (over, k + 1))
    return [position for _, position in found.values() if position not in best.choice.cuts]


def make_rolled(graph: Graph, options: Options, training: bool) -> Rolled:
    """Plan of a graph; raises BudgetError where nothing fits."""
    if options.schedule == "tile":
        raise InputError('a Keras model is slid along, not tiled: leave schedule out, or give "slide"')
    best = _best(graph, options, training)
    projected = with_margin(best.cost.peak)
    if options.allowed is not None and projected > options.allowed:
        raise _too_small(best, options.allowed, projected)
    follow = partial(_verified, best, projected)
    follow()
    plan = replace(_describe(best, options, projected, graph, training), follow=follow)
    graph = best.bounds.graph
    last = last_levels(graph, best.stages, best.demand)
    return Rolled(plan, graph, best.stages, best.demand, best.loops, last, training)


def _verified(best: Candidate, peak: int) -> Checked:
    """Hold every sweep to what its operators ask for; raises PlanError."""
    calls = takes = 0
    for sweep, loop in zip(best.demand.sweeps, best.loops, strict=True):
        if loop is not None:
            verify_loop(loop, best.bounds.graph, best.bounds, sweep.nodes)
            calls, takes = calls + len(loop.calls), takes + sum(len(c.takes) for c in loop.calls)
    return Checked(calls, takes, sum(len(sweep.sinks) for sweep in best.demand.sweeps), peak)


def _best(graph: Graph, options: Options, training: bool) -> Candidate:
    """Along the first axis along which something fits; the least found where nothing does."""
    axes, regions = slide_first(graph, find_axes(graph), options.regions)
    rows = None
    if axes and regions is not None:
        sizes = [input_size(graph, a) for a in axes]
        if sum(r < size for r, size in zip(regions, sizes, strict=False)) > 1:
            names = ", ".join(a.name for a in axes)
            raise InputError(
                f"a Keras model is slid along one axis; got regions {regions} along ({names}), of sizes {tuple(sizes)}: "
                f"give one size, such as ({regions[0]},), or all of one axis, such as ({sizes[0]}, {regions[1]})"
            )
        axes, rows = axes[:1], regions[0]
    found: Candidate | None = None
    for axis in axes:
        even = rollable(graph, Bounds(graph, (axis,)))
        same = _same(even, axis)
        if not same:
            continue
        other = Search(even, same, options.allowed, training, rows).run()
        if found is None or other.cost.peak < found.cost.peak:
            found = other
        if options.allowed is None or with_margin(other.cost.peak) <= options.allowed:
            return other
    return found or Search(graph, (), options.allowed, training).run()


def _same(graph: Graph, axis: Axis) -> list[Axis]:
    """The axis in a graph made from the one in which it was found: that of the same dimensions of the inputs."""
    dims = {(v, axis.dims[v]) for v in graph.inputs if v in axis.dims}
    return [a for a in find_axes(graph) if dims & set(a.dims.items())][:1]


def _untouched(graph: Graph, training: bool) -> int:
    """Peak of the untouched network: all activations in training, else what is live node after node."""
    if training:
        return sum(graph.values[v].nbytes for n in graph.nodes for v in n.outputs)
    last = {v: k for k, n in enumerate(graph.nodes) for v in n.inputs}
    live = worst = 0
    for k, node in enumerate(graph.nodes):
        live += sum(graph.values[v].nbytes for v in node.outputs)
        worst = max(worst, live)
        done = {v for v in node.inputs if last[v] == k and graph.values[v].kind == COMPUTED}
        live -= sum(graph.values[v].nbytes for v in done if v not in graph.outputs)
    return worst


def _describe(best: Candidate, options: Options, projected: int, given: Graph, training: bool) -> Plan:
    """`given`: the graph before anything is made again."""
    graph, bounds = best.bounds.graph, best.bounds
    rows = []
    for at, (sweep, loop) in enumerate(zip(best.demand.sweeps, best.loops, strict=True)):
        if not sweep.nodes:
            continue
        steps = loop.steps if loop is not None else 1
        stored = sum(graph.values[v].nbytes for v in sweep.sinks if v not in graph.outputs)
        largest = max(
            sweep.sinks or {graph.nodes[k].inputs[0] for k in sweep.nodes}, key=lambda v: graph.values[v].nbytes
        )
        share = -(-bounds.size(largest, 0) // steps) if bounds.axes else 0
        kept = max((f.kept for f in loop.flows.values()), default=0) if loop is not None else 0
        kind = "slide" if loop is not None else "whole"
        peak, segment = best.cost.peaks[at], loop.segment if loop is not None else 0
        rows.append(SweepRow(at, len(sweep.nodes), kind, steps, str(share), str(kept), stored, peak, segment))
    whole = []
    for k, reason in sorted(best.stages.reasons.items()):
        node = graph.nodes[k]
        size = sum(graph.values[v].nbytes for v in node.outputs)
        place = f"{node.name} ({node.where})" if node.where else node.name
        whole.append(f"{place}: {reason}; {format_bytes(size)}")
    if not bounds.axes:
        whole.append("everything: no axis along which the network can be cut")
    plain = given.macs() * (3 if training else 1)
    return Plan(
        graph.name,
        training,
        options.allowed,
        projected,
        _untouched(given, training),
        round(max(0.0, best.cost.macs / plain - 1), 6) if plain else 0.0,
        tuple(a.name for a in bounds.axes),
        max((loop.steps for loop in best.loops if loop is not None), default=1),
        (1,) * len(bounds.axes),
        tuple(rows),
        tuple(whole),
        best.cost.peaks,
        best.again,
    )


def _too_small(best: Candidate, allowed: int, least: int) -> BudgetError:
    graph, k = best.bounds.graph, best.cost.binding
    place = "what the sweeps store"
    if k >= 0:
        place = f"{graph.nodes[k].name} ({graph.nodes[k].where})" if graph.nodes[k].where else graph.nodes[k].name
    return BudgetError(
        f"{graph.name} does not fit in {format_bytes(allowed)} ({allowed} bytes): the least that a plan needs for this "
        f"input is {format_bytes(least)} ({least} bytes), bound by {place}. Allow {least} bytes, or use a smaller input.",
        allowed=allowed,
        least=least,
        binding=place,
    )
