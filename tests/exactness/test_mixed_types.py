"""Operators that autocast runs in 32 bits, and joins of several types, by regions: the numbers and types of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ranger_nn


class Net(nn.Module):
    """A convolution before and one after a function."""

    def __init__(self, rank: int, function: Callable[..., Tensor], after: int | None = 4) -> None:
        super().__init__()
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.a, self.function = conv(3, 4, 3, padding=1), function
        self.b = conv(after, 3, 3, padding=1) if after else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self.a(x), x)
        return y if self.b is None else self.b(y)


SIZES = {1: (19,), 2: (19, 13), 3: (11, 9, 7)}
FUNCTIONS: dict[str, tuple[int, Callable[..., Tensor], int | None]] = {
    **{
        f"pad {mode} {rank}": (rank, lambda y, x, mode=mode, rank=rank: F.pad(y, (2, 1) * rank, mode=mode), 4)
        for mode in ("reflect", "replicate", "circular", "constant")
        for rank in (1, 2, 3)
    },
    **{
        f"{pool} {rank}": (rank, lambda y, x, pool=pool, rank=rank: getattr(F, f"{pool}{rank}d")(y, 3), 4)
        for pool in ("adaptive_avg_pool", "adaptive_max_pool", "max_pool", "avg_pool")
        for rank in (1, 2, 3)
    },
    "a skip from the input": (2, lambda y, x: torch.cat([y, x], 1), 7),
    "three types": (2, lambda y, x: torch.cat([y.double(), x[:, :1], y[:, :1].half()], 1), None),
    "stacked": (2, lambda y, x: torch.stack([y[:, :3], x], 2).flatten(1, 2), 6),
    "added": (2, lambda y, x: y[:, :3] + x, 3),
    "chosen": (2, lambda y, x: torch.where(x > 0, y[:, :3], x), 3),
    "along a cut axis": (2, lambda y, x: torch.cat([x[:, :1], y[:, :1]], 2), 1),
}


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_types_and_numbers(name: str, autocast: bool) -> None:
    """Forward, and gradients of input and parameters."""
    torch.manual_seed(0)
    rank, function, after = FUNCTIONS[name]
    net, x = Net(rank, function, after), torch.randn(2, 3, *SIZES[rank], requires_grad=True)
    found = []
    for module in (net, ranger_nn.regionalize(net, regions=(5,))):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
        grads = torch.autograd.grad((y.float() * weights).sum(), [x, *net.parameters()], allow_unused=True)
        found.append((y, *grads))
    near = 0.05 if autocast or name == "three types" else 1e-4
    for want, got in zip(*found, strict=True):
        if want is None:  # no part in the result
            assert got is None or not got.any()
            continue
        assert got.dtype == want.dtype
        assert (got - want).abs().max() <= near * (1 + want.abs().max())
