"""Ranger: run and train neural networks region by region, exactly, inside a stated memory.

`regionalize`, `plan` and `measure` are loaded on first use: importing `ranger_nn` imports no framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ranger_nn import errors
from ranger_nn.errors import (
    BudgetError,
    CaptureError,
    InputError,
    MissingExtraError,
    PlanError,
    RangerError,
    VerificationError,
)

if TYPE_CHECKING:
    from ranger_nn.torch.measure import measure
    from ranger_nn.torch.module import plan, regionalize

__version__ = "0.1.0"
__all__ = [
    "BudgetError",
    "CaptureError",
    "InputError",
    "MissingExtraError",
    "PlanError",
    "RangerError",
    "VerificationError",
    "errors",
    "measure",
    "plan",
    "regionalize",
]


def __getattr__(name: str) -> Any:
    """Load the PyTorch adapter when one of its functions is first asked for."""
    if name in {"plan", "regionalize"}:
        from ranger_nn.torch import module

        return getattr(module, name)
    if name == "measure":
        from ranger_nn.torch.measure import measure

        return measure
    raise AttributeError(f"module 'ranger_nn' has no attribute {name!r}")
