"""What a run from file to file asks of a framework, and nothing else.

    NumPy block --tensor--> the framework's tensor --`engine`--> tensor --picture, array--> NumPy block

An adapter fulfils `Framework` in a file of its own (`torch/files.py`, `keras/files.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from ranger_nn.core.graph import Value
from ranger_nn.core.program import Instruction
from ranger_nn.execute.guard import Form
from ranger_nn.execute.machine import Engine
from ranger_nn.io.protocol import Array

Tensor = Any
"""A framework's own."""


class FormedEngine(Engine, Protocol):
    """An engine whose results can be held to the plan."""

    def form(self, x: Tensor) -> Form:
        """Shape and dtype, as a graph's values have them."""
        ...


class Framework(Protocol):
    """A model on a device, for files.

    Attributes:
        model: the caller's.
        channels_last: where the channels of pictures are.
    """

    model: Any
    channels_last: bool

    @property
    def engine(self) -> FormedEngine:
        """Binds instructions of the graph to calls."""
        ...

    def tensor(self, block: Array, dtype: str | None = None) -> Tensor:
        """The numbers as a tensor on the device, of `dtype` (None: the block's own)."""
        ...

    def array(self, x: Tensor) -> Array:
        """The numbers of a tensor, or of a `picture`; of a type that NumPy has not (bfloat16) as float32."""
        ...

    def picture(self, region: Tensor) -> Any:
        """(channels, *spatial) of a region whose batch is one, in any namespace of the array API."""
        ...

    def stand_in(self, value: Value, shape: Sequence[int]) -> Tensor:
        """Zeros of a region of a value, as the engine would hold it."""
        ...

    def kept(self, x: Tensor) -> Array:
        """The bits of a tensor as a NumPy type of the same size."""
        ...

    def restored(self, block: Array, dtype: str) -> Tensor:
        """The tensor of `dtype` with the bits that `kept` gave."""
        ...

    def kept_dtype(self, dtype: str) -> str:
        """The NumPy type in which `kept` holds a tensor of `dtype`."""
        ...

    def externals(self) -> list[Tensor | None]:
        """Parameters and constants in the order of the program's `external`; None for the input."""
        ...

    def step_stand_ins(self, i: Instruction) -> list[Tensor]:
        """Made-up numbers for what a STEP reads, which are no values of the graph's."""
        ...

    def wait(self) -> None:
        """Until the device has done what it was given."""
        ...

    def quiet(self) -> AbstractContextManager[Any]:
        """What a run stands in: no gradients."""
        ...

    def written_out(self) -> str:
        """Operators and their arguments, as text: with the weights, what tells this model from others."""
        ...

    def weights(self) -> str:
        """A hash of parameters and constants."""
        ...

    def versions(self) -> dict[str, Any]:
        """What else may change the last bits of a number: plain data."""
        ...

    def setting(self) -> dict[str, Any]:
        """Options of the run that are the framework's: threads, device."""
        ...
