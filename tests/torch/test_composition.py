"""A regional module among PyTorch's other tools: each works, or says in one line what to do."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import ranger_nn
from ranger_nn.errors import CaptureError, GradientError, InputError
from tests.support import difference

IMAGE = (1, 3, 24, 20)


def net() -> nn.Sequential:
    """A small network."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1))


def small(model: nn.Module | None = None) -> Any:
    """It, in regions."""
    return ranger_nn.regionalize(net() if model is None else model, regions=(11, 13))


def image() -> Tensor:
    """An input that requires its gradient."""
    torch.manual_seed(1)
    return torch.rand(IMAGE, requires_grad=True)


def values(f: Callable[[Tensor], Tensor], x: Tensor, also: Iterable[Tensor] = ()) -> list[Tensor]:
    """The output and its gradients."""
    y = f(x)
    return [y, *torch.autograd.grad(y.square().sum(), [t for t in (x, *also) if t.requires_grad])]


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Rounding apart."""
    for a, b in zip(ours, theirs, strict=True):
        assert difference(a, b) <= 1e-4


def test_inside_another_regional_model() -> None:
    """The outer one plans the untouched modules within, with the hooks of both."""
    inner = small()
    inner.register_forward_hook(lambda module, args, y: y * 3)
    inner.module.register_forward_hook(lambda module, args, y: y + 1)
    outer = nn.Sequential(inner, nn.Conv2d(4, 2, 1))
    whole = nn.Sequential(inner.module, nn.Conv2d(4, 2, 1))
    whole[1] = outer[1]
    x = image()
    same(
        values(small(outer), x, outer.parameters()),
        values(lambda x: outer[1](inner.module(x) * 3), x, outer.parameters()),
    )
    same(values(small(small()), x), values(net(), x))


def test_export_and_trace_see_the_untouched_module() -> None:
    """The same numbers in the file; no region is recorded."""
    x = image().detach()
    program = torch.export.export(small(), (x,))
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [
        torch.ops.aten.conv2d.default,
        torch.ops.aten.tanh.default,
        torch.ops.aten.conv2d.default,
    ]
    assert torch.equal(program.module()(x), net()(x))
    assert torch.equal(torch.jit.trace(small(), (x,))(x), net()(x))


def test_compile_leaves_the_loop_alone() -> None:
    """Compiling takes no longer than planning, however many regions there are."""
    model = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)])
    compiled = torch.compile(nn.Sequential(ranger_nn.regionalize(model, regions=(4, 4)), nn.ReLU()), backend="eager")
    x, start = torch.rand(1, 3, 48, 48, requires_grad=True), time.monotonic()
    same(values(compiled, x), values(nn.Sequential(model, nn.ReLU()), x))
    assert time.monotonic() - start < 60  # tracing 144 regions takes minutes


def test_functional_call() -> None:
    """The given parameters are read, at each call, and get their gradients; the module's own are as before."""
    model, x = net(), image()
    f = small(model)
    for k in (2.0, 3.0):
        scale = torch.tensor(k, requires_grad=True)

        def given() -> dict[str, Tensor]:
            return {n: p.detach() * scale for n, p in model.named_parameters()}  # noqa: B023 (called at once)

        theirs = values(lambda x: functional_call(model, given(), (x,)), x, [scale])
        same(values(lambda x: functional_call(f, given(), (x,)), x, [scale]), theirs)
    assert len(f._ready) == 1
    same(values(f, x), values(model, x))


def test_functional_call_of_a_recurrence() -> None:
    """Its list of weights follows."""
    model, x = nn.LSTM(3, 4, batch_first=True), torch.rand(1, 30, 3)
    f = ranger_nn.regionalize(model)
    given = {n: 2 * p.detach() for n, p in model.named_parameters()}
    assert difference(functional_call(f, given, (x,))[0], functional_call(model, given, (x,))[0]) <= 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_on_a_first_call(reentrant: bool) -> None:
    """What planning saves is not counted among the tensors of the call."""
    x = image()
    same(values(lambda x: checkpoint(small(), x, use_reentrant=False), x), values(net(), x))
    f, y = small(), image()
    checkpoint(f, y, use_reentrant=reentrant).square().sum().backward()
    assert y.grad is not None
    assert difference(y.grad, values(net(), x)[1]) <= 1e-5


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "DataParallel": (lambda: small(nn.DataParallel(net())), "model.module"),
    "compiled": (lambda: small(torch.compile(net())), "_orig_mod"),
    "scripted": (lambda: small(torch.jit.script(net())), "TorchScript"),
    "scripted within": (lambda: small(nn.Sequential(torch.jit.script(net()))), "its '0'"),
    "packed": (lambda: small(nn.LSTM(3, 4))(nn.utils.rnn.pack_sequence([torch.rand(5, 3)])), "padded"),
    "array": (lambda: small()(image().detach().numpy()), "torch.from_numpy"),
    "no tensor": (lambda: small()(1), "without a tensor"),
    "torch.func": (lambda: torch.func.grad(lambda x: small()(x).sum())(image()), "untouched"),
    "vmap": (lambda: torch.func.vmap(small())(image()[None]), "untouched"),
    "copies": (lambda: small()._replicate_for_data_parallel(), "DistributedDataParallel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_to_do(case: str) -> None:
    """One line with the way out."""
    call, way = REFUSED[case]
    with pytest.raises(InputError, match=way):
        call()


def test_forward_mode_is_refused() -> None:
    """A dual number would come back without its tangent."""
    x = image().detach()
    with forward_ad.dual_level(), pytest.raises(InputError, match="reverse mode"):
        small(net().requires_grad_(False))(forward_ad.make_dual(x, x))


class Packs(nn.Module):
    """Packs what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4)

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, n)
        return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0])[0]


def test_a_module_that_packs_is_refused() -> None:
    """The error speaks of sequences, not of what fails on fake tensors."""
    with pytest.raises(CaptureError, match="lengths are data"):
        ranger_nn.regionalize(Packs())(torch.rand(5, 2, 3), torch.tensor([5, 3]))


def test_backward_hooks_within_are_refused() -> None:
    """Where there are gradients: without any the hook has nothing to do."""
    model = net()
    model[0].register_full_backward_hook(lambda module, inputs, outputs: (2 * inputs[0],))
    f, x = small(model), image()
    with torch.no_grad():
        f(x)
    with pytest.raises(CaptureError, match="backward hook"):
        f(x)


@pytest.mark.parametrize("of", ["inputs", "parameters"])
def test_no_gradient_of_a_gradient(of: str) -> None:
    """create_graph=True raises where it is asked for: a penalty would contribute nothing."""
    f, x = small(), image()
    wanted = [x] if of == "inputs" else list(f.parameters())
    y = f(x)
    with pytest.raises(GradientError, match="create_graph"):
        torch.autograd.grad(y.sum(), wanted, create_graph=True)
    with pytest.raises(GradientError, match="create_graph"):
        f(x).square().sum().backward(create_graph=True)
    same(values(f, x), values(net(), x))


class Prompted(nn.Module):
    """Trains tensors that are no parameters: attributes, a buffer, layers in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)
        self.prompt = torch.rand(1, 3, 1, 1, requires_grad=True)
        self.maps = {"a": torch.rand(IMAGE, requires_grad=True)}
        self.layers = [nn.Conv2d(3, 3, 3, padding=1)]
        self.register_buffer("scale", torch.rand(3, 1, 1, requires_grad=True))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[0](self.conv(x) * self.prompt + self.maps["a"]) * self.scale
        return y


@pytest.mark.parametrize("regions", [None, (11, 13)])
def test_tensors_that_are_no_parameters_are_trained(regions: tuple[int, int] | None) -> None:
    """Their gradients, after a step too, and as `requires_grad` changes."""
    model, x = Prompted(), image().detach()
    f = ranger_nn.regionalize(model, regions=regions)
    trained: list[Tensor] = [model.prompt, model.maps["a"], model.scale, model.layers[0].weight]  # type: ignore[list-item]
    with torch.no_grad():
        f(x)
    for _ in range(2):
        same(values(f, x, trained), values(model, x, trained))
        with torch.no_grad():
            for t in trained:
                t.mul_(1.5)
    for t in trained[1:]:
        t.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    same(values(f, x, trained), values(model, x, trained))
    model.prompt.requires_grad_(False)
    assert not f(x).requires_grad


def test_outputs_without_a_gradient() -> None:
    """What forward detaches comes back detached."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.conv(x)
            return y, y.detach() * 2, y.argmax(1)

    assert [y.requires_grad for y in small(Both())(image())] == [True, False, False]


@pytest.mark.parametrize("which", ["model", "input", "both", "neither", "float64"])
@pytest.mark.parametrize("grad", [False, True])
def test_order_of_memory(which: str, grad: bool) -> None:
    """Outputs are channels-last where the untouched network's are."""
    model, x = net(), image().detach()
    if which == "float64":
        model, x = model.double(), x.double()
    if which in ("model", "both", "float64"):
        model = model.to(memory_format=torch.channels_last)
    if which in ("input", "both"):
        x = x.to(memory_format=torch.channels_last)
    with torch.set_grad_enabled(grad):
        wanted = model(x)
        for regions in (None, (11, 13)):
            y = ranger_nn.regionalize(model, regions=regions)(x)
            assert y.stride() == wanted.stride()
            assert difference(y, wanted) <= 1e-5


def test_a_plan_with_the_gradient_of_its_input() -> None:
    """plan() projects what the call will need, whether the input requires a gradient or not."""
    model, x = net().requires_grad_(False), torch.rand(1, 3, 64, 64, requires_grad=True)
    plan = ranger_nn.plan(model, x, regions=(16, 16), training=True)
    wrapper = ranger_nn.regionalize(copy.deepcopy(model), regions=(16, 16))
    assert plan.projected == wrapper.plan_for(x).projected
    assert plan.projected > ranger_nn.plan(model, x.detach(), regions=(16, 16), training=True).projected
