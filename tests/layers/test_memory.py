"""`RegionalAggregator(memory=)` in PyTorch: what the layer without it gives, whatever the local network changes, or refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ranger_nn import Grid, KMeans, PartitionError, TimeSlices, VerificationError, measure
from ranger_nn.torch import RegionalAggregator
from ranger_nn.torch.layers import clustered, regional

Make = Callable[[], Any]


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=[2, 100], ids="at once {}".format)
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many regions run together, whatever they take."""
    for module in (regional, clustered):
        monkeypatch.setattr(module, "at_once", lambda *_: request.param)
    return int(request.param)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two regions run together."""
    for module in (regional, clustered):
        monkeypatch.setattr(module, "at_once", lambda *_: 2)


def cnn(*between: nn.Module) -> nn.Module:
    """(batch, 2, h, w) -> (batch, 4)."""
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *between, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Branches(nn.Module):
    """Two norms beside one another, one of them met twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.a(x).sigmoid()) + self.b(self.c(x).relu())


class Counts(nn.Module):
    """A buffer written in place, one bound anew, one written behind autograd's back, a number."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("a", "b", "c"):
            self.register_buffer(name, torch.ones(()))
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.a += 1
        self.b = self.b * 2
        self.c.data.add_(1)
        self.steps += 1
        return x * (self.a + self.b + self.c).clone() * self.steps


class Unregistered(nn.Module):
    """What trains, and is in no list of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Conv2d(4, 4, 1)]
        self.prompt = torch.ones(4, 1, 1, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x) * self.prompt


def behind_a_function(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: net(x)


SAME: dict[str, Make] = {
    "norm": lambda: cnn(nn.BatchNorm2d(4), nn.ReLU()),
    "norm first": lambda: nn.Sequential(nn.BatchNorm2d(2), cnn()),
    "three norms": lambda: cnn(
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4, affine=False),
    ),
    "branches": lambda: cnn(Branches()),
    "without running statistics": lambda: cnn(nn.BatchNorm2d(4, track_running_stats=False)),
    "of vectors": lambda: nn.Sequential(cnn(), nn.BatchNorm1d(4), nn.Tanh()),
    "synchronised": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(cnn(nn.BatchNorm2d(4))),
    "norm and dropout": lambda: cnn(nn.BatchNorm2d(4), nn.Dropout(0.0), nn.BatchNorm2d(4)),
    "spectral": lambda: cnn(parametrizations.spectral_norm(nn.Conv2d(4, 4, 3))),
    "weight norm of old": lambda: cnn(nn.utils.weight_norm(nn.Conv2d(4, 4, 3))),
    "counts": lambda: cnn(Counts()),
    "unregistered": lambda: cnn(Unregistered()),
    "a function": lambda: behind_a_function(cnn(nn.BatchNorm2d(4))),
    "a method": lambda: cnn(nn.BatchNorm2d(4)).forward,
    "lazy": lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "within": lambda: RegionalAggregator(Grid(2, 2), "mean", local=cnn(nn.BatchNorm2d(4))),
    "within, with memory": lambda: RegionalAggregator(Grid(2, 2), "mean", local=cnn(nn.ReLU()), memory="1MB"),
}


def pair(make: Make, partition: Any = None, name: str = "mean", **given: Any) -> list[RegionalAggregator]:
    """The layer without and with memory."""
    layers = []
    for memory in (None, "1GB"):
        torch.manual_seed(0)
        layers.append(RegionalAggregator(partition or Grid(3, 2), name, local=make(), memory=memory, **given))
    return layers


def trained(layer: nn.Module, x: Tensor, steps: int = 2) -> list[Tensor]:
    """Results, gradients, buffers."""
    torch.manual_seed(1)
    found = []
    for _ in range(steps):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        (y * torch.linspace(1, 2, y.numel()).view_as(y)).sum().backward()
        found += [y.detach(), leaf.grad]
    modules = regional.modules_in([layer])
    tensors = [p.grad for m in modules for p in m.parameters() if p.grad is not None]
    return [t.double() for t in (*found, *tensors, *(b for m in modules for b in m.buffers()))]


def check(layers: list[RegionalAggregator], x: Tensor, rtol: float = 1e-8) -> None:
    plain, small = (trained(layer, x) for layer in layers)
    assert len(plain) == len(small)
    for a, b in zip(plain, small):
        torch.testing.assert_close(b, a, rtol=rtol, atol=rtol / 100)


def image(*shape: int) -> Tensor:
    """Brighter below, so that regions' statistics differ."""
    x = torch.randn(shape or (2, 2, 18, 10))
    return x * torch.linspace(0, 3, x.shape[2])[:, None]


@pytest.mark.parametrize("kind", SAME)
def test_as_without_memory(kind: str, two: None) -> None:
    """Result, gradients, running statistics, two steps."""
    check(pair(SAME[kind]), image())


def test_groups_of_several_shapes(at_once: int) -> None:
    """Each group is a call, as without memory."""
    check(pair(SAME["three norms"]), image(2, 2, 17, 9))


def test_sets_of_clusters(at_once: int) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))

    for kind in (KMeans(4, balanced=True), KMeans(4)):
        check(pair(make, kind, "stitch"), torch.randn(40, 4))


def test_one_value_of_a_channel_in_each_call(two: None) -> None:
    """Refused by torch of one region, not of all."""
    check(pair(lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(2), nn.Flatten())), image(1, 2, 18, 10))


@pytest.mark.parametrize("frozen", ["input", "convolution", "all but the input"])
def test_norms_where_little_needs_a_gradient(frozen: str, two: None) -> None:
    x, found = image(), []
    for layer in pair(SAME["three norms"]):
        leaf = x.clone().requires_grad_(frozen != "input")
        if frozen != "input":
            (layer.local[0] if frozen == "convolution" else layer).requires_grad_(False)
        layer(leaf).square().sum().backward()
        found.append([t.grad for t in (leaf, *layer.parameters())])
    for a, b in zip(*found):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)


def test_norms_without_gradients_and_in_evaluation(two: None) -> None:
    x, found = image(), []
    for layer in pair(SAME["three norms"]):
        with torch.no_grad():
            y = layer(x)
        found.append([y, layer.eval()(x), *layer.buffers()])
    for a, b in zip(*found):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norms_of_narrow_numbers(dtype: torch.dtype, two: None) -> None:
    """As near as the layer without memory is to the numbers of 64 bits."""
    x = image()

    def make() -> nn.Module:  # without a bias, whose gradient before a norm is rounding alone
        return nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())

    layers, exact = pair(make), trained(pair(make)[0], x, 1)
    plain, small = (trained(layer.to(dtype), x.to(dtype), 1) for layer in layers)
    for a, b, c in zip(exact, plain, small):
        near = (a - b).abs().max() + 16 * torch.finfo(dtype).eps * a.abs().max()
        assert (c - a).abs().max() <= 2 * near


def test_norms_inside_the_budget() -> None:
    """What is measured stays below what is allowed, also where groups are far larger than the region that was measured."""
    torch.set_default_dtype(torch.float32)
    x = torch.rand(1, 3, 256, 192)

    def local() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip

    for memory in (1_000_000, 3_000_000):
        layer = RegionalAggregator(Grid(8, 6), "mean", local=local(), memory=memory)
        layer(x).sum().backward()
        layer.zero_grad()
        with measure() as used:
            layer(x).sum().backward()
        assert used.peak <= memory


def test_many_norms_inside_the_budget() -> None:
    """The graph of a group is gone when the next one runs in backward."""
    torch.set_default_dtype(torch.float32)
    between = [m for _ in range(6) for m in (nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))]
    layer = RegionalAggregator(Grid(4, 4), "mean", local=cnn(*between), memory=3_000_000)
    x = torch.rand(2, 2, 96, 96)
    layer(x).sum().backward()
    layer.zero_grad()
    with measure() as used:
        layer(x).sum().backward()
    assert next(iter(layer._sizes.values()))[0] < 16
    assert used.peak <= 3_000_000


# ------------------------------------------------------------------------------------- backward


def test_two_calls_then_their_gradients_twice(two: None) -> None:
    """State and random numbers of each call, not of the last; generators as without memory."""
    x, found = image(), []
    for layer in pair(lambda: cnn(nn.BatchNorm2d(4), Counts())):
        first, second = layer(x), layer(2 * x)
        first.square().sum().backward(retain_graph=True)
        second.square().sum().backward()
        first.square().sum().backward()
        found.append([*(p.grad for p in layer.parameters()), *layer.buffers()])
    for a, b in zip(*found):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)


def test_what_changes_between_forward_and_backward(two: None) -> None:
    """Evaluation, freezing, an attribute: backward is that of the forward, and they stay as they were set."""
    x, found = image(), []
    for layer in pair(lambda: cnn(nn.BatchNorm2d(4), nn.LeakyReLU(0.1))):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        layer.eval().requires_grad_(False)
        layer.local[2].negative_slope = 0.9
        y.square().sum().backward()
        found.append(leaf.grad)
        assert not layer.local[1].training
        assert layer.local[2].negative_slope == 0.9
        assert not any(p.requires_grad for p in layer.parameters())
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def test_hooks_on_parameters_run_once(two: None) -> None:
    x, found = image(), []
    for layer in pair(SAME["norm"]):
        weight = layer.local[0].weight
        weight.register_hook(lambda g: 3 * g)
        layer(x).square().sum().backward()
        layer(x).square().sum().backward()
        found.append(weight.grad)
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def test_parameters_of_one_call(two: None) -> None:
    """`functional_call` with leaves: gradients are theirs."""
    x, found = image(), []
    for layer in pair(SAME["norm"]):
        others = {n: (2 * p.detach()).requires_grad_() for n, p in layer.named_parameters()}
        y = torch.func.functional_call(layer, others, (x,))
        found.append([y, *torch.autograd.grad(y.square().sum(), list(others.values()))])
    for a, b in zip(*found):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)


def test_a_parameter_that_is_not_read_has_no_gradient(two: None) -> None:
    local = cnn()
    local.register_parameter("unread", nn.Parameter(torch.ones(2)))
    RegionalAggregator(Grid(3, 2), "mean", local=local, memory="1MB")(image()).sum().backward()
    assert local.unread.grad is None


class Crops(nn.Module):
    """Two crops at a random place, with a weight and a count."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(2, 1, 1)), 0

    def forward(self, x: Tensor) -> list[Tensor]:
        self.calls += 1
        x, at = x * self.weight * self.calls, int(torch.randint(0, 5, ()))
        return [x[:, :, at : at + 8], x[:, :, at + 2 : at + 10]]


def test_a_callable_partition_is_called_once() -> None:
    """Its parts are of one call; its parameters train."""
    layers = [RegionalAggregator(Crops(), "mean", local=nn.Flatten(2), memory=m) for m in (None, "1MB")]
    check(layers, image())
    assert layers[0].partition.calls == layers[1].partition.calls == 2


def test_backward_draws_what_forward_drew(two: None) -> None:
    """The masks of dropout."""
    x = torch.ones(2, 8, 3, requires_grad=True)
    y = RegionalAggregator(TimeSlices(4), "stitch", local=nn.Dropout(0.5), memory="1MB")(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())


@pytest.mark.parametrize("source", ["torch", "python", "module"])
def test_random_numbers_are_refused(source: str, two: None) -> None:
    """Each group would draw its own: from PyTorch's generator, Python's, or one that a module holds."""

    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator()

        def forward(self, x: Tensor) -> Tensor:
            if source == "python":
                return x * random.random()
            return x * torch.rand((), generator=self.generator if source == "module" else None)

    layer = RegionalAggregator(TimeSlices(4), "stitch", local=Drawn(), memory="1MB")
    with pytest.raises(PartitionError, match="draws random numbers besides dropout"):
        layer(torch.ones(2, 8, 3))


# -------------------------------------------------------------------------------------- refused


class Puts(nn.Module):
    """Puts aside something of each call."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.list, self.plain = what, [], torch.ones(())
        self.row, self.table = [torch.ones(())], {"a": {"b": (torch.ones(()),)}}
        self.register_buffer("average", torch.zeros(4))
        self.copy = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3))
        if self.what == "average":
            self.average.lerp_(mean.detach(), 0.1)
        if self.what in ("seen", "loss"):
            setattr(self, self.what, mean if self.what == "loss" else mean.detach())
        if self.what == "list":
            self.list.append(mean.detach())
        if self.what in ("plain", "copy"):
            with torch.no_grad():
                getattr(self, self.what).add_(1)
        if self.what == "row":
            self.row[0] += 1
        if self.what == "table":
            self.table["a"]["b"][0].mul_(2)
        return 2 * x


@pytest.mark.parametrize("what", ["average", "seen", "list", "loss", "plain", "copy", "row", "table"])
def test_refused_by_name(what: str, two: None) -> None:
    """What is not the same after each call, a loss that loses its graph, tensors that cannot be put back."""
    layer = RegionalAggregator(Grid(3, 2), "mean", local=cnn(Puts(what)), memory="1MB")
    with pytest.raises(PartitionError, match=rf"memory= .*1\.{what}.* leave memory out"):
        layer(image())


class Joins(nn.Module):
    """Something of all samples of a call."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.held = what, [[0]]
        self.register_buffer("samples", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "samples":
            self.samples += x.shape[0]
        if self.what == "held":
            self.held[0][0] += 1
        kinds: dict[str, Callable[[], Tensor]] = {
            "norm": lambda: (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True),
            "softmax": lambda: x.softmax(0),
            "maximum": lambda: x / x.abs().max(),
            "size": lambda: x / x.shape[0],
            "held": lambda: x * self.held[0][0],
        }
        return kinds.get(self.what, lambda: x)()


def joining(what: str, batch: int, count: int) -> tuple[Tensor, RegionalAggregator]:
    x = image(batch, 2, 18, 10)
    local = cnn(nn.BatchNorm2d(4), nn.Dropout(), Joins(what))
    return x, RegionalAggregator(Grid(count, 2), "mean", local=local, memory="1MB")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("what", ["norm", "softmax", "maximum", "size", "samples"])
def test_what_joins_samples_is_refused(what: str, size: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where groups are of equal size, each time, beside norms and dropout."""
    monkeypatch.setattr(regional, "at_once", lambda *_: size)
    x, layer = joining(what, batch, 3)
    for _ in range(2):
        with pytest.raises(
            PartitionError, match="buffer 3.samples by which" if what == "samples" else "Sequential joins"
        ):
            layer(x)
    monkeypatch.setattr(regional, "at_once", lambda *_: 100)
    joining(what, batch, 3)[1](x)


def test_samples_are_compared_once_they_differ(two: None) -> None:
    """A first input of equal regions says nothing; clusters are samples too; what is not seen is refused as such."""
    x, layer = joining("maximum", 2, 3)
    layer(torch.ones_like(x))
    with pytest.raises(PartitionError, match="joins samples"):
        layer(x)
    layer = RegionalAggregator(KMeans(4, balanced=True), "stitch", local=nn.Softmax(0), memory="1MB")
    with pytest.raises(PartitionError, match="local network Softmax joins samples"):
        layer(torch.randn(40, 4))
    with torch.no_grad(), pytest.raises(PartitionError, match="other numbers each time"):
        RegionalAggregator(Grid(3, 2), "mean", local=cnn(Joins("held")), memory="1MB")(x)


def test_refused_for_other_reasons(two: None) -> None:
    x = image().requires_grad_()
    layer = RegionalAggregator(Grid(3, 2), "mean", local=cnn(nn.BatchNorm2d(4)), memory="1MB")
    with pytest.raises(PartitionError, match="create_graph=True"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    y = layer(x)
    layer.local[0].weight.data.mul_(2)
    with pytest.raises(VerificationError, match="other numbers than in forward"):
        y.sum().backward()
    made = nn.Parameter(torch.ones(())) * 2
    layer = RegionalAggregator(Grid(3, 2), "mean", local=lambda r: cnn()(r) * made, memory="1MB")
    with pytest.raises(PartitionError, match="made before it ran"):
        layer(x)
    inner = RegionalAggregator(Grid(2, 2), "mean", local=cnn(nn.BatchNorm2d(4)), memory="1MB")
    with pytest.raises(PartitionError, match="memory to the outer layer alone"):
        RegionalAggregator(Grid(3, 2), "mean", local=inner, memory="1MB")(x)


def test_the_input_is_not_written(two: None) -> None:
    """Regions are copies, also where they could be views."""
    x = torch.randn(2, 6, 4)
    before = x.clone()
    RegionalAggregator(TimeSlices(2), "sum", local=nn.ELU(inplace=True), memory="1MB")(x)
    assert torch.equal(x, before)


def test_integers_are_averaged_as_fractions() -> None:
    """Weights below one would all round to zero."""
    x = torch.arange(12).reshape(1, 6, 2)
    y = RegionalAggregator(TimeSlices(3), "weighted_mean")(x)
    torch.testing.assert_close(y, x.double().reshape(1, 3, 2, 2).mean(1))


def test_parts_of_an_exported_program() -> None:
    layer = RegionalAggregator(TimeSlices(2), "sum", memory="1MB").eval()
    with pytest.raises(PartitionError, match="allowed = None"):
        torch.export.export(layer, (torch.randn(2, 6, 4),))
