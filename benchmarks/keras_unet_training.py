"""A U-Net, one `fit` step on one large image: untouched against region by region.

python -m benchmarks.keras_unet_training --backend jax         (tensorflow, torch)
"""

from __future__ import annotations

from typing import Any

from benchmarks import keras_common as common

LIMITS = common.Limits(1 / 5, None, None, 1e-5)
WIDTHS = (32, 64, 128, 256)


def unet(widths: Any = WIDTHS) -> Any:
    """Four levels, two convolutions each, transposed convolutions upwards."""
    import keras
    from keras import layers

    def block(x: Any, width: int) -> Any:
        for _ in range(2):
            x = layers.Conv2D(width, 3, padding="same", activation="relu")(x)
        return x

    inputs = keras.Input((None, None, 3))
    x, skips = inputs, []
    for width in widths[:-1]:
        x = block(x, width)
        skips.append(x)
        x = layers.MaxPooling2D(2)(x)
    x = block(x, widths[-1])
    for width, skip in zip(reversed(widths[:-1]), reversed(skips), strict=True):
        x = layers.Conv2DTranspose(width, 2, strides=2, padding="same")(x)
        x = block(layers.Concatenate()([skip, x]), width)
    return keras.Model(inputs, layers.Conv2D(1, 1)(x), name="unet")


def build(chosen: Any) -> tuple[Any, Any, Any, Any]:
    """(untouched, regional, image, target); weights are equal, not shared: both are trained."""
    import keras
    import numpy as np

    import ranger_nn

    keras.utils.set_random_seed(0)
    model, twin = unet(), unet()
    twin.set_weights(model.get_weights())
    source = np.random.default_rng(0)
    x = source.standard_normal((1, chosen.size, chosen.size, 3), dtype="float32")
    y = source.standard_normal((1, chosen.size, chosen.size, 1), dtype="float32")
    allowed = chosen.memory or _allowed(twin, x.shape)
    regional = ranger_nn.regionalize(twin, memory=allowed)
    for side in (model, regional):
        side.compile(keras.optimizers.SGD(0.01), "mse")
    return model, regional, x, y


def _allowed(model: Any, shape: Any) -> int:
    """The target's share of what the untouched model is estimated to need, or the least that a plan needs. TensorFlow
    needs memory for the traced graph as well, and keeps what it freed: half of that.
    """
    import keras

    import ranger_nn

    share = 0.09 if keras.backend.backend() == "tensorflow" else 0.185
    allowed = int(share * ranger_nn.plan(model, shape, training=True).untouched)
    try:
        ranger_nn.plan(model, shape, allowed, training=True)
    except ranger_nn.BudgetError as error:
        return error.least or allowed
    return allowed


def analysed(model: Any, x: Any, y: Any) -> int:
    """Temporary bytes of the compiled training step, by XLA's own analysis (JAX)."""
    import jax
    import jax.numpy as jnp

    trainable = [v.value for v in model.trainable_variables]
    rest = [v.value for v in model.non_trainable_variables]

    def loss(t: Any, r: Any, x: Any, y: Any) -> Any:
        return jnp.mean((model.stateless_call(t, r, x, training=True)[0] - y) ** 2)

    step = jax.jit(jax.value_and_grad(loss))
    return int(step.lower(trainable, rest, x, y).compile().memory_analysis().temp_size_in_bytes)


def part(chosen: Any) -> None:
    """What one process does."""
    import numpy as np

    model, regional, x, y = build(chosen)
    data = common.held(x, y)
    works = {
        "untouched": lambda: model.fit(*data, verbose=0),
        "regional": lambda: regional.fit(*data, verbose=0),
    }
    if chosen.side == "both":
        found = common.interleaved(works, chosen.repeats)
        pairs = zip(model.get_weights(), regional.get_weights(), strict=True)
        apart = max(float(np.abs(a - b).max()) for a, b in pairs)
        common.give(apart=apart, **found)
        return
    side = model if chosen.side == "untouched" else regional
    if chosen.backend == "jax":
        peak = analysed(side, x, y)
    else:
        few = common.held(x[:, :96, :96], y[:, :96, :96])
        peak = common.measured(lambda: side.fit(*few, verbose=0), works[chosen.side])
    common.give(peak=peak, plan=str(regional.plan_for(x, training=True)) if chosen.side == "regional" else "")


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    chosen = common.options(arguments, 1024)
    if chosen.side:
        part(chosen)
        return
    module = "benchmarks.keras_unet_training"
    plain, ours, both = (common.child(module, chosen, side) for side in ("untouched", "regional", "both"))
    common.table("U-Net fit step", chosen, plain, ours, both, LIMITS)


if __name__ == "__main__":
    main()
