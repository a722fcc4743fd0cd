"""The graph that an adapter captures: values, nodes, and the region rule attached to each node.

Frozen and in topological order. A node's `kernel` is the adapter's and opaque here; everything that the
bounds and the planner ask (links, work, what a view aliases, what backward reads) stands on the node itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

from ranger_nn.core.reach import Link

INPUT, PARAMETER, CONSTANT, COMPUTED = "input", "parameter", "constant", "computed"
NHWC = "nhwc"
"""Layout of an input whose channels are its last dimension, in any number of spatial ones; else they come after the batch."""


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor of the network: `shape` in elements, `itemsize` in bytes, `layout` as the adapter holds it."""

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    itemsize: int
    kind: str = COMPUTED
    differentiable: bool = False
    layout: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole value."""
        return prod(self.shape) * self.itemsize


@dataclass(frozen=True, slots=True)
class Rule:
    """How an operator behaves under partition.

    `links[i][d]` ties dimension d of input i to an output dimension, or is None: all of that dimension is read.
    `reduces`: the operator is a monoid over the dimensions of input 0 that have no link (a sum, a maximum,
    moments): regions may be lifted one by one and merged.
    `indivisible`: dimensions of input 0 that a reduction must see whole (channels that it gathers in groups).
    `pointwise`: every element depends on the elements at the same place only, so that chains may be fused.
    `ordered`: dimension of input 0 and of output 0 whose steps follow one another. The operator gives, after its
    output, the state behind the last step; a slide hands it on from region to region, tiles cannot.
    """

    links: tuple[tuple[Link | None, ...], ...]
    reduces: bool = False
    pointwise: bool = False
    reason: str = ""
    indivisible: tuple[int, ...] = ()
    ordered: int | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """One operator: `inputs` and `outputs` are value indices, `macs` the multiply-adds of the whole output.

    `alias`: the input that the output is a view of, if any (`may_copy`: or a
    copy, depending on the region). `vjp_reads`: positions of the inputs whose
    values backward needs, `vjp_outputs` those of the outputs (states at the borders of chunks). `random`: draws
    random numbers (it runs once; its output is kept for backward).
    """

    name: str
    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    rule: Rule
    kernel: Any = field(compare=False)
    macs: int = 0
    alias: int | None = None
    may_copy: bool = False
    vjp_reads: tuple[int, ...] = ()
    random: bool = False
    where: str = ""
    vjp_outputs: tuple[int, ...] = ()

    @property
    def states(self) -> tuple[int, ...]:
        """Outputs of an ordered operator that are finished only behind its last step."""
        return self.outputs[1:] if self.rule.ordered is not None else ()


@dataclass(frozen=True)
class Graph:
    """Values and nodes of one network at one input shape; nodes are in topological order."""

    name: str
    values: tuple[Value, ...]
    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    grad_inputs: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a graph that is not in topological order or whose links do not fit its shapes."""
        known = {v.index for v in self.values if v.kind != COMPUTED}
        for node in self.nodes:
            missing = [i for i in node.inputs if i not in known]
            if missing:
                raise ValueError(f"{node.name} reads values {missing} before they are computed")
            if len(node.rule.links) != len(node.inputs):
                raise ValueError(f"{node.name}: {len(node.inputs)} inputs but {len(node.rule.links)} rows of links")
            for i, row in zip(node.inputs, node.rule.links, strict=True):
                if len(row) != len(self.values[i].shape):
                    raise ValueError(f"{node.name}: {len(row)} links for an input of shape {self.values[i].shape}")
            known.update(node.outputs)

    def macs(self) -> int:
        """Multiply-adds of the untouched network."""
        return sum(n.macs for n in self.nodes)
