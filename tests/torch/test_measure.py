"""The byte counter gives the same exact number each time, whatever ran before."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from ranger_nn.errors import MeasureError, RangerError
from ranger_nn.torch.measure import measure

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_nothing_is_nothing():
    with measure("cpu") as used:
        pass
    assert (used.peak, used.current, used.blocks) == (0, 0, 0)


def test_two_blocks_at_one_time():
    with measure("cpu") as used:
        first = torch.empty(1000)
        second = torch.empty(500)
    assert used.peak == used.current == first.nbytes + second.nbytes == 6000
    assert used.blocks == 2


def test_a_block_freed_in_between_is_not_counted_twice():
    with measure("cpu") as used:
        first = torch.empty(1000)
        del first
        second = torch.empty(500)
    assert used.peak == 4000
    assert used.current == second.nbytes == 2000


def test_what_was_live_at_entry_does_not_count():
    before = torch.empty(10_000)
    with measure("cpu") as used:
        inside = torch.empty(100)
        del before
        again = torch.empty(100)
    assert used.peak == used.current == inside.nbytes + again.nbytes


def test_blocks_of_an_earlier_measurement_do_not_count():
    with measure("cpu"):
        left_over = torch.empty(10_000)
    with measure("cpu") as used:
        inside = torch.empty(100)
        del left_over
    assert used.peak == used.current == inside.nbytes


def test_results_and_temporaries_of_a_forward():
    x = torch.randn(1000)
    with torch.no_grad(), measure("cpu") as used:
        y = x.relu().neg()
    assert used.current == y.nbytes == 4000
    assert used.peak == 8000


def test_temporaries_inside_a_kernel_are_seen():
    conv = nn.Conv2d(3, 8, 3, padding=1, dtype=torch.float64)
    x = torch.randn(1, 3, 40, 56, dtype=torch.float64)
    peaks = []
    for _ in range(3):
        with torch.no_grad(), measure("cpu") as used:
            y = conv(x)
        assert used.current == y.nbytes
        peaks.append(used.peak)
        del y
    assert len(set(peaks)) == 1
    # In float64 PyTorch unfolds the input into columns: a block that no Python code ever holds.
    assert peaks[0] > 8 * 8 * 40 * 56


def test_backward_is_seen():
    x = torch.randn(1000, requires_grad=True)
    upstream = torch.randn(1000)
    with measure("cpu") as used:
        y = x.exp()
        y.backward(upstream)
    assert x.grad is not None
    assert used.current == y.nbytes + x.grad.nbytes == 8000
    assert used.peak == 8000


def test_backward_of_a_network_is_the_same_every_time():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    x = torch.randn(2, 3, 21, 17)
    model(x).sum().backward()
    peaks = set()
    for _ in range(3):
        model.zero_grad()
        with measure("cpu") as used:
            model(x).sum().backward()
        peaks.add(used.peak)
        assert used.current == sum(p.grad.nbytes for p in model.parameters())
    assert len(peaks) == 1


def test_order_holds_over_many_blocks():
    with measure("cpu") as used:
        for _ in range(5000):
            block = torch.empty(250)
            del block
    assert (used.peak, used.current, used.blocks) == (1000, 0, 5000)


def test_flush_keeps_the_total():
    kept = []
    with measure("cpu") as used:
        for step in range(1, 6):
            kept.append(torch.empty(250))
            used.flush()
            assert used.current == used.peak == 1000 * step
        kept.clear()
        used.flush()
        assert (used.current, used.peak) == (0, 5000)
        kept.append(torch.empty(1))
    assert (used.current, used.peak, used.blocks) == (4, 5000, 6)


def test_flush_inside_backward_changes_nothing():
    with measure("cpu") as used:
        x = torch.zeros(100, requires_grad=True)
        y = x * 1.0
        y.register_hook(lambda gradient: used.flush())
        y.sum().backward()
        kept = torch.empty(1000)
    assert used.current == 3 * 400 + kept.nbytes


def test_nested_use_is_refused_and_the_outer_goes_on():
    with measure("cpu") as outer:
        with pytest.raises(MeasureError, match="already running"), measure("cpu"):
            pass
        kept = torch.empty(100)
    assert outer.peak == kept.nbytes
    assert issubclass(MeasureError, RangerError)


def test_under_a_profiler_is_refused():
    with torch.autograd.profiler.profile():
        with pytest.raises(MeasureError, match="profiler"), measure("cpu"):
            pass
    with measure("cpu") as used:
        kept = torch.empty(100)
    assert used.peak == kept.nbytes


def test_on_another_thread_at_the_same_time_is_refused():
    caught: list[BaseException] = []

    def inner() -> None:
        try:
            with measure("cpu"):
                pass
        except MeasureError as error:
            caught.append(error)

    with measure("cpu"):
        thread = threading.Thread(target=inner)
        thread.start()
        thread.join()
    assert len(caught) == 1


def test_an_error_inside_ends_the_measurement():
    def fail() -> None:
        with measure("cpu") as used:
            seen.append(used)
            torch.empty(100)
            raise KeyError("inside")

    seen: list = []
    with pytest.raises(KeyError, match="inside"):
        fail()
    assert seen[0].peak == 400
    with measure("cpu") as used:
        pass
    assert used.peak == 0


def test_unknown_device():
    with pytest.raises(MeasureError, match="'tpu'"), measure("tpu"):
        pass


def test_the_environment_is_left_as_found():
    before = dict(os.environ)
    with measure():
        torch.empty(3)
    assert dict(os.environ) == before


def test_the_profiler_writes_nothing_to_standard_error():
    program = "from ranger_nn.torch.measure import measure, torch\nwith measure(): torch.empty(3)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@needs_cuda
def test_cuda_counts_above_what_was_live():
    before = torch.empty(1 << 20, device="cuda")
    with measure() as used:
        first = torch.empty(1 << 20, device="cuda")
        del first
        second = torch.empty(1 << 19, device="cuda")
    assert used.peak == used.by_device["cuda:0"] == before.nbytes
    assert used.current == second.nbytes


def test_leave_out() -> None:
    """A result that the caller keeps is not counted; what was made on the way is."""
    with measure("cpu") as used:
        x = torch.ones(1 << 20)
        y = x + 1
        del x
        used.leave_out(y)
    assert 4 << 20 <= used.peak < (4 << 20) + 1024
    assert used.current < 1024
