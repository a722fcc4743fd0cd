"""One module with a set of parameters for each region, held as stacked tensors (regions, ...)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ranger_nn.errors import PartitionError


class Stacked(nn.Module):
    """`regions` independent copies of `module`, applied to stacked regions in one call.

    Parameters and buffers have the names of the module's own (dots become "/") and a leading axis of regions. Copies
    are initialised one by one with `reset_parameters`. Modules with buffers or recurrent layers run in a loop: vmap
    does not update buffers and does not take fused recurrent operators. Under autocast a copy runs in its type throughout.
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

        def one(state: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.module, state, (x,))

        return vmap(one, in_dims=(0, 0), randomness="different")(state, stacked)


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
