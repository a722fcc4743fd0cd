"""Attention pooling over the tiles of one large image: all tiles at once, and in two passes inside a stated memory.

A gated attention pooling (Ilse, Tomczak & Welling 2018) of 256 x 256 tiles through a small convolutional encoder,
forward and backward. `memory=` keeps the tiles' vectors, joins them, and computes each group of tiles once more in
backward: the same gradient.
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.common import Options, difference, interleaved, options, peak, training
from ranger_nn import Grid
from ranger_nn.aggregate import Softmax
from ranger_nn.torch import RegionalAggregator

TILE = 256
MEMORY, TIME = 0.1, 1.0


def encoder() -> nn.Module:
    """(tiles, 3, 256, 256) -> (tiles, 64)."""
    layers: list[nn.Module] = []
    for a, b in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def network(side: int, local: nn.Module, memory: int | None) -> nn.Module:
    """Tiles, attention, one score for the image."""
    count = side // TILE
    pooled = RegionalAggregator(Grid(count, count), Softmax(hidden=64, gated=True), local=local, memory=memory)
    return nn.Sequential(pooled, nn.Linear(64, 1))


def main() -> None:
    """Peak, time, difference of gradients."""
    chosen: Options = options()
    side = chosen.side(2048)
    torch.manual_seed(0)
    x, local = chosen.draw(1, 3, side, side), encoder()
    plain = network(side, local, None)
    at_once = training(plain, x)
    reference = at_once()
    allowed = int(peak(at_once, plain) * MEMORY)
    small = network(side, local, allowed)
    with torch.no_grad():
        small(x)
    small.load_state_dict(plain.state_dict())
    two_passes = training(small, x)
    ours = two_passes()
    peaks = [peak(at_once, plain), peak(two_passes, small)]
    times = interleaved({"at once": at_once, "two passes": two_passes}, chosen.repeats)
    ratio, slower = peaks[1] / peaks[0], times["two passes"] / times["at once"]
    print(
        f"attention pooling, {(side // TILE) ** 2} tiles of {TILE}: peak {peaks[0] / 1e6:.0f} -> {peaks[1] / 1e6:.0f} MB, "
        f"ratio {ratio:.3f} (<= {MEMORY}){' MISSED' if ratio > MEMORY else ''}; time {times['at once']:.2f} -> "
        f"{times['two passes']:.2f} s, ratio {slower:.2f} (<= {TIME}){' MISSED' if slower > TIME else ''}; "
        f"largest difference {difference(ours, reference):.1e}"
    )


if __name__ == "__main__":
    main()
