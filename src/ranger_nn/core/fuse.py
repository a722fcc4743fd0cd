"""Fuse chains of pointwise nodes into one: fewer calls per region, fewer values kept for backward.

A node joins the node that reads it when both are pointwise, no other node reads it and it is no output. What the
chain reads from outside keeps its links; a dimension read whole by any member is read whole by the chain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ranger_nn.core.graph import Graph, Node, Rule
from ranger_nn.core.reach import Link

MakeFused = Callable[[list[tuple[Any, tuple[int, ...], int]], int, int], Any]


def fuse(graph: Graph, make: MakeFused) -> Graph:
    """The graph with pointwise chains fused; `make(steps, inputs, result)` builds the adapter's kernel."""
    readers: dict[int, list[int]] = {}
    for k, node in enumerate(graph.nodes):
        for v in node.inputs:
            readers.setdefault(v, []).append(k)
    group = list(range(len(graph.nodes)))
    for k in reversed(range(len(graph.nodes))):
        node = graph.nodes[k]
        if not _fusable(node) or node.outputs[0] in graph.outputs:
            continue
        users = set(readers.get(node.outputs[0], []))
        if len(users) != 1:
            continue
        user = users.pop()
        same_shape = graph.values[graph.nodes[user].outputs[0]].shape == graph.values[node.outputs[0]].shape
        same_grad = (
            graph.values[graph.nodes[user].outputs[0]].differentiable == graph.values[node.outputs[0]].differentiable
        )
        if _fusable(graph.nodes[user]) and same_shape and same_grad:
            group[k] = group[user]
    members: dict[int, list[int]] = {}
    for k, g in enumerate(group):
        members.setdefault(g, []).append(k)
    nodes = []
    for k, node in enumerate(graph.nodes):
        if group[k] != k:
            continue
        nodes.append(node if len(members[k]) == 1 else _merge(graph, [graph.nodes[m] for m in members[k]], make))
    return replace(graph, nodes=tuple(nodes))


def _fusable(node: Node) -> bool:
    return node.rule.pointwise and len(node.outputs) == 1 and not node.random


def _merge(graph: Graph, chain: list[Node], make: MakeFused) -> Node:
    inside = {n.outputs[0] for n in chain}
    externals: list[int] = []
    for node in chain:
        externals += [v for v in dict.fromkeys(node.inputs) if v not in inside and v not in externals]
    last = chain[-1]
    rank = len(graph.values[last.outputs[0]].shape)
    whole: dict[int, set[int]] = {v: set() for v in externals}
    for node in chain:
        for v, row in zip(node.inputs, node.rule.links, strict=True):
            if v in whole:
                whole[v] |= {d for d, link in enumerate(row) if link is None}
    within = {  # a dimension that a member reads whole of what another member makes
        d
        for node in chain
        for v, row in zip(node.inputs, node.rule.links, strict=True)
        if v in inside
        for d, link in enumerate(row)
        if link is None
    }
    links = []
    for v in externals:
        shift = rank - len(graph.values[v].shape)
        links.append(
            tuple(
                None if d in whole[v] or d + shift in within else Link(d + shift)
                for d in range(len(graph.values[v].shape))
            )
        )
    registers = {v: i for i, v in enumerate(externals)}
    steps = []
    for node in chain:
        registers[node.outputs[0]] = len(registers)
        steps.append((node.kernel, tuple(registers[v] for v in node.inputs), registers[node.outputs[0]]))
    kernel = make(steps, len(externals), registers[last.outputs[0]])
    return Node(
        last.name,
        "+".join(n.op for n in chain),
        tuple(externals),
        last.outputs,
        Rule(tuple(links), pointwise=True),
        kernel,
        sum(n.macs for n in chain),
        vjp_reads=tuple(range(len(externals))),
        where=last.where,
    )
