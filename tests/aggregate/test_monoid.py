"""The laws of the aggregators: any grouping, any order, and what the framework gives on the whole."""

from __future__ import annotations

import array_api_compat.torch as xp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranger_nn.aggregate.monoid import Extremum, Moments, Monoid, Sum

AXIS = (1,)
MONOIDS = {
    "sum": (Sum(), lambda x: x.sum(1, keepdim=True)),
    "mean": (Sum(mean=True), lambda x: x.mean(1, keepdim=True)),
    "max": (Extremum(1), lambda x: x.amax(1, keepdim=True)),
    "min": (Extremum(-1), lambda x: x.amin(1, keepdim=True)),
    "variance": (Moments(1.0), lambda x: x.var(1, keepdim=True)),
}
lengths = st.lists(st.integers(1, 9), min_size=2, max_size=6)


def states(monoid: Monoid, parts: list[Tensor]) -> list[tuple[object, int]]:
    """Each part lifted, with its number of elements."""
    return [(monoid.lift(xp, p, AXIS), p.shape[1]) for p in parts]


def merged(monoid: Monoid, a: tuple[object, int], b: tuple[object, int]) -> tuple[object, int]:
    """Two states in one."""
    return monoid.merge(xp, a[0], b[0], a[1], b[1]), a[1] + b[1]  # type: ignore[arg-type]


def result(monoid: Monoid, state: tuple[object, int]) -> Tensor:
    """The finished result; of moments the variance."""
    found = monoid.finish(xp, state[0], state[1])  # type: ignore[arg-type]
    return found[1] if isinstance(monoid, Moments) else found


@pytest.mark.parametrize("name", MONOIDS)
@settings(deadline=None)
@given(sizes=lengths, seed=st.integers(0, 99), order=st.randoms(use_true_random=False))
def test_any_order_and_grouping(name: str, sizes: list[int], seed: int, order: object) -> None:
    """Folded from the left, from the right, or in pairs picked at random: one result, the framework's."""
    monoid, direct = MONOIDS[name]
    x = torch.randn(3, sum(sizes), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    parts = list(x.split(sizes, 1))
    left = states(monoid, parts)
    while len(left) > 1:
        left = [merged(monoid, left[0], left[1]), *left[2:]]
    right = states(monoid, parts)
    while len(right) > 1:
        right = [*right[:-2], merged(monoid, right[-2], right[-1])]
    tree = states(monoid, parts)
    while len(tree) > 1:
        order.shuffle(tree)  # type: ignore[attr-defined]
        tree = [merged(monoid, tree[0], tree[1]), *tree[2:]]
    for state in (left, right, tree):
        torch.testing.assert_close(result(monoid, state[0]), direct(x), rtol=1e-12, atol=1e-12)


def test_ties_are_counted() -> None:
    """An extremum that is attained in several regions shares its gradient among all of them."""
    monoid = Extremum(1)
    a, b = states(monoid, [torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([[2.0, 0.0]])])
    (top, count), _ = merged(monoid, a, b)  # type: ignore[misc]
    assert top.item() == 2
    assert count.item() == 3


def test_nan_wins() -> None:
    """As in the untouched operator."""
    monoid = Extremum(1)
    a, b = states(monoid, [torch.tensor([[1.0]]), torch.tensor([[float("nan")]])])
    assert torch.isnan(result(monoid, merged(monoid, a, b)))


@pytest.mark.parametrize("monoid", [Sum(mean=True), Moments()])
def test_a_mask_of_rows_stands_for_all_of_their_elements(monoid: Monoid) -> None:
    """A mask that has size 1 along a reduced axis counts every element of a row."""
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    valid = (torch.arange(5) < 3).reshape(1, 5, 1, 1)
    over, kept = (1, 2), x[:, :3]
    for ours, theirs in zip(monoid.lift(xp, x, over, valid), monoid.lift(xp, kept, over), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
