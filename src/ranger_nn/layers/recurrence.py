"""What the linear recurrent layers check and begin with, whatever the framework."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ranger_nn.errors import InputError, PartitionError
from ranger_nn.layers.scan import differ


def check_units(layer: str, units: int, features: int | None = None) -> None:
    """Refuse widths that are not positive.

    Raises:
        PartitionError: units or features below 1.
    """
    for name, value in (("units", units), ("features", features)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise PartitionError(f"{name} of {layer} is a positive integer; got {value!r}")


def check_sequence(
    layer: str, x: Sequence[Any], features: int, state: Sequence[Any], given: Sequence[Any] | None, mask: Any = None
) -> None:
    """Refuse shapes that do not fit; sizes that are not known (None) are not looked at.

    Args:
        layer: name for the message.
        x: (batch, time, features) as it came.
        features: as the layer was made.
        state: (batch, ...) as it must be.
        given: shape of the state that came, if any.
        mask: shape of the mask that came, if any.

    Raises:
        InputError: another rank or width, no step, a state or a mask of another shape.
    """
    if len(x) != 3 or x[2] != features:
        raise InputError(f"{layer} takes (batch, time, features={features}); got shape {tuple(x)}")
    if x[1] is not None and x[1] < 1:
        raise InputError(f"{layer} needs at least one step; got shape {tuple(x)}, time is axis 1")
    if given is not None and differ(given, state):
        raise InputError(
            f"the state of {layer} has shape {tuple(state)} for this input, as return_state=True gives it; got {tuple(given)}"
        )
    if mask is not None and differ(mask, x[:2]):
        raise InputError(f"the mask of {layer} is (batch, time) = {tuple(x[:2])}; got {tuple(mask)}")


def ring(rng: Any, units: int, least: float, most: float, phase: float) -> tuple[Any, Any, Any]:
    """(nu, theta, gamma), each the logarithm of what it says, of eigenvalues uniform on a ring of the complex plane.

    lambda = exp(-exp(nu) + i exp(theta)) with least <= |lambda| <= most and angles up to `phase`; gamma = sqrt(1 - |lambda|^2)
    keeps the state at the size of its input (Orvieto et al. 2023, lemma 3.2 and section 3.4).

    Args:
        rng: `numpy.random.Generator`.
        units: eigenvalues.
        least, most: of |lambda|.
        phase: largest angle.

    Raises:
        PartitionError: not 0 <= least < most <= 1, or a phase that is not positive.
    """
    if not 0 <= least < most <= 1 or phase <= 0:
        raise PartitionError(
            f"eigenvalues lie on a ring 0 <= r_min < r_max <= 1 with max_phase > 0; got r_min={least}, r_max={most}, "
            f"max_phase={phase}"
        )
    square = np.clip(rng.random(units) * (most**2 - least**2) + least**2, 1e-8, 1 - 1e-6)
    angle = np.maximum(rng.random(units) * phase, 1e-6)
    return np.log(-0.5 * np.log(square)), np.log(angle), np.log(np.sqrt(1 - square))
