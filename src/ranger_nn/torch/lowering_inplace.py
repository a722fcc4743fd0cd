"""How a view is put back into what it was taken from, where that has a region rule. Enter at `inverse`.

slice, select, a piece of chunk, split or unbind      scatter: the parent with a part written over
permute, transpose                                    the inverse permutation
view, squeeze, unsqueeze, flatten                     a view of the parent's shape
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node as FxNode

from ranger_nn.core.graph import Rule
from ranger_nn.core.reach import Link, Reach
from ranger_nn.ops import movement
from ranger_nn.torch import kernels as K
from ranger_nn.torch import kernels_movement as M
from ranger_nn.torch.aliases import argument, op_name
from ranger_nn.torch.lower import Lower, Static

RESHAPES = {"view", "reshape", "squeeze", "unsqueeze", "flatten", "unflatten", "view_as", "reshape_as", "_unsafe_view"}
PERMUTES = {"permute", "transpose", "t", "movedim", "swapaxes", "swapdims", "moveaxis", "numpy_T", "mT", "matrix_H"}


@dataclass(frozen=True)
class Part:
    """Indices start, start + step, ... of dimension `dim`, which is gone if `squeeze`."""

    dim: int
    start: int
    step: int = 1
    squeeze: bool = False


def invertible(lower: Lower, below: FxNode, above: FxNode) -> bool:
    """Whether `inverse` has a rule for the view `below` of `above`."""
    like, full = below.meta["val"], above.meta["val"]
    if like.dtype != full.dtype or 0 in like.shape or like.is_conj() != full.is_conj():
        return False
    if _part(lower, below, above) is not None or _order(below, above) is not None:
        return True
    return _reshaped(below) and movement.view_groups(tuple(like.shape), tuple(full.shape)) is not None


def inverse(lower: Lower, below: FxNode, above: FxNode, base: int, value: int) -> int:
    """`base` with `value` where its view `below` stood."""
    full = above.meta["val"]
    if (part := _part(lower, below, above)) is not None:
        return int(_scatter(lower, part, full, base, value))
    if (order := _order(below, above)) is not None:
        back = [order.index(d) for d in range(len(order))]
        kernel = K.Light(lambda t: t.permute(back))
        return int(lower.emit("permute", [value], full, movement.permute(back), kernel, alias=0))
    shape, out = lower.shape(value), lower.shape(base)
    return int(lower.emit("view", [value], full, movement.view(shape, out), M.View(shape, out), alias=0))


def _scatter(lower: Lower, part: Part, like: torch.Tensor, base: int, value: int) -> Any:
    dim, rank = part.dim, len(lower.shape(base))
    row: tuple[Link, ...]
    if part.squeeze:
        row = tuple(Link(d + (d >= dim)) for d in range(rank - 1))
    else:
        reach = Reach(1, -part.start, -part.start, part.step)
        row = tuple(Link(d, reach) if d == dim else Link(d) for d in range(rank))
    rule = Rule((tuple(Link(d) for d in range(rank)), row))
    return lower.emit("scatter", [base, value], like, rule, M.Scatter(dim, part.start, part.squeeze, part.step))


def _reshaped(node: FxNode) -> bool:
    return op_name(node).rstrip("_") in RESHAPES


def _number(lower: Lower, node: FxNode, name: str, default: int) -> Any:
    found = argument(node, name)
    if isinstance(found, FxNode):
        known = lower.env.get(found)
        found = known.value if isinstance(known, Static) else found
    return default if found is None else found


def _part(lower: Lower, node: FxNode, above: FxNode) -> Part | None:
    shape = above.meta["val"].shape
    if node.target is operator.getitem:
        return _piece(lower, node, shape)
    name = op_name(node)
    if name not in {"slice", "narrow", "select"}:
        return None
    dim = _number(lower, node, "dim", 0) % len(shape)
    start = _number(lower, node, "index" if name == "select" else "start", 0)
    step = _number(lower, node, "step", 1) if name == "slice" else 1
    if not isinstance(start, int) or not isinstance(step, int):
        return None
    size = int(shape[dim])
    return Part(dim, max(0, start + size) if start < 0 else min(start, size), step, name == "select")


def _piece(lower: Lower, node: FxNode, shape: Any) -> Part | None:
    source, index = node.args
    name = op_name(source)  # type: ignore[arg-type]
    if name not in {"chunk", "split", "split_with_sizes", "tensor_split", "unbind", "unsafe_chunk", "unsafe_split"}:
        return None
    dim = _number(lower, source, "dim", 0) % len(shape)  # type: ignore[arg-type]
    if name == "unbind":
        return Part(dim, index, squeeze=True)  # type: ignore[arg-type]
    before = source.meta["val"][:index]  # type: ignore[union-attr]
    return Part(dim, sum(int(t.shape[dim]) for t in before))


def _order(node: FxNode, above: FxNode) -> list[int] | None:
    """`order[j]`: the dimension of `above` that dimension j of the view is."""
    if op_name(node).rstrip("_") not in PERMUTES:
        return None
    rank = above.meta["val"].dim()
    probe = torch.empty(list(range(2, rank + 2)), device="meta")
    args = [a for a in node.args if not isinstance(a, FxNode)]
    target: Any = node.target
    return [n - 2 for n in target(probe, *args, **node.kwargs).shape]
