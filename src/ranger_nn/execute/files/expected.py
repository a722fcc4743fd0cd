"""About how long a program will take: kernels timed on one region of each sweep, on made-up values, times the regions.

Nothing of the input is read. Enter at `expected_seconds`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ranger_nn.core.graph import Graph
from ranger_nn.core.program import LIFT, RUN, STEP, Instruction, Program, Read
from ranger_nn.execute.files.framework import Framework, Tensor

TURNS = 2
"""Calls of a kernel: the first one makes ready, the fastest counts."""
BETWEEN = 30e-6
"""Seconds of the loop between two kernels (`benchmarks.loop_overhead`)."""


def expected_seconds(graph: Graph, program: Program, framework: Framework) -> float:
    """Seconds of kernels, of joins of rows, and of the loop between them, without files.

    Args:
        graph: the network.
        program: what would run.
        framework: what it would run on.
    """
    regions: dict[int, dict[int, list[Instruction]]] = {}
    for i in program.instructions:
        regions.setdefault(i.sweep, {}).setdefault(i.region, []).append(i)
    timer = _Timer(graph, program, framework)
    with framework.quiet():
        return sum(timer.sweep(list(found.values())) for found in regions.values())


class _Timer:
    """Kernels of one program, timed."""

    def __init__(self, graph: Graph, program: Program, framework: Framework) -> None:
        self.graph, self.framework, self.engine = graph, framework, framework.engine
        pairs = zip(program.external.values(), framework.externals(), strict=True)
        self.given = {slot: t for slot, t in pairs if t is not None}

    def sweep(self, regions: list[list[Instruction]]) -> float:
        """The fullest region in the middle stands for all; bytes tell how much of it each of the others is."""
        sizes = [sum(r.nbytes for i in region for r in i.reads) for region in regions]
        middle = sorted(range(len(regions)), key=lambda k: (sizes[k], -abs(2 * k - len(regions))))[-1]
        taken = sum(BETWEEN + self._instruction(i) for i in regions[middle])
        return taken * sum(sizes) / max(1, sizes[middle])

    def _instruction(self, i: Instruction) -> float:
        if i.op == STEP:
            step = self.engine.bind(i)
            return self._timed(lambda: step(*self.framework.step_stand_ins(i)))  # windows are used up
        if i.op not in (RUN, LIFT) or any(not r.parts for r in i.reads):
            return 0.0
        inputs = self.graph.nodes[i.node].inputs
        arguments = [self._made(v, r) for v, r in zip(inputs, i.reads)]
        function = self.engine.bind(i)
        try:
            taken = self._timed(partial(function, *arguments))
        except RuntimeError:  # values that a kernel cannot take, such as indices: leave it out
            return 0.0
        for x, r in zip(arguments, i.reads):
            if len(r.parts) > 1:
                taken += self._joined(x, r.dim)
        return taken

    def _joined(self, x: Tensor, dim: int) -> float:
        half = x.shape[dim] // 2
        parts = [
            self.engine.narrow(x, dim, 0, x.shape[dim] - half),
            self.engine.narrow(x, dim, x.shape[dim] - half, half),
        ]
        return self._timed(partial(self.engine.join, parts, dim))

    def _made(self, v: int, read: Read) -> Tensor:
        """The parameter that is read, or zeros of the region's shape (which are no slower than other numbers)."""
        if len(read.parts) == 1 and read.parts[0][0] in self.given:
            x = self.given[read.parts[0][0]]
            for dim, start, length in read.parts[0][1]:
                x = self.engine.narrow(x, dim, start, length)
            return x
        return self.framework.stand_in(self.graph.values[v], [hi - lo for lo, hi in read.box])

    def _timed(self, work: Callable[[], Any]) -> float:
        best = float("inf")
        for _ in range(TURNS):
            start = time.perf_counter()
            work()
            self.framework.wait()
            best = min(best, time.perf_counter() - start)
        return best
