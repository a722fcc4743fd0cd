"""Ranger: run and train neural networks region by region, exactly, inside a stated memory.

Everything but the errors is loaded on first use: importing `ranger_nn` imports no framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ranger_nn import errors
from ranger_nn.errors import (
    BudgetError,
    CaptureError,
    GradientError,
    InputError,
    LayerError,
    MissingExtraError,
    PartitionError,
    PlanError,
    RangerError,
    VerificationError,
)
from ranger_nn.lazy import exporter

if TYPE_CHECKING:
    from ranger_nn.doors import plan, regionalize, run
    from ranger_nn.io.pixels import Pixels
    from ranger_nn.partition.blocks import Blocks
    from ranger_nn.partition.graph import GraphParts
    from ranger_nn.partition.grid import Grid
    from ranger_nn.partition.kmeans import KMeans
    from ranger_nn.partition.show import show
    from ranger_nn.partition.time import TimeSlices
    from ranger_nn.torch.measure import measure

__version__ = "0.1.0"
__all__ = [
    "Blocks",
    "BudgetError",
    "CaptureError",
    "GradientError",
    "GraphParts",
    "Grid",
    "InputError",
    "KMeans",
    "LayerError",
    "MissingExtraError",
    "PartitionError",
    "Pixels",
    "PlanError",
    "RangerError",
    "TimeSlices",
    "VerificationError",
    "errors",
    "measure",
    "plan",
    "regionalize",
    "run",
    "show",
]

__getattr__, __dir__ = exporter(
    __name__,
    {
        "Blocks": "ranger_nn.partition.blocks",
        "GraphParts": "ranger_nn.partition.graph",
        "Grid": "ranger_nn.partition.grid",
        "KMeans": "ranger_nn.partition.kmeans",
        "Pixels": "ranger_nn.io.pixels",
        "TimeSlices": "ranger_nn.partition.time",
        "show": "ranger_nn.partition.show",
        "measure": "ranger_nn.torch.measure",
        "plan": "ranger_nn.doors",
        "regionalize": "ranger_nn.doors",
        "run": "ranger_nn.doors",
    },
)
