"""Standard streams that are closed, full or left by their reader: no traceback, and no message in a data file."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest

from ranger_nn.cli.main import main
from ranger_nn.cli.progress import show_progress

SMOOTH = "tests.cli.models:Smooth"
SHAPE = "1x3x40x56"

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX streams")


def shell(arguments, redirections):
    """Status, and what standard output and error show."""
    command = f"{sys.executable} -m ranger_nn.cli.main {shlex.join(arguments)} {redirections}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, env=environment)
    return done.returncode, done.stdout, done.stderr


def test_a_closed_output_is_told_before_the_work():
    status, out, errors = shell(["plan", SMOOTH, SHAPE], ">&-")
    assert (status, out) == (1, "")
    assert errors.splitlines() == [
        "ranger-nn: error: standard output is closed, and the result goes there. Give it a file or /dev/null."
    ]


def test_a_closed_standard_error_sends_no_message_to_the_output(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["plan", SMOOTH, "nothing-there"]) == 1
    assert main(["plan", SMOOTH, SHAPE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["projected"] > 0


def test_a_run_with_all_streams_closed_writes_its_file(tmp_path):
    """Nothing that is printed gets into it, though its descriptor would have been that of a stream."""
    path = tmp_path / "o.npy"
    assert shell(["run", SMOOTH, SHAPE, "-o", str(path)], "<&- >&- 2>&-")[0] == 0
    assert np.load(path).shape == (1, 3, 40, 56)
    assert path.stat().st_size == 128 + 4 * 3 * 40 * 56


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux")
def test_a_full_disk():
    status, _, errors = shell(["--help"], ">/dev/full")
    assert status == 1
    assert errors.splitlines() == ["ranger-nn: error: cannot write to standard output: No space left on device"]
    assert shell(["plan"], "2>/dev/full")[0] == 2


def test_a_reader_that_left():
    command = [sys.executable, "-m", "ranger_nn.cli.main", "plan", SMOOTH, SHAPE, "--json"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 141
    assert errors == b""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plan"]])
def test_help_and_usage_with_closed_streams(arguments):
    """In this process, where Python has set closed streams to None."""
    before = sys.stdout, sys.stderr
    try:
        sys.stdout = sys.stderr = None
        assert main(arguments) == (2 if arguments == ["plan"] else 0)
        assert (sys.stdout, sys.stderr) == (None, None)
    finally:
        sys.stdout, sys.stderr = before


def test_progress_whose_reader_left_stops_no_run():
    class Left(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with show_progress(stream=Left()) as progress:
        progress.step(1, 1)
