"""`measure()`: a deterministic counter of the bytes that PyTorch's allocators hand out.

Why not the resident set: it depends on the C library, on fragmentation and on what ran before, and
differs from run to run. Here every block that PyTorch's CPU allocator gives or takes back is an
event, kernels' own temporaries included, and the peak of the running total is the same number each
time. What a library takes with its own malloc (the scratch pads of oneDNN and MKL) is not seen.

How, on the CPU: PyTorch's profiler reports each block to the thread that profiles. It is switched
on for blocks only: the record scope asked for below never occurs in eager code, so operators cost
nothing. A block costs about 6 microseconds and 2 kB until `flush()` or the end of the measurement
(whence `flush()`, for runs of millions of blocks). Blocks are matched by address, so that only what
was allocated inside the measurement is ever subtracted.

On CUDA: the caching allocator keeps its own peak (`torch.cuda.max_memory_allocated`), which is
reset at entry.

What is counted: blocks of the thread that measures, and of the autograd threads that serve its
backward pass. Blocks that were live at entry count neither when entered nor when freed on the CPU;
on CUDA freeing them lowers the total.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _disable_profiler, _enable_profiler, _prepare_profiler, _profiler_enabled
from torch._C._profiler import (
    ProfilerActivity,
    ProfilerConfig,
    ProfilerState,
    RecordScope,
    _EventType,
    _ExperimentalConfig,
)

from ranger_nn.errors import MeasureError

# Two profilers at once, on whatever threads, are undefined behaviour in PyTorch.
_one_at_a_time = threading.Lock()
_BUSY = (
    "measure() cannot start: a measurement or a profiler is already running, and PyTorch runs one at a "
    "time in a process. Leave the other one first, or measure in a process of its own."
)


class Usage:
    """What a measurement found. Read it after the `with` block, or after `flush()` inside it.

    Attributes:
        peak: most bytes live at one time above those live at entry, on the fullest device.
        current: bytes allocated inside and still live.
        by_device: the peak of each device by name, such as {"cpu": 4096, "cuda:0": 8192}.
        blocks: how many blocks were allocated on the CPU.
    """

    def __init__(self, count_cpu: bool, count_cuda: bool) -> None:
        self._cpu = _CpuCounter() if count_cpu else None
        self._cuda = _CudaCounter() if count_cuda else None
        self.by_device: dict[str, int] = {}
        self.current = 0
        self.blocks = 0
        self._left_out: set[int] = set()

    @property
    def peak(self) -> int:
        return max(self.by_device.values(), default=0)

    def leave_out(self, *tensors: Tensor) -> None:
        """Do not count the memory of these tensors: a call's result, which the caller keeps whoever computes it.

        To be called inside the `with` block, and after the last `flush()` before which they were made. On CUDA
        nothing is left out.
        """
        self._left_out |= {t.untyped_storage().data_ptr() for t in tensors if t.device.type == "cpu"}

    def flush(self) -> None:
        """Bring the figures up to date, and free what the profiler holds.

        Inside a backward pass this does nothing: there the profiler cannot be restarted.
        """
        if torch._C._current_graph_task_id() != -1:
            return
        if self._cpu is not None:
            self._cpu.stop(self._left_out)
            self._cpu.start()
        self._read()

    def _enter(self) -> None:
        if self._cuda is not None:
            self._cuda.start()
        if self._cpu is not None:
            self._cpu.start()

    def _exit(self) -> None:
        if self._cpu is not None:
            self._cpu.stop(self._left_out)
        self._read()

    def _read(self) -> None:
        self.current = 0
        if self._cpu is not None:
            self.by_device["cpu"] = self._cpu.peak
            self.blocks = self._cpu.blocks
            self.current += self._cpu.current
        if self._cuda is not None:
            self.by_device.update(self._cuda.peaks())
            self.current += self._cuda.current()

    def __repr__(self) -> str:
        return f"Usage(peak={self.peak}, current={self.current}, by_device={self.by_device})"


@contextmanager
def measure(device: str | None = None) -> Iterator[Usage]:
    """Count the bytes allocated inside the `with` block.

    Args:
        device: "cpu" or "cuda" to count there only (counting CUDA alone costs no time); by default
            the CPU, and every CUDA device if CUDA is in use.

    Raises:
        MeasureError: another measurement or profiler is running, or `device` is
            neither of the two.
    """
    if device not in (None, "cpu", "cuda"):
        raise MeasureError(f'measure(device=...) takes None, "cpu" or "cuda"; got {device!r}.')
    used = Usage(count_cpu=device != "cuda", count_cuda=device != "cpu" and torch.cuda.is_available())
    used._enter()
    try:
        yield used
    finally:
        used._exit()


class _CpuCounter:
    """Running total of the CPU allocator's blocks, from the profiler's allocation events."""

    def __init__(self) -> None:
        self.current = 0
        self.peak = 0
        self.blocks = 0
        self._sizes: dict[int, int] = {}

    def start(self) -> None:
        if not _one_at_a_time.acquire(blocking=False):
            raise MeasureError(_BUSY)
        if _profiler_enabled():
            _one_at_a_time.release()
            raise MeasureError(_BUSY)
        config = ProfilerConfig(ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig())
        with _quiet_kineto():
            _prepare_profiler(config, {ProfilerActivity.CPU})
            # The stub of PyTorch leaves the scopes out.
            _enable_profiler(config, {ProfilerActivity.CPU}, {RecordScope.STATIC_RUNTIME_MODEL})  # type: ignore[call-arg]

    def stop(self, left_out: Collection[int] = ()) -> None:
        try:
            self._count(_disable_profiler().experimental_event_tree(), left_out)
        finally:
            _one_at_a_time.release()

    def _count(self, events: Iterable[Any], left_out: Collection[int] = ()) -> None:
        """Add up the events in the order of time; the profiler sorts them, and keeps ties in order."""
        blocks = [e.extra_fields for e in events if e.tag == _EventType.Allocation]
        last = {b.ptr: k for k, b in enumerate(blocks) if b.ptr in left_out and b.alloc_size > 0}
        skipped = set(last.values())
        for k, block in enumerate(blocks):
            if block.device.type != "cpu" or k in skipped:
                continue
            # An address given out again was freed unseen, by a thread that is not measured.
            self.current -= self._sizes.pop(block.ptr, 0)
            if block.alloc_size <= 0:
                continue
            self._sizes[block.ptr] = block.alloc_size
            self.blocks += 1
            self.current += block.alloc_size
            self.peak = max(self.peak, self.current)


class _CudaCounter:
    """The caching allocator's own peak, per device, above what was allocated at entry."""

    def __init__(self) -> None:
        self._base: dict[int, int] = {}

    def start(self) -> None:
        if not torch.cuda.is_initialized():
            return  # nothing is allocated yet: the base is zero
        for index in range(torch.cuda.device_count()):
            self._base[index] = torch.cuda.memory_allocated(index)
            torch.cuda.reset_peak_memory_stats(index)

    def peaks(self) -> dict[str, int]:
        return {
            f"cuda:{index}": torch.cuda.max_memory_allocated(index) - self._base.get(index, 0)
            for index in self._devices()
        }

    def current(self) -> int:
        return sum(torch.cuda.memory_allocated(index) - self._base.get(index, 0) for index in self._devices())

    @staticmethod
    def _devices() -> range:
        return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)


@contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Keep the profiler's library from writing "profiler_start" to standard error.

    It reads this variable once, when first used; a value that the user has set is respected.
    """
    if "KINETO_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["KINETO_LOG_LEVEL"] = "6"
    try:
        yield
    finally:
        del os.environ["KINETO_LOG_LEVEL"]
