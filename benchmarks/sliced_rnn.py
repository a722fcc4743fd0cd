"""SlicedRNN beside the plain recurrent network of the same framework.

python -m benchmarks.sliced_rnn                      PyTorch: speed, slice lengths and denormals, the adding problem
KERAS_BACKEND=jax python -m benchmarks.sliced_rnn --keras       Keras: speed on that back end
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import seconds
from ranger_nn.torch import SlicedRNN

STEPS, HIDDEN, TARGET = 32768, 64, 40.0


def forward_backward(net: nn.Module, x: Tensor, last: Callable[[Any], Tensor]) -> Callable[[], None]:
    """One training step without the optimiser."""

    def work() -> None:
        net.zero_grad()
        last(net(x)).sum().backward()

    return work


def speed(repeats: int) -> None:
    """GRU and LSTM, forward and backward, T = 32768, batch 1."""
    x = torch.randn(1, STEPS, HIDDEN)
    for kind, needed in ((nn.GRU, TARGET), (nn.LSTM, None)):
        plain, sliced = kind(HIDDEN, HIDDEN, batch_first=True), SlicedRNN(kind(HIDDEN, HIDDEN, batch_first=True))
        works = {
            "plain": forward_backward(plain, x, lambda out: out[0][:, -1]),
            "sliced": forward_backward(sliced, x, lambda out: out),
        }
        taken = seconds(works, repeats)
        ratio = taken["plain"] / taken["sliced"]
        mark = "" if needed is None else f" (>= {needed:.0f})" + ("" if ratio >= needed else " MISSED")
        print(f"{kind.__name__}: plain {taken['plain']:.2f} s, sliced {taken['sliced']:.3f} s, {ratio:.1f} times{mark}")


def denormals(repeats: int) -> None:
    """Slices of one level, by length, with and without flushing."""
    x = torch.randn(1, STEPS, HIDDEN)
    gru = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
    for length in (32, 64, 128, 256, 512, 1024):
        works = {
            str(flush): forward_backward(
                SlicedRNN(gru, (length, STEPS // length), flush_denormals=flush), x, lambda y: y
            )
            for flush in (False, True)
        }
        taken = seconds(works, repeats)
        print(f"slices of {length}: {taken['False']:.3f} s, with denormals flushed {taken['True']:.3f} s")


def adding(samples: int, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """The adding problem (Hochreiter & Schmidhuber 1997): the sum of two marked numbers, one in each half."""
    g = torch.Generator().manual_seed(seed)
    values, marks = torch.rand(samples, steps, generator=g), torch.zeros(samples, steps)
    for half in (0, steps // 2):
        marks[torch.arange(samples), half + torch.randint(0, steps // 2, (samples,), generator=g)] = 1
    return torch.stack([values, marks], -1), (values * marks).sum(1, keepdim=True)


class Head(nn.Module):
    """A recurrent network and a linear layer on its last state."""

    def __init__(self, network: nn.Module, outputs: int) -> None:
        super().__init__()
        self.network, self.out = network, nn.Linear(HIDDEN, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, outputs)."""
        y = self.network(x)
        return self.out(y[0][:, -1] if isinstance(y, tuple) else y)


def trained(net: nn.Module, x: Tensor, y: Tensor, loss: Callable[..., Tensor], epochs: int) -> float:
    """Seconds of the training, batches of 32, Adam."""
    adam, start = torch.optim.Adam(net.parameters(), 2e-3), time.perf_counter()
    for _ in range(epochs):
        for picked in torch.randperm(len(x)).split(32):
            adam.zero_grad()
            loss(net(x[picked]), y[picked]).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            adam.step()
    return time.perf_counter() - start


def order(epochs: int) -> None:
    """Tasks that need order, the plain GRU beside the sliced one, for the same epochs."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32).unsqueeze(-1) / 16
    labels = torch.tensor(digits.target)
    for name in ("plain GRU", "SlicedRNN"):
        for task in ("adding, 256 steps", "digits, 64 steps"):
            torch.manual_seed(0)
            add = task.startswith("adding")
            slices = (16, 16) if add else (8, 8)
            gru = nn.GRU(2 if add else 1, HIDDEN, batch_first=True)
            net = Head(gru if name == "plain GRU" else SlicedRNN(gru, slices), 1 if add else 10)
            if add:
                x, y = adding(2000, 256, 0)
                took = trained(net, x, y, nn.functional.mse_loss, epochs)
                xt, yt = adding(1000, 256, 1)
                with torch.no_grad():
                    right = ((net(xt) - yt).abs() < 0.1).float().mean().item()
            else:
                took = trained(net, images[:1300], labels[:1300], nn.functional.cross_entropy, epochs)
                with torch.no_grad():
                    right = (net(images[1300:]).argmax(1) == labels[1300:]).float().mean().item()
            print(f"{task}, {epochs} epochs, {name}: {right:.1%} right, {took:.1f} s")


def keras_speed(repeats: int) -> None:
    """The back end's own GRU and the sliced one: gradient of the sum of the last state, jit where there is one."""
    import keras
    import numpy as np

    from ranger_nn.keras import SlicedRNN as KerasSliced

    x, y = np.random.randn(1, STEPS, HIDDEN).astype("float32"), np.zeros((1, HIDDEN), "float32")
    works = {}
    for name, layer in (("plain", keras.layers.GRU(HIDDEN)), ("sliced", KerasSliced(keras.layers.GRU(HIDDEN)))):
        inputs = keras.Input((STEPS, HIDDEN))
        model = keras.Model(inputs, layer(inputs))
        model.compile("sgd", "mse", jit_compile="auto")
        works[name] = lambda model=model: model.train_on_batch(x, y)
    taken = seconds(works, repeats)
    ratio = taken["plain"] / taken["sliced"]
    mark = "" if ratio >= TARGET else " MISSED"
    print(
        f"Keras on {keras.backend.backend()}, GRU, train_on_batch: plain {taken['plain']:.2f} s, sliced "
        f"{taken['sliced']:.3f} s, {ratio:.1f} times (>= {TARGET:.0f}){mark}"
    )


def main() -> None:
    """All parts, or Keras alone."""
    given = common.given(__doc__, 3, epochs=20)
    if given.keras:
        keras_speed(given.repeats)
        return
    speed(given.repeats)
    denormals(given.repeats)
    order(given.epochs)


if __name__ == "__main__":
    main()
