"""One small network per feature, tile and slide: the untouched numbers, gradients and buffers."""

from __future__ import annotations

import pytest
import torch

import ranger_nn
from tests.nets import NETS
from tests.support import Entry, compare, run

SCHEDULES = ("tile", "slide")
"""Where regions are given, no schedule is a slide."""


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("entry", NETS, ids=lambda entry: entry.name)
def test_feature(entry: Entry, schedule: str) -> None:
    """Regions that divide nothing."""

    def regional(model: torch.nn.Module) -> torch.nn.Module:
        return ranger_nn.regionalize(model, regions=entry.regions, schedule=schedule)

    compare(entry.make(), regional, entry.inputs(), entry.pick)


@pytest.mark.parametrize("schedule", ["tile", "slide"])
@pytest.mark.parametrize("regions", [(1, 1), (2, 64), (64, 3)], ids=str)
@pytest.mark.parametrize("name", ["unet_batch_norm", "unet_group_norm", "branches", "transposed_k3"])
def test_extreme_regions(name: str, regions: tuple[int, int], schedule: str) -> None:
    """Regions of one pixel, and regions larger than the image along one axis."""
    entry = next(e for e in NETS if e.name == name)
    model, inputs = entry.make(), entry.inputs()
    rows, columns = (9, 7) if regions == (1, 1) else (19, 14)
    inputs = tuple(x[:1, :, :rows, :columns].contiguous() for x in inputs)

    def regional(model: torch.nn.Module) -> torch.nn.Module:
        return ranger_nn.regionalize(model, regions=regions, schedule=schedule)

    compare(model, regional, inputs, entry.pick)


@pytest.mark.parametrize("entry", NETS, ids=lambda entry: entry.name)
def test_inference(entry: Entry) -> None:
    """Without gradients the plan is another one; the numbers stay."""
    if entry.train:
        pytest.skip("training mode is compared with gradients")
    model, inputs = entry.make(), entry.inputs()
    small = ranger_nn.regionalize(entry.make(), regions=entry.regions, schedule="slide")
    with torch.no_grad():
        wanted = entry.pick(model(*(x.clone() for x in inputs)))
        given = entry.pick(small(*(x.clone() for x in inputs)))
    for ours, theirs in zip(given, wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11 * theirs.abs().max().item())
        assert not ours.requires_grad


def test_training_batches_are_counted_once() -> None:
    """Running statistics and their counter move once per call, whatever the number of regions."""
    entry = next(e for e in NETS if e.name == "unet_batch_norm_train")
    model, small = entry.make(), ranger_nn.regionalize(entry.make(), regions=(7, 5), schedule="tile")
    for seed in (1, 2, 3):
        wanted = run(model, entry.inputs(seed=seed)).buffers
        given = run(small, entry.inputs(seed=seed)).buffers
        for name, theirs in wanted.items():
            torch.testing.assert_close(given[name], theirs, rtol=1e-11, atol=1e-11)
    counters = [b for name, b in small.named_buffers() if name.endswith("num_batches_tracked")]
    assert counters
    assert all(int(b) == 3 for b in counters)
