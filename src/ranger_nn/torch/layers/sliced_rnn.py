"""`SlicedRNN` for PyTorch: recurrent networks over slices of a sequence, in parallel, then over the slices' states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ranger_nn.errors import InputError, PartitionError
from ranger_nn.layers.slices import Level, check_slices, levels

Cell = nn.RNNBase | nn.RNNCellBase
LONG = 64
"""Slices longer than this may drive backward into denormal numbers."""


class SlicedRNN(nn.Module):
    """Recurrent networks over the slices of a sequence (Yu & Liu 2018, Sliced Recurrent Neural Networks, section 3).

    The sequence is cut in slices, the slices in slices. The network of level 0 runs over all shortest slices at once, as a
    batch; their last states are the sequence of level 1, and so on: T = 32768 with slices (32, 32, 32) takes 96 steps.
    Each level has a network of its own, as in the paper. The result is not that of the plain network: what a slice
    passes on is its last state.

    Any length is allowed: slices are filled up at the end and read at their last step that is there, so filling
    changes nothing; the last level takes what is left, however long.

    Denormal numbers: the gradient of a slice's last state fades over its steps. From about 128 steps on it
    falls below 1e-38, where this kind of arithmetic is many times slower on CPUs (a backward over slices of 256 took
    3.6 times as long). Short slices avoid it; for slices longer than 64 steps denormals count as zero during
    backward (`torch.set_flush_denormal`), unless `flush_denormals` is False.

    Args:
        cell: `nn.GRU`, `nn.LSTM`, `nn.RNN` (any number of layers, one direction) or an `nn.*Cell`, whose configuration all
            levels take; or a callable that makes the network of a level from the width of its input. Itself it is the
            network of level 0.
        slices: steps of a slice on each level, the shortest slices first.
        shared: one network for all levels; its input must be as wide as its state.
        features: width of x, which a callable needs.
        flush_denormals: see above.

    Shapes:
        x (batch, time, features), or (time, batch, features) for a cell with batch_first=False -> (batch, state): the last
        state of the last level (of an LSTM its output h).

    Raises:
        PartitionError: slices that are not positive integers, a cell of another kind, two directions, `shared` with widths
            that differ.
        InputError: an empty sequence, one without a batch axis, lengths out of range.
    """

    def __init__(
        self,
        cell: Cell | Callable[[int], Cell],
        slices: Sequence[int] = (32, 32, 32),
        *,
        shared: bool = False,
        features: int | None = None,
        flush_denormals: bool = True,
    ) -> None:
        super().__init__()
        self.slices = check_slices(slices)
        self.flush_denormals = flush_denormals
        first, make = _first(cell, features)
        if shared and first.input_size != _width(first):
            raise PartitionError(
                f"shared=True feeds states to the same network, so its input must be as wide as its state: input_size "
                f"is {first.input_size}, the state {_width(first)}; leave shared out"
            )
        higher = [first if shared else _checked(make(_width(first))) for _ in self.slices[1:]]
        self.levels = nn.ModuleList([first, *higher])

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The last state of the last level.

        Args:
            x: (batch, time, features), or as the cell's batch_first says.
            lengths: (batch,) steps that are there, 1 to time; None: all.
        """
        if x.dim() != 3:
            raise InputError(f"SlicedRNN takes (batch, time, features); got shape {tuple(x.shape)}. Add the batch axis")
        if isinstance(self.levels[0], nn.RNNBase) and not self.levels[0].batch_first:
            x = x.transpose(0, 1)
        if lengths is not None and not torch.compiler.is_compiling():
            _check_lengths(lengths, x)
        found = levels(x.shape[1], self.slices)
        for level, network in zip(found, self.levels):
            there = _there(lengths, level, x) if lengths is not None or level.filling else None
            filled = nn.functional.pad(x, (0, 0, 0, level.filling)) if level.filling else x
            folded = filled.reshape(x.shape[0] * level.count, level.length, x.shape[-1])
            x = _last_state(network, folded, there).reshape(x.shape[0], level.count, -1)
            lengths = None if lengths is None else -(-lengths // level.length)
        long = max(level.length for level in found) > LONG
        if long and self.flush_denormals and not torch.compiler.is_compiling():
            return _FlushInBackward.apply(x[:, 0])
        return x[:, 0]

    def extra_repr(self) -> str:
        """Slices."""
        return f"slices={self.slices}"


class _FlushInBackward(torch.autograd.Function):
    """From here on, until this backward pass ends, denormal numbers count as zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """The gradient itself; the mode is left when the engine has finished."""
        if not _flushing() and torch.set_flush_denormal(True):
            torch.autograd.Variable._execution_engine.queue_callback(_stop_flushing)
        return grads[0]


def _stop_flushing() -> None:
    torch.set_flush_denormal(False)


def _flushing() -> bool:
    """Do denormal numbers count as zero on this thread?"""
    return bool((torch.tensor([1e-39]) * 1.0 == 0).item())


def _first(cell: Any, features: int | None) -> tuple[Cell, Callable[[int], Cell]]:
    """The network of level 0, and what makes the others from the width of their input."""
    if isinstance(cell, nn.Module):
        checked = _checked(cell)
        return checked, lambda width: _like(checked, width)
    if not callable(cell):
        raise PartitionError(
            f"SlicedRNN takes nn.GRU, nn.LSTM, nn.RNN, a cell, or a callable that makes one; got {cell!r}"
        )
    if features is None:
        raise PartitionError("a callable makes networks from the width of their input: give features=, that of x")
    return _checked(cell(features)), cell


def _checked(cell: Any) -> Cell:
    if not isinstance(cell, nn.RNNBase | nn.RNNCellBase):
        raise PartitionError(
            f"SlicedRNN takes nn.GRU, nn.LSTM, nn.RNN or their cells; got {type(cell).__name__}. Other recurrences fit in a "
            "module with the interface of nn.GRU"
        )
    if isinstance(cell, nn.RNNBase) and cell.bidirectional:
        raise PartitionError(
            "SlicedRNN passes on the last state of a slice, so it takes one direction; got bidirectional=True"
        )
    return cell


def _width(cell: Cell) -> int:
    """Features of what a cell passes on."""
    return getattr(cell, "proj_size", 0) or cell.hidden_size


def _like(cell: Cell, width: int) -> Cell:
    """A new network of the same configuration for inputs of this width."""
    where = next(cell.parameters())
    made: dict[str, Any] = {"bias": cell.bias, "device": where.device, "dtype": where.dtype}
    if isinstance(cell, nn.RNN | nn.RNNCell):
        made["nonlinearity"] = cell.nonlinearity
    if isinstance(cell, nn.RNNBase):
        made |= {"num_layers": cell.num_layers, "dropout": cell.dropout, "batch_first": cell.batch_first}
    if isinstance(cell, nn.LSTM):
        made["proj_size"] = cell.proj_size
    kind: Any = type(cell)
    return kind(width, cell.hidden_size, **made)


def _check_lengths(lengths: Tensor, x: Tensor) -> None:
    if tuple(lengths.shape) != (x.shape[0],) or lengths.min() < 1 or lengths.max() > x.shape[1]:
        raise InputError(
            f"lengths are (batch,) = ({x.shape[0]},) numbers from 1 to the {x.shape[1]} steps of x; got shape "
            f"{tuple(lengths.shape)} and values from {lengths.min()} to {lengths.max()}"
        )


def _there(lengths: Tensor | None, level: Level, x: Tensor) -> Tensor:
    """(batch * slices,) steps of each slice that are there; slices that are all filling count one, and are not read."""
    ends = torch.full((x.shape[0],), x.shape[1], device=x.device) if lengths is None else lengths.to(x.device)
    starts = torch.arange(level.count, device=x.device) * level.length
    return (ends[:, None] - starts).clamp(1, level.length).flatten()


def _last_state(network: Any, x: Tensor, there: Tensor | None) -> Tensor:
    """(slices, state) after the last step that is there."""
    if isinstance(network, nn.RNNCellBase):
        return _last_of_cell(network, x, there)
    y = network(x if network.batch_first else x.transpose(0, 1))[0]
    y = y if network.batch_first else y.transpose(0, 1)
    if there is None:
        return y[:, -1]
    return y.gather(1, (there - 1)[:, None, None].expand(-1, 1, y.shape[-1]))[:, 0]


def _last_of_cell(cell: Any, x: Tensor, there: Tensor | None) -> Tensor:
    """Step by step; a slice whose steps are over keeps its state."""
    state: Any = None
    for t, step in enumerate(x.unbind(1)):
        new = cell(step, state)
        if there is not None and state is not None:
            goes_on = (t < there)[:, None]
            if isinstance(new, tuple):
                new = tuple(torch.where(goes_on, a, b) for a, b in zip(new, state))
            else:
                new = torch.where(goes_on, new, state)
        state = new
    return state[0] if isinstance(state, tuple) else state
