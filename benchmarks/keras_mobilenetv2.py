"""MobileNetV2 (no top) of keras.applications, one large image: `predict`, untouched against region by region.

    python -m benchmarks.keras_mobilenetv2 --backend jax         (tensorflow, torch)

The first call is that of 64 regions, compared with the untouched model's.
"""

from __future__ import annotations

from typing import Any

from benchmarks import keras_common as common

LIMITS = {
    "jax": common.Limits(1 / 8, 3.0, 1.25),
    "torch": common.Limits(1 / 8, 3.0, 1.25),
    "tensorflow": common.Limits(1 / 6, 3.0, 1.25),
}


def build(chosen: Any) -> tuple[Any, Any, Any]:
    """(untouched, regional, image)."""
    import keras
    import numpy as np

    import ranger_nn

    keras.utils.set_random_seed(0)
    model = keras.applications.MobileNetV2(input_shape=(None, None, 3), weights=None, include_top=False)
    x = np.random.default_rng(0).standard_normal((1, chosen.size, chosen.size, 3), dtype="float32")
    given = {"memory": chosen.memory} if chosen.memory else {"regions": (max(16, chosen.size // 128),)}
    return model, ranger_nn.regionalize(model, **given), x


def analysed(model: Any, x: Any) -> int:
    """Temporary bytes of the compiled program, by XLA's own analysis (JAX)."""
    import jax

    trainable = [v.value for v in model.trainable_variables]
    rest = [v.value for v in model.non_trainable_variables]
    run = jax.jit(lambda t, r, x: model.stateless_call(t, r, x, training=False)[0])
    return int(run.lower(trainable, rest, x).compile().memory_analysis().temp_size_in_bytes)


def part(chosen: Any) -> None:
    """What one process does."""
    import numpy as np

    model, regional, x = build(chosen)
    image = common.held(x)
    works = {
        "untouched": lambda: model.predict(*image, verbose=0),
        "regional": lambda: regional.predict(*image, verbose=0),
    }
    if chosen.side == "both":
        found = common.interleaved(works, chosen.repeats)
        y, z = works["untouched"](), works["regional"]()
        common.give(apart=float(np.abs(y - z).max() / np.abs(y).max()), **found)
        return
    side = model if chosen.side == "untouched" else regional
    small = common.held(x[:, :96, :96])
    peak = (
        analysed(side, x)
        if chosen.backend == "jax"
        else common.measured(lambda: side.predict(*small, verbose=0), works[chosen.side])
    )
    common.give(peak=peak, plan=str(regional.plan_for(x)) if chosen.side == "regional" else "")


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    chosen = common.options(arguments, 2048)
    if chosen.side:
        part(chosen)
        return
    module = "benchmarks.keras_mobilenetv2"
    plain, ours, both = (common.child(module, chosen, side) for side in ("untouched", "regional", "both"))
    common.table("MobileNetV2 predict", chosen, plain, ours, both, LIMITS[chosen.backend])


if __name__ == "__main__":
    main()
