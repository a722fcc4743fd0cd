"""One call of an ATen operator, as the rules in `lowering*.py` are given it. Enter at `Operator`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node as FxNode

from ranger_nn.core.graph import Rule
from ranger_nn.ops.pointwise import pointwise
from ranger_nn.torch import kernels as K
from ranger_nn.torch.lower import Lower, Ref, closure


@dataclass
class Operator:
    """One call: `arg(name)` by the schema's argument name; tensors come as value indices."""

    lower: Lower
    node: FxNode
    target: Any
    name: str
    like: Any
    arguments: dict[str, Any]

    def arg(self, name: str, default: Any = None) -> Any:
        """The argument, `Ref`s replaced by value indices."""
        found = self.arguments.get(name, default)
        return found.index if isinstance(found, Ref) else found

    @property
    def out(self) -> tuple[int, ...]:
        """Shape of the result."""
        return tuple(int(s) for s in self.like.shape)

    def shape(self, v: int) -> tuple[int, ...]:
        """Shape of a value."""
        return self.lower.shape(v)

    def dim(self, name: str, rank: int, default: int = 0) -> int:
        """A dimension argument, made non-negative."""
        d = self.arg(name, default)
        return d + rank if d < 0 else d

    def tensors(self) -> list[int]:
        """Value indices of all tensor arguments, in order."""
        return closure(self.lower, self.target, self.node.args, self.node.kwargs)[1]

    def call(self) -> tuple[Callable[..., Any], list[int]]:
        """The operator with constants bound, and its tensors."""
        return closure(self.lower, self.target, self.node.args, self.node.kwargs)

    def each(self, name: str, value: Any) -> Callable[..., Any]:
        """The operator with one constant argument replaced, as a function of its tensors."""
        names = [a.name for a in self.target._schema.arguments]
        args = [value if n == name else a for n, a in zip(names, self.node.args, strict=False)]
        kwargs = dict(self.node.kwargs)
        if names.index(name) >= len(args):
            kwargs[name] = value
        return closure(self.lower, self.target, tuple(args), kwargs)[0]

    def in_type(self, v: int, dtype: torch.dtype) -> int:
        """A value in another type, as autocast and type promotion put it before an operator; itself where it is of it."""
        if self.lower.values[v].dtype == str(dtype)[6:]:
            return v
        shape = self.shape(v)
        like = torch.empty(shape, dtype=dtype, device="meta")
        return self.lower.emit("to", [v], like, pointwise([shape], shape), K.Call(lambda x: x.to(dtype)))

    def emit(self, inputs: Sequence[int], region: Rule, kernel: K.Kernel, **options: Any) -> Any:
        """Add the node."""
        return self.lower.emit(self.name, inputs, self.like, region, kernel, **options)
