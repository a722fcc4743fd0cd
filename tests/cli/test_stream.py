"""`ranger-nn run` on files: the report, the dry run, going on, and refusals."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from ranger_nn.cli.main import main
from tests.torch.scenes import Smooth

tifffile = pytest.importorskip("tifffile")
SMOOTH = "tests.torch.scenes:Smooth"
SMALL = ["--memory", "2MB", "--threads", "1"]


@pytest.fixture
def scene(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (120, 90, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "scene.tif", pixels, tile=(64, 64), photometric="rgb")
    return tmp_path / "scene.tif"


def call(*arguments):
    return main([str(argument) for argument in arguments])


def test_report(tmp_path, scene, capsys):
    out = tmp_path / "labels.tif"
    assert call("run", SMOOTH, scene, "-o", out, "--reduce", "argmax", "--json", *SMALL) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    labels = tifffile.imread(out)
    assert report["files"] == [str(out)]
    assert report["statistics"]["output 0"]["histogram"] == np.bincount(labels.ravel()).tolist()
    assert report["bytes_read"] == 120 * 90 * 3
    assert report["projected"] <= report["allowed"] == 2_000_000
    assert "MB/s" in printed.err
    assert "took" in printed.err


def test_archives(tmp_path, scene, capsys):
    """One exported for any size gives what the model itself gives; one for a single size says how to export it."""
    net, x, free = Smooth().eval(), torch.rand(1, 3, 32, 32), torch.export.Dim.AUTO
    torch.export.save(torch.export.export(net, (x,), dynamic_shapes=({2: free, 3: free},)), tmp_path / "any.pt2")
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "one.pt2")
    assert call("run", tmp_path / "any.pt2", scene, "-o", tmp_path / "a.npy", "-q", *SMALL) == 0
    assert call("run", SMOOTH, scene, "-o", tmp_path / "b.npy", "-q", *SMALL) == 0
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"), atol=1e-6)
    capsys.readouterr()
    assert call("run", tmp_path / "one.pt2", scene, "-o", tmp_path / "c.npy", "-q", *SMALL) == 1
    assert "for inputs of one size, and refuses (1, 3, 120, 90)" in capsys.readouterr().err


def test_in_words(tmp_path, scene, capsys):
    assert call("run", SMOOTH, scene, "-o", tmp_path / "o.npy", "--quiet", "--statistics", "mean,min", *SMALL) == 0
    text = capsys.readouterr().out
    assert "read " in text
    assert '"min"' in text


def test_pixels(tmp_path, scene):
    plain, declared = tmp_path / "a.npy", tmp_path / "b.npy"
    assert call("run", SMOOTH, scene, "-o", plain, "-q", *SMALL) == 0
    options = ["--scale", 1, "--mean", "0,0,0", "--std", "255,255,255", "--bands", "0,1,2"]
    assert call("run", SMOOTH, scene, "-o", declared, "-q", *options, *SMALL) == 0
    np.testing.assert_allclose(np.load(plain), np.load(declared), atol=1e-5)


def test_dry_run(tmp_path, scene, capsys):
    assert call("run", SMOOTH, scene, "-o", tmp_path / "o.zarr", "--dry-run", *SMALL) == 0
    text = capsys.readouterr().out
    assert "expected to take about" in text
    assert "reading and writing" in text
    assert call("run", SMOOTH, scene, "-o", tmp_path / "o.zarr", "--dry-run", "--json", *SMALL) == 0
    assert json.loads(capsys.readouterr().out)["projected"] <= 2_000_000
    assert os.listdir(tmp_path) == ["scene.tif"]


def test_ctrl_c_says_how_to_go_on(tmp_path, scene, capsys, monkeypatch):
    import ranger_nn.cli.stream as stream

    class Interrupting:
        def step(self, done, total):
            if done == 3:
                raise KeyboardInterrupt

    class Shown:
        def __enter__(self):
            return Interrupting()

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(stream, "show_progress", lambda *_, **__: Shown())
    out = tmp_path / "o.npy"
    assert call("run", SMOOTH, scene, "-o", out, *SMALL) == 130
    assert "give the same command again to go on" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.undo()
    assert call("run", SMOOTH, scene, "-o", out, "--json", *SMALL) == 0
    assert json.loads(capsys.readouterr().out)["resumed_at"] == 3
    assert call("run", SMOOTH, scene, "-o", out, *SMALL) == 1
    assert "is there already" in capsys.readouterr().err
    assert call("run", SMOOTH, scene, "-o", out, "--overwrite", *SMALL) == 0


def test_options_of_files_only(tmp_path, capsys):
    assert call("run", SMOOTH, "1x3x40x40", "-o", tmp_path / "o.npy", "--reduce", "argmax") == 1
    assert "--reduce needs one input that is a file" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--mean", "a,b"), ("--bands", "x"), ("--level", "first")])
def test_wrong_usage(tmp_path, scene, option):
    assert call("run", SMOOTH, scene, "-o", tmp_path / "o.npy", *option) == 2
