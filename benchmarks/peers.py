"""Side by side with what people use today, on the same networks in the same process.

- `monai.inferers.sliding_window_inference`: overlapping windows, blended; not exact, since borders
  of windows see padding where the picture goes on, and norms see a window instead of the picture.
- `lightstream`: exact tiled training; run only if it is installed (it is no dependency).
Checkpointing stands in `resnet18_training`, diffusers' tiling in `autoencoderkl_decode`.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
from dataclasses import dataclass

import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets import BasicUNet
from torch import Tensor, nn

import ranger_nn
from benchmarks import resnet18_training
from benchmarks.common import (
    Options,
    Work,
    difference,
    inference,
    interleaved,
    line,
    megabytes,
    options,
    peak,
    training,
)
from ranger_nn.errors import BudgetError

WINDOW = 256


@dataclass(frozen=True)
class Peer:
    """One way of doing the same work, and the network that it works on."""

    name: str
    run: Work
    model: nn.Module


def table(title: str, ways: list[Peer], chosen: Options) -> None:
    """Print error, peak and time of each way, as ratios to the first, the untouched network.

    A way that no plan fits (at a small --size the share of memory may be too small) gets a row that says so.
    """
    exact = ways[0].run()
    errors, least = {}, {}
    for way in ways:
        try:
            errors[way.name] = difference(way.run(), exact)
        except BudgetError as error:
            if error.least is None:  # not a matter of size: the amount of memory is malformed
                raise
            least[way.name] = error.least
    planned = [way for way in ways if way.name in errors]
    peaks = {way.name: peak(way.run, way.model, chosen.device) for way in planned}
    seconds = interleaved({way.name: way.run for way in planned}, chosen.repeats, chosen.device)
    print(f"\n{title}\n")
    print(line(("way", "max diff", "peak MB", "peak ratio", "time", "time ratio")))
    print(line(["---"] * 6))
    for name in peaks:
        print(
            line((
                name,
                f"{errors[name]:.1e}",
                megabytes(peaks[name]),
                f"{peaks[name] / peaks[ways[0].name]:.3f}",
                f"{seconds[name]:.2f} s",
                f"{seconds[name] / seconds[ways[0].name]:.2f}",
            )),
            flush=True,
        )  # fmt: skip
    for name, needed in least.items():
        print(line((name, f"no plan: the least is {megabytes(needed)} MB", *["-"] * 4)), flush=True)


def windows(model: nn.Module, x: Tensor, overlap: float, mode: str) -> Work:
    """MONAI's sliding window inference with its usual settings."""

    def work() -> tuple[Tensor, ...]:
        with torch.no_grad():
            y = sliding_window_inference(x, (WINDOW, WINDOW), 1, model, overlap=overlap, mode=mode)
        assert isinstance(y, Tensor)
        return (y,)

    return work


def sliding_windows(chosen: Options, norm: str) -> None:
    """BasicUNet with the given norm: MONAI's windows against regions."""
    torch.manual_seed(0)
    side = chosen.side(1024)
    network = BasicUNet(spatial_dims=2, in_channels=3, out_channels=2, norm=norm)
    model, x = chosen.place(network).eval(), chosen.draw(1, 3, side, side)
    untouched = inference(model, x)
    untouched()
    allowed = peak(untouched, model, chosen.device) // (10 if norm == "batch" else 2)
    small = ranger_nn.regionalize(model, memory=allowed)
    ways = [
        Peer("untouched", untouched, model),
        Peer("regionalize", inference(small, x), small),
        Peer("sliding window, overlap 0.25", windows(model, x, 0.25, "constant"), model),
        Peer("sliding window, overlap 0.5, gaussian", windows(model, x, 0.5, "gaussian"), model),
    ]
    table(f"BasicUNet ({norm} norm) 1x3x{side}x{side}, inference", ways, chosen)


def exact_tiled_training(chosen: Options) -> None:
    """ResNet-18: lightstream and checkpointing against regions."""
    side = chosen.side(2048)
    model, x = resnet18_training.network(chosen), chosen.draw(1, 3, side, side)
    untouched = training(model, x)
    untouched()
    allowed = peak(untouched, model, chosen.device) // 7
    small, checkpointed = ranger_nn.regionalize(model, memory=allowed), resnet18_training.checkpointed(model)
    step = functools.cache(lambda: training(small, x))  # planned on the first run: `table` says so where nothing fits
    ways = [
        Peer("untouched", untouched, model),
        Peer("regionalize", lambda: step()(), small),
        Peer("torch.utils.checkpoint per block", training(checkpointed, x), checkpointed),
    ]
    if all(importlib.util.find_spec(name) for name in ("lightstream", "lightning")):
        ways.append(lightstream(model, x))
    else:
        print("\nlightstream is not installed: left out")
    table(f"ResNet-18 1x3x{side}x{side}, forward + backward", ways, chosen)


def lightstream(model: nn.Module, x: Tensor) -> Peer:
    """The same forward and backward by lightstream 1.0: features tile by tile, the head as it is."""
    module = importlib.import_module("lightstream.core.constructor")
    model = copy.deepcopy(model)
    body = nn.Sequential(model.resnet.embedder, *model.resnet.encoder.stages)
    tile = min(1536, x.shape[-1])  # most of a tile is halo: 490 pixels a side
    constructor = module.StreamingConstructor(
        body, tile, verbose=False, normalize_on_gpu=False, add_keep_modules=[nn.BatchNorm2d]
    )
    # It would move the model to CUDA after finding its tiles; False keeps the model where it is.
    constructor.statistics_on_cpu = x.is_cuda
    stream = constructor.prepare_streaming_model()

    def work() -> tuple[Tensor, ...]:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            features = stream.forward(x)
        features.requires_grad_()
        y = model.classifier(model.resnet.pooler(features))
        y.backward(torch.ones_like(y) / y.numel())
        stream.backward(x, features.grad)
        return (y.detach(),)

    return Peer("lightstream", work, model)


def main() -> None:
    """Print all comparisons."""
    chosen = options()
    sliding_windows(chosen, "batch")
    sliding_windows(chosen, "instance")
    exact_tiled_training(chosen)


if __name__ == "__main__":
    main()
