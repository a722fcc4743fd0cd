"""The article's network and its worked example, in Keras 3: KERAS_BACKEND=tensorflow, jax or torch.

SimpleNet: I -> H1 -> O and I -> H2 -> O, five units each, ReLU, the branches added: two regions (H1 and H2) whose results
are summed. Then section 4: a 5 x 5 layer in 2 x 2 blocks, 3 + 2 by 3 + 2, gives what the uncut layer gives.
"""

from __future__ import annotations

import keras
import numpy as np

from ranger_nn import Blocks
from ranger_nn.keras import BlockDense, RegionalAggregator


class SimpleNet(keras.Model):
    """The article's class, with `RegionalAggregator(partitioning, aggregator)` where it adds its two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.h1 = keras.layers.Dense(5, activation="relu")
        self.h2 = keras.layers.Dense(5, activation="relu")
        self.out = keras.layers.Dense(1)
        self.regions = RegionalAggregator(self.partitioning, keras.activations.linear)

    def partitioning(self, inputs: object) -> list[object]:
        """The regions are the two hidden layers."""
        return [self.h1(inputs), self.h2(inputs)]

    def call(self, inputs: object) -> object:
        """I -> H1, H2 -> O: the aggregator leaves each part as it is, and the parts are summed."""
        return self.out(self.regions(inputs))


def train(epochs: int = 10, seed: int = 0) -> list[float]:
    """Loss of each epoch, on random data as in the article."""
    keras.utils.set_random_seed(seed)
    model = SimpleNet()
    model.compile(optimizer="sgd", loss="mse")
    history = model.fit(np.random.rand(100, 2), np.random.rand(100, 1), epochs=epochs, verbose=0)
    return history.history["loss"]


def blocks_of_five() -> float:
    """Largest difference of the outputs of the layer in blocks and the uncut layer."""
    whole = keras.layers.Dense(5, activation="relu")
    cut = BlockDense(5, Blocks(2, 2), activation="relu")
    x = np.random.rand(8, 5).astype("float32")
    whole.build(x.shape)
    cut.build(x.shape)
    cut.set_dense(*whole.get_weights())
    return float(np.abs(keras.ops.convert_to_numpy(whole(x)) - keras.ops.convert_to_numpy(cut(x))).max())


if __name__ == "__main__":
    losses = train()
    print(f"SimpleNet on {keras.backend.backend()}, ten epochs: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    print(f"5 x 5 in 2 x 2 blocks: largest difference {blocks_of_five():.1e}")
