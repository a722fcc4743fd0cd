"""How a small network becomes a catalogue entry: odd sizes, regions that divide nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support import Entry

IMAGE = ((2, 3, 37, 41),)
SERIES = ((2, 2, 131),)
VOLUME = ((1, 2, 13, 19, 17),)
REGION = (11, 17)


class Lambda(nn.Module):
    """A function as a module, for layers without parameters."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def between(middle: nn.Module | Callable[[Tensor], Any], channels: int = 6) -> nn.Sequential:
    """conv, the feature under test, conv: so that it sees a halo on both sides."""
    feature = middle if isinstance(middle, nn.Module) else Lambda(middle)
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), feature, nn.LazyConv2d(4, 3, padding=1))


def net(
    name: str,
    build: Callable[[], nn.Module],
    shapes: tuple[tuple[int, ...], ...] = IMAGE,
    regions: tuple[int, ...] = REGION,
    *,
    train: bool = False,
    whole: bool = False,
) -> Entry:
    """An entry; lazy layers are sized by a dry run on zeros."""

    def sized() -> nn.Module:
        model = build()
        if any(isinstance(m, nn.modules.lazy.LazyModuleMixin) for m in model.modules()):
            model.eval()(*(torch.zeros(s) for s in shapes))
        return model

    return Entry(name, sized, shapes, regions, train=train, whole=whole)


def feature(name: str, middle: Any, **options: Any) -> Entry:
    """An entry with the feature between two convolutions; `middle` makes it afresh."""
    return net(name, lambda: between(middle()), **options)


def function(name: str, function: Callable[[Tensor], Any], **options: Any) -> Entry:
    """The same for a function without parameters."""
    return net(name, lambda: between(function), **options)


def resize(name: str, **options: Any) -> Entry:
    return function(f"resize_{name}", lambda x: F.interpolate(x, **options))
