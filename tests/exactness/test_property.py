"""Random networks, random sizes, random regions: the untouched numbers and gradients, in float64.

A network is a list of steps. Each step takes a value made before, puts one operator on it, and may
join the result with another value after bringing both to one size (by a centre crop or by
interpolation), as skip connections do. RANGER_EXAMPLES sets the number of networks (60 if unset);
where it is set, the search is random, otherwise the same networks are tried every time.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ranger_nn
from tests.nets.pieces import PIECES, piece
from tests.support import Gradients, check, differences, random_inputs, randomise, run

EXAMPLES = int(os.environ.get("RANGER_EXAMPLES", "60"))
STEADY = 1e-13  # a hundredth of the tolerance, for a nudge of the last bit
LARGEST = 90  # pixels along an axis; larger values make a case slow and show nothing new

Draw = Callable[[st.SearchStrategy[Any]], Any]


class Apply(nn.Module):
    """A function with fixed arguments, printable, so that a failing network can be read."""

    def __init__(self, function: Callable[..., Tensor], *args: Any, **options: Any) -> None:
        super().__init__()
        self.function, self.args, self.options = function, args, options

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.args, **self.options)

    def extra_repr(self) -> str:
        return f"{self.function.__name__}, {self.args}, {self.options}"


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.linear(x.flatten(2).mean(2)))
        return x * gate.view(*gate.shape, *([1] * (x.dim() - 2)))


@dataclass(frozen=True)
class Step:
    """One operator on value `source`, then perhaps a join with value `other`."""

    source: int
    other: int | None
    align: str
    join: str


class Network(nn.Module):
    """Runs the steps in order; gives the last value, and one more if `also` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.layers = nn.ModuleList()
        self.also: int | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for step, layer in zip(self.steps, self.layers):
            values.append(joined(layer(values[step.source]), step, values))
        return (values[-1],) if self.also is None else (values[-1], values[self.also])


def joined(y: Tensor, step: Step, values: list[Tensor]) -> Tensor:
    """`y` with the other value of the step, at one size."""
    if step.other is None:
        return y
    other = values[step.other]
    if step.align == "crop":
        size = [min(a, b) for a, b in zip(y.shape[2:], other.shape[2:])]
        y, other = centre(y, size), centre(other, size)
    elif other.shape[2:] != y.shape[2:]:
        mode = step.align
        if mode == "linear" and y.dim() == 4:
            mode = "bilinear"
        if mode == "nearest" and y.dim() == 3:
            mode = "nearest-exact"  # PyTorch 2.13's gradient of 1-D "nearest" is wrong at sizes such as 60 -> 58
        other = F.interpolate(other, size=y.shape[2:], mode=mode)
    if step.join == "cat" or y.shape[1] != other.shape[1]:
        return torch.cat([y, other], 1)
    return y * torch.sigmoid(other) if step.join == "gate" else y + other


def centre(x: Tensor, size: list[int]) -> Tensor:
    """A centre crop."""
    for axis, length in enumerate(size, 2):
        x = x.narrow(axis, (x.shape[axis] - length) // 2, length)
    return x


def each(draw: Draw, ndim: int, low: int, high: int) -> tuple[int, ...]:
    """One number per spatial axis."""
    return tuple(draw(st.integers(low, high)) for _ in range(ndim))


def convolution(draw: Draw, ndim: int, channels: int) -> nn.Module:
    """Any stride, dilation, padding, groups and padding mode."""
    kernel, dilation = each(draw, ndim, 1, 5), each(draw, ndim, 1, 3)
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4) if channels % g == 0]))
    out = groups * draw(st.integers(1, 2))
    layer = nn.Conv1d if ndim == 1 else nn.Conv2d
    stride = each(draw, ndim, 1, 3)
    padding: Any = each(draw, ndim, 0, 4)
    if draw(st.integers(0, 5)) == 0:
        stride, padding = (1,) * ndim, "same"
    bias = draw(st.booleans())
    return layer(channels, out, kernel, stride, padding, dilation, groups, bias, mode)


def transposed(draw: Draw, ndim: int, channels: int) -> nn.Module:
    """Any stride, dilation, padding and output padding."""
    kernel, stride, dilation = each(draw, ndim, 1, 4), each(draw, ndim, 1, 3), each(draw, ndim, 1, 2)
    padding = tuple(draw(st.integers(0, min(2, d * (k - 1)))) for k, d in zip(kernel, dilation))
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation))
    groups = draw(st.sampled_from([g for g in (1, 2) if channels % g == 0]))
    layer = nn.ConvTranspose1d if ndim == 1 else nn.ConvTranspose2d
    return layer(
        channels, groups * draw(st.integers(1, 2)), kernel, stride, padding, extra, groups,
        dilation=dilation,
    )  # fmt: skip


def pool(draw: Draw, ndim: int, channels: int) -> nn.Module:
    """Max, average and power pooling, with ceil_mode and count_include_pad."""
    kernel, stride = each(draw, ndim, 1, 4), each(draw, ndim, 1, 3)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    ceil = draw(st.booleans())
    kind = draw(st.sampled_from(["max", "avg", "lp"]))
    if kind == "max":
        layer = nn.MaxPool1d if ndim == 1 else nn.MaxPool2d
        return layer(kernel, stride, padding, each(draw, ndim, 1, 2), ceil_mode=ceil)
    if kind == "lp":
        function = F.lp_pool1d if ndim == 1 else F.lp_pool2d
        args = (kernel[0], stride[0]) if ndim == 1 else (kernel, stride)
        return nn.Sequential(nn.Softplus(), Apply(function, 2.0, *args, ceil_mode=ceil))
    layer = nn.AvgPool1d if ndim == 1 else nn.AvgPool2d
    return layer(kernel, stride, padding, ceil, draw(st.booleans()))


def resize(draw: Draw, ndim: int, channels: int) -> nn.Module:
    """By a factor or to a size, with and without aligned corners."""
    modes = ["nearest-exact", "linear"] if ndim == 1 else ["nearest", "bilinear", "bicubic"]
    mode = draw(st.sampled_from(modes))
    options: dict[str, Any] = {"mode": mode}
    if mode in ("linear", "bilinear", "bicubic"):
        options["align_corners"] = draw(st.booleans())
    if draw(st.booleans()):
        options["size"] = each(draw, ndim, 2, 40)
    else:
        options["scale_factor"] = draw(st.sampled_from([0.5, 0.7, 1.5, 2.0, 2.0, 3.0]))
    return Apply(F.interpolate, **options)


def padding(draw: Draw, ndim: int, channels: int) -> nn.Module:
    """Any padding, in any mode; negative numbers crop."""
    mode = draw(st.sampled_from(["constant", "reflect", "replicate", "circular"]))
    low = -3 if mode == "constant" else 0
    sizes = tuple(draw(st.integers(low, 4)) for _ in range(2 * ndim))
    return Apply(F.pad, sizes, mode)


def crop_by(x: Tensor, sizes: tuple[tuple[int, int], ...]) -> Tensor:
    """Slices that leave out so much on either side."""
    for axis, (low, high) in enumerate(sizes, 2):
        x = x.narrow(axis, low, x.shape[axis] - low - high)
    return x


def crop(draw: Draw, ndim: int, channels: int) -> nn.Module:
    """A crop of each axis."""
    return Apply(crop_by, tuple(tuple(each(draw, 2, 0, 5)) for _ in range(ndim)))


def roll_by(x: Tensor, shifts: tuple[int, ...]) -> Tensor:
    """Rolls each spatial axis."""
    return torch.roll(x, shifts, tuple(range(2, x.dim())))


def roll(draw: Draw, ndim: int, channels: int) -> nn.Module:
    """A roll of each axis, near or far."""
    return Apply(roll_by, each(draw, ndim, -20, 20))


def norm(draw: Draw, ndim: int, channels: int) -> nn.Module:
    """Batch norm in either mode, group and instance norm."""
    kind = draw(st.sampled_from(["batch", "batch", "group", "instance"]))
    affine = draw(st.booleans())
    if kind == "group":
        return nn.GroupNorm(draw(st.sampled_from([1, channels])), channels, affine=affine)
    if kind == "instance":
        return (nn.InstanceNorm1d if ndim == 1 else nn.InstanceNorm2d)(channels, affine=affine)
    return (nn.BatchNorm1d if ndim == 1 else nn.BatchNorm2d)(channels, affine=affine)


ACTIVATIONS = (
    nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.LeakyReLU, nn.Hardswish, nn.ELU, nn.Sigmoid,
)  # fmt: skip


def activation(draw: Draw, ndim: int, channels: int) -> nn.Module:
    """Elementwise functions, PReLU, softmax over channels."""
    extra = (lambda: nn.PReLU(channels), lambda: nn.Softmax(1))
    return draw(st.sampled_from(ACTIVATIONS + extra))()


def gate(draw: Draw, ndim: int, channels: int) -> nn.Module:
    """Squeeze and excite."""
    return Gate(channels)


def pieces(draw: Draw, ndim: int, channels: int, size: list[int]) -> nn.Module:
    """Tokens, wraps, causal pads, first differences, single rows, reshapes at odd offsets."""
    kind = draw(st.sampled_from(PIECES))
    return piece(kind, lambda low, high: draw(st.integers(low, high)), ndim, channels, size)


KINDS = (
    convolution, convolution, convolution, transposed, transposed, pool, pool, resize, resize,
    padding, crop, roll, norm, activation, gate, pieces, pieces, pieces,
)  # fmt: skip


def fits(value: Tensor) -> bool:
    """Neither empty nor too large to be a quick case."""
    return min(value.shape) > 0 and max(value.shape[2:]) <= LARGEST and value.shape[1] <= 12


@st.composite
def networks(draw: Draw) -> tuple[Network, tuple[int, ...]]:
    """A network and its input shape; operators that do not fit the size drawn are left out."""
    ndim = draw(st.integers(1, 2))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), *each(draw, ndim, 4, 33))
    network = Network()
    values = [torch.zeros(shape)]
    for _ in range(draw(st.integers(2, 8))):
        last = len(values) - 1
        source = draw(st.sampled_from([last, last, last, draw(st.integers(0, last))]))
        other = draw(st.sampled_from([None, None, draw(st.integers(0, last))]))
        align = draw(st.sampled_from(["crop", "nearest", "linear"]))
        step = Step(source, other, align, draw(st.sampled_from(["add", "cat", "gate"])))
        kind, channels = draw(st.sampled_from(KINDS)), values[source].shape[1]
        size = list(values[source].shape[2:])
        layer = pieces(draw, ndim, channels, size) if kind is pieces else kind(draw, ndim, channels)
        try:
            value = joined(layer.eval()(values[source]), step, values)
        except (RuntimeError, ValueError):
            continue
        if fits(value):
            network.steps.append(step)
            network.layers.append(layer)
            values.append(value.detach())
    assume(network.steps)
    network.also = draw(st.sampled_from([None, None, draw(st.integers(0, len(values) - 1))]))
    return network.train(draw(st.integers(0, 3)) == 0), shape


def steady(network: Network, inputs: tuple[Tensor, ...], wanted: Gradients) -> bool:
    """Whether the untouched network itself keeps rounding small.

    A norm over two nearly equal pixels multiplies the last bit by thousands, and a maximum of two
    nearly equal values moves a gradient elsewhere: there no two orders of summation agree.
    """
    nudged = tuple(x * (1 + 4e-16 * torch.randn_like(x).sign()) for x in inputs)
    moved = differences(run(copy.deepcopy(network), nudged), wanted)
    return max(moved.values()) <= STEADY


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="RANGER_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    print_blob=True,
)
@given(
    case=networks(),
    regions=st.tuples(st.integers(1, 24) | st.just(LARGEST), st.integers(1, 24)),
    schedule=st.sampled_from(["tile", "slide", None]),
)
def test_random_networks(case: tuple[Network, tuple[int, ...]], regions: tuple[int, int], schedule: str | None) -> None:
    """Outputs, gradients and buffers of a random network, by random regions."""
    network, shape = case
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    randomise(network)
    network = network.double()
    inputs = random_inputs((shape,))
    note(f"{network}\n{network.steps}\nalso {network.also}, train {network.training}, input {shape}")
    try:
        wanted = run(copy.deepcopy(network), inputs)
    except ValueError:  # a norm in training mode over a single value
        assume(False)
    assume(steady(network, inputs, wanted))
    small = ranger_nn.regionalize(network, regions=regions[: len(shape) - 2], schedule=schedule)
    check(run(small, inputs), wanted)
