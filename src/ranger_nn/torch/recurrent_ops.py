"""Recurrent calls while a model is exported: one operator each, whose shapes are known without running its steps.

`torch.export` runs an operator on fake tensors to learn the shapes of its results; PyTorch's LSTM, GRU and RNN are
loops over time there, which takes minutes for long series. `WholeRecurrences` puts operators of the same name and
arguments in their place, for as long as it is entered. Nothing but an export ever calls them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NAMES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_STATES = {"lstm": "Tensor[] hx"}
_LIBRARY = torch.library.Library("ranger_nn", "DEF")


def _shapes(name: str) -> Callable[..., tuple[Tensor, ...]]:
    def fake(
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
        dtype: torch.dtype,
        cell: torch.dtype,
    ) -> tuple[Tensor, ...]:
        states: list[Tensor] = [hx] if isinstance(hx, Tensor) else list(hx)
        width = states[0].shape[-1] * (2 if bidirectional else 1)
        y = input.new_empty((*input.shape[:2], width), dtype=dtype)
        return (y, *(torch.empty_like(h, dtype=d) for h, d in zip(states, (dtype, cell), strict=False)))

    return fake


for _name in NAMES:
    _LIBRARY.define(
        f"{_name}(Tensor input, {_STATES.get(_name, 'Tensor hx')}, Tensor[] params, bool has_biases, int num_layers, "
        "float dropout, bool train, bool bidirectional, bool batch_first, ScalarType dtype, ScalarType cell) -> "
        + ("(Tensor, Tensor, Tensor)" if _name == "lstm" else "(Tensor, Tensor)")
    )
    torch.library.register_fake(f"ranger_nn::{_name}", _shapes(_name), lib=_LIBRARY)


class WholeRecurrences(TorchFunctionMode):
    """Makes of `torch.lstm` and the like `ranger_nn::lstm`, in the dtypes that they would give.

    `dtype` is that of the output and the hidden state, `cell` that of an LSTM's second state: under autocast they differ
    where the output is projected.
    """

    def __init__(self) -> None:
        """The dtypes under autocast are found by one step of one unit."""
        super().__init__()
        self.dtypes: dict[tuple[str, bool, torch.dtype], tuple[torch.dtype, torch.dtype]] = {}
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            for name in NAMES:
                for projected in (False, True)[: 2 if name == "lstm" else 1]:
                    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                        self.dtypes[name, projected, dtype] = _given(name, projected, dtype)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Recurrences over padded series; all else as it is."""
        name = getattr(func, "__name__", "")
        if name not in NAMES or kwargs or len(args) != 9 or not isinstance(args[8], bool):
            return func(*args, **(kwargs or {}))
        states = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
        projected = len(states) > 1 and states[0].shape[-1] != states[1].shape[-1]
        own = args[0].dtype
        return getattr(torch.ops.ranger_nn, name)(*args, *self.dtypes.get((name, projected, own), (own, own)))


def _given(name: str, projected: bool, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the output and of the last state."""
    device = "cuda" if torch.is_autocast_enabled("cuda") else "cpu"
    layer: Any = {
        "lstm": lambda: torch.nn.LSTM(2, 2, proj_size=int(projected), device="meta"),
        "gru": lambda: torch.nn.GRU(2, 2, device="meta"),
        "rnn_tanh": lambda: torch.nn.RNN(2, 2, device="meta"),
        "rnn_relu": lambda: torch.nn.RNN(2, 2, nonlinearity="relu", device="meta"),
    }[name]()  # without weights: drawing them would move the caller's random numbers
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a fallback that the model itself will tell of
            y, after = layer.to_empty(device=device).to(dtype)(torch.zeros(1, 1, 2, dtype=dtype, device=device))
    except RuntimeError:  # a dtype that this device does not run: no model does either
        return dtype, dtype
    return y.dtype, (after[-1] if isinstance(after, tuple) else after).dtype
