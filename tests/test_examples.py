"""The examples run, and so does every Python block of README."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import run

ROOT = Path(__file__).resolve().parent.parent


def run_example(folder: Path, name: str, *arguments: str) -> str:
    """Standard output of an example that runs in `folder`."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_first_steps(tmp_path: Path) -> None:
    assert "loss" in run_example(tmp_path, "first_steps.py")


@pytest.mark.slow
def test_denoise_retina(tmp_path: Path) -> None:
    printed = run_example(tmp_path, "denoise_retina.py", "--quick")
    assert "4x larger" in printed
    for name in ("denoised.png", "plan.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_graph_by_parts(tmp_path: Path) -> None:
    assert "differ by at most" in run_example(tmp_path, "graph_by_parts.py")


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("README.md", keras=False)
