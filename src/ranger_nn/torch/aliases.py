"""Which names of a traced graph mean the same memory, and who writes into it in place.

Whether `reshape`, `contiguous`, `to` or `expand` gave a view or a copy is not a matter of their names: the fake
tensors that `torch.export` records with its nodes share storage where the real ones will. So every name gets the
`Memory` that it lies in, and the name that it was made from: `same` where it is the very tensor (the result of an
in-place operator, what goes into a block and out of it), `parent` where it is a view. Enter at `find_aliases`.
"""

from __future__ import annotations

import contextlib
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node as FxNode
from torch.utils import _pytree as pytree

NORMS = {"batch_norm": "training", "instance_norm": "use_input_stats"}
"""Operators that move running statistics, though their schema does not say so; the argument that makes them."""
FRESH = {"lift_fresh_copy", "clone", "empty_like", "zeros_like"}
"""Always new memory: for literals fake tensors share storage all the same."""
DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
"""They give their very input where nothing is dropped; the fake ones give a copy."""

GIVES_ITSELF = {
    *(
        "to",
        "type_as",
        "contiguous",
        "lift_fresh",
        "flatten",
        "positive",
        "real",
        "conj",
        "resolve_conj",
        "resolve_neg",
    ),
    *("atleast_1d", "atleast_2d", "atleast_3d"),
}
"""They give their very argument, gradient and all, where there is nothing to do; other views are tensors of their own."""


@dataclass(eq=False)
class Memory:
    """A storage: its first name, the operators that write into it, and whether anything else reads it."""

    root: FxNode
    writes: list[FxNode] = field(default_factory=list)
    norms: int = 0
    read: bool = False
    unclear: bool = False

    @property
    def in_place(self) -> bool:
        """Of a buffer: nobody sees the order of reads and writes, so that each write may happen when it is met."""
        return not self.read and (not self.norms or (self.norms == 1 and not self.writes))


@dataclass
class Aliases:
    """What `find_aliases` finds."""

    memory: dict[FxNode, Memory] = field(default_factory=dict)
    parent: dict[FxNode, FxNode] = field(default_factory=dict)
    same: dict[FxNode, FxNode] = field(default_factory=dict)
    by_storage: dict[int, Memory] = field(default_factory=dict)
    norms: list[list[Memory]] = field(default_factory=list)

    def canonical(self, node: FxNode) -> FxNode:
        """The first name of the very tensor."""
        while node in self.same:
            node = self.same[node]
        return node


def op_name(node: FxNode) -> str:
    """`slice` of `aten::slice.Tensor`; nothing for what has no schema."""
    return node.target._schema.name.split("::")[1] if hasattr(node.target, "_schema") else ""


def argument(node: FxNode, name: str) -> Any:
    """An argument by its schema's name."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    for position, a in enumerate(schema.arguments):
        if a.name == name:
            given = node.args[position] if position < len(node.args) else node.kwargs.get(name)
            return a.default_value if given is None and name not in node.kwargs and a.has_default_value() else given
    return None


def written(node: FxNode) -> list[FxNode]:
    """The arguments that the schema says are written (a list of tensors counts with all its members)."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    names = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [n for n in pytree.tree_leaves([argument(node, k) for k in names]) if isinstance(n, FxNode)]


def running(node: FxNode) -> list[FxNode]:
    """Buffers whose running statistics the operator moves."""
    flag = NORMS.get(op_name(node))
    if flag is None or not argument(node, flag):
        return []
    found = [argument(node, k) for k in ("running_mean", "running_var")]
    return [n for n in found if isinstance(n, FxNode)]


def is_block(node: FxNode) -> bool:
    """A part of forward under `no_grad` or with autocast off: a graph of its own."""
    return any(k in str(node.target) for k in ("wrap_with_set_grad_enabled", "wrap_with_autocast"))


def block_of(node: FxNode, owner: nn.Module) -> tuple[Any, list[Any]]:
    """The body of a block and what is given to it."""
    arguments: list[Any] = list(node.args)
    position = next(i for i, a in enumerate(arguments) if isinstance(a, FxNode) and a.op == "get_attr")
    body: Any = owner
    for part in str(arguments[position].target).split("."):
        body = getattr(body, part)
    return body, arguments[position + 1 :]


def find_aliases(module: nn.Module) -> Aliases:
    """The memory of all names of a traced module, blocks inside of it included."""
    found = Aliases()
    _walk(found, module)
    for _ in found.norms:  # what one norm moves is moved in one way, whatever reads a part of it
        for pair in found.norms:
            if not all(m.in_place for m in pair):
                for memory in pair:
                    memory.read = True
    return found


def _walk(found: Aliases, owner: Any) -> None:
    for node in owner.graph.nodes:
        if node.op == "output":
            for read in node.all_input_nodes:
                _read(found, read)
        elif node.op in ("placeholder", "get_attr"):
            if node not in found.memory and isinstance(node.meta.get("val"), Tensor):
                _fresh(found, node)
        elif is_block(node):
            _walk_block(found, node, owner)
        elif node.target is operator.getitem:
            _item(found, node)
        else:
            _call(found, node)


def _walk_block(found: Aliases, node: FxNode, owner: Any) -> None:
    body, given = block_of(node, owner)
    places = [n for n in body.graph.nodes if n.op == "placeholder"]
    for inner, outer in zip(places, given, strict=True):
        if isinstance(outer, FxNode) and outer in found.memory:
            _name(found, inner, outer)
    _walk(found, body)
    last = next(n for n in body.graph.nodes if n.op == "output")
    given_back: Any = last.args[0] if isinstance(last.args[0], (list, tuple)) else [last.args[0]]
    for user in node.users:
        index: Any = user.args[1]
        if user.target is operator.getitem and given_back[index] in found.memory:
            _name(found, user, given_back[index])


def _name(found: Aliases, node: FxNode, of: FxNode) -> None:
    found.same[node] = of
    found.memory[node] = found.memory[of]
    if isinstance(like := node.meta.get("val"), Tensor):
        found.by_storage.setdefault(_storage(like), found.memory[of])


def _fresh(found: Aliases, node: FxNode) -> None:
    like = node.meta["val"]
    memory = Memory(node)
    before = found.by_storage.get(_storage(like))
    if before is not None and node.op != "call_function":  # two buffers, or parts of one, in one storage
        before.unclear = memory.unclear = True
    found.memory[node] = memory
    found.by_storage[_storage(like)] = memory


def _storage(like: Tensor) -> int:
    return int(like.untyped_storage()._cdata) if like.layout == torch.strided else id(like)


def _call(found: Aliases, node: FxNode) -> None:
    targets, norms = written(node), running(node)
    for read in node.all_input_nodes:
        if read in found.memory and read not in norms and not _plain_update(found, node, read, targets):
            _read(found, read)
    found.norms.append([found.memory[n] for n in norms if n in found.memory])
    for memory in found.norms[-1]:
        memory.norms += 1
    if targets and torch.Tag.inplace_view not in node.target.tags:  # type: ignore[union-attr]
        for target in targets:
            if target in found.memory and not keeps(found, node):
                found.memory[target].writes.append(node)
        if len(targets) == 1 and targets[0] in found.memory and isinstance(node.meta.get("val"), Tensor):
            _name(found, node, targets[0])
            return
    _view(found, node)


def keeps(found: Aliases, node: FxNode) -> bool:
    """A tensor copied onto itself, as `self.buffer += 1` ends: nothing is written."""
    if op_name(node) != "copy_" or not isinstance(node.args[1], FxNode):
        return False
    return found.canonical(node.args[0]) is found.canonical(node.args[1])  # type: ignore[arg-type]


def _plain_update(found: Aliases, node: FxNode, read: FxNode, targets: list[FxNode]) -> bool:
    """A write into the whole of a buffer with numbers only, such as a counter's: its order is that of the nodes."""
    if read not in targets or found.canonical(read).op not in ("placeholder", "get_attr"):
        return False
    return keeps(found, node) or node.all_input_nodes == [read]


def _read(found: Aliases, node: FxNode) -> None:
    if node in found.memory:
        found.memory[node].read = True


def _view(found: Aliases, node: FxNode) -> None:
    """The argument in whose memory the result lies, if any."""
    like = node.meta.get("val")
    tensors = [t for t in pytree.tree_leaves(like) if isinstance(t, Tensor)]
    sources = [a for a in node.all_input_nodes if a in found.memory and _shares(found, node, a, tensors)]
    if len({found.memory[a] for a in sources}) > 1:
        for a in sources:
            found.memory[a].unclear = True
    if sources and (op_name(node) in DROPOUTS or _itself(node, sources[0])):
        _name(found, node, sources[0])
    elif sources:
        found.memory[node], found.parent[node] = found.memory[sources[0]], sources[0]
        for t in tensors:
            found.by_storage[_storage(t)] = found.memory[sources[0]]
    elif isinstance(like, Tensor):
        _fresh(found, node)


def _itself(node: FxNode, source: FxNode) -> bool:
    """Not even a view: the operator gave its very argument."""
    like, full = node.meta.get("val"), source.meta["val"]
    return op_name(node) in GIVES_ITSELF and isinstance(like, Tensor) and geometry(like) == geometry(full)


def geometry(like: Tensor) -> tuple[Any, ...]:
    """Where in its storage a tensor lies, and how it is read."""
    return tuple(like.shape), like.stride(), like.storage_offset(), like.dtype, like.is_conj(), like.is_neg()


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage have an element in common: sum(stride * step) = distance has a solution.

    Strides are tried from the largest; what the smaller ones can still reach leaves one or two steps to try for each.
    """
    if 0 in (a.numel(), b.numel()) or a.dtype != b.dtype:
        return 0 not in (a.numel(), b.numel())
    spans: dict[int, tuple[int, int]] = {}
    for n, s in zip(a.shape, a.stride(), strict=True):
        low, high = spans.get(s, (0, 0))
        spans[s] = low, high + int(n) - 1
    for n, s in zip(b.shape, b.stride(), strict=True):
        low, high = spans.get(s, (0, 0))
        spans[s] = low - int(n) + 1, high
    terms = [(s, *spans[s]) for s in sorted(spans, reverse=True) if s]
    return _reaches(terms, int(b.storage_offset()) - int(a.storage_offset()))


def _reaches(terms: list[tuple[int, int, int]], distance: int) -> bool:
    if not terms:
        return distance == 0
    (stride, low, high), rest = terms[0], terms[1:]
    least, most = (sum(s * t[k] for s, *t in rest) for k in (0, 1))
    first, last = max(low, -((most - distance) // stride)), min(high, (distance - least) // stride)
    return any(_reaches(rest, distance - stride * step) for step in range(first, last + 1))


def _shares(found: Aliases, node: FxNode, source: FxNode, tensors: list[Tensor]) -> bool:
    name, like = op_name(node), source.meta.get("val")
    if name in FRESH or not isinstance(like, Tensor):
        return False
    if name in DROPOUTS:
        return not argument(node, "train") or argument(node, "p") == 0 or like.numel() == 0
    if any(found.by_storage.get(_storage(t)) is found.memory[source] for t in tensors):
        return True
    return found.memory[source].root is source and source.op != "call_function" and _probe(node, source)


def _probe(node: FxNode, source: FxNode) -> bool:
    """Constants stand in the graph with another fake tensor than they were traced with: the operator is asked again."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable or not any(r.alias_info for r in schema.returns):
        return False
    like = source.meta["val"]
    with getattr(like, "fake_mode", contextlib.nullcontext()):
        again = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        args, kwargs = pytree.tree_map(
            lambda a: again if a is source else a.meta.get("val") if isinstance(a, FxNode) else a,
            (node.args, node.kwargs),
            is_leaf=lambda a: isinstance(a, FxNode),
        )
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    first = result[0] if isinstance(result, (list, tuple)) and result else result
    return isinstance(first, Tensor) and _storage(first) == _storage(again)


def _item(found: Aliases, node: FxNode) -> None:
    source = node.args[0]
    like = node.meta.get("val")
    if node in found.memory or not isinstance(like, Tensor):
        return
    memory = found.by_storage.get(_storage(like))
    if source in found.parent and memory is found.memory[source]:  # type: ignore[index]
        found.memory[node], found.parent[node] = memory, found.parent[source]  # type: ignore[index]
    else:
        _fresh(found, node)
