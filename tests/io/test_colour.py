"""A TIFF gives what Pillow makes of it, and what a PNG of the same picture gives, whole and by regions; or it is refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from ranger_nn.errors import InputError
from ranger_nn.io.image import read_image
from ranger_nn.io.sources import open_source

tifffile = pytest.importorskip("tifffile")
Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")
RGB = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
GREY = RGB[..., 0]
FOUR = np.dstack([RGB, GREY])
TABLE = np.random.default_rng(1).integers(0, 1 << 16, (3, 256)).astype(np.uint16)


def by_pillow(path):
    image = ImageOps.exif_transpose(Image.open(path))
    mode = {"P": "RGB", "CMYK": "RGB", "1": "L", "YCbCr": "RGB"}.get(image.mode, image.mode)
    pixels = np.asarray(image.convert(mode) if mode != image.mode else image)
    return pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def check(path, expected):
    """Read whole, as one region, and as regions of seven rows and eleven columns."""
    np.testing.assert_array_equal(read_image(path), expected)
    source = open_source(path)
    assert source.shape == expected.shape
    assert source.dtype == expected.dtype
    rows, columns = expected.shape[1:]
    for top in range(0, rows, 7):
        for left in range(0, columns, 11):
            box = ((top, min(top + 7, rows)), (left, min(left + 11, columns)))
            np.testing.assert_array_equal(source.read(box), expected[:, slice(*box[0]), slice(*box[1])])
    source.close()


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("mode", ["P", "1", "L", "LA", "RGBA", "CMYK", "F", "I"])
def test_modes_of_pillow(tmp_path, mode, compression):
    Image.fromarray(RGB).convert(mode).save(tmp_path / "a.tif", compression=compression)
    check(tmp_path / "a.tif", by_pillow(tmp_path / "a.tif"))


@pytest.mark.parametrize("mode", ["P", "1", "L", "LA", "RGBA"])
def test_as_in_png(tmp_path, mode):
    for ending in ("tif", "png"):
        Image.fromarray(RGB).convert(mode).save(tmp_path / f"a.{ending}")
    check(tmp_path / "a.tif", read_image(tmp_path / "a.png"))


@pytest.mark.parametrize("layout", ["rgb", "tiles", "separate"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, orientation, layout):
    pixels = RGB.transpose(2, 0, 1) if layout == "separate" else RGB
    tifffile.imwrite(
        tmp_path / "a.tif", pixels, photometric="rgb", tile=(16, 16) if layout == "tiles" else None, rowsperstrip=9,
        planarconfig="separate" if layout == "separate" else None, extratags=[(274, 3, 1, orientation, True)],
    )  # fmt: skip
    check(tmp_path / "a.tif", by_pillow(tmp_path / "a.tif"))


@pytest.mark.parametrize(
    ("pixels", "options"),
    [
        (GREY, {"photometric": "miniswhite"}),
        (GREY > 100, {"photometric": "miniswhite"}),
        (GREY, {"photometric": "palette", "colormap": TABLE, "tile": (16, 16)}),
        (FOUR, {"photometric": "rgb", "extrasamples": ["assocalpha"]}),
        (FOUR, {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
        (FOUR, {"photometric": "separated", "tile": (16, 16)}),
        (FOUR.transpose(2, 0, 1), {"photometric": "separated", "planarconfig": "separate"}),
        (RGB, {"photometric": "ycbcr", "compression": "jpeg"}),
    ],
)
def test_headers(tmp_path, pixels, options):
    if options.get("compression"):
        pytest.importorskip("imagecodecs")
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    check(tmp_path / "a.tif", by_pillow(tmp_path / "a.tif"))


def test_white_is_small_in_sixteen_bits(tmp_path):
    """Here Pillow itself forgets it."""
    tifffile.imwrite(tmp_path / "a.tif", GREY.astype(np.uint16) * 200, photometric="miniswhite")
    check(tmp_path / "a.tif", 65535 - GREY[np.newaxis].astype(np.uint16) * 200)


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.filterwarnings("ignore")
def test_few_bits(tmp_path, bits, photometric):
    values, each = GREY[:, :24] % 2**bits, 8 // bits
    packed = sum(values[:, k::each] << (8 - bits * (k + 1)) for k in range(each)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", packed, photometric=photometric, rowsperstrip=40, metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as file:
        file.pages[0].tags["ImageWidth"].overwrite(24)
        file.pages[0].tags["BitsPerSample"].overwrite(bits)
    check(tmp_path / "a.tif", by_pillow(tmp_path / "a.tif"))


@pytest.mark.parametrize(
    ("pixels", "options", "text"),
    [
        (RGB, {"photometric": "cielab"}, "holds CIE Lab"),
        (RGB, {"photometric": "ycbcr"}, "holds YCbCr without JPEG"),
        (GREY, {"photometric": "cfa"}, "a raw mosaic"),
        (GREY.astype(np.float32), {"photometric": "miniswhite"}, "smallest numbers are white"),
        (FOUR.astype(np.uint16), {"photometric": "separated"}, "inks other than four of 8 bits"),
        (FOUR, {"photometric": "separated", "extratags": [(332, 3, 1, 2, True)]}, "inks other than"),
        (FOUR.astype(np.uint16), {"photometric": "rgb", "extrasamples": ["assocalpha"]}, "multiplied by alpha"),
        (
            np.stack([GREY, GREY]),
            {"photometric": "palette", "colormap": TABLE, "metadata": {"axes": "ZYX"}},
            "2 pages with a palette",
        ),
    ],
)
def test_refused(tmp_path, pixels, options, text):
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    for read in (read_image, open_source):
        with pytest.raises(InputError, match=text):
            read(tmp_path / "a.tif")


def test_geotiff(tmp_path):
    """The same colours through rasterio; a picture on the earth is not turned."""
    rasterio = pytest.importorskip("rasterio")
    place = {"crs": "EPSG:32632", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6), "dtype": "uint8"}
    options = {"driver": "GTiff", "count": 1, "height": 40, "width": 30, **place}
    with rasterio.open(tmp_path / "white.tif", "w", photometric="miniswhite", **options) as file:
        file.write(GREY[np.newaxis])
    check(tmp_path / "white.tif", 255 - GREY[np.newaxis])
    with rasterio.open(tmp_path / "palette.tif", "w", photometric="palette", **options) as file:
        file.write(GREY[np.newaxis])
        file.write_colormap(1, {i: (i, 255 - i, i // 2, 255) for i in range(256)})
    check(tmp_path / "palette.tif", np.stack([GREY, 255 - GREY, GREY // 2]))
    tags = [(33550, 12, 3, (10.0, 10.0, 0.0), True), (274, 3, 1, 6, True)]
    tifffile.imwrite(tmp_path / "turned.tif", RGB, photometric="rgb", extratags=tags)
    with pytest.raises(InputError, match=r"orientation 6 and a place on the earth"):
        open_source(tmp_path / "turned.tif")


@pytest.mark.parametrize("compression", ["zstd", "webp"])
def test_what_only_rasterio_decodes(tmp_path, compression):
    rasterio = pytest.importorskip("rasterio")
    options = {"compress": compression} | ({"webp_lossless": True} if compression == "webp" else {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(
            tmp_path / "a.tif", "w", driver="GTiff", count=3, height=40, width=30, dtype="uint8", **options
        ) as file:
            file.write(RGB.transpose(2, 0, 1))
    source = open_source(tmp_path / "a.tif")
    np.testing.assert_array_equal(source.read(((0, 40), (0, 30))), RGB.transpose(2, 0, 1))


def test_what_only_tifffile_opens(tmp_path):
    """Pages that are depth: rasterio would give the first one."""
    pytest.importorskip("rasterio")
    tags = [(33550, 12, 3, (10.0, 10.0, 0.0), True)]
    volume = np.stack([GREY, GREY // 2])
    tifffile.imwrite(
        tmp_path / "a.tif", volume, photometric="minisblack", metadata={"axes": "ZYX"}, extratags=tags, tile=(16, 16)
    )
    source = open_source(tmp_path / "a.tif")
    np.testing.assert_array_equal(source.read(((0, 2), (0, 40), (0, 30))), volume[np.newaxis])


@pytest.mark.parametrize("tag", ["TileWidth", "TileLength", "ImageWidth", "ImageLength", "SamplesPerPixel"])
def test_lengths_of_zero(tmp_path, tag):
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb", tile=(16, 16))
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as file:
        file.pages[0].tags[tag].overwrite(0)
    for read in (read_image, open_source):
        with pytest.raises(InputError, match="damaged"):
            read(tmp_path / "a.tif")


def test_tiles_left_out_hold_no_data(tmp_path):
    """As GDAL reads them."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, GREY, tile=(16, 16), extratags=[(42113, 2, 0, "17", True)])
    with tifffile.TiffFile(path, mode="r+b") as file:
        counts = file.pages[0].tags["TileByteCounts"]
        counts.overwrite((0, *counts.value[1:]))
    expected = GREY[np.newaxis].copy()
    expected[:, :16, :16] = 17
    source = open_source(path)
    np.testing.assert_array_equal(source.read(((0, 40), (0, 30))), expected)
    assert "17 stands for no data; it was taken as a number" in source.notes()[0]


INKS = FOUR.transpose(2, 0, 1)
KINDS = {
    "grey": ("minisblack", GREY[np.newaxis], {}),
    "grey of 16 bits": ("minisblack", GREY[np.newaxis].astype(np.uint16) * 200, {}),
    "grey of 12 bits": ("minisblack", GREY[np.newaxis].astype(np.uint16) * 16, {"nbits": 12}),
    "grey of 7 bits": ("minisblack", GREY[np.newaxis] // 2, {"nbits": 7}),
    "grey of 1 bit": ("minisblack", GREY[np.newaxis] // 128, {"nbits": 1}),
    "grey of 4 bits": ("minisblack", GREY[np.newaxis] // 16, {"nbits": 4}),
    "white": ("miniswhite", GREY[np.newaxis], {}),
    "white of 16 bits": ("miniswhite", GREY[np.newaxis].astype(np.uint16) * 200, {}),
    "white of 1 bit": ("miniswhite", GREY[np.newaxis] // 128, {"nbits": 1}),
    "white of 12 bits": ("miniswhite", GREY[np.newaxis].astype(np.uint16) * 16, {"nbits": 12}),
    "colours": ("rgb", RGB.transpose(2, 0, 1), {}),
    "colours in planes": ("rgb", RGB.transpose(2, 0, 1), {"interleave": "band"}),
    "colours of 14 bits": ("rgb", RGB.transpose(2, 0, 1).astype(np.uint16) * 64, {"nbits": 14}),
    "alpha": ("rgb", INKS, {"alpha": "unspecified"}),
    "premultiplied": ("rgb", INKS, {"alpha": "premultiplied"}),
    "palette": ("palette", GREY[np.newaxis], {}),
    "palette of 4 bits": ("palette", GREY[np.newaxis] // 16, {"nbits": 4}),
    "inks": ("cmyk", INKS, {}),
    "inks in planes": ("cmyk", INKS, {"interleave": "band"}),
    "floating point": ("minisblack", GREY[np.newaxis].astype(np.float32) / 7, {}),
    "signed": ("minisblack", GREY[np.newaxis].astype(np.int16) - 99, {}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_the_same_by_every_reader(tmp_path, kind):
    """Where a picture lies on the earth and what it is compressed by changes neither its numbers nor their depth."""
    rasterio = pytest.importorskip("rasterio")
    photometric, pixels, options = KINDS[kind]
    found = []
    for crs, compress in ((None, "deflate"), ("EPSG:32632", "deflate"), (None, "zstd"), ("EPSG:32632", "zstd")):
        path = tmp_path / f"{compress}-{crs is None}.tif"
        with rasterio.open(
            path, "w", driver="GTiff", count=len(pixels), height=40, width=30, dtype=pixels.dtype, crs=crs,
            compress=compress, photometric=photometric, tiled=True, blockxsize=16, blockysize=16, **options,
        ) as file:  # fmt: skip
            file.write(pixels)
            if photometric == "palette":
                file.write_colormap(1, {i: (i, 255 - i, i // 2, 255) for i in range(16 if options else 256)})
        source = open_source(path)
        found.append((source.read(((0, 40), (0, 30))), source.depth))
        np.testing.assert_array_equal(source.read(((5, 23), (9, 30))), found[-1][0][:, 5:23, 9:30])
        source.close()
    assert found[0][1] == (options.get("nbits") if options.get("nbits", 8) in (7, 12, 14) else None)
    for numbers, depth in found[1:]:
        np.testing.assert_array_equal(numbers, found[0][0])
        assert (numbers.dtype, depth) == (found[0][0].dtype, found[0][1])
    if photometric == "cmyk":
        expected = Image.fromarray(FOUR, mode="CMYK").convert("RGB")
        np.testing.assert_array_equal(found[0][0], np.asarray(expected).transpose(2, 0, 1))
