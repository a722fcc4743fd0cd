"""What is counted of a schedule is what the written program says, byte for byte, multiply-add for multiply-add."""

from __future__ import annotations

import random

import pytest
import torch

from ranger_nn.bounds.axes import find_axes
from ranger_nn.planning.count import Memo
from ranger_nn.planning.forward import Schedule
from ranger_nn.planning.search import Candidate, lower
from ranger_nn.torch.capture import capture
from tests.nets import NETS
from tests.support import Entry

LIGHT = tuple(e for e in NETS if not e.heavy)


def said(found: Candidate) -> tuple[object, ...]:
    """All that a search asks of a candidate."""
    values = frozenset(found.lowering.demand.stored.items())
    return found.peak, found.macs, found.profile, found.worst.binding, values


def schedules(axes: int, r: random.Random, count: int) -> list[Schedule]:
    """Some of: slides of one step and of many, with and without columns, and tiles."""
    ones, two = [1] * axes, [1, r.randint(2, 3), *[1] * axes][:axes]
    steps = [1, r.randint(2, 5), r.randint(6, 40)]
    found = [Schedule(n, tuple(ones), grain=bool(n % 2)) for n in steps]
    found += [Schedule(steps[1], tuple(two)), Schedule(0, tuple(r.randint(1, 4) for _ in ones))]
    return r.sample(found, count)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("entry", LIGHT, ids=lambda e: e.name)
def test_counted_as_written(entry: Entry, training: bool) -> None:
    """Whatever was counted before with the same memo."""
    if entry.needs is not None:
        pytest.importorskip(entry.needs)
    model, r = entry.make(torch.float32), random.Random(entry.name + str(training))
    inputs = tuple(torch.zeros(shape) for shape in entry.shapes)
    graph = capture(model, inputs, grad=training).graph
    axes, memo = find_axes(graph), Memo()
    for schedule in schedules(len(axes), r, 2 if training else 1) if axes else [Schedule(0, ())]:
        written = lower(graph, axes, schedule, training)
        for _ in range(2):
            assert said(lower(graph, axes, schedule, training, memo)) == said(written), schedule
