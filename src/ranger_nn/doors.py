"""`regionalize` and `plan` for the caller's framework: the adapter is chosen by the class of the model.

No framework is imported that the caller has not imported: only the adapter of the model's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from ranger_nn.errors import InputError

_ADAPTERS = {"keras": "ranger_nn.keras.model", "torch": "ranger_nn.torch.module"}
"""In this order: with its PyTorch back end a Keras model is an `nn.Module` too."""


def regionalize(
    model: Any,
    memory: int | str | None = None,
    *,
    regions: Sequence[int] | None = None,
    schedule: str | None = None,
    verify: bool = False,
) -> Any:
    """A model that computes what `model` computes, region by region, inside `memory`: see the adapter's own.

    A `torch.nn.Module` gives a `torch.nn.Module` (`ranger_nn.torch.module.regionalize`), a `keras.Model` gives a
    `keras.Model` (`ranger_nn.keras.model.regionalize`); both share the parameters of the one given.

    Raises:
        InputError: the model is of neither framework.
    """
    return _adapter(model).regionalize(model, memory, regions=regions, schedule=schedule, verify=verify)


def plan(
    model: Any,
    x: Any,
    memory: int | str | None = None,
    *,
    regions: Sequence[int] | None = None,
    schedule: str | None = None,
    training: bool = False,
) -> Any:
    """The `Plan` for `model` on `x` (arrays, or a shape); nothing is run.

    Raises:
        InputError: the model is of neither framework.
    """
    return _adapter(model).plan(model, x, memory, regions=regions, schedule=schedule, training=training)


def _adapter(model: Any) -> Any:
    bases = {(base.__module__.partition(".")[0], base.__name__) for base in type(model).__mro__}
    for framework, module in _ADAPTERS.items():
        if (framework, {"keras": "Layer", "torch": "Module"}[framework]) in bases:
            return importlib.import_module(module)
    raise InputError(f"regionalize takes a torch.nn.Module or a keras.Model, got {type(model).__name__}")
