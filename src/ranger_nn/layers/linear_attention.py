"""Gated linear attention by chunks of time, for any array namespace (Yang et al. 2024, section 4, in a form safe for any gate).

    S_t = diag(alpha_t) S_{t-1} + k_t^T v_t         o_t = q_t S_t            S (keys, values), alpha in (0, 1]

    partition    chunks of time
    local        summary of each chunk: decay and sum of k^T v to its end        (an affine map of S)
    aggregate    S at the ends of chunks: a linear scan over the summaries
    local        o = q S(before the chunk), and what steps of the chunk give each other

Inside a chunk halves are taken again and again: steps of the second half see those of the first through the middle,

    exp(G_i - G_middle) <= 1    and    exp(G_middle - G_j) <= 1        G: running sum of log alpha

two factors that cannot overflow, so that matrix products do the work. The textbook form divides k by exp(G), which
overflows where the gate closes. Blocks of four steps are done by exponents G_i - G_j directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ranger_nn.aggregate.affine import Affine
from ranger_nn.errors import PartitionError

CHUNK, BASE = 64, 4
TEMPERATURE = 16.0
"""Gates are sigmoid(.) ** (1 / 16), so that they begin near one (section 4.4)."""
LEAST = -80.0
"""The least log decay of a step: exp(-80) = 2e-35, below which sums of other decays would lose digits."""

AFFINE = Affine()


def gated_attention(
    xp: Any, scan: Callable[..., Any], q: Any, k: Any, v: Any, log_decay: Any, initial: Any, chunk: int | None = None
) -> tuple[Any, Any]:
    """(o, S after the last step).

    Args:
        xp: array namespace.
        scan: its `linear_scan`.
        q, k, log_decay: (batch, heads, time, keys); log_decay at most 0, below -80 it counts as -80.
        v: (batch, heads, time, values).
        initial: (batch, heads, keys, values).
        chunk: steps of a chunk, best a power of two; None: 64.
    """
    steps, values = q.shape[2], v.shape[3]
    size = min(chunk or CHUNK, 1 << (steps - 1).bit_length())
    count = -(-steps // size)
    log_decay = xp.maximum(log_decay, xp.zeros_like(log_decay) + LEAST)
    q, k, v, log_decay = (chunks(xp, x, count, size) for x in (q, k, v, log_decay))
    g = xp.cumulative_sum(log_decay, axis=3)
    end = g[:, :, :, -1:]
    decay, value = AFFINE.lift(xp, xp.exp(end), xp.matmul(transposed(xp, k * xp.exp(end - g)), v))
    decay = transposed(xp, decay) + xp.zeros_like(value)
    decay, value = (xp.permute_dims(x, (0, 2, 1, 3, 4)) for x in (decay, value))
    ends = scan(decay, value, initial)
    starts = xp.permute_dims(xp.concat([initial[:, None], ends[:, :-1]], axis=1), (0, 2, 1, 3, 4))
    o = xp.matmul(q * xp.exp(g), starts) + within(xp, q, k, v, g)
    return xp.reshape(o, (-1, o.shape[1], count * size, values))[:, :, :steps], ends[:, -1]


def within(xp: Any, q: Any, k: Any, v: Any, g: Any) -> Any:
    """What the steps of a chunk give each other: q, k, g (..., size, keys), v (..., size, values) -> (..., size, values)."""
    heads, count, size = q.shape[1:4]
    if size <= BASE or size % 2:
        gap = g[..., :, None, :] - g[..., None, :, :]
        order = xp.arange(size)
        past = (order[:, None] >= order[None, :])[..., None]
        weight = xp.where(past, xp.exp(xp.where(past, gap, xp.zeros_like(gap))), xp.zeros_like(gap))
        return xp.matmul(xp.sum(q[..., :, None, :] * k[..., None, :, :] * weight, axis=-1), v)
    halves = [xp.reshape(x, (-1, heads, count * 2, size // 2, x.shape[-1])) for x in (q, k, v, g)]
    inside = xp.reshape(within(xp, *halves), (-1, heads, count, size, v.shape[-1]))
    half = size // 2
    middle = g[:, :, :, half - 1 : half]
    late = q[:, :, :, half:] * xp.exp(g[:, :, :, half:] - middle)
    early = k[:, :, :, :half] * xp.exp(middle - g[:, :, :, :half])
    across = xp.matmul(xp.matmul(late, transposed(xp, early)), v[:, :, :, :half])
    return xp.concat([inside[:, :, :, :half], inside[:, :, :, half:] + across], axis=3)


def chunks(xp: Any, x: Any, count: int, size: int) -> Any:
    """(batch, heads, time, d) -> (batch, heads, count, size, d), filled up with steps that do nothing."""
    heads, steps, width = x.shape[1:]
    if count * size > steps:
        filling = xp.zeros_like(x[:, :, :1]) + xp.zeros((1, 1, count * size - steps, 1), dtype=x.dtype)
        x = xp.concat([x, filling], axis=2)
    return xp.reshape(x, (-1, heads, count, size, width))


def transposed(xp: Any, x: Any) -> Any:
    """The last two of five axes exchanged."""
    return xp.permute_dims(x, (0, 1, 2, 4, 3))


def check_heads(heads: int, keys: int, values: int) -> None:
    """Refuse heads that do not divide the widths.

    Raises:
        PartitionError: fewer than one head, widths that are no multiples of heads.
    """
    if heads < 1 or keys % heads or values % heads or min(keys, values) < 1:
        raise PartitionError(
            f"heads divide the width of keys and of values; got {heads} heads for {keys} and {values}: choose widths that "
            f"are multiples of {max(heads, 1)}, or other heads"
        )
