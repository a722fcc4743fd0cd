"""One module with a set of parameters for each region, held as stacked tensors (regions, ...).

    linear and pointwise modules in a row      one torch.baddbmm for each linear module
    recurrent layers, buffers                  a loop over regions
    any other                                  torch.func.vmap

Enter at `Stacked`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ranger_nn.errors import PartitionError

# one number in, one number out, no parameters: the same on stacked regions
POINTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Softplus, nn.Hardtanh, nn.Identity, nn.Dropout,
)  # fmt: skip


class Stacked(nn.Module):
    """`regions` independent copies of `module`, applied to stacked regions in one call.

    Parameters and buffers have the names of the module's own (dots become "/") and a leading axis of regions. Copies
    are initialised one by one with `reset_parameters`. A `Linear`, or a `Sequential` of them and pointwise activations,
    without hooks when this is made, is one matrix product for each `Linear`. Modules with buffers or recurrent layers
    run in a loop: vmap does not update buffers and does not take fused recurrent operators. Under autocast a copy runs in
    its type throughout.
    """

    def __init__(self, module: nn.Module, regions: int) -> None:
        super().__init__()
        copies = [_fresh(module) for _ in range(regions)]
        self._names = [n for n, _ in module.named_parameters()]
        self._buffers_of = [n for n, _ in module.named_buffers()]
        for name in self._names:
            stacked = torch.stack([c.get_parameter(name).detach() for c in copies])
            own = nn.Parameter(stacked, requires_grad=module.get_parameter(name).requires_grad)
            self.register_parameter(name.replace(".", "/"), own)
        for name in self._buffers_of:
            self.register_buffer(name.replace(".", "/"), torch.stack([c.get_buffer(name) for c in copies]))
        # not a submodule: its own parameters only give names and shapes
        self._template = (module,)
        self.regions = regions
        self._row = _row(module, self._names)
        self.batched = not self._buffers_of and not any(isinstance(m, nn.RNNBase) for m in module.modules())

    def check_batched(self, layer: str) -> None:
        """Refuse a module that `layer` could only run in a loop.

        Raises:
            PartitionError: it has buffers or recurrent layers.
        """
        if not self.batched:
            found = f"buffers ({', '.join(self._buffers_of)})" if self._buffers_of else "recurrent layers"
            raise PartitionError(
                f"{layer} runs all regions in one call, and its local network has {found}, which vmap does not take: "
                "leave them out (LayerNorm in place of BatchNorm), or use RegionalAggregator, which runs it in a loop"
            )

    @property
    def module(self) -> nn.Module:
        """The module that is applied."""
        return self._template[0]

    def _state(self, pick: Any) -> dict[str, Tensor]:
        every = {n: getattr(self, n.replace(".", "/")) for n in (*self._names, *self._buffers_of)}
        if pick is None:
            return every
        if isinstance(pick, Tensor):
            return {n: t.index_select(0, pick) for n, t in every.items()}
        return {n: t[pick] for n, t in every.items()}

    def forward(self, ids: list[int] | Tensor | None, stacked: Tensor) -> Tensor:
        """Region ids[k]'s copy on stacked[k]: (regions, batch, ...) in and out. None: all regions, in order."""
        if self.training != self.module.training:
            self.module.train(self.training)
        if not self.batched:
            each = range(self.regions) if ids is None else ids
            return torch.stack(
                [_first(functional_call(self.module, self._state(int(i)), (x,))) for i, x in zip(each, stacked)]
            )
        every = ids is None or (not isinstance(ids, Tensor) and len(ids) == self.regions)
        state = self._state(None if every else ids)
        if torch.is_autocast_enabled(stacked.device.type):
            # vmap does not see autocast
            state, stacked = _lowered(state, stacked)
        if self._row is not None and stacked.dim() > 2:
            return _products(self._row, state, stacked)

        def one(state: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.module, state, (x,))

        return vmap(one, in_dims=(0, 0), randomness="different")(state, stacked)


def _row(module: nn.Module, names: list[str], name: str = "") -> list[tuple[str, nn.Module]] | None:
    """Linear and pointwise modules in the order in which they are applied, with their names; None if there are others."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return None
    if type(module) is nn.Linear:
        own = [f"{name}.{n}".lstrip(".") for n in ("weight", "bias") if getattr(module, n) is not None]
        return [(name, module)] if all(n in names for n in own) else None  # shared ones have one name only
    if type(module) in POINTWISE:
        return [(name, module)]
    if type(module) is not nn.Sequential:
        return None
    found: list[tuple[str, nn.Module]] = []
    for part, child in module._modules.items():
        row = None if child is None else _row(child, names, f"{name}.{part}".lstrip("."))
        if row is None:
            return None
        found += row
    return found


def _products(row: list[tuple[str, nn.Module]], state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Modules of `_row` on stacked regions (regions, batch, ..., features), each region with its own parameters."""
    lead = x.shape[:-1]
    y, own = x if x.dim() == 3 else x.flatten(1, -2), False
    for name, module in row:
        if not isinstance(module, nn.Linear):
            y, own = y.relu_() if own and type(module) is nn.ReLU else module(y), False
            continue
        own = True  # no one else has what a product gives
        weight = state[f"{name}.weight".lstrip(".")].mT
        y = torch.bmm(y, weight) if module.bias is None else torch.baddbmm(_bias(name, state), y, weight)
    return y if x.dim() == 3 else y.reshape(*lead, y.shape[-1])


def _bias(name: str, state: dict[str, Tensor]) -> Tensor:
    return state[f"{name}.bias".lstrip(".")].unsqueeze(1)


def _lowered(state: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Both in autocast's type, where they are float32."""
    low = torch.get_autocast_dtype(x.device.type)
    state = {n: t.to(low) if t.dtype == torch.float32 else t for n, t in state.items()}
    return state, x.to(low) if x.dtype == torch.float32 else x


def _first(y: Any) -> Tensor:
    return y[0] if isinstance(y, tuple) else y


def _fresh(module: nn.Module) -> nn.Module:
    """A copy with newly initialised parameters."""
    new = copy.deepcopy(module)
    for name, sub in new.named_modules():
        reset = getattr(sub, "reset_parameters", None)
        if callable(reset):
            reset()
        elif any(True for _ in sub.parameters(recurse=False)):
            raise PartitionError(
                f"per_region=True needs reset_parameters on every module with parameters; {name or 'local'} "
                f"({type(sub).__name__}) has none. Give it one, or give a list of local networks"
            )
    return new
