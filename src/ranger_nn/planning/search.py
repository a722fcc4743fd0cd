"""Choose a schedule: the fastest whose projected peak is within what is allowed.

Time is counted as multiply-adds (recomputed ones included) and steps; memory is read off the lowered program, the
same that runs. The first schedule that fits wins; while none does, these are tried in turn (`Search.run`):

    1. the schedules to begin with      `starting`
    .  chunks half as long              where an operator that runs whole works in chunks and holds the peak up
    .  computed weights made again      wherever they are read, in place of being held through a sweep
    2. steps half as long               and where they cannot be shorter, tiles across the second axis
    3. inference: more computed again   sets of values not held, from the least extra work on (`_ladder`)
    4. one more move, again and again   a large value not held, or (training) a cut that ends a sweep early
    5. steps half as long, four times   from the best so far on; then 3 to 5 again, on networks
                                        of which that is soon done

3 and 4 are judged on few steps. Enter at `make_plan`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from ranger_nn.bounds.axes import Axis, find_axes
from ranger_nn.bounds.infer import Bounds
from ranger_nn.checking.check import check
from ranger_nn.core.graph import COMPUTED, INPUT, Graph
from ranger_nn.core.program import Program
from ranger_nn.errors import BudgetError, InputError
from ranger_nn.ops.recurrence import chunked, halved, unchunked
from ranger_nn.planning.along import input_size, slide_first
from ranger_nn.planning.backward import BackwardLowering, NotKept
from ranger_nn.planning.budget import format_bytes
from ranger_nn.planning.count import BackwardCount, ForwardCount, Memo
from ranger_nn.planning.forward import ForwardLowering, Schedule
from ranger_nn.planning.pace import FOREVER
from ranger_nn.planning.report import Plan, describe, in_one
from ranger_nn.planning.resting import resting
from ranger_nn.planning.stages import REGIONAL, Stages, stage
from ranger_nn.planning.weights import sink

STEP_BYTES = 6 << 20
"""Bytes of the largest value's share of one step: about what stays in the last-level cache."""
MARGIN = 1.02
SEARCH_WORK = 70_000
"""Instructions that one search may write: bounds the planning time, the same on every machine."""
LOOSER = 1.5
"""In training, where no memory is stated: times the bytes of one region that the network as it is may be said to need, and is
called. It runs nothing twice, and takes less than is said of it: what convolutions take is a bound for all of their kernels.
"""
FURTHER_WORK = SEARCH_WORK // 4
"""Instructions up to which a second round of moves begins: on a large network each costs seconds."""
COARSE_SLACK = 1.5
"""Times the budget that a candidate on few steps may need to be tried on more."""
COARSE_STEPS = 16
"""Steps on which structural moves are compared: what is held weighs the same on few steps as on many."""
MOST_TILES = 32
"""Along one axis: more of them compute more than half of a usual network twice."""
FEW_TILES = 1
"""Along an axis: of 72 small networks a single tile reads, in 71, all that any of several tiles reads."""
SCHEDULES = ("tile", "slide")


@dataclass(frozen=True)
class Options:
    """What the user asked for; `disk`: inputs and values between sweeps live in files, `most_steps` of a slide."""

    allowed: int | None = None
    regions: tuple[int, ...] | None = None
    schedule: str | None = None
    disk: bool = False
    most_steps: int = 1 << 30

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

    @property
    def free(self) -> bool:
        """Whether one region is a plan, too: nothing else was asked for, and nothing has to lie in files."""
        return self.regions is None and self.schedule is None and not self.disk

    def without_budget(self) -> Options:
        """The same, free of the budget."""
        return replace(self, allowed=None)


@dataclass
class Planned:
    """A plan and the programs it was lowered to; `untouched`: the network is to be called as it is, not by them."""

    plan: Plan
    forward: Program
    backward: Program | None
    graph: Graph
    untouched: bool = False


@dataclass
class Candidate:
    """One schedule, lowered, or only counted; `size`: its instructions."""

    schedule: Schedule
    bounds: Bounds
    forward: Program
    backward: Program | None
    lowering: ForwardLowering
    peak: int
    macs: int
    size: int = 0

    @property
    def profile(self) -> tuple[int, ...]:
        """Peaks of all sweeps, the highest first: a move that lowers one of several equal peaks is a step forward."""
        programs = (self.forward, self.backward)
        return tuple(sorted((peak for p in programs if p is not None for peak in p.peaks.values()), reverse=True))

    @property
    def worst(self) -> Program:
        """The program in which the peak stands."""
        return self.forward if self.backward is None or self.forward.peak >= self.backward.peak else self.backward

    @property
    def binding(self) -> int:
        """Level at which the peak stands."""
        return self.worst.binding.sweep

    @property
    def binds_chunked(self) -> bool:
        """Whether the peak stands at an operator that works in chunks."""
        node = self.worst.binding.node
        return node >= 0 and bool(self.bounds.graph.nodes[node].kernel.chunk)


def lower(
    graph: Graph, axes: Sequence[Axis], schedule: Schedule, training: bool, memo: Memo | None = None
) -> Candidate:
    """Lower a schedule to programs and read off peak and work. With a `memo` they are counted and not written."""
    cut = [a for i, a in enumerate(axes) if (i == 0 and schedule.slides) or schedule.tiles[i] > 1]
    tiles = tuple(schedule.tiles[i] for i, a in enumerate(axes) if a in cut)
    slim = replace(schedule, tiles=tiles, steps=schedule.steps if cut and schedule.slides else 0)
    circle = next((i for i, a in enumerate(cut) if a.periods is not None), None)
    if schedule.slides or schedule.disk:
        circle = None  # a slide begins somewhere, and rows of a file are read once
    bounds = Bounds(halved(graph, schedule.halvings), tuple(cut), circle)
    stages = stage(bounds, schedule.cuts, schedule.slides)
    sink(bounds.graph, stages)
    if not training:
        state = _lowering(bounds, stages, slim, (), True, memo)
        forward = state.lower()
        return Candidate(schedule, bounds, forward, None, state, forward.peak, forward.macs, state.builder.charged)
    for most in (FEW_TILES, FOREVER):
        used = read_by_backward(bounds, stages, slim, memo, most)
        state = _lowering(bounds, stages, slim, used, True, memo)
        forward = state.lower()
        back = BackwardCount(state) if isinstance(state, ForwardCount) else BackwardLowering(state)
        with suppress(NotKept):
            backward = back.lower()
        if back.used <= used:
            break
    size = state.builder.charged + back.builder.charged
    peak, macs = max(forward.peak, backward.peak), forward.macs + backward.macs
    return Candidate(schedule, bounds, forward, backward, state, peak, macs, size)


def _lowering(
    bounds: Bounds, stages: Stages, schedule: Schedule, keep: Collection[int], streaming: bool, memo: Memo | None
) -> ForwardLowering:
    if memo is None:
        return ForwardLowering(bounds, stages, schedule, keep, streaming)
    return ForwardCount(bounds, stages, schedule, keep, streaming, memo)


def read_by_backward(
    bounds: Bounds, stages: Stages, schedule: Schedule, memo: Memo | None, most: int
) -> frozenset[int]:
    """Values of the forward program that backward reads: the same for any number of steps, so found with one.

    `most`: tiles along an axis; with few of them a value may be missing which some tile between them reads.
    """
    one = replace(schedule, steps=min(1, schedule.steps), tiles=tuple(min(n, most) for n in schedule.tiles))
    known = memo if memo is not None else Memo()
    if one not in known.used:
        everything = {v for n in bounds.graph.nodes for v in n.outputs}
        state = ForwardCount(bounds, stages, one, everything, False, known)
        state.lower()
        backward = BackwardCount(state)
        backward.lower()
        known.used[one] = frozenset(backward.used)
    return known.used[one]


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
    """Schedules to begin with: what the user fixed (for tiles without a size, ever more of them), or one slide."""
    return [replace(s, disk=options.disk) for s in _starting(graph, axes, options)]


def _starting(graph: Graph, axes: Sequence[Axis], options: Options) -> list[Schedule]:
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
        counts = [max(1, -(-input_size(graph, a) // r)) for a, r in zip(axes, options.regions, strict=False)]
        counts += [1] * (len(axes) - len(counts))
        if options.schedule == "tile":
            return [Schedule(0, tuple(counts))]
        return [Schedule(max(1, counts[0]), (1, *counts[1:]), grain=False)]
    steps = min(base_steps(graph, axes[0]), options.most_steps)
    limit = max(1, input_size(graph, axes[0]) // 2)
    if options.schedule == "tile":
        return [Schedule(0, (*[n] * min(2, len(axes)), *ones[2:])) for n in _counts(limit)]
    slide = Schedule(min(steps, limit), tuple(ones))
    if options.schedule is None and not options.disk and axes[0].periods is not None:
        return [slide, *(Schedule(0, (n, *ones[1:])) for n in _counts(limit)[1:])]  # a circle is cut in tiles
    return [slide]


def _counts(limit: int) -> list[int]:
    """Tiles along an axis: ever more of them, up to MOST_TILES."""
    return [1 << k for k in range(MOST_TILES.bit_length()) if 1 << k <= min(MOST_TILES, limit)]


def _structural(graph: Graph, best: Candidate, training: bool) -> Iterator[Schedule]:
    """Schedules that compute a value again instead of holding it, or cut the binding sweep in two."""
    schedule, level, state = best.schedule, best.binding, best.lowering
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


def _ladder(best: Candidate) -> list[dict[int, int]]:
    """Holds that trade multiply-adds for memory, where several sweeps read what earlier ones made.

    From the least extra work on. For each of the largest sizes of stored values: those that can be computed again
    from others that are in memory anyway; all of that size from what is smaller, which is then held as long as it
    serves; and both together.
    """
    stages, stored, graph = best.lowering.stages, best.lowering.demand.stored, best.bounds.graph
    free = {v: last for v, last in stored.items() if v not in stages.whole_reads}
    home = {v: stages.level[stages.producer[v]] for v in free}
    cheap = {v for v, last in free.items() if all(free.get(u, FOREVER) >= last for u in _sources(best, v))}
    sizes = sorted({graph.values[v].nbytes for v in free}, reverse=True)[:3]
    found: list[dict[int, int]] = []
    for x in (None, *sizes):
        for y in (None, *sizes):
            if (x is None and y is None) or (x is not None and y is not None and y >= x):
                continue
            large = {v for v in free if x is not None and graph.values[v].nbytes >= x}
            lean = {v for v in cheap if y is not None and graph.values[v].nbytes >= y}
            rest = dict.fromkeys(free, FOREVER) if x is not None else {}
            found.append(rest | {v: home[v] for v in large | lean})
    return [holds for k, holds in enumerate(found) if holds and holds not in found[:k]]


def _sources(best: Candidate, v: int) -> set[int]:
    """Stored values from which v is computed."""
    stages, stored, graph = best.lowering.stages, best.lowering.demand.stored, best.bounds.graph
    found: set[int] = set()
    todo, seen = [v], {v}
    while todo:
        for u in graph.nodes[stages.producer[todo.pop()]].inputs:
            p = stages.producer.get(u)
            if p is None or stages.kind[p] != REGIONAL or u in seen:
                continue
            seen.add(u)
            if u in stored:
                found.add(u)
            else:
                todo.append(u)
    return found


def _cut_positions(graph: Graph, best: Candidate) -> list[int]:
    """One position in each eighth of the binding sweep's operators: where the fewest bytes cross."""
    stages = best.lowering.stages
    nodes = [k for k in best.lowering.demand.sweeps[best.binding].nodes if stages.kind[k] == REGIONAL]
    if len(nodes) < 4:
        return []
    last: dict[int, int] = {}
    for k, node in enumerate(graph.nodes):
        for v in node.inputs:
            last[v] = k
    weights = {k: sum(graph.values[v].nbytes for v in graph.nodes[k].outputs) for k in nodes}
    found: dict[int, tuple[int, int]] = {}
    for n, k in enumerate(nodes[:-1]):
        over = sum(weights[j] for j in nodes if j <= k and any(last.get(v, -1) > k for v in graph.nodes[j].outputs))
        part = 8 * n // len(nodes)
        if k + 1 not in best.schedule.cuts:
            found[part] = min(found.get(part, (over, k + 1)), (over, k + 1))
    return [position for _, position in found.values()]


def with_margin(peak: int) -> int:
    """Projected bytes: the peak counted while lowering, and a little for what is not counted (small tensors)."""
    return int(peak * MARGIN) + 4096


def _coarse(schedule: Schedule) -> Schedule:
    return replace(schedule, steps=min(schedule.steps, COARSE_STEPS))


class Counted:
    """Schedules of one graph that were counted: the searches that follow one another meet the same ones."""

    def __init__(self) -> None:
        """None yet."""
        self.memo = Memo()
        self.candidates: dict[Schedule, Candidate] = {}


class Search:
    """Greedy descent of the peak: what is held and where sweeps end is chosen on few steps, then regions shrink."""

    def __init__(self, graph: Graph, axes: Sequence[Axis], options: Options, training: bool, counted: Counted) -> None:
        """`counted`: schedules of this graph whose bytes are known."""
        self.counted = counted
        self.graph, self.axes, self.options, self.training = graph, axes, options, training
        self.work = 0
        self.best: Candidate | None = None

    def fits(self, found: Candidate) -> bool:
        """Within the budget, or no budget."""
        return self.options.allowed is None or with_margin(found.peak) <= self.options.allowed

    def lower(self, schedule: Schedule) -> Candidate:
        """A candidate, counted in the work."""
        if schedule not in self.counted.candidates:
            found = lower(self.graph, self.axes, schedule, self.training, self.counted.memo)
            self.counted.candidates[schedule] = found
        self.work += self.counted.candidates[schedule].size
        return self.counted.candidates[schedule]

    def attempt(self, schedule: Schedule) -> bool:
        """Lower a schedule in full; True where it fits. The best so far is kept."""
        found = self.lower(schedule)
        if self.best is None or found.profile < self.best.profile:
            self.best = found
        return self.fits(found)

    def run(self) -> Candidate:
        """The first schedule within the budget, or the least found."""
        for schedule in starting(self.graph, self.axes, self.options):
            if self.attempt(schedule):
                break
        assert self.best is not None
        if not self.axes:
            _ = self.fits(self.best) or self._halve()
        elif not self.fits(self.best):
            _ = self._halve() or self._remake() or self._shrink(self.best.schedule, 1) or self._rounds()
        return self.best

    def _rounds(self) -> bool:
        """Moves, and shorter steps from the best so far on, as long as they help: what is held shows on short steps."""
        while True:
            before = self.best
            if self._climb() or self._descend():
                return True
            assert self.best is not None
            if self._shrink(self.best.schedule, 4):
                return True
            if self.best is before or self.work >= FURTHER_WORK:
                return False

    def _halve(self) -> bool:
        """Shorter and shorter chunks inside of operators that run whole; True where the budget is met."""
        while self.best is not None and self.best.binds_chunked and self.work < SEARCH_WORK:
            schedule = replace(self.best.schedule, halvings=self.best.schedule.halvings + 1)
            before = self.best
            if chunked(halved(self.graph, schedule.halvings)) == chunked(before.bounds.graph):
                return False
            if self.attempt(schedule):
                return True
            if self.best is before:
                return False
        return False

    def _remake(self) -> bool:
        """Weights that forward computes made again at each step; True where the budget is met."""
        assert self.best is not None
        if not self.best.lowering.stages.weights:
            return False
        return self.attempt(replace(self.best.schedule, remake=True))

    def _near(self, rough: Candidate) -> bool:
        """Whether more steps may bring a candidate on few steps into the budget."""
        return self.options.allowed is None or rough.peak <= COARSE_SLACK * self.options.allowed

    def _finer(self, schedule: Schedule) -> Schedule | None:
        """Half the step, while that makes sense; then columns."""
        if self.options.regions is not None:
            return None
        if schedule.slides and schedule.steps * 2 <= min(
            256, self.options.most_steps, input_size(self.graph, self.axes[0]) // 2
        ):
            return replace(schedule, steps=schedule.steps * 2)
        if len(self.axes) > 1 and schedule.tiles[1] < 8:
            return replace(schedule, tiles=(schedule.tiles[0], schedule.tiles[1] * 2, *schedule.tiles[2:]))
        return None

    def _shrink(self, schedule: Schedule, times: int) -> bool:
        """Smaller and smaller regions; True where the budget is met."""
        for _ in range(times):
            finer = self._finer(schedule)
            if finer is None or self.work >= SEARCH_WORK:
                return False
            if self.attempt(finer):
                return True
            schedule = finer
        return False

    def _climb(self) -> bool:
        """Ever more computed again, from the least on, as long as it saves memory; True where the budget is met."""
        assert self.best is not None
        start = self.best
        if self.training or not start.lowering.demand.stored:
            return False
        lowest = self.lower(_coarse(start.schedule)).peak
        finest = self._finer(start.schedule) or start.schedule
        least: Candidate | None = None
        for holds in _ladder(start):
            if self.work >= SEARCH_WORK:
                break
            held = tuple(sorted(holds.items()))
            rough = self.lower(_coarse(replace(start.schedule, holds=held)))
            if rough.peak >= lowest:
                continue
            lowest, least = rough.peak, rough
            hopeful = self._near(rough) and self._between(rough) <= (self.options.allowed or 0)
            if hopeful and self.attempt(replace(finest, holds=held)):
                return True
        return least is not None and self.attempt(replace(least.schedule, steps=finest.steps))

    def _between(self, found: Candidate) -> int:
        """Bytes that wait in memory between two sweeps, at the worst: no step size changes them."""
        stages, stored = found.lowering.stages, found.lowering.demand.stored
        homes = {v: stages.level[stages.producer[v]] for v in stored}
        return max(
            sum(self.graph.values[v].nbytes for v, last in stored.items() if homes[v] <= at < last)
            for at in range(len(stages.levels))
        )

    def _descend(self) -> bool:
        """The best structural move, again and again, judged on few steps; True where the budget is met."""
        assert self.best is not None
        steps = self.best.schedule.steps
        state = self.best if steps <= COARSE_STEPS else self.lower(_coarse(self.best.schedule))
        moved = False
        while self.work < SEARCH_WORK:
            chosen = state
            for schedule in _structural(self.graph, state, self.training):
                if self.work >= SEARCH_WORK:
                    break
                found = self.lower(schedule)
                if found.profile < chosen.profile:
                    chosen = found
            if chosen is state:
                break
            state, moved = chosen, True
            fine = replace(state.schedule, steps=steps)
            if self._near(state) and (self.attempt(fine) or self._shrink(fine, 1)):
                return True
        return moved and self.attempt(replace(state.schedule, steps=steps))


def search(
    graph: Graph, axes: Sequence[Axis], options: Options, training: bool, counted: Counted | None = None
) -> Candidate:
    """The first schedule within the budget, or the best found: counted, not written."""
    return Search(graph, axes, options, training, counted or Counted()).run()


class Untouched(Protocol):
    """What the network takes when it is called as it is, outputs not counted; None where that cannot be told."""

    def bound(self) -> int | None:
        """Bytes at most, found without running anything."""

    def counted(self, enough: int, most: int) -> int | None:
        """The same as closely as can be, down to `enough`; None where it certainly is more than `most`, too."""


@resting()
def make_plan(graph: Graph, options: Options, training: bool, untouched: Untouched | None = None) -> Planned:
    """Plan and programs for a graph; raises BudgetError where nothing fits.

    `untouched`: the network as it is: where it needs the fewest bytes, it is called so.
    """
    axes = find_axes(graph)
    if not options.disk and options.schedule != "tile":  # files are read and written by rows
        axes, regions = slide_first(graph, axes, options.regions)
        options = replace(options, regions=regions)
    known = Counted()
    cut = best = _chosen(graph, axes, options, training, known)
    whole = lower(unchunked(graph), [], Schedule(0, ()), training)
    if options.free and whole.peak <= best.peak:
        best = replace(whole, schedule=Schedule(0, (1,) * len(axes)))
    projected = with_margin(best.peak)
    fits = options.allowed is None or projected <= options.allowed
    one = best is not cut or (best.schedule.steps <= 1 and set(best.schedule.tiles) <= {1})
    told = untouched.bound() if untouched is not None and (training or one or not fits) else None
    usual = min(FOREVER if told is None else told, max(whole.peak, _saved(graph) if training else 0))
    looser = LOOSER if one and training and options.allowed is None else 1.0
    counted = _as_it_is(untouched, told, options, fits, projected, looser)
    as_it_is = counted is not None and (fits or counted <= (options.allowed or 0))
    if counted is not None and as_it_is:
        best, projected = replace(whole, schedule=Schedule(0, (1,) * len(axes))), counted
    if options.allowed is not None and projected > options.allowed:
        least, found = _least(graph, axes, options, training, best, known)
        if counted is not None and counted <= least:
            least, found = counted, whole
        raise _too_small(graph, options.allowed, min(with_margin(whole.peak), counted or FOREVER), least, found)
    if best is cut and options.allowed is not None:
        best = cut = lower(graph, axes, best.schedule, training)
    follow = partial(
        check, best.bounds.graph, best.forward, best.backward, _periods(best.bounds), options.disk and best is cut
    )
    follow()

    def described(found: Candidate) -> Plan:
        programs = found.forward, found.backward
        lowered = found.bounds.graph, axes, found.schedule, found.lowering
        return describe(*lowered, *programs, options.allowed, projected, usual)

    plan = described(best)
    if best is not cut:
        plan = in_one(plan, described(cut), as_it_is)
    return Planned(replace(plan, follow=follow), best.forward, best.backward, best.bounds.graph, as_it_is)


def _chosen(graph: Graph, axes: Sequence[Axis], options: Options, training: bool, known: Counted) -> Candidate:
    """What a search finds, counted; where no budget is stated the first schedule, written at once."""
    if options.allowed is not None:
        return search(graph, axes, options, training, known)
    return lower(graph, axes, starting(graph, axes, options)[0], training)


def _periods(bounds: Bounds) -> dict[int, tuple[int, int]]:
    """Of values on the axis that goes round: dimension, and rows after which it repeats."""
    if bounds.circle is None:
        return {}
    axis = bounds.axes[bounds.circle]
    return {v: (axis.dims[v], period) for v, period in (axis.periods or {}).items()}


def _as_it_is(
    untouched: Untouched | None, told: int | None, options: Options, fits: bool, projected: int, looser: float
) -> int | None:
    """Bytes that the network takes as it is, where it is to be called so or nothing else fits: counted, not bounded."""
    if untouched is None or told is None or not options.free:
        return None
    if not fits:
        return untouched.counted(options.allowed or 0, projected)
    return untouched.counted(0, FOREVER) if with_margin(told) <= looser * projected else None


def _least(
    graph: Graph, axes: Sequence[Axis], options: Options, training: bool, best: Candidate, counted: Counted
) -> tuple[int, Candidate]:
    """The least budget found that a search meets when it is given just that."""
    least = with_margin(best.peak)
    if best.bounds.axes == ():
        return least, best
    for _ in range(3):
        found = search(graph, axes, replace(options, allowed=least), training, counted)
        if with_margin(found.peak) <= least:
            return least, found
        least = with_margin(found.peak)
    first = search(graph, axes, options.without_budget(), training, counted)
    return with_margin(first.peak), first


def _saved(graph: Graph) -> int:
    """Activations that plain autograd keeps: every member's output of every differentiable node."""
    return sum(
        graph.values[v].nbytes * getattr(n.kernel, "members", 1)
        for n in graph.nodes
        for v in n.outputs
        if graph.values[v].differentiable
    )


def _too_small(graph: Graph, allowed: int, whole: int, least: int, best: Candidate) -> BudgetError:
    binding = best.worst.binding
    node = binding.node
    if node < 0 and binding.value >= 0:
        node = best.lowering.stages.producer.get(binding.value, -1)
    name = graph.nodes[node].name if node >= 0 else "the input"
    where = graph.nodes[node].where if node >= 0 else ""
    place = f"{name} ({where})" if where else name
    nothing = "" if least < whole else " Cutting it into regions gains nothing below what it needs in one piece."
    return BudgetError(
        f"{graph.name} does not fit in {format_bytes(allowed)} ({allowed} bytes): the least that a plan needs for this "
        f"input is {format_bytes(least)} ({least} bytes), bound by {place}.{nothing} Allow {least} bytes, or use a "
        "smaller input.",
        allowed=allowed,
        least=least,
        binding=place,
    )
