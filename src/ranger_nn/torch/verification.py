"""`verify=True`: a plan of the same kind against the untouched network, on a small input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ranger_nn.errors import VerificationError

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def verify_small(regional: Any, leaves: list[Any], spec: Any, limit: int = 96) -> None:
    """Compare outputs on random inputs shrunk to `limit` along long dimensions; raise VerificationError."""
    from ranger_nn.torch.module import Regional

    small = [
        torch.rand([min(n, limit) if d >= 2 else n for d, n in enumerate(x.shape)], dtype=x.dtype, device=x.device)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in leaves
    ]
    args, kwargs = pytree.tree_unflatten(small, spec)
    model: nn.Module = regional.module
    state = torch.get_rng_state()
    was = model.training
    try:
        model.eval()
        with torch.no_grad():
            want = model(*args, **kwargs)
            twin = Regional(model, regional._options.without_budget(), False)
            got = twin(*args, **kwargs)
    except Exception as error:
        raise VerificationError(f"could not verify on inputs shrunk to {limit}: {error}") from error
    finally:
        regional.train(was)
        torch.set_rng_state(state)
    for a, b in zip(pytree.tree_leaves(want), pytree.tree_leaves(got), strict=True):
        if not isinstance(a, Tensor) or not a.is_floating_point():
            continue
        difference = float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
        if difference > TOLERANCE.get(a.dtype, 0.05):
            raise VerificationError(
                f"{type(model).__name__}: the regional result differs from the untouched network by {difference:.2e} of "
                f"its largest value (allowed {TOLERANCE.get(a.dtype, 0.05):.0e}): please report this model"
            )
