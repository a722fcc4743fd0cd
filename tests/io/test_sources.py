"""Every kind of input gives the pixels that its own library gives, region by region, each byte decoded once."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranger_nn.errors import InputError, MissingExtraError
from ranger_nn.io import extras
from ranger_nn.io.arrays import ArraySource
from ranger_nn.io.protocol import BadRegionError
from ranger_nn.io.reader import Reader
from ranger_nn.io.sources import open_source

tifffile = pytest.importorskip("tifffile")
BOXES = [((0, 100), (0, 90)), ((10, 75), (0, 90)), ((63, 65), (31, 90)), ((99, 100), (89, 90))]


def picture(channels=3, rows=100, columns=90, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 250, (channels, rows, columns)).astype(dtype)


def check(source, whole):
    """Shape and regions."""
    assert source.shape == whole.shape
    for (a, b), (c, d) in BOXES:
        given = source.read(((a, b), (c, d)))
        assert given.dtype == whole.dtype
        np.testing.assert_array_equal(given, whole[:, a:b, c:d])
    reader = Reader(source)
    for top in range(0, 100, 7):
        rows = (top, min(top + 7, 100))
        np.testing.assert_array_equal(reader.read((rows, (0, 90))), whole[:, slice(*rows)])
    assert reader.taken == whole.nbytes
    source.close()


@pytest.mark.parametrize("layout", ["interleaved", "separate"])
@pytest.mark.parametrize("tile", [None, (32, 48)])
@pytest.mark.parametrize("compression", [None, "zlib", "packbits"])
@pytest.mark.parametrize("bigtiff", [False, True])
def test_tiff(tmp_path, layout, tile, compression, bigtiff):
    whole = picture()
    pixels = whole if layout == "separate" else whole.transpose(1, 2, 0)
    if compression == "packbits":
        pytest.importorskip("imagecodecs")
    tifffile.imwrite(
        tmp_path / "a.tif", pixels, tile=tile, compression=compression, photometric="rgb", bigtiff=bigtiff,
        planarconfig="separate" if layout == "separate" else "contig", rowsperstrip=None if tile else 11,
    )  # fmt: skip
    check(open_source(tmp_path / "a.tif"), whole)


@pytest.mark.parametrize("axes", ["CYX", "ZYX"])
@pytest.mark.parametrize("ome", [False, True])
def test_pages(tmp_path, axes, ome):
    whole = picture(5, dtype=np.uint16)
    path = tmp_path / ("a.ome.tif" if ome else "a.tif")
    tifffile.imwrite(path, whole, tile=(32, 32), photometric="minisblack", metadata={"axes": axes}, ome=ome)
    source = open_source(path)
    if axes == "CYX":
        check(source, whole)
    else:
        assert source.shape == (1, 5, 100, 90)
        np.testing.assert_array_equal(source.read(((1, 4), (10, 70), (3, 90))), whole[None, 1:4, 10:70, 3:90])


def test_pyramid(tmp_path):
    whole = picture().transpose(1, 2, 0)
    with tifffile.TiffWriter(tmp_path / "a.tif") as out:
        out.write(whole, tile=(32, 32), photometric="rgb", subifds=1)
        out.write(whole[::2, ::2], tile=(32, 32), photometric="rgb", subfiletype=1)
    source = open_source(tmp_path / "a.tif", level=1)
    np.testing.assert_array_equal(source.read(((5, 50), (0, 45))), whole[::2, ::2].transpose(2, 0, 1)[:, 5:50])
    with pytest.raises(InputError, match="2 pyramid levels, 0 to 1; got 2"):
        open_source(tmp_path / "a.tif", level=2)


def test_a_level_lies_where_the_whole_does(tmp_path):
    """The tags speak of the pixels of level 0, twice as many."""
    whole = picture().transpose(1, 2, 0)
    tags = [(33550, 12, 3, (10.0, 10.0, 0.0), True), (33922, 12, 6, (0.0, 0.0, 0.0, 5e5, 5e6, 0.0), True)]
    with tifffile.TiffWriter(tmp_path / "a.tif") as out:
        out.write(whole, tile=(32, 32), photometric="rgb", subifds=1, extratags=tags)
        out.write(whole[::2, ::2], tile=(32, 32), photometric="rgb", subfiletype=1)
    source = open_source(tmp_path / "a.tif", level=1)
    assert source.shape == (3, 50, 45)
    assert source.geography()["size"] == (100, 90)


def test_an_array_of_a_group_by_its_path(tmp_path):
    zarr = pytest.importorskip("zarr")
    zarr.open_group(tmp_path / "g.zarr", mode="w").create_array("red", shape=(100, 90), dtype="uint8")[:] = picture()[0]
    check(open_source(tmp_path / "g.zarr" / "red"), picture()[:1])


@pytest.mark.parametrize("name", ["x" * 300 + ".npy", "a\0.npy", "x" * 300])
def test_names_that_are_none(name):
    with pytest.raises(InputError, match="cannot read"):
        open_source(name)


def test_geotiff(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    whole = picture(4, dtype=np.int16)
    place = {"crs": "EPSG:32632", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", count=4, height=100, width=90, dtype="int16", tiled=True,
        blockxsize=32, blockysize=32, compress="lzw", **place,
    ) as out:  # fmt: skip
        out.write(whole)
    source = open_source(tmp_path / "a.tif")
    assert source.geography()["crs"] == rasterio.CRS.from_epsg(32632)
    check(source, whole)


def test_slide(tmp_path):
    pytest.importorskip("openslide")
    whole = picture(3, 600, 520)
    tifffile.imwrite(tmp_path / "a.tif", whole.transpose(1, 2, 0), tile=(256, 256), photometric="rgb")
    (tmp_path / "a.tif").rename(tmp_path / "a.svs")  # a generic tiled TIFF: openslide looks inside
    source = open_source(tmp_path / "a.svs")
    assert source.shape == whole.shape
    np.testing.assert_array_equal(source.read(((100, 300), (7, 520))), whole[:, 100:300, 7:520])


def test_zarr(tmp_path):
    zarr = pytest.importorskip("zarr")
    whole = picture()
    array = zarr.create_array(store=str(tmp_path / "a.zarr"), shape=whole.shape, dtype="uint8", chunks=(1, 32, 32))
    array[:] = whole
    check(open_source(tmp_path / "a.zarr"), whole)
    check(open_source(array), whole)
    group = zarr.open_group(str(tmp_path / "g.zarr"), mode="w")
    group.create_array("red", shape=(4, 4), dtype="uint8")
    with pytest.raises(InputError, match="group with the arrays red"):
        open_source(tmp_path / "g.zarr")


def test_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")
    whole = picture()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("scan/pixels", data=whole.transpose(1, 2, 0), chunks=(32, 32, 3), compression="gzip")
    check(open_source(tmp_path / "a.h5"), whole)
    check(open_source(f"{tmp_path}/a.h5:scan/pixels"), whole)
    with pytest.raises(InputError, match="has the data sets scan/pixels"):
        open_source(f"{tmp_path}/a.h5:other")


def test_links_to_other_files_are_not_followed(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = picture()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["link"] = h5py.ExternalLink("secret.h5", "x")
        file.create_virtual_dataset("virtual", _virtual(h5py))
    with pytest.raises(InputError, match="data sets"):
        open_source(f"{tmp_path}/a.h5:link")
    with pytest.raises(InputError, match="lives in other files"):
        open_source(f"{tmp_path}/a.h5:virtual")


def _virtual(h5py):
    layout = h5py.VirtualLayout(shape=(3, 100, 90), dtype="u1")
    layout[:] = h5py.VirtualSource("secret.h5", "x", shape=(3, 100, 90))
    return layout


def test_arrays(tmp_path):
    whole = picture()
    check(open_source(whole), whole)
    check(open_source(whole.transpose(1, 2, 0)), whole)
    check(open_source(whole.transpose(2, 0, 1), axes="XCY"), whole)
    check(open_source(whole[0]), whole[:1])
    np.save(tmp_path / "a.npy", whole[None])
    source = open_source(tmp_path / "a.npy")
    assert source.batched
    check(source, whole)
    dask = pytest.importorskip("dask.array")
    check(open_source(dask.from_array(whole, chunks=(3, 32, 90))), whole)


def test_png(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    whole = picture()
    pillow.fromarray(whole.transpose(1, 2, 0)).save(tmp_path / "a.png")
    source = open_source(tmp_path / "a.png")
    assert source.resident == whole.nbytes
    check(source, whole)
    with pytest.raises(InputError, match="the limit is 1000 bytes"):
        open_source(tmp_path / "a.png", limit=1000)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_rows_once(data):
    """Rows in order, chunks of any size: the numbers, and each byte decoded once."""
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 20))
    chunks = (data.draw(st.integers(2, 12)), data.draw(st.integers(2, 12)))
    whole = np.arange(2 * rows * columns, dtype=np.int32).reshape(2, rows, columns)
    source = ArraySource(whole)
    source.chunks = chunks
    reader = Reader(source)
    top = 0
    while top < rows:
        bottom = min(rows, top + data.draw(st.integers(1, 9)))
        np.testing.assert_array_equal(reader.read(((top, bottom), (0, columns))), whole[:, top:bottom])
        top = bottom
    assert reader.taken == whole.nbytes
    assert sum(a.nbytes for a in reader._kept.values()) <= reader.held


# ------------------------------------------------------------------------------- bad input


def test_unknown(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        open_source(tmp_path / "a.tif")
    (tmp_path / "a.xyz").write_bytes(b"")
    with pytest.raises(InputError, match="must end in one of"):
        open_source(tmp_path / "a.xyz")
    with pytest.raises(InputError, match="no shape, dtype and slicing"):
        open_source(7)
    for ending in ("tif", "npy", "h5"):
        (tmp_path / f"b.{ending}").write_bytes(b"nothing of the kind")
        with pytest.raises(InputError, match="cannot read"):
            open_source(tmp_path / f"b.{ending}")


@pytest.mark.parametrize(
    ("shape", "axes", "text"),
    [
        ((2, 3, 8, 8), None, "batch of 2"),
        ((1, 2, 3, 8, 8), None, "name its axes"),
        ((8, 8), "YZ", "with Y and X"),
        ((8, 8, 3), "YX", "do not name the axes"),
        ((8, 8, 3), "YXQ", "one letter each of N C Z Y X"),
    ],
)
def test_axes(shape, axes, text):
    with pytest.raises(InputError, match=text):
        open_source(np.zeros(shape), axes=axes)


def test_no_pickle(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot read"):
        open_source(tmp_path / "a.npy")


def test_truncated_tiff(tmp_path):
    whole = picture(rows=512, columns=512)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, whole.transpose(1, 2, 0), tile=(64, 64), photometric="rgb")
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    source = open_source(path)
    source.read(((0, 64), (0, 64)))
    with pytest.raises(BadRegionError, match=r"the tile at Y 448, X 0.*truncated"):
        source.read(((500, 512), (0, 10)))
    reader = Reader(source, skip_bad=True)
    assert not reader.read(((500, 512), (0, 10))).any()
    assert reader.bad == [((448, 512), (0, 64))]


def _with_tile(tmp_path, data):
    """A TIFF of one deflated tile, replaced by `data`."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((64, 64), np.uint8), tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(path, mode="r+b") as file:
        page = file.pages[0]
        counts, offsets = page.tags["TileByteCounts"], page.tags["TileOffsets"]
        end = path.stat().st_size
        counts.overwrite(len(data))
        offsets.overwrite(end)
    with open(path, "ab") as out:
        out.write(data)
    return path


def test_decompression_bomb(tmp_path):
    path = _with_tile(tmp_path, zlib.compress(bytes(200 << 20), 9))
    with pytest.raises(BadRegionError, match="more than the 4096 bytes that its tile holds: refused"):
        open_source(path).read(((0, 64), (0, 64)))


def test_damaged_tile(tmp_path):
    path = _with_tile(tmp_path, b"\x00" * 500)
    with pytest.raises(BadRegionError, match="cannot be decoded"):
        open_source(path).read(((0, 64), (0, 64)))


def test_absurd_header(tmp_path):
    """A single strip that would unfold to more than the memory."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, shape=(60000, 60000), dtype=np.uint8, rowsperstrip=60000, compression=None)
    with pytest.raises(
        InputError, match=r"pieces of 60000x60000.*3600000000 bytes.*allowed for reading is 1000000 bytes"
    ):
        Reader(open_source(path), 1_000_000)


def test_missing_extra(tmp_path, monkeypatch):
    def gone(name):
        raise ImportError(name)

    monkeypatch.setattr(extras.importlib, "import_module", gone)
    (tmp_path / "a.h5").write_bytes(b"")
    with pytest.raises(MissingExtraError, match=r"pip install 'ranger-nn\[hdf5\]'"):
        open_source(tmp_path / "a.h5")


@pytest.mark.parametrize("crs", [None, "EPSG:32632"])
@pytest.mark.parametrize("compress", ["deflate", "zstd"])
@pytest.mark.filterwarnings("ignore")
def test_masks_and_scales_are_told(tmp_path, crs, compress):
    """By every reader, and only where there are any."""
    rasterio = pytest.importorskip("rasterio")
    pixels = np.arange(3 * 40 * 30, dtype=np.uint16).reshape(3, 40, 30)
    options = {
        "driver": "GTiff",
        "count": 3,
        "height": 40,
        "width": 30,
        "dtype": "uint16",
        "crs": crs,
        "compress": compress,
    }
    for name in ("plain", "masked", "scaled", "shifted"):
        with (
            rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
            rasterio.open(tmp_path / f"{name}.tif", "w", **options) as file,
        ):
            file.write(pixels)
            if name == "masked":
                file.write_mask(pixels[0] > 100)
            if name == "scaled":
                file.scales = (0.1, 0.1, 2)
            if name == "shifted":
                file.offsets = (0, 0, -3)
    found = {}
    for name in ("plain", "masked", "scaled", "shifted"):
        source = open_source(tmp_path / f"{name}.tif")
        np.testing.assert_array_equal(source.read(((0, 40), (0, 30))), pixels)
        found[name] = " ".join(source.notes())
        source.close()
    assert found["plain"] == ""
    assert "holds a mask that says which of its pixels are there; all were taken" in found["masked"]
    assert "0.1" in found["scaled"] and "taken as they are stored" in found["scaled"]
    assert "-3" in found["shifted"] and "taken as they are stored" in found["shifted"]
