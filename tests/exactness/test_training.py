"""Training: dropout's mask, frozen parameters, accumulation, optimisers, mixed precision."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ranger_nn
from ranger_nn import errors
from tests.nets import SmallUNet, between
from tests.support import check, compare, difference, random_inputs, randomise, run

SCHEDULES = ("tile", "slide")
IMAGE = ((2, 3, 37, 41),)


def seeded(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    randomise(model)
    return model.to(dtype)


def regional(model: nn.Module, schedule: str | None = "tile") -> nn.Module:
    """Small regions, so that there are many and they overlap by their halo."""
    return ranger_nn.regionalize(model, regions=(11, 13), schedule=schedule)


class Dropped(nn.Module):
    """Shows what dropout let through, and a convolution of it that needs a halo."""

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.dropout = dropout
        self.second = nn.Conv2d(4, 3, 5, padding=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.dropout(self.first(x))
        return y, self.second(y)


class Masked(nn.Module):
    """The same network with the mask given."""

    def __init__(self, model: Dropped, mask: Tensor) -> None:
        super().__init__()
        self.first, self.second, self.mask = model.first, model.second, mask

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x) * self.mask
        return y, self.second(y)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d])
def test_dropout_gradient_is_that_of_the_mask_drawn(kind: type[nn.Module], schedule: str) -> None:
    """The mask is read off the output; a network with that mask must give the same gradients."""
    model = seeded(Dropped(kind(0.4))).train()
    small = regional(copy.deepcopy(model), schedule)
    inputs = random_inputs(IMAGE)
    ours = run(small, inputs)
    mask = (ours.outputs[0] != 0).double() / 0.6
    check(ours, run(Masked(model, mask), inputs))


def test_dropout_draws_afresh_and_at_its_rate() -> None:
    """Two calls differ, the same seed repeats, regions are not copies, the rate is p."""
    small = regional(nn.Sequential(nn.Identity(), nn.Dropout(0.3)).train())
    x = torch.ones(4, 8, 37, 41)
    torch.manual_seed(5)
    first, second = small(x), small(x)
    torch.manual_seed(5)
    again = small(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    kept = (first != 0).double()
    assert abs(kept.mean().item() - 0.7) < 0.02
    assert not torch.equal(first[:, :, :11, :13], first[:, :, 11:22, 13:26])
    torch.testing.assert_close(first[first != 0], torch.full_like(first[first != 0], 1 / 0.7))


def test_dropout_in_eval_and_of_rate_zero() -> None:
    """Where dropout does nothing, outputs are exact in training mode too."""
    model = seeded(Dropped(nn.Dropout(0.0))).train()
    compare(model, regional, random_inputs(IMAGE))
    model = seeded(Dropped(nn.Dropout(0.9))).eval()
    compare(model, regional, random_inputs(IMAGE))


def test_train_and_eval_change_places() -> None:
    """Each mode has its own plan; switching back and forth is as with the untouched module."""
    model = seeded(SmallUNet())
    small = regional(copy.deepcopy(model))
    for training in (False, True, False, True):
        model.train(training), small.train(training)
        assert all(m.training == training for m in small.modules())
        check(run(small, random_inputs(IMAGE)), run(model, random_inputs(IMAGE)))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("frozen", ["down0", "up1", "out", "all", "biases"])
def test_frozen_parameters(frozen: str, schedule: str) -> None:
    """Frozen parameters get no gradient; all others get the same one."""
    model = seeded(SmallUNet()).eval()
    for name, parameter in model.named_parameters():
        if frozen == "all" or name.startswith(frozen) or (frozen == "biases" and name.endswith("bias")):
            parameter.requires_grad_(False)
    small = compare(model, lambda m: regional(m, schedule), random_inputs(IMAGE))
    for parameter in small.parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad)


def test_freezing_after_the_first_call() -> None:
    """requires_grad is read at each call, not baked into the plan."""
    model = seeded(SmallUNet()).eval()
    small = regional(copy.deepcopy(model))
    for choice in ("", "down1", "out"):
        for net in (model, small):
            for name, parameter in net.named_parameters():
                parameter.requires_grad_(choice == "" or choice not in name)
        check(run(small, random_inputs(IMAGE)), run(model, random_inputs(IMAGE)))


def test_input_without_gradient() -> None:
    """The usual case of training: gradients of parameters only."""
    model = seeded(SmallUNet()).eval()
    small = regional(copy.deepcopy(model))
    (x,) = random_inputs(IMAGE)
    for net in (model, small):
        net(x).square().sum().backward()
    assert x.grad is None
    for ours, theirs in zip(small.parameters(), model.parameters()):
        assert difference(ours.grad, theirs.grad) <= 1e-11


def test_gradients_accumulate() -> None:
    """Two batches before one step; and one graph walked twice."""
    model = seeded(SmallUNet()).eval()
    small = regional(copy.deepcopy(model))
    first, second = random_inputs((*IMAGE, (1, 3, 23, 29)))
    for net in (model, small):
        net(first).square().mean().backward()
        loss = net(second).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
    for ours, theirs in zip(small.parameters(), model.parameters()):
        assert difference(ours.grad, theirs.grad) <= 1e-11


def test_autograd_grad_and_partial_outputs() -> None:
    """torch.autograd.grad, and a loss that reads one of two outputs."""
    model = seeded(Dropped(nn.Identity()))
    small = regional(copy.deepcopy(model))
    (x,) = random_inputs(IMAGE)
    x.requires_grad_()
    for index in (0, 1):
        wanted = torch.autograd.grad(model(x)[index].sin().sum(), [x, model.first.weight])
        given = torch.autograd.grad(small(x)[index].sin().sum(), [x, next(small.parameters())])
        for ours, theirs in zip(given, wanted):
            assert difference(ours, theirs) <= 1e-11
    (unused,) = torch.autograd.grad(small(x)[0].sum(), [list(small.parameters())[2]], allow_unused=True)
    assert unused is None or not unused.any()


def test_inside_a_larger_network() -> None:
    """A regional module between ordinary layers: gradients flow in and out."""
    middle = seeded(SmallUNet()).eval()
    before, after = seeded(nn.Conv2d(2, 3, 3)), seeded(nn.Conv2d(2, 2, 3))
    model = nn.Sequential(before, middle, after)
    small = nn.Sequential(copy.deepcopy(before), regional(copy.deepcopy(middle)), copy.deepcopy(after))
    inputs = random_inputs(((1, 2, 33, 27),))
    ours, theirs = run(small, inputs), run(model, inputs)
    assert difference(ours.outputs[0], theirs.outputs[0]) <= 1e-11
    assert difference(ours.inputs[0], theirs.inputs[0]) <= 1e-11
    for mine, wanted in zip(ours.parameters.values(), theirs.parameters.values()):
        assert difference(mine, wanted, 1e-2 * theirs.largest) <= 1e-11


def test_optimiser_follows_the_same_path() -> None:
    """Ten steps of Adam on the untouched and the regional network give the same losses."""
    torch.manual_seed(0)
    model = SmallUNet().double().train()
    small = regional(copy.deepcopy(model), None)
    x, target = random_inputs((*IMAGE, (2, 2, 37, 41)))
    losses: list[list[float]] = []
    for net in (model, small):
        optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
        losses.append([])
        for _ in range(10):
            optimiser.zero_grad()
            loss = F.mse_loss(net(x), target)
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_autocast(schedule: str) -> None:
    """Under autocast the output has autocast's dtype and autocast's accuracy."""
    model = seeded(SmallUNet(), torch.float32).eval()
    small = regional(copy.deepcopy(model), schedule)
    (x,) = random_inputs(IMAGE, torch.float32)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, given = model(x), small(x)
    assert given.dtype == wanted.dtype == torch.bfloat16
    assert difference(given.float(), wanted.float()) < 0.03
    for net, y in ((model, wanted), (small, given)):
        net.zero_grad()
        y.float().square().sum().backward()
    for ours, theirs in zip(small.parameters(), model.parameters()):
        assert ours.grad.dtype == torch.float32
        assert difference(ours.grad, theirs.grad) < 0.1
    again = small(x)
    assert again.dtype == torch.float32
    assert difference(again, exact) < 1e-5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bfloat16(schedule: str) -> None:
    """A model in bfloat16 is as far from exact as the untouched one in bfloat16, and no farther."""
    model = seeded(SmallUNet(lambda c: nn.GroupNorm(2, c)), torch.bfloat16).eval()
    small = regional(copy.deepcopy(model), schedule)
    inputs = random_inputs(IMAGE, torch.bfloat16)
    exact = run(copy.deepcopy(model).double(), tuple(x.double() for x in inputs))
    ours, theirs = run(small, inputs), run(model, inputs)
    assert ours.outputs[0].dtype == torch.bfloat16
    baseline = difference(theirs.outputs[0].double(), exact.outputs[0])
    assert difference(ours.outputs[0].double(), exact.outputs[0]) <= 2 * baseline + 1e-2
    for name, gradient in ours.parameters.items():
        assert gradient is not None
        assert gradient.dtype == torch.bfloat16
        wanted, base = exact.parameters[name], theirs.parameters[name]
        assert wanted is not None
        assert base is not None
        floor = 1e-2 * exact.largest
        allowed = 2 * difference(base.double(), wanted, floor) + 3e-2
        assert difference(gradient.double(), wanted, floor) <= allowed, name


def test_checkpoint_inside_a_model_is_kept() -> None:
    """A model that already uses activation checkpointing for itself gives the same numbers."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = between(nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    net = Checkpointed()
    net(torch.zeros(1, 3, 9, 9))
    model = seeded(net)
    try:
        compare(model, regional, random_inputs(IMAGE))
    except errors.CaptureError:
        pytest.skip("torch.export cannot capture checkpoint here, and the error says so")


class Twice(nn.Module):
    """One batch norm, used twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).relu() + self.norm(x * 2).tanh()


MOVING = {
    "batch": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 3)),
    "instance": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.InstanceNorm2d(4, track_running_stats=True)),
    "spectral": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.Tanh()),
    "twice": Twice,
}


@pytest.mark.parametrize("calls", ["two before one backward", "one and four backwards"])
@pytest.mark.parametrize("kind", MOVING)
def test_buffers_move_once_for_each_forward(kind: str, calls: str) -> None:
    """Whatever is done backward: gradients and buffers of the untouched network."""

    def work(run: nn.Module, owner: nn.Module) -> list[Tensor]:
        x = torch.randn(2, 3, 11, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        if calls.startswith("two"):
            (run(x).square().mean() - run(2 * x).abs().mean()).backward()
        else:
            loss = run(x).square().mean()
            for _ in range(4):
                loss.backward(retain_graph=True)
        return [*(p.grad for p in owner.parameters() if p.grad is not None), *(b.double() for b in owner.buffers())]

    torch.manual_seed(0)
    model = MOVING[kind]().double()
    other = copy.deepcopy(model)
    small = ranger_nn.regionalize(other, regions=(4, 4))
    for ours, theirs in zip(work(small, other), work(model, model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", ["clone", "copy"])
def test_a_clone_of_the_input_may_be_written_into(kind: str) -> None:
    """As the refusal of a write into the input itself advises."""

    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.clone() if kind != "copy" else x.to(x.dtype, copy=True)
            y[:, :, 0] = 0
            return y * x

    compare(Writes(), lambda m: ranger_nn.regionalize(m, regions=(4, 4)), random_inputs(((1, 3, 9, 9),)))


class Asks(nn.Module):
    """What it computes depends on the order of its input in memory: by asking, and by a view that may be a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        y.reshape(x.shape[0], -1).add_(1)
        return self.conv(y) * (3 if x.is_contiguous() else 1)


@pytest.mark.parametrize("order", ["plain", "last", "gaps", "expanded", "turned"])
def test_the_order_of_an_input_in_memory(order: str) -> None:
    """Gaps and expanded dimensions too."""
    x = torch.randn(2, 4, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = {
        "plain": x,
        "last": x.contiguous(memory_format=torch.channels_last),
        "gaps": x.contiguous(memory_format=torch.channels_last)[..., ::2],
        "expanded": x[:, :, :1].expand(2, 4, 8, 16),
        "turned": x.transpose(2, 3)[:, :, ::2],
    }[order]
    model = Asks().double()
    small = ranger_nn.regionalize(model, regions=(3, 3))
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
