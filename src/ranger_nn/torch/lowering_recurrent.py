"""LSTM, GRU and RNN taken apart: one node for each layer and direction, so that each has its own place in the plan.

    x -> layer 0 -> dropout -> layer 1 -> y            forward only: every layer takes part in a slide
          |                     |
          +------ states -------+-> joined along dimension 0

    both directions: y = [there, back] along the features; what goes back runs whole

PyTorch's own operator goes layer by layer too, so the numbers stay. Enter at `lower_recurrent`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ranger_nn.ops import movement
from ranger_nn.ops.recurrence import borders, carried, in_chunks
from ranger_nn.torch import kernels_movement as M
from ranger_nn.torch.identity import autocast_dtype
from ranger_nn.torch.kernels_recurrent import Recurrence
from ranger_nn.torch.lowering_random import emit_dropout
from ranger_nn.torch.operator import Operator
from ranger_nn.torch.workspace import available

MASK_STEPS = 64
"""Steps whose dropout mask is drawn at a time."""


def lower_recurrent(op: Operator) -> Any:
    """Values of (output, last states ...), None for those that nothing reads; None for packed sequences."""
    return _Layers(op).lower() if "batch_first" in op.arguments else None


class _Layers:
    """One call of `aten.lstm`, `aten.gru` or `aten.rnn_*`."""

    def __init__(self, op: Operator) -> None:
        """The arguments, by the names of the schema."""
        self.op, self.made = op, op.lower
        hx = op.arguments["hx"]
        self.hx = [h.index for h in (hx if isinstance(hx, (list, tuple)) else [hx])]
        self.params = [p.index for p in op.arguments["params"]]
        self.biases, self.layers = bool(op.arg("has_biases")), int(op.arg("num_layers"))
        self.time = 1 if op.arg("batch_first") else 0
        self.ways = 2 if op.arg("bidirectional") else 1
        self.dropout = float(op.arg("dropout")) if op.arg("train") else 0.0
        self.read = {u.args[1] for u in op.node.users if u.users}
        self.per_layer = len(self.params) // (self.layers * self.ways)

    def lower(self) -> list[Any]:
        """All layers."""
        x = self.op.arg("input")
        states: list[list[int]] = [[] for _ in self.hx]
        for layer in range(self.layers):
            last = layer + 1 == self.layers
            outs: list[int] = []
            for way in range(self.ways):
                y, *after = self._node(layer, way, x, gives=not last or 0 in self.read)
                outs.append(y)
                for found, state in zip(states, after, strict=True):
                    found.append(state)
            if last and 0 not in self.read:
                break
            x = outs[0] if self.ways == 1 else self._join(outs, 2)
            x = x if last or not self.dropout else self._drop(x)
        joined = [self._join(s, 0) if i + 1 in self.read else None for i, s in enumerate(states)]
        return [x if 0 in self.read else None, *joined]

    def _like(self, shape: Sequence[int], output: int) -> Tensor:
        return torch.empty(tuple(shape), dtype=self.op.like[output].dtype, device="meta")

    def _node(self, layer: int, way: int, x: int, gives: bool) -> list[Any]:
        """y (None where it is not given) and the states behind the last step, of one layer in one direction."""
        lower, index = self.made, layer * self.ways + way
        before = [self._state(h, index) for h in self.hx]
        weights = self.params[index * self.per_layer : (index + 1) * self.per_layer]
        inputs, shape = [x, *before, *weights], lower.shape(x)
        shapes = [lower.shape(v) for v in inputs]
        out = int(self.op.like[1].shape[-1])
        trains = lower.grad and not lower.no_grad
        saves = trains and any(lower.values[v].differentiable for v in inputs)
        kernel = Recurrence(self.op.name, shape, self.time, [lower.shape(w) for w in weights], self.biases, out)
        kernel.planned(
            getattr(torch, lower.values[x].dtype),
            autocast_dtype(self.op.like[0].device),
            reverse=way == 1,
            saves=saves,
            gives=gives or not (trains or way),
            fused=self._fused(kernel),
        )
        likes = [self._like((*shape[:2], out), 0)] if kernel.gives else []
        likes += [self._like(lower.shape(h), i + 1) for i, h in enumerate(before)]
        count = borders(kernel.steps, kernel.chunk)
        kept = [self._like((count, *lower.shape(h)[1:]), i + 1) for i, h in enumerate(before)] if saves else []
        ordered = not trains and not way
        outs = lower.emit(
            self.op.name,
            inputs,
            [*likes, *kept],
            carried(shapes, self.time) if ordered else in_chunks(shapes, kernel.reason),
            kernel,
            macs=kernel.weights * kernel.steps * kernel.samples,
            vjp_outputs=range(len(likes), len(likes) + len(kept)),
        )
        return [*([] if kernel.gives else [None]), *outs[: len(likes)]]

    def _fused(self, kernel: Recurrence) -> bool:
        """Whether oneDNN runs this layer: PyTorch's own condition."""
        like = self.op.like[0]
        plain = kernel.mode == "lstm" and kernel.out == kernel.hidden
        return plain and like.device.type == "cpu" and available(like.dtype)

    def _state(self, h: int, index: int) -> int:
        """Layer and direction `index` of the states before the first step."""
        shape = self.made.shape(h)
        if shape[0] == 1:
            return h
        like = torch.empty((1, *shape[1:]), dtype=getattr(torch, self.made.values[h].dtype), device="meta")
        rule = movement.crop(shape, 0, index, 1)
        return self.made.emit("slice", [h], like, rule, M.Crop(0, index, 1), alias=0)

    def _join(self, values: Sequence[int], dim: int) -> int:
        if len(values) == 1:
            return values[0]
        shapes = [self.made.shape(v) for v in values]
        shape = list(shapes[0])
        shape[dim] = sum(s[dim] for s in shapes)
        like = torch.empty(shape, dtype=getattr(torch, self.made.values[values[0]].dtype), device="meta")
        rule = movement.concatenate(shapes, dim)
        return self.made.emit("cat", values, like, rule, M.Concatenate(dim), vjp_reads=())

    def _drop(self, x: int) -> int:
        like = torch.empty(self.made.shape(x), dtype=getattr(torch, self.made.values[x].dtype), device="meta")
        return emit_dropout(self.made, x, self.dropout, like, self.time, min(MASK_STEPS, like.shape[self.time]))
