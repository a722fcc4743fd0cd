"""Composite operators taken apart into those that PyTorch itself runs in their place: one rule serves them all.

Plain execution runs the same parts in the same order (the dispatcher's CompositeImplicitAutograd), so numbers, gradients
and memory stay. Where a part has no region rule the operator is left as it is. Enter at `taken_apart`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ranger_nn.torch.operator import Operator


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
    for node in traced.graph.nodes:
        if "nn_module_stack" in op.node.meta:
            node.meta["nn_module_stack"] = op.node.meta["nn_module_stack"]
    return op.lower.parts(op.name, traced, inputs)


def _composite(target: Any) -> bool:
    random = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
    implicit = "CompositeImplicitAutograd"
    return not random and torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), implicit)
