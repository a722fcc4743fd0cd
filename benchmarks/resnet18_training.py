"""ResNet-18 (transformers) with frozen norm: forward and backward of a pooled classifier.

Beside the untouched network stands `torch.utils.checkpoint` around every residual block, what
people use today to save memory in training.
"""

from __future__ import annotations

import copy
import types

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer

from benchmarks.common import (
    Case,
    Options,
    compare,
    interleaved,
    judged,
    megabytes,
    options,
    peak,
    show,
    training,
)


def network(chosen: Options) -> nn.Module:
    """ResNet-18 in eval mode; the affine parameters of its norms do not train either."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    model = chosen.place(ResNetForImageClassification(config)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    """A copy with activation checkpointing around each residual block."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, ResNetBasicLayer):
            module.forward = types.MethodType(through_checkpoint, module)  # type: ignore[method-assign]
    return model


def through_checkpoint(block: ResNetBasicLayer, x: Tensor) -> Tensor:
    """The block's own forward, its activations dropped until the backward."""
    return checkpoint(ResNetBasicLayer.forward, block, x, use_reentrant=False)


def cases(chosen: Options) -> list[Case]:
    """A seventh of the memory."""
    side = chosen.side(2048)
    x = chosen.draw(1, 3, side, side)
    name = f"ResNet-18 1x3x{side}x{side}, forward + backward"
    return [Case(name, network(chosen), x, share=1 / 7, train=True, time_target=1.5)]


def against_checkpoint(case: Case, ours: int, chosen: Options) -> str:
    """The same work by `torch.utils.checkpoint`: its peak, ours as a share of it, its time."""
    other = checkpointed(case.model)
    plain, kept = case.start(case.model), training(other, case.x)
    plain(), kept()
    theirs = peak(kept, other, chosen.device)
    seconds = interleaved({"plain": plain, "checkpoint": kept}, chosen.repeats, chosen.device)
    return (
        f"torch.utils.checkpoint per block: peak {megabytes(theirs)} MB, "
        f"ours/checkpoint {judged(ours / theirs, 1 / 4, '{:.3f}')}, "
        f"checkpoint's time ratio {seconds['checkpoint'] / seconds['plain']:.2f}"
    )


def main() -> None:
    """The row, and the comparison with checkpointing below it."""
    chosen = options()
    for case in cases(chosen):
        row = compare(case, chosen)
        show([row])
        print(against_checkpoint(case, row.ours, chosen))


if __name__ == "__main__":
    main()
