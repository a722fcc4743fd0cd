"""K-means: the fit, samples brought together by region, a training step of the centres by hand, refusals."""

from __future__ import annotations

from collections.abc import Callable

import array_api_compat.numpy as xp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranger_nn import InputError, KMeans, PartitionError
from ranger_nn.layers.clusters import (
    EMPTY_AFTER,
    arrangement,
    balanced,
    block_count,
    block_size,
    filled,
    grouped,
    moved,
    nearness,
)
from ranger_nn.layers.routing import balanced_slots_now


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_fit_is_the_same_for_the_same_seed(clusters: int, features: int, seed: int) -> None:
    data = np.random.default_rng(seed).standard_normal((4 * clusters, features))
    centres = KMeans(clusters, seed=seed).fit(data)
    np.testing.assert_array_equal(centres, KMeans(clusters, seed=seed).fit(data))
    assert centres.shape == (clusters, features)


def test_fit_finds_what_is_apart() -> None:
    where = np.array([[0.0, 9], [9, 0], [-9, -9]])
    data = np.concatenate([w + 0.01 * np.random.default_rng(k).standard_normal((20, 2)) for k, w in enumerate(where)])
    found = KMeans(3).fit(data)
    np.testing.assert_allclose(found[np.argsort(found[:, 0])], where[[2, 0, 1]], atol=0.02)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 999), st.booleans(), st.sampled_from([None, 1, 3]))
def test_every_sample_once_with_its_region(rows: int, clusters: int, seed: int, masked: bool, size: int | None) -> None:
    """In blocks that shapes alone bound, and in those that fit the loads; absent samples nowhere."""
    rng = np.random.default_rng(seed)
    region = rng.integers(0, clusters, rows) ** 2 // clusters
    there = rng.random(rows) < 0.6 if masked else None
    loads = np.bincount(region if there is None else region[there], minlength=clusters)
    fixed = block_size(rows, clusters) if size is None else size
    for length, blocks in ((fixed, block_count(rows, clusters, fixed)), arrangement(loads.tolist()), (rows, None)):
        routes = grouped(xp, region, there, rows, clusters, length, blocks)
        owner = np.arange(clusters) if routes.owner is None else routes.owner
        assert routes.shape == (len(owner), length)
        present = np.arange(rows) if there is None else np.flatnonzero(there)
        np.testing.assert_array_equal(np.sort(routes.take[routes.used]), present)
        np.testing.assert_array_equal(routes.take[routes.back[present]], present)
        np.testing.assert_array_equal(owner[routes.back[present] // length], region[present])
        assert ((routes.take >= 0) & (routes.take < rows)).all()


def test_the_drawing() -> None:
    """The docstring of `layers/clusters.py`: three regions that hold 5, 1 and 2 of 8 rows, blocks of 2."""
    region = np.array([0, 0, 2, 1, 0, 0, 2, 0])
    assert block_count(8, 3, 2) == 5
    routes = grouped(xp, region, None, 8, 3, 2, 5)
    assert routes.owner.tolist() == [0, 0, 0, 1, 2]
    assert routes.used.tolist() == [True] * 5 + [False, True, False, True, True]
    assert routes.take[routes.used].tolist() == [0, 1, 4, 5, 7, 3, 2, 6]


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 5), st.integers(0, 99), st.booleans(), st.booleans())
def test_balanced_regions(groups: int, rows: int, clusters: int, seed: int, masked: bool, sets: bool) -> None:
    """Every sample once, no region over its capacity, sequences apart where they are sets."""
    rng, capacity = np.random.default_rng(seed), -(-rows // clusters) + 1
    there = rng.random((groups, rows)) < 0.7 if masked else None
    near, full = filled(xp, rng.standard_normal((groups, rows, clusters)), there, rows, capacity)
    full = np.broadcast_to(full, (groups, full.shape[1]))
    slots = balanced_slots_now(near, capacity, full)
    routes = balanced(xp, slots, full, groups, rows, capacity, clusters, sets)
    assert routes.shape == ((clusters, groups, capacity) if sets else (clusters, groups * capacity))
    present = np.arange(groups * rows) if there is None else np.flatnonzero(there)
    np.testing.assert_array_equal(np.sort(routes.take[routes.used]), present)
    np.testing.assert_array_equal(routes.take[routes.back[present]], present)
    slot = np.arange(clusters * groups * capacity).reshape(clusters, groups, capacity)
    for r in range(clusters):
        for g in range(groups):
            mine = routes.take[slot[r, g]][routes.used[slot[r, g]]]
            assert (mine // rows == g).all()
            assert (routes.region[mine] == r).all()


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.floats(-1e4, 1e4))
def test_nearness_is_half_the_squared_distance(rows: int, clusters: int, features: int, shift: float) -> None:
    rng = np.random.default_rng(rows)
    x, c = (rng.standard_normal((n, features)) + shift for n in (rows, clusters))
    direct = -((x[:, None] - c[None]) ** 2).sum(2) / 2
    np.testing.assert_allclose(nearness(xp, x, c, absolute=True), direct, rtol=1e-7, atol=1e-7)
    relative = nearness(xp, x, c)
    np.testing.assert_allclose(relative - relative[:, :1], direct - direct[:, :1], rtol=1e-7, atol=1e-7)


def test_a_step_of_the_centres_by_hand() -> None:
    """Two blocks of region 0, one of region 2, none of 1, which is not yet empty; unused slots do not count."""
    taken = np.array([[[1.0, 0], [3, 0]], [[5, 6], [99, 99]], [[0, 8], [0, 4]]])
    used = np.array([[True, True], [True, False], [True, True]])
    centres, unseen = np.array([[0.0, 0], [7, 7], [0, 0]]), np.zeros(3)
    got, since = moved(xp, taken, used, np.array([0, 0, 2]), centres, unseen, 0.75)
    np.testing.assert_allclose(got, [[0.25 * 3, 0.25 * 2], [7, 7], [0, 0.25 * 6]])
    assert since.tolist() == [0, 5, 0]


def test_empty_regions_begin_anew() -> None:
    """At the samples that lie farthest from their centres, one each; a centre with samples stays theirs."""
    clusters = 3
    taken, centres = np.array([[[1.0], [2], [9], [-5]]]), np.array([[0.0], [50], [60]])
    got, since = moved(xp, taken, None, np.array([0]), centres, np.array([0, EMPTY_AFTER * clusters, 0.0]), 0.5)
    np.testing.assert_allclose(got, [[0.5 * 7 / 4], [9], [60]])
    assert since.tolist() == [0, 0, 4]
    got, _ = moved(xp, taken, None, np.array([0]), centres, np.full(3, EMPTY_AFTER * 3.0), 0.0)
    np.testing.assert_allclose(got, [[7 / 4], [9], [-5]])


@pytest.mark.parametrize(
    ("use", "error", "says"),
    [
        (lambda: KMeans(0), PartitionError, "at least 1 region, not clusters=0"),
        (lambda: KMeans(2, update="gradeint"), PartitionError, "not 'gradeint' .did you mean 'gradient'"),
        (lambda: KMeans(2, decay=1.0), PartitionError, "below 1, not 1.0"),
        (lambda: KMeans(2, capacity=3), PartitionError, "capacity is 3 and balanced is False"),
        (lambda: KMeans(2, balanced=True, capacity=0), PartitionError, "capacity is 0"),
        (lambda: KMeans(5).fit(np.zeros((4, 2))), InputError, "5 clusters needs .* the data has 4"),
        (lambda: KMeans(2).fit(np.array([[1.0], [np.nan], [np.inf]])), InputError, "2 of 3 are NaN"),
        (lambda: KMeans(2).fit(np.zeros(4)), InputError, r"not \(4,\)"),
    ],
)
def test_wrong_use(use: Callable[[], object], error: type[ValueError], says: str) -> None:
    with pytest.raises(error, match=says):
        use()
