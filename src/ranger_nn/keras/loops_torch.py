"""Loops on PyTorch: see `loops.Loops`. Nothing is traced: steps are integers, and a branch is an `if`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from keras import ops
from torch import Tensor

from ranger_nn.keras.loops import Backward, Block, Forward, IntegerSteps


class TorchLoops(IntegerSteps):
    """A Python loop; results are written into place."""

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        """Nothing is traced."""
        return ops.zeros(shape, dtype)

    def take(self, x: Any, dim: int, start: Any, length: int) -> Any:
        """A view; copied where it hangs over."""
        size = x.shape[dim]
        if start >= 0 and start + length <= size:
            return x.narrow(dim, start, length)
        index = (torch.arange(length, device=x.device) + start).clamp_(0, size - 1)
        return x.index_select(dim, index)

    def own(self, x: Any) -> Any:
        """A copy of a view: it would keep all of what it was cut from."""
        return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x

    def used(self, windows: Any, value: int) -> None:
        """Let go."""
        windows.pop(value)

    def used_all(self, windows: Any) -> None:
        """Let go of the list: each window goes once it is joined."""
        windows.clear()

    def split(self, x: Any, dim: int, places: Sequence[int]) -> list[Any]:
        """Views."""
        return list(torch.tensor_split(x, list(places), dim=dim))

    def add(self, x: Any, dim: int, start: Any, rows: Any) -> Any:
        """In place."""
        lo, hi = max(start, 0), min(start + rows.shape[dim], x.shape[dim])
        if hi > lo:
            x.narrow(dim, lo, hi - lo).add_(rows.narrow(dim, lo - start, hi - lo))
        return x

    def open(self, shape: Sequence[int], dtype: str, dim: int, rate: int, count: int, size: int) -> Any:
        """The value itself."""
        full = [size if d == dim else n for d, n in enumerate(shape)]
        return ops.zeros(full, dtype)

    def put(self, sink: Any, dim: int, i: Any, count: int, rows: Any, first: Any) -> Any:
        """Copied into place, without the rows outside."""
        lo, hi = max(first, 0), min(first + rows.shape[dim], sink.shape[dim])
        if 0 <= i < count and hi > lo:
            sink.narrow(dim, lo, hi - lo).copy_(rows.narrow(dim, lo - first, hi - lo))
        return sink

    def close(self, sink: Any, dim: int, first: int, size: int) -> Any:
        """As it is."""
        return sink

    def stack(self, count: int, like: Sequence[Block]) -> Any:
        """A list of lists."""
        zeros = [self.zeros(*block) for block in like]
        return [zeros] * count

    def push(self, stack: Any, i: Any, blocks: Sequence[Any]) -> Any:
        """Copies: a view would keep what it was cut from."""
        stack[i] = [b.clone() for b in blocks]
        return stack

    def blocks(self, stack: Any, i: Any, like: Sequence[Block]) -> list[Any]:
        """From the list."""
        return list(stack[i])

    def full(self, stack: Any, joined: bool) -> Any:
        """As it is."""
        return stack

    def vjp(
        self, function: Callable[..., list[Any]], args: Sequence[Any]
    ) -> tuple[list[Any], Callable[..., list[Any]]]:
        """Autograd of one step."""
        leaves = [a.detach().requires_grad_() for a in args]
        with torch.enable_grad():
            results = function(*leaves)

        def pull(grads: Sequence[Any]) -> list[Any]:
            pairs = [(r, g) for r, g in zip(results, grads, strict=True) if r.requires_grad]
            if not pairs:
                return [torch.zeros_like(a) for a in leaves]
            outs, given = zip(*pairs, strict=True)
            given = tuple(g.to(r.dtype) for r, g in pairs)
            found = torch.autograd.grad(outs, leaves, given, allow_unused=True)
            return [torch.zeros_like(a) if g is None else g for g, a in zip(found, leaves, strict=True)]

        return [r.detach() for r in results], pull

    def differentiable(self, forward: Forward, backward: Backward, args: Sequence[Any]) -> list[Any]:
        """An autograd function, where gradients are on."""
        if not (torch.is_grad_enabled() and any(a.requires_grad for a in args)):
            return forward(args, False)[0]
        return list(_Run.apply(forward, backward, *args))


class _Run(torch.autograd.Function):
    """One sweep."""

    @staticmethod
    def forward(ctx: Any, forward: Forward, backward: Backward, *args: Tensor) -> Any:
        results, ctx.saved = forward([a.detach() for a in args], True)
        ctx.pull, ctx.count = backward, len(args)
        ctx.save_for_backward(*args, *results)
        ctx.mark_non_differentiable(*[r for r in results if not r.is_floating_point()])
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        kept = ctx.saved_tensors
        args, results = kept[: ctx.count], kept[ctx.count :]
        wanted = ctx.needs_input_grad[2:]
        found = ctx.pull([a.detach() for a in args], ctx.saved, results, grads, wanted)
        ctx.saved = None
        return (None, None, *found)
