"""`ranger-nn run`: apply a model to an image region by region, and write what it gives.

The report at the end has the three amounts of the promise: allowed by the user, projected by the
plan, measured by the byte counter (over what was live before, less the final output). Counting costs
about 6 microseconds per block of memory; `--no-measure` leaves it out. From file to file see `cli/stream.py`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ranger_nn
from ranger_nn.cli import stream
from ranger_nn.cli.arguments import new_parser
from ranger_nn.cli.loading import import_torch, load_inputs, load_model, threads
from ranger_nn.cli.progress import Progress, clock, show_progress
from ranger_nn.errors import InputError
from ranger_nn.execute.allocator import keep_freed_blocks
from ranger_nn.io.image import check_writable, write_image
from ranger_nn.io.naming import labels, numbered
from ranger_nn.planning.budget import format_bytes

if TYPE_CHECKING:
    from torch import Tensor

SECONDS_BETWEEN_FLUSHES = 2.0


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "run",
        "apply a model to an input and write its output",
        "Several outputs are written to files with a number each, or a key of the dictionary. The output appears whole or not at all. An input in a file "
        "is read, and the output written, region by region; after a crash the same command goes on where it stopped.",
        run,
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="a name that ends in .zarr, .tif, .npy or .png"
    )
    parser.add_argument("--no-measure", action="store_true", help="do not count bytes while running")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    stream.add_arguments(parser)


def run(chosen: argparse.Namespace) -> None:
    """Load, plan, run with progress, write, report."""
    keep_freed_blocks()
    if stream.streams(chosen):
        stream.run(chosen)
        return
    stream.refuse_options(chosen)
    check_writable(chosen.output)
    torch = import_torch()
    with threads(chosen), torch.no_grad():
        model = load_model(chosen)
        inputs = load_inputs(chosen, model)
        small = ranger_nn.regionalize(model, memory=chosen.memory, regions=chosen.regions, schedule=chosen.schedule)
        plan = small.plan_for(*inputs)
        start = time.monotonic()
        with show_progress(chosen.quiet) as progress:
            outputs, measured = _run_measured(small, inputs, progress, chosen)
        seconds = time.monotonic() - start
    files = _write(chosen.output, outputs)
    report = {
        "allowed": plan.allowed,
        "projected": plan.projected,
        "measured": measured,
        "seconds": round(seconds, 3),
        "files": [str(file) for file in files],
    }
    print(json.dumps(report) if chosen.json else _as_text(report))


def _run_measured(
    small: Any, inputs: tuple[Tensor, ...], progress: Progress, chosen: argparse.Namespace
) -> tuple[dict[str, Tensor], int | None]:
    """The model's outputs by name, and the bytes of its peak less those outputs (None if not counted)."""
    if chosen.no_measure:
        with _told(small, progress.step):
            return _named(small(*inputs)), None
    with ranger_nn.measure(chosen.device.partition(":")[0]) as used:
        with _told(small, _also_flush(progress.step, used.flush)):
            outputs = _named(small(*inputs))
    return outputs, used.peak - sum(output.nbytes for output in outputs.values())


def _named(outputs: Any) -> dict[str, Tensor]:
    """All tensors of a model's outputs in their order, by the part of a file's name that each gets."""
    torch, pytree = import_torch(), importlib.import_module("torch.utils._pytree")
    found = [(path, leaf) for path, leaf in pytree.tree_flatten_with_path(outputs)[0] if isinstance(leaf, torch.Tensor)]
    keys = [[getattr(k, "key", getattr(k, "idx", getattr(k, "name", str(k)))) for k in path] for path, _ in found]
    return dict(zip(labels(keys), (leaf for _, leaf in found), strict=True))


@contextmanager
def _told(small: Any, step: Callable[[int, int], None]) -> Iterator[None]:
    small.on_region = step
    try:
        yield
    finally:
        small.on_region = None


def _also_flush(step: Callable[[int, int], None], flush: Callable[[], None]) -> Callable[[int, int], None]:
    """Tell the progress, and now and then let the byte counter free what it holds."""
    last = time.monotonic()

    def told(done: int, total: int) -> None:
        nonlocal last
        step(done, total)
        if time.monotonic() - last > SECONDS_BETWEEN_FLUSHES:
            flush()
            last = time.monotonic()

    return told


def _write(path: str, outputs: dict[str, Tensor]) -> list[Path]:
    """Write each output to its file; what the format cannot hold is saved as .npy, and still an error."""
    if not outputs:
        raise InputError("the model gave no tensor, so there is nothing to write.")
    final = Path(path)
    names = [final]
    if len(outputs) > 1:
        names = [numbered(final, part) for part in outputs]
    for name, output in zip(names, outputs.values()):
        _write_one(name, output)
    return names


def _write_one(name: Path, output: Tensor) -> None:
    array = (output.float() if output.dtype.itemsize == 2 and output.is_floating_point() else output).cpu().numpy()
    try:
        write_image(name, array)
    except InputError as error:
        if name.suffix.lower() == ".npy":
            raise
        rescue = name.with_suffix(".npy")
        write_image(rescue, array)
        raise InputError(f"{error} Nothing is lost: the output is in {str(rescue)!r}.") from error


def _as_text(report: dict[str, Any]) -> str:
    lines = [f"wrote      {', '.join(report['files'])} in {clock(report['seconds'])}"]
    for name in ("allowed", "projected", "measured"):
        amount = report[name]
        lines.append(f"{name:<10} {'-' if amount is None else format_bytes(amount)}")
    return "\n".join(lines)
