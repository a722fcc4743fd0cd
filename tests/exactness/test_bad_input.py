"""Bad input: each case gives the right answer or a clear error, never a wrong number."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ranger_nn
from ranger_nn.errors import BudgetError, CaptureError, InputError, PlanError, UnitError
from tests.nets import SmallUNet
from tests.support import check, compare, difference, random_inputs, run


def unet(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A seeded U-Net in eval mode."""
    torch.manual_seed(0)
    return SmallUNet().to(dtype).eval()


def regional(model: nn.Module, schedule: str | None = None) -> nn.Module:
    """Many small regions."""
    return ranger_nn.regionalize(model, regions=(11, 13), schedule=schedule)


def or_refused(small: nn.Module, x: Tensor, reason: str) -> Tensor | None:
    """The output, or None if the model or its input is refused with a message that says `reason`."""
    try:
        return small(x)
    except (CaptureError, InputError) as error:
        if re.search(reason, str(error), re.IGNORECASE):
            return None
        raise


@pytest.mark.parametrize("memory", [0, -1, -(10**9), "0MB", "-3GB", "", "MB", "lots", 1.5, True])
def test_budget_that_is_no_amount(memory: Any) -> None:
    """Refused when the budget is stated, before anything is planned."""
    with pytest.raises((BudgetError, TypeError)):
        ranger_nn.regionalize(unet(), memory=memory)


@pytest.mark.parametrize("memory", ["12 parsecs", "5XB", "512 megs"])
def test_unknown_unit(memory: str) -> None:
    """The error names the units that there are."""
    with pytest.raises(UnitError, match="MiB"):
        ranger_nn.regionalize(unet(), memory=memory)


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_budget_too_small(training: bool) -> None:
    """The error names the least that fits and the operator that binds, and that least does fit."""
    (x,) = random_inputs(((1, 3, 67, 49),))
    with pytest.raises(BudgetError) as caught:
        ranger_nn.plan(unet(), x, memory=1000, training=training)
    error = caught.value
    assert error.least is not None
    assert error.least > 1000
    assert error.binding
    assert error.binding in str(error)
    plan = ranger_nn.plan(unet(), x, memory=error.least, training=training)
    assert plan.projected <= error.least
    small = ranger_nn.regionalize(unet(), memory=error.least)
    if training:
        check(run(small, (x,), of_inputs=False), run(unet(), (x,), of_inputs=False))
        return
    with torch.no_grad():
        assert difference(small(x), unet()(x)) <= 1e-11


@pytest.mark.parametrize("shape", [(3,), (3, 37), (2, 37, 41), (1, 2, 3, 37, 41)])
def test_wrong_rank(shape: tuple[int, ...]) -> None:
    """Too few or too many axes."""
    with pytest.raises(InputError):
        regional(unet())(torch.zeros(shape, dtype=torch.float64))


def test_unbatched_image_as_the_model_takes_it() -> None:
    """A convolution takes an image without a batch axis; so does its regional form."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3)).double()
    compare(model, regional, random_inputs(((3, 37, 41),)))


def test_wrong_channels() -> None:
    """A shape that the model itself refuses."""
    with pytest.raises(InputError):
        regional(unet())(torch.zeros(1, 5, 37, 41, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8, torch.complex128])
def test_wrong_dtype(dtype: torch.dtype) -> None:
    """A dtype other than the weights'."""
    with pytest.raises(InputError):
        regional(unet())(torch.zeros(1, 3, 37, 41, dtype=dtype))


@pytest.mark.parametrize("given", [None, "image.png", 3, [[1.0]]], ids=repr)
def test_input_that_is_no_tensor(given: Any) -> None:
    """Neither a tensor nor anything that the model takes."""
    with pytest.raises((InputError, TypeError)):
        regional(unet())(given)


def test_no_input() -> None:
    """Called with nothing."""
    with pytest.raises((InputError, TypeError)):
        regional(unet())()


@pytest.mark.parametrize("given", [None, "model", unet], ids=["none", "text", "function"])
def test_model_that_is_no_module(given: Any) -> None:
    """regionalize takes a module."""
    with pytest.raises((TypeError, InputError)):
        ranger_nn.regionalize(given)


@pytest.mark.parametrize("regions", [(0, 8), (-1, 8), (8, 8, 8), (2.5, 8), "8x8", 0])
def test_regions_that_make_no_sense(regions: Any) -> None:
    """Refused at once or at the first call, in words."""
    with pytest.raises((PlanError, InputError, TypeError)):
        ranger_nn.regionalize(unet(), regions=regions)(*random_inputs(((1, 3, 37, 41),)))


def test_unknown_schedule() -> None:
    """The error names the schedules that there are."""
    with pytest.raises((PlanError, InputError, ValueError), match="slide"):
        ranger_nn.regionalize(unet(), schedule="spiral")(*random_inputs(((1, 3, 37, 41),)))


@pytest.mark.parametrize("schedule", ["tile", "slide"])
def test_nan_weights_pass_through(schedule: str) -> None:
    """A NaN in a weight comes out where the untouched network puts it, and nowhere else."""
    model = unet()
    with torch.no_grad():
        model.up1.weight[0, 0, 0, 0] = float("nan")
    (x,) = random_inputs(((1, 3, 37, 41),))
    wanted, given = model(x), regional(copy.deepcopy(model), schedule)(x)
    assert wanted.isnan().any()
    assert torch.equal(given.isnan(), wanted.isnan())


@pytest.mark.parametrize("schedule", ["tile", "slide"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_pixel_that_is_not_finite(value: float, schedule: str) -> None:
    """It spreads as far as in the untouched network."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.MaxPool2d(3, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 4, 2, 1),
        nn.AvgPool2d(3, 1, 1),
    ).double()
    (x,) = random_inputs(((1, 3, 37, 41),))
    x[0, 1, 17, 19] = value
    torch.testing.assert_close(
        regional(copy.deepcopy(model), schedule)(x), model(x), rtol=1e-11, atol=1e-11, equal_nan=True
    )


def test_empty_batch() -> None:
    """No images in, no outputs out, of the right shape; or an error that says so."""
    x = torch.zeros(0, 3, 37, 41, dtype=torch.float64)
    y = or_refused(regional(unet()), x, "batch")
    assert y is None or y.shape == unet()(x).shape


@pytest.mark.parametrize("schedule", ["tile", "slide"])
@pytest.mark.parametrize("size", [(4, 4), (5, 7), (8, 4), (4, 61)])
def test_tiny_images(size: tuple[int, int], schedule: str) -> None:
    """Smaller than one region and than the receptive field."""
    compare(unet(), lambda m: regional(m, schedule), random_inputs(((1, 3, *size),)))


def test_image_of_no_pixels() -> None:
    """An image without rows."""
    with pytest.raises(InputError):
        regional(unet())(torch.zeros(1, 3, 0, 41, dtype=torch.float64))


def test_image_too_small_for_the_model() -> None:
    """What the model itself cannot take is refused as an input, not as a defect."""
    model = nn.Conv2d(3, 4, 7).double()
    with pytest.raises(InputError):
        regional(model)(torch.zeros(1, 3, 5, 5, dtype=torch.float64))


class WritesInput(nn.Module):
    """Adds one to its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1.0)
        return self.conv(x)


def test_model_that_mutates_its_input() -> None:
    """Either the input changes as it would, or the error says what the model does."""
    torch.manual_seed(0)
    model = WritesInput().double()
    (x,) = random_inputs(((1, 3, 37, 41),))
    mine, theirs = x.clone(), x.clone()
    y = or_refused(regional(copy.deepcopy(model)), mine, "input")
    wanted = model(theirs)
    assert torch.equal(mine, x if y is None else theirs)
    assert y is None or difference(y, wanted) <= 1e-11


class CountsCalls(nn.Module):
    """Keeps a counter in a buffer and uses it."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) * self.calls


def test_model_that_mutates_a_buffer() -> None:
    """A buffer changes once per call, not once per region."""
    torch.manual_seed(0)
    model = CountsCalls().double()
    small = regional(copy.deepcopy(model))
    (x,) = random_inputs(((1, 3, 37, 41),))
    for calls in (1, 2, 3):
        assert difference(small(x), model(x)) <= 1e-11
        assert float(dict(small.named_buffers())["calls"]) == calls


class Branching(nn.Module):
    """Chooses its way by a number computed from the input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x - 1


def test_data_dependent_branch() -> None:
    """The error names the line of the model and a way out."""
    with pytest.raises(CaptureError) as caught:
        regional(Branching())(torch.ones(1, 3, 37, 41))
    text = str(caught.value)
    assert "test_bad_input.py" in text
    assert "if x.sum() > 0" in text or any(part.isdigit() for part in text.replace(":", " ").split())


def test_cumulative_batch_norm() -> None:
    """A batch norm without momentum divides by a counter's value: data-dependent for torch.export."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None)).double().train()
    (x,) = random_inputs(((1, 3, 37, 41),))
    y = or_refused(regional(copy.deepcopy(model)), x, "momentum|batchnorm|batch_norm")
    assert y is None or difference(y, model(x)) <= 1e-11


class ReturnsOdd(nn.Module):
    """Outputs that are no tensors beside one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.conv(x)
        return {"y": y, "none": None, "size": y.shape[-1], "again": y, "text": "fine"}


def test_outputs_that_are_no_tensors() -> None:
    """None, numbers and text pass; a value returned twice is the same value."""
    torch.manual_seed(0)
    model = ReturnsOdd().double()
    (x,) = random_inputs(((1, 3, 37, 41),))
    given, wanted = regional(copy.deepcopy(model))(x), model(x)
    assert list(given) == list(wanted)
    assert {k: given[k] for k in ("none", "size", "text")} == {"none": None, "size": 41, "text": "fine"}
    assert difference(given["y"], wanted["y"]) <= 1e-11
    assert torch.equal(given["again"], given["y"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.zeros((1, 3, 8, 8), np.float32), "NumPy ndarray"),
        ("a", "got str 'a'"),
        (None, "got NoneType"),
        ({"x": 1}, "got dict"),
        ((1, 3, 5.5, 8), "5.5"),
        ((1, 3, -5, 8), "sizes are 0 or more"),
        (nn.utils.rnn.pack_sequence([torch.zeros(4, 3)]), "PackedSequence"),
        (torch.nested.nested_tensor([torch.zeros(3, 8)]), "nested"),
        (torch.zeros(1, 3, 8, 8).to_sparse(), "layout"),
        ((torch.zeros(1, 3, 8, 8),) * 2, r"SmallUNet was called with 2 inputs: too many .* forward\(x"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_plan_of_what_is_no_input(given: Any, said: str) -> None:
    """One line that says what a plan is made for."""
    with pytest.raises(InputError, match=said) as caught:
        ranger_nn.plan(unet(torch.float32), given)
    assert "\n" not in str(caught.value)


def test_arguments_that_forward_does_not_have() -> None:
    """The error names the model and its signature."""
    small, x = ranger_nn.regionalize(nn.Bilinear(3, 3, 2)), torch.zeros(5, 3)
    for call in (lambda: small(x), lambda: small(x, x, x), lambda: small(x, x, mask=x)):
        with pytest.raises(InputError, match=r"Bilinear was called with .*forward\(input1") as caught:
            call()
        assert "inspect.py" not in str(caught.value)


class Cuts(nn.Module):
    """A size that depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        return x[: int(x.max().item())]


@pytest.mark.parametrize("model", [Branching(), Cuts()], ids=["branch", "size"])
def test_nothing_is_printed_beside_the_error(model: nn.Module, capfd: Any, caplog: Any) -> None:
    """No half-traced graph, no hints of `torch.export`."""
    with pytest.raises(CaptureError):
        ranger_nn.plan(model, (1, 3, 8, 8))
    assert "".join(capfd.readouterr()) == ""
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]


def test_compilers_that_read_source() -> None:
    """TorchScript and torch.fx are told to take the untouched module; the caller's model stays as it is."""
    small = ranger_nn.regionalize(nn.Sequential(nn.Conv2d(3, 3, 3)).eval())
    outer = nn.Sequential(small, nn.ReLU())
    for compiled in (torch.jit.script, torch.fx.symbolic_trace):
        with pytest.raises(InputError, match=r"regional\.module"):
            compiled(small)
    with pytest.raises(InputError, match=r"TorchScript|untouched module"):
        torch.jit.script(outer)
    assert outer[0] is small
    torch.jit.trace(outer, torch.zeros(1, 3, 8, 8))
