"""PyTorch's side of the loop: what each instruction calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ranger_nn.core import program as P
from ranger_nn.core.graph import Graph
from ranger_nn.core.program import Instruction
from ranger_nn.torch.layout import FORMATS


def _write(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


def _add(target: Tensor, source: Tensor) -> None:
    target.add_(source)


class TorchEngine:
    """Binds instructions of one graph to PyTorch calls, on one device."""

    def __init__(self, graph: Graph, device: torch.device) -> None:
        """`device`: where buffers are made."""
        self.graph, self.device = graph, device

    narrow: Any = staticmethod(torch.Tensor.narrow)

    @staticmethod
    def join(parts: Any, dim: int) -> Tensor:
        """Concatenation along `dim`."""
        return torch.cat(parts, dim)

    def bind(self, instruction: Instruction) -> Callable[..., Any]:
        """The closure of one instruction."""
        i = instruction
        if i.op == P.RUN:
            node = self.graph.nodes[i.node]
            return self._filled(i, node.kernel.bind(i.out_box, [r.box for r in i.reads]))
        if i.op == P.VJP:
            return self._vjp(i)
        if i.op in (P.ALLOC, P.ZEROS):
            value = self.graph.values[i.value]
            shape, dtype, device = i.shape, getattr(torch, value.dtype), self.device
            last = value.layout and i.value not in self.graph.outputs
            order = FORMATS[len(shape)] if last else torch.contiguous_format
            if i.op == P.ALLOC:
                return lambda: torch.empty(shape, dtype=dtype, device=device, memory_format=order)
            return lambda: torch.empty(shape, dtype=dtype, device=device, memory_format=order).zero_()
        if i.op == P.TRIM:
            return torch.clone
        if i.op == P.WRITE:
            return _write
        if i.op == P.ADD:
            return _add
        kernel = self.graph.nodes[i.node].kernel
        if i.op == P.MERGE:
            n_a, n_b = i.count
            return lambda a, b: kernel.merge(a, b, n_a, n_b)
        return {P.LIFT: kernel.lift, P.FINISH: kernel.finish, P.REDUCE_VJP: kernel.region_vjp}[i.op]

    def _filled(self, i: Instruction, function: Callable[..., Any]) -> Callable[..., Any]:
        """Regions that are not read (empty, or not needed by backward) stand in as expanded zeros: no memory."""
        inputs = self.graph.nodes[i.node].inputs
        absent = [
            (n, [hi - lo for lo, hi in r.box], getattr(torch, self.graph.values[inputs[n]].dtype))
            for n, r in enumerate(i.reads[: len(inputs)])
            if not r.parts
        ]
        if not absent:
            return function
        device = self.device

        def call(*args: Any) -> Any:
            filled = list(args)
            for n, shape, dtype in absent:
                filled[n] = torch.zeros((), dtype=dtype, device=device).expand(shape)
            return function(*filled)

        return call

    def _vjp(self, i: Instruction) -> Callable[..., Any]:
        node = self.graph.nodes[i.node]
        boxes = [r.box for r in i.reads[: len(node.inputs)]]
        vjp = self._filled(i, node.kernel.bind_vjp(i.out_box, boxes, i.wanted))
        many = len(i.outs) != 1

        def call(*args: Any) -> Any:
            grads = [g for g in vjp(*args) if g is not None]
            return grads if many else grads[0]

        return call
