"""Balanced routing: every sample to one cluster, every cluster exactly `capacity` samples, shapes known beforehand.

    scores (groups, samples, clusters)  ->  slot (groups, samples): a permutation; slot // capacity is the cluster

Greedy, in rounds. Samples stand in line, those with the highest best score first. In each round each sample that still
waits asks for its best cluster that is not full, and clusters admit in the order of the line; what is left after
`rounds` takes the free slots in order. (Clusters that choose among those who ask, as in Gale & Shapley 1962, kept the same
share of attention in trials, within 0.3 points.)

Twice the same algorithm: `balanced_slots` has fixed shapes, a sort in each round and no loop over clusters, for graphs that
are compiled; `balanced_slots_now` looks only at the samples that still wait, in NumPy, and takes a tenth of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ranger_nn.errors import InputError, PartitionError
from ranger_nn.partition.kmeans import KMeans

ROUNDS = 4


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


def balanced_slots(
    xp: Any,
    scores: Any,
    capacity: int,
    present: Any = None,
    rounds: int = ROUNDS,
    inverse: Callable[[Any], Any] | None = None,
) -> Any:
    """Slot of each sample: (groups, samples) integers, a permutation of clusters * capacity slots.

    Args:
        xp: array namespace.
        scores: (groups, samples, clusters), samples = clusters * capacity, finite; the higher the better.
        capacity: slots of a cluster.
        present: (groups, samples) bool: False for samples that only fill up, which come last; None: all are there.
        rounds: how often samples that were turned away ask again.
        inverse: gives the inverse of permutations along axis 1 faster than a sort does; None: a sort.
    """
    back_of = inverse or (lambda order: xp.argsort(order, axis=1))
    best, low = xp.max(scores, axis=2), xp.min(scores)
    high = xp.max(best)
    out = low - (high - low) - 1
    waits = best >= low if present is None else present
    line = xp.argsort(-xp.where(waits, best, xp.zeros_like(best) + out), axis=1)
    samples, clusters = scores.shape[1], scores.shape[2]
    own = xp.cumulative_sum(xp.ones_like(line[0, :clusters]), axis=0) - 1
    group = xp.cumulative_sum(xp.ones_like(line[:, :1]), axis=0) - 1
    rows = xp.take(xp.reshape(scores, (-1, clusters)), xp.reshape(line + group * samples, (-1,)), axis=0)
    rows = xp.reshape(rows, (-1, samples, clusters))
    waits = xp.take_along_axis(waits, line, axis=1)
    there, slot, taken = waits, xp.zeros_like(line), xp.zeros_like(line[:, :clusters])
    for turn in range(rounds):
        still_open = rows + xp.astype(taken >= capacity, rows.dtype)[:, None] * (out - high) if turn else rows
        top = xp.max(still_open, axis=2, keepdims=True)
        choice = xp.min(xp.where(still_open == top, own, xp.zeros_like(own) + (clusters - 1)), axis=2)
        place, asked = _places(xp, choice, waits, taken, back_of)
        slot = xp.where(waits, choice * capacity + place, slot)
        waits = xp.logical_and(waits, place >= capacity)
        taken = xp.minimum(taken + asked, xp.zeros_like(taken) + capacity)
    slot = _filled(xp, slot, waits, there, taken, capacity)
    return xp.take_along_axis(slot, back_of(line), axis=1)


def balanced_slots_now(
    scores: np.ndarray, capacity: int, present: np.ndarray | None = None, rounds: int = ROUNDS
) -> np.ndarray:
    """As `balanced_slots`, of NumPy arrays, with the work of each round only for those that wait."""
    there = [None] * len(scores) if present is None else list(present)
    return np.stack([_greedy(s, capacity, p, rounds) for s, p in zip(scores, there)])


def _greedy(scores: np.ndarray, capacity: int, present: np.ndarray | None, rounds: int) -> np.ndarray:
    samples, clusters = scores.shape
    slot, taken = np.full(samples, -1, np.int64), np.zeros(clusters, np.int64)
    best = scores.max(1)
    line = np.argsort(-best if present is None else np.where(present, -best, np.inf), kind="stable")
    waiting = line if present is None else line[: np.count_nonzero(present)]
    for _ in range(rounds):
        rows = scores[waiting]
        rows[:, taken >= capacity] = -np.inf
        choice = rows.argmax(1)
        order = np.argsort(choice.astype(np.int16 if clusters < 2**15 else np.int64), kind="stable")
        asked = choice[order]
        place = np.arange(len(asked)) - np.searchsorted(asked, np.arange(clusters))[asked] + taken[asked]
        settled = place < capacity
        slot[waiting[order[settled]]] = asked[settled] * capacity + place[settled]
        taken += np.bincount(asked[settled], minlength=clusters)
        waiting = waiting[np.sort(order[~settled])]
        if not len(waiting):
            break
    free = np.arange(clusters * capacity).reshape(clusters, capacity)
    slot[line[slot[line] < 0]] = free[np.arange(capacity) >= taken[:, None]]
    return slot


def _places(xp: Any, choice: Any, waits: Any, taken: Any, back_of: Callable[[Any], Any]) -> tuple[Any, Any]:
    """(place of each sample in its cluster after those who are in, how many ask for each cluster (groups, clusters)).

    Sorted by what they ask for, in the order of the line; who does not wait comes last, as if there were one more cluster.
    """
    samples, clusters = choice.shape[1], taken.shape[1]
    key = xp.where(waits, choice, xp.zeros_like(choice) + clusters)
    order = xp.argsort(key, axis=1)  # stable where the namespace is
    group = xp.cumulative_sum(xp.ones_like(key[:, :1]), axis=0) - 1
    inside = xp.reshape(xp.take_along_axis(key, order, axis=1) + group * (clusters + 1), (-1,))
    each = xp.cumulative_sum(xp.ones_like(taken[:1]), axis=1) - 1
    bounds = xp.reshape(each + group * (clusters + 1), (-1,))
    starts, ends = (
        xp.reshape(xp.astype(xp.searchsorted(inside, bounds, side=side), key.dtype), (-1, clusters)) - group * samples
        for side in ("left", "right")
    )
    offset = xp.concat([taken - starts, xp.zeros_like(taken[:, :1])], axis=1)
    return back_of(order) + xp.take_along_axis(offset, key, axis=1), ends - starts


def _filled(xp: Any, slot: Any, waits: Any, there: Any, taken: Any, capacity: int) -> Any:
    """Slots in the order of the line: those who still wait, then fillings, on the free slots in order."""
    place = xp.cumulative_sum(xp.ones_like(slot), axis=1) - 1
    occupied = place % capacity < xp.take_along_axis(taken, place // capacity, axis=1)
    free = xp.argsort(xp.astype(occupied, slot.dtype), axis=1)
    rest = xp.logical_not(xp.logical_and(there, xp.logical_not(waits)))
    turn = xp.cumulative_sum(xp.astype(rest, slot.dtype), axis=1) - 1
    turn = xp.maximum(turn, xp.zeros_like(turn))
    return xp.where(rest, xp.take_along_axis(free, turn, axis=1), slot)


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


def tokens_of_region(tokens: int, regions: int, capacity: int | None) -> int:
    """Queries, and keys, of a region: `capacity`, or the least that holds all.

    Raises:
        PartitionError: more regions than tokens, a capacity too small.
    """
    if regions > tokens:
        raise PartitionError(
            f"each region needs at least one token: {regions} regions were asked for, there are {tokens} tokens; ask for "
            f"at most {tokens}"
        )
    capacity = -(-tokens // regions) if capacity is None else capacity
    check_capacity(tokens, regions, capacity)
    return capacity


def check_mask(found: tuple[Any, ...], needed: tuple[int, int], dtype: str, boolean: bool) -> None:
    """Refuse a mask that is not (batch, N) bool.

    Raises:
        InputError: another shape, or another dtype.
    """
    if found != needed or not boolean:
        raise InputError(
            f"a mask is (batch, N) = {needed} bool, True for tokens that are there; got shape {found} of {dtype}. Compare "
            "it with 0, or leave it out"
        )
