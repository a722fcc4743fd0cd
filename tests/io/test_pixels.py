"""Pixels become numbers as declared; statistics merge over regions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranger_nn.errors import InputError
from ranger_nn.io.pixels import Pixels
from ranger_nn.io.tally import Tally

F32 = np.dtype(np.float32)


def test_defaults():
    assert Pixels().apply(np.full((1, 1, 1), 255, np.uint8), F32).item() == 1
    assert Pixels().apply(np.full((1, 1, 1), 65535, np.uint16), F32).item() == pytest.approx(1)
    assert Pixels().apply(np.full((1, 1, 1), -3, np.int16), F32).item() == -3
    assert Pixels().apply(np.full((1, 1, 1), 0.25, np.float64), F32).dtype == np.float32


def test_declared():
    x = np.arange(4 * 6, dtype=np.uint8).reshape(4, 2, 3)
    p = Pixels(scale=0.5, mean=(1.0, 2.0), std=[2.0, 4.0], bands=[3, 0])
    expected = (x[[3, 0]] * 0.5 - np.array([1, 2])[:, None, None]) / np.array([2, 4])[:, None, None]
    np.testing.assert_allclose(p.apply(x, F32), expected)
    assert p.channels(4, "x") == 2


@pytest.mark.parametrize("nodata", [0.0, float("nan")])
def test_nodata(nodata):
    x = np.ones((2, 2, 2))
    x[:, 0, 0] = nodata
    x[0, 1, 1] = nodata  # one band only: data
    y = Pixels(mean=5.0, nodata=nodata, fill=-9.0).apply(x, F32)
    assert (y[:, 0, 0] == -9).all()
    assert (y[:, 0, 1] == -4).all()
    assert y[1, 1, 1] == -4


def test_errors():
    with pytest.raises(InputError, match="above 0; got 0"):
        Pixels(std=0.0)
    with pytest.raises(InputError, match=r"from 0 on; got \(-1,\)"):
        Pixels(bands=(-1,))
    with pytest.raises(InputError, match="band 5 was asked for; x has bands 0 to 2"):
        Pixels(bands=(5,)).channels(3, "x")
    with pytest.raises(InputError, match="mean has 2 numbers for 3 bands of x"):
        Pixels(mean=(1.0, 2.0)).channels(3, "x")


@pytest.mark.parametrize("name", ["scale", "mean", "std"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none(name, value):
    with pytest.raises(InputError, match=f"{name} of Pixels is finite; got"):
        Pixels(**{name: value})
    if name != "scale":
        with pytest.raises(InputError, match=f"{name} of Pixels is finite; got"):
            Pixels(**{name: (1.0, value)})
    with pytest.raises(InputError, match=f"{name} of Pixels is a number"):
        Pixels(**{name: "half"})


def test_no_scale_is_nothing():
    with pytest.raises(InputError, match="scale of Pixels is 0"):
        Pixels(scale=0.0)
    Pixels(nodata=float("nan"), result=float("nan"))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 99))
def test_tally_over_regions(lengths, seed):
    """The same as over the whole, with a stop and a start between."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, sum(lengths), 4)).astype(np.float32)
    labels = x.argmax(0)[None].astype(np.uint8)
    names = ("histogram", "mean", "max", "min", "mean_probability")
    tally, top = Tally(names), 0
    for n in lengths:
        tally.add(x[:, top : top + n], labels[:, top : top + n])
        top += n
        tally, before = Tally(names), tally
        tally.take(before.state(), 3, 4 * top, False)
    found = tally.result()
    counted = np.bincount(labels.ravel())
    assert found["histogram"] == counted.tolist()
    np.testing.assert_allclose(found["mean"], x.mean((1, 2), dtype=np.float64), atol=1e-6)
    np.testing.assert_array_equal(found["max"], x.max((1, 2)))
    np.testing.assert_array_equal(found["min"], x.min((1, 2)))
    e = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(found["mean_probability"], (e / e.sum(0)).mean((1, 2)), atol=1e-6)


def test_unknown_statistic():
    with pytest.raises(InputError, match=r"'histgram' \(did you mean 'histogram'\?\)"):
        Tally(("histgram",))


TALLIES = [
    5, "text", None, [], {}, {"mean": [1, 2]}, {"mean": [1, 2, 3], "max": [1, 2, 3]},
    {"mean": [1, 2], "max": [1, 2, 3], "pixels": 1}, {"mean": ["a", "b", "c"], "max": [1, 2, 3], "pixels": 1},
    {"mean": [[1, 2, 3]], "max": [1, 2, 3], "pixels": 1}, {"mean": [[1], [2, 3], 4], "max": [1, 2, 3], "pixels": 1},
    {"mean": [1, 2, 3], "max": [1, 2, 3], "pixels": "x"}, {"mean": [1, 2, 3], "max": [1, 2, 3], "pixels": [1]},
    {"mean": [1, 2, 3], "max": [1, 2, 3], "pixels": 1}, {"mean": [1, 2, 3], "max": [1, 2, 3], "pixels": -1},
    {"mean": [1, 2, 3], "max": [1, 2, 3], "pixels": True}, {"mean": [1, 2, 10**400], "max": [1, 2, 3], "pixels": 1},
]  # fmt: skip


@pytest.mark.parametrize("state", TALLIES, ids=str)
def test_no_tally_of_this_run(state):
    with pytest.raises(ValueError, match=r"statistics|inhomogeneous"):
        Tally(("mean", "max")).take(state, 3, 2, False)


def test_a_tally_where_no_data_is_left_out():
    for state in ({}, {"mean": [1, 2, 3], "pixels": 1}):
        Tally(("mean",)).take(state, 3, 2, True)
        with pytest.raises(ValueError, match=r"of [01] pixels, and 2 are written"):
            Tally(("mean",)).take(state, 3, 2, False)
    with pytest.raises(ValueError, match="of 3 pixels"):
        Tally(("mean",)).take({"mean": [1, 2, 3], "pixels": 3}, 3, 2, True)
