"""What forward saves for backward: the rows by which windows move on, and windows as checkpoints.

    window of a value, kept rows         [ . . . . . . | . . . ]
    one step on, `block` new rows              [ . . . | . . . | + + + ]     saved: + + +
    its window again                     the last `kept` rows of `parts` blocks

Enter at `Saved` and `Checkpoints`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras import ops

from ranger_nn.core.graph import Graph
from ranger_nn.keras.loops import Block, Loops
from ranger_nn.keras.pieces import cut
from ranger_nn.planning.rolled import Flow


def block(graph: Graph, flow: Flow, rows: int) -> Block:
    """So many rows of a value."""
    value = graph.values[flow.value]
    return tuple(rows if d == flow.dim else n for d, n in enumerate(value.shape)), value.dtype


class Saved:
    """New rows of the windows of `flows`, step by step. Values whose windows are as many blocks long share a stack."""

    def __init__(self, graph: Graph, flows: Sequence[Flow], on: Loops) -> None:
        self.graph, self.flows, self.on = graph, flows, on
        packs: dict[int, list[int]] = {}
        for n, flow in enumerate(flows):
            packs.setdefault(flow.parts, []).append(n)
        self.packs = sorted(packs.items())
        self.blocks = [[block(graph, flows[n], flows[n].block) for n in members] for _, members in self.packs]

    def open(self, steps: int) -> list[Any]:
        """Room for what so many steps save: the blocks of the windows before them, then those of each."""
        return [self.on.stack(steps + parts, like) for (parts, _), like in zip(self.packs, self.blocks, strict=True)]

    def add(self, stacks: Sequence[Any], since: Any, windows: Sequence[Any]) -> list[Any]:
        """The windows after step `since`, counted from the first that is saved."""
        return [
            self.on.push(stack, since + parts, [self._last(n, windows[n]) for n in members])
            for stack, (parts, members) in zip(stacks, self.packs, strict=True)
        ]

    def _last(self, n: int, window: Any) -> Any:
        flow = self.flows[n]
        return cut(window, flow.dim or 0, flow.kept - flow.block, flow.block)

    def begin(self, stacks: Sequence[Any], windows: Sequence[Any]) -> list[Any]:
        """The windows before the first step."""
        found = []
        for stack, (parts, members) in zip(stacks, self.packs, strict=True):
            whole = [self._padded(self.flows[n], windows[n]) for n in members]
            for part in range(parts):
                flows = [self.flows[n] for n in members]
                now = [cut(w, f.dim or 0, part * f.block, f.block) for w, f in zip(whole, flows, strict=True)]
                stack = self.on.push(stack, part, now)
            found.append(stack)
        return found

    def _padded(self, flow: Flow, window: Any) -> Any:
        """As many rows as its blocks have, the first of them zero."""
        more = flow.parts * flow.block - flow.kept
        if not more:
            return window
        return ops.concatenate([self.on.zeros(*block(self.graph, flow, more)), window], axis=flow.dim or 0)

    def windows(self, stacks: Sequence[Any], at: Any) -> list[Any]:
        """All windows `at` steps after the first."""
        found: list[Any] = [None] * len(self.flows)
        for stack, like, (parts, members) in zip(stacks, self.blocks, self.packs, strict=True):
            read = [self.on.blocks(stack, at + part, like) for part in range(parts)]
            for n, blocks in zip(members, zip(*read, strict=True), strict=True):
                flow, dim = self.flows[n], self.flows[n].dim or 0
                joined = blocks[0] if parts == 1 else ops.concatenate(list(blocks), axis=dim)
                found[n] = cut(joined, dim, parts * flow.block - flow.kept, flow.kept)
        return found


class Checkpoints:
    """All windows at the beginning of each segment."""

    def __init__(self, graph: Graph, flows: Sequence[Flow], on: Loops) -> None:
        self.like, self.on = [block(graph, f, f.kept) for f in flows], on

    def open(self, segments: int) -> list[Any]:
        """Room for so many."""
        return [self.on.stack(segments, self.like)]

    def add(self, stacks: Sequence[Any], n: Any, windows: Sequence[Any]) -> list[Any]:
        """The windows before segment n."""
        return [self.on.push(stacks[0], n, windows)]

    def windows(self, stacks: Sequence[Any], n: Any) -> list[Any]:
        """Those windows."""
        return self.on.blocks(stacks[0], n, self.like)
