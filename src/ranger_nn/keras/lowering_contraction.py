"""Rules of products: matmul, einsum, attention. See `lowering.py`."""

from __future__ import annotations

import string
from collections.abc import Sequence
from math import prod
from typing import Any

from ranger_nn.core.graph import Rule
from ranger_nn.core.reach import Link
from ranger_nn.keras.kernels import Kernel
from ranger_nn.keras.lower import Ref
from ranger_nn.keras.operation import Call, rule
from ranger_nn.ops import contraction


@rule("Matmul", "Dot")
def _matmul(call: Call) -> Any:
    left, right = call.arg("x1"), call.arg("x2")
    if not isinstance(left, Ref) or not isinstance(right, Ref):
        return None
    a, b = call.shape(left), call.shape(right)
    if len(b) != 2 and (call.name == "Dot" or len(a) < 2 or len(b) < 2):
        return None
    function, inputs = call.function()
    macs = prod(call.out) * a[-1]
    if len(b) == 2:
        return call.emit(inputs, contraction.linear(a, [b]), Kernel(function), macs=macs)
    return call.emit(inputs, contraction.matmul(a, b, call.out, False), Kernel(function), macs=macs)


@rule("Einsum")
def _einsum(call: Call) -> Any:
    function, inputs = call.function()
    found = _explicit(call.op.subscripts.replace(" ", ""), [len(call.shape(v)) for v in inputs])
    if found is None or call.kwargs:
        return None
    letters, out = found
    if len(letters) != len(inputs) or any(len(set(t)) != len(t) for t in [*letters, out]):
        return None
    computed = [i for i, v in enumerate(inputs) if call.lower.values[v].kind in {"computed", "input"}]
    lead = _leading_operand([letters[i] for i in computed], out)
    links = []
    for i, term in enumerate(letters):
        mine = computed and i == computed[lead]
        shared = set.intersection(*[set(letters[j]) for j in computed]) if computed else set()
        links.append(
            tuple(Link(out.index(c)) if c in out and (mine or (c in shared and i in computed)) else None for c in term)
        )
    sizes = {c: n for i, term in enumerate(letters) for c, n in zip(term, call.shape(inputs[i]), strict=True)}
    return call.emit(inputs, Rule(tuple(links)), Kernel(function), macs=prod(sizes.values()))


def _explicit(subscripts: str, ranks: Sequence[int]) -> tuple[list[str], str] | None:
    """Letters of each operand and of the result, with letters in place of dots and with the result where it is left out."""
    terms, arrow, out = subscripts.partition("->")
    letters = terms.split(",")
    if len(letters) != len(ranks):
        return None
    free = [c for c in string.ascii_letters if c not in subscripts]
    more = [r - len(t.replace("...", "")) if "..." in t else 0 for t, r in zip(letters, ranks, strict=True)]
    if max(more) > len(free):
        return None
    dots = "".join(reversed(free[: max(more)]))
    letters = [t.replace("...", dots[len(dots) - m :]) for t, m in zip(letters, more, strict=True)]
    plain = terms.replace(",", "").replace("...", "")
    alone = "".join(sorted(c for c in set(plain) if plain.count(c) == 1))
    out = out.replace("...", dots) if arrow else dots + alone
    return (letters, out) if all(len(t) == r for t, r in zip(letters, ranks, strict=True)) else None


def _leading_operand(terms: Sequence[str], out: str) -> int:
    """The operand whose own dimensions may be cut: the one that comes first in the result (queries before keys)."""
    own = [[out.index(c) for c in t if c in out and sum(c in u for u in terms) == 1] for t in terms]
    places = [min(o) if o else len(out) for o in own]
    return places.index(min(places)) if places else 0


@rule("DotProductAttention")
def _attention(call: Call) -> Any:
    function, inputs = call.function()
    if call.op.is_causal:
        return None
    query = call.arg("query")
    links: list[Any] = []
    for v in inputs:
        shape = call.shape(v)
        if v == query and not links:
            links.append((Link(0), Link(1), Link(2), None))
        else:
            links.append((Link(0) if shape[0] == call.out[0] else None, *(None,) * (len(shape) - 1)))
    macs = 2 * prod(call.shape(query)) * call.shape(inputs[1])[1]
    return call.emit(inputs, Rule(tuple(links)), Kernel(function), macs=macs)


@rule("Tensordot", "Inner")
def _tensordot(call: Call) -> Any:
    """The last dimensions of the first by those of the second: as many dimensions of the first are left as come before."""
    left, right = call.arg("x1"), call.arg("x2")
    if not isinstance(left, Ref) or not isinstance(right, Ref):
        return None
    a, b = call.shape(left), call.shape(right)
    axes = getattr(call.op, "axes", [[-1], [-1]])
    if isinstance(axes, int):
        axes = [range(len(a) - axes, len(a)), range(axes)]
    mine, others = ([n % len(s) for n in ([x] if isinstance(x, int) else x)] for x, s in zip(axes, (a, b), strict=True))
    function, inputs = call.function()
    kept = [d for d in range(len(a)) if d not in mine]
    row = tuple(Link(kept.index(d)) if d in kept else None for d in range(len(a)))
    macs = prod(call.out) * prod(b[d] for d in others)
    return call.emit(inputs, Rule((row, (None,) * len(b))), Kernel(function), macs=macs)
