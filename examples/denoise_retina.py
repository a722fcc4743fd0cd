"""Denoise a photograph with a U-Net that is trained region by region, inside a stated memory.

    make demo                                     the whole demonstration, under three minutes on two cores
    python examples/denoise_retina.py --quick     the same on a small crop, in seconds

What it shows, in order: the plan; that loss and gradients are those of the untouched network; training
inside the budget; the full picture and one four times larger; memory and time on both sides. It writes
`denoised.png` (noisy beside denoised) and `plan.png` (memory over the steps) into `out/`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import skimage.data
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from unet import UNet

import ranger_nn
from ranger_nn.io.image import write_image
from ranger_nn.planning.report import Plan
from ranger_nn.torch.module import Regional

NOISE = 0.1  # standard deviation, of pixels in 0..1
ROUNDING = 5e-4  # of a gradient in float32, a sum over two million pixels: either side is some 1e-4 off float64


@dataclass(frozen=True)
class Measured:
    """One piece of work: bytes at the peak (without input, output and the output's gradient), seconds."""

    peak: int
    seconds: float


def main() -> None:
    """Run the demonstration."""
    chosen = arguments()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    clean = photograph(chosen.side)
    noisy = clean + NOISE * torch.randn_like(clean)
    model = UNet()
    small = ranger_nn.regionalize(model, memory=chosen.memory)
    out = Path(chosen.out)
    out.mkdir(parents=True, exist_ok=True)

    print(f"Photograph: {clean.shape[-2]} x {clean.shape[-1]} pixels. Budget: {chosen.memory}.\n")
    start = time.perf_counter()
    plan = small.plan_for(noisy)
    print(plan)
    print(f"captured and planned in {time.perf_counter() - start:.1f} s")
    plan.plot(str(out / "plan.png"))

    table = {"one training step": compare_step(model, small, noisy, clean)}
    train(small, noisy, clean, chosen.steps)
    model.eval(), small.eval()
    table["the picture"] = compare_picture(model, small, noisy)
    table["4x larger"] = compare_picture(model, small, four_times(noisy))

    denoised = apply(small, noisy)
    print(f"\nPSNR: noisy {psnr(noisy, clean):.2f} dB, denoised {psnr(denoised, clean):.2f} dB")
    write_image(out / "denoised.png", as_bytes(torch.cat([noisy, denoised], dim=-1)))
    show(table)
    print(f"\nWritten: {out / 'denoised.png'} (noisy beside denoised)")
    print(f"         {out / 'plan.png'} (memory over the steps)")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small crop and two steps")
    parser.add_argument("--memory", help="the budget (default: 128MB, with --quick 24MB)")
    parser.add_argument("--steps", type=int, help="training steps (default: 14, with --quick 2)")
    parser.add_argument("--out", default="out", help="folder of the pictures (default: out)")
    chosen = parser.parse_args()
    chosen.side = 261 if chosen.quick else None
    chosen.memory = chosen.memory or ("24MB" if chosen.quick else "128MB")
    chosen.steps = chosen.steps or (2 if chosen.quick else 14)
    return chosen


# ------------------------------------------------------------------------------------------ pictures


def photograph(side: int | None) -> Tensor:
    """The fundus photograph of scikit-image as (1, 3, rows, columns) in 0..1, or a crop from its middle."""
    picture = torch.from_numpy(skimage.data.retina()).permute(2, 0, 1)[None].float() / 255
    if side is None:
        return picture.contiguous()
    top, left = ((length - side) // 2 for length in picture.shape[-2:])
    return picture[..., top : top + side, left : left + side].contiguous()


def four_times(picture: Tensor) -> Tensor:
    """Twice the rows and twice the columns."""
    return nn.functional.interpolate(picture, scale_factor=2, mode="nearest")


def as_bytes(picture: Tensor) -> np.ndarray:
    """(3, rows, columns) in 0..255."""
    return (picture[0].clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def psnr(picture: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels."""
    return -10 * float(torch.log10((picture.clamp(0, 1) - clean).square().mean()))


# ---------------------------------------------------------------------------------------------- work


def step(net: nn.Module, noisy: Tensor, clean: Tensor) -> Tensor:
    """Loss and gradients: the usual two lines, whichever network it is."""
    loss = nn.functional.mse_loss(net(noisy), clean)
    loss.backward()
    return loss.detach()


def apply(net: nn.Module, picture: Tensor) -> Tensor:
    with torch.no_grad():
        return net(picture)


def train(net: nn.Module, noisy: Tensor, clean: Tensor, steps: int) -> None:
    """Adam on the full picture."""
    print(f"\nTraining, region by region, {steps} steps:")
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for number in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = step(net, noisy, clean)
        optimizer.step()
        print(f"  step {number + 1:2}  loss {loss:.5f}  {time.perf_counter() - start:.1f} s", flush=True)


# ----------------------------------------------------------------------------------------- comparing


def compare_step(model: nn.Module, small: Regional, noisy: Tensor, clean: Tensor) -> dict[str, Measured]:
    """One step on both sides: loss and gradients side by side, then what each needed."""
    found, cost = {}, {}
    for name, net in (("untouched", model), ("regional", small)):
        model.zero_grad(set_to_none=True)
        cost[name], loss = measured(partial(step, net, noisy, clean), 2 * noisy.nbytes)
        found[name] = loss, {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    (loss, grads), (loss_small, grads_small) = found["untouched"], found["regional"]
    differences = {key: relative(grads_small[key], grads[key]) for key in grads}
    worst = max(differences, key=differences.__getitem__)
    print("\nOne step, untouched against regional:")
    print(f"  loss       {loss:.8f} and {loss_small:.8f}, relative difference {relative(loss_small, loss):.1e}")
    print(f"  gradients  {len(grads)} tensors, largest relative difference {differences[worst]:.1e} ({worst})")
    assert_close(loss_small, loss, 1e-5)
    assert_close(grads_small[worst], grads[worst], ROUNDING)
    check_promise(small.plan_for(noisy), cost["regional"])
    return cost


def compare_picture(model: nn.Module, small: Regional, picture: Tensor) -> dict[str, Measured]:
    """The network applied by both sides."""
    with torch.no_grad():
        plan = small.plan_for(picture)
    found, cost = {}, {}
    for name, net in (("untouched", model), ("regional", small)):
        cost[name], found[name] = measured(partial(apply, net, picture))
    print(
        f"\nApplied to {picture.shape[-2]} x {picture.shape[-1]}: "
        f"largest relative difference {relative(found['regional'], found['untouched']):.1e}"
    )
    assert_close(found["regional"], found["untouched"], 1e-5)
    check_promise(plan, cost["regional"])
    return cost


def measured(work: Callable[[], Tensor], excluded: int = 0) -> tuple[Measured, Tensor]:
    """Bytes at the peak, without the result and less `excluded`, and seconds (the counter costs microseconds per
    block); the result.
    """
    start = time.perf_counter()
    with ranger_nn.measure() as used:
        result = work()
        used.leave_out(result)
    return Measured(used.peak - excluded, time.perf_counter() - start), result


def relative(given: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest magnitude."""
    return float((given - expected).abs().max() / expected.abs().max())


def assert_close(given: Tensor, expected: Tensor, limit: float) -> None:
    difference = relative(given, expected)
    if not difference <= limit:
        raise SystemExit(f"differs from the untouched network by {difference:.1e}, more than {limit:.0e}")


def check_promise(plan: Plan, cost: Measured) -> None:
    """Measured <= projected <= allowed."""
    allowed = plan.allowed or plan.projected
    print(f"  allowed {mega(allowed)}, projected {mega(plan.projected)}, measured {mega(cost.peak)}")
    if not cost.peak <= plan.projected <= allowed:
        raise SystemExit("the promise does not hold: measured <= projected <= allowed")


def show(table: dict[str, dict[str, Measured]]) -> None:
    """Memory and time, untouched against regional."""
    print("\nPeak memory (without input, output and its gradient) and time:")
    head = f"{'untouched':>12}{'regional':>12}{'ratio':>8}"
    print(f"{'':20}{head}{head}")
    for work, cost in table.items():
        a, b = cost["untouched"], cost["regional"]
        print(
            f"{work:20}{mega(a.peak):>12}{mega(b.peak):>12}{b.peak / a.peak:>8.3f}"
            f"{a.seconds:>10.2f} s{b.seconds:>10.2f} s{b.seconds / a.seconds:>8.2f}"
        )


def mega(n: int) -> str:
    return f"{n / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
