"""What the exactness tests share: a catalogue entry, seeded inputs, and the comparison itself.

A test takes an `Entry`, builds the untouched model and a regional one from the same weights, and
calls `compare`: outputs, gradients of inputs and gradients of every parameter by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FLOAT64_TOLERANCE = 1e-11
FLOAT32_FORWARD = 1e-5
FLOAT32_GRADIENT = 1e-4

# A gradient that is zero in exact arithmetic (a bias in front of a normalisation) is pure rounding
# noise: it is measured against this share of the largest gradient instead of against itself.
NOISE_SHARE = 1e-2


def leaves(value: Any) -> tuple[Tensor, ...]:
    """All floating-point tensors of nested outputs, in a fixed order."""
    return tuple(_walk(value))


def _walk(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
        return
    if isinstance(value, dict):  # covers the ModelOutput classes of transformers and diffusers
        value = value.values()
    if isinstance(value, (tuple, list, type({}.values()))):
        for part in value:
            yield from _walk(part)


@dataclass(frozen=True)
class Entry:
    """One network of a catalogue.

    Attributes:
        name: what test ids and golden files are called.
        build: makes the module with random weights; called under a fixed seed.
        shapes: the shape of each input, at test size.
        regions: a region size, one number per spatial axis, that divides no input size.
        pick: chooses the tensors to compare from the model's output.
        needs: the package that `build` imports beside torch, or None.
        multiple: input sizes must be a multiple of this, by the model's own rule.
        train: whether the network is put into training mode.
        whole: whether parts of it mix globally and may stay whole.
        heavy: whether a forward and backward takes more than about a second.
    """

    name: str
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    regions: tuple[int, ...]
    pick: Callable[[Any], tuple[Tensor, ...]] = leaves
    needs: str | None = None
    multiple: int = 1
    train: bool = False
    whole: bool = False
    heavy: bool = False

    def make(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        """The model with seeded random weights and statistics; the global random state is kept."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
            randomise(model)
        return model.to(dtype).train(self.train)

    def inputs(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, ...]:
        """Seeded inputs at the test size."""
        return random_inputs(self.shapes, dtype, seed)


def random_inputs(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype = torch.float64, seed: int = 1
) -> tuple[Tensor, ...]:
    """Seeded normal inputs; drawn in float64, so that all dtypes see the same numbers."""
    source = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=source, dtype=torch.float64).to(dtype) for shape in shapes)


def randomise(model: nn.Module) -> None:
    """Move what frameworks initialise to 0 or 1 (norms, biases) away from it, so errors show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0.0, 0.2)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)


def difference(ours: Tensor, reference: Tensor, scale: float = 0.0) -> float:
    """Largest absolute difference over the largest magnitude of the reference (or `scale`)."""
    assert ours.shape == reference.shape, f"shape {ours.shape} for {reference.shape}"
    assert ours.dtype == reference.dtype, f"dtype {ours.dtype} for {reference.dtype}"
    if reference.numel() == 0:
        return 0.0
    ours, reference = ours.detach().double(), reference.detach().double()
    largest = max(reference.abs().max().item(), scale)
    apart = (ours - reference).abs().max().item()
    return apart if largest == 0.0 else apart / largest


@dataclass(frozen=True)
class Gradients:
    """Outputs of one forward, gradients of one backward (None where autograd gave none), buffers."""

    outputs: tuple[Tensor, ...]
    inputs: tuple[Tensor | None, ...]
    parameters: dict[str, Tensor | None]
    buffers: dict[str, Tensor]

    @property
    def largest(self) -> float:
        """Largest magnitude of any gradient."""
        given = [g for g in (*self.inputs, *self.parameters.values()) if g is not None]
        return max((g.abs().max().item() for g in given if g.numel()), default=0.0)


def run(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    pick: Callable[[Any], tuple[Tensor, ...]] = leaves,
    seed: int = 2,
    *,
    of_inputs: bool = True,
) -> Gradients:
    """Forward, then backward through a seeded weighted sum of all picked outputs."""
    model.zero_grad(set_to_none=True)
    given = tuple(x.detach().clone().requires_grad_(of_inputs and x.is_floating_point()) for x in inputs)
    # A copy that is not a leaf, so that networks may write into their input.
    outputs = pick(model(*(x.clone() for x in given)))
    weights = random_inputs(tuple(tuple(y.shape) for y in outputs), torch.float64, seed)
    loss = sum((y.double() * w).sum() for y, w in zip(outputs, weights, strict=True))
    if isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()
    return Gradients(
        outputs=tuple(y.detach().clone() for y in outputs),
        inputs=tuple(x.grad for x in given),
        parameters={name: p.grad for name, p in model.named_parameters()},
        buffers={name: b.detach().clone() for name, b in model.named_buffers()},
    )


def differences(ours: Gradients, reference: Gradients) -> dict[str, float]:
    """Relative difference of each output and gradient, by name; None must match None."""
    assert len(ours.outputs) == len(reference.outputs)
    assert list(ours.parameters) == list(reference.parameters)
    assert list(ours.buffers) == list(reference.buffers)
    found: dict[str, float] = {}
    for i, (a, b) in enumerate(zip(ours.outputs, reference.outputs, strict=True)):
        found[f"output {i}"] = difference(a, b)
    for name, theirs in reference.buffers.items():
        found[f"output buffer {name}"] = difference(ours.buffers[name], theirs)
    pairs = {f"input {i}": p for i, p in enumerate(zip(ours.inputs, reference.inputs, strict=True))}
    pairs |= {k: (ours.parameters[k], reference.parameters[k]) for k in reference.parameters}
    floor = NOISE_SHARE * reference.largest
    for name, (mine, wanted) in pairs.items():
        if wanted is None or mine is None:
            assert mine is wanted, f"gradient of {name}: {mine} where the untouched has {wanted}"
            continue
        found[f"gradient of {name}"] = difference(mine, wanted, floor)
    return found


def check(
    ours: Gradients,
    reference: Gradients,
    forward: float = FLOAT64_TOLERANCE,
    gradient: float | None = None,
) -> None:
    """Assert that every difference is within tolerance; the message lists the worst ones."""
    gradient = forward if gradient is None else gradient
    found = differences(ours, reference)
    limit = {k: forward if k.startswith("output") else gradient for k in found}
    bad = {k: d for k, d in found.items() if not d <= limit[k]}
    worst = sorted(bad.items(), key=lambda item: -item[1])[:8]
    assert not bad, f"{len(bad)} of {len(found)} differ: " + ", ".join(
        f"{k} by {d:.2e} (allowed {limit[k]:.0e})" for k, d in worst
    )


def compare(
    model: nn.Module,
    regional: Callable[[nn.Module], nn.Module],
    inputs: tuple[Tensor, ...],
    pick: Callable[[Any], tuple[Tensor, ...]] = leaves,
    forward: float = FLOAT64_TOLERANCE,
    gradient: float | None = None,
) -> nn.Module:
    """Compare `regional(copy of model)` with the untouched `model`; gives back the regional one."""
    small = regional(copy.deepcopy(model))
    check(run(small, inputs, pick), run(model, inputs, pick), forward, gradient)
    return small
