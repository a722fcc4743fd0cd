"""The promise for recurrent layers: measured <= projected <= allowed, and a sixth of the untouched memory or less."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranger_nn
from tests.memory.test_promise import CLOSE, WORKSPACE, peak, work_of
from tests.memory.test_random import EXAMPLES, SEED, Case, measured_and_plan
from tests.nets import Tagger

STEPS, BATCH, WIDTH = 1024, 8, 64


class Output(nn.Module):
    """The output of a recurrent layer, or (`last`) its last state."""

    def __init__(self, layer: nn.RNNBase, last: bool = False) -> None:
        super().__init__()
        self.layer, self.last = layer, last

    def forward(self, x: Tensor) -> Tensor:
        y, states = self.layer(x)
        return (states[0] if isinstance(states, tuple) else states) if self.last else y


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lstm": (lambda: Output(nn.LSTM(WIDTH, WIDTH)), (STEPS, BATCH, WIDTH)),
    "lstm_batch_first_wide": (lambda: Output(nn.LSTM(96, WIDTH, batch_first=True)), (BATCH, STEPS, 96)),
    "lstm_one_sample_narrow": (lambda: Output(nn.LSTM(20, 50)), (4 * STEPS, 1, 20)),
    "lstm_both_ways": (lambda: Output(nn.LSTM(WIDTH, WIDTH, bidirectional=True)), (STEPS, BATCH, WIDTH)),
    "lstm_projected": (lambda: Output(nn.LSTM(WIDTH, WIDTH, proj_size=24)), (STEPS // 2, BATCH, WIDTH)),
    "lstm_last_state": (lambda: Output(nn.LSTM(WIDTH, WIDTH), last=True), (STEPS, BATCH, WIDTH)),
    "gru": (lambda: Output(nn.GRU(WIDTH, WIDTH)), (STEPS // 2, BATCH, WIDTH)),
    "rnn": (lambda: Output(nn.RNN(WIDTH, WIDTH)), (STEPS // 2, BATCH, WIDTH)),
    "tagger": (lambda: Tagger(nn.LSTM, 8, WIDTH), (BATCH, 8, STEPS)),
}


LOOSE = {"lstm_both_ways": 1.5}
"""The two directions are joined by an operator that runs whole: its result counts, though the caller keeps it."""


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", CASES)
def test_measured_projected_allowed(case: str, training: bool, share: float) -> None:
    """In this order, at what the fastest plan needs, and at a share of it or the least that fits."""
    build, shape = CASES[case]
    model, x = build(), torch.randn(shape)
    allowed = int(share * ranger_nn.plan(model, x, training=training).projected)
    try:
        plan = ranger_nn.plan(model, x, memory=allowed, training=training)
    except ranger_nn.BudgetError as error:
        allowed = error.least or 0
        plan = ranger_nn.plan(model, x, memory=allowed, training=training)
    measured = peak(work_of(ranger_nn.regionalize(model, memory=allowed), x, training))
    assert measured <= plan.projected <= allowed
    assert plan.projected <= LOOSE.get(case, CLOSE) * measured + WORKSPACE


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_a_sixth_of_the_untouched_memory(layer: Any) -> None:
    """Forward and backward of a long series."""
    model = Output(layer(WIDTH, WIDTH))
    x = torch.randn(8 * STEPS if layer is nn.LSTM else 2 * STEPS, BATCH, WIDTH)
    untouched = peak(work_of(model, x, True))
    assert 6 * peak(work_of(ranger_nn.regionalize(model, memory=untouched // 6), x, True)) <= untouched


def test_memory_grows_as_the_root_of_time() -> None:
    """At the least budget, four times the steps need about twice the chunk and borders (and no more than 2.3 times)."""
    model, least = Output(nn.LSTM(WIDTH, WIDTH), last=True), []
    for steps in (16 * STEPS, 64 * STEPS):
        with pytest.raises(ranger_nn.BudgetError) as error:
            ranger_nn.plan(model, (steps, BATCH, WIDTH), training=True, memory=1)
        least.append(error.value.least)
    assert 1.5 * least[0] < least[1] < 2.3 * least[0]


def draw(seed: int) -> Case:
    """A recurrent network of any kind, type, size and way of use."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    kind: Any = r.choice([nn.LSTM, nn.GRU, nn.RNN])
    features, hidden = r.choice([1, 3, 16, 20, 50, 64, 96, 130, 256]), r.choice([1, 4, 16, 24, 50, 64, 100, 128, 256])
    samples, steps = r.choice([1, 1, 2, 5, 8, 32]), r.choice([1, 7, 64, 200, 600])
    options: dict[str, Any] = {
        "num_layers": r.choice([1, 1, 2, 3]),
        "bidirectional": r.random() < 0.3,
        "batch_first": r.random() < 0.5,
        "bias": r.random() < 0.8,
    }
    if kind is nn.LSTM and hidden > 1 and r.random() < 0.25:
        options["proj_size"] = max(1, hidden // r.choice([2, 4]))
    if options["num_layers"] > 1 and r.random() < 0.3:
        options["dropout"] = 0.2
    if kind is nn.RNN:
        options["nonlinearity"] = r.choice(["tanh", "relu"])
    dtype = r.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64, *2 * ["autocast"]])
    model = Output(kind(features, hidden, **options), last=r.random() < 0.2)
    mode = r.choice(["inference", "training", "training", "frozen"])
    model.requires_grad_(mode != "frozen")
    shape = (samples, steps, features) if options["batch_first"] else (steps, samples, features)
    share = r.choice((None, 1.0, 0.7, 0.5, 0.3, 0.05))
    return Case(model if dtype == "autocast" else model.to(dtype), shape, dtype, mode, {}, share)


@pytest.mark.parametrize("seed", range(SEED, SEED + EXAMPLES // 4))
def test_at_random(seed: int) -> None:
    """Measured <= projected <= allowed: all kinds, types (autocast too), layers, directions, projections, lengths."""
    measured, plan = measured_and_plan(draw(seed))
    assert plan.allowed is None or plan.projected <= plan.allowed
    assert measured <= plan.projected


@pytest.mark.parametrize("seed", [16, 33, 85, 481])
def test_kinds_that_broke_it(seed: int) -> None:
    """Weights copied for every step in 16 bits, cast in every step under autocast, a projected state, blocks of masks."""
    test_at_random(seed)
