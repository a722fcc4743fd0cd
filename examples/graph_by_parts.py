"""Train a graph network part by part, then run it on the whole graph part by part: the same result as at once.

python examples/graph_by_parts.py            needs pip install "ranger-nn[torch,graph]"
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ranger_nn import GraphParts
from ranger_nn.torch import GraphLoader, infer_by_parts


class MeanLayer(nn.Module):
    """A node and the mean of its sources; a layer of torch_geometric does as well."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.own, self.sources = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """(nodes, outputs)."""
        source, target = edge_index
        total = torch.zeros_like(x).index_add_(0, target, x[source])
        count = torch.bincount(target, minlength=len(x)).clamp_min(1)
        return self.own(x) + self.sources(total / count[:, None])


def main() -> None:
    """Forty blocks of fifty nodes; four classes."""
    torch.manual_seed(0)
    nodes = torch.arange(2000)
    a = nodes.repeat(5)
    b = torch.where(torch.rand(len(a)) < 0.9, a // 50 * 50 + torch.randint(50, a.shape), torch.randint(2000, a.shape))
    edges = torch.stack([torch.cat([a, b]), torch.cat([b, a])])
    y = nodes // 50 % 4
    x = torch.randn(2000, 16) + torch.randn(4, 16)[y]

    loader = GraphLoader({"x": x, "y": y, "edge_index": edges}, GraphParts(16), parts_per_batch=4)
    layers = nn.Sequential(MeanLayer(16, 32), nn.ReLU(), MeanLayer(32, 4))
    adam = torch.optim.Adam(layers.parameters(), 0.01)
    for _ in range(10):
        for batch in loader:
            adam.zero_grad()
            h = layers[0](batch.x, batch.edge_index).relu()
            loss = nn.functional.cross_entropy(layers[2](h, batch.edge_index), batch.y)
            loss.backward()
            adam.step()
    y_parts = infer_by_parts(layers, x, edges, loader.split)
    with torch.no_grad():
        y_whole = layers[2](layers[0](x, edges).relu(), edges)
    right = (y_parts.argmax(1) == y).float().mean()
    print(f"{loader.split.cut} of {edges.shape[1]} edges cut; {right:.1%} right after 10 epochs")
    print(f"by parts and at once differ by at most {(y_parts - y_whole).abs().max():.1e}")


if __name__ == "__main__":
    main()
