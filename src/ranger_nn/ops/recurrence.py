"""Recurrences: each step needs the state of the step before, so regions of time come in order.

    forward     x [0, c)  ->  x [c, 2c)  ->  ...  ->  x [.., T)        the state goes along: a slide
    backward    x [0, c)  <-  x [c, 2c)  <-  ...  <-  x [.., T)        its gradient comes back: the other way

An operator that need only go forward is local along time in a slide (`carried`). One that goes back, for a gradient
or because it reads its steps in reverse, runs whole, in chunks: only the states at the borders of chunks are kept, and
what lies inside of a chunk is computed again when its gradient is asked for. `chunk_length` weighs the two, `halved`
lets a budget make chunks shorter. See `design/0006`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isqrt
from typing import Any, Protocol

from ranger_nn.core.graph import Graph, Rule
from ranger_nn.core.reach import Link
from ranger_nn.ops.pointwise import Shape, opaque

CHUNK_BYTES = 8 << 20
"""Bytes of what one chunk computes: longer ones are no faster (`design/0006`)."""


class Chunked(Protocol):
    """A kernel that runs its operator in chunks of `chunk` of its `steps`; below `least` they save nothing."""

    chunk: int
    steps: int
    least: int

    @property
    def reason(self) -> str:
        """Why it runs whole, and in which chunks."""
        ...

    def with_chunk(self, chunk: int) -> Any:
        """The same with other chunks."""
        ...


def carried(shapes: Sequence[Shape], time: int) -> Rule:
    """Steps along dimension `time` of input 0 in order, samples apart, features and all other inputs whole."""
    row = (*(Link(d) for d in range(len(shapes[0]) - 1)), None)
    return Rule((row, *((None,) * len(s) for s in shapes[1:])), ordered=time)


def in_chunks(shapes: Sequence[Shape], reason: str) -> Rule:
    """All of every input, worked on in chunks inside."""
    return opaque(shapes, reason)


def least_chunk(steps: int, state: int, step: int) -> int:
    """The chunk that holds least: borders take steps/c * `state` bytes, the inside of a chunk c * `step`."""
    return max(1, min(steps, isqrt(steps * state // max(1, step))))


def chunk_length(steps: int, state: int, step: int) -> int:
    """Steps of a chunk: CHUNK_BYTES of inner values, or the chunk that holds least where that is longer."""
    return max(least_chunk(steps, state, step), min(steps, CHUNK_BYTES // max(1, step)), 1)


def chunked(graph: Graph) -> tuple[int, ...]:
    """Chunks of the operators that have them."""
    return tuple(n.kernel.chunk for n in graph.nodes if n.kernel.chunk)


def halved(graph: Graph, times: int) -> Graph:
    """The graph with all chunks `times` halved; the states kept at their borders grow in number."""
    return _rechunked(graph, lambda kernel: max(kernel.least, kernel.chunk >> times)) if times else graph


def unchunked(graph: Graph) -> Graph:
    """The graph with all steps in one chunk, as the untouched operator runs."""
    return _rechunked(graph, lambda kernel: kernel.steps)


def _rechunked(graph: Graph, choose: Callable[[Chunked], int]) -> Graph:
    values, nodes = list(graph.values), []
    for node in graph.nodes:
        if not node.kernel.chunk:
            nodes.append(node)
            continue
        kernel = node.kernel.with_chunk(choose(node.kernel))
        rule = replace(node.rule, reason=kernel.reason) if node.rule.reason else node.rule
        nodes.append(replace(node, kernel=kernel, rule=rule))
        for position in node.vjp_outputs:
            v = node.outputs[position]
            values[v] = replace(values[v], shape=(borders(kernel.steps, kernel.chunk), *values[v].shape[1:]))
    return replace(graph, values=tuple(values), nodes=tuple(nodes))


def borders(steps: int, chunk: int) -> int:
    """Borders between chunks."""
    return max(0, -(-steps // chunk) - 1)
