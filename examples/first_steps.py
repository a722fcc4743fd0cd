"""First steps: any network, unchanged, inside a stated memory. Copy and put your own model in."""

import torch
from torch import nn

import ranger_nn

model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 8, 3, padding=1))
x, target = torch.rand(1, 3, 517, 389), torch.rand(1, 8, 258, 194)

small = ranger_nn.regionalize(model, memory="16MB")  # the same parameters; state_dict and optimisers see no change
print(small.plan_for(x))

with ranger_nn.measure() as used:
    loss = nn.functional.mse_loss(small(x), target)  # the same numbers as model(x) ...
    loss.backward()  # ... and the same gradients
print(f"loss {loss.item():.6f}, peak {used.peak / 1e6:.1f} MB, output and its gradient included")
