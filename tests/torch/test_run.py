"""From file to file: the untouched network's numbers, each byte read once, and the same bytes after any stop."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import ranger_nn
from ranger_nn.errors import BudgetError, InputError
from ranger_nn.io.protocol import BadRegionError
from ranger_nn.torch.prepare import prepare
from tests.torch.scenes import Gated, Scores, Smooth, Tagger, Two

tifffile = pytest.importorskip("tifffile")
NETS = {"smooth": Smooth, "gated": Gated}


@pytest.fixture
def scene(tmp_path):
    """(path of a tiled TIFF, the model's input)."""
    pixels = np.random.default_rng(0).integers(0, 256, (230, 150, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "scene.tif", pixels, tile=(64, 64), photometric="rgb", compression="zlib")
    return tmp_path / "scene.tif", torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))[None] / 255


def untouched(net, x):
    with torch.no_grad():
        return net(x)[0].numpy()


@pytest.mark.parametrize("schedule", [None, "tile"])
@pytest.mark.parametrize("name", sorted(NETS))
def test_numbers(tmp_path, scene, name, schedule):
    path, x = scene
    net = NETS[name]()
    report = ranger_nn.run(net, path, tmp_path / "out.npy", "3MB", schedule=schedule)
    expected = untouched(net, x)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=2e-6)
    np.testing.assert_allclose(report.statistics["output 0"]["mean"], expected.mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(report.statistics["output 0"]["max"], expected.max((1, 2)), atol=2e-6)
    assert report.projected <= report.allowed == 3_000_000
    assert sorted(os.listdir(tmp_path)) == ["out.npy", "scene.tif"]
    if schedule is None:
        assert report.bytes_read == 230 * 150 * 3


def test_each_byte_once_though_rows_overlap(tmp_path):
    """A network that begins with a convolution: its halo waits in a window, whatever the tiles are."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 200, 64), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "scene.tif", pixels.transpose(1, 2, 0), tile=(16, 16), photometric="rgb")
    report = ranger_nn.run(Smooth(), tmp_path / "scene.tif", tmp_path / "out.npy", regions=(16, 64), memory="2MB")
    assert report.regions > 10
    assert report.bytes_read == pixels.nbytes


def test_memory(scene, tmp_path):
    """What the engine's thread allocates stays below the projection."""
    path, _ = scene
    net = Gated()
    ranger_nn.run(net, path, tmp_path / "warm.npy", "2MB")
    with ranger_nn.measure() as used:
        report = ranger_nn.run(net, path, tmp_path / "out.npy", "2MB")
    assert used.peak <= report.projected + 100_000


@pytest.mark.parametrize(
    ("reduce", "function"),
    [
        ("argmax", lambda y: y.argmax(0)[None]),
        ("threshold:0.1", lambda y: (y > 0.1).astype(np.uint8)),
        ("uint8", lambda y: np.rint(np.clip(y, 0, 1) * 255)),
        (lambda y: y.max(0) - y.min(0), lambda y: (y.max(0) - y.min(0))[None]),
    ],
)
def test_reduce(tmp_path, scene, reduce, function):
    path, x = scene
    net = Smooth()
    report = ranger_nn.run(net, path, tmp_path / "out.npy", "3MB", reduce=reduce)
    given, expected = np.load(tmp_path / "out.npy"), function(untouched(net, x))
    assert given.shape == expected.shape
    assert np.mean(np.abs(given - expected) > 1e-5) < 1e-3  # a rounding may tip a class
    if reduce == "argmax":
        assert given.dtype == np.uint8
        assert report.statistics["output 0"]["histogram"] == np.bincount(given.ravel()).tolist()


def test_arrays_in_and_out(scene):
    _, x = scene
    net, out = Smooth(), np.zeros((3, 230, 150), np.float32)
    report = ranger_nn.run(net, x[0].numpy(), out, "3MB")
    np.testing.assert_allclose(out, untouched(net, x), atol=2e-6)
    assert report.files == ()


def test_two_pictures_and_scores(tmp_path, scene):
    path, x = scene
    net = Two()
    report = ranger_nn.run(net, path, tmp_path / "out.npy", "3MB")
    with torch.no_grad():
        a, b, scores = net(x)
    np.testing.assert_allclose(np.load(tmp_path / "out-0.npy"), a[0], atol=2e-6)
    np.testing.assert_allclose(np.load(tmp_path / "out-1.npy"), b[0], atol=2e-6)
    np.testing.assert_allclose(report.values["output 2"], scores, atol=2e-6)


def test_scores_only(tmp_path, scene):
    path, x = scene
    net = Scores()
    report = ranger_nn.run(net, path, tmp_path / "out.npy", "3MB")
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), net(x).detach(), atol=2e-6)
    assert report.files == (str(tmp_path / "out.npy"),)
    with pytest.raises(InputError, match=r"gives no picture.*ends in .npy"):
        ranger_nn.run(net, path, tmp_path / "out.tif", "3MB")


class Stopped(Exception):
    """Raised in the middle."""


def stop_after(count):
    seen = []

    def on_region(done, total):
        seen.append(done)
        if len(seen) >= count:
            raise Stopped

    return on_region


@pytest.mark.parametrize("ending", [".npy", ".tif"])
@pytest.mark.parametrize("name", sorted(NETS))
def test_stopped_again_and_again(tmp_path, scene, name, ending):
    """The same bytes and statistics; no region is done twice."""
    path, _ = scene
    net, rng = NETS[name](), np.random.default_rng(0)
    whole = ranger_nn.run(net, path, tmp_path / f"whole{ending}", "2MB")
    before = 0
    while True:
        done = []
        limit = int(rng.integers(1, 9))

        def on_region(k, total, done=done, limit=limit):
            done.append(k)
            if len(done) >= limit:
                raise Stopped

        try:
            report = ranger_nn.run(net, path, tmp_path / f"cut{ending}", "2MB", on_region=on_region)
        except Stopped:
            assert done[0] == before + 1
            before = done[-1]
            continue
        assert not done or done[0] == before + 1
        break
    assert (tmp_path / f"cut{ending}").read_bytes() == (tmp_path / f"whole{ending}").read_bytes()
    assert report.statistics == whole.statistics
    assert report.resumed_at == before


@pytest.mark.parametrize(("reduce", "value"), [(None, np.nan), ("argmax", 255)])
def test_no_data_in_the_result(tmp_path, reduce, value):
    """The declared value where the input has none, in a run that was stopped as well; statistics leave it out."""
    image = np.random.default_rng(0).integers(1, 256, (230, 150, 3), dtype=np.uint8)
    image[40:90, 20:60] = 7
    image[100:, 149] = 7
    image[0, 0] = (7, 7, 8)  # one band differs: this is data
    tifffile.imwrite(tmp_path / "scene.tif", image, tile=(64, 64), photometric="rgb")
    net, absent = Smooth(), (image == 7).all(-1)
    assert not absent[0, 0]
    pixels = ranger_nn.Pixels(nodata=7, result=value)
    out, done = tmp_path / "out.tif", []
    with pytest.raises(Stopped):
        ranger_nn.run(net, tmp_path / "scene.tif", out, "2MB", reduce=reduce, pixels=pixels, on_region=stop_after(3))
    report = ranger_nn.run(
        net, tmp_path / "scene.tif", out, "2MB", reduce=reduce, pixels=pixels, on_region=lambda k, n: done.append(k)
    )
    assert done[0] == report.resumed_at + 1 > 1
    plain = ranger_nn.run(
        net, tmp_path / "scene.tif", tmp_path / "plain.npy", reduce=reduce, pixels=replace(pixels, result=None)
    )
    assert plain.resumed_at == 0
    expected = np.load(tmp_path / "plain.npy")
    found = tifffile.imread(out).reshape(expected.shape)
    np.testing.assert_allclose(found[:, ~absent], expected[:, ~absent], atol=3e-6)
    np.testing.assert_array_equal(found[:, absent], np.full_like(expected[:, absent], value))
    statistics = report.statistics["output 0"]
    if reduce is None:
        np.testing.assert_allclose(statistics["mean"], expected[:, ~absent].mean(1), atol=1e-5)
        np.testing.assert_allclose(statistics["max"], expected[:, ~absent].max(1), atol=2e-6)
    else:
        assert statistics["histogram"] == np.bincount(expected[0][~absent]).tolist()
    with tifffile.TiffFile(out) as file:
        assert float(file.pages[0].tags[42113].value) == pytest.approx(value, nan_ok=True)


def test_no_data_refusals(tmp_path, scene):
    path, _ = scene
    with pytest.raises(InputError, match=r"result=255 of Pixels .* the result is int8"):
        ranger_nn.run(
            Smooth(), path, tmp_path / "o.npy", pixels=ranger_nn.Pixels(nodata=0, result=255),
            reduce=lambda y: y.astype(np.int8),
        )  # fmt: skip
    with pytest.raises(InputError, match="give the result a path"):
        ranger_nn.run(Smooth(), path, np.zeros((3, 230, 150), np.float32), pixels=ranger_nn.Pixels(nodata=0, result=1))
    with pytest.raises(InputError, match=r"leave it out where the sizes differ"):
        ranger_nn.run(nn.AvgPool2d(2), path, tmp_path / "o.npy", pixels=ranger_nn.Pixels(nodata=0, result=1))
    with pytest.raises(InputError, match=r"say which value that is, nodata="):
        ranger_nn.Pixels(result=1)
    assert sorted(os.listdir(tmp_path)) == ["scene.tif"]


def command(path, out, *more):
    code = "import sys; from ranger_nn.cli.main import main; sys.exit(main())"
    options = ["--memory", "12MB", "--regions", "8x1200", "--threads", "1", "--quiet"]
    return [sys.executable, "-c", code, "run", "tests.torch.scenes:Gated", str(path), "-o", str(out), *options, *more]


@pytest.mark.slow
def test_killed(tmp_path):
    """SIGKILL at random moments of a process; the same command goes on; the bytes are those of one run."""
    pixels = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    path = tmp_path / "scene.tif"
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb")
    subprocess.run(command(path, tmp_path / "whole.npy"), check=True, capture_output=True)
    rng, kills = np.random.default_rng(1), 0
    journal = tmp_path / ".cut.npy.partial" / "journal.json"
    while kills < 3:
        with subprocess.Popen(command(path, tmp_path / "cut.npy"), stdout=subprocess.DEVNULL) as process:
            before = json.loads(journal.read_text())["done"] if journal.exists() else 0
            while process.poll() is None and (
                not journal.exists() or json.loads(journal.read_text())["done"] == before
            ):
                time.sleep(0.005)
            time.sleep(float(rng.uniform(0, 0.1)))
            process.send_signal(signal.SIGKILL)
        kills += 1
        if process.returncode == 0:
            break
    if not (tmp_path / "cut.npy").exists():
        subprocess.run(command(path, tmp_path / "cut.npy"), check=True, capture_output=True)
    assert (tmp_path / "cut.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


@pytest.mark.parametrize("what", ["model", "input", "plan", "options"])
def test_other_work_does_not_go_on(tmp_path, scene, what):
    path, _ = scene
    torch.manual_seed(0)
    net, out = Smooth(), tmp_path / "out.npy"
    with pytest.raises(Stopped):
        ranger_nn.run(net, path, out, "2MB", on_region=stop_after(2))
    changed = {"memory": "2MB"}
    if what == "model":
        with torch.no_grad():
            next(net.parameters()).add_(1)
    elif what == "input":
        os.utime(path, (1, 1))
    elif what == "plan":
        changed["memory"] = "3MB"
    else:
        changed["reduce"] = "argmax"
    with pytest.raises(InputError, match=f"another .*{what}.*start anew"):
        ranger_nn.run(net, path, out, **changed)
    report = ranger_nn.run(net, path, out, **changed, overwrite=True)
    assert report.resumed_at == 0


def blur():
    torch.manual_seed(0)
    return nn.Conv2d(3, 1, 3, padding=1).eval()


def changing(how, at=3):
    return lambda k, n: how() if k == at else None


@pytest.mark.parametrize("how", ["written", "replaced", "removed"])
@pytest.mark.parametrize("ending", ["npy", "tif"])
def test_an_input_that_changes_meanwhile(tmp_path, how, ending):
    path, out = tmp_path / f"in.{ending}", tmp_path / "out.npy"
    pixels = np.random.default_rng(0).random((3, 60, 40), np.float32)

    def save(to, x):
        np.save(to, x) if ending == "npy" else tifffile.imwrite(
            to, x, photometric="minisblack", planarconfig="separate"
        )

    def change():
        if how == "removed":
            return path.unlink()
        there = path if how == "written" else tmp_path / f"other.{ending}"
        save(there, pixels + 1)
        return there.replace(path)

    save(path, pixels)
    options = {"regions": (10, 40), "schedule": "slide"}
    with pytest.raises(InputError, match=r"in\.(npy|tif)' changed while the run read it.*overwrite=True"):
        ranger_nn.run(blur(), path, out, on_region=changing(change), **options)
    assert not out.exists()
    save(path, pixels)
    assert ranger_nn.run(blur(), path, out, overwrite=True, **options).resumed_at == 0
    np.testing.assert_allclose(np.load(out), untouched(blur(), torch.from_numpy(pixels)[None]), atol=2e-6)


def test_an_array_that_changes_meanwhile(tmp_path):
    pixels = np.random.default_rng(0).random((3, 60, 40), np.float32)
    options = {"regions": (10, 40), "schedule": "slide", "axes": "CYX"}
    for target in (tmp_path / "out.npy", np.zeros((1, 60, 40), np.float32)):
        with pytest.raises(InputError, match="changed while the run read it"):
            ranger_nn.run(blur(), pixels, target, on_region=changing(lambda: pixels.__iadd__(1)), **options)
    expected = untouched(blur(), torch.from_numpy(pixels.copy())[None])
    ranger_nn.run(blur(), pixels, pixels[:1], **options)  # in place: the run's own doing
    np.testing.assert_allclose(pixels[:1], expected, atol=2e-6)


def test_a_result_in_the_file_of_its_input(tmp_path):
    """Another data set: the run's own writing changes the file."""
    h5py = pytest.importorskip("h5py")
    pixels = np.random.default_rng(0).random((3, 60, 40), np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        read, written = file.create_dataset("x", data=pixels), file.create_dataset("y", (1, 60, 40), np.float32)
        ranger_nn.run(blur(), read, written, regions=(10, 40), schedule="slide", axes="CYX")
        file.flush()
        np.testing.assert_allclose(written[:], untouched(blur(), torch.from_numpy(pixels)[None]), atol=2e-6)


def test_a_tally_of_something_else(tmp_path, scene):
    """With a sum that fits: it is held to names, channels and pixels before it is taken."""
    path, _ = scene
    net, out, options = blur(), tmp_path / "out.npy", {"regions": (50, 150), "schedule": "slide"}
    with pytest.raises(Stopped):
        ranger_nn.run(net, path, out, **options, on_region=stop_after(3))
    journal = tmp_path / ".out.npy.partial" / "journal.json"
    kept = journal.read_bytes()
    for tally in (5, "text", {"mean": [1, 2]}):
        found = {k: v for k, v in json.loads(kept).items() if k != "sum"} | {"tally": {"output 0": tally}}
        found["sum"] = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
        journal.write_text(json.dumps(found))
        with pytest.raises(InputError, match=r"none of this run"):
            ranger_nn.run(net, path, out, **options)
    journal.write_bytes(kept)
    assert ranger_nn.run(net, path, out, **options).resumed_at >= 2


def test_histograms_of_many_classes(tmp_path):
    """Regions know different numbers of classes."""
    classes = np.linspace(0, 400, 300 * 40).astype(np.int32).reshape(1, 300, 40)
    given = classes.astype(np.float32)
    report = ranger_nn.run(
        nn.AvgPool2d(1), given, tmp_path / "out.npy", regions=(50, 40), schedule="slide", axes="CYX",
        reduce=lambda y: y.astype(np.int32), statistics=["histogram"],
    )  # fmt: skip
    assert report.statistics["output 0"]["histogram"] == np.bincount(classes.ravel()).tolist()


def test_results_are_not_overwritten(tmp_path, scene):
    path, _ = scene
    ranger_nn.run(Smooth(), path, tmp_path / "out.npy")
    with pytest.raises(InputError, match="is there already"):
        ranger_nn.run(Smooth(), path, tmp_path / "out.npy")


def test_disk_full(tmp_path, scene, monkeypatch):
    """What is done stays, nothing stands under the final name, and the run goes on when there is room."""
    path, _ = scene
    net, real, count = Smooth(), os.pwrite, [0]

    def full(file, data, offset):
        count[0] += 1
        if count[0] > 9:
            raise OSError(28, "No space left on device")
        return real(file, data, offset)

    monkeypatch.setattr("ranger_nn.io.rows.os.pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        ranger_nn.run(net, path, tmp_path / "out.npy", "2MB")
    monkeypatch.undo()
    assert not (tmp_path / "out.npy").exists()
    report = ranger_nn.run(net, path, tmp_path / "out.npy", "2MB")
    assert report.resumed_at > 0
    ranger_nn.run(net, path, tmp_path / "whole.npy", "2MB")
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_unreadable_region(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (256, 128, 3), dtype=np.uint8)
    path = tmp_path / "scene.tif"
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb")
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 64 * 64 * 3 - 10)  # the last tile and a bit
    with pytest.raises(BadRegionError, match="truncated"):
        ranger_nn.run(Smooth(), path, tmp_path / "out.npy", "2MB")
    assert not (tmp_path / "out.npy").exists()
    with pytest.raises(InputError, match="skip_bad was False, is True"):
        ranger_nn.run(Smooth(), path, tmp_path / "out.npy", "2MB", skip_bad=True)
    report = ranger_nn.run(Smooth(), path, tmp_path / "out.npy", "2MB", skip_bad=True, overwrite=True)
    assert report.bad == (((192, 256), (0, 64)), ((192, 256), (64, 128)))


def test_errors(tmp_path, scene):
    path, _ = scene
    with pytest.raises(BudgetError, match=r"Smooth on .* does not fit in 110 kB.*bound by conv2d_2 \(b\)") as small:
        ranger_nn.run(Smooth(), path, tmp_path / "out.npy", "110kB")
    assert small.value.allowed == 110_000
    prepare(Smooth(), path, small.value.least)
    with pytest.raises(InputError, match=r"pieces of 64x64, which take 12288 bytes.*10000 bytes"):
        ranger_nn.run(Smooth(), path, tmp_path / "out.npy", "20kB")
    with pytest.raises(InputError, match=r"unknown reduce='argmx' \(did you mean 'argmax'\?\)"):
        ranger_nn.run(Smooth(), path, tmp_path / "out.npy", reduce="argmx")
    with pytest.raises(InputError, match=r"unknown statistic 'meen' \(did you mean 'mean'\?\)"):
        ranger_nn.run(Smooth(), path, tmp_path / "out.npy", statistics=["meen"])
    with pytest.raises(InputError, match="must keep rows and columns"):
        ranger_nn.run(Smooth(), path, tmp_path / "out.npy", reduce=lambda y: y[:, :1])
    with pytest.raises(InputError, match=r"takes a torch.nn.Module or a keras.Model, got int"):
        ranger_nn.run(7, path, tmp_path / "out.npy")
    with pytest.raises(InputError, match=r"array has shape \(2, 2\)"):
        ranger_nn.run(Smooth(), path, np.zeros((2, 2), np.float32))
    assert sorted(os.listdir(tmp_path)) == ["scene.tif"]


def test_dry_run(scene):
    made = prepare(Gated(), scene[0], "3MB")
    assert made.projected <= 3_000_000
    assert "reading and writing" in str(made)
    assert 0 < made.expected_seconds() < 60


def test_bfloat16(tmp_path, scene):
    path, x = scene
    net = Smooth().to(torch.bfloat16)
    ranger_nn.run(net, path, tmp_path / "out.npy", "3MB")
    with torch.no_grad():
        expected = net(x.to(torch.bfloat16))[0].float().numpy()
    assert np.abs(np.load(tmp_path / "out.npy") - expected).max() < 0.05


def test_recurrence_goes_on(tmp_path):
    """The state of an LSTM is kept with the journal: stopped again and again, the same bytes."""
    net, x = Tagger(), np.random.default_rng(0).normal(size=(3, 2000, 1)).astype(np.float32)
    regions = {"regions": (100,), "memory": "2MB", "axes": "CYX"}
    ranger_nn.run(net, x, tmp_path / "whole.npy", **regions)
    np.testing.assert_allclose(np.load(tmp_path / "whole.npy"), untouched(net, torch.from_numpy(x)[None]), atol=2e-6)
    for _ in range(30):
        try:
            report = ranger_nn.run(net, x, tmp_path / "cut.npy", **regions, on_region=stop_after(3))
        except Stopped:
            continue
        break
    assert report.resumed_at > 0
    assert (tmp_path / "cut.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_volume(tmp_path):
    """Depth, rows and columns: slides along depth."""
    net = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 1, 3, padding=1)).eval()
    x = np.random.default_rng(0).normal(size=(1, 20, 24, 28)).astype(np.float32)
    np.save(tmp_path / "in.npy", x)
    ranger_nn.run(net, np.load(tmp_path / "in.npy", mmap_mode="r"), tmp_path / "out.npy", "1MB", axes="CZYX")
    with torch.no_grad():
        expected = net(torch.from_numpy(x)[None])[0].numpy()
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=2e-6)
