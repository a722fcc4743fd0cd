"""Read the arguments, call the command, turn errors into one line and an exit status."""

from __future__ import annotations

import argparse
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
from ranger_nn.cli.streams import say, silence, usable_streams
from ranger_nn.errors import InputError, RangerError
from ranger_nn.io.naming import shown

FAILURE = 1
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + 13  # SIGPIPE, which not every system names
TERMINATED = 128 + signal.SIGTERM
_COMMANDS = (plan, run, bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (by default those of the process); give the exit status."""
    with usable_streams() as printable:
        try:
            chosen = _parser().parse_args(arguments)
        except SystemExit as leaving:  # --help, --version, wrong usage
            return _flushed(leaving.code if isinstance(leaving.code, int) else FAILURE)
        return _flushed(_run(chosen, printable))


def _run(chosen: argparse.Namespace, printable: bool) -> int:
    """Run the chosen command; whatever goes wrong becomes one line and a status."""
    try:
        if not printable and chosen.command is not run.run:  # its result is a file
            raise InputError("standard output is closed, and the result goes there. Give it a file or /dev/null.")
        with _terminated_like_interrupted():
            chosen.command(chosen)
            sys.stdout.flush()
    except KeyboardInterrupt:
        say("ranger-nn: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (as `| head` does): not an error worth a message.
        return BROKEN_PIPE
    except SystemExit as leaving:
        if leaving.code != TERMINATED:
            say(f"ranger-nn: error: MODEL {chosen.model!r}: its own code left the program ({leaving.code})")
            return FAILURE
        return TERMINATED
    except Exception as error:
        if chosen.debug:
            say(traceback.format_exc())
        say(f"ranger-nn: error: {_explain(error)}")
        return FAILURE
    return 0


def _flushed(status: int) -> int:
    """Write what is left of the streams; an interpreter that fails to do so at its exit prints a traceback."""
    try:
        sys.stdout.flush()
    except OSError as error:
        silence(sys.stdout)
        left = isinstance(error, BrokenPipeError)
        if not left and status == 0:
            say(f"ranger-nn: error: cannot write to standard output: {error.strerror}")
        status = status or (BROKEN_PIPE if left else FAILURE)
    try:
        sys.stderr.flush()
    except OSError:  # nobody can be told
        silence(sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ranger-nn",
        description="Run a network region by region inside a stated memory, with the same numbers.",
        epilog="Exit status: 0 success, 1 failure, 2 wrong usage, 130 after Ctrl-C, 141 if the reader of standard "
        "output left (as head does), 143 after SIGTERM.",
    )
    parser.add_argument("--version", action="version", version=f"ranger-nn {ranger_nn.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def _explain(error: Exception) -> str:
    """Our own errors say what to do; of others, the kind and the first line. Always one line that a terminal can show."""
    if isinstance(error, RangerError):
        return _one_line(str(error))
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f": {shown(error.filename)!r}"
        return _one_line(f"{error.strerror}{place} (give --debug to see where)")
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else "no message"
    return f"{type(error).__name__}: {_one_line(first)} (give --debug to see where)"


def _one_line(text: str) -> str:
    """A file's or a path's text may hold what moves a terminal's cursor."""
    joined = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)


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
    raise SystemExit(TERMINATED)


if __name__ == "__main__":
    sys.exit(main())
