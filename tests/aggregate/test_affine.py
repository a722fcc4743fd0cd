"""The monoid of affine maps: any grouping in order, nothing neutral but the empty map, a mask, real and complex."""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranger_nn.aggregate import Affine
from ranger_nn.aggregate.monoid import State

AFFINE = Affine()


def grouped(states: list[State], data: st.DataObject) -> State:
    """All of them, neighbours merged in an order that hypothesis draws."""
    left = list(states)
    while len(left) > 1:
        k = data.draw(st.integers(0, len(left) - 2))
        left[k : k + 2] = [AFFINE.merge(xp, left[k], left[k + 1])]
    return left[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("decay_shape", [(3, 2), (3, 1)])
@settings(deadline=None, max_examples=25)
@given(steps=st.integers(1, 9), seed=st.integers(0, 99), scale=st.sampled_from([0.0, 1e-200, 0.9, 1.5]), data=st.data())
def test_any_grouping_is_the_step_loop(
    dtype: torch.dtype, decay_shape: tuple[int, int], steps: int, seed: int, scale: float, data: st.DataObject
) -> None:
    g = torch.Generator().manual_seed(seed)
    decays = [torch.randn(decay_shape, generator=g, dtype=dtype) * scale for _ in range(steps)]
    values = [torch.randn(3, 2, generator=g, dtype=dtype) for _ in range(steps)]
    where = torch.rand(steps, 3, 1, generator=g) > 0.2
    start = h = torch.randn(3, 2, generator=g, dtype=dtype)
    for a, b, w in zip(decays, values, where):
        h = torch.where(w, a * h + b, h)
    states = [AFFINE.lift(xp, a, b, w) for a, b, w in zip(decays, values, where)]
    found = AFFINE.finish(xp, grouped(states, data), start)
    torch.testing.assert_close(found, h, rtol=1e-12, atol=1e-13)


def test_empty_is_neutral_and_order_matters() -> None:
    torch.manual_seed(0)
    a, b, c, d = (torch.randn(4, dtype=torch.float64) for _ in range(4))
    one, two = AFFINE.lift(xp, a, b), AFFINE.lift(xp, c, d)
    none = AFFINE.empty(xp, a, b)
    for merged in (AFFINE.merge(xp, none, one), AFFINE.merge(xp, one, none)):
        assert all(torch.equal(p, q) for p, q in zip(merged, one))
    assert not torch.allclose(AFFINE.merge(xp, one, two)[1], AFFINE.merge(xp, two, one)[1])


def test_merge_into_is_merge() -> None:
    torch.manual_seed(0)
    one: Any = tuple(torch.randn(2, 5).unbind(0))
    two: Any = tuple(torch.randn(2, 5).unbind(0))
    written: tuple[Tensor, Tensor] = (one[0].clone(), one[1].clone())
    AFFINE.merge_into(torch, written, two)
    torch.testing.assert_close(written, AFFINE.merge(xp, one, two))


def test_gradient_against_the_formula() -> None:
    """h = a2 (a1 h0 + b1) + b2."""
    torch.manual_seed(0)
    a1, b1, a2, b2, h0 = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(5))
    merged = AFFINE.merge(xp, AFFINE.lift(xp, a1, b1), AFFINE.lift(xp, a2, b2))
    found = torch.autograd.grad(AFFINE.finish(xp, merged, h0).sum(), (a1, b1, a2, b2, h0))
    wanted = (a2 * h0, a2, a1 * h0 + b1, torch.ones_like(b2), a2 * a1)
    torch.testing.assert_close(found, wanted)
