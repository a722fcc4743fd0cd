"""PyTorch's own samples of operators (`torch.testing`), in regions of two: numbers and gradients are the operator's."""

from __future__ import annotations

import copy
import warnings
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import ranger_nn
from ranger_nn.errors import CaptureError

pytest.importorskip("expecttest")  # which PyTorch's own tests import
op_db: list[Any] = import_module("torch.testing._internal.common_methods_invocations").op_db
OPERATORS = (
    "linalg.vector_norm",
    "norm",
    "norm.inf",
    "norm.fro",
    "nn.functional.grid_sample",
    "nn.functional.local_response_norm",
    "nn.functional.unfold",
    "unfold",
    "unfold_copy",
    *("index_select", "gather", "take_along_dim", "__getitem__", "flip", "rot90", "repeat", "tile"),
    *("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "cumulative_trapezoid"),
)
SCHEDULES = ("slide", "tile")


class Sample(nn.Module):
    """An operator on tensors; everything else of its sample is constant. Floating results only."""

    def __init__(self, operator: Any, arguments: Any) -> None:
        super().__init__()
        leaves, self.spec = pytree.tree_flatten(arguments)
        self.operator, self.rest = operator, [None if self.taken(x) else x for x in leaves]
        self.places = [n for n, x in enumerate(leaves) if self.taken(x)]

    @staticmethod
    def taken(x: Any) -> bool:
        """Whether the module is given it."""
        return isinstance(x, Tensor) and x.is_floating_point()

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        leaves = list(self.rest)
        for n, x in zip(self.places, tensors, strict=True):
            leaves[n] = x
        x, args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        found = pytree.tree_leaves(self.operator(x, *args, **kwargs))
        return [y for y in found if isinstance(y, Tensor) and y.is_floating_point()]


def results(model: nn.Module, given: list[Tensor]) -> list[Tensor]:
    """Results and gradients of the inputs, through a weighted sum that no two elements share."""
    xs = [x.detach().clone().requires_grad_() for x in given]
    ys = model(*xs)
    loss = sum((y * torch.arange(1, y.numel() + 1, dtype=y.dtype).sqrt().view(y.shape)).sum() for y in ys)
    grads = torch.autograd.grad(loss, xs, allow_unused=True) if isinstance(loss, Tensor) and loss.requires_grad else []
    return [y.detach() for y in ys] + [torch.zeros_like(x) if g is None else g for x, g in zip(xs, grads)]


def samples(name: str) -> list[Any]:
    """(operator, its sample) of every variant of that name."""
    found = []
    for info in op_db:
        if name in (info.name, f"{info.name}.{info.variant_test_name}" if info.variant_test_name else info.name):
            found += [(info.op, s) for s in info.sample_inputs("cpu", torch.float64, requires_grad=False)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", OPERATORS)
def test_samples(name: str, schedule: str) -> None:
    """Every sample with a tensor that has elements; but those that are refused by name."""
    torch.manual_seed(0)
    ran = 0
    for operator, sample in samples(name):
        arguments = (sample.input, list(sample.args), dict(sample.kwargs))
        model = Sample(operator, arguments)
        given = [x for x in pytree.tree_leaves(arguments) if Sample.taken(x)]
        if not given or any(x.numel() == 0 for x in given):
            continue
        wanted = results(model, given)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small = ranger_nn.regionalize(copy.deepcopy(model), regions=(2,), schedule=schedule)
            try:
                found = results(small, given)
            except CaptureError:
                continue
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-10, atol=1e-10, equal_nan=True, msg=lambda m, s=sample: f"{s}: {m}"
            )
        ran += 1
    assert ran
