"""A network in regions, trained and not: the untouched numbers and gradients, and nothing whole that can be cut."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

import ranger_nn
from ranger_nn.planning.report import Plan
from tests.support import compare, random_inputs, randomise

WAYS = (("slide", (3,)), ("tile", (5,)), ("tile", (6, 4)))
"""Steps along the rows, tiles of rows, tiles of rows and columns: sizes that divide nothing."""


def check_cut(
    model: nn.Module, shape: Sequence[int], schedule: str, regions: Sequence[int], whole: Sequence[str] = ()
) -> list[Plan]:
    """Plans of inference and of training. `whole`: operators, of which alone one may be whole."""
    model = sized(model, shape)
    (x,) = random_inputs((tuple(shape),))

    def regional(model: nn.Module) -> nn.Module:
        return ranger_nn.regionalize(model, regions=tuple(regions), schedule=schedule)

    trained = compare(model, regional, (x,))
    small = regional(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-11, atol=1e-11 * model(x).abs().max().item())
        plans = [small.plan_for(x)]
    plans.append(trained.plan_for(x.clone().requires_grad_()))
    for plan, training in zip(plans, (False, True), strict=True):
        assert plan.training == training
        assert [w for w in plan.whole if not w.startswith(tuple(whole))] == []
        assert max(row.regions for row in plan.sweeps) > 1
    return plans


def sized(model: nn.Module, shape: Sequence[int]) -> nn.Module:
    """The model in float64 and eval mode, its lazy layers sized, its parameters drawn."""
    torch.manual_seed(0)
    model = model.eval()
    model(torch.zeros(tuple(shape)))
    randomise(model)
    return model.double()
