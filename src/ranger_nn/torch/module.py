"""`regionalize`: an `nn.Module` that runs another one region by region, with the very same parameters.

The wrapper shares the untouched module's parameters, buffers and children (the same dictionaries), so that
`state_dict`, `to`, optimisers and checkpoints see no difference. Plans are made per input shape, dtype, device and
mode, and cached. Enter at `regionalize` and `plan`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ranger_nn.errors import InputError
from ranger_nn.execute.machine import Step, bind, run
from ranger_nn.planning.budget import parse_memory
from ranger_nn.planning.report import Plan
from ranger_nn.planning.search import Options, Planned, make_plan
from ranger_nn.torch.capture import Captured, capture
from ranger_nn.torch.engine import TorchEngine
from ranger_nn.torch.verification import verify_small

Memory = int | str | None


@dataclass
class Ready:
    """A plan made ready to run: closures for forward and backward."""

    captured: Captured
    planned: Planned
    engine: TorchEngine
    forward: list[Step]
    backward: list[Step] | None
    autocast: torch.dtype | None = None


def regionalize(
    model: nn.Module,
    memory: Memory = None,
    *,
    regions: Sequence[int] | None = None,
    schedule: str | None = None,
    verify: bool = False,
) -> Regional:
    """A module that computes what `model` computes, region by region, inside `memory`.

    Args:
        model: any module that `torch.export` can capture. Its parameters are shared, not copied.
        memory: bytes, or "512MB" / "2GiB": allowed peak of activations, carried rows, materialised values, operator
            workspace and (training) gradients; parameters, the caller's input and the final output do not count.
            None: the fastest plan, which says what it needs.
        regions: size of a region in input elements along the cut axes, such as (rows, columns); overrides the planner.
        schedule: "tile" (independent regions, halo recomputed) or "slide" (rows kept, nothing recomputed: along the axis
            of which `regions` have not all, else along the first or, if it is twice as long, another).
        verify: check the first plan of each kind against the untouched network on a small input.

    Raises:
        BudgetError: `memory` is not a positive amount, or nothing fits: it names the least that does.
        CaptureError: `torch.export` cannot capture the model; it names the line.
        InputError: wrong rank or dtype, or the model writes into its input.
        VerificationError: `verify` found a difference.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"regionalize takes a torch.nn.Module, got {type(model).__name__}")
    options = Options.checked(parse_memory(memory), regions, schedule)
    return Regional(model, options, verify)


def plan(
    model: nn.Module,
    x: Any,
    memory: Memory = None,
    *,
    regions: Sequence[int] | None = None,
    schedule: str | None = None,
    training: bool = False,
) -> Plan:
    """The plan for `model` on `x` (a tensor, a tuple of tensors, meta tensors, or a shape); nothing is run.

    `training`: plan forward and backward together.
    """
    options = Options.checked(parse_memory(memory), regions, schedule)
    args = example_inputs(model, x)
    captured = capture(model, args, grad=training)
    return make_plan(captured.graph, options, training).plan


def example_inputs(model: nn.Module, x: Any) -> tuple[Any, ...]:
    """Fake tensors on the model's device for a tensor, a tuple of them, or a shape."""
    from torch._subclasses import FakeTensorMode

    tensors = x if isinstance(x, tuple) and not all(isinstance(n, int) for n in x) else (x,)
    state = next((p for p in model.parameters()), None)
    device = state.device if state is not None else torch.device("cpu")
    default = state.dtype if state is not None and state.dtype.is_floating_point else torch.float32
    with FakeTensorMode(allow_non_fake_inputs=True):
        return tuple(
            torch.empty(tuple(t.shape), dtype=t.dtype, device=device if t.is_meta else t.device)
            if isinstance(t, Tensor)
            else torch.empty(tuple(t), dtype=default, device=device)
            for t in tensors
        )


class _Run(torch.autograd.Function):
    """One call of a training program: backward runs the backward program."""

    @staticmethod
    def forward(ctx: Any, regional: Regional, ready: Ready, count: int, *tensors: Tensor) -> Any:
        ctx.rng = torch.get_rng_state() if any(n.random for n in ready.captured.graph.nodes) else None
        slots = regional._execute(ready, tensors)
        ctx.regional, ctx.ready, ctx.count = regional, ready, count
        ctx.save_for_backward(*tensors)
        ctx.kept = slots
        outputs = ready.captured.graph.outputs
        results = tuple(_plain(ready, v, slots[ready.planned.forward.results[v]]) for v in outputs)
        values = ready.captured.graph.values
        ctx.mark_non_differentiable(*[r for v, r in zip(outputs, results, strict=True) if not values[v].differentiable])
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ready: Ready = ctx.ready
        tensors = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        if kept is None:  # backward a second time: the same random numbers again
            with torch.random.fork_rng(devices=[], enabled=ctx.rng is not None):
                if ctx.rng is not None:
                    torch.set_rng_state(ctx.rng)
                kept = ctx.regional._execute(ready, tensors)
        found = ctx.regional._pull_back(ready, tensors, kept, grads)
        return (None, None, None, *found)


class Regional(nn.Module):
    """`model`, region by region. `on_region(done, total)`, if set, is called after every region step."""

    def __init__(self, model: nn.Module, options: Options, verify: bool) -> None:
        """Use `regionalize`."""
        super().__init__()
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = model.__dict__[name]
        self.training = model.training
        self.__dict__["_holder"] = (model,)
        self._options = options
        self._verify = verify
        self._ready: dict[Any, Ready] = {}
        self._lock = threading.Lock()
        self.on_region: Callable[[int, int], None] | None = None

    @property
    def module(self) -> nn.Module:
        """The untouched module."""
        return self.__dict__["_holder"][0]

    def train(self, mode: bool = True) -> Regional:
        """As `nn.Module.train`, for the untouched module too."""
        super().train(mode)
        self.module.train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Regional:
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Plans hold closures: they are made again after copying or unpickling."""
        state = dict(self.__dict__)
        state.update(_ready={}, _lock=None, on_region=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Share the untouched module's dictionaries again."""
        super().__setstate__(state)
        self._lock = threading.Lock()
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = self.module.__dict__[name]

    def plan_for(self, *args: Any, **kwargs: Any) -> Plan:
        """The plan used for these inputs in the present mode."""
        return self._prepare(args, kwargs)[0].planned.plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the untouched module."""
        ready, inputs = self._prepare(args, kwargs)
        tensors = self._gather(ready, inputs)
        if ready.backward is None:
            slots = self._execute(ready, tensors)
            found = {
                v: _plain(ready, v, slots[ready.planned.forward.results[v]])
                for v in ready.captured.graph.outputs
                if v in ready.planned.forward.results
            }
            by_value = {v: found.get(v) for v in ready.captured.graph.outputs}
        else:
            outs = _Run.apply(self, ready, len(tensors), *tensors)
            by_value = dict(zip(ready.captured.graph.outputs, outs, strict=True))
        external = dict(zip(ready.captured.sources, tensors, strict=True))
        return ready.captured.rebuild(
            [external[v] if v in external else by_value[v] for v in ready.captured.output_values]
        )

    # ---- preparation --------------------------------------------------------------------------------------

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Ready, list[Any]]:
        self.module.training = self.training
        leaves, spec = pytree.tree_flatten((args, kwargs))
        for leaf in leaves:
            if isinstance(leaf, Tensor) and (leaf.layout != torch.strided):
                raise InputError(f"inputs must be dense (strided) tensors, got layout {leaf.layout}")
        grad = torch.is_grad_enabled() and (
            any(isinstance(x, Tensor) and x.requires_grad for x in leaves)
            or any(p.requires_grad for p in self.parameters())
        )
        device = next((x.device for x in leaves if isinstance(x, Tensor)), torch.device("cpu"))
        amp = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        key = (
            spec,
            tuple(_leaf_key(x, grad) for x in leaves),
            grad,
            amp,
            tuple(m.training for m in self.modules()),
            tuple(p.requires_grad for p in self.parameters()) if grad else (),
            tuple((p.dtype, p.device) for p in self.parameters()),
        )
        ready = self._ready.get(key)
        if ready is None or not ready.captured.holds(self.module):
            with self._lock:
                ready = self._ready.get(key)
                if ready is None or not ready.captured.holds(self.module):
                    ready = self._make(leaves, spec, grad, device, amp)
                    self._ready[key] = ready
        return ready, leaves

    def _make(
        self, leaves: list[Any], spec: Any, grad: bool, device: torch.device, autocast: torch.dtype | None
    ) -> Ready:
        _check_inputs(self.module, leaves)
        fake = [_fake(x, grad) for x in leaves]
        args, kwargs = pytree.tree_unflatten(fake, spec)
        captured = capture(self.module, args, kwargs, grad=grad)
        planned = make_plan(captured.graph, self._options, grad)
        engine = TorchEngine(planned.graph, device)
        backward = bind(planned.backward.instructions, engine) if planned.backward is not None else None
        ready = Ready(captured, planned, engine, bind(planned.forward.instructions, engine), backward, autocast)
        if self._verify:
            verify_small(self, leaves, spec)
        return ready

    def _gather(self, ready: Ready, inputs: list[Any]) -> list[Tensor]:
        tensors = []
        for kind, where in ready.captured.sources.values():
            if kind == "input":
                tensors.append(inputs[where])
            elif kind == "state":
                owner, _, name = where.rpartition(".")
                tensors.append(getattr(self.module.get_submodule(owner), name))
            else:
                tensors.append(where.to(ready.engine.device) if where.device != ready.engine.device else where)
        return tensors

    # ---- running ------------------------------------------------------------------------------------------

    def _progress(self, total: int) -> Callable[[int], None] | None:
        report = self.on_region
        return None if report is None else (lambda region: report(region + 1, total))

    def _execute(self, ready: Ready, tensors: Sequence[Tensor]) -> list[Any]:
        program = ready.planned.forward
        slots: list[Any] = [None] * program.slots
        for (v, slot), tensor in zip(program.external.items(), tensors, strict=True):
            slots[slot] = tensor.detach()
            del v
        with torch.no_grad():
            run(ready.forward, slots, ready.engine, self._progress(program.regions))
        return slots

    def _pull_back(
        self, ready: Ready, tensors: Sequence[Tensor], kept: list[Any], grads: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        program = ready.planned.backward
        assert program is not None and ready.backward is not None
        graph = ready.captured.graph
        slots = kept  # the very list: a slot that is freed must not live on in a copy
        slots.extend([None] * (program.slots - len(kept)))
        for slot, tensor in zip(program.external.values(), tensors, strict=True):
            slots[slot] = tensor.detach()
        for v, grad in zip(graph.outputs, grads, strict=True):
            if v in program.grads:
                value = graph.values[v]
                like = getattr(torch, value.dtype)
                slots[program.grads[v]] = (
                    grad if grad is not None else torch.zeros(value.shape, dtype=like, device=ready.engine.device)
                )
        amp = ready.autocast
        with torch.no_grad(), torch.autocast(ready.engine.device.type, dtype=amp, enabled=amp is not None):
            run(ready.backward, slots, ready.engine)
        found = [program.results.get(v) for v in ready.captured.sources]
        return [None if s is None else slots[s] for s in found]


def _plain(ready: Ready, v: int, result: Tensor) -> Tensor:
    """An output in plain strides, as the untouched network gives it, where it was held channels-last."""
    return result.contiguous() if ready.captured.graph.values[v].layout else result


def _leaf_key(x: Any, grad: bool) -> Any:
    if isinstance(x, Tensor):
        return tuple(x.shape), x.dtype, x.device, grad and x.requires_grad
    return x


def _fake(x: Any, grad: bool) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, requires_grad=grad and x.requires_grad)


def _check_inputs(model: nn.Module, leaves: list[Any]) -> None:
    if not any(isinstance(x, Tensor) for x in leaves):
        raise InputError(f"{type(model).__name__} was called without a tensor: regions are cut from input tensors")
