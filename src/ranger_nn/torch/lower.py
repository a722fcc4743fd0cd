"""State of one capture: values and nodes made so far, and what each node of the exported graph stands for.

Rules of operators (`lowering*.py`) and writes in place (`inplace.py`) add nodes through it. Enter at `Lower`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx import Node as FxNode
from torch.utils import _pytree as pytree

from ranger_nn.core.graph import COMPUTED, INPUT, Node, Rule, Value
from ranger_nn.torch.aliases import Aliases
from ranger_nn.torch.kernels import SAVES_NOTHING, Call, Kernel, Light
from ranger_nn.torch.layout import result_layout

SAME = {"alias", "contiguous", "lift_fresh_copy", "lift_fresh", "detach_"}


class Names(Protocol):
    """What names mean while tensors are written in place: `inplace.Writes`."""

    aliases: Aliases

    def made(self, node: FxNode) -> None:
        """`node` has just got its value."""
        ...

    def refresh(self, node: FxNode) -> None:
        """Make `node` mean what its memory holds at present."""
        ...

    def hold(self, root: FxNode) -> None:
        """`root` is a buffer, or a constant."""
        ...

    def check(self, node: FxNode, target: FxNode) -> None:
        """Refuse a write that cannot be repeated."""
        ...

    def buffer(self, node: FxNode) -> int | None:
        """The value of the buffer that a name means itself."""
        ...

    def in_place(self, target: FxNode) -> bool:
        """Whether the write is one into a buffer, for good."""
        ...

    def keeps(self, node: FxNode) -> bool:
        """Whether the operator writes what is there already."""
        ...

    def write(self, target: FxNode, value: int, whole: bool = False) -> int:
        """`target` means `value` from now on; what it then means."""
        ...

    def without_gradient(self, value: int, node: FxNode) -> int:
        """The value, through which no gradient flows."""
        ...

    def finish(self) -> None:
        """Writes into buffers that last."""
        ...

    def live(self, nodes: list[Node], outputs: set[int]) -> list[Node]:
        """The nodes that outputs and buffers need."""
        ...


ORDERED = {"linear", "addmm", "mm", "bmm", "baddbmm", "matmul", "layer_norm", "native_layer_norm", "im2col"}
"""Operators whose result lies in its usual order whatever that of their inputs."""


class Lower:
    """State of one capture: values made so far, and the functions that lowering rules call."""

    def __init__(self, grad: bool, autocast: torch.dtype | None = None) -> None:
        """`grad`: gradients will be asked for; `autocast`: the dtype where autocast is on."""
        self.values: list[Value] = []
        self.nodes: list[Node] = []
        self.sources: dict[int, tuple[str, Any]] = {}
        self.env: dict[FxNode, Any] = {}
        self.tuples: dict[FxNode, list[int | Static]] = {}
        self.grad = grad
        self.autocast = autocast
        self.no_grad = 0
        self.where = ""
        self.names: dict[str, int] = {}
        self.orders: dict[int, bool] = {}
        """Values whose order in memory is known (it follows from that of what they are made of): whether it is usual."""
        self.writes: Names
        self.constant: Callable[[tuple[str, Any]], Tensor | None]
        """A constant's source -> the tensor whose numbers the plan may hold, or None: `folding.Folding.numbers`."""
        self.parts: Callable[[str, GraphModule, list[int]], Any]
        """(name, traced, inputs) -> what a graph that an operator was traced to gives, or None: `capture.lower_parts`."""

    def value(self, name: str, like: Tensor, kind: str, differentiable: bool) -> int:
        """A new value shaped like `like`."""
        index = len(self.values)
        floating = like.dtype.is_floating_point or like.dtype.is_complex
        shape = tuple(int(s) for s in like.shape)
        self.values.append(
            Value(index, name, shape, str(like.dtype)[6:], like.element_size(), kind, floating and differentiable)
        )
        return index

    def external(self, name: str, like: Tensor, kind: str, source: tuple[str, Any], differentiable: bool) -> int:
        """A value that the caller, the module or the capture provides."""
        index = self.value(name, like, kind, differentiable and self.grad)
        self.sources[index] = source
        return index

    def shape(self, v: int) -> tuple[int, ...]:
        """Shape of a value."""
        return self.values[v].shape

    def emit(
        self,
        op: str,
        inputs: Sequence[int],
        like: Tensor | Sequence[Tensor],
        rule: Rule,
        kernel: Kernel,
        *,
        macs: int = 0,
        alias: int | None = None,
        vjp_reads: Sequence[int] | None = None,
        random: bool = False,
        differentiable: bool = True,
        vjp_outputs: Sequence[int] = (),
    ) -> Any:
        """Add a node; its output value, or a list of them where `like` is a sequence."""
        flows = differentiable and self.grad and not self.no_grad and any(self.values[i].differentiable for i in inputs)
        count = self.names.get(op, 0)
        self.names[op] = count + 1
        name = f"{op}_{count}"
        many = isinstance(like, (list, tuple))
        outs = [
            self.value(name, t, COMPUTED, flows and i not in vjp_outputs)
            for i, t in enumerate(like if many else [like])
        ]
        kept = "keeps" if rule.pointwise else kernel.layout
        before = [(len(self.values[i].shape), self.values[i].layout) for i in inputs]
        if isinstance(like, Tensor) and (layout := result_layout(kept, before, like)):
            self.values[outs[0]] = replace(self.values[outs[0]], layout=layout)
            kernel.channels_last = True
        kernel.dense = bool(inputs) and self.orders.get(inputs[0], False)
        made = [i for i in inputs if self.values[i].kind in (INPUT, COMPUTED)]
        if op in ORDERED or all(i in self.orders and not self.values[i].layout for i in made):
            self.orders.update((v, t.is_contiguous()) for v, t in zip(outs, like if many else [like], strict=True))
        kernel.op, kernel.pointwise = op, rule.pointwise
        if inputs:
            kernel.itemsize = self.values[inputs[0]].itemsize
            kernel.itemsizes = tuple(self.values[i].itemsize for i in inputs)
            kernel.whole_bytes = self.values[inputs[0]].nbytes
        if isinstance(like, Tensor):
            kernel.computes = like.dtype
        kernel.reads_channels_last = bool(inputs) and before[0][1] != ""
        free = isinstance(kernel, Light) or (isinstance(kernel, Call) and rule.pointwise and op in SAVES_NOTHING)
        every = () if free else tuple(range(len(inputs)))
        reads = every if vjp_reads is None else tuple(vjp_reads)
        self.nodes.append(
            Node(
                name,
                op,
                tuple(inputs),
                tuple(outs),
                rule,
                kernel,
                macs,
                alias,
                kernel.may_copy,
                reads,
                random=random,
                where=self.where,
                vjp_outputs=tuple(vjp_outputs),
            )
        )
        return outs if many else outs[0]


def _flatten_constants(args: Any) -> tuple[list[Any], Any]:
    return pytree.tree_flatten(args, is_leaf=lambda a: isinstance(a, FxNode))


def closure(
    lower: Lower, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], list[int]]:
    """`target` with every constant bound: a function of the tensor values, and these values in order."""
    leaves, spec = _flatten_constants((args, kwargs))
    slots, inputs = [], []
    template: list[Any] = []
    for k, leaf in enumerate(leaves):
        if (
            isinstance(leaf, FxNode)
            and isinstance(lower.env.get(leaf), int)
            and not isinstance(leaf.meta.get("val"), (int, float, bool))
        ):
            slots.append(k)
            inputs.append(lower.env[leaf])
            template.append(None)
        else:
            template.append(_constant(lower, leaf))
    flat = not any(isinstance(a, (list, tuple, dict)) for a in args)
    if slots == list(range(len(slots))) and len(slots) == len(leaves) and not kwargs and flat:
        return target, inputs
    flat_positional = flat and not kwargs and len(leaves) == len(args)
    if flat_positional and slots == list(range(len(slots))):
        rest = template[len(slots) :]
        return (lambda *xs: target(*xs, *rest)), inputs

    def call(*xs: Any) -> Any:
        filled = list(template)
        for k, x in zip(slots, xs, strict=True):
            filled[k] = x
        a, kw = pytree.tree_unflatten(filled, spec)
        return target(*a, **kw)

    return call, inputs


class Static:
    """A Python number that a graph node stands for."""

    def __init__(self, value: Any) -> None:
        """The number."""
        self.value = value


def _constant(lower: Lower, leaf: Any) -> Any:
    if isinstance(leaf, FxNode):
        known = lower.env.get(leaf)
        return known.value if isinstance(known, Static) else leaf.meta.get("val")
    return leaf


def resolve(lower: Lower, args: Any) -> Any:
    """Arguments with graph nodes replaced by value indices wrapped as `Ref`, constants as they are."""
    return pytree.tree_map(
        lambda a: (
            Ref(lower.env[a]) if isinstance(a, FxNode) and isinstance(lower.env.get(a), int) else _constant(lower, a)
        ),
        args,
        is_leaf=lambda a: isinstance(a, FxNode),
    )


@dataclass(frozen=True)
class Ref:
    """A value of the graph among an operator's arguments."""

    index: int
