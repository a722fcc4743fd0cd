"""A plan made ready to run: closures for forward and backward, and the calls of both. Enter at `Ready`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ranger_nn.execute.guard import guarded
from ranger_nn.execute.machine import Step, run
from ranger_nn.planning.search import Planned
from ranger_nn.torch.capture import Captured
from ranger_nn.torch.engine import TorchEngine
from ranger_nn.torch.layout import in_strides


@dataclass
class Ready:
    """A plan made ready to run: closures for forward and backward; `tried`: which of them have run without a fault."""

    captured: Captured
    planned: Planned
    engine: TorchEngine
    forward: list[Step]
    backward: list[Step] | None
    autocast: torch.dtype | None = None
    tried: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Constants are the caller's own tensors: whether they are trained may change."""
        self.constants = [where for kind, where in self.captured.sources.values() if kind == "constant"]
        self.trained = self._trained()

    def _trained(self) -> list[bool]:
        return [c.requires_grad for c in self.constants]

    @property
    def current(self) -> bool:
        """False where a constant has become trained, or is no longer, since the plan was made."""
        return self.backward is None or self.trained == self._trained()

    @property
    def lacks_gradients(self) -> bool:
        """True where something is trained that no input and no parameter showed."""
        return self.backward is None and any(self._trained())

    def output(self, v: int, slots: list[Any]) -> Tensor:
        """An output in the order of memory that the untouched network gives it, where it was held channels-last."""
        result: Tensor = slots[self.planned.forward.results[v]]
        if not self.captured.graph.values[v].layout:
            return result
        return in_strides(result, self.captured.strides.get(v))

    def run(self, which: str, slots: list[Any], on_region: Callable[[int], None] | None = None) -> None:
        """Run "forward" or "backward" over `slots`; the first time every result is held to its region."""
        steps: list[Step] = getattr(self, which)
        if which not in self.tried:
            program = self.planned.forward if which == "forward" else self.planned.backward
            assert program is not None
            steps = guarded(steps, program.instructions, self.planned.graph, self.engine.form)
        run(steps, slots, self.engine, on_region)
        self.tried.add(which)

    def execute(self, tensors: Sequence[Tensor], on_region: Callable[[int], None] | None) -> list[Any]:
        """Run forward on external values; the slots as they are at the end."""
        program = self.planned.forward
        slots: list[Any] = [None] * program.slots
        for slot, tensor in zip(program.external.values(), tensors, strict=True):
            slots[slot] = tensor.detach()
        with torch.no_grad():
            self.run("forward", slots, on_region)
        return slots

    def pull_back(
        self, tensors: Sequence[Tensor], kept: list[Any], grads: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Gradients of all tensors; `kept`: the slots that `execute` left, which are used up."""
        program = self.planned.backward
        assert program is not None and self.backward is not None
        graph = self.captured.graph
        slots = kept  # the very list: a slot that is freed must not live on in a copy
        slots.extend([None] * (program.slots - len(kept)))
        for slot, tensor in zip(program.external.values(), tensors, strict=True):
            slots[slot] = tensor.detach()
        for v, grad in zip(graph.outputs, grads, strict=True):
            if v in program.grads:
                value = graph.values[v]
                like = getattr(torch, value.dtype)
                slots[program.grads[v]] = (
                    grad if grad is not None else torch.zeros(value.shape, dtype=like, device=self.engine.device)
                )
        amp, device = self.autocast, self.engine.device.type
        cast = torch.autocast(
            device, dtype=amp, enabled=amp is not None, cache_enabled=False
        )  # it would grow by region
        with torch.no_grad(), cast:
            self.run("backward", slots)
        found = [program.results.get(v) for v in self.captured.sources]
        return [None if s is None else slots[s] for s in found]
