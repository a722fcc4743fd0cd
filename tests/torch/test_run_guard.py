"""What a run does not do: mix two runs, two callables or two inputs in one result, overwrite its input, take another's folder."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ranger_nn
from ranger_nn.errors import InputError, WriteError
from ranger_nn.io.naming import place
from ranger_nn.torch.prepare import prepare
from tests.torch.scenes import Gated, Tagger, Two

ROWS = {"regions": (16, 100), "schedule": "slide"}


def convolution(channels=1):
    torch.manual_seed(0)
    return nn.Conv2d(channels, 1, 5, padding=2).eval()


def image(channels=1):
    return np.random.default_rng(0).random((channels, 200, 100)).astype(np.float32)


def untouched(net, x):
    with torch.no_grad():
        return net(torch.from_numpy(np.ascontiguousarray(x))[None])[0].numpy()


class Stopped(Exception):
    """Raised in the middle."""


def stop(done, total):
    if done == 7:
        raise Stopped


def run(source, sink, net=None, **more):
    return ranger_nn.run(net or convolution(), source, sink, **(ROWS | more))


# --------------------------------------------------------------------------- two runs


def test_the_second_run_is_told_who_is_first(tmp_path):
    x, out = image(), tmp_path / "out.npy"
    told = []

    def another(done, total):
        if done in (2, 9):
            with pytest.raises(InputError, match=rf"process {os.getpid()} on .*, since "):
                run(x, out, overwrite=done == 9)
            told.append(done)

    run(x, out, on_region=another)
    assert told == [2, 9]
    np.testing.assert_allclose(np.load(out), untouched(convolution(), x), atol=1e-6)
    assert os.listdir(tmp_path) == ["out.npy"]


@pytest.mark.parametrize("taken", [False, True])
def test_a_run_that_lost_its_place_says_so(tmp_path, taken):
    x, out = image(), tmp_path / "out.npy"
    folder = tmp_path / ".out.npy.partial"

    def lose(done, total):
        if done == 3:
            folder.rename(tmp_path / "moved")
            if taken:
                with pytest.raises(Stopped):
                    run(x, out, on_region=stop)

    with pytest.raises(WriteError, match="its result is not whole"):
        run(x, out, on_region=lose)
    assert not out.exists()
    assert folder.exists() == taken
    if taken:
        assert run(x, out).resumed_at == 7


def test_a_result_that_came_meanwhile_stays(tmp_path):
    out = tmp_path / "out.npy"
    with pytest.raises(InputError, match="is there already"):
        run(image(), out, on_region=lambda done, total: out.write_text("precious"))
    assert out.read_text() == "precious"
    out.unlink()
    report = run(image(), out)
    assert report.resumed_at == report.regions


@pytest.mark.parametrize("ending", ["npy", "zarr"])
@pytest.mark.parametrize("before", [0, 1])
def test_stopped_between_two_names(tmp_path, monkeypatch, before, ending):
    """The next run goes on, and both results are those of one run."""
    pytest.importorskip("zarr")
    x, count = image(3), []

    def halted(*arguments):
        count.append(1)
        if len(count) > before:
            raise Stopped
        place(*arguments)

    monkeypatch.setattr("ranger_nn.execute.files.results.place", halted)
    with pytest.raises(Stopped):
        ranger_nn.run(Two(), x, tmp_path / f"cut.{ending}", "2MB")
    monkeypatch.undo()
    assert len(list(tmp_path.glob(f"cut-*.{ending}"))) == before
    report = ranger_nn.run(Two(), x, tmp_path / f"cut.{ending}", "2MB")
    assert report.resumed_at == report.regions
    ranger_nn.run(Two(), x, tmp_path / f"whole.{ending}", "2MB")
    assert not list(tmp_path.glob(".*"))
    for k in (0, 1):
        a, b = tmp_path / f"cut-{k}.{ending}", tmp_path / f"whole-{k}.{ending}"
        files = [p.relative_to(b) for p in b.rglob("*") if p.is_file()] if b.is_dir() else [None]
        for inside in files:
            one, other = (a, b) if inside is None else (a / inside, b / inside)
            assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("ending", ["npy", "tif", "zarr"])
def test_disk_full_at_the_end(tmp_path, monkeypatch, ending):
    """The last step fails: an error of ours, nothing under the final name, and the rows are there for the next run."""
    tifffile, zarr = pytest.importorskip("tifffile"), pytest.importorskip("zarr")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tifffile, "imwrite", full)
    monkeypatch.setattr(zarr, "create_array", full)
    monkeypatch.setattr("ranger_nn.io.naming.os.link", full)
    out = tmp_path / f"out.{ending}"
    with pytest.raises(WriteError, match="No space left on device"):
        run(image(), out)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == [f".out.{ending}.partial"]
    report = run(image(), out)
    assert report.resumed_at == report.regions
    assert os.listdir(tmp_path) == [f"out.{ending}"]


def test_a_refusal_takes_nothing_away(tmp_path):
    """Work that cannot go on stays for the call that it belongs to."""
    x, out = image(), tmp_path / "out.npy"
    with pytest.raises(Stopped):
        run(x, out, on_region=stop)
    for other in ({"net": nn.Sequential(convolution(), nn.ReLU())}, {"reduce": "uint8"}, {"regions": (8, 100)}):
        with pytest.raises(InputError, match="cannot go on"):
            run(x, out, **other)
    assert run(x, out).resumed_at == 7


# --------------------------------------------------------------------------- in place


class Wrapped:
    """An array-like that does not say where it lives."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, index):
        return self.array[index]

    def __setitem__(self, index, value):
        self.array[index] = value


def places(tmp_path):
    """Name -> (source, target, the target's numbers)."""
    x = image()
    same = x.copy()
    yield "same", same, same, same
    wide = np.zeros((1, 220, 100), np.float32)
    wide[:, :200] = x
    yield "overlapping", wide[:, :200], wide[:, 20:], wide[:, 20:]
    woven = np.zeros((1, 200, 200), np.float32)
    woven[..., ::2] = x
    yield "interleaved", woven[..., ::2], woven[..., 1::2], woven[..., 1::2]
    np.save(tmp_path / "a.npy", x)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r+")
    yield "a path and its map", tmp_path / "a.npy", mapped, mapped
    np.save(tmp_path / "b.npy", x)
    other = np.load(tmp_path / "b.npy", mmap_mode="r+")
    yield "two maps", np.load(tmp_path / "b.npy", mmap_mode="r"), other, other
    hidden = x.copy()
    yield "wrapped", Wrapped(hidden), hidden, hidden
    zarr = pytest.importorskip("zarr")
    stored = zarr.create_array(store=str(tmp_path / "z.zarr"), shape=x.shape, dtype="f4", chunks=(1, 64, 64))
    stored[:] = x
    yield "zarr", tmp_path / "z.zarr", zarr.open(str(tmp_path / "z.zarr")), stored
    h5py = pytest.importorskip("h5py")
    file = h5py.File(tmp_path / "a.h5", "w")
    file["x"] = x
    file["alias"] = file["x"]
    yield "hdf5", file["x"], file["alias"], file["x"]


def test_an_array_in_place(tmp_path):
    """Tiles read rows and columns that were written before: the numbers are those of the untouched network all the same."""
    expected = untouched(convolution(), image())
    for name, source, target, found in places(tmp_path):
        run(source, target, regions=(32, 32), schedule="tile")
        np.testing.assert_allclose(np.asarray(found[:]), expected, atol=1e-6, err_msg=name)


def test_a_file_is_not_replaced_by_what_is_made_of_it(tmp_path):
    np.save(tmp_path / "a.npy", image())
    (tmp_path / "sub").symlink_to(tmp_path)
    os.link(tmp_path / "a.npy", tmp_path / "hard.npy")
    before = (tmp_path / "a.npy").read_bytes()
    for target in ("a.npy", "sub/a.npy", "hard.npy"):
        with pytest.raises(InputError, match="take the place of its own input"):
            run(tmp_path / "a.npy", tmp_path / target, overwrite=True)
    assert (tmp_path / "a.npy").read_bytes() == before


def test_arrays_that_do_not_take_the_result():
    x = image()
    frozen = np.zeros_like(x)
    frozen.flags.writeable = False
    for target, text in (
        (frozen, "read-only"),
        (np.zeros(x.shape, np.uint8), "float32, and the array that it is written to is uint8"),
        ([0.0], "a path, or an array"),
        (torch.zeros(x.shape), "no type of NumPy"),
    ):
        with pytest.raises(InputError, match=text):
            run(x, target)
    with pytest.raises(InputError, match=r"with .numpy\(\)"):
        run(torch.from_numpy(x), np.zeros_like(x))
    half = np.zeros(x.shape, np.float16)
    run(x, half)
    np.testing.assert_allclose(half, untouched(convolution(), x), atol=1e-3)


# --------------------------------------------------------------------------- going on


def scaled(by):
    return lambda y: y * by


def test_another_callable_of_the_same_name(tmp_path):
    x, out = image(), tmp_path / "out.npy"
    with pytest.raises(Stopped):
        run(x, out, reduce=scaled(2), on_region=stop)
    with pytest.raises(InputError, match=r"another options.*reduce was scaled"):
        run(x, out, reduce=scaled(3))
    lock = threading.Lock()
    assert run(x, out, reduce=scaled(2)).resumed_at == 7
    with pytest.raises(Stopped):
        run(x, tmp_path / "other.npy", reduce=lambda y: y * lock.locked(), on_region=stop)
    with pytest.raises(InputError, match=r"whether reduce \(.*cannot pickle.*\) is what it was then cannot be told"):
        run(x, tmp_path / "other.npy", reduce=lambda y: y * lock.locked())


@pytest.mark.parametrize("what", ["slope", "threshold", "axes", "dataset", "pixels", "array", "precision"])
def test_another_anything(tmp_path, what):
    """What determines the numbers and was not part of the identity, or is easily left out."""
    h5py = pytest.importorskip("h5py")
    x = np.random.default_rng(0).random((1, 200, 200)).astype(np.float32)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a"], file["b"] = x, x + 1
    rows = {"regions": (16, 200)}
    one = {"net": nn.Sequential(convolution(), nn.LeakyReLU(0.1)), "source": f"{tmp_path}/x.h5:a", **rows}
    other = dict(one)
    if what == "slope":
        other["net"] = nn.Sequential(convolution(), nn.LeakyReLU(0.2))
    elif what == "threshold":
        one["reduce"], other["reduce"] = "threshold:0.12345678", "threshold:0.12345679"
    elif what == "axes":
        one["axes"], other["axes"] = "CYX", "CXY"
    elif what == "dataset":
        other["source"] = f"{tmp_path}/x.h5:b"
    elif what == "pixels":
        other["pixels"] = ranger_nn.Pixels(mean=0.5)
    elif what == "array":
        changed = x.copy()
        changed[0, 150, 77] += 1  # one element
        one["source"], other["source"] = x, changed
    out = tmp_path / "out.npy"
    with pytest.raises(Stopped):
        run(sink=out, on_region=stop, **one)
    if what == "precision":
        torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(InputError, match=r"was made with another (model|input|options|versions)"):
            run(sink=out, **other)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert run(sink=out, **one).resumed_at == 7


@pytest.mark.parametrize("how", ["replaced", "edited"])
def test_another_input_of_the_same_date(tmp_path, how):
    path, out = tmp_path / "x.npy", tmp_path / "out.npy"
    np.save(path, image())
    stamp = path.stat()
    with pytest.raises(Stopped):
        run(path, out, on_region=stop)
    changed = image()
    changed[0, 150, 77] += 1
    if how == "replaced":
        path.unlink()
        np.save(path, changed)
    else:
        np.lib.format.open_memmap(path, "r+")[:] = changed
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(InputError, match="another input"):
        run(path, out)
    assert (tmp_path / ".out.npy.partial" / "journal.json").exists()  # a refusal takes nothing away


def shorten(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


def lengthen(path):
    with open(path, "ab") as file:
        file.write(bytes(10))


def change(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 20] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("net", [Gated, Tagger])
def test_no_file_of_the_folder_is_trusted(tmp_path, net):
    """Cut, lengthened, changed, removed: refused with the file's name, or the bytes of one run."""
    x = np.random.default_rng(0).random((3, 400, 1) if net is Tagger else (3, 60, 32)).astype(np.float32)
    options = {"net": net(), "regions": (100,) if net is Tagger else (8, 32), "schedule": None, "axes": "CYX"}
    made = prepare(options.pop("net"), x, **(ROWS | options))  # once for all
    options = {"net": made.model, "prepared": made}
    total = run(x, tmp_path / "whole.npy", **options).regions
    folder, out, kept = tmp_path / ".cut.npy.partial", tmp_path / "cut.npy", tmp_path / "kept"

    def halt(done, _):
        if done == total - 2:
            raise Stopped

    with pytest.raises(Stopped):
        run(x, out, on_region=halt, **options)
    shutil.copytree(folder, kept)
    for name in sorted(set(os.listdir(kept)) - {"lock"}):
        for harm in (shorten, lengthen, change, os.remove):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(kept, folder)
            harm(folder / name)
            if (name, harm) == ("journal.json", os.remove):
                assert run(x, out, **options).resumed_at == 0
                assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()
                out.unlink()
                continue
            with pytest.raises(InputError, match=name):
                run(x, out, **options)
            assert not out.exists()
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)
    assert run(x, out, **options).resumed_at == total - 2
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_a_journal_names_no_other_files(tmp_path):
    """Slots are numbers of this plan, whatever the journal says and however well it is signed."""
    import hashlib

    x, out = image(), tmp_path / "out.npy"
    with pytest.raises(Stopped):
        run(x, out, on_region=stop)
    path = tmp_path / ".out.npy.partial" / "journal.json"
    for key, value in (
        ("states", {"../../x": ""}),
        ("states", {"3": ""}),
        ("done", 99),
        ("done", -1),
        ("bad", [[["a"]]]),
    ):
        said = json.loads(path.read_text())
        before = dict(said)
        said.pop("sum")
        said[key] = value
        said["sum"] = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(said))
        with pytest.raises(InputError, match="cannot go on"):
            run(x, out)
        path.write_text(json.dumps(before))
    assert run(x, out).resumed_at == 7


def test_no_data_is_found_again(tmp_path):
    """Where the input has none is not read from what an earlier run left."""
    x, net = image(), convolution()
    x[0, 20:60, 30:70] = -1
    pixels = ranger_nn.Pixels(nodata=-1, result=np.nan)
    run(x, tmp_path / "whole.npy", pixels=pixels)
    with pytest.raises(Stopped):
        run(x, tmp_path / "out.npy", net, pixels=pixels, on_region=stop)
    absent = tmp_path / ".out.npy.partial" / "absent"
    absent.write_bytes(bytes(absent.stat().st_size))
    assert run(x, tmp_path / "out.npy", net, pixels=pixels).resumed_at == 7
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


# --------------------------------------------------------------------------- names and shapes


class Named(nn.Module):
    """Two pictures and scores by name."""

    def __init__(self):
        super().__init__()
        self.a = convolution(3)

    def forward(self, x):
        y = self.a(x)
        return {"mask": y.sigmoid(), "depth/../m": -y, "score": y.mean((2, 3))}


def test_names_of_a_dictionary_name_the_files(tmp_path):
    x = image(3)
    report = run(x, tmp_path / "out.npy", Named().eval())
    assert [Path(f).name for f in report.files] == ["out-mask.npy", "out-depth_.._m.npy"]
    assert sorted(report.statistics) == ["depth_.._m", "mask"]
    assert list(report.values) == ["score"]
    y = untouched(convolution(3), x)
    np.testing.assert_allclose(np.load(tmp_path / "out-mask.npy"), 1 / (1 + np.exp(-y)), atol=1e-6)
    np.testing.assert_allclose(np.load(tmp_path / "out-depth_.._m.npy"), -y, atol=1e-6)
    with pytest.raises(InputError, match=r"out-mask.npy' is there already"):
        run(x, tmp_path / "out.npy", Named().eval())


class Squeezed(nn.Module):
    """No channel axis: rows stand where a result has its channels."""

    def __init__(self):
        super().__init__()
        self.a = convolution()

    def forward(self, x):
        return self.a(x).squeeze(1)


def test_rows_in_the_place_of_channels(tmp_path):
    with pytest.raises(InputError, match=r"shape \(1, 200, 100\), which is cut along axis 1.*unsqueeze"):
        run(image(), tmp_path / "out.npy", Squeezed().eval())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("shape", [(12, 20, 24), (2, 12, 20, 24), (1, 12, 20, 24)])
@pytest.mark.parametrize("channels", [1, 2])
def test_axes_of_a_volume_are_asked_for(tmp_path, shape, channels):
    """A network that takes a volume without a batch gives right numbers by luck: then the report says what was guessed."""
    net = nn.Conv3d(1, channels, 3, padding=1).eval()
    if channels == 1 and shape[0] != 2:
        report = ranger_nn.run(net, np.zeros(shape, np.float32), tmp_path / "out.npy")
        assert "C 12, Y 20, X 24; of a volume name the axes" in report.notes[0]
        return
    with pytest.raises(InputError, match=r"axes='ZYX' or 'CZYX'|axes='CZYX'"):
        ranger_nn.run(net, np.zeros(shape, np.float32), tmp_path / "out.npy")
    assert os.listdir(tmp_path) == []


def test_no_data_of_the_header_is_named(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tags = [(42113, 2, 0, "-9999", True)]
    tifffile.imwrite(tmp_path / "x.tif", image()[0], tile=(16, 16), extratags=tags)
    report = run(tmp_path / "x.tif", tmp_path / "a.npy")
    assert "says that -9999 stands for no data; it was taken as a number" in report.notes[0]
    report = run(tmp_path / "x.tif", tmp_path / "b.npy", pixels=ranger_nn.Pixels(nodata=-9999))
    assert report.notes == ()


def test_bits_that_the_type_does_not_tell(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    values = (image()[0] * 4095).astype(np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", values, bitspersample=12, photometric="minisblack")
    with pytest.raises(InputError, match=r"12 bits in uint16.*scale=1 / 4095"):
        run(tmp_path / "x.tif", tmp_path / "a.npy")
    run(tmp_path / "x.tif", tmp_path / "a.npy", pixels=ranger_nn.Pixels(scale=1 / 4095))
    expected = untouched(convolution(), values[None].astype(np.float32) * np.float32(1 / 4095))
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), expected, atol=1e-6)
