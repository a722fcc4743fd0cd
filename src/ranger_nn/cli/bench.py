"""`ranger-nn bench`: the untouched model against the regional one, in the same process.

Peak: bytes over what was live before, less the final output. Time: the median of runs that take
turns, after one run of each; never taken while bytes are counted. Difference: the largest, relative
to the largest magnitude of the untouched model's values. An untouched model that does not fit the
machine is reported as such, and the regional one is run alone. With --train also why gradients differ
and which side is nearer to float64 (`cli/rounding.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ranger_nn
from ranger_nn.cli.arguments import add_train, new_parser, positive
from ranger_nn.cli.loading import import_torch, leaves, load_inputs, load_model, threads
from ranger_nn.cli.rounding import as_lines, explain, gradients_of, relative
from ranger_nn.planning.budget import format_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

    Work = Callable[[], tuple[Tensor, ...]]


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "bench",
        "compare peak, time and numbers with the untouched model",
        "A model with dropout in training mode draws its own masks, so its difference says nothing.",
        bench,
    )
    add_train(parser)
    parser.add_argument("--repeat", type=positive, default=3, metavar="N", help="timed runs of each (default: 3)")


def bench(chosen: argparse.Namespace) -> None:
    """Measure both sides and print them beside each other."""
    torch = import_torch()
    with threads(chosen), torch.set_grad_enabled(chosen.train):
        model = load_model(chosen, training=chosen.train)
        inputs = load_inputs(chosen, model)
        small = ranger_nn.regionalize(model, memory=chosen.memory, regions=chosen.regions, schedule=chosen.schedule)
        start = time.perf_counter()
        plan = small.plan_for(*inputs)
        planning = time.perf_counter() - start
        sides = {name: _work(net, inputs, chosen.train) for name, net in (("untouched", model), ("regional", small))}
        result = _compare(sides, model, inputs, chosen)
    result |= {
        "allowed": plan.allowed,
        "projected": plan.projected,
        "extra_macs": plan.extra_macs,
        "planning_seconds": planning,
    }
    print(json.dumps(result) if chosen.json else _as_text(result))


def _work(net: nn.Module, inputs: tuple[Tensor, ...], training: bool) -> Work:
    """One forward, or one forward and backward, that gives all values to compare."""
    given: list[Tensor] = []

    def forward() -> tuple[Tensor, ...]:
        return leaves(net(*inputs))

    def forward_and_backward() -> tuple[Tensor, ...]:
        torch = import_torch()
        net.zero_grad(set_to_none=True)
        outputs = tuple(output for output in leaves(net(*inputs)) if output.requires_grad)
        if not given:  # made once: the outputs' gradients are the caller's, as the outputs are
            given.extend(torch.full_like(output, 1 / output.numel()) for output in outputs)
        torch.autograd.backward(outputs, given)
        return tuple(output.detach() for output in outputs)

    return forward_and_backward if training else forward


def _compare(
    sides: dict[str, Work], model: nn.Module, inputs: tuple[Tensor, ...], chosen: argparse.Namespace
) -> dict[str, Any]:
    """Values first (they warm up both sides), then peaks, then times; at last why gradients differ."""
    expected = _values_if_they_fit(sides["untouched"], model)
    gradients = {"untouched": gradients_of(model)}
    given = _values(sides["regional"], model)
    gradients["regional"] = gradients_of(model)
    result: dict[str, Any] = {"largest_difference": _difference(expected, given)}
    fitting = sides if expected is not None else {"regional": sides["regional"]}
    del expected, given
    for name, work in fitting.items():
        result[f"{name}_peak"] = _peak(work, model, chosen.device)
    for name, seconds in _times(fitting, chosen.repeat, chosen.device).items():
        result[f"{name}_seconds"] = seconds
    if chosen.train and len(fitting) > 1:
        result |= explain(model, inputs, lambda net, given: _work(net, given, True)(), gradients, result)
    return result


def _values(work: Work, model: nn.Module) -> list[Tensor]:
    """Outputs, and gradients of parameters if there are any."""
    return [*work(), *(p.grad for p in model.parameters() if p.grad is not None)]


def _values_if_they_fit(work: Work, model: nn.Module) -> list[Tensor] | None:
    """The values, or None if the machine's memory does not suffice for them."""
    torch = import_torch()
    try:
        return _values(work, model)
    except (MemoryError, torch.OutOfMemoryError):
        return None
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        return None


def _difference(expected: list[Tensor] | None, given: list[Tensor]) -> float | None:
    if expected is None:
        return None
    return max((relative(a, b) for a, b in zip(expected, given, strict=True) if a.numel()), default=0.0)


def _peak(work: Work, model: nn.Module, device: str) -> int:
    model.zero_grad(set_to_none=True)  # the last run's gradients would be freed while we count
    with ranger_nn.measure(device.partition(":")[0]) as used:
        used.leave_out(*work())
    return used.peak


def _times(sides: dict[str, Work], repeat: int, device: str) -> dict[str, float]:
    """Median seconds of each side; they take turns, so that drift of the machine hits both alike."""
    torch = import_torch()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeat):
        for name, work in sides.items():
            start = time.perf_counter()
            work()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _as_text(result: dict[str, Any]) -> str:
    rows = [
        ("", "untouched", "regional", "ratio"),
        ("peak", *_row(result, "peak", "does not fit", format_bytes)),
        ("time", *_row(result, "seconds", "-", "{:.3f} s".format)),
    ]
    table = [f"{name:<6}{untouched:>14}{regional:>14}{ratio:>9}" for name, untouched, regional, ratio in rows]
    difference, allowed = result["largest_difference"], result["allowed"]
    apart = "-" if difference is None else f"{difference:.1e} of the largest magnitude"
    return "\n".join(
        [
            *table,
            f"difference        {apart}",
            *as_lines(result),
            f"extra macs        {100 * result['extra_macs']:.1f} %",
            f"allowed           {'-' if allowed is None else format_bytes(allowed)}",
            f"projected         {format_bytes(result['projected'])}",
            f"measured          {format_bytes(result['regional_peak'])}",
            f"capture and plan  {result['planning_seconds']:.2f} s",
        ]
    )


def _row(result: dict[str, Any], kind: str, absent: str, form: Callable[[Any], str]) -> tuple[str, str, str]:
    untouched, regional = result.get(f"untouched_{kind}"), result[f"regional_{kind}"]
    if not untouched:
        return absent if untouched is None else form(untouched), form(regional), "-"
    return form(untouched), form(regional), f"{regional / untouched:.3f}"
