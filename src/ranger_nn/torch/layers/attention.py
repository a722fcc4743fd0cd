"""`ClusteredAttention` for PyTorch: dense attention inside balanced K-means regions of tokens, all regions in one call.

    queries (heads, N, d)  --route-->  (heads, regions, capacity, d)  --attention inside--> (...)  --back--> (heads, N, d)

Queries and keys are routed to the same centres, for each head, each to exactly `capacity` slots of one region
(`ranger_nn.layers.routing`), so that shapes are static and attention is one batched call. Enter at
`clustered_attention` for own q, k, v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import array_api_compat.torch as xp
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranger_nn.errors import InputError
from ranger_nn.layers.routing import (
    balanced_slots,
    balanced_slots_now,
    check_attention,
    check_mask,
    moved_centres,
    tokens_of_region,
)
from ranger_nn.partition.kmeans import KMeans


def clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centres: Tensor,
    *,
    capacity: int | None = None,
    mask: Tensor | None = None,
    summaries: bool = False,
) -> Tensor:
    """Softmax attention in which each query sees the keys of its region (and, with `summaries`, a summary of each other).

    Args:
        q, k, v: (batch, heads, N, d), floating point.
        centres: (heads, regions, d), of which the direction counts; queries and keys go to the one they point to most.
        capacity: queries, and keys, of a region; None: ceil(N / regions).
        mask: (batch, N) bool, True for tokens that are there; None: all.
        summaries: add for every query the mean key and value of each other region, weighted by its number of keys (log
            of it added to the score).

    Returns:
        (batch, heads, N, d); zero for tokens that are not there.

    Raises:
        PartitionError: a capacity too small for all tokens, more regions than tokens.
        InputError: a mask of another shape or kind.

    Source: Roy et al. 2021, Routing Transformer, section 4.1 (routing by normalised queries and keys); Vyas et al. 2020,
    Fast Transformers with Clustered Attention (summaries of clusters).
    """
    return _attend(q, k, v, centres, capacity, mask, summaries)[0]


@dataclass(frozen=True)
class _Side:
    """Queries, or keys: where they went."""

    slots: Tensor
    """(batch * heads, tokens), a permutation."""
    sources: Tensor
    """Its inverse."""
    along: Tensor
    """(batch * heads, tokens, d), directions."""


def _attend(
    q: Tensor, k: Tensor, v: Tensor, centres: Tensor, capacity: int | None, mask: Tensor | None, summaries: bool
) -> tuple[Tensor, list[_Side], Tensor | None]:
    """(result, queries and keys, which of the tokens (batch * heads, tokens) are there)."""
    batch, heads, n, width = q.shape
    regions = centres.shape[1]
    capacity = tokens_of_region(n, regions, capacity)
    if mask is not None:
        check_mask(tuple(mask.shape), (batch, n), str(mask.dtype), mask.dtype == torch.bool)
    filling = regions * capacity - n
    there = None
    if filling or mask is not None:
        there = q.new_ones(batch, n, dtype=torch.bool) if mask is None else mask
        there = F.pad(there, (0, filling))[:, None].expand(batch, heads, -1).reshape(batch * heads, -1)
    if filling:
        q, k, v = (F.pad(t, (0, 0, 0, filling)) for t in (q, k, v))
    q, k, v = (t.reshape(batch * heads, -1, width) for t in (q, k, v))
    with torch.no_grad():
        sides = [_routed(t, centres, capacity, there) for t in (q, k)]
    shape = (batch * heads, regions, capacity, width)
    parts = ((q, sides[0]), (k, sides[1]), (v, sides[1]))
    a, b, c = (_Permute.apply(t, side.sources, side.slots).reshape(shape) for t, side in parts)
    keys_there = None if there is None else there.gather(1, sides[1].sources).reshape(*shape[:2], 1, capacity)
    y = _inside(a, b, c, keys_there, summaries)
    y = _Permute.apply(y.reshape(batch * heads, -1, width), sides[0].slots, sides[0].sources)
    if there is not None:
        y = torch.where(there[..., None], y, 0)
    return y.reshape(batch, heads, -1, width)[:, :, :n], sides, there


def _routed(t: Tensor, centres: Tensor, capacity: int, there: Tensor | None) -> _Side:
    """Each token of t (batch * heads, tokens, d) to a slot of the centre that it points to most."""
    along = F.normalize(t.float(), dim=-1)
    directions = F.normalize(centres.float(), dim=-1)
    with torch.autocast(t.device.type, enabled=False):
        scores = torch.matmul(along.unflatten(0, (-1, len(centres))), directions.mT).flatten(0, 1)
    slots = _slots(scores, capacity, there)
    return _Side(slots, _inverse(slots), along)


def _inside(q: Tensor, k: Tensor, v: Tensor, there: Tensor | None, summaries: bool) -> Tensor:
    """Attention of each region: q, k, v (groups, regions, capacity, d), there (groups, regions, 1, capacity)."""
    if not summaries:
        if there is None:
            return F.scaled_dot_product_attention(q, k, v)
        some = there.any(-1, keepdim=True)
        return torch.where(some, F.scaled_dot_product_attention(q, k, v, attn_mask=there | ~some), 0)
    groups, regions, capacity, width = k.shape
    weight = k.new_ones(groups, regions, 1, capacity) if there is None else there.to(k.dtype)
    count = weight.sum(-1)
    means = [(weight @ t)[:, :, 0] / count.clamp_min(1) for t in (k, v)]
    bias = count[..., 0].clamp_min(torch.finfo(k.dtype).tiny).log()
    others = torch.where(count[:, None, :, 0] > 0, bias[:, None].expand(groups, regions, regions), -torch.inf)
    others = others.masked_fill(torch.eye(regions, dtype=torch.bool, device=k.device), -torch.inf)
    own = (
        torch.zeros_like(weight[:, :, 0]) if there is None else torch.where(there[:, :, 0], 0.0, -torch.inf).to(k.dtype)
    )
    # a region without keys, where no other has any either: see its own, whatever they are
    own = torch.where((count > 0) | (others > -torch.inf).any(-1, keepdim=True), own, 0.0)
    keys, values = (
        torch.cat([t, m[:, None].expand(groups, regions, regions, width)], 2) for t, m in zip((k, v), means)
    )
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=torch.cat([own, others], -1)[:, :, None])


def _slots(scores: Tensor, capacity: int, there: Tensor | None) -> Tensor:
    """Balanced routing: at once on the CPU, in fixed shapes elsewhere and in exported programs."""
    if scores.device.type != "cpu" or torch.compiler.is_exporting():
        return balanced_slots(xp, scores, capacity, there)
    return _slots_now(scores, capacity, there)


@torch.library.custom_op("ranger_nn::balanced_slots", mutates_args=(), device_types="cpu")
def _slots_now(scores: Tensor, capacity: int, there: Optional[Tensor]) -> Tensor:  # noqa: UP045 (read by torch)
    """`balanced_slots_now`, as one operator of a compiled graph."""
    present = None if there is None else there.numpy()
    return torch.from_numpy(balanced_slots_now(scores.numpy(), capacity, present))


@_slots_now.register_fake
def _(scores: Tensor, capacity: int, there: Tensor | None) -> Tensor:
    return scores.new_empty(scores.shape[:2], dtype=torch.int64)


def _inverse(order: Tensor) -> Tensor:
    """The inverse of permutations along axis 1."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


class _Permute(torch.autograd.Function):
    """Tokens (groups, tokens, d) in another order; backward takes them back, with no addition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        """x[g, order[g]]."""
        ctx.save_for_backward(back)
        return _taken(x, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The inverse."""
        (back,) = ctx.saved_tensors
        return _taken(grads[0], back), None, None


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """x[g, order[g]] by one selection of rows."""
    groups, tokens, width = x.shape
    rows = (order + torch.arange(groups, device=x.device)[:, None] * tokens).flatten()
    return x.reshape(groups * tokens, width).index_select(0, rows).reshape(groups, tokens, width)


class ClusteredAttention(nn.Module):
    """Multi-head self-attention inside balanced K-means regions of the tokens.

    Cost N * capacity instead of N * N. With one region it is full attention. An approximation otherwise: good where the
    attention mass gathers in clusters, see `benchmarks/clustered_attention.py`.

    Args:
        heads: attention heads; they divide the width of the tokens.
        partition: `KMeans(regions, balanced=True)`; its centres, one set for each head, follow queries and keys in
            training by a moving average (`update="ema"`) or stay ("none").
        summaries: add each other region's mean key and value for all queries.
        features: width of the tokens.
        use_bias: biases in the projections.

    Shapes:
        x (batch, N, features) -> (batch, N, features); any N.

    Raises:
        PartitionError: heads that do not divide the width, a partition that is not balanced, a capacity too small, more
            regions than tokens, `causal=True`.
        InputError: a mask of another shape or kind; NaN in `adapt`.

    Source: Roy et al. 2021, Routing Transformer; Vyas et al. 2020, Fast Transformers with Clustered Attention.
    """

    centres: Tensor

    def __init__(
        self,
        heads: int,
        partition: KMeans,
        *,
        features: int,
        summaries: bool = False,
        use_bias: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_attention(heads, partition, features, causal)
        self.heads, self.partition, self.summaries = heads, partition, summaries
        self.project = nn.Linear(features, 3 * features, bias=use_bias)
        self.out = nn.Linear(features, features, bias=use_bias)
        generator = torch.Generator().manual_seed(partition.seed)
        start = torch.randn(heads, partition.clusters, features // heads, generator=generator)
        self.register_buffer("centres", F.normalize(start, dim=-1).to(self.out.weight.dtype))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention, then the output projection.

        Args:
            x: (batch, N, features).
            mask: (batch, N) bool, True for tokens that are there.
        """
        q, k, v = self._heads(x)
        y, sides, there = _attend(q, k, v, self.centres, self.partition.capacity, mask, self.summaries)
        if self.training and self.partition.update == "ema":
            self._follow(sides, there)
        return self.out(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    @torch.no_grad()
    def _follow(self, sides: list[_Side], there: Tensor | None) -> None:
        """Moving average of the directions of each region's queries and keys (Roy et al. 2021, section 4.1).

        Regions without any begin anew, at tokens far from their centres.
        """
        regions, width = self.partition.clusters, self.centres.shape[-1]
        tokens, kinds = [], []
        for side in sides:
            split = (-1, self.heads, regions, side.slots.shape[1] // regions)
            here = torch.ones_like(side.slots) if there is None else there.gather(1, side.sources)
            kinds.append(here.to(side.along.dtype).reshape(split).transpose(0, 1).transpose(1, 2).flatten(2))
            tokens.append(_taken(side.along, side.sources).reshape(*split, width).permute(1, 2, 0, 3, 4).flatten(2, 3))
        along, here = torch.cat(tokens, 2), torch.cat(kinds, 2)[..., None]
        centres = F.normalize(self.centres.to(along.dtype), dim=-1)
        apart = torch.where(here > 0, along @ centres[..., None], 2.0).flatten(1)
        far = along.flatten(1, 2).gather(1, apart.topk(regions, largest=False).indices[..., None].expand(-1, -1, width))
        far = torch.where(here.sum((1, 2, 3))[:, None, None] >= regions, far, centres)
        moved = moved_centres(xp, centres, (along * here).sum(2), here.sum(2), self.partition.decay, far)
        self.centres.copy_(F.normalize(moved, dim=-1))

    @torch.no_grad()
    def adapt(self, data: Tensor) -> None:
        """Put the centres where K-means finds the directions of the keys and queries of `data` (batch, N, features).

        Raises:
            InputError: NaN or infinite numbers, fewer tokens than regions.
        """
        if not torch.isfinite(data).all():
            raise InputError(
                f"adapt takes finite tokens; {int((~data.isfinite()).sum())} of {data.numel()} numbers are not"
            )
        q, k, _ = self._heads(data)
        for h in range(self.heads):
            both = torch.cat([t[:, h].flatten(0, 1) for t in (q, k)])
            fitted = self.partition.fit(np.asarray(F.normalize(both, dim=-1).cpu()))
            self.centres[h] = F.normalize(torch.as_tensor(fitted).to(self.centres), dim=-1)

    def extra_repr(self) -> str:
        """Heads and partition."""
        return f"heads={self.heads}, {self.partition}, summaries={self.summaries}"
