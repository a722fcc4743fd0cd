"""Matrix products in all their forms: each is a sum of products over labelled dimensions, as `einsum` writes it.

    mm        ab,bc->ac            addmm      the same, and a bias that broadcasts
    bmm       nab,nbc->nac         tensordot  abc,bcd->ad
    bilinear  *i,oij,*j->*o        einsum     as it stands

One operand may be cut, the largest that is no weight; the others follow where they share a label (`ops/contraction.py`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import prod
from typing import Any

from ranger_nn.core.graph import INPUT, Rule
from ranger_nn.ops import contraction
from ranger_nn.ops.pointwise import aligned
from ranger_nn.torch import kernels as K
from ranger_nn.torch.operator import Operator

Labels = tuple[Hashable, ...]


def lower_product(op: Operator) -> Any:
    """`mm`, `bmm`, `mv`, `matmul`, `inner`, `tensordot`, and with a summand `addmm`, `baddbmm`, `addbmm`, `addmv`."""
    left, right = _factors(op)
    a, b = op.shape(left), op.shape(right)
    if op.name == "tensordot":
        operands, out = _tensordot(op, len(a), len(b))
    elif op.name == "inner":
        lead, rest = tuple(range(len(a) - 1)), tuple(range(100, 99 + len(b)))
        operands, out = ((*lead, "k"), (*rest, "k")), (*lead, *rest)
    elif op.name == "addbmm":
        operands, out = (("n", "i", "k"), ("n", "k", "j")), ("i", "j")
    else:
        operands, out = _matmul(len(a), len(b))
    return _emit(op, [left, right], operands, out) if a and b else None


def _factors(op: Operator) -> tuple[int, int]:
    for first, second in (("mat1", "mat2"), ("batch1", "batch2"), ("mat", "vec"), ("self", "mat2"), ("self", "vec")):
        if first in op.arguments and second in op.arguments:
            return op.arg(first), op.arg(second)
    return op.arg("self"), op.arg("other")


def _matmul(left: int, right: int) -> tuple[tuple[Labels, Labels], Labels]:
    """Labels of operands of these ranks; batch dimensions are numbered from the last on."""
    batch = max(left, right, 2) - 2
    rows = ("i",) if left > 1 else ()
    columns = ("j",) if right > 1 else ()
    lead = tuple(range(batch))
    a = (*lead[batch - max(left - 2, 0) :], *rows, "k") if left else ()
    b = (*lead[batch - max(right - 2, 0) :], "k", *columns) if right else ()
    return (a, b), (*lead, *rows, *columns)


def _tensordot(op: Operator, left: int, right: int) -> tuple[tuple[Labels, Labels], Labels]:
    summed = [(d % left, e % right) for d, e in zip(op.arg("dims_self"), op.arg("dims_other"), strict=True)]
    pairs = {d: ("k", d) for d, _ in summed}
    a = tuple(pairs.get(d, ("a", d)) for d in range(left))
    back = {e: ("k", d) for d, e in summed}
    b = tuple(back.get(e, ("b", e)) for e in range(right))
    return (a, b), (*(x for x in a if x[0] == "a"), *(x for x in b if x[0] == "b"))


def lower_einsum(op: Operator) -> Any:
    """Any equation; without an arrow the result has the labels that stand once, in order."""
    tensors = op.tensors()
    left, arrow, right = op.arg("equation").replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(tensors):
        return None
    width = [len(op.shape(v)) - len(t.replace("...", "")) for v, t in zip(tensors, terms, strict=True)]
    dots = max([n for n, t in zip(width, terms, strict=True) if "..." in t], default=0)
    if not arrow:
        letters = left.replace("...", "").replace(",", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in letters if letters.count(c) == 1))
    operands = [_spelled(t, n, dots) for t, n in zip(terms, width, strict=True)]
    return _emit(op, tensors, operands, _spelled(right, dots, dots))


def _spelled(term: str, own: int, dots: int) -> Labels:
    """Labels of a term of which an ellipsis stands for `own` of the `dots` dimensions that the widest has."""
    before, found, after = term.partition("...")
    return (*before, *(range(dots - own, dots) if found else ()), *after)


def lower_bilinear(op: Operator) -> Any:
    """x W y for each output: the rows of x and y are local."""
    left, right, weight, bias = (op.arg(n) for n in ("input1", "input2", "weight", "bias"))
    lead = tuple(range(len(op.out) - 1))
    inputs = [left, right, weight] + ([bias] if bias is not None else [])
    operands: list[Labels] = [(*lead, "i"), (*lead, "j"), ("o", "i", "j")] + ([("o",)] if bias is not None else [])
    return _emit(op, inputs, operands, (*lead, "o"))


def _emit(
    op: Operator,
    factors: Sequence[int],
    operands: Sequence[Labels],
    out: Labels,
) -> Any:
    sizes: dict[Hashable, int] = {}
    for v, labels in zip(factors, operands, strict=True):
        for size, label in zip(op.shape(v), labels, strict=True):
            sizes[label] = max(size, sizes.get(label, 0))
    labelled = [
        tuple(label if size == sizes[label] else None for size, label in zip(op.shape(v), labels, strict=True))
        for v, labels in zip(factors, operands, strict=True)
    ]
    rows = list(contraction.product(labelled, out, _cut(op, factors, labelled, out)).links)
    function, inputs = op.call()
    if len(inputs) > len(factors):  # a summand comes first, and broadcasts: cut where the product is
        cut = {link.out_dim for row in rows for link in row if link is not None}
        rows.insert(0, aligned(op.shape(inputs[0]), op.out, set(range(len(op.out))) - cut))
    if inputs[-len(factors) :] != list(factors):
        return None
    return op.emit(inputs, Rule(tuple(rows)), K.Copying(function), macs=prod(sizes.values()))


def _cut(op: Operator, factors: Sequence[int], operands: Sequence[Labels], out: Labels) -> int:
    """The operand to cut: the one with most of what the result is made of, weights last."""

    def weight(n: int) -> tuple[bool, int]:
        shape = op.shape(factors[n])
        own = prod(size for size, label in zip(shape, operands[n], strict=True) if label in out)
        return depends_on_input(op, factors[n]), own

    return max(range(len(factors)), key=weight)


def depends_on_input(op: Operator, v: int) -> bool:
    """False where parameters and constants alone decide a value."""
    producer = {u: node for node in op.lower.nodes for u in node.outputs}
    todo, seen = [v], {v}
    while todo:
        u = todo.pop()
        if op.lower.values[u].kind == INPUT:
            return True
        new = set(producer[u].inputs) - seen if u in producer else set()
        seen |= new
        todo += new
    return False
