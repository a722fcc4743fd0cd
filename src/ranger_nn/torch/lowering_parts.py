"""Composite operators taken apart into those that PyTorch itself runs in their place: one rule serves them all.

Plain execution runs the same parts in the same order (the dispatcher's CompositeImplicitAutograd), so numbers, gradients
and memory stay. Where a part has no region rule the operator is left as it is. Enter at `taken_apart`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ranger_nn.errors import CaptureError
from ranger_nn.torch.aliases import find_aliases
from ranger_nn.torch.inplace import Writes

if TYPE_CHECKING:
    from ranger_nn.torch.lowering import Operator


def taken_apart(op: Operator) -> Any:
    """Value index (or a list of them) of the operator's result made of its parts, or None."""
    if not _composite(op.target):
        return None
    function, inputs = op.call()
    values = [op.lower.values[v] for v in inputs]
    device = next((t.device for t in pytree.tree_leaves(op.like) if isinstance(t, Tensor)), torch.device("cpu"))
    try:
        fakes = [torch.empty(v.shape, dtype=getattr(torch, v.dtype), device=device) for v in values]
        traced = make_fx(torch.func.functionalize(function), tracing_mode="fake")(*fakes)
    except Exception:  # what cannot be traced runs whole
        return None
    return _lowered(op, traced, inputs)


def _composite(target: Any) -> bool:
    random = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
    implicit = "CompositeImplicitAutograd"
    return not random and torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), implicit)


def _lowered(op: Operator, traced: torch.fx.GraphModule, inputs: list[int]) -> Any:
    from ranger_nn.torch.capture import lower_again, lower_nodes

    lower, writes = op.lower, op.lower.writes
    before = len(lower.values), len(lower.nodes), dict(lower.names), dict(lower.sources)
    lower.writes = Writes(
        lower, find_aliases(traced), op.name, partial(lower_again, lower)
    )  # names of these parts alone
    found = iter(inputs)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            lower.env[node] = next(found)
            lower.writes.made(node)
        if "nn_module_stack" in op.node.meta:
            node.meta["nn_module_stack"] = op.node.meta["nn_module_stack"]
    try:
        lower_nodes(None, traced.graph, lower, traced)
    except CaptureError:  # a write in place that has no other form
        parts = None
    else:
        (result,) = next(n for n in traced.graph.nodes if n.op == "output").args
        parts = pytree.tree_map(lambda n: lower.env.get(n), result)
    finally:
        lower.writes = writes
    ruled = not any(node.rule.reason for node in lower.nodes[before[1] :])
    if ruled and all(isinstance(p, int) for p in pytree.tree_leaves(parts, is_leaf=lambda p: p is None)):
        return list(parts) if isinstance(parts, tuple) else parts
    del lower.values[before[0] :], lower.nodes[before[1] :]
    lower.names, lower.sources = before[2], before[3]
    return None
