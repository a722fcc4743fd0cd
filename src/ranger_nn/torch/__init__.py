"""PyTorch adapter. Only this room imports torch.

Two doors: `regionalize` and `plan` (exact; the same as `ranger_nn.regionalize`), and the layers of
`torch/layers` (learnable), which have the same names and arguments in `ranger_nn.keras`.
"""

from __future__ import annotations

from ranger_nn.lazy import exporter

_LAYERS = {
    "RegionalAggregator": "regional",
    "BlockDense": "blocks",
    "SlicedRNN": "sliced_rnn",
    "linear_scan": "scan",
    "MinGRU": "recurrence",
    "LRU": "recurrence",
    "GatedLinearAttention": "recurrence",
    "ClusteredAttention": "attention",
    "RegionExperts": "experts",
    "GraphLoader": "graph",
    "infer_by_parts": "graph",
}
_EXACT = {"plan": "module", "regionalize": "module"}

__all__ = [*_EXACT, *_LAYERS]
__getattr__, __dir__ = exporter(
    __name__,
    {n: f"ranger_nn.torch.layers.{m}" for n, m in _LAYERS.items()}
    | {n: f"ranger_nn.torch.{m}" for n, m in _EXACT.items()},
)
