"""The article's network and its worked example, in PyTorch.

SimpleNet: I -> H1 -> O and I -> H2 -> O, five units each, ReLU, the branches added: two regions (H1 and H2) whose results
are summed. Then section 4: a 5 x 5 layer in 2 x 2 blocks, 3 + 2 by 3 + 2, gives what the uncut layer gives.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ranger_nn import Blocks
from ranger_nn.torch import BlockDense, RegionalAggregator


class SimpleNet(nn.Module):
    """The article's class, with `RegionalAggregator(partitioning, aggregator)` where it adds its two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.h1 = nn.Sequential(nn.Linear(2, 5), nn.ReLU())
        self.h2 = nn.Sequential(nn.Linear(2, 5), nn.ReLU())
        self.out = nn.Linear(5, 1)
        self.regions = RegionalAggregator(self.partitioning, nn.Identity())

    def partitioning(self, inputs: Tensor) -> list[Tensor]:
        """The regions are the two hidden layers."""
        return [self.h1(inputs), self.h2(inputs)]

    def forward(self, inputs: Tensor) -> Tensor:
        """I -> H1, H2 -> O: the aggregator leaves each part as it is, and the parts are summed."""
        return self.out(self.regions(inputs))


def train(epochs: int = 10, seed: int = 0) -> list[float]:
    """Loss of each epoch, on random data as in the article, batches of 32."""
    torch.manual_seed(seed)
    x, y, model = torch.rand(100, 2), torch.rand(100, 1), SimpleNet()
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(epochs):
        for part, target in zip(x.split(32), y.split(32)):
            sgd.zero_grad()
            nn.functional.mse_loss(model(part), target).backward()
            sgd.step()
        losses.append(nn.functional.mse_loss(model(x), y).item())
    return losses


def blocks_of_five() -> tuple[float, float]:
    """Largest differences of output and input gradient between the layer in blocks and the uncut layer."""
    torch.manual_seed(0)
    whole = nn.Linear(5, 5).double()
    cut = BlockDense.from_dense(whole, Blocks(2, 2))
    x = torch.rand(8, 5, dtype=torch.float64, requires_grad=True)
    outputs = [torch.relu(layer(x)) for layer in (whole, cut)]
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in outputs]
    return (outputs[0] - outputs[1]).abs().max().item(), (gradients[0] - gradients[1]).abs().max().item()


if __name__ == "__main__":
    losses = train()
    print(f"SimpleNet, ten epochs: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    print("5 x 5 in 2 x 2 blocks: largest difference of output and gradient", *blocks_of_five())
