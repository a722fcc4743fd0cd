"""Models whose archives, between them, hold every kind of text that torch.export writes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim


@torch.library.custom_op("ranger_tests_archive::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Relu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class Convolutions(nn.Module):
    """Parameters, buffers, a lifted constant, a module whose name is no identifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.named = nn.ModuleDict({"a-b c": nn.Conv2d(8, 3, 1)})
        self.loose = torch.rand(1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.named["a-b c"](F.gelu(self.norm(self.first(x)), approximate="tanh"))
        return F.interpolate(y, scale_factor=2, mode="bilinear") + self.loose


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.lstm(x)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))


class Contexts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.linear(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.linear(x)
        return y + z.float()


class Trees(nn.Module):
    """Dicts, lists, a keyword, constants that are text and numbers."""

    def forward(self, a: dict[str, Tensor], b: list[Tensor], *, k: Tensor, mode: str = "sum", on: bool = True) -> Any:
        return OrderedDict([("out", a["x-1"] + b[0]), ("layer.1", b[1] * 2), ("deep", {"z": (k,)})])


class Sizes(nn.Module):
    """Arithmetic on sizes, in expressions, nodes and guards."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        if x.shape[0] % 4 == 0 and x.shape[1] > y.shape[1]:
            x = x + 1
        rows = x.reshape(x.shape[0] * x.shape[1] // 2, -1)
        return rows[: x.shape[0]], x.shape[0] ** 2, x.new_zeros((x.shape[1] + 3) // 4)


class Found(nn.Module):
    """Sizes that depend on data, and the messages of their assertions."""

    def forward(self, x: Tensor) -> Tensor:
        count = x.sum().to(torch.int64).item()
        torch._check(count >= 0)
        torch._check(count < 10)
        return torch.zeros(count + 2) + x.nonzero().shape[0]


class Registered(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.ranger_tests_archive.twice(x) + 1


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x) + torch.einsum("bhij,bhjk->bhik", x, x.mT @ x)


def _auto(*dims: int) -> dict[int, Any]:
    return dict.fromkeys(dims, Dim.AUTO)


def good() -> dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]]:
    """By name: model, arguments, keywords, dynamic shapes."""
    r = torch.rand
    trees = ({"x-1": r(2)}, [r(2), r(2)])
    return {
        "dim": (Relu(), (r(1, 3, 32, 32),), {}, ({2: Dim("h", min=8, max=512)},)),
        "derived": (Relu(), (r(1, 3, 32, 32),), {}, ({2: 2 * Dim("half", min=4, max=99)},)),
        "auto": (Convolutions().eval(), (r(1, 3, 16, 16),), {}, (_auto(2, 3),)),
        "training": (Convolutions(), (r(1, 3, 16, 16),), {}, None),
        "lstm": (Lstm(), (r(2, 5, 4),), {}, (_auto(1),)),
        "branch": (Branch(), (r(4, 4),), {}, None),
        "contexts": (Contexts(), (r(4, 4),), {}, None),
        "trees": (Trees(), trees, {"k": r(1)}, None),
        "sizes": (Sizes(), (r(8, 6), r(8, 4)), {}, (_auto(0, 1), _auto(0, 1))),
        "found": (Found(), (torch.ones(3),), {}, None),
        "registered": (Registered(), (r(4, 4),), {}, None),
        "attention": (Attention(), (r(1, 2, 8, 4),), {}, (_auto(2),)),
    }
