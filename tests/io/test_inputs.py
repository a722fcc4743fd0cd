"""The INPUT of the command line: a shape, an image, or an array."""

from __future__ import annotations

import numpy as np
import pytest

from ranger_nn.errors import InputError
from ranger_nn.io.image import write_image
from ranger_nn.io.inputs import load_input, parse_input


@pytest.mark.parametrize(
    ("text", "shape"),
    [("1x3x4096x4096", (1, 3, 4096, 4096)), ("2X5", (2, 5)), ("0x3x8x8", (0, 3, 8, 8))],
)
def test_shapes(text, shape):
    assert parse_input(text) == shape


def test_a_file_comes_before_a_shape(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_input("3x4") == (3, 4)
    (tmp_path / "3x4").touch()
    assert str(parse_input("3x4")) == "3x4"


@pytest.mark.parametrize("text", ["", "x", "1x", "x3", "1x-3", "1x3.5", "one", "7", "."])
def test_neither_file_nor_shape(text):
    with pytest.raises(InputError, match="neither a file nor a shape"):
        parse_input(text)


def test_a_missing_image_is_called_missing():
    with pytest.raises(InputError, match="no such file"):
        parse_input("missing.png")


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
def test_whole_numbers_are_scaled_to_one(tmp_path, dtype, top):
    write_image(tmp_path / "a.tif", np.array([[0, top]], dtype))
    array = load_input(tmp_path / "a.tif")
    assert array.dtype == np.float32
    assert array.tolist() == [[[[0.0, 1.0]]]]


def test_floating_point_is_taken_as_it_is(tmp_path):
    write_image(tmp_path / "a.tif", np.array([[-3.0, 7.5]], np.float32))
    assert load_input(tmp_path / "a.tif").tolist() == [[[[-3.0, 7.5]]]]


def test_an_array_is_the_input_itself(tmp_path):
    array = np.arange(6, dtype=np.int64).reshape(2, 3)
    write_image(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(load_input(tmp_path / "a.npy"), array)


def test_signed_images_have_no_agreed_scale(tmp_path):
    write_image(tmp_path / "a.tif", np.zeros((4, 4), np.int16))
    with pytest.raises(InputError, match="no agreed scale"):
        load_input(tmp_path / "a.tif")
