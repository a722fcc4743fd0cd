"""Weights that forward computes: standardised, normalised, summed of parts. They depend on parameters alone.

Plain execution makes each before its convolution and frees it behind it. Here a sweep runs its operators at every step, so
either its weights are held as long as it lasts (`sink`: made no earlier than the sweep that reads them), or each is made
again wherever it is read (`Remade`): more work, and no more memory than the largest of them. Enter at `made_of_parameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from ranger_nn.core.graph import CONSTANT, PARAMETER, Graph
from ranger_nn.planning.builder import Builder, Located
from ranger_nn.planning.stages import PROLOGUE, Stages


def made_of_parameters(graph: Graph, stages: Stages) -> set[int]:
    """Nodes that run whole and depend on parameters and constants alone, none of which this forward writes into."""
    written = {v for node in graph.nodes if node.random for v in node.inputs}
    known = {v.index for v in graph.values if v.kind in (PARAMETER, CONSTANT)} - written
    found = set()
    for k, node in enumerate(graph.nodes):
        plain = stages.kind[k] == PROLOGUE and not node.random and not node.kernel.chunk
        if plain and known.issuperset(node.inputs) and not set(node.outputs) & set(graph.outputs):
            found.add(k)
            known.update(node.outputs)
    return found


def sink(graph: Graph, stages: Stages) -> None:
    """Move each of these nodes down to the level of its first reader; `stages.weights` tells which they are."""
    nodes = stages.weights = made_of_parameters(graph, stages)
    first: dict[int, int] = {}
    for k in reversed(range(len(graph.nodes))):
        below = [first[v] for v in graph.nodes[k].outputs if v in first]
        if k in nodes and below and min(below) > stages.level[k]:
            stages.levels[stages.level[k]].prologue.remove(k)
            stages.level[k] = min(below)
            stages.levels[stages.level[k]].prologue.append(k)
        for v in graph.nodes[k].inputs:
            first[v] = min(first.get(v, stages.level[k]), stages.level[k])
    for level in stages.levels:
        level.prologue.sort()


Run = Callable[[Builder, int, Mapping[int, Located]], list[int]]
"""Writes the instruction that runs a node whole, reading its inputs from where they are; gives its slots."""


class Remade:
    """Values that are made where they are read, and freed right behind."""

    def __init__(self, graph: Graph, nodes: Collection[int], run: Run) -> None:
        """`nodes`: some of those of which `made_of_parameters` tells, with all that they need."""
        self.graph, self.run = graph, run
        self.producer = {v: k for k in nodes for v in graph.nodes[k].outputs}

    def lend(self, builder: Builder, values: Sequence[int], places: Mapping[int, Located]) -> dict[int, Located]:
        """Make those of `values` that are remade, from what `places` hold; to be given `back` when they were read."""
        if not self.producer:
            return {}
        wanted = {v for v in values if v in self.producer}
        chain = self._chain(wanted)
        last = {v: k for k in chain for v in self.graph.nodes[k].inputs}
        held: dict[int, Located] = {}
        for k in chain:
            outs = self.run(builder, k, {**places, **held})
            held.update({v: Located(slot) for v, slot in zip(self.graph.nodes[k].outputs, outs, strict=True)})
            for v in [v for v in held if v not in wanted and last.get(v, k) <= k]:
                builder.drop(held.pop(v).slot)
        return held

    @staticmethod
    def back(builder: Builder, held: Mapping[int, Located]) -> None:
        """Free what was lent, behind the last instruction."""
        for place in held.values():
            builder.drop(place.slot)

    def _chain(self, wanted: Collection[int]) -> list[int]:
        """Nodes to run for these values, in order."""
        chain: set[int] = set()
        todo = [self.producer[v] for v in wanted]
        while todo:
            k = todo.pop()
            if k not in chain:
                chain.add(k)
                todo += [self.producer[v] for v in self.graph.nodes[k].inputs if v in self.producer]
        return sorted(chain)
