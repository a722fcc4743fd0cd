"""Recurrent layers: the state carried along a slide, and whole back-propagation through time in chunks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranger_nn
from ranger_nn.ops import recurrence
from tests.nets import NETS, RECURRENT, Tagger
from tests.support import (
    FLOAT32_FORWARD,
    FLOAT32_GRADIENT,
    Entry,
    check,
    compare,
    difference,
    leaves,
    random_inputs,
    run,
)

STEPS = 61
SERIES = ((2, 3, STEPS),)


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few steps, the last one shorter: as they are in long series."""
    monkeypatch.setattr(recurrence, "CHUNK_BYTES", 3000)


def regional(model: nn.Module, schedule: str | None = None, memory: int | None = None) -> Any:
    """Regions that do not divide the steps."""
    return ranger_nn.regionalize(model, memory, regions=(13,), schedule=schedule)


def both(layer: nn.RNNBase, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any]:
    """The untouched layer, and a regional copy of it."""
    torch.manual_seed(0)
    model = layer.to(dtype)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.4, 0.4)
    return model, regional(copy.deepcopy(model))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("schedule", ["tile", "slide"])
@pytest.mark.parametrize("entry", RECURRENT, ids=lambda entry: entry.name)
def test_chunks(entry: Entry, schedule: str) -> None:
    """Outputs and gradients of inputs, states and parameters; without gradients the outputs again."""
    model, inputs = entry.make(), entry.inputs()
    small = compare(model, lambda m: regional(m, schedule), inputs, entry.pick)
    with torch.no_grad():
        for ours, theirs in zip(entry.pick(small(*inputs)), entry.pick(model(*inputs)), strict=True):
            assert difference(ours, theirs) <= 1e-11


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"batch_first": True}, {"proj_size": 3}], ids=str)
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_single_precision(layer: type[nn.RNNBase], options: dict[str, Any]) -> None:
    """In float32, where PyTorch runs the LSTM through oneDNN, in chunks as over the whole series."""
    if "proj_size" in options and layer is not nn.LSTM:
        pytest.skip("only the LSTM is projected")
    model, small = both(layer(5, 7, 2, **options), torch.float32)
    inputs = random_inputs(((157, 4, 5),), torch.float32)
    check(run(small, inputs), run(model, inputs), FLOAT32_FORWARD, FLOAT32_GRADIENT)
    with torch.no_grad():
        for ours, theirs in zip(leaves(small(*inputs)), leaves(model(*inputs)), strict=True):
            assert difference(ours, theirs) <= FLOAT32_FORWARD


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh", "bias", "_l1", "all"])
def test_frozen_parameters(frozen: str) -> None:
    """Frozen parameters get no gradient, the others the same one; with all frozen the input still gets its own."""
    model, small = both(nn.LSTM(3, 4, 2))
    for net in (model, small):
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(not (frozen == "all" or frozen in name))
    inputs = random_inputs(((STEPS, 2, 3),))
    check(run(small, inputs), run(model, inputs))
    for name, parameter in small.named_parameters():
        assert (parameter.grad is None) == (frozen == "all" or frozen in name)


@pytest.mark.usefixtures("short_chunks")
def test_frozen_encoder_and_input_without_gradient() -> None:
    """A recurrent layer that does not train below one that does; then parameters only."""
    model = Tagger().double()
    for parameter in (*model.conv.parameters(), *(p for n, p in model.layer.named_parameters() if n.endswith("_l0"))):
        parameter.requires_grad_(False)
    small = regional(copy.deepcopy(model))
    inputs = random_inputs(SERIES)
    check(run(small, inputs), run(model, inputs))
    check(run(small, inputs, of_inputs=False), run(model, inputs, of_inputs=False))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("index", [0, 1, 2], ids=["output", "h", "c"])
def test_a_loss_on_one_output(index: int) -> None:
    """What the loss does not read has no gradient."""
    model, small = both(nn.LSTM(3, 4))
    (x,) = random_inputs(((STEPS, 2, 3),))
    found = []
    for net in (model, small):
        y, (h, c) = net(x)
        found.append(torch.autograd.grad((y, h, c)[index].sin().sum(), list(net.parameters())))
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert difference(ours, theirs) <= 1e-11


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_dropout_between_layers(layer: type[nn.RNNBase]) -> None:
    """With the seed fixed the mask is fixed: the gradient is that of the very mask drawn, by finite differences."""
    _, small = both(layer(2, 3, 2, dropout=0.4))
    small.train()
    (x,) = random_inputs(((17, 1, 2),))

    def seeded(x: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(3)
        return leaves(small(x))[0]

    given = [x.requires_grad_(), *small.parameters()]
    assert torch.autograd.gradcheck(seeded, given, eps=1e-6, atol=1e-6, fast_mode=True)


def test_dropout_draws_afresh_and_at_its_rate() -> None:
    """Two calls differ, a seed repeats, eval mode is exact; the second layer hands on what the mask lets through."""
    model, small = both(nn.RNN(2, 2, 2, bias=False, dropout=0.3, nonlinearity="relu"))
    with torch.no_grad():
        for net in (model, small):
            for name, parameter in net.named_parameters():
                parameter.copy_(torch.eye(2) if "_ih" in name else torch.zeros(2, 2))
    x = torch.ones(1003, 4, 2, dtype=torch.float64)
    small.train()
    torch.manual_seed(5)
    first, second = small(x)[0], small(x)[0]
    torch.manual_seed(5)
    assert torch.equal(small(x)[0], first)
    assert not torch.equal(first, second)
    assert abs((first != 0).double().mean().item() - 0.7) < 0.02
    assert torch.allclose(first[first != 0], torch.tensor(1 / 0.7, dtype=torch.float64))
    assert not torch.equal(first[:64], first[64:128])
    model.eval(), small.eval()
    assert torch.equal(small(x)[0], model(x)[0])


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_autocast(layer: type[nn.RNNBase]) -> None:
    """Under autocast outputs have the untouched dtype, and its accuracy, with and without gradients."""
    model, small = both(layer(5, 7, 2, bidirectional=True), torch.float32)
    (x,) = random_inputs(((STEPS, 4, 5),), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            wanted = leaves(model(x))
        except RuntimeError as refused:  # oneDNN has no such LSTM for a processor without AVX-512
            if "primitive descriptor" not in str(refused):
                raise
            pytest.skip(f"PyTorch itself: {refused}")
        given = leaves(small(x))
        with torch.no_grad():
            plain = leaves(small(x))
    for ours, theirs, again in zip(given, wanted, plain, strict=True):
        assert ours.dtype == again.dtype == theirs.dtype
        assert difference(ours.float(), theirs.float()) < 0.03
        assert difference(again.float(), theirs.float()) < 0.03
    for net, outputs in ((model, wanted), (small, given)):
        net.zero_grad()
        sum(y.float().square().sum() for y in outputs).backward()
    for ours, theirs in zip(small.parameters(), model.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        assert difference(ours.grad, theirs.grad) < 0.1


def test_plan_of_inference_slides() -> None:
    """Convolution, norm, both layers and the linear one are one sweep, and nothing stays whole."""
    x = torch.randn(2, 3, STEPS)
    plan = ranger_nn.plan(Tagger(), x, regions=(13,))
    assert len(plan.sweeps) == 1
    assert plan.sweeps[0].schedule == "slide"
    assert plan.whole == ()
    assert plan.axes == ("time",)


@pytest.mark.parametrize("batch_first", [False, True])
def test_time_is_the_axis_wherever_it_stands(batch_first: bool) -> None:
    """Steps are slid along, the batch is not."""
    shape = (4, STEPS, 3) if batch_first else (STEPS, 4, 3)
    plan = ranger_nn.plan(nn.LSTM(3, 4, batch_first=batch_first), shape, regions=(13,))
    assert plan.axes == ("time",)
    assert plan.steps == 5
    assert plan.whole == ()


def test_plan_says_why_tiles_cannot_be() -> None:
    """Tiles along time, asked for, leave the recurrent layers whole, and the plan tells the rule and the way out."""
    plan = ranger_nn.plan(Tagger(), torch.randn(2, 3, STEPS), regions=(13,), schedule="tile")
    text = str(plan)
    assert "lstm_0 (layer): each step needs the state of the step before" in text
    assert "tiles along time are not independent (a slide is exact)" in text


def test_plan_says_what_goes_back() -> None:
    """The reverse direction runs whole in chunks, the forward one slides."""
    plan = ranger_nn.plan(nn.LSTM(64, 64, bidirectional=True), (20000, 8, 64))
    (whole,) = plan.whole
    assert whole.startswith("lstm_1")
    assert "goes from the last step to the first: whole, in " in whole
    assert " chunks of " in whole


def test_plan_of_training_says_chunks_and_a_budget_shortens_them() -> None:
    """Less memory, shorter chunks; below the least, the error says what is needed and which layer binds."""
    model, shape = nn.LSTM(64, 64), (8192, 8, 64)
    ample = ranger_nn.plan(model, shape, training=True)
    tight = ranger_nn.plan(model, shape, training=True, memory=int(0.7 * ample.projected))
    lengths = [int(p.whole[0].split("chunks of ")[1].split()[0]) for p in (ample, tight)]
    assert lengths[1] < lengths[0]
    assert tight.projected <= 0.7 * ample.projected
    with pytest.raises(ranger_nn.BudgetError, match=r"lstm_0") as error:
        ranger_nn.plan(model, shape, training=True, memory=1000)
    assert error.value.least > 1000
    fits = ranger_nn.plan(model, shape, training=True, memory=error.value.least)
    assert fits.projected <= error.value.least


def test_plan_of_training_cuts_what_comes_before() -> None:
    """Convolution and norm still go region by region; the recurrent layers are whole, in chunks."""
    plan = ranger_nn.plan(Tagger(), torch.randn(2, 3, STEPS), regions=(13,), training=True)
    assert plan.axes == ("time",)
    assert [row.operators for row in plan.sweeps] == [4]
    assert [row.split()[0] for row in plan.whole] == ["lstm_0", "lstm_1"]


def test_cells_are_ordinary_operators() -> None:
    """nn.*Cell in a loop is no recurrence to the plan."""
    entry = next(e for e in NETS if e.name == "recurrent_cells")
    plan = ranger_nn.plan(entry.make(torch.float32), entry.inputs(torch.float32)[0])
    assert "each step needs" not in str(plan)


def test_state_dict_and_optimiser() -> None:
    """The very same parameters: three steps of Adam give the same losses."""
    model, small = both(nn.GRU(3, 4, 2))
    assert list(small.state_dict()) == list(model.state_dict())
    x, target = random_inputs(((STEPS, 2, 3), (STEPS, 2, 4)))
    losses: list[list[float]] = []
    for net in (model, small):
        adam = torch.optim.Adam(net.parameters(), 0.05)
        losses.append([])
        for _ in range(3):
            adam.zero_grad()
            loss = (net(x)[0] - target).square().mean()
            loss.backward()
            adam.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
