"""The learnable door in PyTorch: `nn.Module`s over `ranger_nn.partition`, `ranger_nn.aggregate`, `ranger_nn.layers`."""
