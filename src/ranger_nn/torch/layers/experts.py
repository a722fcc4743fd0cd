"""`RegionExperts` for PyTorch: K-means regions of samples, a network for each, and each sample through its own only."""

from __future__ import annotations

from torch import Tensor, nn

from ranger_nn.layers.clusters import check_experts, check_kept
from ranger_nn.partition.kmeans import KMeans
from ranger_nn.torch.layers.clusters import Clusters, drawn, put, taken
from ranger_nn.torch.layers.stacked import Stacked


class RegionExperts(nn.Module):
    """Samples are routed to the nearest centre, and each goes through the network of that region.

    The networks' parameters are stacked (regions, ...); samples are brought together by region and all networks run in
    batched calls (`torch.func.vmap`), never in a loop over regions. Each sample's result and gradients are those of its
    own network applied to it; a network that gets no sample gets a gradient of zero.

    Args:
        partition: `KMeans(regions)`. Unbalanced, no sample is dropped whatever the loads; `balanced=True`: each region
            takes at most `capacity` samples of a batch, or tokens of a sequence, those that do not fit go to the next
            region. Its `update` moves the centres in training: "ema", "gradient" or "none".
        local: the network of a region, samples (n, d) in and (n, ...) out, each sample by itself; made once for each
            region by copying it and calling `reset_parameters` of its modules. No buffers, no recurrent layers.
        features: d; None: that of the first input.

    Shapes:
        x (batch, d) -> (batch, ...); x (batch, N, d) -> (batch, N, ...).

    Raises:
        PartitionError: a partition that is no KMeans, a capacity too small, a local network that cannot be stacked or
            does not keep its samples.
        InputError: NaN in `adapt`, or in an input on the CPU that is not compiled.

    Source: Jacobs, Jordan, Nowlan & Hinton 1991, Adaptive mixtures of local experts; Shazeer et al. 2017, Outrageously
    large neural networks, section 2 (each sample computes its own experts only; here one, without a gate); Roy et al.
    2021, Routing Transformer, section 4.1 (K-means routing trained online); Gale et al. 2022, MegaBlocks (no drops).
    """

    def __init__(self, partition: KMeans, local: nn.Module, *, features: int | None = None) -> None:
        super().__init__()
        check_experts(partition, local, isinstance(local, nn.Module), "torch.nn.Module")
        self.clusters = Clusters(partition, features)
        self.local = Stacked(local, partition.clusters)
        self.local.check_batched("RegionExperts")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Each sample through the network of its region.

        Args:
            x: (batch, d) or (batch, N, d).
            mask: (batch,) or (batch, N) bool, True for samples that are there; the others give zero and move nothing.
        """
        routes = self.clusters(x, mask)
        rows = x.reshape(-1, x.shape[-1])
        together = taken(rows, routes, zeros=self.clusters.partition.balanced)
        towards = self.clusters.follow(routes, together)
        y = self.local(routes.owner, together)
        check_kept(routes.shape, y.shape)
        y = drawn(put(y, routes), self.clusters.centres, towards)
        return y.reshape(*x.shape[:-1], *y.shape[1:])

    def adapt(self, data: Tensor) -> None:
        """Put the centres where K-means finds those of `data` (samples, d) or (batch, N, d); see `KMeans.fit`."""
        self.clusters.adapt(data)

    def extra_repr(self) -> str:
        """Partition."""
        return str(self.clusters.partition)
