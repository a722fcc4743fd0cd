"""`MinGRU`, `LRU`, `GatedLinearAttention` for Keras 3: recurrences that are linear in their state, so that time is cut in
slices which all run at once, exactly (`ranger_nn.layers.scan`).

All take and give (batch, time, features), begin at `state`, and with `return_state` give the state after the last step:
feeding it to the next part of a stream gives what the whole sequence would. A masked step passes the state on unchanged.
States and scans are float32 at least, whatever the dtype policy.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from ranger_nn.errors import PartitionError
from ranger_nn.keras import namespace as xp
from ranger_nn.keras.layers.scan import backend, linear_scan
from ranger_nn.layers.linear_attention import TEMPERATURE, check_heads, gated_attention
from ranger_nn.layers.recurrence import check_sequence, check_units, ring
from ranger_nn.layers.scan import check_chunk

TINY = 1e-37


class _Recurrence(keras.layers.Layer):
    """What the three share: masks, checks, precision and the form of the result."""

    def __init__(
        self, units: int, features: int | None, return_state: bool, chunk: int | None, kwargs: dict[str, Any]
    ) -> None:
        super().__init__(**kwargs)
        # in mixed precision the state keeps its own: what is cast is cast where it is used
        self.autocast = self.compute_dtype == self.variable_dtype
        check_units(type(self).__name__, units, features)
        check_chunk(chunk)
        self.units, self.features, self.return_state, self.chunk = units, features, return_state, chunk
        self.supports_masking = True

    def build(self, shape: Any) -> None:
        """Make the weights for this width."""
        width = shape[-1] if self.features is None else self.features
        check_sequence(type(self).__name__, tuple(shape), width, (shape[0], *self.state_shape), None)
        self._make(int(width))
        self.built = True

    def call(self, x: Any, state: Any = None, mask: Any = None) -> Any:
        """The outputs of all steps, and with `return_state` the state after the last.

        Args:
            x: (batch, time, features).
            state: as it was returned for the steps before these; None: zero.
            mask: (batch, time) bool, True for steps that are there.
        """
        mask = getattr(x, "_keras_mask", None) if mask is None else mask
        x = ops.cast(x, self.compute_dtype)
        wanted = (x.shape[0], *self.state_shape)
        shapes = [None if v is None else tuple(v.shape) for v in (state, mask)]
        check_sequence(type(self).__name__, tuple(x.shape), self._width, wanted, *shapes)
        if state is None:
            state = ops.zeros((ops.shape(x)[0], *self.state_shape), self.inner)
        y, last = self._run(x, ops.cast(state, self.inner), None if mask is None else ops.cast(mask, "bool"))
        y = ops.cast(y, self.compute_dtype)
        return (y, last) if self.return_state else y

    @property
    def inner(self) -> str:
        """Dtype of state and scan."""
        return "float64" if self.variable_dtype == "float64" else "float32"

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return (self.units,)

    def _make(self, width: int) -> None:
        raise NotImplementedError

    def _run(self, x: Any, state: Any, mask: Any) -> tuple[Any, Any]:
        raise NotImplementedError

    def _kernel(self, name: str, rows: int, columns: int, deviation: float | None = None) -> Any:
        """A matrix, Glorot's uniform or normal numbers."""
        start = "glorot_uniform" if deviation is None else keras.initializers.RandomNormal(stddev=deviation)
        return self.add_weight(shape=(rows, columns), initializer=start, name=name)

    def _times(self, x: Any, kernel: Any, bias: Any = None) -> Any:
        """x kernel + bias in the compute dtype."""
        y = ops.matmul(ops.cast(x, self.compute_dtype), ops.cast(kernel, self.compute_dtype))
        return y if bias is None else y + ops.cast(bias, self.compute_dtype)

    @property
    def _width(self) -> int:
        """Features of x."""
        return int(self.kernel.shape[0])

    def compute_output_shape(self, shape: Any) -> Any:
        """(batch, time, features), with the state's if it is returned."""
        y = (*shape[:2], self._outputs(shape[-1]))
        return (y, (shape[0], *self.state_shape)) if self.return_state else y

    def _outputs(self, width: int) -> int:
        return width

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """The steps stay."""
        mask = mask[0] if isinstance(mask, list | tuple) else mask
        return (mask, None) if self.return_state else mask

    def get_config(self) -> dict[str, Any]:
        """Plain data."""
        own = {"features": self.features, "return_state": self.return_state, "chunk": self.chunk}
        return {**super().get_config(), "units": self.units, **own}


@keras.saving.register_keras_serializable(package="ranger_nn")
class MinGRU(_Recurrence):
    """The minimal gated recurrent unit (Feng et al. 2024, Were RNNs all we needed?, section 3.1).

        z_t = sigmoid(W_z x_t + b_z)      h_t = (1 - z_t) * h_{t-1} + z_t * (W_h x_t + b_h)

    The gates do not look at the state, so the recurrence is linear in it. The scan needs no logarithms (section 3.1.2),
    so the candidate may be negative.

    Args:
        units: width of the state.
        features: width of x; None: taken from the first input.
        use_bias: add b_z and b_h.
        return_state: also give the state after the last step, (batch, units).
        chunk: steps of a slice of the scan; None: chosen.

    Shapes:
        x (batch, time, features) -> (batch, time, units). Where time is unknown (TensorFlow graphs) the steps go one by one.

    Raises:
        PartitionError (a ValueError): widths or chunk below 1.
        InputError (a ValueError): x, state or mask of another shape, no step.
    """

    def __init__(
        self,
        units: int,
        *,
        features: int | None = None,
        use_bias: bool = True,
        return_state: bool = False,
        chunk: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(units, features, return_state, chunk, kwargs)
        self.use_bias = use_bias

    def _make(self, width: int) -> None:
        self.kernel = self._kernel("kernel", width, 2 * self.units)
        self.bias = (
            self.add_weight(shape=(2 * self.units,), initializer="zeros", name="bias") if self.use_bias else None
        )

    def _run(self, x: Any, state: Any, mask: Any) -> tuple[Any, Any]:
        both = ops.cast(self._times(x, self.kernel, self.bias), self.inner)
        z, candidate = ops.sigmoid(both[..., : self.units]), both[..., self.units :]
        if mask is not None:
            z = ops.where(mask[..., None], z, ops.zeros_like(z))
        h = linear_scan(1 - z, z * candidate, state, self.chunk)
        return h, h[:, -1]

    def _outputs(self, width: int) -> int:
        return self.units

    def get_config(self) -> dict[str, Any]:
        """Plain data."""
        return {**super().get_config(), "use_bias": self.use_bias}


@keras.saving.register_keras_serializable(package="ranger_nn")
class LRU(_Recurrence):
    """The linear recurrent unit (Orvieto et al. 2023, Resurrecting recurrent neural networks for long sequences, section 3).

        h_t = lambda * h_{t-1} + gamma * (B x_t)        y_t = Re(C h_t) + D * x_t

    with complex diagonal lambda = exp(-exp(nu) + i exp(theta)), |lambda| < 1 whatever the parameters (section 3.3).

    Args:
        units: complex numbers of the state.
        features: width of x and of y; None: taken from the first input.
        r_min, r_max, max_phase: the ring on which eigenvalues begin.
        return_state: also give the state after the last step, (batch, units, 2): real and imaginary parts.
        chunk: steps of a slice of the scan; None: chosen.

    Shapes:
        x (batch, time, features) -> (batch, time, features). Where time is unknown (TensorFlow graphs) the steps go one by
        one.

    Raises:
        PartitionError (a ValueError): widths or chunk below 1, a ring that is none.
        InputError (a ValueError): x, state or mask of another shape, no step.
    """

    def __init__(
        self,
        units: int,
        *,
        features: int | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        return_state: bool = False,
        chunk: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(units, features, return_state, chunk, kwargs)
        self.ring = {"r_min": r_min, "r_max": r_max, "max_phase": max_phase}
        self._logs = ring(np.random.default_rng(np.random.randint(2**31)), units, r_min, r_max, max_phase)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Real and imaginary parts."""
        return (self.units, 2)

    def _make(self, width: int) -> None:
        self.nu, self.theta, self.gamma = (
            self.add_weight(shape=(self.units,), initializer=_Given(value), name=name)
            for name, value in zip(("nu", "theta", "gamma"), self._logs)
        )
        self.kernel = self._kernel("kernel", width, 2 * self.units, (2 * width) ** -0.5)
        self.output_kernel = self._kernel("output_kernel", 2 * self.units, width, self.units**-0.5)
        self.skip = self.add_weight(
            shape=(width,), initializer=keras.initializers.RandomNormal(stddev=1.0), name="skip"
        )

    def _run(self, x: Any, state: Any, mask: Any) -> tuple[Any, Any]:
        nu, theta, gamma = (ops.cast(v, self.inner) for v in (self.nu, self.theta, self.gamma))
        into = ops.cast(self._times(x, self.kernel), self.inner)
        re, im = into[..., : self.units] * ops.exp(gamma), into[..., self.units :] * ops.exp(gamma)
        pair, parts, polar = backend().pair, backend().parts, backend().polar
        decay_re, decay_im = (ops.zeros_like(re) + v for v in parts(polar(ops.exp(-ops.exp(nu)), ops.exp(theta))))
        if mask is not None:
            there = mask[..., None]
            decay_re = ops.where(there, decay_re, ops.ones_like(re))
            decay_im, re, im = (ops.where(there, v, ops.zeros_like(re)) for v in (decay_im, re, im))
        first = pair(state[..., 0], state[..., 1])
        h_re, h_im = parts(linear_scan(pair(decay_re, decay_im), pair(re, im), first, self.chunk))
        y = self._times(ops.concatenate([h_re, -h_im], axis=-1), self.output_kernel)
        return y + ops.cast(self.skip, self.compute_dtype) * x, ops.stack([h_re[:, -1], h_im[:, -1]], axis=-1)

    def get_config(self) -> dict[str, Any]:
        """Plain data."""
        return {**super().get_config(), **self.ring}


@keras.saving.register_keras_serializable(package="ranger_nn")
class GatedLinearAttention(_Recurrence):
    """Gated linear attention (Yang et al. 2024, Gated linear attention transformers with hardware-efficient training, section 4).

        S_t = diag(alpha_t) S_{t-1} + k_t^T v_t       o_t = q_t S_t / sqrt(keys)
        alpha_t = sigmoid(low-rank map of x_t)^(1/16)       y_t = W_o (swish(W_r x_t) * norm(o_t))

    Cost and memory grow with the sequence, not with its square; causal by construction. With `gated=False` it is the linear
    attention of Katharopoulos et al. 2020, Transformers are RNNs, section 3.2: alpha = 1, elu + 1 of queries and keys, and o
    divided by the sum of its weights.

    Args:
        units: width of all values together (that of all keys is half of it, as in the paper; all of it if not gated).
        features: width of x and of y; None: taken from the first input.
        heads: of attention; they divide both.
        gated: see above.
        rank: of the map to the gates.
        return_state: also give the state after the last step, (batch, heads, keys of a head, values of a head (+ 1 if
            not gated: the sum of weights)).
        chunk: steps of a chunk, best a power of two; None: 64.

    Shapes:
        x (batch, time, features) -> (batch, time, features). The number of steps must be known when the layer is called.

    Raises:
        PartitionError (a ValueError): heads that do not divide the widths, widths or chunk below 1, unknown time.
        InputError (a ValueError): x, state or mask of another shape, no step.
    """

    def __init__(
        self,
        units: int,
        *,
        features: int | None = None,
        heads: int = 4,
        gated: bool = True,
        rank: int = 16,
        return_state: bool = False,
        chunk: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(units, features, return_state, chunk, kwargs)
        self.keys = units // 2 if gated else units
        check_heads(heads, self.keys, units)
        check_units("GatedLinearAttention (rank)", rank)
        self.heads, self.gated, self.rank = heads, gated, rank

    @property
    def state_shape(self) -> tuple[int, ...]:
        """One matrix for each head."""
        return (self.heads, self.keys // self.heads, self.units // self.heads + (not self.gated))

    def _make(self, width: int) -> None:
        self.kernel = self._kernel("kernel", width, 2 * self.keys + self.units)
        self.output_kernel = self._kernel("output_kernel", self.units, width)
        if self.gated:
            self.decay_in = self._kernel("decay_in", width, self.rank)
            self.decay_out = self._kernel("decay_out", self.rank, self.keys)
            self.decay_bias = self.add_weight(shape=(self.keys,), initializer="zeros", name="decay_bias")
            self.gate = self._kernel("gate", width, self.units)
            self.gate_bias = self.add_weight(shape=(self.units,), initializer="zeros", name="gate_bias")
            self.norm = keras.layers.LayerNormalization(epsilon=1e-5, dtype=self.inner)
            self.norm.build((None, self.units // self.heads))

    def build(self, shape: Any) -> None:
        """Make the weights for this width."""
        if shape[1] is None:
            raise PartitionError(
                f"GatedLinearAttention needs a known number of steps; the input has shape {tuple(shape)}. Pad to a fixed "
                "length and mask, or use MinGRU or LRU"
            )
        super().build(shape)

    def _run(self, x: Any, state: Any, mask: Any) -> tuple[Any, Any]:
        into = ops.cast(self._times(x, self.kernel), self.inner)
        cuts = (into[..., : self.keys], into[..., self.keys : 2 * self.keys], into[..., 2 * self.keys :])
        q, k, v = (self._split(t) for t in cuts)
        if self.gated:
            q = q * (self.keys // self.heads) ** -0.5
            gates = self._times(self._times(x, self.decay_in), self.decay_out, self.decay_bias)
            decay = self._split(ops.log_sigmoid(ops.cast(gates, self.inner)) / TEMPERATURE)
        else:
            q, k, decay = ops.elu(q) + 1, ops.elu(k) + 1, ops.zeros_like(k)
            v = ops.concatenate([v, ops.ones_like(v[..., :1])], axis=-1)
        if mask is not None:
            k, decay = (ops.where(mask[:, None, :, None], t, ops.zeros_like(t)) for t in (k, decay))
        o, last = gated_attention(xp, linear_scan, q, k, v, decay, state, self.chunk)
        o = self._joined(self.norm(o) if self.gated else o[..., :-1] / ops.maximum(o[..., -1:], TINY))
        if self.gated:
            o = ops.silu(self._times(x, self.gate, self.gate_bias)) * ops.cast(o, self.compute_dtype)
        return self._times(o, self.output_kernel), last

    def _split(self, t: Any) -> Any:
        """(batch, time, width) -> (batch, heads, time, width of a head)."""
        return ops.transpose(ops.reshape(t, (-1, t.shape[1], self.heads, t.shape[2] // self.heads)), (0, 2, 1, 3))

    def _joined(self, t: Any) -> Any:
        """(batch, heads, time, width of a head) -> (batch, time, width)."""
        return ops.reshape(ops.transpose(t, (0, 2, 1, 3)), (-1, t.shape[2], t.shape[1] * t.shape[3]))

    def get_config(self) -> dict[str, Any]:
        """Plain data."""
        return {**super().get_config(), "heads": self.heads, "gated": self.gated, "rank": self.rank}


class _Given(keras.initializers.Initializer):
    """Numbers that are there already."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        """The numbers."""
        return ops.convert_to_tensor(self.value, dtype=dtype)
