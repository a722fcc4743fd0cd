"""The K-means partition: a space is cut into the regions that lie nearest to each of some centres.

A description; layers hold the centres, and move them in training as `update` says (`layers/clusters.py`). Lloyd's
algorithm from a k-means++ start is scikit-learn's (Arthur and Vassilvitskii 2007). Enter at `KMeans.fit`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ranger_nn.errors import InputError, MissingExtraError, PartitionError
from ranger_nn.names import nearest

UPDATES = ("ema", "gradient", "none")


@dataclass(frozen=True)
class KMeans:
    """A partition into `clusters` regions, each the samples that lie nearest to its centre.

    Args:
        clusters: how many regions.
        balanced: whether each region takes the same number of samples of a batch, so that shapes are fixed.
        capacity: samples of a region when balanced; None is ceil(samples / clusters).
        update: how a layer moves its centres in training: "ema" (moving average of assigned samples), "gradient"
            (trained with the other parameters, on the quantisation error), "none".
        decay: of the moving average, for each step.
        seed: of the start.

    Raises:
        PartitionError: a number out of its range, or an unknown `update`.
    """

    clusters: int
    balanced: bool = False
    capacity: int | None = None
    update: str = "ema"
    decay: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("clusters", self.clusters), ("capacity", self.capacity), ("seed", self.seed)):
            if isinstance(value, bool) or not isinstance(value, int | None):
                raise PartitionError(f"{name} of KMeans is an integer; got {value!r}")
        if self.clusters < 1:
            raise PartitionError(f"KMeans makes at least 1 region, not clusters={self.clusters}.")
        if self.capacity is not None and not (self.balanced and self.capacity > 0):
            raise PartitionError(
                f"capacity is how many samples each region takes when balanced, at least 1; capacity is {self.capacity} "
                f"and balanced is {self.balanced}. Leave capacity out, or set balanced=True."
            )
        if self.update not in UPDATES:
            raise PartitionError(
                f"update is one of {', '.join(map(repr, UPDATES))}, not {self.update!r}{nearest(self.update, UPDATES)}."
            )
        if not 0 <= self.decay < 1:
            raise PartitionError(f"decay is at least 0 and below 1, not {self.decay}.")

    @property
    def count(self) -> int:
        """Regions."""
        return self.clusters

    def fit(self, data: np.ndarray) -> np.ndarray:
        """Centres (clusters, d), float64, of data (samples, d); the same for the same seed.

        Raises:
            InputError: data that is not (samples, d), is not finite, or has fewer samples than clusters.
            MissingExtraError: scikit-learn is not installed.
        """
        try:
            from sklearn.cluster import KMeans as Lloyd
        except ImportError as error:
            raise MissingExtraError('KMeans.fit needs scikit-learn: pip install "ranger-nn[kmeans]"') from error
        data = np.asarray(data, dtype=np.float64)
        if data.ndim != 2:
            raise InputError(f"KMeans.fit takes data of shape (samples, features), not {data.shape}.")
        if not np.isfinite(data).all():
            raise InputError(
                f"KMeans.fit takes finite numbers; {int((~np.isfinite(data)).sum())} of {data.size} are NaN or "
                "infinite. Leave those samples out, or fill them in."
            )
        if len(data) < self.clusters:
            raise InputError(
                f"KMeans of {self.clusters} clusters needs at least as many samples; the data has {len(data)}. "
                f"Give more samples, or make KMeans(clusters={len(data)}) or fewer."
            )
        return Lloyd(self.clusters, n_init=1, random_state=self.seed).fit(data).cluster_centers_
