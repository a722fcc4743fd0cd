"""What a plan tells: a frozen record, its table, its JSON. The plot is in `planning/plot.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

from ranger_nn.bounds.axes import SPATIAL, Axis
from ranger_nn.checking.check import Checked
from ranger_nn.core.graph import Graph
from ranger_nn.core.program import Program
from ranger_nn.errors import PlanError
from ranger_nn.planning.budget import format_bytes
from ranger_nn.planning.forward import ForwardLowering, Schedule
from ranger_nn.planning.lost import lost
from ranger_nn.planning.plot import plot
from ranger_nn.planning.stages import PROLOGUE


@dataclass(frozen=True)
class SweepRow:
    """One line of the table: `region` in elements of the sweep's largest result, `projected` in bytes; `checkpoint`: steps
    from one checkpoint to the next, 0 where there are none.
    """

    sweep: int
    operators: int
    schedule: str
    regions: int
    region: str
    halo: str
    stored: int
    projected: int
    checkpoint: int = 0


@dataclass(frozen=True)
class Plan:
    """How a network will be run. Bytes are int; `extra_macs` 0.03 means 3 % of the work is done twice; `axes`: those that are
    cut, the one that is slid along first; `again`: values that are made again for a late reader in place of being kept;
    `whole`: operators that see whole values, and what was lost by each; `uncut`: operators that are not cut for their sake.
    """

    model: str
    training: bool
    allowed: int | None
    projected: int
    untouched: int
    extra_macs: float
    axes: tuple[str, ...]
    steps: int
    tiles: tuple[int, ...]
    sweeps: tuple[SweepRow, ...]
    whole: tuple[str, ...]
    timeline: tuple[int, ...] = ()
    again: tuple[str, ...] = ()
    uncut: int = 0
    follow: Callable[[], Checked] | None = field(default=None, repr=False, compare=False)

    def check(self) -> Checked:
        """Follow the plan's programs once more on fingerprints, as was done before it was handed out; see `ranger_nn.checking`.

        Gives what was done: instructions followed, regions held to what their operator asks for, results found complete,
        bytes held at most.

        Raises:
            PlanError: the plan is damaged, or was read from JSON and has no programs.
        """
        if self.follow is None:
            raise PlanError(
                f"{self.model}: this plan was read from JSON, which holds what a plan says and not its programs: call "
                "ranger_nn.plan on the model and check that."
            )
        return self.follow()

    def __str__(self) -> str:
        """The table."""
        return table(self)

    def to_json(self) -> str:
        """JSON text; `from_json` reads it back."""
        return json.dumps(asdict(replace(self, follow=None)))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """A plan from `to_json`'s text."""
        data = json.loads(text)
        data["sweeps"] = tuple(SweepRow(**row) for row in data["sweeps"])
        data.pop("follow", None)
        for key in ("axes", "tiles", "whole", "timeline", "again"):
            data[key] = tuple(data[key])
        return cls(**data)

    def plot(self, path: str) -> None:
        """Memory over the steps, with the untouched network's peak and the allowed line, as a picture."""
        plot(self.model, self.timeline, self.untouched, self.allowed, path)


def table(plan: Plan) -> str:
    """Human text of a plan."""
    mode = "training" if plan.training else "inference"
    usual = any(names[: len(plan.axes)] == plan.axes for names in SPATIAL.values())
    along = "" if usual else f" along {', '.join(plan.axes)}"
    lines = [f"{plan.model}, {mode}: {len(plan.sweeps)} sweeps{along}"]
    allowed = format_bytes(plan.allowed) if plan.allowed is not None else "not stated"
    lines.append(
        f"allowed {allowed}   projected {format_bytes(plan.projected)}   untouched about {format_bytes(plan.untouched)}"
        f"   extra multiply-adds {plan.extra_macs:.1%}"
    )
    head = ("sweep", "operators", "schedule", "regions", "region", "halo", "stored", "projected")
    rows = [
        (
            str(r.sweep),
            str(r.operators),
            r.schedule,
            str(r.regions),
            r.region,
            r.halo,
            format_bytes(r.stored),
            format_bytes(r.projected),
        )
        for r in plan.sweeps
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines += ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in (head, *rows)]
    lines += [
        f"sweep {r.sweep}: a checkpoint every {r.checkpoint} steps; backward runs each segment forward once more"
        for r in plan.sweeps
        if r.checkpoint
    ]
    lines += plan.again
    if plan.whole:
        lines.append("stayed whole:")
        lines += [f"  {w}" for w in plan.whole]
    return "\n".join(lines)


def describe(
    graph: Graph,
    axes: Sequence[Axis],
    schedule: Schedule,
    lowering: ForwardLowering,
    forward: Program,
    backward: Program | None,
    allowed: int | None,
    projected: int,
    untouched: int,
) -> Plan:
    """The record of a lowered schedule."""
    stages = lowering.stages
    peaks: dict[int, int] = {}
    for program in (forward, backward):
        for at, peak in program.peaks.items() if program else ():
            peaks[at] = max(peaks.get(at, 0), peak)
    rows = []
    bounds = lowering.bounds
    for at, sweep in enumerate(lowering.demand.sweeps):
        if not sweep.nodes:
            continue
        stored = sum(graph.values[v].nbytes for v in sweep.sinks if v not in graph.outputs)
        kind = ("slide" if lowering.slide is not None else "tile") + (
            " + tile" if lowering.slide is not None and lowering.tile_axes else ""
        )
        results = sorted(
            sweep.sinks or {graph.nodes[k].inputs[0] for k in sweep.nodes}, key=lambda v: -graph.values[v].nbytes
        )
        region, halo, count = [], [], 1
        for a, axis in enumerate(bounds.axes):
            parts = lowering.schedule.steps if a == lowering.slide else lowering.schedule.tiles[a]
            count *= parts
            size = (
                graph.values[results[0]].shape[axis.dims[results[0]]]
                if results and results[0] in axis.dims
                else axis.size
            )
            region.append(str(-(-size // max(1, parts))))
            halo.append("0" if a == lowering.slide else str(_halo(lowering, sweep.nodes, a)))
        rows.append(
            SweepRow(at, len(sweep.nodes), kind, count, "x".join(region), "x".join(halo), stored, peaks.get(at, 0))
        )
    after = lost(graph, stages, bounds.axes)
    reasons = {**{k: graph.nodes[k].rule.reason for k in after if not axes}, **stages.reasons}
    whole = [_whole(graph, k, reason, len(after.get(k, ()))) for k, reason in sorted(reasons.items()) if reason]
    if not axes and not stages.reasons:
        whole.insert(0, "everything: no axis along which the network can be cut")
    work = graph.macs()
    plain = work * (3 if backward is not None else 1)
    done = forward.macs + (backward.macs if backward is not None else 0)
    extra = max(0.0, done / plain - 1) if plain else 0.0
    timeline = [i.live for program in (forward, backward) for i in (program.instructions if program else [])]
    stride = max(1, len(timeline) // 400)
    samples = tuple(max(timeline[n : n + stride]) for n in range(0, len(timeline), stride))
    return Plan(
        graph.name,
        backward is not None,
        allowed,
        projected,
        untouched,
        round(extra, 6),
        tuple(a.name for a in bounds.axes),
        lowering.schedule.steps,
        lowering.schedule.tiles,
        tuple(rows),
        tuple(whole),
        samples,
        _made_again(graph, lowering),
        len(set().union(*after.values())),
    )


def in_one(plan: Plan, cut: Plan, as_it_is: bool) -> Plan:
    """The plan of one region, with what stayed whole in the one by regions that it needs no more than, `cut`.

    `as_it_is`: the network is called itself, and no region is made.
    """
    said = ("everything: the network is called as it is, and needs no more than by regions",) if as_it_is else ()
    found = replace(plan, whole=(*said, *cut.whole), uncut=cut.uncut)
    return replace(found, sweeps=(), timeline=(plan.projected,), extra_macs=0.0, again=()) if as_it_is else found


def _whole(graph: Graph, k: int, reason: str, after: int) -> str:
    """One line of what stayed whole: the operator, why, its bytes, and what was lost by it."""
    node = graph.nodes[k]
    size = format_bytes(sum(graph.values[v].nbytes for v in node.outputs))
    place = f"{node.name} ({node.where})" if node.where else node.name
    rest = f"; {after} operator{'s' * (after != 1)} after it {'are' if after != 1 else 'is'} not cut" if after else ""
    return f"{place}: {reason}; {size}{rest}"


def _made_again(graph: Graph, lowering: ForwardLowering) -> tuple[str, ...]:
    """What is said of weights that are made again at each step."""
    remade = [v for v in lowering.remade.producer if _read_by_others(graph, lowering, v)]
    size = format_bytes(sum(graph.values[v].nbytes for v in remade))
    said = f"made again wherever they are read: {len(remade)} weights that forward computes, {size} not held"
    return (said,) if remade else ()


def _read_by_others(graph: Graph, lowering: ForwardLowering, v: int) -> bool:
    producers = lowering.stages.weights
    return any(v in node.inputs for k, node in enumerate(graph.nodes) if k not in producers)


def _halo(lowering: ForwardLowering, nodes: Sequence[int], axis: int) -> int:
    """Indices that a middle tile reads beyond its share of the sweep's largest input."""
    bounds, graph = lowering.bounds, lowering.graph
    total = 0
    for k in nodes:
        if lowering.stages.kind[k] == PROLOGUE:
            continue
        for i, v in enumerate(graph.nodes[k].inputs):
            d = bounds.dim(v, axis)
            link = graph.nodes[k].rule.links[i][d] if d is not None else None
            if link is not None:
                total += link.reach.halo
    return total
