"""A result holds what was written, in any order of regions, and appears only when it is whole."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ranger_nn.errors import InputError, MissingExtraError
from ranger_nn.io import sinks
from ranger_nn.io.journal import Journal
from ranger_nn.io.rows import RowFile
from ranger_nn.io.sinks import FileSink, check_sink, working_folder


def written(path, whole, again=False):
    """A sink with all of `whole` in it, in strips of seven rows."""
    folder = working_folder(path)
    folder.mkdir(exist_ok=True)
    sink = FileSink(path, whole.shape, whole.dtype, None, again, folder / "rows.npy")
    for top in range(0, whole.shape[-2], 7):
        rows = (top, min(top + 7, whole.shape[-2]))
        box = (*((0, n) for n in whole.shape[1:-2]), rows, (0, whole.shape[-1]))
        sink.write(box, whole[..., slice(*rows), :])
    return sink


def loaded(path):
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".zarr":
        return pytest.importorskip("zarr").open(str(path))[:]
    return pytest.importorskip("tifffile").imread(path)


@pytest.mark.parametrize("ending", [".npy", ".zarr", ".tif"])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 300, 270), "float32"), ((1, 20, 30), "uint8"), ((2, 3, 33, 40), "uint16")]
)
def test_formats(tmp_path, ending, shape, dtype):
    whole = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    path = tmp_path / f"out{ending}"
    sink = written(path, whole)
    assert not path.exists()
    sink.finish()
    sink.close()
    np.testing.assert_array_equal(loaded(path).reshape(shape), whole)


def test_zarr_shards_have_one_writer(tmp_path):
    """A shard is a band of whole chunks across all columns."""
    pytest.importorskip("zarr")
    whole = np.zeros((1, 600, 520), np.uint8)
    sink = written(tmp_path / "out.zarr", whole)
    sink.finish()
    import zarr

    array = zarr.open(str(tmp_path / "out.zarr"))
    assert array.chunks == (1, 256, 256)
    assert array.shards == (1, 256, 768)


def test_geotiff_keeps_its_place(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    place = {
        "crs": rasterio.CRS.from_epsg(32632),
        "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6),
        "size": (60, 80),
    }
    folder = working_folder(tmp_path / "out.tif")
    folder.mkdir()
    whole = np.arange(30 * 40, dtype=np.int16).reshape(1, 30, 40)
    sink = FileSink(tmp_path / "out.tif", whole.shape, whole.dtype, place, False, folder / "rows.npy")
    sink.write(((0, 30), (0, 40)), whole)
    sink.finish()
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.crs == place["crs"]
        assert file.transform == rasterio.Affine(20, 0, 5e5, 0, -20, 5e6)  # half as many pixels, twice as large
        np.testing.assert_array_equal(file.read(), whole)


def test_geotiff_tags_without_rasterio(tmp_path):
    """The tags are carried over as they stand, pixels twice as large."""
    tifffile = pytest.importorskip("tifffile")
    tags = {33550: (12, 3, (10.0, 10.0, 0.0)), 33922: (12, 6, (0.0, 0.0, 0.0, 5e5, 5e6, 0.0))}
    folder = working_folder(tmp_path / "out.tif")
    folder.mkdir()
    place = {"tags": tags, "size": (60, 80)}
    sink = FileSink(tmp_path / "out.tif", (1, 30, 40), np.uint8, place, False, folder / "rows.npy")
    sink.finish()
    with tifffile.TiffFile(tmp_path / "out.tif") as file:
        assert file.pages[0].tags[33550].value == (20.0, 20.0, 0.0)
        assert file.pages[0].tags[33922].value == (0.0, 0.0, 0.0, 5e5, 5e6, 0.0)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.data())
def test_rows_at_their_places(tmp_path, data):
    """Boxes of any rank, read back and in the file's own layout."""
    rank = data.draw(st.integers(1, 3))
    shape = (data.draw(st.integers(1, 3)), *(data.draw(st.integers(1, 7)) for _ in range(rank)))
    whole = np.random.default_rng(0).normal(size=shape)
    file = RowFile(tmp_path / "rows", shape, np.float64, b"head")
    expected = np.zeros(shape)
    for _ in range(4):
        box = tuple(tuple(sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))) for n in shape[1:])
        cut = (slice(None), *(slice(lo, hi) for lo, hi in box))
        file.write(box, whole[cut])
        expected[cut] = whole[cut]
        np.testing.assert_array_equal(file.read(box), whole[cut])
    file.close()
    assert (tmp_path / "rows").read_bytes() == b"head" + expected.tobytes()


# ------------------------------------------------------------------------------- bad places


def test_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="must end in one of"):
        check_sink(tmp_path / "out.gif", False)
    with pytest.raises(InputError, match="no folder"):
        check_sink(tmp_path / "missing" / "out.npy", False)
    (tmp_path / "out.npy").write_bytes(b"")
    with pytest.raises(InputError, match=r"is there already.*--overwrite"):
        check_sink(tmp_path / "out.npy", False)
    assert check_sink(tmp_path / "out.npy", True) == tmp_path / "out.npy"
    monkeypatch.setattr(sinks.os, "access", lambda *_: False)
    with pytest.raises(InputError, match="read-only"):
        check_sink(tmp_path / "new.npy", False)


def test_missing_extra(tmp_path, monkeypatch):
    from ranger_nn.io import extras

    def gone(name):
        raise ImportError(name)

    monkeypatch.setattr(extras.importlib, "import_module", gone)
    with pytest.raises(MissingExtraError, match=r"pip install 'ranger-nn\[zarr\]'"):
        check_sink(tmp_path / "out.zarr", False)


# ------------------------------------------------------------------------------- the journal


def test_journal(tmp_path):
    journal = Journal(tmp_path, {"model": {"weights": "a"}, "plan": 1})
    assert not journal.resume()
    journal.done, journal.tally = 3, {"mean": [0.1]}
    journal.save({7: [np.arange(3.0), np.zeros((2, 2))], 9: [np.ones(1)]})
    journal.done = 4
    journal.save({9: [np.ones(1)], 11: [np.full(2, 5)]})
    again = Journal(tmp_path, {"model": {"weights": "a"}, "plan": 1})
    assert again.resume()
    assert (again.done, again.tally) == (4, {"mean": [0.1]})
    states = again.states()
    assert sorted(states) == [9, 11]
    np.testing.assert_array_equal(states[11][0], [5, 5])
    assert sorted(os.listdir(tmp_path)) == ["journal.json", "state-11.npz", "state-9.npz"]
    with pytest.raises(InputError, match=r"another model, so it cannot go on \(model: weights was a, is b\)"):
        Journal(tmp_path, {"model": {"weights": "b"}, "plan": 1}).resume()
    (tmp_path / "journal.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        Journal(tmp_path, {}).resume()
