"""Picking by indices that constants decide: what a row reads is known when the plan is made.

    index_select, gather, x[:, :, index], x[:, :, rows[:, None], columns]      indices from buffers, literals and `arange`
    flip, rot90, repeat, tile                                                  indices that the operator itself is made of

Their numbers are taken at capture and held (`folding.py`). Which of them lie near a line is for `ops/movement.py`. Other forms
are those of `lowering_dims.py`: the dimension is read whole. Enter at the `lower_` functions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ranger_nn.core.graph import CONSTANT, Node, Rule
from ranger_nn.core.reach import Link
from ranger_nn.ops import movement
from ranger_nn.torch import kernels as K
from ranger_nn.torch import kernels_movement as M
from ranger_nn.torch.folding import LARGEST
from ranger_nn.torch.lowering_contraction import depends_on_input
from ranger_nn.torch.lowering_dims import lower_gather, lower_index
from ranger_nn.torch.operator import Operator


def numbers(op: Operator, v: int) -> Tensor | None:
    """What a value holds, where constants alone decide it; None where they do not, or where it is large."""
    makers = {u: node for node in op.lower.nodes for u in node.outputs}
    needed = _needed(op, v, makers)
    if needed is None:
        return None
    known: dict[int, Tensor] = {}
    with _disable_current_modes(), torch.no_grad():
        for u in needed:
            if u in makers:
                known[u] = _made(op, makers[u], u, known)
                continue
            found = op.lower.constant(op.lower.sources[u])
            if found is None:
                return None
            known[u] = found
    return known[v]


def _needed(op: Operator, v: int, makers: dict[int, Node]) -> list[int] | None:
    """All that it is made of, before what is made of it; None where some is no constant, is drawn, or is large."""
    order: dict[int, None] = {}
    todo = [v]
    while todo:
        u = todo[-1]
        value, node = op.lower.values[u], makers.get(u)
        if (
            prod(value.shape) > LARGEST
            or (node is None and value.kind != CONSTANT)
            or (node is not None and node.random)
        ):
            return None
        missing = [i for i in node.inputs if i not in order] if node is not None else []
        if missing:
            todo += missing
        else:
            order[todo.pop()] = None
    return list(order)


def _made(op: Operator, node: Node, v: int, known: dict[int, Tensor]) -> Tensor:
    boxes = [tuple((0, n) for n in op.shape(i)) for i in (*node.inputs, node.outputs[0])]
    found = node.kernel.bind(boxes[-1], boxes[:-1])(*(known[i] for i in node.inputs))
    result: Tensor = found if isinstance(found, Tensor) else found[node.outputs.index(v)]
    return result


def pick(op: Operator, x: int, dim: int, places: Sequence[int]) -> int:
    """The value with these indices of `dim`, in this order: negative ones count from the end."""
    shape, size = op.shape(x), op.shape(x)[dim]
    rows = [n + size if n < 0 else n for n in places]
    like = torch.empty((*shape[:dim], len(rows), *shape[dim + 1 :]), dtype=op.like.dtype, device="meta")
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if step > 0 and rows == list(range(rows[0], rows[0] + step * len(rows), step)):
        rule, kernel, alias = movement.crop(shape, dim, rows[0], step), M.Crop(dim, rows[0], step), 0
        found: int = op.lower.emit("slice", [x], like, rule, kernel, alias=alias)
        return found
    picked: int = op.lower.emit(op.name, [x], like, movement.pick(shape, dim, rows), M.Pick(dim, rows))
    return picked


def _places(op: Operator, x: int, v: int, dim: int) -> Tensor | None:
    """Constant indices of a dimension of x, which is no table itself."""
    size = op.shape(x)[dim]
    if op.lower.values[v].dtype not in ("int64", "int32") or not depends_on_input(op, x):
        return None
    found = numbers(op, v)
    return None if found is None or found.numel() == 0 or found.min() < -size or found.max() >= size else found


def lower_select(op: Operator) -> Any:
    """`index_select`, and `gather` where the other dimensions all have the same indices."""
    x, index = op.arg("self"), op.arg("index")
    shape = op.shape(x)
    dim = op.arg("dim") % max(1, len(shape))
    found = _places(op, x, index, dim) if shape else None
    if found is None:
        return lower_gather(op)
    if op.name == "gather":
        first = found[tuple(slice(None) if d == dim else slice(0, 1) for d in range(found.dim()))]
        same = all(n == m for d, (n, m) in enumerate(zip(found.shape, shape, strict=True)) if d != dim)
        if not same or not bool((found == first).all()):
            return lower_gather(op)
        found = first
    return pick(op, x, dim, found.flatten().tolist())


def lower_indices(op: Operator) -> Any:
    """`x[:, i]`, and `x[:, i[:, None], j]` where each index has a dimension of its own: one dimension after the other."""
    x, given = op.arg("self"), op.arguments["indices"]
    dims = [d for d, i in enumerate(given) if i is not None]
    if not dims or dims != list(range(dims[0], dims[-1] + 1)):
        return lower_index(op)
    shapes = [op.shape(given[d].index) for d in dims]
    rank = max(map(len, shapes))
    own = [(1,) * (rank - len(s)) + tuple(s) for s in shapes]
    apart = rank == len(dims) and all(n == 1 for k, s in enumerate(own) for at, n in enumerate(s) if at != k)
    found = [_places(op, x, given[d].index, d) for d in dims] if apart else [None]
    if any(f is None for f in found):
        return lower_index(op)
    for d, f in zip(dims, found, strict=True):
        x = pick(op, x, d, f.flatten().tolist()) if f is not None else x
    return x


def flip(op: Operator, x: int, dims: Collection[int]) -> int:
    """The value with these dimensions the other way round."""
    shape = op.shape(x)
    like = torch.empty(shape, dtype=op.like.dtype, device="meta")
    found: int = op.lower.emit("flip", [x], like, movement.flip(shape, dims), M.Flip(sorted(dims)))
    return found


def lower_flip(op: Operator) -> Any:
    """The last row first."""
    x = op.arg("self")
    rank = len(op.shape(x))
    return flip(op, x, {d % rank for d in op.arg("dims")}) if rank and op.arg("dims") else None


def lower_rotation(op: Operator) -> Any:
    """A quarter turn is a flip and a transposition."""
    x, turns = op.arg("self"), op.arg("k") % 4
    rank = len(op.shape(x))
    a, b = (d % rank for d in op.arg("dims"))
    if not turns:
        return x
    turned = flip(op, x, {1: {b}, 2: {a, b}, 3: {a}}[turns])
    if turns == 2:
        return turned
    order = [b if d == a else a if d == b else d for d in range(rank)]
    return op.emit([turned], movement.permute(order), K.Light(lambda t: t.permute(order)), alias=0)


def lower_repeat(op: Operator) -> Any:
    """All indices of a dimension, and again."""
    x, repeats = op.arg("self"), list(op.arg("repeats", op.arg("dims")))
    shape = op.shape(x)
    shift = len(op.out) - len(shape)
    repeats = [1] * (len(op.out) - len(repeats)) + repeats
    again = {d: repeats[d + shift] for d, n in enumerate(shape) if n > 1 and repeats[d + shift] > 1}
    for d, times in again.items():
        x = pick(op, x, d, list(range(shape[d])) * times)
    if op.shape(x) == op.out:
        return x
    row = tuple(Link(d + shift) if n == op.out[d + shift] else None for d, n in enumerate(op.shape(x)))
    return op.emit([x], Rule((row,)), M.Expand())
