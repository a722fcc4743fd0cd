"""Batch norm over regions that run in several calls: the statistics of all of them, as in one call.

    forward     a pass for each norm, the first to the last: its moments in each call, merged; norms before it take the
                merged ones. A last pass has them all.
    backward    a pass for each norm, the last to the first: the sums over all calls of the gradient of its result, and of
                that times the normalised input, which its own gradient needs (Ioffe & Szegedy 2015, section 3)

So n norms cost n passes more in each direction, and no activation is kept. A norm is met where torch calls it, not by
its class: `torch.nn.functional.batch_norm` in training, whoever calls it. Enter at `Norms`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import array_api_compat.torch as xp
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ranger_nn.aggregate.monoid import Moments
from ranger_nn.errors import PartitionError

_loops = threading.local()  # .depth: loops under memory around the code that runs


class Enough(BaseException):
    """The norm whose moments are wanted has been met: leave the network. No error: nothing else may catch it."""


@dataclass(frozen=True)
class Stats:
    """Moments of a norm's input over all calls.

    Attributes:
        mean, squares: for each channel, the mean and the sum of squared deviations.
        count: elements of a channel.
        needs: does the input need a gradient.
    """

    mean: Tensor
    squares: Tensor
    count: int
    needs: bool

    @classmethod
    def of(cls, x: Tensor) -> Stats:
        """Of one call: (batch, channels, ...)."""
        y = x.detach()
        y = y.float() if y.dtype in (torch.float16, torch.bfloat16) else y
        var, mean = torch.var_mean(y, [0, *range(2, y.dim())], correction=0)
        count = y.numel() // max(y.shape[1], 1)
        return cls(mean, var * count, count, x.requires_grad)

    @staticmethod
    def merge(calls: Sequence[Stats]) -> Stats:
        """Of several calls."""
        total = calls[0]
        for one in calls[1:]:
            a, b = (total.mean, total.squares), (one.mean, one.squares)
            mean, squares = Moments().merge(xp, a, b, total.count, one.count)
            total = Stats(mean, squares, total.count + one.count, total.needs or one.needs)
        return total

    @property
    def var(self) -> Tensor:
        """Divided by the count: what normalises."""
        return self.squares / self.count


Sums = tuple[Tensor, Tensor]


@dataclass(eq=False)
class Norms(TorchFunctionMode):
    """While it is on, batch norms in training are those of all calls.

    Attributes:
        given: statistics of the first norms that are met.
        stop: leave the network at the first norm that has none; otherwise it takes those of this call.
        sums: for norms, by their number, what their gradient needs.
        watched: the norm whose input and result are wanted.
    """

    given: Sequence[Stats] = ()
    stop: bool = False
    sums: dict[int, Sums] = field(default_factory=dict)
    watched: int = -1
    found: list[Stats] = field(default_factory=list)
    seen: tuple[Tensor, Tensor, float] | None = None
    calls: int = 0
    stopped: bool = False

    def __post_init__(self) -> None:
        """Remember how deep this loop lies."""
        super().__init__()
        self.depth = depth()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Batch norm in training here, all else as it is."""
        kwargs = kwargs or {}
        if func is F.batch_norm or func is torch.batch_norm:
            call = _functional(*args, **kwargs) if func is F.batch_norm else _torch(*args, **kwargs)
            if call.training and call.x.numel():
                return self._norm(call)
        return func(*args, **kwargs)

    def _norm(self, call: _Call) -> Tensor:
        if depth() != self.depth:
            raise PartitionError(
                "memory= of a layer inside the local network of a layer with memory=, with batch norm in training: its "
                "statistics are those of all regions of both; give memory to the outer layer alone, or use GroupNorm"
            )
        number, self.calls = self.calls, self.calls + 1
        if number < len(self.given):
            stats = self.given[number]
        else:
            stats = Stats.of(call.x)
            self.found.append(stats)
            if self.stop:
                self.stopped = True
                raise Enough
        call.follow(stats)
        y: Tensor = _Given.apply(call.x, call.weight, call.bias, stats, self.sums.get(number), call.eps)
        if number == self.watched:
            self.seen = call.x.detach(), y, call.eps
        return y


def depth() -> int:
    """Loops around the code that runs now."""
    return getattr(_loops, "depth", 0)


class Inside:
    """Inside one loop more."""

    def __enter__(self) -> None:
        """One more."""
        _loops.depth = depth() + 1

    def __exit__(self, *_: object) -> None:
        """One less."""
        _loops.depth = depth() - 1


def sums(seen: tuple[Tensor, Tensor, float], stats: Stats, grad: Tensor) -> Sums:
    """Sums over a call of a norm result's gradient, and of that times the normalised input."""
    x, _, eps = seen
    _, times, plain = _pull(grad, x, None, stats, eps, (False, True, True))
    return plain, times


@dataclass(frozen=True)
class _Call:
    """Arguments of a batch norm."""

    x: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: float
    eps: float

    def follow(self, stats: Stats) -> None:
        """The running statistics move by those of all calls."""
        with torch.no_grad():
            unbiased = stats.squares / max(stats.count - 1, 1)
            for running, now in ((self.running_mean, stats.mean), (self.running_var, unbiased)):
                if running is not None:
                    running.mul_(1 - self.momentum).add_(now.to(running.dtype), alpha=self.momentum)


def _functional(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> _Call:
    return _Call(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _torch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> _Call:
    return _Call(input, running_mean, running_var, weight, bias, training, momentum, eps)


class _Given(torch.autograd.Function):
    """Batch norm with these statistics, which are functions of the input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Stats, sums: Sums | None, eps: float
    ) -> Tensor:
        """Normalised, scaled and moved."""
        ctx.save_for_backward(x, weight)
        ctx.stats, ctx.sums, ctx.eps = stats, sums, eps
        ctx.kinds = [None if t is None else t.dtype for t in (weight, bias)]
        mean, var = (t.to(_exact(x)) for t in (stats.mean, stats.var))
        scale, shift = (None if t is None else t.to(_exact(x)) for t in (weight, bias))
        return torch.native_batch_norm(x, scale, shift, mean, var, False, 0.0, eps)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The gradient, also through the statistics."""
        x, weight = ctx.saved_tensors
        stats: Stats = ctx.stats
        wanted = tuple(ctx.needs_input_grad[:3])
        found, scale, shift = _pull(grads[0], x, weight, stats, ctx.eps, wanted)
        if wanted[0]:
            plain, times = ctx.sums
            slope = (stats.var + ctx.eps).rsqrt()
            by = slope if weight is None else slope * weight.to(slope.dtype)
            shape = (1, -1, *[1] * (x.dim() - 2))
            through = x - stats.mean.view(shape)  # first of all: a mean far from zero costs digits later
            through.mul_((-by * slope * times / stats.count).view(shape))
            through.add_((-by * plain / stats.count).view(shape))
            found = found.add_(through) if found.dtype == through.dtype else (found + through).to(x.dtype)
        kinds = [g if g is None or k is None else g.to(k) for g, k in zip((scale, shift), ctx.kinds)]
        return found, *kinds, None, None, None


def _pull(
    grad: Tensor, x: Tensor, weight: Tensor | None, stats: Stats, eps: float, wanted: tuple[bool, ...]
) -> tuple[Any, Any, Any]:
    """Gradients of input, weight and bias as if the statistics were constants."""
    mean, var = (t.to(_exact(x)) for t in (stats.mean, stats.var))
    scale = None if weight is None else weight.to(_exact(x))
    none = mean.new_empty(0)
    found = torch.ops.aten.native_batch_norm_backward(
        grad.to(x.dtype), x, scale, mean, var, none, none, False, eps, list(wanted)
    )
    return tuple(g if w else None for g, w in zip(found, wanted))  # type: ignore[return-value]


def _exact(x: Tensor) -> torch.dtype:
    """Statistics of 16-bit numbers are of 32 bits."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
