"""About how long a program will take: kernels timed on one region of each sweep, on made-up values, times the regions.

Nothing of the input is read. Enter at `expected_seconds`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ranger_nn.core.graph import Graph
from ranger_nn.core.program import LIFT, RUN, Instruction, Program
from ranger_nn.torch.engine import FORMATS, TorchEngine

TURNS = 2
"""Calls of a kernel: the first one makes ready, the fastest counts."""
BETWEEN = 30e-6
"""Seconds of the loop between two kernels (`benchmarks.loop_overhead`)."""


def expected_seconds(graph: Graph, program: Program, externals: Sequence[Tensor | None], device: torch.device) -> float:
    """Seconds of kernels, of joins of rows, and of the loop between them, without files.

    Args:
        graph: the network.
        program: what would run.
        externals: parameters and constants in the program's order, None for the input.
        device: where kernels run.
    """
    given = {slot: t for slot, t in zip(program.external.values(), externals, strict=True) if t is not None}
    regions: dict[int, dict[int, list[Instruction]]] = {}
    for i in program.instructions:
        regions.setdefault(i.sweep, {}).setdefault(i.region, []).append(i)
    engine = TorchEngine(graph, device)
    with torch.no_grad():
        return sum(_sweep(engine, list(found.values()), given) for found in regions.values())


def _sweep(engine: TorchEngine, regions: list[list[Instruction]], given: dict[int, Tensor]) -> float:
    """The fullest region in the middle stands for all; bytes tell how much of it each of the others is."""
    sizes = [sum(r.nbytes for i in region for r in i.reads) for region in regions]
    middle = sorted(range(len(regions)), key=lambda k: (sizes[k], -abs(2 * k - len(regions))))[-1]
    taken = sum(BETWEEN + _instruction(engine, i, given) for i in regions[middle])
    return taken * sum(sizes) / max(1, sizes[middle])


def _instruction(engine: TorchEngine, i: Instruction, given: dict[int, Tensor]) -> float:
    if i.op not in (RUN, LIFT) or any(not r.parts for r in i.reads):
        return 0.0
    inputs = engine.graph.nodes[i.node].inputs
    joined = [(n, r) for n, r in enumerate(i.reads) if len(r.parts) > 1]
    arguments = [_made(engine, v, r, given) for v, r in zip(inputs, i.reads)]
    function = engine.bind(i)
    try:
        taken = _timed(partial(function, *arguments), engine.device)
    except RuntimeError:  # values that a kernel cannot take, such as indices: leave it out
        return 0.0
    for n, r in joined:
        taken += _timed(partial(torch.cat, arguments[n].tensor_split(2, r.dim), r.dim), engine.device)
    return taken


def _made(engine: TorchEngine, v: int, read: Any, given: dict[int, Tensor]) -> Tensor:
    """The parameter that is read, or zeros of the region's shape (which are no slower than other numbers)."""
    if len(read.parts) == 1 and read.parts[0][0] in given:
        x = given[read.parts[0][0]]
        for dim, start, length in read.parts[0][1]:
            x = x.narrow(dim, start, length)
        return x
    value, shape = engine.graph.values[v], [hi - lo for lo, hi in read.box]
    x = torch.zeros(shape, dtype=getattr(torch, value.dtype), device=engine.device)
    return x.contiguous(memory_format=FORMATS[len(shape)]) if value.layout and len(shape) in FORMATS else x


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    best = float("inf")
    for _ in range(TURNS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
