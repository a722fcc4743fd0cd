"""Read the arguments, call the command, turn errors into one line and an exit status."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import ranger_nn
from ranger_nn.cli import bench, plan, run
from ranger_nn.errors import RangerError

FAILURE = 1
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + 13
_COMMANDS = (plan, run, bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (by default those of the process); give the exit status."""
    try:
        chosen = _parser().parse_args(arguments)
    except SystemExit as leaving:  # --help, --version, wrong usage
        return leaving.code if isinstance(leaving.code, int) else FAILURE
    try:
        with _terminated_like_interrupted():
            chosen.command(chosen)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("ranger-nn: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (as `| head` does): not an error worth a message.
        _silence_stdout()
        return BROKEN_PIPE
    except Exception as error:
        if chosen.debug:
            traceback.print_exc()
        print(f"ranger-nn: error: {_explain(error)}", file=sys.stderr)
        return FAILURE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ranger-nn",
        description="Run a network region by region inside a stated memory, with the same numbers.",
        epilog="Exit status: 0 success, 1 failure, 2 wrong usage, 130 after Ctrl-C.",
    )
    parser.add_argument("--version", action="version", version=f"ranger-nn {ranger_nn.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def _explain(error: Exception) -> str:
    """Our own errors say what to do; of others, the kind and the first line, on one line."""
    if isinstance(error, RangerError):
        return str(error)
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else "no message"
    return f"{type(error).__name__}: {first} (give --debug to see where)"


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """On SIGTERM unwind as after Ctrl-C, so that a file half written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _silence_stdout() -> None:
    """Keep the interpreter from complaining when it flushes standard output at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return


if __name__ == "__main__":
    sys.exit(main())
