"""RegionalAggregator: all regions in one call beside a Python loop over regions, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.common import interleaved, options
from ranger_nn import Grid, TimeSlices
from ranger_nn.torch import RegionalAggregator


def shared_cnn() -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
    """One small network for 16 x 16 regions of an image."""
    torch.manual_seed(0)
    local = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(4, 3, 256, 256)

    def loop(x: Tensor) -> Tensor:
        parts = [local(p) for row in x.split(16, 2) for p in row.split(16, 3)]
        return torch.stack(parts).mean(0)

    return RegionalAggregator(Grid(16, 16), "mean", local=local), loop, x


def own_mlps() -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
    """One small network for each of 64 slices of a sequence."""
    torch.manual_seed(0)

    def local() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    separate = nn.ModuleList([local() for _ in range(64)])
    x = torch.randn(8, 2048, 16)

    def loop(x: Tensor) -> Tensor:
        return torch.cat([f(p) for f, p in zip(separate, x.split(32, 1))], 1)

    return RegionalAggregator(TimeSlices(64), "stitch", local=local(), per_region=True), loop, x


def shared_gru() -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
    """One GRU over 64 slices, the maximum of the means."""
    torch.manual_seed(0)
    gru = nn.GRU(16, 32, batch_first=True)
    x = torch.randn(2, 2048, 16)

    def last(x: Tensor) -> Tensor:
        return gru(x)[0][:, -1]

    def loop(x: Tensor) -> Tensor:
        return torch.stack([last(p) for p in x.split(32, 1)]).amax(0)

    return RegionalAggregator(TimeSlices(64), "max", local=last), loop, x


def main() -> None:
    """Each case: ratio loop / batched."""
    chosen = options()
    cases = {
        "256 regions of an image, one CNN": shared_cnn,
        "64 slices, an MLP each": own_mlps,
        "64 slices, one GRU": shared_gru,
    }
    for name, make in cases.items():
        layer, loop, x = make()
        works = {
            "loop": lambda loop=loop, x=x: loop(x).sum().backward(),
            "batched": lambda layer=layer, x=x: layer(x).sum().backward(),
        }
        for work in works.values():
            work()
        times = interleaved(works, max(chosen.repeats, 5))
        ratio = times["loop"] / times["batched"]
        mark = "" if ratio >= 1 else " MISSED"
        print(f"{name}: batched {times['batched'] * 1e3:.1f} ms, {ratio:.1f} times as fast as the loop (>= 1){mark}")


if __name__ == "__main__":
    main()
