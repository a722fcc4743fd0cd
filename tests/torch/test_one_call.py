"""What one operator takes, counted by calling it once; and what is not called."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ranger_nn
from ranger_nn.torch import one_call
from ranger_nn.torch.one_call import Call

CONVOLUTION = torch.ops.aten.convolution.default


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known from other tests."""
    monkeypatch.setattr(one_call, "_COUNTED", {})


def convolution(channels: int = 8) -> Call:
    """One that unfolds: float64."""
    x, w = torch.randn(2, channels, 20, 24).double(), torch.randn(4, channels, 3, 3).double()
    return Call.of(CONVOLUTION, (x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1), {})


@pytest.mark.parametrize("channels", [3, 8])
def test_counted(channels: int) -> None:
    """Bytes of the columns of one sample, at the least, and nothing of what it reads and gives."""
    columns = channels * 9 * 20 * 24 * 8
    found = convolution(channels).counted()
    assert found is not None and columns <= found <= 2.1 * columns
    assert convolution(channels).nbytes == 8 * (2 * channels * 480 + 4 * channels * 9)


def test_nothing_beside() -> None:
    """A result is not counted, whether it is left out or subtracted."""
    call = Call.of(torch.ops.aten.relu.default, (torch.randn(30, 50),), {})
    assert call.counted() == call.counted(left_out=True) == 0


def test_a_peak_before_the_result_is_made() -> None:
    """Where results are left out it stands above nothing, where they are counted above them."""
    call = convolution()
    left_out, counted = call.counted(left_out=True), call.counted()
    assert left_out is not None and counted is not None and 0 < counted <= left_out


def test_random_numbers_are_left_alone() -> None:
    """And the operator's are its own."""
    before = torch.get_rng_state()
    assert Call.of(torch.ops.aten.native_dropout.default, (torch.ones(64), 0.5, True), {}).counted() is not None
    assert torch.equal(before, torch.get_rng_state())


def test_numbers_that_compare_equal_are_told_apart() -> None:
    """1, 1.0 and True."""
    calls = [Call.of(torch.ops.aten.mul.Tensor, (torch.ones(2), n), {}) for n in (1, 1.0, True)]
    assert len({c.key for c in calls}) == 3
    assert calls[0].key == Call.of(torch.ops.aten.mul.Tensor, (torch.zeros(2), 1), {}).key


def test_what_is_not_called() -> None:
    """Operators of others, what zeros do not answer, and anything while something is measured or watched."""
    with torch.library._scoped_library("ranger_test", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CPU")
        assert Call.of(torch.ops.ranger_test.twice.default, (torch.ones(2),), {}).counted() is None
    assert Call.of(torch.ops.aten.item.default, (torch.ones(2),), {}).counted() is None
    with ranger_nn.measure():
        assert convolution().counted() is None
    with torch.profiler.profile():
        assert convolution().counted() is None
    with FlopCounterMode(display=False):
        assert convolution().counted() is None
    assert convolution().counted() is not None
