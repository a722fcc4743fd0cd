"""The promise on layers drawn at random: measured <= projected <= allowed, whatever the framework does inside.

What a convolution takes depends on sizes in jumps (which library runs it, what is unfolded, which channels are padded),
so that a few known networks show little. RANGER_EXAMPLES sets the number of layers (40 if unset, always the same ones).
"""

from __future__ import annotations

import os
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranger_nn
from tests.memory.test_promise import peak
from tests.support import leaves

EXAMPLES = int(os.environ.get("RANGER_EXAMPLES", "40"))
SEED = int(os.environ.get("RANGER_SEED", "0"))
LARGEST = 3 << 20  # elements of the largest activation, and of weights
WORK = 1 << 28  # multiply-adds: what a fraction of a second does
CHANNELS = (1, 1, 2, 3, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024)
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64, "autocast")
MODES = ("inference", "inference", "training", "frozen", "no input gradient")


@dataclass
class Case:
    """One layer (or a few), its input, and how it is planned."""

    model: nn.Module
    shape: tuple[int, ...]
    dtype: Any
    mode: str
    options: dict[str, Any]
    share: float | None

    def input(self) -> Tensor:
        """Random, with a gradient where one is asked for."""
        dtype = torch.float32 if self.dtype == "autocast" else self.dtype
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        return x.requires_grad_(self.mode in ("training", "frozen"))

    def context(self) -> AbstractContextManager[Any]:
        """Autocast or nothing."""
        return torch.autocast("cpu", torch.bfloat16) if self.dtype == "autocast" else nullcontext()


def convolution(r: random.Random, rank: int, c_in: int, sizes: list[int]) -> nn.Module | None:
    """A convolution or a transposed one, or None where it is too large or does not fit its input."""
    c_out = c_in if r.random() < 0.2 else r.choice(CHANNELS)
    common = [g for g in (1, 1, 1, 2, 4, 8, c_in) if c_in % g == 0 and c_out % g == 0]
    groups = r.choice(common)
    kernel = [r.choice((1, 2, 3, 3, 4, 5, 7, 9, 11, 13, 15)) for _ in range(rank)]
    if r.random() < 0.7:
        kernel = [kernel[0]] * rank
    stride = [r.choice((1, 1, 1, 2, 3, 4))] * rank
    dilation = [r.choice((1, 1, 1, 1, 2, 3))] * rank
    bias = r.random() < 0.5
    padding = [r.choice((0, d * (k - 1) // 2, d * (k - 1) // 2)) for k, d in zip(kernel, dilation, strict=True)]
    transposed = r.random() < 0.3
    if transposed:
        out = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1
            for n, s, p, d, k in zip(sizes, stride, padding, dilation, kernel, strict=True)
        ]
    else:
        out = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, s, p, d, k in zip(sizes, stride, padding, dilation, kernel, strict=True)
        ]
    weights = c_in * c_out // groups * prod(kernel)
    if (
        min(out) < 1
        or weights > LARGEST
        or c_out * prod(out) > LARGEST
        or weights * prod(sizes if transposed else out) > WORK
    ):
        return None
    kinds = (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        if transposed
        else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )
    extra = {"output_padding": [r.choice((0, s - 1)) for s in stride]} if transposed else {}
    return kinds[rank - 1](
        c_in, c_out, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias, **extra
    )


def other(r: random.Random, rank: int, sizes: list[int]) -> nn.Module:
    """A pool, a resize or something pointwise."""
    kind = r.choice(("max", "avg", "adaptive", "nearest", "linear", "relu", "silu"))
    k, pools = r.choice((2, 3, 5)), {"max": "MaxPool", "avg": "AvgPool"}
    if kind in pools:
        return getattr(nn, f"{pools[kind]}{rank}d")(k, stride=r.choice((1, 2, k)), padding=r.choice((0, k // 2)))
    if kind == "adaptive":
        return getattr(nn, f"Adaptive{r.choice(('Avg', 'Max'))}Pool{rank}d")(
            [max(1, n // r.choice((2, 3, 5))) for n in sizes]
        )
    if kind in ("nearest", "linear"):
        mode = "nearest" if kind == "nearest" else ("linear", "bilinear", "trilinear")[rank - 1]
        return nn.Upsample(scale_factor=r.choice((0.5, 1.5, 2.0)), mode=mode)
    return nn.ReLU() if kind == "relu" else nn.SiLU()


def draw(seed: int) -> Case | None:
    """The case of a number, or None where what was drawn is too large."""
    r = random.Random(seed)
    rank, batch = r.choice((1, 2, 2, 3, 3)), r.choice((1, 1, 1, 2, 3, 16))
    c_in = r.choice(CHANNELS)
    longest = {1: 20000, 2: 300, 3: 72}[rank]
    sizes = [max(1, int(longest * 2 ** (-5 * r.random()))) for _ in range(rank)]
    if batch * c_in * prod(sizes) > LARGEST:
        return None
    layers: list[nn.Module] = []
    x = torch.empty(batch, c_in, *sizes, device="meta")
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        made = (
            convolution(r, rank, x.shape[1], list(x.shape[2:]))
            if r.random() < 0.75
            else other(r, rank, list(x.shape[2:]))
        )
        if made is None:
            return None
        try:
            x = made.to("meta")(x)
        except RuntimeError:
            return None
        if not 0 < x.numel() <= LARGEST:
            return None
        layers.append(made)
    dtype, mode = r.choice(DTYPES), r.choice(MODES)
    model = nn.Sequential(*layers).to_empty(device="cpu").to(torch.float32 if dtype == "autocast" else dtype)
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
        p.requires_grad_(mode != "frozen")
    options: dict[str, Any] = {}
    if r.random() < 0.3:
        options = {"regions": [max(1, n // r.choice((2, 5, 9))) for n in sizes][: r.choice((1, 2))]}
    return Case(model, (batch, c_in, *sizes), dtype, mode, options, r.choice((None, 1.0, 0.7, 0.5, 0.3)))


def cases() -> list[int]:
    """Numbers of cases that can be run."""
    found, seed = [], SEED
    while len(found) < EXAMPLES:
        if draw(seed) is not None:
            found.append(seed)
        seed += 1
    return found


@pytest.mark.parametrize("seed", cases())
def test_measured_projected_allowed(seed: int) -> None:
    """In this order."""
    case = draw(seed)
    assert case is not None
    measured, plan = measured_and_plan(case)
    assert plan.allowed is None or plan.projected <= plan.allowed
    assert measured <= plan.projected, (measured, plan.projected, case)


def measured_and_plan(case: Case) -> tuple[int, Any]:
    """Bytes of a second call, and the plan."""
    x, model = case.input(), case.model
    try:
        with torch.no_grad(), case.context():
            model(x)
    except NotImplementedError as error:  # of some types on the CPU
        pytest.skip(str(error))
    except RuntimeError as error:  # oneDNN has no 16-bit LSTM for a processor without AVX-512
        if "primitive descriptor" not in str(error):
            raise
        pytest.skip(f"PyTorch itself: {error}")
    grad = case.mode != "inference" and (x.requires_grad or any(p.requires_grad for p in model.parameters()))
    with torch.set_grad_enabled(grad), case.context():
        small = ranger_nn.regionalize(model, **case.options)
        fastest = small.plan_for(x)
        if case.share is not None:
            allowed = max(1, int(case.share * fastest.projected))
            try:
                small = ranger_nn.regionalize(model, memory=allowed, **case.options)
                small.plan_for(x)
            except ranger_nn.BudgetError as error:
                small = ranger_nn.regionalize(model, memory=error.least, **case.options)
        plan = small.plan_for(x)
        weights = torch.ones_like(leaves(small(x))[0])

    def work() -> Tensor:
        with torch.set_grad_enabled(grad), case.context():
            y = leaves(small(x))[0]
        if grad and y.requires_grad:
            small.zero_grad(set_to_none=True)
            x.grad = None
            y.backward(weights)
        return y.detach()

    return peak(work), plan
