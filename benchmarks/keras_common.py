"""What the Keras benchmarks share: each side runs in a process of its own, so that peaks of memory are its own.

Peak: on JAX the temporary bytes that XLA's own analysis of the compiled program gives (Variables, input and output left
out); on TensorFlow and PyTorch the peak of resident memory during the call, over that before it.
First call: tracing, compiling and running. Time: median of interleaved calls, both sides in one more process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BACKENDS = ("tensorflow", "jax", "torch")
MARK = "RESULT "


@dataclass(frozen=True)
class Limits:
    """What the ratios should reach."""

    memory: float
    first: float | None = None
    steady: float | None = None
    apart: float = 1e-5


def resident(field: str) -> int:
    """Bytes of resident memory now (VmRSS) or at its peak (VmHWM)."""
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def reset_peak() -> None:
    """Forget the peak so far."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def options(arguments: list[str] | None, size: int) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Untouched Keras model against regional, in processes of their own.")
    parser.add_argument("--backend", default="jax", choices=BACKENDS)
    parser.add_argument("--size", type=int, default=size, help="side of the image")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", help="what is allowed, such as 100MB (default: the target's share of the estimate)")
    parser.add_argument("--side", choices=("untouched", "regional", "both"), help="run one process's part")
    return parser.parse_args(arguments)


def child(module: str, chosen: argparse.Namespace, side: str) -> dict[str, Any]:
    """Run one process's part and read what it found."""
    command = [sys.executable, "-m", module, "--backend", chosen.backend, "--size", str(chosen.size), "--side", side]
    command += ["--repeats", str(chosen.repeats)] + (["--memory", chosen.memory] if chosen.memory else [])
    environment = {**os.environ, "KERAS_BACKEND": chosen.backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return dict(json.loads(line[len(MARK) :]))
    raise RuntimeError(f"{' '.join(command)} gave no result:\n{done.stderr[-2000:]}")


def give(**found: Any) -> None:
    """What a process found, for `child`."""
    print(MARK + json.dumps(found), flush=True)


def held(*arrays: Any) -> tuple[Any, ...]:
    """Arguments for `predict` and `fit` that exist before the measurement, as the image does in all benchmarks: on TensorFlow a
    data set of one batch, since of arrays Keras makes two more copies (on both sides).
    """
    if os.environ["KERAS_BACKEND"] != "tensorflow":
        return arrays
    import tensorflow as tf

    return (tf.data.Dataset.from_tensors(arrays if len(arrays) > 1 else arrays[0]),)


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measured(warm: Callable[[], Any], work: Callable[[], Any]) -> int:
    """Peak of resident memory during a call over that before it, after a call of the same model on a small input, which
    takes what a process needs once: threads, kernels, the compiler. (A second call would show less than the truth, since
    TensorFlow keeps what it freed.)
    """
    warm()
    gc.collect()
    before = resident("VmRSS")
    reset_peak()
    work()
    return resident("VmHWM") - before


def interleaved(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, in turns, after the first call of each ("first NAME")."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    found = {f"first {name}": timed(work) for name, work in works.items()}
    for _ in range(repeats):
        for name, work in works.items():
            taken[name].append(timed(work))
    return found | {name: statistics.median(seconds) for name, seconds in taken.items()}


def judged(value: float, target: float | None, form: str = "{:.3f}") -> str:
    """A figure beside its target, marked where it misses it."""
    if target is None:
        return form.format(value)
    return f"{form.format(value)} (<= {form.format(target)}){'' if value <= target else ' MISSED'}"


def table(work: str, chosen: argparse.Namespace, plain: Any, ours: Any, both: Any, limits: Limits) -> None:
    """The printed row."""
    print(
        "| work | back end | peak untouched | peak ours | ratio (target) | first call ratio | time untouched | time ratio to Keras as it comes | max diff |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    cells = (
        f"{work}, {chosen.size} x {chosen.size}",
        chosen.backend,
        f"{plain['peak'] / 1e6:.0f} MB",
        f"{ours['peak'] / 1e6:.0f} MB",
        judged(ours["peak"] / plain["peak"], limits.memory),
        judged(both["first regional"] / both["first untouched"], limits.first, "{:.2f}"),
        f"{both['untouched']:.2f} s",
        judged(both["regional"] / both["untouched"], limits.steady, "{:.2f}"),
        judged(both["apart"], limits.apart, "{:.1e}"),
    )
    print("| " + " | ".join(cells) + " |")
    print(ours.get("plan", ""))
