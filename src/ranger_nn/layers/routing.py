"""Balanced routing: every sample to one cluster, every cluster exactly `capacity` samples, shapes known beforehand.

    scores (groups, samples, clusters)  ->  slot (groups, samples): a permutation; slot // capacity is the cluster

Greedy, in rounds: each sample asks for the best cluster that is not full, each cluster keeps the best of those that ask
(deferred acceptance, Gale & Shapley 1962, cut off after `rounds`); what is left takes the free slots in order.

Twice the same algorithm: `balanced_slots` has fixed shapes, no scatter and no loop over clusters, for graphs that are
compiled; `balanced_slots_now` looks only at the samples that still wait, in NumPy, and takes a tenth of the time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ranger_nn.errors import PartitionError
from ranger_nn.partition.kmeans import KMeans

ROUNDS = 6


def check_capacity(samples: int, clusters: int, capacity: int) -> None:
    """Refuse a capacity that cannot hold all samples.

    Raises:
        PartitionError: clusters * capacity < samples.
    """
    if clusters * capacity < samples:
        raise PartitionError(
            f"the clusters must hold all samples: {clusters} clusters of capacity {capacity} hold {clusters * capacity}, "
            f"there are {samples}; give a capacity of at least {-(-samples // clusters)}, or more clusters"
        )


def balanced_slots(xp: Any, scores: Any, capacity: int, present: Any = None, rounds: int = ROUNDS) -> Any:
    """Slot of each sample: (groups, samples) integers, a permutation of clusters * capacity slots.

    Args:
        xp: array namespace.
        scores: (groups, samples, clusters), samples = clusters * capacity, finite; the higher the better.
        capacity: slots of a cluster.
        present: (groups, samples) bool: False for samples that only fill up, which come last; None: all are there.
        rounds: how often samples that were turned away ask again.
    """
    choice, best = xp.argmax(scores, axis=2), xp.max(scores, axis=2)
    own = xp.reshape(xp.cumulative_sum(xp.ones_like(choice[0, : scores.shape[2]]), axis=0) - 1, (1, 1, -1))
    there = choice >= 0 if present is None else present
    first, last = xp.max(best), xp.min(scores)
    beyond = first - last + 1
    settled = choice < 0
    for _ in range(rounds):
        # those who are in stay, whoever comes
        eager = xp.where(settled, xp.zeros_like(best) + (first + beyond), best)
        place, asked = _places(xp, choice, eager, own, there)
        settled = xp.logical_and(place < capacity, there)
        still_open = xp.where(asked[:, None] < capacity, scores, xp.zeros_like(scores) + (last - beyond))
        choice = xp.where(settled, choice, xp.argmax(still_open, axis=2))
        best = xp.max(still_open, axis=2)
    taken = xp.minimum(asked, xp.zeros_like(asked) + capacity)
    return _filled(xp, choice, place, settled, there, taken, capacity)


def balanced_slots_now(
    scores: np.ndarray, capacity: int, present: np.ndarray | None = None, rounds: int = ROUNDS
) -> np.ndarray:
    """As `balanced_slots`, of NumPy arrays, with the work of each round only for those that wait."""
    there = [None] * len(scores) if present is None else list(present)
    return np.stack([_greedy(s, capacity, p, rounds) for s, p in zip(scores, there)])


def _greedy(scores: np.ndarray, capacity: int, present: np.ndarray | None, rounds: int) -> np.ndarray:
    samples, clusters = scores.shape
    slot, taken = np.full(samples, -1, np.int64), np.zeros(clusters, np.int64)
    waiting = np.arange(samples) if present is None else np.flatnonzero(present)
    for k in range(rounds):
        rows = scores if k == 0 and present is None else scores[waiting]
        if k:
            rows[:, taken >= capacity] = -np.inf
        choice = rows.argmax(1)
        best = rows[np.arange(len(rows)), choice]
        order = np.argsort(-best)
        order = order[np.argsort(choice[order].astype(np.int16 if clusters < 2**15 else np.int64), kind="stable")]
        asked = choice[order]
        place = np.arange(len(asked)) - np.searchsorted(asked, np.arange(clusters))[asked] + taken[asked]
        settled = place < capacity
        slot[waiting[order[settled]]] = asked[settled] * capacity + place[settled]
        taken += np.bincount(asked[settled], minlength=clusters)
        waiting = np.sort(waiting[order[~settled]])
        if not len(waiting):
            break
    free = np.arange(clusters * capacity).reshape(clusters, capacity)
    free = free[np.arange(capacity) >= taken[:, None]]
    late = np.flatnonzero(slot < 0)
    if present is not None:  # those that are there first
        late = late[np.argsort(~present[late], kind="stable")]
    slot[late] = free
    return slot


def _places(xp: Any, choice: Any, eager: Any, own: Any, there: Any) -> tuple[Any, Any]:
    """(place of each sample in the queue of its cluster, length of each queue (groups, clusters)); fillings do not ask.

    Queues are in the order of `eager`, then of samples: a stable sort by `eager`, another by cluster, and the inverse.
    """
    by_eager = xp.argsort(-eager, axis=1)
    queue = xp.where(there, choice, xp.zeros_like(choice) + own.shape[2])
    by_cluster = xp.argsort(xp.take_along_axis(queue, by_eager, axis=1), axis=1)
    rank = xp.argsort(xp.take_along_axis(by_eager, by_cluster, axis=1), axis=1)
    asks = xp.logical_and(choice[:, :, None] == own, there[:, :, None])
    asked = xp.sum(xp.astype(asks, rank.dtype), axis=1)
    starts = xp.cumulative_sum(asked, axis=1) - asked
    return rank - xp.take_along_axis(starts, choice, axis=1), asked


def _filled(xp: Any, choice: Any, place: Any, settled: Any, there: Any, taken: Any, capacity: int) -> Any:
    """Slots: those who are in at their place, then the others on the free slots in order, fillings last."""
    free = capacity - taken
    ends = xp.cumulative_sum(free, axis=1)
    left = xp.astype(xp.logical_and(there, xp.logical_not(settled)), place.dtype)
    fills = xp.astype(xp.logical_not(there), place.dtype)
    after = xp.sum(left, axis=1, keepdims=True) + xp.cumulative_sum(fills, axis=1) - 1
    waiting = xp.where(there, xp.cumulative_sum(left, axis=1) - 1, after)
    other = xp.sum(xp.astype(ends[:, None] <= waiting[:, :, None], choice.dtype), axis=2)
    other = xp.minimum(other, xp.zeros_like(other) + (taken.shape[1] - 1))
    before = xp.take_along_axis(taken - (ends - free), other, axis=1)
    found = xp.astype(xp.where(settled, choice, other), place.dtype) * capacity
    return found + xp.where(settled, place, waiting + xp.astype(before, place.dtype))


def moved_centres(xp: Any, centres: Any, sums: Any, counts: Any, decay: float, far: Any) -> Any:
    """Centres (..., clusters, d) after a step of their moving average; empty clusters begin anew at `far`.

    Args:
        xp: array namespace.
        centres: as they are.
        sums: (..., clusters, d) sums of the samples of each cluster.
        counts: (..., clusters, 1) how many.
        decay: of the average.
        far: (..., clusters, d) samples that lie far from their centres, for clusters that have none.
    """
    means = sums / xp.maximum(counts, xp.ones_like(counts))
    return xp.where(counts > 0, decay * centres + (1 - decay) * means, far)


def check_attention(heads: int, partition: Any, features: int, causal: bool) -> None:
    """Refuse what clustered attention cannot be."""
    if not isinstance(partition, KMeans) or not partition.balanced:
        raise PartitionError(
            f"ClusteredAttention needs regions of equal size: KMeans(regions, balanced=True); got {partition!r}"
        )
    if heads < 1 or features % heads:
        raise PartitionError(f"heads divide the width of the tokens; got {heads} heads for {features} features")
    if partition.update == "gradient":
        raise PartitionError('the routing has no gradient: update is "ema" or "none" for ClusteredAttention')
    if causal:
        raise PartitionError(
            "ClusteredAttention has no causal form: regions mix earlier and later tokens. Use full attention, or "
            "GatedLinearAttention"
        )
