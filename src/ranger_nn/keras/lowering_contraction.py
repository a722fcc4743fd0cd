"""Rules of products: matmul, einsum, attention. See `lowering.py`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from ranger_nn.core.graph import Rule
from ranger_nn.core.reach import Link
from ranger_nn.keras.kernels import Kernel
from ranger_nn.keras.lower import Ref
from ranger_nn.keras.lowering import Call, rule
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
    subscripts = call.op.subscripts.replace(" ", "")
    if "." in subscripts or "->" not in subscripts or call.kwargs:
        return None
    terms, out = subscripts.split("->")
    letters = terms.split(",")
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
