"""Images are read as they are, written all or nothing, and refused by size before they are decoded."""

from __future__ import annotations

import os
import stat
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

from ranger_nn.errors import InputError, MissingExtraError
from ranger_nn.io import image as image_module
from ranger_nn.io.image import check_writable, read_image, write_image


def pixels(shape, dtype, seed=0):
    random = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.floating):
        return random.random(shape).astype(dtype)
    return random.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("grey.png", (1, 7, 5), np.uint8),
        ("deep.png", (1, 7, 5), np.uint16),
        ("rgb.png", (3, 7, 5), np.uint8),
        ("rgba.png", (4, 7, 5), np.uint8),
        ("grey.tif", (1, 7, 5), np.uint8),
        ("rgb.tif", (3, 7, 5), np.uint8),
        ("rgb16.tiff", (3, 7, 5), np.uint16),
        ("float.tif", (1, 7, 5), np.float32),
        ("float3.tif", (3, 7, 5), np.float32),
        ("many.tif", (17, 7, 5), np.float64),
        ("two.tif", (2, 7, 5), np.int16),
        ("volume.tif", (2, 3, 7, 5), np.float32),
        ("array.npy", (2, 3, 7, 5), np.float64),
        ("vector.npy", (9,), np.int64),
    ],
)
def test_what_is_written_reads_back(tmp_path, name, shape, dtype):
    array = pixels(shape, dtype)
    write_image(tmp_path / name, array)
    back = read_image(tmp_path / name)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)
    assert os.listdir(tmp_path) == [name]


def test_a_batch_of_one_is_one_picture(tmp_path):
    array = pixels((1, 3, 7, 5), np.uint8)
    write_image(tmp_path / "a.png", array)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), array[0])


def test_rows_and_columns_alone(tmp_path):
    array = pixels((7, 5), np.uint8)
    for name in ("a.png", "a.tif"):
        write_image(tmp_path / name, array)
        np.testing.assert_array_equal(read_image(tmp_path / name), array[np.newaxis])


def test_floating_point_png_is_clipped_and_scaled(tmp_path):
    array = np.array([[-1.0, 0.0, 0.5, 1.0, 2.0, np.nan, np.inf, -np.inf]])
    write_image(tmp_path / "a.png", array)
    assert read_image(tmp_path / "a.png").tolist() == [[[0, 0, 128, 255, 255, 0, 255, 0]]]


def test_bool_becomes_black_and_white(tmp_path):
    array = np.array([[True, False]])
    for name in ("a.png", "a.tif"):
        write_image(tmp_path / name, array)
        assert read_image(tmp_path / name).tolist() == [[[255, 0]]]


def test_half_precision_tiff_is_widened(tmp_path):
    array = pixels((1, 7, 5), np.float16)
    write_image(tmp_path / "a.tif", array)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), array.astype(np.float32))


def test_jpeg_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(np.zeros((4, 9, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (3, 9, 4)


def test_palette_and_single_bits_are_unfolded(tmp_path):
    Image.fromarray(pixels((6, 4, 3), np.uint8)).quantize(8).save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").shape == (3, 6, 4)
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert read_image(tmp_path / "bits.png").tolist() == [[[255, 0]]]


def test_pages_of_a_tiff_are_a_volume(tmp_path):
    array = pixels((5, 7, 6), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", metadata={"axes": "ZYX"})
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), array[np.newaxis])


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("a.png", (2, 7, 5)),
        ("a.png", (2, 3, 7, 5)),
        ("a.png", (9,)),
        ("a.png", (3, 0, 5)),
        ("a.tif", (2, 2, 2, 2, 2)),
    ],
)
def test_a_shape_that_the_format_cannot_hold(tmp_path, name, shape):
    with pytest.raises(InputError, match=r"\.npy"):
        write_image(tmp_path / name, np.zeros(shape, np.float32))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("name", "dtype"), [("a.png", np.int32), ("a.tif", np.complex64)])
def test_a_type_that_the_format_cannot_hold(tmp_path, name, dtype):
    with pytest.raises(InputError, match=r"\.npy"):
        write_image(tmp_path / name, np.zeros((3, 4, 4), dtype))


@pytest.mark.parametrize("name", ["a.gif", "a", "a.npz", "a.jpg"])
def test_a_format_that_is_not_written(tmp_path, name):
    with pytest.raises(InputError, match="must end in one of"):
        check_writable(tmp_path / name)


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        check_writable(tmp_path / "missing" / "a.png")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_writable(tmp_path / "b.png")


def test_no_such_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.npy", "a.jpg"])
@pytest.mark.parametrize("content", [b"", b"not an image at all", b"\x89PNG\r\n\x1a\n\x00\x00"])
def test_a_damaged_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        read_image(tmp_path / name)


def test_a_cut_off_png(tmp_path):
    write_image(tmp_path / "a.png", pixels((3, 64, 64), np.uint8))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged"):
        read_image(tmp_path / "a.png")


def test_pickled_objects_are_not_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="Python objects"):
        read_image(tmp_path / "a.npy")


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.npy"])
def test_size_is_checked_before_decoding(tmp_path, name, monkeypatch):
    write_image(tmp_path / name, np.zeros((3, 50, 40), np.uint8))
    assert read_image(tmp_path / name, memory_limit=6000).nbytes == 6000
    monkeypatch.setattr(np, "asarray", None)
    with pytest.raises(InputError, match="6000 bytes when decoded; the limit is 5999"):
        read_image(tmp_path / name, memory_limit=5999)


def test_pillows_own_limit_is_left_as_found(tmp_path):
    write_image(tmp_path / "a.png", np.zeros((3, 50, 40), np.uint8))
    before = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = 100  # 50 x 40 would be a "bomb" to Pillow
        read_image(tmp_path / "a.png")
        assert Image.MAX_IMAGE_PIXELS == 100
    finally:
        Image.MAX_IMAGE_PIXELS = before


@pytest.mark.parametrize(("module", "name"), [("PIL.Image", "a.png"), ("tifffile", "a.tif")])
def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ranger-nn\[images\]'"):
        write_image(tmp_path / name, np.zeros((4, 4), np.uint8))
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(MissingExtraError):
        read_image(tmp_path / name)


# --------------------------------------------------------------------------------- all or nothing


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.npy"])
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, name, interruption):
    old = pixels((3, 8, 8), np.uint8, seed=1)
    write_image(tmp_path / name, old)

    def interrupted(descriptor):
        raise interruption("while writing")

    monkeypatch.setattr("ranger_nn.io.atomic.os.fsync", interrupted)
    with pytest.raises(interruption):
        write_image(tmp_path / name, pixels((3, 8, 8), np.uint8, seed=2))
    assert os.listdir(tmp_path) == [name]
    np.testing.assert_array_equal(read_image(tmp_path / name), old)


def test_an_interruption_before_the_first_file(tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        arguments[0].write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(image_module.np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_image(tmp_path / "a.npy", np.zeros(3))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    (tmp_path / "ordinary").touch()
    write_image(tmp_path / "a.npy", np.zeros(3))
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "a.npy")}
    assert len(modes) == 1
