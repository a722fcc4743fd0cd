"""Tests of `ranger_nn.partition`."""
