"""Writes in place become values: what a name means after a write, as PyTorch's functionalisation says it.

PyTorch's own pass (`ExportedProgram.run_decompositions`) inlines `no_grad` blocks, so that gradients flow where none
do, and takes batch norm and dropout apart; so it is done here, on the graph as it was traced (`aliases.py`):

    y = conv(x)                  y0                                 root
    v = y[:, 1]                  v0 = y0[:, 1]                      a view, parent y
    v += 1                       v1 = v0 + 1                        the write: a new value; y is stale
    z = y * 2                    y1 = scatter(y0, v1); y1 * 2       read by another name: put back, then read

Nothing is put back before another name is read. A view whose inverse has a region rule is put back by regions,
any other by one write through the same strides, whole. Gradients flow as autograd lets them: a write under `no_grad`
or through `detach` changes numbers, not gradients (`Overwrite`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node as FxNode
from torch.utils import _pytree as pytree

from ranger_nn.core.graph import CONSTANT, INPUT, Node
from ranger_nn.errors import CaptureError, InputError
from ranger_nn.ops.pointwise import opaque, pointwise
from ranger_nn.torch.aliases import Aliases, Memory, geometry, keeps, op_name, overlap, written
from ranger_nn.torch.kernels import Call, Light, Opaque
from ranger_nn.torch.lower import Lower
from ranger_nn.torch.lowering_inplace import inverse, invertible
from ranger_nn.torch.lowering_random import seeded


class _Overwrite(torch.autograd.Function):
    """The second tensor's numbers with the first one's gradient."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, value: Tensor) -> Tensor:
        """The numbers."""
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradient."""
        return grad, None


class Writes:
    """What each name means at present. `lower_again(node)` makes a view anew from what its parent means."""

    def __init__(self, lower: Lower, aliases: Aliases, model: str, lower_again: Callable[[FxNode], None]) -> None:
        """`model`: its name in errors."""
        self.lower, self.aliases, self.model, self.lower_again = lower, aliases, model, lower_again
        self.version: dict[Memory, int] = {}
        self.seen: dict[FxNode, int] = {}
        self.pending: dict[Memory, FxNode] = {}
        self.silent: set[FxNode] = set()
        self.buffers: dict[Memory, int] = {}
        self.spare: set[str] = set()

    # ---- reading ------------------------------------------------------------------------------------------

    def made(self, node: FxNode) -> None:
        """`node` has just got its value."""
        memory = self.aliases.memory.get(node)
        if memory is not None:
            self.seen[node] = self.version.get(memory, 0)
            if self.lower.no_grad:
                self.silent.add(node)

    def refresh(self, node: FxNode) -> None:
        """Make `node` mean what its memory holds at present."""
        memory = self.aliases.memory.get(node)
        if memory is None or self.seen.get(node) == self.version.get(memory, 0):
            return
        with _Spare(self):
            self._flush(memory)
            self._renew(node, self.version.get(memory, 0))

    def _renew(self, node: FxNode, version: int) -> None:
        if self.seen.get(node) == version:
            return
        if node in self.aliases.same:
            first = self.aliases.same[node]
            self._renew(first, version)
            self.lower.env[node] = self.lower.env[first]
        elif node.target is operator.getitem:
            source = node.args[0]
            self._renew(source, version)  # type: ignore[arg-type]
            self.lower.env[node] = self.lower.tuples[source][node.args[1]]  # type: ignore[index]
        else:
            self._renew(self.aliases.parent[node], version)
            before: Any = self.lower.env.get(node)
            with _Grad(self.lower, node not in self.silent):
                self.lower_again(node)
            if self._is_silent(node) and isinstance(before, int):  # of others its memory has the numbers alone
                self.lower.env[node] = self._overwrite(before, self.lower.env[node], node)
        self.seen[node] = version

    # ---- writing ------------------------------------------------------------------------------------------

    def check(self, node: FxNode, target: FxNode) -> None:
        """Refuse a write that cannot be repeated; a buffer that others read is copied before the first one."""
        memory = self.aliases.memory.get(target)
        if memory is None or memory.unclear:
            raise CaptureError(
                f"{self.model}: cannot say what {op_name(node)} writes into ({node.format_node()}): it may be two buffers at "
                "once, as one memory registered under two names is. Register it once, or write out of place."
            )
        value = self.lower.env.get(memory.root)
        kind = self.lower.values[value].kind if isinstance(value, int) else ""
        if kind == INPUT and memory.root.op == "placeholder":  # a clone of it is memory of its own
            refuse_mutation(self.model, memory.root.name)
        if memory.root.op in ("placeholder", "get_attr") and kind not in (CONSTANT, "computed"):
            raise CaptureError(
                f"{self.model} writes in place into its parameter {memory.root.name}: {node.format_node()}. Regions read "
                "it more than once, so it must stay as it is: write outside of forward, or into a copy (.clone())."
            )
        for other in node.all_input_nodes:
            if other is not target and self._crosses(other, target):
                raise CaptureError(
                    f"{self.model}: {op_name(node)} writes into a part of a tensor and reads another part that shares "
                    f"elements with it: {node.format_node()}. What it gives depends on the order in which they are "
                    "written. Clone what is read."
                )
        if torch._debug_has_internal_overlap(target.meta["val"]) == 1:  # 1: yes
            raise CaptureError(
                f"{self.model}: {op_name(node)} writes into a tensor of which several elements are one place in memory "
                f"(expand, unfold), so that the order of writes would matter: {node.format_node()}. Clone the tensor before."
            )

    def _crosses(self, other: FxNode, target: FxNode) -> bool:
        like, full = other.meta.get("val"), target.meta["val"]
        one = self.aliases.memory.get(other) is self.aliases.memory[target]
        return one and isinstance(like, Tensor) and geometry(like) != geometry(full) and overlap(like, full)

    def hold(self, root: FxNode) -> None:
        """A buffer that is read and written: regions read a copy of what it held before forward."""
        memory, value = self.aliases.memory.get(root), self.lower.env[root]
        if memory is None or memory.in_place or not (memory.writes or memory.norms):
            return
        if self.lower.values[value].kind != CONSTANT or memory.unclear:
            return
        self.buffers[memory] = value
        rule = opaque([self.lower.shape(value)], "a buffer that forward changes")
        kernel, like = Opaque(torch.clone), root.meta["val"]
        self.lower.env[root] = self.lower.emit(
            "read_buffer", [value], like, rule, kernel, random=True, differentiable=False
        )

    def buffer(self, node: FxNode) -> int | None:
        """The buffer that `node` is a name of, if it is one that is read and written."""
        first = self.aliases.canonical(node)
        memory = self.aliases.memory.get(first)
        return self.buffers.get(memory) if memory is not None and memory.root is first else None

    def in_place(self, target: FxNode) -> bool:
        """A write into a buffer that may happen where it is met."""
        memory = self.aliases.memory[target]
        value = self.lower.env[memory.root]
        return memory.in_place and self.lower.values[value].kind == CONSTANT and memory.root.op != "call_function"

    def keeps(self, node: FxNode) -> bool:
        """A tensor copied onto itself."""
        return keeps(self.aliases, node)

    def write(self, target: FxNode, value: int, whole: bool = False) -> int:
        """`target` holds `value` from here on; the value with the gradient that it has. `whole`: of itself nothing."""
        lower, target = self.lower, self.aliases.canonical(target)
        memory = self.aliases.memory[target]
        if self.pending.get(memory, target) is not target:
            with _Spare(self):
                self._flush(memory)
        base = lower.env[target]
        if lower.no_grad:
            value = self._overwrite(base, value, target)
        elif whole and target not in self.aliases.parent and lower.values[base].differentiable:
            value = self._instead(base, value, target)
        self.version[memory] = self.version.get(memory, 0) + 1
        self._set(target, value)
        if target in self.aliases.parent:
            self.pending[memory] = target
        return value

    def _set(self, node: FxNode, value: int) -> None:
        self.lower.env[node] = value
        self.seen[node] = self.version[self.aliases.memory[node]]

    def _overwrite(self, base: int, value: int, node: FxNode) -> int:
        """The numbers of `value` with the gradient of `base`."""
        lower = self.lower
        if not lower.values[base].differentiable:
            return self.without_gradient(value, node)
        shape = lower.shape(base)
        rule = pointwise([shape, shape], shape)
        with _Grad(lower, True):
            return int(lower.emit("overwrite", [base, value], node.meta["val"], rule, Light(_Overwrite.apply)))

    def _instead(self, base: int, value: int, node: FxNode) -> int:
        """The value; what it was written over gets zeros for a gradient, as from autograd, not none."""
        lower = self.lower
        shape = lower.shape(base)
        rule = pointwise([shape, shape], shape)
        return int(lower.emit("overwrite", [value, base], node.meta["val"], rule, Light(lambda v, _: v.clone())))

    def without_gradient(self, value: int, node: FxNode) -> int:
        """The value detached, if it has a gradient."""
        lower = self.lower
        if not lower.values[value].differentiable:
            return value
        shape = lower.shape(value)
        rule, kernel = pointwise([shape], shape), Call(torch.detach)
        return int(lower.emit("detach", [value], node.meta["val"], rule, kernel, alias=0, differentiable=False))

    # ---- putting back -------------------------------------------------------------------------------------

    def _flush(self, memory: Memory) -> None:
        """Put the last write back into what its name is a view of, up to the root."""
        node = self.pending.pop(memory, None)
        if node is None:
            return
        chain = [node]
        while (above := self._above(chain[-1])) is not None:
            chain.append(above)
        if all(self._invertible(a, b) for a, b in pairwise(chain)):
            for below, above in pairwise(chain):
                self._put(below, above, partial(self._inverse, below, above))
        else:
            quiet = any(self._is_silent(n) for n in chain[:-1])
            self._put(node, chain[-1], lambda: self._through_strides(chain), quiet)

    def _above(self, node: FxNode) -> FxNode | None:
        parent = self.aliases.parent.get(node)
        return None if parent is None else self.aliases.canonical(parent)

    def _is_silent(self, node: FxNode) -> bool:
        return node in self.silent or op_name(node) in ("detach", "detach_")

    def _put(self, below: FxNode, above: FxNode, make: Callable[[], int], quiet: bool | None = None) -> None:
        quiet = self._is_silent(below) if quiet is None else quiet
        with _Grad(self.lower, not quiet):
            value = make()
        self._set(above, self._overwrite(self.lower.env[above], value, above) if quiet else value)

    def _invertible(self, below: FxNode, above: FxNode) -> bool:
        return geometry(below.meta["val"]) == geometry(above.meta["val"]) or invertible(self.lower, below, above)

    def _inverse(self, below: FxNode, above: FxNode) -> int:
        env = self.lower.env
        if geometry(below.meta["val"]) == geometry(above.meta["val"]):
            return int(env[below])
        return inverse(self.lower, below, above, env[above], env[below])

    def _through_strides(self, chain: list[FxNode]) -> int:
        """One write of the last name through its strides, or through its views where these change the dtype."""
        lower, node, root = self.lower, chain[0], chain[-1]
        like, full = node.meta["val"], root.meta["val"]
        size, stride = full.shape, full.stride()
        view = _by_strides(like, full) if _plain(like) == _plain(full) else self._by_views(chain)

        def local(base: Tensor, value: Tensor) -> Tensor:
            out = torch.empty_strided(size, stride, dtype=base.dtype, device=base.device).copy_(base)
            view(out).copy_(value)
            return out

        inputs = [lower.env[root], lower.env[node]]
        rule = opaque([lower.shape(i) for i in inputs], f"a write in place through {op_name(node) or 'a view'}")
        return int(lower.emit("scatter", inputs, full, rule, Opaque(local)))

    def _by_views(self, chain: list[FxNode]) -> Callable[[Tensor], Tensor]:
        steps: list[tuple[Any, Any]] = []
        for node in reversed(chain[:-1]):
            item = node.args[1] if node.target is operator.getitem else None
            made: Any = node.args[0] if node.target is operator.getitem else node
            if len(made.all_input_nodes) != 1:
                raise CaptureError(f"{self.model}: cannot write through {node.format_node()}; write into a copy of it")
            steps.append((made, item))

        def view(out: Tensor) -> Tensor:
            for made, item in steps:
                args, kwargs = _filled(made, out)
                out = made.target(*args, **kwargs) if item is None else made.target(*args, **kwargs)[item]
            return out

        return view

    # ---- the end ------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """What buffers hold at the end goes into them, once; what was made anew and is not read is dropped."""
        for memory, buffer in self.buffers.items():
            self.refresh(memory.root)
            value = self.lower.env[memory.root]
            rule = opaque([self.lower.shape(buffer), self.lower.shape(value)], "updates a buffer")
            like = torch.zeros(1)
            self.lower.emit(
                "update_buffer", [buffer, value], like, rule, Opaque(_update), random=True, differentiable=False
            )

    def live(self, nodes: list[Node], outputs: set[int]) -> list[Node]:
        """The nodes without those made anew of which nothing is read."""
        read, kept = set(outputs), []
        for node in reversed(nodes):
            if node.name in self.spare and not read.intersection(node.outputs):
                continue
            read.update(node.inputs)
            kept.append(node)
        return kept[::-1]


def _update(buffer: Tensor, value: Tensor) -> Tensor:
    with torch.no_grad():
        buffer.copy_(value)
    return torch.zeros(1)


class _Grad:
    """Nodes made inside carry gradients, or none, whatever block they are met in."""

    def __init__(self, lower: Lower, on: bool) -> None:
        self.lower, self.on = lower, on

    def __enter__(self) -> None:
        self.before, self.lower.no_grad = self.lower.no_grad, int(not self.on)

    def __exit__(self, *_: object) -> None:
        self.lower.no_grad = self.before


class _Spare:
    """Nodes made inside are dropped at the end if nothing reads them."""

    def __init__(self, writes: Writes) -> None:
        self.writes = writes

    def __enter__(self) -> None:
        self.start = len(self.writes.lower.nodes)

    def __exit__(self, *_: object) -> None:
        self.writes.spare.update(n.name for n in self.writes.lower.nodes[self.start :] if not n.random)


def _plain(like: Tensor) -> tuple[Any, ...]:
    return like.dtype, like.is_conj(), like.is_neg()


def _filled(node: FxNode, tensor: Tensor) -> Any:
    """The arguments of a view, with `tensor` for what it is taken from."""
    return pytree.tree_map(
        lambda a: tensor if isinstance(a, FxNode) else a,
        (node.args, node.kwargs),
        is_leaf=lambda a: isinstance(a, FxNode),
    )


def _by_strides(like: Tensor, full: Tensor) -> Callable[[Tensor], Tensor]:
    size, stride, offset = like.shape, like.stride(), like.storage_offset() - full.storage_offset()
    return lambda out: out.as_strided(size, stride, offset)


def refuse_mutation(model: str, name: str) -> None:
    """A write into an input."""
    raise InputError(
        f"{model} writes into its input {name!r} in place: regions read the input more than once, so it "
        "must stay as it is. Clone it at the start of forward (x = x.clone()), or use the out-of-place operator."
    )


# ---- the functional operator ------------------------------------------------------------------------------------


def functional(target: Any) -> Any:
    """The operator that gives the result of an in-place one, or None."""
    name, space = target._schema.name.split("::")[1], target.namespace
    packet = getattr(getattr(torch.ops, space), name[:-1], None) if name.endswith("_") else None
    wanted = _signature(target)
    for overload in packet.overloads() if packet is not None else ():
        found = getattr(packet, overload)
        if _signature(found) == wanted and not found._schema.is_mutable:
            return found
    return None


def _signature(target: Any) -> list[tuple[str, str]]:
    """Names and types; what is written is `self`, which the functional form may call otherwise (`dropout`: input)."""
    first, *rest = target._schema.arguments
    return [("", str(first.type)), *((a.name, str(a.type)) for a in rest)]


def same_result(plain: Any, node: FxNode) -> bool:
    """Whether the functional operator gives the dtype and shape that the in-place one keeps."""
    like = node.meta["val"]
    args, kwargs = pytree.tree_map(
        lambda a: a.meta.get("val") if isinstance(a, FxNode) else a,
        (node.args, node.kwargs),
        is_leaf=lambda a: isinstance(a, FxNode),
    )
    if plain.__name__.startswith(("copy", "fill")):
        return True
    try:
        with like.fake_mode:
            result = plain(*args, **kwargs)
    except (RuntimeError, TypeError, AttributeError):
        return False
    return isinstance(result, Tensor) and result.dtype == like.dtype and result.shape == like.shape


def on_copies(lower: Lower, node: FxNode, targets: list[FxNode]) -> tuple[Callable[..., list[Tensor]], list[int]]:
    """The in-place operator itself on copies of what it writes into: a function of the tensors, and these."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs), is_leaf=lambda a: isinstance(a, FxNode))
    slots = [k for k, a in enumerate(leaves) if isinstance(a, FxNode) and isinstance(lower.env.get(a), int)]
    values = [getattr(lower.env.get(a), "value", None) if isinstance(a, FxNode) else a for a in leaves]
    call: Any = node.target

    def local(*xs: Tensor) -> list[Tensor]:
        filled = list(values)
        outs: dict[Any, Tensor] = {}
        for k, x in zip(slots, xs, strict=True):
            filled[k] = outs.setdefault(leaves[k], x.clone()) if leaves[k] in targets else x
        args, kwargs = pytree.tree_unflatten(filled, spec)
        call(*args, **kwargs)
        return [outs[t] for t in targets]

    return local, [lower.env[leaves[k]] for k in slots]


def lower_on_a_copy(lower: Lower, node: FxNode, plain: Any) -> int:
    """An in-place operator whose functional form, if any, does not fit: by regions if it is pointwise, else whole."""
    function, inputs = on_copies(lower, node, written(node))
    shapes = [lower.shape(i) for i in inputs]
    like, name = node.meta["val"], op_name(node)
    operation: Any = plain or node.target
    tags = operation.tags
    out = tuple(int(s) for s in like.shape)
    random = torch.Tag.nondeterministic_seeded in tags
    if torch.Tag.pointwise in tags and not random and all(len(s) <= len(out) for s in shapes):
        return int(lower.emit(name, inputs, like, pointwise(shapes, out), Call(lambda *xs: function(*xs)[0])))

    def whole(*xs: Tensor) -> Tensor:
        return function(*xs)[0]

    kernel: Callable[..., Any] = whole
    if random and any(lower.values[i].differentiable for i in inputs):
        kernel, inputs = seeded(lower, whole, inputs)
    drawn = random and kernel is whole
    rule = opaque([lower.shape(i) for i in inputs], f"{name} has no region rule")
    return int(lower.emit(name, inputs, like, rule, Opaque(kernel), random=drawn, differentiable=not drawn))


def lower_many_on_copies(lower: Lower, node: FxNode, targets: list[FxNode]) -> None:
    """An operator that writes into several tensors at once (`_foreach_add_`), whole."""
    function, inputs = on_copies(lower, node, targets)
    rule = opaque([lower.shape(i) for i in inputs], f"{op_name(node)} has no region rule")
    likes = [t.meta["val"] for t in targets]
    found = lower.emit(op_name(node), inputs, likes, rule, Opaque(function))
    for target, value in zip(targets, found, strict=True):
        lower.writes.write(target, value)
    lower.env[node] = lower.tuples[node] = found
