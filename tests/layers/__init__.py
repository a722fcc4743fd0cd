"""Tests of `ranger_nn.layers`."""
