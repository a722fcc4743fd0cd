"""Linear recurrences by slices of time beside the step loop and mambapy's parallel scan, forward and backward.

python -m benchmarks.linear_recurrence                          PyTorch
KERAS_BACKEND=jax python -m benchmarks.linear_recurrence --keras         Keras on that back end, mambapy beside it

T = 32768, batch 1, hidden 64. The step loop has its inputs unbound and its projections done for all steps beforehand; in
Keras it is `keras.layers.RNN` over a cell of one multiplication and addition, as that back end compiles it. mambapy's
scan takes (batch, time, channels, states), so hidden 64 may be its channels or, faster, its states: both are shown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mambapy.pscan import pscan
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import seconds

STEPS, HIDDEN = 32768, 64
LOOP, MAMBA, ERROR = 30.0, 2.0, 1e-5


def loop(a: Tensor, b: Tensor) -> Tensor:
    """Step by step."""
    states, h = [], torch.zeros_like(b[:, 0])
    for decay, value in zip(a.unbind(1), b.unbind(1)):
        h = decay * h + value
        states.append(h)
    return torch.stack(states, 1)


def mamba(axis: int) -> Callable[[Tensor, Tensor], Tensor]:
    """mambapy's scan, hidden as its channels (3) or as its states (2)."""
    return lambda a, b: pscan(a.unsqueeze(axis), b.unsqueeze(axis)).squeeze(axis)


def verdict(ratio: float, needed: float) -> str:
    """The target beside the ratio, and whether it was missed."""
    return f"{ratio:.1f} times (>= {needed:.0f})" + ("" if ratio >= needed else " MISSED")


def report(name: str, taken: dict[str, float], ours: str) -> None:
    """One line a contender."""
    print(f"{name}: {ours} {taken[ours] * 1e3:.1f} ms")
    for other, time in taken.items():
        if other != ours:
            needed = LOOP if "loop" in other else MAMBA
            print(f"    {other} {time * 1e3:.1f} ms: {verdict(time / taken[ours], needed)}")


def both_ways(scan: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, grad: Tensor) -> Callable[[], Any]:
    """Forward and backward of a scan."""
    return lambda: torch.autograd.grad(scan(a, b), (a, b), grad)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Decays in (0, 1), values, gradient."""
    a, b, grad = torch.rand(1, STEPS, HIDDEN), torch.randn(1, STEPS, HIDDEN), torch.randn(1, STEPS, HIDDEN)
    return a.requires_grad_(), b.requires_grad_(), grad


class Other(nn.Module):
    """`MinGRU` with another scan."""

    def __init__(self, net: Any, scan: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.input, self.scan = net.input, scan

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, units)."""
        gate, candidate = self.input(x).chunk(2, -1)
        z = torch.sigmoid(gate)
        return self.scan(1 - z, z * candidate)


def torch_speed(repeats: int) -> None:
    """The scan and the layer."""
    from ranger_nn.torch import LRU, GatedLinearAttention, MinGRU, linear_scan

    scans = {
        "linear_scan": linear_scan,
        "mambapy, hidden as channels": mamba(3),
        "mambapy, hidden as states": mamba(2),
        "step loop": loop,
    }
    a, b, grad = inputs()
    report("scan", seconds({n: both_ways(s, a, b, grad) for n, s in scans.items()}, repeats), "linear_scan")
    exact = loop(a.double(), b.double())
    wanted = [exact, *torch.autograd.grad(exact, (a, b), grad.double())]
    found = [linear_scan(a, b), *both_ways(linear_scan, a, b, grad)()]
    error = max(((p - q).abs().max() / q.abs().max()).item() for p, q in zip(found, wanted))
    print(f"    relative error {error:.1e} (<= {ERROR:.0e})" + ("" if error <= ERROR else " MISSED"))
    net, x = MinGRU(HIDDEN, features=HIDDEN), torch.randn(1, STEPS, HIDDEN)
    nets: dict[str, Any] = {n: net if n == "linear_scan" else Other(net, s) for n, s in scans.items()}
    report("MinGRU", seconds({n: lambda m=m: m(x).backward(grad) for n, m in nets.items()}, repeats), "linear_scan")
    for layer in (LRU(HIDDEN, features=HIDDEN), GatedLinearAttention(HIDDEN, features=HIDDEN)):
        taken = seconds({"it": lambda layer=layer: layer(x).backward(grad)}, repeats)["it"]
        print(f"{type(layer).__name__}: {taken * 1e3:.1f} ms")


def keras_gradient(scan: Callable[..., Any], arrays: list[Any]) -> Callable[[], Any]:
    """Compiled gradient of a scan on Keras's back end, with a given gradient of its result."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        run = jax.jit(lambda a, b, g: jax.vjp(scan, a, b)[1](g))
        given = [jax.numpy.asarray(v) for v in arrays]
        return lambda: jax.block_until_ready(run(*given))
    if keras.backend.backend() == "torch":
        a, b, g = (torch.tensor(v, requires_grad=i < 2) for i, v in enumerate(arrays))
        return lambda: torch.autograd.grad(scan(a, b), (a, b), g)
    import tensorflow as tf

    @tf.function
    def graph(a: Any, b: Any, g: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch((a, b))
            h = scan(a, b)
        return tape.gradient(h, (a, b), output_gradients=g)

    given = [tf.constant(v) for v in arrays]
    return lambda: [v.numpy() for v in graph(*given)]


def keras_speed(repeats: int) -> None:
    """The scan and `MinGRU` on Keras's back end."""
    import keras
    from keras import layers, ops

    from ranger_nn.keras import MinGRU, linear_scan

    class Step(layers.Layer):
        """h -> a * h + b."""

        state_size = output_size = HIDDEN

        def call(self, ab: Any, states: Any) -> Any:
            h = ab[:, :HIDDEN] * states[0] + ab[:, HIDDEN:]
            return h, [h]

    class Loop(layers.Layer):
        """A min GRU whose steps `keras.layers.RNN` makes, projections beforehand."""

        def __init__(self) -> None:
            super().__init__()
            self.input_map, self.steps = layers.Dense(2 * HIDDEN), layers.RNN(Step(), return_sequences=True)

        def call(self, x: Any) -> Any:
            gate, candidate = ops.split(self.input_map(x), 2, axis=-1)
            z = ops.sigmoid(gate)
            return self.steps(ops.concatenate([1 - z, z * candidate], axis=-1))

    a, b, grad = inputs()
    arrays = [v.detach().numpy() for v in (a, b, grad)]
    steps = layers.RNN(Step(), return_sequences=True)
    works = {
        "linear_scan": keras_gradient(linear_scan, arrays),
        "mambapy (PyTorch), hidden as channels": both_ways(mamba(3), a, b, grad),
        "mambapy (PyTorch), hidden as states": both_ways(mamba(2), a, b, grad),
        "step loop": keras_gradient(lambda a, b: steps(ops.concatenate([a, b], axis=-1)), arrays),
    }
    report(f"Keras on {keras.backend.backend()}, scan", seconds(works, repeats), "linear_scan")
    x, works = arrays[1], {}
    for name, layer in (("MinGRU", MinGRU(HIDDEN)), ("step loop", Loop())):
        source = keras.Input((STEPS, HIDDEN))
        model = keras.Model(source, layer(source))
        model.compile("sgd", "mse")
        works[name] = lambda model=model: model.train_on_batch(x, arrays[2])
    report(f"Keras on {keras.backend.backend()}, MinGRU, train_on_batch", seconds(works, repeats), "MinGRU")


def main() -> None:
    """PyTorch, or Keras."""
    given = common.given(__doc__, 5)
    if given.keras:
        keras_speed(given.repeats)
        return
    torch_speed(given.repeats)


if __name__ == "__main__":
    main()
