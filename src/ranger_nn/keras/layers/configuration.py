"""The arguments of Keras's `RegionalAggregator` as plain data, and back: what `.keras` files hold.

Partitions and aggregators of this library are written by their own names (`ranger_nn.partition.config`); callables and
networks as Keras writes them. Enter at `configured` and `restored`.
"""

from __future__ import annotations

from typing import Any

import keras

from ranger_nn import aggregate
from ranger_nn.partition.blocks import Blocks
from ranger_nn.partition.config import from_config, to_config
from ranger_nn.partition.grid import Grid
from ranger_nn.partition.kmeans import KMeans
from ranger_nn.partition.time import TimeSlices

_PARTITIONS: dict[str, type] = {"Grid": Grid, "TimeSlices": TimeSlices, "Blocks": Blocks, "KMeans": KMeans}
_AGGREGATORS = {n: getattr(aggregate, n) for n in aggregate.__all__ if n not in {"aggregator", "Call"}}


def configured(given: dict[str, Any], partition: Any, plain: bool) -> dict[str, Any]:
    """The arguments as plain data.

    Args:
        given: aggregator, local and the rest, as they were given.
        partition: the partition.
        plain: whether it is one of this library's.
    """
    given["partition"] = to_config(partition) if plain else keras.saving.serialize_keras_object(partition)
    over = given["aggregator"]
    if not isinstance(over, str):
        named = type(over) in _AGGREGATORS.values()
        given["aggregator"] = to_config(over) if named else keras.saving.serialize_keras_object(over)
    given["local"] = keras.saving.serialize_keras_object(given["local"])
    return given


def restored(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments that `configured` wrote."""
    config = dict(config)
    for key, known in (("partition", _PARTITIONS), ("aggregator", _AGGREGATORS)):
        if isinstance(config[key], dict):
            ours = "class" in config[key]
            config[key] = from_config(config[key], known) if ours else _object(config[key])
    config["local"] = _object(config["local"])
    return config


def _object(given: Any) -> Any:
    return keras.saving.deserialize_keras_object(given)
