"""`ranger-nn run` on a file: read, compute and write region by region; go on after a crash.

Used where the one INPUT is a file and FILE is no PNG; everything else goes through memory (`cli/run.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ranger_nn
from ranger_nn.cli.keras_model import is_keras, load_keras
from ranger_nn.cli.loading import load_model, threads
from ranger_nn.cli.progress import clock, show_progress
from ranger_nn.cli.streams import say
from ranger_nn.doors import prepare
from ranger_nn.errors import InputError
from ranger_nn.io.pixels import Pixels
from ranger_nn.io.sinks import KNOWN, check_sink
from ranger_nn.io.sources import HDF5
from ranger_nn.io.workplace import working_folder
from ranger_nn.planning.budget import format_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What only files have."""
    group = parser.add_argument_group("input and output in files")
    group.add_argument("--reduce", metavar="HOW", help="before writing: argmax, threshold:0.5 or uint8")
    group.add_argument(
        "--scale", type=float, help="factor for pixels (default: 1 / largest value of unsigned integers)"
    )
    group.add_argument("--mean", type=_numbers, metavar="A,B,..", help="subtracted after scaling")
    group.add_argument("--std", type=_numbers, metavar="A,B,..", help="divided by after that")
    group.add_argument("--bands", type=_indices, metavar="I,J,..", help="bands to take, counted from 0, in this order")
    group.add_argument("--nodata", type=float, metavar="VALUE", help="pixels of this value in all bands become 0")
    group.add_argument(
        "--nodata-result",
        type=float,
        metavar="VALUE",
        help="what the result holds there (default: what the model gives)",
    )
    group.add_argument("--axes", metavar="YXC", help="axes of an array: one letter each of N C Z Y X")
    group.add_argument("--level", type=int, default=0, help="level of a pyramid (default: 0, the largest)")
    group.add_argument(
        "--statistics", type=_names, metavar="A,B,..", help="of histogram, mean, max, min, mean_probability"
    )
    group.add_argument(
        "--skip-bad", action="store_true", help="fill regions that cannot be read with zeros, and list them"
    )
    group.add_argument("--overwrite", action="store_true", help="replace a result, or an unfinished one, that is there")
    group.add_argument(
        "--dry-run", action="store_true", help="the plan, its bytes and the time expected; nothing is run"
    )


def streams(chosen: argparse.Namespace) -> bool:
    """Whether INPUT and FILE are read and written region by region."""
    if len(chosen.inputs) != 1 or Path(chosen.output).suffix.lower() not in KNOWN:
        return False
    text = chosen.inputs[0]
    return os.path.exists(text) or Path(text.rpartition(":")[0]).suffix.lower() in HDF5


def refuse_options(chosen: argparse.Namespace) -> None:
    """Options of files where none is read.

    Raises:
        InputError: one was given.
    """
    names = (
        "reduce",
        "scale",
        "mean",
        "std",
        "bands",
        "nodata",
        "nodata_result",
        "axes",
        "statistics",
        "skip_bad",
        "overwrite",
        "dry_run",
    )
    given = [n for n in names if getattr(chosen, n) not in (None, False)]
    if given:
        option = "--" + given[0].replace("_", "-")
        raise InputError(
            f"{option} needs one input that is a file, and an output that ends in one of {', '.join(KNOWN)}; got "
            f"{' '.join(chosen.inputs)} and {chosen.output}"
        )


def run(chosen: argparse.Namespace) -> None:
    """Plan, then run with progress and report; with --dry-run only the plan."""
    check_sink(chosen.output, chosen.overwrite)
    of_keras = is_keras(chosen)
    with nullcontext() if of_keras else threads(chosen):
        model: Any = load_keras(chosen) if of_keras else load_model(chosen)
        prepared = prepare(
            model, chosen.inputs[0], chosen.memory, pixels=_pixels(chosen), axes=chosen.axes, level=chosen.level,
            regions=chosen.regions, schedule=chosen.schedule, skip_bad=chosen.skip_bad, device=chosen.device,
        )  # fmt: skip
        if chosen.dry_run:
            print(_dry(prepared, chosen))
            return
        try:
            with show_progress(chosen.quiet, size=prepared.source_bytes) as progress:
                report = ranger_nn.run(
                    model, chosen.inputs[0], chosen.output, reduce=chosen.reduce, statistics=chosen.statistics,
                    overwrite=chosen.overwrite, on_region=progress.step, prepared=prepared,
                )  # fmt: skip
        except (KeyboardInterrupt, SystemExit):
            _say_how_to_go_on(chosen)
            raise
    found = dataclasses.asdict(report)
    print(json.dumps(found) if chosen.json else _as_text(found))


def _pixels(chosen: argparse.Namespace) -> Pixels | None:
    given = {
        n: getattr(chosen, n) for n in ("scale", "mean", "std", "bands", "nodata") if getattr(chosen, n) is not None
    }
    if chosen.nodata_result is not None:
        given["result"] = chosen.nodata_result
    return Pixels(**given) if given else None


def _dry(prepared: Any, chosen: argparse.Namespace) -> str:
    expected = prepared.expected_seconds()
    if not chosen.json:
        return f"{prepared}\nexpected to take about {clock(expected)}"
    amounts = {"allowed": prepared.allowed, "projected": prepared.projected, "expected_seconds": round(expected, 1)}
    return json.dumps(amounts | {"plan": json.loads(prepared.plan.to_json())})


def _say_how_to_go_on(chosen: argparse.Namespace) -> None:
    folder = working_folder(Path(chosen.output))
    if folder.is_dir():
        say(f"ranger-nn: what is done is kept in {os.fspath(folder)!r}: give the same command again to go on")


def _as_text(found: dict[str, Any]) -> str:
    lines = [f"wrote      {', '.join(found['files'])} in {clock(found['seconds'])}"]
    if found["resumed_at"]:
        lines.append(f"went on    after region {found['resumed_at']} of {found['regions']}")
    for name in ("allowed", "projected"):
        amount = found[name]
        lines.append(f"{name:<10} {'-' if amount is None else format_bytes(amount)}")
    lines.append(f"read       {format_bytes(found['bytes_read'])}, written {format_bytes(found['bytes_written'])}")
    if found["bad"]:
        lines.append(f"unreadable {len(found['bad'])} regions, taken as zeros: {list(found['bad'])[:5]}")
    lines += [f"note       {note}" for note in found["notes"]]
    for part in ("statistics", "values"):
        lines += [f"{k:<10} {json.dumps(v)}" for k, v in found[part].items() if v]
    return "\n".join(lines)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"numbers with commas between, such as 0.5,0.5,0.5; got {text!r}") from error


def _indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"bands from 0 on with commas between, such as 2,1,0; got {text!r}") from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
