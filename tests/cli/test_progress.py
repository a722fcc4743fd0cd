"""Progress is told in lines that suit a log, or in a bar on a terminal."""

from __future__ import annotations

import io

import pytest

from ranger_nn.cli import progress as progress_module
from ranger_nn.cli.progress import clock, show_progress, time_left


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_time_left():
    assert time_left(10, 5, 20) == 30
    assert time_left(10, 20, 20) == 0
    assert time_left(10, 0, 20) == 0


def test_lines_are_few_and_the_last_is_never_left_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with show_progress(stream=out) as progress:
        for done in range(1, 101):
            now[0] += 0.25
            progress.step(done, 100)
    assert out.getvalue().splitlines() == [
        "region 4/100, 0:24 left",
        "region 24/100, 0:19 left",
        "region 44/100, 0:14 left",
        "region 64/100, 0:09 left",
        "region 84/100, 0:04 left",
        "region 100/100, took 0:25",
    ]


def test_quiet():
    out = io.StringIO()
    with show_progress(quiet=True, stream=out) as progress:
        progress.step(1, 1)
    assert out.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal():
    pytest.importorskip("rich")
    out = Terminal()
    with show_progress(stream=out) as progress:
        progress.step(3, 7)
    assert "3/7" in out.getvalue()


def test_lines_on_a_terminal_without_rich(monkeypatch):
    monkeypatch.setattr(progress_module, "_rich_progress", lambda: None)
    out = Terminal()
    with show_progress(stream=out) as progress:
        progress.step(7, 7)
    assert out.getvalue() == "region 7/7, took 0:00\n"
