"""The learnable door in Keras 3: layers over `ranger_nn.partition`, `ranger_nn.aggregate`, `ranger_nn.layers`."""
