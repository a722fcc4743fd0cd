"""The promise for products (in 16 bits and under autocast too), formulas and resizing: measured <= projected <= allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.memory.test_random import Case, measured_and_plan

DTYPES: tuple[Any, ...] = (torch.bfloat16, "autocast")


class Of(nn.Module):
    """A function of the input and of one layer."""

    def __init__(self, function: Callable[..., Tensor], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) if self.layer is None else self.function(x, self.layer)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 64), (2, 500, 12)),
    "linear, permuted": (lambda: Of(lambda x, m: m(x.transpose(0, 1)), nn.Linear(64, 96)), (200, 2, 64)),
    "attention": (
        lambda: Of(lambda x, m: m(x, x, x, need_weights=False)[0], nn.MultiheadAttention(32, 4, batch_first=True)),
        (2, 200, 32),
    ),
    "gram": (lambda: Of(lambda x: x @ x.mT), (2, 4, 96, 48)),
    "one second factor": (lambda: Of(lambda x, m: x @ m.weight, nn.Linear(7, 48)), (2, 4, 96, 48)),
    "one first factor": (lambda: Of(lambda x, m: m.weight @ x, nn.Linear(96, 40)), (2, 4, 96, 48)),
    "einsum": (lambda: Of(lambda x, m: torch.einsum("bchw,cd->bdhw", x, m.weight), nn.Linear(12, 12)), (2, 12, 96, 16)),
}


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "root mean square": lambda x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6),
    "norm": lambda x: x.norm(dim=1),
    "normalize": lambda x: nn.functional.normalize(x, dim=1),
    "power": lambda x: x**3,
    "erf": torch.erf,
    "two formulas": lambda x: torch.atan2(x, x.square()),
}


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear"])
def test_resizing_several_samples(mode: str) -> None:
    """Rows of several samples are no block of memory: the framework copies them."""
    for share in (0.5, 0.01):
        case = Case(nn.Upsample(scale_factor=2, mode=mode), (2, 12, 100, 32), torch.float32, "inference", {}, share)
        measured, plan = measured_and_plan(case)
        assert measured <= plan.projected


@pytest.mark.parametrize("name", FORMULAS)
def test_backward_of_formulas(name: str) -> None:
    """What autograd makes on the way counts as well."""
    for share in (None, 0.01):
        case = Case(Of(FORMULAS[name]), (2, 16, 64, 48), torch.float32, "training", {}, share)
        measured, plan = measured_and_plan(case)
        assert measured <= plan.projected


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", CASES)
def test_measured_projected_allowed(name: str, mode: str, dtype: Any) -> None:
    """In this order, with no budget and with the least."""
    build, shape = CASES[name]
    for share in (None, 0.01):
        model = build() if dtype == "autocast" else build().to(dtype)
        measured, plan = measured_and_plan(Case(model, shape, dtype, mode, {}, share))
        assert plan.allowed is None or plan.projected <= plan.allowed
        assert measured <= plan.projected
