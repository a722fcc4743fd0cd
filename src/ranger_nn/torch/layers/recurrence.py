"""`MinGRU`, `LRU`, `GatedLinearAttention` for PyTorch: recurrences that are linear in their state, so that time is cut
in slices which all run at once, exactly (`ranger_nn.layers.scan`).

All take and give (batch, time, features), begin at `state`, and with `return_state` give the state after the last step:
feeding it to the next part of a stream gives what the whole sequence would. A masked step passes the state on unchanged.
"""

from __future__ import annotations

import math
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranger_nn.layers.linear_attention import TEMPERATURE, check_heads, gated_attention
from ranger_nn.layers.recurrence import check_sequence, check_units, ring
from ranger_nn.layers.scan import check_chunk
from ranger_nn.torch.layers.scan import linear_scan

Result = Tensor | tuple[Tensor, Tensor]


class _Recurrence(nn.Module):
    """What the three share: axes, masks, checks and the form of the result."""

    def __init__(self, units: int, features: int, batch_first: bool, return_state: bool, chunk: int | None) -> None:
        super().__init__()
        check_units(type(self).__name__, units, features)
        check_chunk(chunk)
        self.units, self.features, self.chunk = units, features, chunk
        self.batch_first, self.return_state = batch_first, return_state

    def forward(self, x: Tensor, state: Tensor | None = None, mask: Tensor | None = None) -> Result:
        """The outputs of all steps, and with `return_state` the state after the last.

        Args:
            x: (batch, time, features); (time, batch, features) with batch_first=False.
            state: as it was returned for the steps before these; None: zero.
            mask: (batch, time) bool, True for steps that are there; time first as x.
        """
        if not self.batch_first:
            x, mask = x.transpose(0, 1), None if mask is None else mask.transpose(0, 1)
        wanted = (x.shape[0], *self.state_shape)
        shapes = [None if v is None else tuple(v.shape) for v in (state, mask)]
        check_sequence(type(self).__name__, tuple(x.shape), self.features, wanted, *shapes)
        dtype = torch.promote_types(self.get_parameter("input.weight").dtype, torch.float32)
        if state is None:
            state = torch.zeros(wanted, dtype=dtype, device=x.device)
        y, last = self._run(x, state.to(dtype), mask)
        y = y if self.batch_first else y.transpose(0, 1)
        return (y, last) if self.return_state else y

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return (self.units,)

    def _run(self, x: Tensor, state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(outputs, last state); the state and the scan in float32 at least."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Widths."""
        return f"units={self.units}, features={self.features}, batch_first={self.batch_first}, chunk={self.chunk}"


class MinGRU(_Recurrence):
    """The minimal gated recurrent unit (Feng et al. 2024, Were RNNs all we needed?, section 3.1).

        z_t = sigmoid(W_z x_t + b_z)      h_t = (1 - z_t) * h_{t-1} + z_t * (W_h x_t + b_h)

    The gates do not look at the state, so the recurrence is linear in it. The scan needs no logarithms (section 3.1.2),
    so the candidate may be negative.

    Args:
        units: width of the state.
        features: width of x.
        use_bias: add b_z and b_h.
        batch_first: time is axis 1.
        return_state: also give the state after the last step, (batch, units).
        chunk: steps of a slice of the scan; None: chosen.

    Shapes:
        x (batch, time, features) -> (batch, time, units).

    Raises:
        PartitionError: widths or chunk below 1.
        InputError: x, state or mask of another shape, no step.
    """

    def __init__(
        self,
        units: int,
        *,
        features: int,
        use_bias: bool = True,
        batch_first: bool = True,
        return_state: bool = False,
        chunk: int | None = None,
    ) -> None:
        super().__init__(units, features, batch_first, return_state, chunk)
        self.input = nn.Linear(features, 2 * units, bias=use_bias)

    def _run(self, x: Tensor, state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        both = self.input(x).to(state.dtype)
        if mask is not None or torch.compiler.is_compiling():
            gate, candidate = both.chunk(2, -1)
            z = torch.sigmoid(gate)
            z = z if mask is None else torch.where(mask[..., None], z, 0)
            a, b = 1 - z, z * candidate
        else:
            a, b = _Gated.apply(both)
        h = linear_scan(a, b, state, self.chunk)
        return h.to(x.dtype), h[:, -1]


class _Gated(torch.autograd.Function):
    """(1 - z, z * candidate) of (gate, candidate) side by side, z = sigmoid(gate), in few passes over memory.

    What the layer takes besides its matrix products and the scan is passes; automatic differentiation makes twice as
    many, and a copy to put both gradients side by side.
    """

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> tuple[Tensor, Tensor]:
        """(..., 2 units) -> twice (..., units)."""
        gate, candidate = both.chunk(2, -1)
        z = torch.sigmoid(gate)
        a, b = 1 - z, z * candidate
        ctx.save_for_backward(both, z)
        return a, b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """dz = z (1 - z) (candidate db - da), dcandidate = z db."""
        both, z = ctx.saved_tensors
        da, db = grads
        candidate = both.chunk(2, -1)[1]
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted: nothing in place
            z = torch.sigmoid(both.chunk(2, -1)[0])
            return torch.cat([z * (1 - z) * (candidate * db - da), z * db], -1)
        out = torch.empty_like(both)
        left, right = out.chunk(2, -1)
        slope = torch.addcmul(z, z, z, value=-1)
        torch.mul(torch.addcmul(da, candidate, db, value=-1).neg_(), slope, out=left)
        torch.mul(z, db, out=right)
        return out


class LRU(_Recurrence):
    """The linear recurrent unit (Orvieto et al. 2023, Resurrecting recurrent neural networks for long sequences, section 3).

        h_t = lambda * h_{t-1} + gamma * (B x_t)        y_t = Re(C h_t) + D * x_t

    with complex diagonal lambda = exp(-exp(nu) + i exp(theta)), |lambda| < 1 whatever the parameters (section 3.3).

    Args:
        units: complex numbers of the state.
        features: width of x and of y.
        r_min, r_max, max_phase: the ring on which eigenvalues begin.
        batch_first: time is axis 1.
        return_state: also give the state after the last step, (batch, units, 2): real and imaginary parts.
        chunk: steps of a slice of the scan; None: chosen.

    Shapes:
        x (batch, time, features) -> (batch, time, features).

    Raises:
        PartitionError: widths or chunk below 1, a ring that is none.
        InputError: x, state or mask of another shape, no step.
    """

    def __init__(
        self,
        units: int,
        *,
        features: int,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        batch_first: bool = True,
        return_state: bool = False,
        chunk: int | None = None,
    ) -> None:
        super().__init__(units, features, batch_first, return_state, chunk)
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
        logs = ring(rng, units, r_min, r_max, max_phase)
        self.nu, self.theta, self.gamma = (nn.Parameter(torch.tensor(v).to(torch.get_default_dtype())) for v in logs)
        self.input = nn.Linear(features, 2 * units, bias=False)
        self.output = nn.Linear(2 * units, features, bias=False)
        self.skip = nn.Parameter(torch.randn(features))
        nn.init.normal_(self.input.weight, std=(2 * features) ** -0.5)
        nn.init.normal_(self.output.weight, std=units**-0.5)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Real and imaginary parts."""
        return (self.units, 2)

    def _run(self, x: Tensor, state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        nu, theta, gamma = (p.to(state.dtype) for p in (self.nu, self.theta, self.gamma))
        decay = torch.polar(torch.exp(-torch.exp(nu)), torch.exp(theta))
        into = self.input(x).to(state.dtype).unflatten(-1, (2, self.units)) * torch.exp(gamma)
        value = torch.complex(into[..., 0, :], into[..., 1, :])
        decay = decay.expand_as(value)
        if mask is not None:
            decay, value = (torch.where(mask[..., None], v, e) for v, e in ((decay, 1), (value, 0)))
        h = linear_scan(decay, value, torch.complex(state[..., 0], state[..., 1]), self.chunk)
        y = self.output(torch.cat([h.real, -h.imag], -1).to(x.dtype)) + self.skip * x
        return y.to(x.dtype), torch.view_as_real(h[:, -1])


class GatedLinearAttention(_Recurrence):
    """Gated linear attention (Yang et al. 2024, Gated linear attention transformers with hardware-efficient training, section 4).

        S_t = diag(alpha_t) S_{t-1} + k_t^T v_t       o_t = q_t S_t / sqrt(keys)
        alpha_t = sigmoid(low-rank map of x_t)^(1/16)       y_t = W_o (swish(W_r x_t) * norm(o_t))

    Cost and memory grow with the sequence, not with its square; causal by construction. With `gated=False` it is the linear
    attention of Katharopoulos et al. 2020, Transformers are RNNs, section 3.2: alpha = 1, elu + 1 of queries and keys, and o
    divided by the sum of its weights.

    Args:
        units: width of all values together (that of all keys is half of it, as in the paper; all of it if not gated).
        features: width of x and of y.
        heads: of attention; they divide both.
        gated: see above.
        rank: of the map to the gates.
        batch_first: time is axis 1.
        return_state: also give the state after the last step, (batch, heads, keys of a head, values of a head (+ 1 if
            not gated: the sum of weights)).
        chunk: steps of a chunk, best a power of two; None: 64.

    Shapes:
        x (batch, time, features) -> (batch, time, features).

    Raises:
        PartitionError: heads that do not divide the widths, widths or chunk below 1.
        InputError: x, state or mask of another shape, no step.
    """

    def __init__(
        self,
        units: int,
        *,
        features: int,
        heads: int = 4,
        gated: bool = True,
        rank: int = 16,
        batch_first: bool = True,
        return_state: bool = False,
        chunk: int | None = None,
    ) -> None:
        super().__init__(units, features, batch_first, return_state, chunk)
        self.keys = units // 2 if gated else units
        check_heads(heads, self.keys, units)
        check_units("GatedLinearAttention (rank)", rank)
        self.heads, self.gated = heads, gated
        self.input = nn.Linear(features, 2 * self.keys + units, bias=False)
        self.output = nn.Linear(units, features, bias=False)
        if gated:
            self.decay = nn.Sequential(nn.Linear(features, rank, bias=False), nn.Linear(rank, self.keys))
            self.gate = nn.Linear(features, units)
            self.norm = nn.LayerNorm(units // heads)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """One matrix for each head."""
        return (self.heads, self.keys // self.heads, self.units // self.heads + (not self.gated))

    def _run(self, x: Tensor, state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = self.input(x).to(state.dtype).split([self.keys, self.keys, self.units], -1)
        q, k, v = (self._split(t) for t in (q, k, v))
        if self.gated:
            q = q * q.shape[-1] ** -0.5
            decay = self._split(F.logsigmoid(self.decay(x).to(state.dtype)) / TEMPERATURE)
        else:
            q, k, v, decay = (
                _positive(q),
                _positive(k),
                torch.cat([v, torch.ones_like(v[..., :1])], -1),
                torch.zeros_like(k),
            )
        if mask is not None:
            k, decay = (torch.where(mask[:, None, :, None], t, 0) for t in (k, decay))
        with torch.autocast(x.device.type, enabled=False):
            o, last = gated_attention(xp, linear_scan, q, k, v, decay, state, self.chunk)
        if not self.gated:
            o = o[..., :-1] / o[..., -1:].clamp_min(torch.finfo(o.dtype).tiny)
            return self.output(o.transpose(1, 2).flatten(2).to(x.dtype)).to(x.dtype), last
        o = self.norm(o.to(self.norm.weight.dtype)).transpose(1, 2).flatten(2)
        return self.output(F.silu(self.gate(x)) * o.to(x.dtype)).to(x.dtype), last

    def _split(self, t: Tensor) -> Tensor:
        """(batch, time, width) -> (batch, heads, time, width of a head)."""
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _positive(t: Tensor) -> Tensor:
    """elu(t) + 1, whose own backward has other strides in compiled graphs than when it runs."""
    return torch.where(t > 0, t + 1, torch.exp(t.clamp(max=0)))
