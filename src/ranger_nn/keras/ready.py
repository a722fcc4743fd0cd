"""A plan made ready to run, and what a run of it gives. Enter at `Ready` and `handed_out`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ranger_nn.keras import private
from ranger_nn.keras.capture import Captured
from ranger_nn.keras.execute import Runner


@dataclass
class Ready:
    """A plan made ready to run."""

    captured: Captured
    runner: Runner
    checked: bool = False


@dataclass
class Found:
    """What a run gives: flattened outputs, the mask of each or None, and what activity regularisers add to the loss."""

    outputs: list[Any]
    masks: list[Any]
    losses: list[Any]


def handed_out(captured: Captured, found: Found) -> Any:
    """Outputs in the model's structure, with their masks attached; losses added where the layers add them."""
    for y, mask in zip(found.outputs, found.masks, strict=True):
        if mask is not None:
            private.set_mask(y, mask)
    for (layer, _), loss in zip(captured.losses, found.losses, strict=True):
        layer.add_loss(loss)
    return captured.pack(found.outputs)
