"""Arguments that the commands share, and how each is read."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

from ranger_nn.errors import BudgetError
from ranger_nn.planning.budget import parse_memory

DTYPES = ("float32", "float64", "bfloat16", "float16")
_LONGEST_NUMBER = 18  # digits of what an int64 holds
# More crash the threads' own library; no machine has as many cores.
MOST_THREADS = 4096
# What PyTorch's generator takes.
_SEEDS = range(-(2**63), 2**64)
_LENGTHS = re.compile(r"[1-9][0-9]*(x[1-9][0-9]*)*", re.IGNORECASE)

Command = Callable[[argparse.Namespace], None]


def new_parser(commands: Any, name: str, summary: str, detail: str, command: Command) -> argparse.ArgumentParser:
    """A subparser with the arguments that every command takes."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {detail}"
    )
    parser.set_defaults(command=command)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a .pt2 archive of torch.export, from which no code is run, or package.module:factory, which is imported "
        "(from the working folder too) and called without arguments: your own Python runs, and gives a torch.nn.Module; for a run from file to file also a .keras file",
    )
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help="a PNG, JPEG, TIFF or .npy file, or a shape such as 1x3x4096x4096, whose values are drawn at "
        "random; several if the model takes several",
    )
    parser.add_argument(
        "--memory",
        type=memory,
        metavar="AMOUNT",
        help="bytes, or text such as 512MB or 2GiB (default: no limit)",
    )
    parser.add_argument("--regions", type=lengths, metavar="RxC", help="rows and columns of a region, such as 256x256")
    parser.add_argument("--schedule", choices=("tile", "slide"), help="override the planner's choice")
    parser.add_argument("--dtype", choices=DTYPES, help="cast model and inputs (default: the model's own)")
    parser.add_argument("--device", default="cpu", help="where to run, such as cpu or cuda:0 (default: cpu)")
    parser.add_argument("--threads", type=threads, metavar="N", help="threads of the CPU kernels")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of random weights and values (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--debug", action="store_true", help="on an error print where it came from")
    return parser


def add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", action="store_true", help="forward and backward, with the model in training mode")


def memory(text: str) -> int | None:
    """Bytes; what is not an amount is wrong usage, told in `parse_memory`'s words."""
    try:
        return parse_memory(text)
    except BudgetError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def lengths(text: str) -> tuple[int, ...]:
    """The region "256x128" as (256, 128)."""
    if not _LENGTHS.fullmatch(text) or max(map(len, text.lower().split("x"))) > _LONGEST_NUMBER:
        raise argparse.ArgumentTypeError(f"regions are positive lengths such as 256x256; got {text[:80]!r}")
    return tuple(int(length) for length in text.lower().split("x"))


def positive(text: str) -> int:
    """A whole number of at least one."""
    if not text.isascii() or not text.isdigit() or len(text) > _LONGEST_NUMBER or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1; got {text[:40]!r}")
    return int(text)


def threads(text: str) -> int:
    """A number of threads that a machine can have."""
    number = positive(text)
    if number > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"at most {MOST_THREADS} threads; got {text!r}")
    return number


def seed(text: str) -> int:
    """A whole number that PyTorch's generator takes."""
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a whole number; got {text[:40]!r}") from error
    if number not in _SEEDS:
        raise argparse.ArgumentTypeError(f"a whole number from -2**63 to 2**64 - 1; got {text[:40]!r}")
    return number
