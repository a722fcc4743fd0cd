"""The decoder of diffusers' AutoencoderKL: group norm and attention, where tiling blurs seams.

`enable_tiling()` decodes overlapping tiles, each with group norm and attention of its own, and
blends them: its error is printed beside ours.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from benchmarks.common import (
    Case,
    Options,
    compare,
    difference,
    inference,
    interleaved,
    megabytes,
    options,
    peak,
    show,
)

SCALE = 8  # pixels per latent pixel, at four levels


class Decode(nn.Module):
    """`decode` as a module: latent in, image out."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latent: Tensor) -> Tensor:
        return self.autoencoder.decode(latent, return_dict=False)[0]


def network(chosen: Options) -> nn.Module:
    """Four levels as in Stable Diffusion's, with small widths."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        norm_num_groups=32,
        sample_size=512,
    )
    return Decode(chosen.place(model).eval())


def cases(chosen: Options) -> list[Case]:
    """Half of the memory."""
    side = chosen.side(1024)
    x = chosen.draw(1, 4, side // SCALE, side // SCALE)
    return [Case(f"AutoencoderKL decode to {side}x{side}", network(chosen), x, share=1 / 2, time_target=1.3)]


def against_tiling(case: Case, chosen: Options) -> str:
    """The same decode by `enable_tiling()`: its error, peak and time against the untouched one."""
    autoencoder = case.model.autoencoder
    assert isinstance(autoencoder, AutoencoderKL)
    work = inference(case.model, case.x)
    exact, untouched = work(), peak(work, case.model, chosen.device)
    plain = interleaved({"plain": work}, chosen.repeats, chosen.device)["plain"]
    autoencoder.enable_tiling()
    # Tiles of half the side or less, so that there is something to blend at any size.
    latent = min(autoencoder.tile_latent_min_size, max(8, case.x.shape[-1] // 2))
    autoencoder.tile_latent_min_size, autoencoder.tile_sample_min_size = latent, latent * SCALE
    error, tiled = difference(work(), exact), peak(work, case.model, chosen.device)
    seconds = interleaved({"tiled": work}, chosen.repeats, chosen.device)["tiled"]
    autoencoder.disable_tiling()
    return (
        f"enable_tiling(): off by {error:.1%} of the largest value, "
        f"peak {megabytes(tiled)} of {megabytes(untouched)} MB ({tiled / untouched:.3f}), "
        f"time ratio {seconds / plain:.2f}"
    )


def main() -> None:
    """The row, and the comparison with diffusers' own tiling below it."""
    chosen = options()
    for case in cases(chosen):
        show([compare(case, chosen)])
        print(against_tiling(case, chosen))


if __name__ == "__main__":
    main()
