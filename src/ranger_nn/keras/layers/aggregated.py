"""What `looped.py` and `clustered.py` ask of Keras's `RegionalAggregator`, which calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ranger_nn.keras.layers.clusters import Clusters
from ranger_nn.keras.layers.stacked import Stacked
from ranger_nn.layers.regional import Layout, Result


class Aggregated(Protocol):
    """A layer with a partition, a local network and an aggregator; see `RegionalAggregator` for what each is."""

    name: str
    partition: Any
    aggregator: Any
    local: Any
    locals: list[Any] | None
    stacked: Stacked | None
    clusters: Clusters | None
    allowed: int | None
    _shapes_only: bool

    @property
    def compute_dtype(self) -> Any:
        """Keras's own."""
        ...

    def _run(self, stacked: Any, ids: list[int], **kwargs: Any) -> Any: ...

    def _result_shape(self, region: Any) -> Any: ...

    def _weights(self, results: Sequence[Result], layout: Layout | None, numbers: bool = True) -> list[Any] | None: ...

    def _region_weights(self, dtype: Any) -> Any: ...
