"""`regionalize`: an `nn.Module` that runs another one region by region, with the very same parameters.

The wrapper shares the untouched module's parameters, buffers and children (the same dictionaries), so that
`state_dict`, `to`, optimisers and checkpoints see no difference. Plans are made per input shape, dtype, device, mode and
state of the module (`torch/identity.py`), and the last ones used are kept. Enter at `regionalize` and `plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils import _pytree as pytree

from ranger_nn.errors import InputError
from ranger_nn.execute.machine import bind
from ranger_nn.planning.budget import parse_memory
from ranger_nn.planning.report import Plan
from ranger_nn.planning.resting import resting
from ranger_nn.planning.search import Options, make_plan
from ranger_nn.torch.capture import capture
from ranger_nn.torch.engine import TorchEngine
from ranger_nn.torch.function import Run
from ranger_nn.torch.identity import Identity, autocast_dtype, settings
from ranger_nn.torch.inputs import (
    check_call,
    check_gradient_hooks,
    check_model,
    example_leaves,
    leaf_key,
    shared,
    stand_in,
    stand_ins,
)
from ranger_nn.torch.ready import Ready
from ranger_nn.torch.recent import Recent
from ranger_nn.torch.untouched import Untouched
from ranger_nn.torch.verification import verify_small

Memory = int | str | None


def regionalize(
    model: nn.Module,
    memory: Memory = None,
    *,
    regions: Sequence[int] | None = None,
    schedule: str | None = None,
    verify: bool = False,
) -> Regional:
    """A module that computes what `model` computes, region by region, inside `memory`.

    The plans used last are kept, 32 of them. `torch.compile` leaves the wrapper's call as it is, a break in its graph;
    `torch.export`, `torch.onnx.export` and `torch.jit.trace` see the untouched module: the same numbers, without regions.

    Args:
        model: any module that `torch.export` can capture. Its parameters are shared, not copied.
        memory: bytes, or "512MB" / "2GiB": allowed peak of activations, carried rows, materialised values, operator
            workspace and (training) gradients; parameters, the caller's input and the final output do not count.
            None: the fastest plan, which says what it needs.
        regions: size of a region in input elements along the cut axes, such as (rows, columns); overrides the planner.
        schedule: "tile" (independent regions, halo recomputed) or "slide" (rows kept, nothing recomputed: along the axis
            of which `regions` have not all, else along the first or, if it is twice as long, another).
        verify: check the first plan of each kind against the untouched network on small inputs: outputs and gradients, by
            slides, tiles and (with `memory`) a tight budget, in several regions of every sweep.

    Raises:
        BudgetError: `memory` is not a positive amount, or nothing fits: it names the least that does.
        CaptureError: `torch.export` cannot capture the model; it names the line.
        GradientError: backward with `create_graph=True`.
        InputError: wrong rank or dtype, a model that hides what it computes (ScriptModule, DistributedDataParallel), or
            one that writes into its input.
        VerificationError: `verify` found a difference.
    """
    check_model(model)
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
    """The plan for `model` on `x` (a tensor, a tuple of tensors, meta tensors, or a shape).

    The model is not run. Where nothing fits but the network as it is, single operators of PyTorch may be, on zeros, to
    count what they take.

    `training`: plan forward and backward together, with the gradient of `x` where it requires one.
    """
    check_model(model)
    options = Options.checked(parse_memory(memory), regions, schedule)
    args = example_inputs(model, x, training)
    captured = capture(model, args, grad=training)
    untouched = Untouched(model, args, {}, training, captured.graph)
    return make_plan(captured.graph, options, training, untouched).plan


def example_inputs(model: nn.Module, x: Any, grad: bool = False) -> tuple[Any, ...]:
    """Fake tensors on the model's device for a tensor, a tuple of them, or a shape."""
    from torch._subclasses import FakeTensorMode

    tensors = example_leaves(model, x)
    state = next((p for p in model.parameters()), None)
    device = state.device if state is not None else torch.device("cpu")
    default = state.dtype if state is not None and state.dtype.is_floating_point else torch.float32
    with FakeTensorMode(allow_non_fake_inputs=True):
        return tuple(
            stand_in(t.to(device) if t.is_meta else t, grad)
            if isinstance(t, Tensor)
            else torch.empty(tuple(map(int, t)), dtype=default, device=device)
            for t in tensors
        )


class Regional(nn.Module):
    """`model`, region by region. `on_region(done, total)`, if set, is called after every region step."""

    NOT_IN_TWINS = ("_ready", "_identity", "_options", "_verify", "on_region")
    """Fields that say how to run, not what: a twin of the wrapper shares them, and no plan depends on them."""

    def __init__(self, model: nn.Module, options: Options, verify: bool) -> None:
        """Use `regionalize`."""
        super().__init__()
        self.__dict__["_holder"] = (model,)
        self._options = options
        self._verify = verify
        self.on_region: Callable[[int, int], None] | None = None
        self._share()

    def _share(self) -> None:
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = self.module.__dict__[name]
        self._ready: Recent[Ready] = Recent()
        self._identity = Identity()

    @property
    def module(self) -> nn.Module:
        """The untouched module."""
        return self.__dict__["_holder"][0]

    @property
    def training(self) -> bool:
        """The untouched module's mode: there is no other."""
        return self.module.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_holder" in self.__dict__:  # not while nn.Module sets up its fields
            self.module.training = mode

    def train(self, mode: bool = True) -> Regional:
        """As `nn.Module.train`, of the untouched module."""
        self.module.train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Regional:
        super()._apply(fn, recurse)
        return self

    def _replicate_for_data_parallel(self) -> Any:
        raise InputError(
            "DataParallel copies modules for each call, and a regional module shares those of the untouched one: use "
            "torch.nn.parallel.DistributedDataParallel."
        )

    def __getstate__(self) -> dict[str, Any]:
        """Plans hold closures: they are made again after copying or unpickling."""
        state = dict(self.__dict__)
        state.update(_ready=None, _identity=None, on_region=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Share the untouched module's dictionaries again."""
        super().__setstate__(state)
        self._share()

    def plan_for(self, *args: Any, **kwargs: Any) -> Plan:
        """The plan used for these inputs in the present mode."""
        return self._prepare(args, kwargs)[0].planned.plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the untouched module."""
        if torch.compiler.is_exporting() or (not torch.compiler.is_compiling() and torch.jit.is_tracing()):
            return self.module(*args, **kwargs)
        if isinstance(args, Proxy):
            raise InputError(
                "torch.fx.symbolic_trace needs named inputs, which a regional module does not have: trace the untouched one "
                "(symbolic_trace(regional.module)), and regionalize the result."
            )
        if any(
            isinstance(x, Proxy) for x in (*args, *kwargs.values())
        ):  # torch.fx knows no module but those of the tree
            return self.module.forward(*args, **kwargs)
        return _by_regions(self, args, kwargs)

    def __prepare_scriptable__(self) -> Any:
        """`torch.jit.script` would put what this gives in the place of the wrapper, in the caller's own model."""
        raise InputError(
            "torch.jit.script compiles the source of forward, and a program of regions has none: script the untouched module "
            "(torch.jit.script(regional.module)), or use torch.jit.trace, which sees it."
        )

    # ---- preparation --------------------------------------------------------------------------------------

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Ready, list[Any]]:
        check_call(self.module, args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        state, trained = self._identity.of(self.module)
        given = any(isinstance(x, Tensor) and x.requires_grad for x in leaves)
        ready = self._planned(leaves, spec, torch.is_grad_enabled() and (given or trained), state)
        if torch.is_grad_enabled() and ready.lacks_gradients:
            ready = self._planned(leaves, spec, True, state)
        return ready, leaves

    def _planned(self, leaves: list[Any], spec: Any, grad: bool, state: int) -> Ready:
        device = next(x.device for x in leaves if isinstance(x, Tensor))
        key = (spec, tuple(leaf_key(x, grad) for x in leaves), shared(leaves), grad, settings(device), state)
        return self._ready.get_or_make(
            key, lambda: self._make(leaves, spec, grad, device), lambda r: r.current and r.captured.holds(self.module)
        )

    @resting()
    def _make(self, leaves: list[Any], spec: Any, grad: bool, device: torch.device) -> Ready:
        if grad:
            check_gradient_hooks(self.module)
        args, kwargs = pytree.tree_unflatten(stand_ins(leaves, grad), spec)
        captured = capture(self.module, args, kwargs, grad=grad)
        untouched = Untouched(self.module, args, kwargs, grad, captured.graph)
        planned = make_plan(captured.graph, self._options, grad, untouched)
        engine = TorchEngine(planned.graph, device, captured.strides)
        backward = bind(planned.backward.instructions, engine) if planned.backward is not None else None
        forward = bind(planned.forward.instructions, engine)
        ready = Ready(captured, planned, engine, forward, backward, autocast_dtype(device))
        if self._verify:
            verify_small(self, leaves, spec, grad)
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


@torch.compiler.disable
def _by_regions(regional: Regional, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of the wrapper. `torch.compile` must not look into it: it would trace every region."""
    ready, inputs = regional._prepare(args, kwargs)
    if ready.planned.untouched:
        result = regional.module(*args, **kwargs)
        if regional.on_region is not None:
            regional.on_region(1, 1)
        return result
    tensors = regional._gather(ready, inputs)
    progress = regional._progress(ready.planned.forward.regions)
    graph, found = ready.captured.graph, ready.planned.forward.results
    if ready.backward is None:
        slots = ready.execute(tensors, progress)
        outputs = {v: ready.output(v, slots) for v in graph.outputs if v in found}
    else:
        outputs = dict(zip(graph.outputs, Run.apply(progress, ready, *tensors), strict=True))
    external = dict(zip(ready.captured.sources, tensors, strict=True))
    return ready.captured.rebuild([external[v] if v in external else outputs[v] for v in ready.captured.output_values])
