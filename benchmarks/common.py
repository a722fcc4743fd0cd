"""What all benchmarks share: options, peak, time, largest difference, and the printed row.

Peak: bytes by `ranger_nn.measure` over those live before the call, the final output left out, for both
sides alike. The input and the parameters exist before and do not count; gradients that a backward
leaves behind (of parameters and of the input) count on both sides.
Time: median of interleaved runs (untouched, ours, untouched, ...) after one run of each that makes
the plan; never measured together with the peak. The plan's own time is printed apart.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ranger_nn

THREADS = 2
Work = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Options:
    """How large, how often, where. `size` None is each benchmark's own full size."""

    size: int | None = None
    repeats: int = 3
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def side(self, full: int) -> int:
        """The side of the image: as asked for, or the benchmark's own."""
        return full if self.size is None else self.size

    def place(self, model: nn.Module) -> nn.Module:
        """The model where and in what precision the options say."""
        return model.to(self.device, self.dtype)

    def draw(self, *shape: int, seed: int = 0) -> Tensor:
        """A seeded normal input."""
        source = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=source).to(self.device, self.dtype)


def options(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line that all benchmarks share, and set the number of threads."""
    parser = argparse.ArgumentParser(description="Untouched against regional, in the same process.")
    parser.add_argument("--size", type=int, help="side of the image (default: the size of the table)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--threads", type=int, default=THREADS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    return Options(given.size, given.repeats, given.device, getattr(torch, given.dtype))


def given(described: str | None, repeats: int, **more: int) -> argparse.Namespace:
    """The command line of a benchmark with a Keras part; threads, seed and back end are set. `more`: other numbers."""
    parser = argparse.ArgumentParser(description=described, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keras", action="store_true")
    for name, number in {"repeats": repeats, "threads": THREADS, **more}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    torch.manual_seed(0)
    if found.keras:
        os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    return found


# ---------------------------------------------------------------------------- what is measured


def peak(work: Work, model: nn.Module, device: str = "cpu") -> int:
    """Most bytes live at one time while `work` runs on `model`, its output left out."""
    model.zero_grad(set_to_none=True)  # or the last run's gradients would be freed while we count
    gc.collect()
    with ranger_nn.measure(torch.device(device).type) as used:
        output = work()
        used.leave_out(*output)
    return used.peak


def interleaved(works: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds of each piece of work; they take turns, so that drift hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            settle(device)
            start = time.perf_counter()
            work()
            settle(device)
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def seconds(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, in turns, after one of each."""
    for work in works.values():
        work()
    return interleaved(works, repeats)


def settle(device: str) -> None:
    """Wait for the accelerator, if there is one."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def difference(ours: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Largest difference of any pair, relative to the largest magnitude of its reference."""
    return max(
        ((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny)).item()
        for a, b in zip(ours, reference, strict=True)
    )


def inference(model: nn.Module, x: Tensor) -> Work:
    """One forward without gradients."""

    def work() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (tensor_of(model(x)),)

    return work


def training(model: nn.Module, x: Tensor) -> Work:
    """One forward and one backward; gradients of parameters start from None, as in training loops.

    The output's gradient is made beforehand, so that no loss adds to the peak of either side.
    """
    with torch.no_grad():
        weights = torch.ones_like(tensor_of(model(x)))
    weights /= weights.numel()

    def work() -> tuple[Tensor, ...]:
        model.zero_grad(set_to_none=True)
        y = tensor_of(model(x))
        y.backward(weights)
        return (y.detach(),)

    return work


def gradients(model: nn.Module) -> tuple[Tensor, ...]:
    """The gradients that the last backward left, copied."""
    return tuple(p.grad.clone() for p in model.parameters() if p.grad is not None)


def tensor_of(output: object) -> Tensor:
    """The output of a network whose class may wrap it."""
    found = getattr(output, "logits", getattr(output, "sample", output))
    assert isinstance(found, Tensor)
    return found


# ---------------------------------------------------------------------------- the printed row


@dataclass(frozen=True)
class Case:
    """A piece of work and what it should reach.

    `share` of the untouched peak is what the plan is allowed; the peak's target is the same number
    unless `peak_target` states it.
    """

    work: str
    model: nn.Module
    x: Tensor
    share: float
    train: bool = False
    schedule: str | None = None
    time_target: float | None = None
    macs_target: float | None = None

    def start(self, model: nn.Module) -> Work:
        """The work of this case on a model: inference or training."""
        return (training if self.train else inference)(model, self.x)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    work: str
    untouched: int
    ours: int
    share: float
    extra_macs: float
    macs_target: float | None
    seconds: tuple[float, float]
    time_target: float | None
    apart: float
    allowed: int
    projected: int
    planning: float

    @property
    def measured(self) -> int:
        return self.ours

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        untouched, ours = self.seconds
        return (
            self.work,
            megabytes(self.untouched),
            megabytes(self.ours),
            judged(self.ours / self.untouched, self.share, "{:.3f}"),
            judged(self.extra_macs, self.macs_target, "{:.1%}"),
            f"{untouched:.2f} s",
            judged(ours / untouched, self.time_target, "{:.2f}"),
            f"{self.apart:.1e}",
            " / ".join(megabytes(n) for n in (self.allowed, self.projected, self.measured)),
            f"{self.planning:.1f} s",
        )


HEADER = (
    "work", "peak untouched", "peak ours", "ratio (target)", "extra macs", "time untouched",
    "time ratio to PyTorch as it comes (target)", "max diff", "allowed / projected / measured MB", "capture and plan",
)  # fmt: skip


def megabytes(count: int) -> str:
    """Bytes in MB (10**6), for a column."""
    return f"{count / 1e6:.1f}"


def judged(value: float, target: float | None, form: str) -> str:
    """A figure beside its target, marked where it misses it."""
    if target is None:
        return form.format(value)
    mark = "" if value <= target else " MISSED"
    return f"{form.format(value)} (<= {form.format(target)}){mark}"


def line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def show(rows: Sequence[Row]) -> None:
    """Print rows as a Markdown table."""
    print(line(HEADER))
    print(line(["---"] * len(HEADER)))
    for row in rows:
        print(line(row.cells()), flush=True)


def compare(case: Case, chosen: Options) -> Row:
    """Run both sides of a case and give its row.

    The untouched side goes first: its peak times `case.share` is the budget of the regional side.
    """
    plain = case.start(case.model)
    reference = plain()
    expected = gradients(case.model) if case.train else ()
    untouched = peak(plain, case.model, chosen.device)
    allowed = int(case.share * untouched)

    small = ranger_nn.regionalize(case.model, memory=allowed, schedule=case.schedule)
    start = time.perf_counter()
    # With gradients on or off, as in the run, since each mode has a plan of its own.
    with torch.set_grad_enabled(case.train):
        plan = small.plan_for(case.x)
    planning = time.perf_counter() - start
    regional = case.start(small)
    given = regional()
    found = gradients(case.model) if case.train else ()
    apart = difference((*given, *found), (*reference, *expected))
    del reference, expected, given, found
    ours = peak(regional, small, chosen.device)
    seconds = interleaved({"untouched": plain, "ours": regional}, chosen.repeats, chosen.device)
    return Row(
        work=case.work,
        untouched=untouched,
        ours=ours,
        share=case.share,
        extra_macs=plan.extra_macs,
        macs_target=case.macs_target,
        seconds=(seconds["untouched"], seconds["ours"]),
        time_target=case.time_target,
        apart=apart,
        allowed=plan.allowed,
        projected=plan.projected,
        planning=planning,
    )


def main(*makers: Callable[[Options], list[Case]]) -> None:
    """The command of one benchmark: compare its cases and print them."""
    chosen = options()
    show([compare(case, chosen) for make in makers for case in make(chosen)])
