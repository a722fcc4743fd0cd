"""Small networks of Keras layers for the exact engine: one for each layer, and some of each kind of model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers as L
from keras import ops

IMAGE, SERIES, VOLUME = (1, 13, 11, 4), (1, 17, 4), (1, 7, 6, 5, 3)
Shape = tuple[int, ...]


def chain(*made: Any, shape: Shape = IMAGE) -> tuple[keras.Model, Shape]:
    """A functional model of layers in a row."""
    start = x = L.Input(shape[1:])
    for layer in made:
        x = layer(x)
    return keras.Model(start, x), shape


def functional(build: Callable[[Any], Any], shape: Shape = IMAGE) -> tuple[keras.Model, Shape]:
    """A functional model of whatever `build` does."""
    start = L.Input(shape[1:])
    return keras.Model(start, build(start)), shape


LOCAL: dict[str, Callable[[], tuple[keras.Model, Shape]]] = {
    "conv": lambda: chain(L.Conv2D(5, 3, padding="same", activation="relu")),
    "conv stride 2, window 4": lambda: chain(L.Conv2D(5, 4, strides=2, padding="same", use_bias=False)),
    "conv valid": lambda: chain(L.Conv2D(5, (4, 3), strides=2)),
    "conv dilated": lambda: chain(L.Conv2D(5, 3, dilation_rate=2, padding="same")),
    "conv of size 1, stride 3": lambda: chain(L.Conv2D(6, 1, strides=3, padding="same")),
    "depthwise": lambda: chain(L.DepthwiseConv2D(3, padding="same", depth_multiplier=2)),
    "depthwise stride 2": lambda: chain(L.DepthwiseConv2D(5, strides=2, padding="same")),
    "separable": lambda: chain(L.SeparableConv2D(6, 3, strides=2, padding="same")),
    "transposed 2/2": lambda: chain(L.Conv2DTranspose(6, 2, strides=2, padding="same")),
    "transposed 3/2": lambda: chain(L.Conv2DTranspose(6, 3, strides=2, padding="same")),
    "transposed 4/2": lambda: chain(L.Conv2DTranspose(6, 4, strides=2, padding="same")),
    "transposed valid": lambda: chain(L.Conv2DTranspose(6, 3, strides=2)),
    "transposed 1/3": lambda: chain(L.Conv2DTranspose(6, 1, strides=3, padding="same")),
    "transposed, extra row": lambda: chain(L.Conv2DTranspose(6, 5, strides=3, padding="same", output_padding=1)),
    "max pooling": lambda: chain(L.MaxPooling2D(2)),
    "max pooling same": lambda: chain(L.MaxPooling2D(3, 2, padding="same")),
    "average pooling": lambda: chain(L.AveragePooling2D(2)),
    "average pooling same": lambda: chain(L.AveragePooling2D(3, 1, padding="same")),
    "average pooling uneven": lambda: chain(L.AveragePooling2D(2, 2, padding="same")),
    "upsampling": lambda: chain(L.UpSampling2D((3, 2))),
    "upsampling linear": lambda: chain(L.UpSampling2D((2, 3), interpolation="bilinear")),
    "resizing": lambda: chain(L.Resizing(20, 17)),
    "resizing nearest": lambda: chain(L.Resizing(7, 19, interpolation="nearest")),
    "zero padding": lambda: chain(L.ZeroPadding2D(((1, 2), (3, 0)))),
    "cropping": lambda: chain(L.Cropping2D(((1, 2), (3, 0)))),
    "permuted": lambda: chain(L.Permute((2, 1, 3))),
    "batch norm": lambda: chain(L.BatchNormalization()),
    "batch norm, shift only": lambda: chain(L.BatchNormalization(scale=False)),
    "layer norm": lambda: chain(L.LayerNormalization()),
    "group norm": lambda: chain(L.GroupNormalization(2)),
    "unit norm": lambda: chain(L.UnitNormalization()),
    "rescaling": lambda: chain(L.Rescaling(1 / 255.0, 0.1)),
    "normalization": lambda: chain(L.Normalization(mean=[1.0, 2, 3, 4], variance=[1.0, 2, 3, 4])),
    "prelu": lambda: chain(L.PReLU(shared_axes=[1, 2])),
    "prelu of each place": lambda: chain(L.PReLU()),
    "softmax": lambda: chain(L.Softmax()),
    "hard swish, mish": lambda: chain(L.Activation("hard_swish"), L.Activation("mish")),
    "dense": lambda: chain(L.Dense(7, activation="swish")),
    "einsum": lambda: chain(L.EinsumDense("abcd,de->abce", output_shape=(13, 11, 5), bias_axes="e")),
    "reshaped": lambda: chain(L.Reshape((143, 4)), L.Dense(3), L.Reshape((13, 11, 3)), L.ReLU()),
    "spectral": lambda: chain(L.SpectralNormalization(L.Conv2D(3, 3))),
    "causal": lambda: chain(L.Conv1D(4, 3, padding="causal", dilation_rate=2), shape=SERIES),
    "conv 1-d": lambda: chain(L.Conv1D(4, 3, strides=2, padding="same"), shape=SERIES),
    "transposed 1-d": lambda: chain(L.Conv1DTranspose(4, 3, strides=2, padding="same"), shape=SERIES),
    "separable 1-d": lambda: chain(L.SeparableConv1D(4, 3, padding="same"), shape=SERIES),
    "pooling 1-d": lambda: chain(L.MaxPooling1D(3, 2, "same"), L.UpSampling1D(3), L.ZeroPadding1D(2), shape=SERIES),
    "attention": lambda: functional(lambda x: L.MultiHeadAttention(2, 4)(x, x), (1, 17, 8)),
    "conv 3-d": lambda: chain(L.Conv3D(4, 3, strides=(1, 2, 1), padding="same"), shape=VOLUME),
    "transposed 3-d": lambda: chain(L.Conv3DTranspose(4, 2, strides=2, padding="same"), shape=VOLUME),
    "pooling 3-d": lambda: chain(L.MaxPooling3D(2), L.UpSampling3D(2), L.ZeroPadding3D(1), shape=VOLUME),
    "average pooling 3-d": lambda: chain(L.AveragePooling3D(3, 2, "same"), shape=VOLUME),
    "joined rows": lambda: functional(lambda x: L.Concatenate(axis=1)([x, ops.relu(x)])),
    "joined channels": lambda: functional(lambda x: L.Concatenate()([x, ops.relu(x)])),
    "reflected": lambda: functional(lambda x: ops.pad(x, ((0, 0), (2, 3), (1, 1), (0, 0)), mode="reflect")),
    "sliced": lambda: functional(lambda x: x[:, 1::2, :-1]),
    "split": lambda: functional(lambda x: ops.multiply(*ops.split(x, 2, axis=-1))),
    "depth to space": lambda: functional(lambda x: ops.nn.depth_to_space(x, 2)),
    "squeezed and excited": lambda: functional(
        lambda x: x * L.Dense(4, activation="sigmoid")(L.GlobalAveragePooling2D(keepdims=True)(x))
    ),
}
if keras.backend.backend() != "tensorflow":  # TensorFlow runs convolutions in groups in XLA alone
    LOCAL["conv in groups"] = lambda: chain(L.Conv2D(6, 3, groups=2, padding="same"))

FIRST = {"data_format": "channels_first"}
LOCAL |= {
    "channels first": lambda: chain(
        L.Conv2D(6, 3, padding="same", **FIRST),
        L.BatchNormalization(axis=1),
        L.MaxPooling2D(3, 2, "same", **FIRST),
        L.DepthwiseConv2D(3, padding="same", **FIRST),
        L.UpSampling2D(2, **FIRST),
        L.Conv2DTranspose(4, 3, 2, "same", **FIRST),
        L.AveragePooling2D(3, 1, "same", **FIRST),
        L.ZeroPadding2D(1, **FIRST),
        L.Cropping2D(((1, 0), (0, 1)), **FIRST),
        L.GroupNormalization(2, axis=1),
        L.PReLU(shared_axes=[2, 3]),
        shape=(1, 4, 13, 11),
    ),
    "channels first, 1-d": lambda: chain(
        L.Conv1D(6, 3, padding="same", **FIRST),
        L.SeparableConv1D(4, 3, **FIRST),
        L.MaxPooling1D(2, **FIRST),
        shape=(1, 4, 17),
    ),
}


class Block(L.Layer):
    """A residual block, as users write them: its own weight, inner layers, and plain operators."""

    def __init__(self, filters: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conv = L.Conv2D(filters, 3, padding="same")
        self.norm = L.BatchNormalization()
        self.filters = filters

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(self.filters,), initializer="ones", name="scale")
        self.conv.build(shape)
        self.norm.build((*shape[:-1], self.filters))

    def call(self, x: Any, training: Any = None) -> Any:
        y = ops.relu(self.norm(self.conv(x), training=training))
        return x + y * ops.reshape(self.scale, (1, 1, 1, -1))


class Subclassed(keras.Model):
    """Blocks, a shared layer, two outputs in a dictionary."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block = Block(4)
        self.shared = L.Conv2D(4, 3, padding="same")
        self.head = keras.Sequential([L.GlobalAveragePooling2D(), L.Dense(3)])

    def call(self, x: Any, training: Any = None) -> Any:
        x = self.block(x, training=training)
        x = self.shared(ops.gelu(self.shared(x)))
        return {"map": x, "class": self.head(x)}


class Running(L.Layer):
    """Takes away a running mean, which it updates while it trains and reads again at once."""

    def build(self, shape: Any) -> None:
        self.mean = self.add_weight(shape=(shape[-1],), trainable=False, initializer="zeros", name="mean")

    def call(self, x: Any, training: Any = None) -> Any:
        if training:
            self.mean.assign(0.9 * self.mean + 0.1 * ops.mean(x, axis=(0, 1, 2)))
        return x - self.mean


class Foreign(L.Layer):
    """A layer that leaves `keras.ops`: it works on numbers only."""

    def call(self, x: Any) -> Any:
        if isinstance(x, keras.KerasTensor):
            raise TypeError("numbers only")
        return x * 2.0

    def compute_output_shape(self, shape: Any) -> Any:
        return shape


class Blur(L.Layer):
    """The mean of three rows, beyond the reach of tracing."""

    def call(self, x: Any) -> Any:
        if isinstance(x, keras.KerasTensor):
            raise TypeError("numbers only")
        y = ops.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
        return (y[:, :-2] + y[:, 1:-1] + y[:, 2:]) / 3.0

    def compute_output_shape(self, shape: Any) -> Any:
        return shape


def unet(upsample: str = "transposed", shape: Shape = (1, 24, 16, 3), norm: bool = True, rate: float = 0.0) -> Any:
    """Two levels down and up; `upsample`: "transposed" or "linear"."""

    def twice(x: Any, filters: int) -> Any:
        for _ in range(2):
            x = L.Conv2D(filters, 3, padding="same")(x)
            x = L.BatchNormalization()(x) if norm else x
            x = L.ReLU()(x)
        return x

    start = x = L.Input(shape[1:])
    skips = []
    for filters in (4, 6):
        x = twice(x, filters)
        skips.append(x)
        x = L.MaxPooling2D(2)(x)
    x = L.Dropout(rate)(twice(x, 8))
    for filters in (6, 4):
        up = L.Conv2DTranspose(filters, 2, strides=2, padding="same")
        x = up(x) if upsample == "transposed" else L.UpSampling2D(2, interpolation="bilinear")(x)
        x = twice(L.Concatenate()([x, skips.pop()]), filters)
    return keras.Model(start, L.Conv2D(2, 1)(x)), shape


def tcn(shape: Shape = (2, 40, 3)) -> Any:
    """Dilated causal convolutions with residuals, and a head."""
    start = x = L.Input(shape[1:])
    x = L.Conv1D(6, 1)(x)
    for rate in (1, 2, 4):
        y = L.Conv1D(6, 3, padding="causal", dilation_rate=rate, activation="relu")(x)
        y = L.SpatialDropout1D(0.0)(L.LayerNormalization()(y))
        x = L.Add()([x, L.Conv1D(6, 3, padding="causal", dilation_rate=rate)(y)])
    return keras.Model(start, [x, L.Dense(2)(L.GlobalMaxPooling1D()(x))]), shape


def two_inputs(shape: Any = ((1, 21, 9, 3), (1, 21, 9, 2))) -> Any:
    """Two images in, a nested model used twice, two results."""
    inner_in = L.Input((None, None, 4))
    inner = keras.Model(inner_in, L.Conv2D(4, 3, padding="same", activation="relu")(inner_in), name="inner")
    a, b = L.Input(shape[0][1:]), L.Input(shape[1][1:])
    x, y = L.Conv2D(4, 3, padding="same")(a), L.Conv2D(4, 5, padding="same")(b)
    x, y = inner(x), inner(y)
    return keras.Model([a, b], [L.Maximum()([x, y]), L.GlobalAveragePooling2D()(x * y)]), list(shape)


def volume(shape: Shape = (1, 12, 8, 6, 2)) -> Any:
    """A 3-D network with group norm."""
    return chain(
        L.Conv3D(4, 3, padding="same"),
        L.GroupNormalization(2),
        L.ReLU(),
        L.MaxPooling3D(2),
        L.Conv3D(4, 3, padding="same"),
        L.UpSampling3D(2),
        L.Conv3D(2, 1),
        shape=shape,
    )


def subclassed(shape: Shape = (1, 20, 9, 4)) -> Any:
    """See `Subclassed`."""
    model = Subclassed()
    model(np.zeros(shape, "float32"))
    return model, shape


def vision_transformer(shape: Shape = (1, 16, 12, 3)) -> Any:
    """Patches, attention over tokens, and back to a map."""

    def build(x: Any) -> Any:
        x = L.Conv2D(8, 2, strides=2)(x)
        rows, columns = x.shape[1], x.shape[2]
        x = L.Reshape((rows * columns, 8))(x)
        y = L.LayerNormalization()(x)
        x = x + L.MultiHeadAttention(2, 4)(y, y)
        x = x + L.Dense(8)(L.Dense(16, activation="gelu")(L.LayerNormalization()(x)))
        return L.Conv2D(2, 3, padding="same")(L.Reshape((rows, columns, 8))(x))

    return functional(build, shape)


def words(shape: Shape = (2, 20)) -> Any:
    """Numbers of words in, embedded; a shared convolution; a constant for each place."""
    places = np.random.default_rng(0).standard_normal((1, 20, 6)).astype("float32")
    start = L.Input(shape[1:])
    x = L.Embedding(11, 6)(ops.cast(ops.clip(start * 3 + 5, 0, 10), "int32")) + places
    shared = L.Conv1D(6, 3, padding="same")
    return keras.Model(start, [x, shared(ops.relu(shared(x)))]), shape


MODELS: dict[str, Callable[[], tuple[keras.Model, Any]]] = {
    "u-net": unet,
    "u-net, linear": lambda: unet("linear"),
    "tcn": tcn,
    "two inputs": two_inputs,
    "3-d": volume,
    "subclassed": subclassed,
    "vision transformer": vision_transformer,
    "foreign layer": lambda: chain(L.Conv2D(4, 3, padding="same"), Foreign(), L.Conv2D(4, 3, padding="same")),
    "recurrent": lambda: chain(L.Conv1D(4, 3, padding="same"), L.LSTM(3, return_sequences=True), shape=SERIES),
    "state": lambda: chain(L.Conv2D(4, 3, padding="same"), Running(), L.Conv2D(2, 3), shape=(1, 20, 9, 4)),
    "words": words,
    "sequential": lambda: chain(
        keras.Sequential([L.Conv2D(4, 3), keras.Sequential([L.ReLU(), L.Flatten(), L.Dense(3)])])
    ),
}


def shaken(model: keras.Model, seed: int = 1) -> keras.Model:
    """Weights and statistics that are not what layers start with."""
    rng = np.random.default_rng(seed)
    for w in model.weights:
        if "seed" in w.path or not str(w.dtype).startswith("float"):
            continue
        if any(part in w.path for part in ("gamma", "variance", "scale")):
            w.assign(rng.uniform(0.5, 1.5, w.shape))
        elif any(part in w.path for part in ("beta", "bias", "mean")):
            w.assign(rng.normal(0.0, 0.2, w.shape))
    return model


def net(width: int = 4, pooled: bool = True) -> keras.Model:
    """A network with a skip connection and batch statistics."""
    inputs = keras.Input((None, None, 3))
    x = skip = L.Conv2D(width, 3, padding="same", activation="relu")(inputs)
    x = (L.MaxPooling2D(2) if pooled else L.Conv2D(width, 2, strides=2))(L.BatchNormalization()(x))
    x = L.Conv2DTranspose(width, 2, strides=2, padding="same")(L.Conv2D(2 * width, 3, padding="same")(x))
    return keras.Model(inputs, L.Conv2D(2, 1)(L.Concatenate()([x, skip])), name="net")


def images(count: int = 1, rows: int = 24, seed: int = 0) -> Any:
    """Seeded images."""
    return np.random.default_rng(seed).standard_normal((count, rows, 16, 3)).astype("float32")
