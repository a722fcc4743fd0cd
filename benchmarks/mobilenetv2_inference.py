"""The features of MobileNetV2 (transformers): inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import MobileNetV2Config, MobileNetV2Model

from benchmarks.common import Case, Options, main


class Features(nn.Module):
    """The last feature map of the network, without pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.model = MobileNetV2Model(MobileNetV2Config(), add_pooling_layer=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).last_hidden_state


def cases(chosen: Options) -> list[Case]:
    """A sixteenth of the memory, and faster: small regions stay in the cache."""
    torch.manual_seed(0)
    side = chosen.side(2048)
    return [
        Case(
            f"MobileNetV2 features 1x3x{side}x{side}, inference",
            chosen.place(Features()).eval(),
            chosen.draw(1, 3, side, side),
            share=1 / 16,
            macs_target=0.03,
            time_target=0.8,
        )
    ]


if __name__ == "__main__":
    main(cases)
