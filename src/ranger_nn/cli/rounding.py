"""Why two runs in float32 give gradients that differ, and which of them is nearer to float64.

The gradient of a weight is a sum over all positions at which the weight was used. A region-wise run
adds the same terms in another order, and each order rounds in its own way; neither is the right one.
So the untouched model is run once more in float64, on the same input, and both are held to that.
"""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ranger_nn.cli.loading import import_torch
from ranger_nn.planning.budget import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    Gradients = dict[str, Tensor]

_MOST_SECONDS = 20.0  # of one untouched run; float64 takes two to four times as long
_WIDER = 2  # bytes of float64 against float32
# Farther from float64 than this, a float32 run was not rounded: it drew other masks, or it diverges.
_NOT_ROUNDING = 0.1


def gradients_of(model: nn.Module) -> Gradients:
    """The gradients that a backward left, by the names of their parameters."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative(expected: Tensor, given: Tensor) -> float:
    """The largest difference, relative to the largest magnitude expected."""
    scale = expected.double().abs().max().item() or 1.0
    return float((expected.double() - given.double()).abs().max().item() / scale)


def explain(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    run: Callable[[nn.Module, tuple[Tensor, ...]], object],
    sides: dict[str, Gradients],
    cost: dict[str, Any],
) -> dict[str, Any]:
    """What `bench --train` adds to its result; `run` does a forward and a backward, `cost` is what they were measured to take."""
    untouched, regional = sides["untouched"], sides["regional"]
    apart = {name: relative(untouched[name], regional[name]) for name in untouched if untouched[name].numel()}
    if not any(apart.values()):
        return {"gradient_difference": 0.0}
    worst = max(apart, key=lambda name: apart[name])
    found = {"gradient_difference": apart[worst], "gradient_of": worst, "dtype": _dtype_of(untouched[worst])}
    why_not = _why_not(model, untouched[worst], cost)
    if why_not:
        return found | {"float64_skipped": why_not}
    try:
        terms, exact = _in_float64(model, inputs, run)
    except Exception as error:  # a model may refuse float64 or a copy in many ways; the comparison is a courtesy
        return found | {"float64_skipped": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"}
    distances = {side: max(relative(exact[n], grads[n]) for n in apart) for side, grads in sides.items()}
    found["terms"] = terms.get(worst)
    if max(distances.values()) > _NOT_ROUNDING:
        return found | {
            "float64_skipped": "a float64 run differs by more than rounding; a model that draws random numbers does"
        }
    nearer = min(distances, key=lambda side: distances[side]) if len(set(distances.values())) > 1 else "both alike"
    return found | {"from_float64": distances, "nearer_to_float64": nearer}


def as_lines(result: dict[str, Any]) -> list[str]:
    """The explanation in words."""
    if "gradient_difference" not in result:
        return []
    if not result["gradient_difference"]:
        return ["gradients         equal bit for bit"]
    terms = f"sums over {result['terms']:,} positions each" if result.get("terms") else "sums over all positions"
    lines = [
        f"gradients         differ by {result['gradient_difference']:.1e} at most, in {result['gradient_of']}: {terms},",
        f"                  which {result['dtype']} rounds differently when they are added in another order",
    ]
    if "float64_skipped" in result:
        return [*lines, f"against float64   not run: {result['float64_skipped']}"]
    away = ", ".join(f"{side} {distance:.1e}" for side, distance in result["from_float64"].items())
    return [*lines, f"against float64   {away} away; nearer: {result['nearer_to_float64']}"]


def _why_not(model: nn.Module, gradient: Tensor, cost: dict[str, Any]) -> str:
    """Why no float64 run is made; nothing if it is."""
    if gradient.dtype.itemsize >= 8:
        return "the model is in float64 itself"
    if cost["largest_difference"] > _NOT_ROUNDING:
        return "the two sides differ by more than rounding; a model that draws random numbers does"
    if cost["untouched_seconds"] > _MOST_SECONDS:
        return f"an untouched run takes {cost['untouched_seconds']:.0f} s"
    weights = sum(p.nbytes for p in model.parameters())
    needed = _WIDER * 4 // gradient.dtype.itemsize * (cost["untouched_peak"] + 2 * weights)
    free = _free_bytes(gradient)
    return "" if free is None or needed < free else f"it needs {format_bytes(needed)} of {format_bytes(free)} free"


def _in_float64(model: nn.Module, inputs: tuple[Tensor, ...], run: Any) -> tuple[Counter[str], Gradients]:
    """Per parameter: over how many positions its gradient sums, and the gradient in float64."""
    model.zero_grad(set_to_none=True)  # not to be copied
    exact = copy.deepcopy(model).double()
    terms: Counter[str] = Counter()
    for prefix, module in exact.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            module.register_forward_hook(_counting(terms, name, parameter.shape[0] if parameter.dim() else 1))
    run(exact, tuple(x.double() if x.is_floating_point() else x for x in inputs))
    return terms, gradients_of(exact)


def _counting(terms: Counter[str], name: str, channels: int) -> Callable[..., None]:
    """Positions are the elements of what a module gives, by channel."""

    def count(module: nn.Module, given: Any, output: Any) -> None:
        if isinstance(output, import_torch().Tensor):
            terms[name] += output.numel() // max(channels, 1)

    return count


def _free_bytes(like: Tensor) -> int | None:
    """What the device has free, if it tells."""
    if like.is_cuda:
        return int(import_torch().cuda.mem_get_info(like.device)[0])
    with suppress(OSError, StopIteration, ValueError), open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) << 10
    return None


def _dtype_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
