"""Partition of unity: one small network for each region, blended, beside one network of equal parameters.

A multi-scale regression, f(x) = sin(2 Hz) + sin(40 Hz) on [0, 1] (Moseley et al. 2023, FBPINNs, section 5.2.1, there as a
differential equation). Both train with Adam for the same CPU time; the error is measured between the training points.
A learning rate is chosen for each side from the same list, the best one counts.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor, nn

from ranger_nn import Grid
from ranger_nn.torch import RegionalAggregator

REGIONS = 32
WIDTH = 16
TARGET = 20.0


def target(x: Tensor) -> Tensor:
    """Two frequencies."""
    return torch.sin(2 * math.pi * 2 * x) + torch.sin(2 * math.pi * 40 * x)


def points(n: int) -> Tensor:
    """(1, n, 1): the middles of n cells of [0, 1]."""
    return ((torch.arange(n) + 0.5) / n).reshape(1, n, 1)


def regional() -> nn.Module:
    """Small networks on each region's own coordinate."""
    local = nn.Sequential(nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
    grid = Grid(REGIONS, overlap=0.5, window="cosine", axes=(1,))
    return RegionalAggregator(grid, "stitch", local=local, per_region=True, coordinates=True)


def parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters())


def dense(count: int) -> nn.Module:
    """One network of three hidden layers with about `count` parameters."""
    width = int((-5 + math.sqrt(25 + 8 * count)) / 4)
    hidden = [layer for _ in range(2) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(nn.Linear(1, width), nn.Tanh(), *hidden, nn.Linear(width, 1))


def error_after(model: nn.Module, seconds: float, rate: float) -> tuple[float, int]:
    """(relative L2 error between the training points, steps) after training for `seconds`."""
    x = points(2048)
    y, adam, steps = target(x), torch.optim.Adam(model.parameters(), rate), 0
    start = time.process_time()
    while time.process_time() - start < seconds:
        adam.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        adam.step()
        steps += 1
    fine = points(6144)
    with torch.no_grad():
        return ((model(fine) - target(fine)).norm() / target(fine).norm()).item(), steps


def main() -> None:
    """Best of the rates, on both sides."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="CPU time of each training")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    best: dict[str, float] = {}
    for name in ("one network", "regions"):
        for rate in (1e-3, 5e-3):
            torch.manual_seed(0)
            small = regional()
            model = small if name == "regions" else dense(parameters(small))
            error, steps = error_after(model, given.seconds, rate)
            best[name] = min(best.get(name, math.inf), error)
            print(f"{name}, {parameters(model)} parameters, rate {rate}: relative L2 {error:.2e} after {steps} steps")
    ratio = best["one network"] / best["regions"]
    mark = "" if ratio >= TARGET else " MISSED"
    print(f"partition of unity: error {ratio:.0f} times lower for the same CPU time (>= {TARGET:.0f}){mark}")


if __name__ == "__main__":
    main()
