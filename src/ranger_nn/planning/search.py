"""Choose a schedule: the fastest whose projected peak is within what is allowed.

Time is counted as multiply-adds (recomputed ones included) and steps; memory is read off the lowered program, the
same that runs. Moves, in the order in which they are tried: smaller steps, recomputing a stored value in the sweep
that reads it, a cut that ends a sweep early (training), tiles across the second axis. Enter at `make_plan`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ranger_nn.bounds.axes import Axis, find_axes
from ranger_nn.bounds.infer import Bounds
from ranger_nn.core.graph import COMPUTED, INPUT, Graph
from ranger_nn.core.program import Program
from ranger_nn.errors import BudgetError, InputError
from ranger_nn.planning.backward import lower_backward
from ranger_nn.planning.budget import format_bytes
from ranger_nn.planning.forward import ForwardLowering, Schedule, lower_forward
from ranger_nn.planning.report import Plan, describe
from ranger_nn.planning.stages import REGIONAL, stage
from ranger_nn.planning.verify import verify_program

STEP_BYTES = 6 << 20
"""Bytes of the largest value's share of one step: about what stays in the last-level cache."""
MARGIN = 1.02
SEARCH_WORK = 60_000
"""Instructions that one search may write: bounds the planning time, the same on every machine."""
SCHEDULES = ("tile", "slide")


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    allowed: int | None = None
    regions: tuple[int, ...] | None = None
    schedule: str | None = None

    @classmethod
    def checked(cls, allowed: int | None, regions: Sequence[int] | int | None, schedule: str | None) -> Options:
        """Validate; raises InputError."""
        if schedule is not None and schedule not in SCHEDULES:
            raise InputError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if regions is not None:
            regions = (regions,) if isinstance(regions, int) else tuple(regions)
            if not regions or not all(isinstance(r, int) and r > 0 for r in regions):
                raise InputError(f"regions takes positive sizes such as (256, 256), got {regions!r}")
        return cls(allowed, regions, schedule)

    def without_budget(self) -> Options:
        """The same, free of the budget."""
        return replace(self, allowed=None)


@dataclass
class Planned:
    """A plan and the programs it was lowered to."""

    plan: Plan
    forward: Program
    backward: Program | None


@dataclass
class Candidate:
    """One schedule, lowered."""

    schedule: Schedule
    bounds: Bounds
    forward: Program
    backward: Program | None
    lowering: ForwardLowering
    peak: int
    macs: int

    @property
    def size(self) -> int:
        """Instructions written to find it."""
        twice = 2 if self.backward is not None else 1
        return twice * (len(self.forward.instructions) + (len(self.backward.instructions) if self.backward else 0))

    @property
    def binding(self) -> int:
        """Level at which the peak stands."""
        worst = self.forward if self.backward is None or self.forward.peak >= self.backward.peak else self.backward
        return worst.instructions[worst.peak_at].sweep if worst.instructions and worst.peak_at >= 0 else 0


def lower(graph: Graph, axes: Sequence[Axis], schedule: Schedule, training: bool) -> Candidate:
    """Lower a schedule to programs and read off peak and work."""
    cut = [a for i, a in enumerate(axes) if (i == 0 and schedule.slides) or schedule.tiles[i] > 1]
    tiles = tuple(schedule.tiles[i] for i, a in enumerate(axes) if a in cut)
    slim = replace(schedule, tiles=tiles, steps=schedule.steps if cut and schedule.slides else 0)
    bounds = Bounds(graph, tuple(cut))
    stages = stage(bounds, schedule.cuts)
    if not training:
        forward, state = lower_forward(bounds, stages, slim)
        return Candidate(schedule, bounds, forward, None, state, forward.peak, forward.macs)
    everything = {v for n in graph.nodes for v in n.outputs}
    _, state = lower_forward(bounds, stages, slim, everything, streaming=False)
    _, used = lower_backward(state)
    forward, state = lower_forward(bounds, stages, slim, used, streaming=True)
    backward, _ = lower_backward(state)
    return Candidate(
        schedule, bounds, forward, backward, state, max(forward.peak, backward.peak), forward.macs + backward.macs
    )


def base_steps(graph: Graph, axis: Axis) -> int:
    """Steps along the sliding axis so that the largest value's share of a step is about STEP_BYTES."""
    heaviest = max((graph.values[v].nbytes for v in axis.dims if graph.values[v].kind == COMPUTED), default=1)
    rows = max(
        (graph.values[v].shape[d] for v, d in axis.dims.items() if graph.values[v].kind in (INPUT, COMPUTED)), default=1
    )
    steps = max(1, min(-(-heaviest // STEP_BYTES), max(1, rows // 4)))
    power = 1
    while power * 2 <= steps:
        power *= 2
    return power


def starting(graph: Graph, axes: Sequence[Axis], options: Options) -> list[Schedule]:
    """Schedules to begin with: what the user fixed, or sliding with ever smaller steps."""
    if not axes:
        return [Schedule(0, ())]
    ones = [1] * len(axes)
    if options.regions is not None:
        spatial = max([len(axes), *(len(graph.values[v].shape) - 2 for v in graph.inputs)])
        if len(options.regions) > spatial:
            names = ", ".join(a.name for a in axes)
            raise InputError(
                f"regions has {len(options.regions)} sizes {options.regions}, but {graph.name} can be cut along "
                f"{len(axes)} axes ({names}): give at most {spatial}"
            )
        counts = [max(1, -(-_input_size(graph, a) // r)) for a, r in zip(axes, options.regions, strict=False)]
        counts += [1] * (len(axes) - len(counts))
        if options.schedule == "tile":
            return [Schedule(0, tuple(counts))]
        return [Schedule(max(1, counts[0]), (1, *counts[1:]))]
    steps = base_steps(graph, axes[0])
    limit = max(1, _input_size(graph, axes[0]) // 2)
    if options.schedule == "tile":
        found = []
        count = 1
        while count <= min(32, limit):
            found.append(Schedule(0, tuple([count] * min(2, len(axes)) + [1] * max(0, len(axes) - 2))))
            count *= 2
        return found
    sizes = [steps] + [s for s in (steps * 2, steps * 4, steps * 8) if s <= min(limit, 256)]
    return [Schedule(s, tuple(ones)) for s in sizes]


def _input_size(graph: Graph, axis: Axis) -> int:
    sizes = [graph.values[v].shape[d] for v, d in axis.dims.items() if v in graph.inputs]
    return max(sizes, default=axis.size)


def _neighbours(graph: Graph, axes: Sequence[Axis], best: Candidate, training: bool) -> Iterator[Schedule]:
    """Schedules one move away that may lower the peak, the most promising first."""
    schedule = best.schedule
    level = best.binding
    state = best.lowering
    holds = dict(schedule.holds)
    crossing = []
    for v, last in state.demand.stored.items():
        home = state.stages.level[state.stages.producer[v]]
        if v in state.stages.whole_reads or not home <= level <= last:
            continue
        readers = [at for at, s in enumerate(state.demand.sweeps) if v in s.stored_reads and last >= at]
        before = [at for at in readers if level > at and last > at]
        crossing.append((graph.values[v].nbytes, v, max(before, default=home)))
    for _, v, upto in sorted(crossing, reverse=True)[:4]:
        if holds.get(v) != upto:
            yield replace(schedule, holds=tuple(sorted({**holds, v: upto}.items())))
    if training:
        for cut in _cut_positions(graph, best):
            yield replace(schedule, cuts=tuple(sorted({*schedule.cuts, cut})))
    regions = max(1, schedule.steps)
    for count in schedule.tiles:
        regions *= count
    if regions > 256:
        return
    if schedule.slides and schedule.steps * 2 <= min(256, _input_size(graph, axes[0]) // 2):
        yield replace(schedule, steps=schedule.steps * 2)
    if len(axes) > 1 and schedule.tiles[1] < 16:
        yield replace(schedule, tiles=(schedule.tiles[0], schedule.tiles[1] * 2, *schedule.tiles[2:]))


def _cut_positions(graph: Graph, best: Candidate) -> list[int]:
    """Positions where few bytes cross, spread over the work of the binding sweep."""
    stages = best.lowering.stages
    level = best.binding
    nodes = [k for k in best.lowering.demand.sweeps[level].nodes if stages.kind[k] == REGIONAL]
    if len(nodes) < 4:
        return []
    last: dict[int, int] = {}
    for k, node in enumerate(graph.nodes):
        for v in node.inputs:
            last[v] = k
    costs = []
    total = sum(graph.nodes[k].macs for k in nodes) or 1
    done = 0
    for k in nodes[:-1]:
        done += graph.nodes[k].macs
        position = k + 1
        if position in best.schedule.cuts:
            continue
        bytes_over = sum(
            graph.values[v].nbytes
            for j in nodes
            if j <= k
            for v in graph.nodes[j].outputs
            if last.get(v, -1) >= position
        )
        costs.append((bytes_over, abs(0.5 - done / total), position))
    return [p for _, _, p in sorted(costs)[:3]]


def with_margin(peak: int) -> int:
    """Projected bytes: the peak counted while lowering, and a little for what is not counted (small tensors)."""
    return int(peak * MARGIN) + 4096


def search(graph: Graph, axes: Sequence[Axis], options: Options, training: bool) -> Candidate:
    """The first schedule within the budget, or the best found."""
    best: Candidate | None = None
    work = 0
    for schedule in starting(graph, axes, options):
        found = lower(graph, axes, schedule, training)
        work += found.size
        if best is None or found.peak < best.peak:
            best = found
        if options.allowed is None or with_margin(found.peak) <= options.allowed:
            return found
    assert best is not None
    fixed = options.regions is not None
    while axes and work < SEARCH_WORK and options.allowed is not None:
        improved: Candidate | None = None
        for schedule in _neighbours(graph, axes, best, training):
            if fixed and (schedule.steps, schedule.tiles) != (best.schedule.steps, best.schedule.tiles):
                continue
            if work >= SEARCH_WORK:
                break
            found = lower(graph, axes, schedule, training)
            work += found.size
            if with_margin(found.peak) <= options.allowed:
                return found
            if found.peak < (improved.peak if improved else best.peak):
                improved = found
        if improved is None or improved.peak >= best.peak:
            break
        best = improved
    return best


def make_plan(graph: Graph, options: Options, training: bool) -> Planned:
    """Plan and programs for a graph; raises BudgetError where nothing fits."""
    axes = find_axes(graph)
    best = search(graph, axes, options, training)
    whole = lower(graph, [], Schedule(0, ()), training)
    projected = with_margin(best.peak)
    if options.allowed is not None and projected > options.allowed:
        raise _too_small(graph, options.allowed, projected, best)
    verify_program(best.forward, graph)
    if best.backward is not None:
        verify_program(best.backward, graph, best.forward)
    untouched = whole.peak if not training else max(whole.peak, _saved_by_untouched(graph))
    plan = describe(
        graph, axes, best.schedule, best.lowering, best.forward, best.backward, options.allowed, projected, untouched
    )
    return Planned(plan, best.forward, best.backward)


def _saved_by_untouched(graph: Graph) -> int:
    """Activations that plain autograd keeps: every member's output of every differentiable node."""
    return sum(
        graph.values[v].nbytes * getattr(n.kernel, "members", 1)
        for n in graph.nodes
        for v in n.outputs
        if graph.values[v].differentiable
    )


def _too_small(graph: Graph, allowed: int, least: int, best: Candidate) -> BudgetError:
    program = best.forward if best.backward is None or best.forward.peak >= best.backward.peak else best.backward
    instruction = program.instructions[program.peak_at]
    node = instruction.node
    if node < 0 and instruction.value >= 0:
        node = best.lowering.stages.producer.get(instruction.value, -1)
    name = graph.nodes[node].name if node >= 0 else "the input"
    where = graph.nodes[node].where if node >= 0 else ""
    place = f"{name} ({where})" if where else name
    return BudgetError(
        f"{graph.name} does not fit in {format_bytes(allowed)} ({allowed} bytes): the least that a plan needs for this "
        f"input is {format_bytes(least)} ({least} bytes), bound by {place}. Allow {least} bytes, or use a smaller input.",
        allowed=allowed,
        least=least,
        binding=place,
    )
