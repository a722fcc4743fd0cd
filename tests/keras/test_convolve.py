"""Convolutions as regions call them, against Keras's own and JAX's: results and both gradients."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

if keras.backend.backend() != "jax":
    pytest.skip("what XLA runs fast in a loop is written out for JAX alone", allow_module_level=True)

import jax
from jax import lax

from ranger_nn.keras import convolve_jax


def apart(expected: Any, ours: Any, x: np.ndarray, w: np.ndarray) -> float:
    """The largest difference of results and gradients, of each one's largest number."""
    theirs, pull = jax.vjp(expected, x, w)
    found, own_pull = jax.vjp(ours, x, w)
    assert found.shape == theirs.shape
    g = np.random.default_rng(1).standard_normal(theirs.shape).astype("float32")
    pairs = zip((theirs, *pull(g)), (found, *own_pull(g)), strict=True)
    return max(float(abs(a - b).max() / (1e-6 + abs(a).max())) for a, b in pairs)


@st.composite
def forms(draw: st.DrawFn) -> dict[str, Any]:
    """Strides, dilations and paddings of one to three dimensions, channels first or last."""
    rank = draw(st.integers(1, 3))
    every = st.tuples(*[st.integers(1, 3)] * rank)
    kernel, strides, dilation = draw(every), draw(every), draw(st.tuples(*[st.integers(1, 2)] * rank))
    # as "same" pads: never more than a kernel spans
    pads = [
        tuple(draw(st.integers(0, min(2, d * (k - 1)))) for _ in range(2))
        for k, d in zip(kernel, dilation, strict=True)
    ]
    space = draw(st.tuples(*[st.integers(7, 10)] * rank))
    return {"kernel": kernel, "strides": strides, "dilation": dilation, "pads": tuple(pads), "space": space}


def images(space: Any, last: bool) -> np.ndarray:
    """Two samples of four channels."""
    shape = (2, *space, 4) if last else (2, 4, *space)
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


@settings(max_examples=14, deadline=None)
@given(form=forms(), groups=st.sampled_from([1, 2, 4]), last=st.booleans())
def test_convolution(form: Any, groups: int, last: bool) -> None:
    """Dense, grouped and depthwise."""
    rank = len(form["space"])
    data = (0, rank + 1, *range(1, rank + 1)) if last else tuple(range(rank + 2))
    numbers = lax.ConvDimensionNumbers(data, (rank + 1, rank, *range(rank)), data)
    w = np.random.default_rng(2).standard_normal((*form["kernel"], 4 // groups, 8)).astype("float32")

    def expected(x: Any, w: Any) -> Any:
        return lax.conv_general_dilated(
            x,
            w,
            form["strides"],
            form["pads"],
            rhs_dilation=form["dilation"],
            dimension_numbers=numbers,
            feature_group_count=groups,
        )

    def ours(x: Any, w: Any) -> Any:
        return convolve_jax.convolve(x, w, form["strides"], form["dilation"], form["pads"], last, groups)

    assert apart(expected, ours, images(form["space"], last), w) < 1e-5


@settings(max_examples=8, deadline=None)
@given(form=forms(), last=st.booleans())
def test_transposed(form: Any, last: bool) -> None:
    """Keras allows strides or dilation."""
    dilation = form["dilation"] if max(form["strides"]) == 1 else (1,) * len(form["strides"])
    w = np.random.default_rng(2).standard_normal((*form["kernel"], 3, 4)).astype("float32")
    name = "channels_last" if last else "channels_first"

    def expected(x: Any, w: Any) -> Any:
        return ops.conv_transpose(x, w, form["strides"], "valid", None, name, dilation)

    def ours(x: Any, w: Any) -> Any:
        return convolve_jax.transpose(x, w, form["strides"], dilation, last)

    assert apart(expected, ours, images(form["space"], last), w) < 1e-5
