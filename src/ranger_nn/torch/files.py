"""PyTorch's side of a run from file to file: `execute.files.framework.Framework` for a captured model. Enter at `TorchFiles`."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ranger_nn.core.graph import Graph, Value
from ranger_nn.core.program import Instruction
from ranger_nn.io.protocol import Array
from ranger_nn.torch.capture import Captured
from ranger_nn.torch.engine import TorchEngine
from ranger_nn.torch.layout import FORMATS


class TorchFiles:
    """A model on a device.

    Args:
        model: the caller's, which weights are read from.
        captured: what it does.
        graph: the same, as it was planned.
        device: where kernels run.
    """

    channels_last = False

    def __init__(self, model: nn.Module, captured: Captured, graph: Graph, device: torch.device) -> None:
        self.model, self.captured, self.device = model, captured, device
        self.engine = TorchEngine(graph, device)

    # ---- numbers in and out

    def tensor(self, block: Array, dtype: str | None = None) -> Tensor:
        """On the device."""
        return torch.from_numpy(block).to(self.device, None if dtype is None else getattr(torch, dtype))

    def array(self, x: Tensor) -> Array:
        """A view of what lies on the CPU."""
        found: Array = (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy()
        return found

    def picture(self, region: Tensor) -> Tensor:
        """The only sample."""
        return region[0]

    def stand_in(self, value: Value, shape: Sequence[int]) -> Tensor:
        """Zeros in the memory format of windows."""
        x = torch.zeros(tuple(shape), dtype=getattr(torch, value.dtype), device=self.device)
        return x.contiguous(memory_format=FORMATS[len(shape)]) if value.layout and len(shape) in FORMATS else x

    def kept(self, x: Tensor) -> Array:
        """Contiguous, on the CPU."""
        found: Array = x.contiguous().view(_plain(x.dtype)).cpu().numpy()
        return found

    def restored(self, block: Array, dtype: str) -> Tensor:
        """On the device."""
        return torch.from_numpy(block).view(getattr(torch, dtype)).to(self.device)

    def kept_dtype(self, dtype: str) -> str:
        """NumPy has no bfloat16."""
        return str(_plain(getattr(torch, dtype)))[6:]

    # ---- running

    def externals(self) -> list[Tensor | None]:
        """On the device."""
        found: list[Tensor | None] = []
        for kind, where in self.captured.sources.values():
            if kind == "input":
                found.append(None)
            elif kind == "state":
                owner, _, name = where.removeprefix("model.").rpartition(".")
                found.append(getattr(self.model.get_submodule(owner), name).detach().to(self.device))
            else:
                found.append(where.to(self.device))
        return found

    def step_stand_ins(self, i: Instruction) -> list[Tensor]:
        """There are no such steps here."""
        return []

    def wait(self) -> None:
        """Kernels on a GPU are only begun."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def quiet(self) -> AbstractContextManager[Any]:
        """`torch.no_grad`."""
        return torch.no_grad()

    # ---- what this is

    def written_out(self) -> str:
        """The graph of torch.export."""
        return self.captured.text

    def weights(self) -> str:
        """SHA-256 of all bits, with their types and shapes."""
        found = hashlib.sha256()
        for t in self.externals():
            if t is not None:
                found.update(f"{t.dtype} {tuple(t.shape)}".encode())
                found.update(t.contiguous().flatten().view(torch.uint8).cpu().numpy().data)
        return found.hexdigest()

    def versions(self) -> dict[str, Any]:
        """Of libraries, of the processor, and of switches of PyTorch's."""
        return _versions(self.device)

    def setting(self) -> dict[str, Any]:
        """Threads decide in which order is summed."""
        return {"threads": torch.get_num_threads(), "device": str(self.device)}


def _plain(dtype: torch.dtype) -> torch.dtype:
    return torch.int16 if dtype == torch.bfloat16 else dtype


def _versions(device: torch.device) -> dict[str, Any]:
    """What else may change the last bits of a number."""
    cuda = device.type == "cuda"
    kind = device.type
    return {
        "Ranger": importlib.import_module("ranger_nn").__version__,
        "PyTorch": torch.__version__,
        "NumPy": np.__version__,
        "processor": torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "precision": torch.get_float32_matmul_precision(),
        "oneDNN": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "cuDNN": [torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark] if cuda else [],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "off",
    }
