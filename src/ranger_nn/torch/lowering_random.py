"""Operators that draw random numbers: from a seed of this forward, so that backward meets the same numbers.

Enter at `seeded` and `emit_dropout`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ranger_nn.core.graph import Rule
from ranger_nn.ops.pointwise import pointwise
from ranger_nn.torch import kernels as K
from ranger_nn.torch.lower import Lower


def seeded(lower: Lower, function: Callable[..., Any], inputs: list[int]) -> tuple[Callable[..., Any], list[int]]:
    """The operator drawing from a seed of this forward, so that backward, which runs it again, meets the same numbers."""

    def call(*args: Any) -> Any:
        *xs, seed = args
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed))
            return function(*xs)

    return call, [*inputs, _emit_seed(lower)]


def _emit_seed(lower: Lower) -> int:
    like = torch.empty((), dtype=torch.int64, device="meta")
    draw = K.Opaque(lambda: torch.randint(2**40, ()))
    seed: int = lower.emit("seed", [], like, Rule(()), draw, random=True, differentiable=False)
    return seed


def emit_dropout(lower: Lower, source: int, p: float, like: Tensor, along: int, block: int = 1) -> int:
    """Dropout whose mask is drawn along dimension `along`, `block` indices at a time, from one seed per forward."""
    seed = _emit_seed(lower)
    shape = lower.shape(source)
    region = Rule(pointwise([shape, ()], shape).links)
    return lower.emit("dropout", [source, seed], like, region, K.Dropout(p, shape, along, block))
