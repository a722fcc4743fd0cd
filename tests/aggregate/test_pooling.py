"""Monoids with weights, masks and absent regions: any grouping, any order, and a direct formula, gradient too."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import array_api_compat.torch as xp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranger_nn import PartitionError
from ranger_nn.aggregate import (
    Call,
    Concat,
    Extremum,
    LogSumExp,
    Moments,
    Softmax,
    Stitch,
    Sum,
    WeightedMean,
    aggregator,
)
from ranger_nn.core.region import Region

Direct = Callable[[Tensor, Tensor], Tensor]


# what is there, as the rows of x (regions, features), and their weights (regions, 1)
CASES: dict[str, tuple[Any, Direct]] = {
    "sum": (Sum(), lambda x, w: x.sum(0)),
    "mean": (Sum(mean=True), lambda x, w: x.mean(0)),
    "max": (Extremum(), lambda x, w: x.amax(0)),
    "min": (Extremum(-1), lambda x, w: x.amin(0)),
    "logsumexp": (LogSumExp(), lambda x, w: x.logsumexp(0)),
    "weighted_mean": (WeightedMean(), lambda x, w: (w * x).sum(0) / w.sum(0)),
    "softmax": (Softmax(), lambda x, w: (w.log().softmax(0) * x).sum(0)),
    "moments": (Moments(), lambda x, w: torch.cat([x.mean(0), x.var(0, correction=0)])),
}


def lifted(over: Any, x: Tensor, w: Tensor, where: Tensor) -> tuple[Any, Tensor]:
    """(state, n) of some regions."""
    extra = (
        {"weight": w} if isinstance(over, WeightedMean) else {"weight": w.log()} if isinstance(over, Softmax) else {}
    )
    n = where.to(x.dtype).sum(0, keepdim=True)
    return over.lift(xp, x, (0,), where, **extra), n


def finished(over: Any, state: Any, n: Tensor) -> Tensor:
    found = over.finish(xp, state, n)
    return torch.cat(found, -1)[0] if isinstance(found, tuple) else found[0]


def folded(over: Any, states: list[tuple[Any, Tensor]], order: random.Random) -> tuple[Any, Tensor]:
    """Merged in pairs picked at random, with empty states among them."""
    like = torch.zeros_like(states[0][0][0])
    states = [
        *states,
        (over.empty(xp, like), torch.zeros_like(states[0][1])),
        (over.empty(xp, like), torch.zeros_like(states[0][1])),
    ]
    while len(states) > 1:
        order.shuffle(states)
        (a, n), (b, m) = states.pop(), states.pop()
        states.append((over.merge(xp, a, b, n, m), n + m))
    return states[0]


@pytest.mark.parametrize("name", CASES)
@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    seed=st.integers(0, 999),
    order=st.randoms(use_true_random=False),
)
def test_any_grouping_and_gradient(name: str, sizes: list[int], seed: int, order: random.Random) -> None:
    over, direct = CASES[name]
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 3, dtype=torch.float64, generator=g).mul(4).requires_grad_()
    w = torch.rand(sum(sizes), 1, dtype=torch.float64, generator=g).add(0.1).requires_grad_()
    there = torch.rand(sum(sizes), 1, generator=g) < 0.7
    there[0] = True
    states = [lifted(over, *part) for part in zip(x.split(sizes), w.split(sizes), there.split(sizes))]
    ours = finished(over, *folded(over, states, order))
    theirs = direct(x[there[:, 0]], w[there[:, 0]])
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    pull = torch.randn(ours.shape, dtype=torch.float64, generator=g)
    for a, b in zip(*(torch.autograd.grad(y, (x, w), pull, allow_unused=True) for y in (ours, theirs))):
        assert (a is None) == (b is None) or (a is not None and (a == 0).all())
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_nothing_there(name: str) -> None:
    """The identity of each, and no NaN in its gradient."""
    over, _ = CASES[name]
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    state, n = lifted(over, x, torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.bool))
    found = finished(over, state, n)
    expected = {"max": -torch.inf, "min": torch.inf, "logsumexp": -torch.inf}.get(name, 0.0)
    assert (found == expected).all()
    torch.where(n[0] > 0, found, 0.0).sum().backward()
    assert x.grad is not None
    assert (x.grad == 0).all()


def test_large_scores_do_not_overflow() -> None:
    x = torch.tensor([[1000.0], [1001.0]])
    state, n = lifted(LogSumExp(), x, x, torch.ones(2, 1, dtype=torch.bool))
    torch.testing.assert_close(finished(LogSumExp(), state, n), x.logsumexp(0))


def test_pieces_come_in_any_order() -> None:
    """Stitch, concat and a callable put the pieces in the order of their regions."""
    x = torch.arange(10.0).reshape(1, 10)
    regions = [Region(0, ((0, 4),), ((0, 4),)), Region(1, ((4, 7),), ((4, 7),)), Region(2, ((7, 10),), ((7, 10),))]
    pieces = {r.index: x[:, r.own[0][0] : r.own[0][1]] for r in regions}
    for over in (Stitch(), Concat(), Call(lambda parts: torch.cat(parts, 1))):
        a, b, c = (over.lift(i, pieces[i]) for i in (2, 0, 1))
        left, right = over.merge(over.merge(a, b), c), over.merge(a, over.merge(over.empty(), over.merge(b, c)))
        for state in (left, right):
            extra = (regions, (1,), [None]) if isinstance(over, Stitch) else ()
            found = over.finish(state) if isinstance(over, Call) else over.finish(xp, state, *extra)
            assert torch.equal(found, x)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: aggregator("weigted_mean"), "did you mean 'weighted_mean'"),
        (lambda: aggregator(3), "a name, an object .* or a callable; got 3"),
        (lambda: WeightedMean("learnt"), "did you mean 'learned'"),
        (lambda: WeightedMean((0.0, 0.0)), "not all 0"),
        (lambda: Softmax(gated=True), "hidden width"),
        (lambda: Softmax(hidden=0), "at least 1"),
    ],
)
def test_refusals(make: Callable[[], object], says: str) -> None:
    with pytest.raises(PartitionError, match=says):
        make()


def test_ties_share_one_gradient() -> None:
    """Of those that attain the extremum, in whatever regions: between them one, the others none."""
    for sign in (1, -1):
        x = (sign * torch.tensor([[2.0], [1.0], [2.0], [2.0]], dtype=torch.float64)).requires_grad_()
        over = Extremum(sign)
        states = [lifted(over, part, part, torch.ones_like(part, dtype=torch.bool)) for part in x.split([2, 1, 1])]
        finished(over, *folded(over, states, random.Random(0))).sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad.sum(), torch.ones((), dtype=torch.float64))
        assert (x.grad[[0, 2, 3]] > 0).all()
        assert x.grad[1] == 0


@pytest.mark.parametrize("name", CASES)
def test_what_is_absent_may_be_nan(name: str) -> None:
    """Neither the result nor the gradient sees it."""
    over, direct = CASES[name]
    x = torch.tensor([[1.0], [torch.nan], [3.0], [torch.inf]], dtype=torch.float64, requires_grad=True)
    w, there = torch.ones(4, 1, dtype=torch.float64), torch.tensor([[True], [False], [True], [False]])
    found = finished(over, *lifted(over, x, w, there))
    torch.testing.assert_close(found, direct(x[[0, 2]], w[[0, 2]]))
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (x.grad[[1, 3]] == 0).all()


@pytest.mark.parametrize(
    "values", [[-torch.inf, -torch.inf], [-torch.inf, 2.0], [torch.inf, 2.0], [1e308, 1e308], [-1e308, 0.0]], ids=str
)
def test_extremes_of_logsumexp(values: list[float]) -> None:
    """As PyTorch's, lifted at once and merged."""
    x = torch.tensor(values, dtype=torch.float64)[:, None]
    there = torch.ones_like(x, dtype=torch.bool)
    at_once = finished(LogSumExp(), *lifted(LogSumExp(), x, x, there))
    states = [lifted(LogSumExp(), part, part, part == part) for part in x.split(1)]
    merged = finished(LogSumExp(), *folded(LogSumExp(), states, random.Random(1)))
    for found in (at_once, merged):
        assert torch.equal(found, x.logsumexp(0))


def test_moments_far_from_zero() -> None:
    """A small variance around a large mean survives merging (Chan, Golub & LeVeque 1979)."""
    x = torch.randn(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e8
    states = [lifted(Moments(), part, part, torch.ones_like(part, dtype=torch.bool)) for part in x.split(8)]
    found = finished(Moments(), *folded(Moments(), states, random.Random(0)))
    torch.testing.assert_close(found, torch.cat([x.mean(0), x.var(0, correction=0)]), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_numpy_gives_the_same(name: str) -> None:
    """One source for every namespace of the array API standard."""
    import array_api_compat.numpy as np_xp

    over, direct = CASES[name]
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 3, dtype=torch.float64, generator=g), torch.rand(5, 1, dtype=torch.float64, generator=g)
    extra = (
        {"weight": w.numpy()} if name == "weighted_mean" else {"weight": w.log().numpy()} if name == "softmax" else {}
    )
    states = [
        over.lift(np_xp, part.numpy(), (0,), None, **{k: v[rows] for k, v in extra.items()})
        for part, rows in ((x[:2], slice(2)), (x[2:], slice(2, None)))
    ]
    found = over.finish(np_xp, over.merge(np_xp, *states, 2, 3), 5)
    found = np_xp.concat(found, axis=-1) if isinstance(found, tuple) else found
    torch.testing.assert_close(torch.from_numpy(found)[0], direct(x, w))
