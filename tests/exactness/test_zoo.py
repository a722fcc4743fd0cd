"""Every network of the zoo, tile or slide (both with the slow tests): the untouched numbers and gradients."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

import ranger_nn
from ranger_nn import errors
from tests.support import FLOAT32_FORWARD, FLOAT32_GRADIENT, Entry, Gradients, check, compare, run
from tests.zoo import ZOO

SCHEDULES = ("tile", "slide")
SINGLE = ("basicunet_batch", "segresnet_padded", "mobilenetv2", "convnextv2", "unet_3d", "tcn", "tagger")
"""One of each kind."""
LARGEST = ("efficientnet_b0", "swin_tiny", "mobilenetv2", "segformer", "unet2d", "resnet18")
"""By the number of their operators."""
HEAVIER = ("mobilenetv2", "unet_3d", "basicunet_batch", "segresnet_padded")
"""Of these with the slow tests, where several schedules or precisions of a network are tried."""
BUDGETED = ("basicunet", "highresnet_3d", "tagger")
"""Searched inside a budget with the quick tests; `tests/memory` does so with others, `tests/golden` with all."""


def entries(names: tuple[str, ...] = (), slow: tuple[str, ...] = ()) -> list[object]:
    """The zoo, or a part of it, as pytest parameters; the heavy ones, and those of `slow`, are marked slow."""
    return [
        pytest.param(entry, id=entry.name, marks=[pytest.mark.slow] if entry.heavy or entry.name in slow else [])
        for entry in ZOO
        if not names or entry.name in names
    ]


def both_ways() -> list[object]:
    """The zoo by tiles and by a slide, in turns; the other way of each is marked slow, both of the largest."""
    return [
        pytest.param(
            entry,
            schedule,
            id=f"{entry.name}-{schedule}",
            marks=[pytest.mark.slow] if entry.name in LARGEST or entry.heavy or schedule != SCHEDULES[n % 2] else [],
        )
        for n, entry in enumerate(ZOO)
        for schedule in SCHEDULES
    ]


@lru_cache(maxsize=1)
def reference(entry: Entry) -> Gradients:
    """The untouched network's numbers, computed once for all cases of an entry."""
    return run(entry.make(), entry.inputs(), entry.pick)


@pytest.fixture
def entry(request: pytest.FixtureRequest) -> Entry:
    """The entry, skipped where its package is not installed."""
    chosen: Entry = request.param
    if chosen.needs is not None:
        pytest.importorskip(chosen.needs)
    return chosen


@pytest.mark.parametrize(("entry", "schedule"), both_ways(), indirect=["entry"], scope="module")
def test_regions_that_do_not_divide(entry: Entry, schedule: str) -> None:
    """Regions of a fixed odd size: forward, gradients of inputs and of all parameters."""
    small = ranger_nn.regionalize(entry.make(), regions=entry.regions, schedule=schedule)
    check(run(small, entry.inputs(), entry.pick), reference(entry))


@pytest.mark.parametrize("entry", entries(SINGLE, slow=HEAVIER), indirect=True)
def test_along_the_last_axis(entry: Entry) -> None:
    """A slide along columns (in a series along time), by regions that have all of the other axes."""
    *others, last = entry.regions
    small = ranger_nn.regionalize(entry.make(), regions=(*(1 << 20 for _ in others), last))
    check(run(small, entry.inputs(), entry.pick), reference(entry))


@pytest.mark.parametrize("entry", entries(slow=tuple(e.name for e in ZOO if e.name not in BUDGETED)), indirect=True)
def test_inside_a_budget(entry: Entry) -> None:
    """Regions and schedules of the planner's choice, at six tenths of what the fastest plan needs."""
    model, inputs = entry.make(), entry.inputs()
    given = tuple(x.requires_grad_() for x in entry.inputs())
    memory = int(0.6 * ranger_nn.regionalize(model).plan_for(*given).projected)
    try:
        ranger_nn.regionalize(model, memory=memory).plan_for(*given)
    except errors.BudgetError as error:
        memory = error.least or 0
    small = ranger_nn.regionalize(model, memory=memory)
    check(run(small, inputs, entry.pick), reference(entry))


@pytest.mark.parametrize("entry", entries(SINGLE, slow=HEAVIER), indirect=True)
def test_single_precision(entry: Entry) -> None:
    """The same in float32, to its own rounding."""

    def regional(model: torch.nn.Module) -> torch.nn.Module:
        return ranger_nn.regionalize(model, regions=entry.regions)

    model, inputs = entry.make(torch.float32), entry.inputs(torch.float32)
    compare(model, regional, inputs, entry.pick, FLOAT32_FORWARD, FLOAT32_GRADIENT)
