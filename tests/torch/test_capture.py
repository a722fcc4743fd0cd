"""What capture makes of constants, buffers, outputs and sizes: as the untouched network, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ranger_nn
from ranger_nn.errors import CaptureError, InputError

Forward = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """A convolution, buffers and tensors of all kinds, and a forward to try."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.function = function
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.register_buffer("mean", torch.ones(4))
        self.register_buffer("steps", torch.tensor(2))
        self.register_buffer("sizes", torch.tensor([1, 3]))
        self.plain, self.prompt = torch.ones(4), torch.ones(4, requires_grad=True)
        self.listed = [nn.Linear(4, 4)]
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def pair(function: Forward, train: bool = False) -> tuple[Net, nn.Module, Net]:
    """The untouched network, the regional one, and the module inside it."""
    torch.manual_seed(0)
    net = Net(function).train(train)
    inner = copy.deepcopy(net)
    return net, ranger_nn.regionalize(inner, regions=(3, 4)), inner


def channels(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1)


def average(s: Net, x: Tensor) -> Tensor:
    y = s.conv(x)
    before = y * channels(s.mean.clone())
    s.mean.mul_(0.9).add_(0.1 * y.detach().mean((0, 2, 3)))
    return before + y * channels(s.mean.clone())


def late(s: Net, x: Tensor) -> Tensor:
    y = s.conv(x)
    s.mean.add_(y.detach().mean((0, 2, 3)))
    s.mean.mul_(0.5)
    return y


def queue(s: Net, x: Tensor) -> Tensor:
    y = s.conv(x)
    with torch.no_grad():
        s.mean[1:] = s.mean[:-1].clone()
        s.mean[0] = y.mean()
    s.steps += 1
    return y + s.mean.sum() * s.steps


def attribute(s: Net, x: Tensor) -> Tensor:
    y = s.conv(x)
    s.plain[1:3] += y.detach().mean()
    return y * channels(s.plain)


def rebound(s: Net, x: Tensor) -> Tensor:
    s.mean = s.mean * 0.9 + 0.1
    return s.conv(x) * channels(s.mean)


def statistics(s: Net, x: Tensor) -> Tensor:
    return s.norm(s.conv(x)) + channels(s.norm.running_mean) + s.norm.num_batches_tracked


def twice(s: Net, x: Tensor) -> Tensor:
    return s.norm(s.conv(x)) + s.norm(s.conv(2 * x + 1))


@pytest.mark.parametrize("function", [average, late, queue, attribute, rebound, statistics, twice])
@pytest.mark.parametrize("grad", [False, True])
def test_buffers_that_forward_changes(function: Forward, grad: bool) -> None:
    """Read before and after, written whole, through views and in order; once per call."""
    net, small, inner = pair(function, train=True)
    for call in range(2):
        x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(call))
        with torch.set_grad_enabled(grad):
            wanted, given = net(x), small(x)
        torch.testing.assert_close(given, wanted)
        if grad:
            wanted.sum().backward()
            given.sum().backward()
    for (name, theirs), ours in zip(net.named_buffers(), inner.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    torch.testing.assert_close(inner.plain, net.plain)
    torch.testing.assert_close(inner.conv.weight.grad, net.conv.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(4), nn.InstanceNorm1d(4, affine=True, track_running_stats=True), nn.BatchNorm1d(4, affine=False)],
)
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 4), (3, 4, 1), (1, 4, 7)])
def test_running_statistics_move_once(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Vectors and instance norm too, though backward runs forward again."""
    net, inner = copy.deepcopy(layer).train(), copy.deepcopy(layer).train()
    x = torch.randn(shape, requires_grad=True)
    try:
        wanted = net(x)
    except ValueError:  # a single value for each channel
        return
    given = ranger_nn.regionalize(inner)(x)
    wanted.square().sum().backward()
    given.square().sum().backward()
    torch.testing.assert_close(given, wanted)
    for ours, theirs in zip(inner.buffers(), net.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_tensors_that_are_no_parameters_get_their_gradient() -> None:
    """A prompt, and layers in a plain list."""
    net, small, inner = pair(lambda s, x: s.listed[0]((s.conv(x) * channels(s.prompt)).mT.mean(2)))
    x = torch.randn(2, 3, 4, 8)
    net(x).sum().backward()
    small(x).sum().backward()
    torch.testing.assert_close(inner.prompt.grad, net.prompt.grad)
    torch.testing.assert_close(inner.listed[0].weight.grad, net.listed[0].weight.grad)
    with torch.no_grad():
        net.prompt.mul_(3)
        inner.prompt.mul_(3)
    torch.testing.assert_close(small(x), net(x))


NUMBERS: list[Forward] = [
    lambda s, x: s.conv(x) * int(s.steps),
    lambda s, x: s.conv(x).split(s.sizes.tolist(), 1)[0],
    lambda s, x: F.avg_pool2d(s.conv(x), int(s.sizes.max()) - 1 or 2),
    lambda s, x: s.conv(x) if s.sizes.float().mean() * s.mean[0] > 1.5 else x,
    lambda s, x: s.conv(x)[:, : int(s.plain.sum()) - 1],
]


@pytest.mark.parametrize("function", NUMBERS)
def test_numbers_of_constants(function: Forward) -> None:
    """Taken from the values at capture; the plan is made anew when they change."""
    net, small, inner = pair(function)
    x = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(small(x), net(x))
    for model in (net, inner):
        model.steps.fill_(3)
        model.sizes.copy_(torch.tensor([2, 2]))
        model.mean.fill_(0.1)
        model.plain.fill_(0.75)
    torch.testing.assert_close(small(x), net(x))


class Sized(nn.Module):
    """Sizes and numbers that only data tells."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("sizes", torch.tensor([1, 2]))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x + self.sizes[0])


SIZED: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.nonzero(),
    lambda x: x[x > 0],
    lambda x: torch.unique(x),
    lambda x: x.repeat_interleave((x[0] > 0).long() + 1, 1),
    lambda x: torch.bincount((x > 0).long().flatten()),
    lambda x: x.tensor_split((x[0] > 9).long()[:1], 1)[0],
    lambda x: torch.masked_select(x, x > 0),
    lambda x: x * x.sum().item(),
    lambda x: x if x.sum() > 0 else -x,
    lambda x: torch.where(x > 0)[0],
]


@pytest.mark.parametrize("function", SIZED)
def test_sizes_that_depend_on_data(function: Callable[[Tensor], Tensor]) -> None:
    """Refused with the line in the user's code."""
    with pytest.raises(CaptureError, match=r"test_capture\.py"):
        ranger_nn.regionalize(Sized(function))(torch.randn(3, 4))


REFUSED: list[tuple[Forward, str]] = [
    (lambda s, x: s.conv(x.mul_(2)), "input"),
    (lambda s, x: s.conv(x.permute(0, 2, 3, 1)[0].flatten()[2:].zero_() + x.mean()), "input"),
    (lambda s, x: (F.dropout(x, 0.5, False).add_(1), s.conv(x))[1], "input"),
    (lambda s, x: torch.add(x, 1, out=x) + s.conv(x).sum(), "input"),
    (lambda s, x: s.conv(x.unsqueeze_(0)[0]), "capture|input"),
    (lambda s, x: (s.weight.mul_(2), s.conv(x))[1], "parameter"),
    (lambda s, x: (s.conv.weight[0].clamp_(0), s.conv(x))[1], "parameter"),
    (lambda s, x: s.conv(x).unsqueeze(0).expand(3, -1, -1, -1, -1).add_(1), "order"),
    (lambda s, x: (y := s.conv(x))[:, :, 1:].add_(y[:, :, :-1]), "order"),
]


@pytest.mark.parametrize(("function", "said"), REFUSED)
def test_writes_that_are_refused(function: Forward, said: str) -> None:
    """Into inputs and parameters, through views too; into memory that overlaps."""
    _, small, _ = pair(function)
    with torch.no_grad(), pytest.raises((InputError, CaptureError), match=said):
        small(torch.randn(2, 3, 9, 8))


def test_several_tensors_written_at_once() -> None:
    """`_foreach_add_` returns nothing; its writes are seen."""

    def both(s: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = s.conv(x), s.conv(x) * 2
        torch._foreach_add_([a[:, 0], b], 1.0)
        return a, b

    net, small, _ = pair(both)
    x = torch.randn(2, 3, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(small(x), net(x))


@pytest.mark.parametrize("grad", [False, True])
def test_outputs_of_all_kinds(grad: bool) -> None:
    """Inputs, parameters, buffers and constants themselves; one tensor twice, None, numbers, other dtypes."""

    def outputs(s: Net, x: Tensor) -> Any:
        y = s.conv(x)
        spectrum = torch.fft.rfft2(y)
        same = {"input": x, "weight": s.weight, "buffer": s.mean, "plain": s.plain}
        return same, [y, y, None, 3, 2.5, True], (y > 0, y.argmax(1), y.half(), y.detach(), spectrum, x.shape[2])

    net, small, inner = pair(outputs)
    x = torch.randn(2, 3, 9, 8)
    with torch.set_grad_enabled(grad):
        wanted, given = net(x), small(x)
    assert given[0]["input"] is x
    assert given[0]["weight"] is inner.weight
    assert given[0]["buffer"] is inner.mean
    assert given[0]["plain"] is inner.plain
    assert given[1][2:] == wanted[1][2:]
    assert given[1][0] is given[1][1]
    for ours, theirs in zip(given[2], wanted[2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert [t.requires_grad for t in given[2][:-1]] == [t.requires_grad for t in wanted[2][:-1]]


EMPTY: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.tile(0),
    lambda x: x.repeat(1, 0, 2, 1),
    lambda x: x[:0].roll(1, 0),
    lambda x: torch.cat(x[:, :, :0].chunk(3, 2), 2),
    lambda x: F.group_norm(x[:0], 1),
    lambda x: F.pad(x[:, :, :0], (1, 1, 1, 1)),
    lambda x: x[:, :0].reshape(-1),
    lambda x: F.conv2d(x[:0], torch.ones(3, 3, 3, 3)),
    lambda x: x[:, :, :0].sum(2),
]


@pytest.mark.parametrize("function", EMPTY)
def test_tensors_without_elements(function: Callable[[Tensor], Tensor]) -> None:
    """Forward and gradient."""
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), Sized(function))
    x = torch.randn(1, 3, 5, 6)
    given = ranger_nn.regionalize(net)(x)
    torch.testing.assert_close(given, net(x))
    given.sum().backward()


def test_no_gradient_through_copies_under_no_grad() -> None:
    """A copy made under `no_grad` has none; a write under `no_grad` changes numbers only."""

    def steps(s: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        y = s.conv(x)
        with torch.no_grad():
            held = y.clone()
            y.clamp_(-0.1, 0.1)
            y[:, 0] = 1.0
        return y * 2 + held, held

    net, small, inner = pair(steps)
    x = torch.randn(2, 3, 9, 8)
    wanted, given = net(x), small(x)
    torch.testing.assert_close(given, wanted)
    assert not given[1].requires_grad
    wanted[0].sum().backward()
    given[0].sum().backward()
    torch.testing.assert_close(inner.conv.weight.grad, net.conv.weight.grad)


def test_one_norm_under_two_names() -> None:
    """Refused by both names in training; in eval mode it is only read."""
    norm = nn.BatchNorm2d(3)
    net, x = nn.Sequential(norm, nn.ReLU(), norm), torch.randn(2, 3, 23, 17)
    with pytest.raises(CaptureError, match="two names, 0 and 2"):
        ranger_nn.regionalize(net, regions=(5,))(x)
    net.eval()
    torch.testing.assert_close(ranger_nn.regionalize(net, regions=(5,))(x), net(x))


def test_a_generator_of_the_models_own() -> None:
    """Refused by name."""

    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rand((), generator=self.generator)

    with pytest.raises(CaptureError, match=r"torch\.Generator"):
        ranger_nn.regionalize(Noise(), regions=(5,))(torch.randn(1, 3, 9, 9))


def test_flags_of_a_capture_combine() -> None:
    """Libraries put "is it compiling" together with other flags."""

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            compiling = torch.compiler.is_compiling()
            compiling |= False
            return x * 2 if compiling & True else x + x

    x = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(ranger_nn.regionalize(Asks(), regions=(5,))(x), x * 2)


def test_more_elements_than_are_planned_for() -> None:
    """An error at once, not a search without end."""
    with pytest.raises(InputError, match="99999999999"):
        ranger_nn.plan(nn.Conv2d(3, 4, 3), (1, 3, 99999999999, 64))
