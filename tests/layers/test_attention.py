"""Balanced routing and ClusteredAttention in PyTorch: exact where it must be, permutations, masks, centres, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranger_nn import InputError, KMeans, PartitionError
from ranger_nn.layers.routing import balanced_slots, balanced_slots_now
from ranger_nn.torch import ClusteredAttention
from ranger_nn.torch.layers.attention import clustered_attention


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tokens(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(shape, requires_grad=True) for _ in range(3))  # type: ignore[return-value]


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 7), st.integers(0, 99), st.integers(1, 6))
def test_every_sample_once_every_cluster_full(
    groups: int, clusters: int, capacity: int, seed: int, rounds: int
) -> None:
    """A permutation; the same clusters in both forms."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(groups, clusters * capacity, clusters, generator=g)
    slots = balanced_slots(xp, scores, capacity, rounds=rounds)
    assert (slots.sort(1).values == torch.arange(clusters * capacity)).all()
    now = balanced_slots_now(scores.numpy(), capacity, rounds=rounds)
    np.testing.assert_array_equal(slots.numpy() // capacity, now // capacity)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_fillings_do_not_push_anyone_out(clusters: int, capacity: int, seed: int) -> None:
    """With few samples there, each gets its best cluster."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, clusters * capacity, clusters, generator=g)
    there = torch.zeros(1, clusters * capacity, dtype=torch.bool)
    there[0, torch.randperm(clusters * capacity, generator=g)[:capacity]] = True
    for slots in (
        balanced_slots(xp, scores, capacity, there).numpy(),
        balanced_slots_now(scores.numpy(), capacity, there.numpy()),
    ):
        assert (np.sort(slots) == np.arange(clusters * capacity)).all()
        assert (slots // capacity == scores.argmax(2).numpy())[there.numpy()].all()


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 7), st.integers(0, 99), st.integers(1, 6))
def test_both_forms_agree_on_masks(groups: int, clusters: int, capacity: int, seed: int, rounds: int) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(groups, clusters * capacity, clusters, generator=g)
    there = torch.rand(groups, clusters * capacity, generator=g) < 0.7
    fixed = balanced_slots(xp, scores, capacity, there, rounds).numpy()
    now = balanced_slots_now(scores.numpy(), capacity, there.numpy(), rounds)
    assert (np.sort(fixed) == np.arange(clusters * capacity)).all()
    np.testing.assert_array_equal((fixed // capacity)[there.numpy()], (now // capacity)[there.numpy()])


def test_both_forms_agree_where_many_ask() -> None:
    """Scores of one kind of cluster: most are turned away at first; queues in blocks and in one piece are the same."""
    for clusters, capacity in ((64, 64), (7, 67), (251, 3)):
        scores = torch.randn(2, clusters * capacity, clusters) + torch.linspace(0, 3, clusters)
        fixed = balanced_slots(xp, scores, capacity).numpy()
        np.testing.assert_array_equal(fixed, balanced_slots_now(scores.numpy(), capacity))
        assert (np.sort(fixed) == np.arange(clusters * capacity)).all()


def test_equal_scores() -> None:
    """Ties are broken by the order of the samples, in both forms."""
    scores = torch.zeros(1, 12, 3)
    for slots in (balanced_slots(xp, scores, 4).numpy(), balanced_slots_now(scores.numpy(), 4)):
        np.testing.assert_array_equal(slots[0], np.arange(12))


def test_the_length_of_a_centre_does_not_matter() -> None:
    q, k, v = tokens(1, 2, 12, 4)
    centres = torch.randn(2, 3, 4)
    longer = centres * torch.tensor([1.0, 5.0, 0.1])[:, None]
    assert torch.equal(clustered_attention(q, k, v, longer), clustered_attention(q, k, v, centres))


@pytest.mark.parametrize("summaries", [False, True])
def test_more_capacity_than_needed_changes_nothing(summaries: bool) -> None:
    """Places that stay empty count for nothing, whatever the number of tokens."""
    for n in (5, 6, 12):
        q, k, v = tokens(1, 2, n, 4)
        full = clustered_attention(q, k, v, torch.randn(2, 1, 4), capacity=n + 3, summaries=summaries)
        torch.testing.assert_close(full, F.scaled_dot_product_attention(q, k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("summaries", [False, True])
def test_one_region_is_full_attention(summaries: bool) -> None:
    """Result and gradient."""
    q, k, v = tokens(2, 3, 20, 8)
    ours = clustered_attention(q, k, v, torch.randn(3, 1, 8), summaries=summaries)
    theirs = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    pull = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * pull).sum(), (q, k, v)) for y in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_separate_clusters_lose_nothing() -> None:
    """Tokens of four far directions: what is outside of a region has no weight."""
    centres = torch.eye(4).expand(2, 4, 4)
    kind = torch.arange(32) % 4
    q = 40 * torch.eye(4)[kind].expand(1, 2, 32, 4) + 0.1 * torch.randn(1, 2, 32, 4)
    v = torch.randn(1, 2, 32, 4)
    ours = clustered_attention(q, q, v, centres)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, q, v), rtol=1e-6, atol=1e-6)


def direct(q: Tensor, k: Tensor, v: Tensor, centres: Tensor, summaries: bool) -> Tensor:
    """The formula, query by query, with the routing that the layer uses."""
    capacity = q.shape[2] // centres.shape[1]
    out = torch.zeros_like(q)
    for h in range(q.shape[1]):
        side = []
        for t in (q, k):
            scores = (F.normalize(t[0, h].float(), dim=-1) @ F.normalize(centres[h].float(), dim=-1).T).detach().numpy()
            side.append(torch.from_numpy(balanced_slots_now(scores[None], capacity)[0]) // capacity)
        for i in range(q.shape[2]):
            inside = side[1] == side[0][i]
            keys, values, bias = k[0, h][inside], v[0, h][inside], torch.zeros(capacity)
            for r in range(centres.shape[1]) if summaries else ():
                if r != side[0][i]:
                    keys = torch.cat([keys, k[0, h][side[1] == r].mean(0, keepdim=True)])
                    values = torch.cat([values, v[0, h][side[1] == r].mean(0, keepdim=True)])
                    bias = torch.cat([bias, torch.tensor([float(capacity)]).log()])
            share = (keys @ q[0, h, i] / q.shape[-1] ** 0.5 + bias).softmax(0)
            out[0, h, i] = share @ values
    return out


@pytest.mark.parametrize("summaries", [False, True])
def test_equals_the_formula(summaries: bool) -> None:
    q, k, v = tokens(1, 2, 12, 4)
    centres = torch.randn(2, 3, 4)
    ours, theirs = clustered_attention(q, k, v, centres, summaries=summaries), direct(q, k, v, centres, summaries)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_order_of_tokens_does_not_matter() -> None:
    net = ClusteredAttention(2, KMeans(4, balanced=True), features=8, summaries=True).eval()
    x, order = torch.randn(1, 32, 8), torch.randperm(32)
    torch.testing.assert_close(net(x[:, order]), net(x)[:, order])


@pytest.mark.parametrize("summaries", [False, True])
def test_masked_tokens_do_not_count(summaries: bool) -> None:
    """Their values do not reach anyone, N need not divide, everything may be masked."""
    net = ClusteredAttention(2, KMeans(3, balanced=True), features=8, summaries=summaries).eval()
    x = torch.randn(3, 11, 8, requires_grad=True)
    mask = torch.rand(3, 11) < 0.6
    mask[2] = False
    y = net(x, mask)
    changed = torch.where(mask[..., None], x, x + 5)
    torch.testing.assert_close(net(changed, mask)[mask], y[mask])
    y[mask].sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (x.grad[~mask] == 0).all()
    assert net(x).isfinite().all()


def test_centres_follow_and_begin_anew() -> None:
    """The moving average, once, by hand; a region without tokens takes one that is far from its centre."""
    net = ClusteredAttention(1, KMeans(2, balanced=True, decay=0.5), features=4)
    x = torch.randn(1, 6, 4)
    before = net.centres.clone()
    sides = [F.normalize(t[0, 0].float(), dim=-1) for t in net._heads(x)[:2]]
    kinds = [balanced_slots_now((t @ before[0].float().T).detach().numpy()[None], 3)[0] // 3 for t in sides]
    both, kind = torch.cat(sides), torch.from_numpy(np.concatenate(kinds))
    means = torch.stack([both[kind == r].mean(0) for r in range(2)])
    net(x)
    torch.testing.assert_close(
        net.centres[0], F.normalize(0.5 * before[0] + 0.5 * means.double(), dim=-1), rtol=1e-5, atol=1e-6
    )
    mask = torch.zeros(1, 6, dtype=torch.bool)
    mask[0, 0] = True
    with torch.no_grad():
        net.project.bias.zero_()
        net.project.weight[4:8] = net.project.weight[:4]  # keys are queries: one region has none of either
    net(x, mask)
    there = F.normalize(net._heads(x)[0][0, 0, 0], dim=-1)
    assert (net.centres[0] @ there).max() > 0.5
    torch.testing.assert_close(net.centres.norm(dim=-1), torch.ones(1, 2))
    frozen = ClusteredAttention(1, KMeans(2, balanced=True, update="none"), features=4)
    start = frozen.centres.clone()
    frozen(x)
    assert torch.equal(frozen.centres, start)


def test_adapt_finds_clusters() -> None:
    """The same for the same seed; NaN is refused."""
    x = torch.randn(2, 40, 8)
    nets = [ClusteredAttention(2, KMeans(3, balanced=True, seed=1), features=8) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net in nets:
        net.adapt(x)
    assert torch.equal(nets[0].centres, nets[1].centres)
    x[0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="1 of 640"):
        nets[0].adapt(x)


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda: ClusteredAttention(3, KMeans(2, balanced=True), features=8), "3 heads for 8 features"),
        (lambda: ClusteredAttention(2, KMeans(2), features=8), "balanced=True"),
        (lambda: ClusteredAttention(2, KMeans(2, balanced=True, update="gradient"), features=8), "no gradient"),
        (lambda: ClusteredAttention(2, KMeans(2, balanced=True), features=8, causal=True), "causal"),
        (
            lambda: ClusteredAttention(2, KMeans(2, balanced=True, capacity=3), features=8)(torch.zeros(1, 7, 8)),
            "capacity 3 hold 6, there are 7; give a capacity of at least 4",
        ),
        (
            lambda: ClusteredAttention(2, KMeans(8, balanced=True), features=8)(torch.zeros(1, 7, 8)),
            "8 regions were asked for, there are 7 tokens; ask for at most 7",
        ),
        (
            lambda: ClusteredAttention(2, KMeans(2, balanced=True), features=8)(torch.zeros(1, 7, 8), torch.ones(1, 7)),
            r"\(1, 7\) bool.*float64",
        ),
        (
            lambda: ClusteredAttention(2, KMeans(2, balanced=True), features=8)(
                torch.zeros(2, 7, 8), torch.ones(2, 8, dtype=torch.bool)
            ),
            r"\(2, 7\) bool.*shape \(2, 8\)",
        ),
    ],
)
def test_wrong_use(use: Callable[[], object], says: str) -> None:
    with pytest.raises((PartitionError, InputError), match=says):
        use()


def test_citizen() -> None:
    """state_dict, compile, export, autocast."""
    net, x = ClusteredAttention(2, KMeans(3, balanced=True), features=8, summaries=True).eval(), torch.randn(2, 12, 8)
    other = ClusteredAttention(2, KMeans(3, balanced=True, seed=5), features=8, summaries=True).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(x), net(x))
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))
    net.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x.float()).dtype == torch.bfloat16
