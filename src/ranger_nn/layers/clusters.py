"""K-means regions of samples: which region each sample lies in, samples brought together by region, centres that follow.

    rows (n, d)  --route-->  slots (blocks, size, d)  --local network of each block's region-->  slots  --back--> rows

Unbalanced, a region takes what lies nearest to its centre, and its samples fill as many blocks of `size` as they need
(the blocks of Gale et al. 2022, MegaBlocks, section 5.1): nothing is dropped, and the number of blocks is bounded by
shapes alone, so that compiled graphs are static. With three regions that hold 5, 1 and 2 of 8 rows, blocks of 2:

    row     0 1 2 3 4 5 6 7        region 0: rows 0 1 4 5 7    region 1: row 3    region 2: rows 2 6
    block      0      1      2      3      4      5
    owner      0      0      0      1      2      (none)       at most (8 + 3 * (2 - 1)) // 2 = 5 blocks
    take      0 1    4 5    7 .    3 .    2 6

Balanced, every region takes `capacity` slots of each group of samples (`layers/routing.py`); one block is one region.
Either way `Routes` says which row each slot takes and which slot each row went to, so nothing is scattered. Enter at
`nearness`, `grouped` (`grouped_now`: outside of graphs), `balanced`; `moved` is a training step of the centres.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ranger_nn.aggregate.pieces import Call, Concat, Stitch
from ranger_nn.errors import InputError, PartitionError
from ranger_nn.layers.routing import moved_centres
from ranger_nn.partition.kmeans import KMeans

# a region is empty when none of the last EMPTY_AFTER * clusters samples was its
EMPTY_AFTER = 16
# what a block's copy of its region's parameters costs, in samples
COPY = 16


class Routes(NamedTuple):
    """Which samples are together.

    Attributes:
        take: (slots,) the row that each slot holds; a slot without one of its own holds some row.
        used: (slots,) bool, slots with a row of their own; None: all.
        back: (rows,) the slot of each row.
        owner: (blocks,) region of each block; None: block k is region k.
        region: (rows,) region of each row; any where the row is absent.
        there: (rows,) bool, rows that are not absent; None: all.
        shape: (blocks, size) or, of sets, (regions, groups, capacity).
    """

    take: Any
    used: Any
    back: Any
    owner: Any
    region: Any
    there: Any
    shape: tuple[Any, ...]


def nearness(xp: Any, x: Any, centres: Any, absolute: bool = False) -> Any:
    """Minus half the squared distance of each row (rows, d) to each centre (clusters, d): (rows, clusters).

    Up to a number for each row, unless `absolute`. Both are taken relative to the mean of the centres first, or far from
    the origin the products would cancel. One product of (x, 1) and (c, -|c|^2 / 2): no second pass over the result.
    """
    middle = xp.mean(centres, axis=0, keepdims=True)
    x, centres = x - middle, centres - middle
    left, right = [x, xp.ones_like(x[:, :1])], [centres, xp.sum(centres * centres, axis=1, keepdims=True) / -2]
    if absolute:
        left.append(xp.sum(x * x, axis=1, keepdims=True) / -2)
        right.append(xp.ones_like(centres[:, :1]))
    return xp.matmul(xp.concat(left, axis=1), xp.permute_dims(xp.concat(right, axis=1), (1, 0)))


def block_size(rows: Any, clusters: int) -> Any:
    """Size of blocks when the loads are not known: at most a quarter more slots than rows, and 4 blocks for a region."""
    return rows // (4 * clusters) + 1


def block_count(rows: Any, clusters: int, size: Any) -> Any:
    """The most blocks that any loads of `clusters` regions need: sum of ceil(load / size)."""
    return (rows + clusters * (size - 1)) // size


def arrangement(loads: np.ndarray, separate: bool = False) -> tuple[int, int | None]:
    """(size, blocks) when the loads are known; blocks None: one for each region, as large as the largest load.

    The latter needs no copy of parameters; with uneven loads it computes much that is not used. `separate`: always so.
    """
    largest, rows = max(int(loads.max()), 1), int(loads.sum())
    size = block_size(rows, len(loads))
    if separate or len(loads) * largest * size <= rows * (size + COPY):  # there are at least rows / size blocks
        return largest, None
    blocks = int((-(-loads // size)).sum())
    return (largest, None) if len(loads) * largest <= blocks * (size + COPY) or not blocks else (size, blocks)


def grouped(xp: Any, region: Any, there: Any, rows: Any, clusters: int, size: Any, blocks: Any = None) -> Routes:
    """Rows brought together by region in blocks.

    Args:
        xp: array namespace.
        region: (rows,) integers.
        there: (rows,) bool, False for absent rows, which no block holds; None: all are there.
        rows: how many.
        clusters: regions.
        size: rows of a block.
        blocks: how many; None: one for each region, whose load is at most `size`.
    """
    wanted = region if there is None else xp.where(there, region, xp.zeros_like(region) + clusters)
    order = xp.argsort(wanted)  # stable where the namespace is
    ids = _iota(xp, clusters, order)
    inside = xp.astype(xp.take(wanted, order, axis=0), order.dtype)
    starts = xp.astype(xp.searchsorted(inside, ids), order.dtype)
    loads = xp.astype(xp.searchsorted(inside, ids, side="right"), order.dtype) - starts
    held = xp.ones_like(loads) if blocks is None else (loads + (size - 1)) // size
    after = xp.cumulative_sum(held, axis=0)
    first = after - held
    block = ids if blocks is None else _iota(xp, blocks, order)
    owner = block
    if blocks is not None:
        found = xp.astype(xp.searchsorted(after, block, side="right"), order.dtype)
        owner = xp.minimum(found, xp.zeros_like(found) + (clusters - 1))
    load = xp.take(loads, owner, axis=0)[:, None]
    place = ((block - xp.take(first, owner, axis=0)) * size)[:, None] + _iota(xp, size, order)[None, :]
    within = xp.take(starts, owner, axis=0)[:, None] + xp.minimum(place, xp.maximum(load - 1, xp.zeros_like(load)))
    within = xp.reshape(xp.minimum(within, xp.zeros_like(within) + (rows - 1)), (-1,))
    slot = xp.take(first * size - starts, xp.astype(region, order.dtype), axis=0) + xp.argsort(order)
    return Routes(
        take=xp.take(order, within, axis=0),
        used=xp.reshape(place < load, (-1,)),
        back=slot if there is None else xp.where(there, slot, xp.zeros_like(slot)),
        owner=None if blocks is None else owner,
        region=region,
        there=there,
        shape=(clusters if blocks is None else blocks, size),
    )


def grouped_now(region: np.ndarray, there: np.ndarray | None, clusters: int, separate: bool) -> Routes:
    """As `grouped`, in NumPy, whose small operations cost a tenth, with blocks that fit the loads.

    Args:
        region: (rows,) integers.
        there: (rows,) bool, or None.
        clusters: regions.
        separate: one block for each region, however large.
    """
    short = region.astype(np.int16 if clusters < 2**15 - 1 else np.int64)  # few digits to sort by
    if there is not None:
        short[~there] = clusters
    order = short.argsort(kind="stable")
    loads = np.bincount(short, minlength=clusters)[:clusters]
    size, blocks = arrangement(loads, separate)
    ends = loads.cumsum()
    held, owner = np.arange(clusters), None  # first block of a region, region of a block
    if blocks is not None:
        each = -(-loads // size)
        held, owner = each.cumsum() - each, np.repeat(held, each)
    own = order if there is None else order[: ends[-1]]
    slots = np.arange(len(own)) + (held * size - ends + loads)[short[own]]
    back = np.zeros_like(order)
    back[own] = slots
    total = clusters if blocks is None else blocks
    take = np.full(total * size, order[0])
    take[slots] = own
    used = np.zeros(total * size, bool)
    used[slots] = True
    return Routes(take, used, back, owner, region, there, (total, size))


def filled(xp: Any, near: Any, there: Any, rows: Any, capacity: Any) -> tuple[Any, Any]:
    """Scores and presence for balanced routing, (groups, clusters * capacity, ...), where `rows` do not fill all slots.

    Args:
        xp: array namespace.
        near: (groups, rows, clusters).
        there: (groups, rows) bool, or None.
        rows: of each group.
        capacity: slots of a region.
    """
    place = _iota(xp, near.shape[2] * capacity, xp.argmax(near[:1, :1], axis=2))
    last = xp.minimum(place, xp.zeros_like(place) + (rows - 1))
    real = (place < rows)[None, :]
    present = xp.ones_like(near[:, :1, 0]) > 0 if there is None else xp.take(there, last, axis=1)
    return xp.take(near, last, axis=1), xp.logical_and(real, present)


def balanced(
    xp: Any, slots: Any, there: Any, groups: Any, rows: Any, capacity: Any, clusters: int, sets: bool
) -> Routes:
    """Rows brought together by the slots of balanced routing.

    Args:
        xp: array namespace.
        slots: (groups, clusters * capacity), a permutation of the slots of each group.
        there: (groups, clusters * capacity) bool; the first `rows` of each group are its rows; None: all are there.
        groups: how many.
        rows: of each group.
        capacity: slots of a region.
        clusters: regions.
        sets: whether each group's part of a region stays apart.
    """
    source = xp.argsort(slots, axis=1)
    slots = xp.astype(slots, source.dtype)
    group = _iota(xp, groups, source)[:, None]

    def by_region(a: Any) -> Any:
        split = xp.reshape(a, (groups, clusters, capacity))
        return xp.reshape(xp.permute_dims(split, (1, 0, 2)), (-1,))

    region = slots // capacity
    back = (region * groups + group) * capacity + slots % capacity
    return Routes(
        take=by_region(group * rows + xp.minimum(source, xp.zeros_like(source) + (rows - 1))),
        used=None if there is None else by_region(xp.take_along_axis(there, source, axis=1)),
        back=xp.reshape(back[:, :rows], (-1,)),
        owner=None,
        region=xp.reshape(region[:, :rows], (-1,)),
        there=None if there is None else xp.reshape(there[:, :rows], (-1,)),
        shape=(clusters, groups, capacity) if sets else (clusters, groups * capacity),
    )


def moved(xp: Any, taken: Any, used: Any, owner: Any, centres: Any, unseen: Any, decay: float) -> tuple[Any, Any]:
    """(centres, unseen) after a training step: each centre moves to the mean of its samples, empty ones begin anew.

    A centre that had none of the last `EMPTY_AFTER * clusters` samples goes where a sample of this step lies farthest
    from its own centre, the next such centre to the next farthest.

    Args:
        xp: array namespace.
        taken: (blocks, size, d) samples by region, without gradient.
        used: (blocks, size) bool; None: all.
        owner: (blocks,) region of each block; None: block k is region k.
        centres: (clusters, d).
        unseen: (clusters,) samples since the last one of each centre.
        decay: of the moving average; 0 gives where the centres are drawn to.
    """
    clusters, width = centres.shape
    weight = xp.ones_like(taken[:, :, :1]) if used is None else xp.astype(used, taken.dtype)[:, :, None]
    taken = xp.where(weight > 0, taken, xp.zeros_like(taken))
    sums, counts = xp.sum(taken, axis=1), xp.sum(weight, axis=1)
    home = centres
    if owner is not None:
        mine = xp.astype(_iota(xp, clusters, owner)[:, None] == owner[None, :], taken.dtype)
        sums, counts, home = xp.matmul(mine, sums), xp.matmul(mine, counts), xp.take(centres, owner, axis=0)
    unseen = xp.where(counts[:, 0] > 0, xp.zeros_like(unseen), unseen + xp.astype(xp.sum(counts), unseen.dtype))
    apart = xp.reshape(xp.sum((taken - home[:, None]) ** 2, axis=2) * weight[:, :, 0], (-1,))
    empty = unseen >= EMPTY_AFTER * clusters
    farthest = xp.argsort(-apart)
    turn = xp.cumulative_sum(xp.astype(empty, farthest.dtype), axis=0) - 1
    turn = xp.minimum(xp.maximum(turn, xp.zeros_like(turn)), xp.zeros_like(turn) + (_size(xp, farthest) - 1))
    pick = xp.take(farthest, turn, axis=0)
    anew = xp.logical_and(empty, xp.take(apart, pick, axis=0) > 0)
    candidates = xp.take(xp.reshape(taken, (-1, width)), pick, axis=0)
    far = xp.where(anew[:, None], candidates, centres)
    return moved_centres(xp, centres, sums, counts, decay, far), xp.where(anew, xp.zeros_like(unseen), unseen)


# ---------------------------------------------------------------------------------------- refusals


def check_experts(partition: Any, local: Any, is_network: bool, wanted: str) -> None:
    """Refuse what cannot be experts of regions.

    Raises:
        PartitionError: a partition that is not `KMeans`, a local network of another kind.
    """
    if not isinstance(partition, KMeans):
        raise PartitionError(f"RegionExperts routes samples by KMeans(regions); got {partition!r}")
    if not is_network:
        raise PartitionError(
            f"RegionExperts copies one network for each region, a {wanted}; got {type(local).__name__}. For networks of "
            'your own for each region: RegionalAggregator(KMeans(...), "stitch", local=[...])'
        )


def check_samples(partition: KMeans, shape: Sequence[Any], features: int | None) -> None:
    """Refuse what K-means cannot route.

    Raises:
        InputError: not (batch, d) or (batch, N, d), no samples, or another d than the centres have.
    """
    if len(shape) not in (2, 3):
        raise InputError(
            f"{partition} routes samples (batch, d) or tokens (batch, N, d); got shape {tuple(shape)}. Reshape it, for "
            "an image to (batch, height * width, channels)"
        )
    if 0 in shape:
        raise InputError(f"{partition} routes at least one sample; got shape {tuple(shape)}")
    if features is not None and shape[-1] != features:
        raise InputError(f"the centres of {partition} have {features} features; got shape {tuple(shape)}")


def check_mask(mask: Any, shape: Sequence[Any]) -> None:
    """Refuse a mask of another shape than the samples'.

    Raises:
        InputError: the shapes differ.
    """
    if mask is not None and tuple(mask.shape) != tuple(shape[:-1]):
        raise InputError(f"mask is bool, one for each sample: {tuple(shape[:-1])}; got {tuple(mask.shape)}")


def check_join(partition: KMeans, over: Any, rank: int) -> None:
    """Refuse aggregators that have nothing to join.

    Raises:
        PartitionError: a reduction of samples (batch, d); regions of unequal size kept apart.
    """
    if isinstance(over, Stitch):
        return
    if rank == 2:
        raise PartitionError(
            f"a sample (batch, d) lies in one region of {partition}, so {type(over).__name__} has nothing to join: use "
            "stitch, or give tokens (batch, N, d), whose regions are joined"
        )
    if isinstance(over, Concat | Call) and not partition.balanced:
        raise PartitionError(
            f"{type(over).__name__} takes one result of each region, and the regions of {partition} differ in size: use "
            "KMeans(..., balanced=True), stitch, or a reduction over the tokens such as mean"
        )


def check_kept(lead: Sequence[Any], found: Sequence[Any]) -> None:
    """Refuse a local network that does not keep the samples it is given.

    Raises:
        PartitionError: the leading dimensions differ.
    """
    ours, theirs = tuple(lead), tuple(found[: len(lead)])
    if len(theirs) != len(ours) or any(
        isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(ours, theirs)
    ):
        raise PartitionError(
            f"results go back to their samples, so the local network must keep them: it was given {ours[1:]} samples "
            f"of each region and gave shape {tuple(found[1:])}; keep these dimensions, or join with mean, max ... of "
            "balanced regions"
        )


def _iota(xp: Any, n: Any, like: Any) -> Any:
    """0 ... n - 1, of the dtype and in the place of `like`."""
    device = getattr(like, "device", None)
    return xp.arange(n, dtype=like.dtype, **({} if device is None or isinstance(device, str) else {"device": device}))


def _size(xp: Any, x: Any) -> Any:
    """Elements of a vector: a number, or what counts them where it is not known beforehand."""
    return x.shape[0] if x.shape[0] is not None else xp.sum(xp.ones_like(x))
