"""The wrapper behaves as the module that it wraps: names, objects, hooks, modes, layouts, threads."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranger_nn
from ranger_nn import errors
from tests.nets import SmallUNet
from tests.support import check, difference, random_inputs, run

IMAGE = ((2, 3, 37, 41),)


def unet(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A seeded U-Net in eval mode."""
    torch.manual_seed(0)
    return SmallUNet().to(dtype).eval()


def regional(model: nn.Module) -> nn.Module:
    """Many small regions."""
    return ranger_nn.regionalize(model, regions=(11, 13))


def test_parameters_are_the_same_objects() -> None:
    """Optimisers made before or after see the very same tensors, under the same names."""
    model = unet()
    small = regional(model)
    assert [id(p) for p in small.parameters()] == [id(p) for p in model.parameters()]
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [id(b) for b in small.buffers()] == [id(b) for b in model.buffers()]
    small(*random_inputs(IMAGE))
    assert [id(p) for p in small.parameters()] == [id(p) for p in model.parameters()]


def test_checkpoints_interchange_both_ways() -> None:
    """state_dict has the untouched keys; each side loads the other's, also after a call."""
    model, small = unet(), regional(unet())
    assert list(small.state_dict()) == list(model.state_dict())
    (x,) = random_inputs(IMAGE)
    small(x)
    torch.manual_seed(1)
    other = SmallUNet().double().eval()
    small.load_state_dict(other.state_dict())
    assert difference(small(x), other(x)) <= 1e-11
    model.load_state_dict(small.state_dict())
    assert torch.equal(model(x), other(x))
    saved = io.BytesIO()
    torch.save(small.state_dict(), saved)
    saved.seek(0)
    unet().load_state_dict(torch.load(saved))


def test_weights_are_read_at_each_call() -> None:
    """Changing a parameter in place, or through .data, shows in the next call."""
    model, small = unet(), regional(unet())
    (x,) = random_inputs(IMAGE)
    small(x)
    for net in (model, small):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1.1)
                parameter.data = parameter.data + 0.01
    check(run(small, (x,)), run(model, (x,)))


def test_hooks_on_the_wrapper() -> None:
    """Forward and backward hooks fire once per call and may change what passes."""
    small = regional(unet())
    seen: list[str] = []
    small.register_forward_pre_hook(lambda module, args: seen.append("before"))
    small.register_forward_hook(lambda module, args, output: output * 2)
    small.register_full_backward_hook(lambda module, inputs, outputs: seen.append("backward"))
    (x,) = random_inputs(IMAGE)
    y = small(x.requires_grad_())
    y.sum().backward()
    assert seen == ["before", "backward"]
    assert difference(y, 2 * unet()(x)) <= 1e-11


def test_hooks_on_parameters() -> None:
    """A gradient hook on a parameter sees the whole gradient once."""
    model, small = unet(), regional(unet())
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for i, net in enumerate((model, small)):
        next(net.parameters()).register_hook(seen[i].append)
        run(net, random_inputs(IMAGE))
    assert len(seen[1]) == len(seen[0]) == 1
    assert difference(seen[1][0], seen[0][0]) <= 1e-11


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    """Under no_grad and inference_mode nothing is recorded, and the numbers are the same."""
    model, small = unet(), regional(unet())
    (x,) = random_inputs(IMAGE)
    with mode():
        y, wanted = small(x), model(x)
    assert not y.requires_grad
    assert y.is_inference() == wanted.is_inference()
    assert difference(y, wanted) <= 1e-11
    check(run(small, (x,)), run(model, (x,)))


def test_dtype_follows_to() -> None:
    """to(dtype) after a first call."""
    small = regional(unet(torch.float32))
    small(*random_inputs(IMAGE, torch.float32))
    small.double()
    (x,) = random_inputs(IMAGE)
    wanted = unet(torch.float32).double()
    assert difference(small(x), wanted(x)) <= 1e-11


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded"])
def test_layouts_of_the_input(layout: str) -> None:
    """An input of any strides; and a model in channels_last."""
    (x,) = random_inputs(IMAGE)
    model, small = unet(), regional(unet())
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
        model, small = (m.to(memory_format=torch.channels_last) for m in (model, small))
    if layout == "transposed":
        x = x.transpose(2, 3)
    if layout == "strided":
        x = x[:, :, ::2, 1::3]
    if layout == "expanded":
        x = x[:1].expand(3, -1, -1, -1)
    assert difference(small(x), model(x)) <= 1e-11
    check(run(small, (x,)), run(model, (x,)))


def test_a_plan_per_shape() -> None:
    """Shapes and batch sizes may change from call to call; plan_for gives the plan of each."""
    model, small = unet(), regional(unet())
    for shape in ((1, 3, 37, 41), (2, 3, 37, 41), (1, 3, 16, 64), (1, 3, 37, 41)):
        (x,) = random_inputs((shape,))
        check(run(small, (x,)), run(model, (x,)))
    plan = small.plan_for(x)
    assert small.plan_for(x) is plan or str(small.plan_for(x)) == str(plan)
    assert isinstance(plan.projected, int)
    assert isinstance(plan.extra_macs, float)
    assert str(plan)


def test_plan_runs_nothing() -> None:
    """Shapes and meta tensors are enough to plan; the text is the same."""
    model = unet(torch.float32)
    (x,) = random_inputs(IMAGE, torch.float32)
    texts = {str(ranger_nn.plan(model, form, memory="8MB")) for form in (x, (x,), x.to("meta"))}
    texts.add(str(ranger_nn.plan(model, tuple(x.shape), memory="8MB")))
    assert len(texts) == 1


def test_copies() -> None:
    """A deep copy is independent of its original."""
    (x,) = random_inputs(IMAGE)
    small = regional(unet())
    before = small(x)
    other = copy.deepcopy(small)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(small(x), before)
    assert not torch.equal(other(x), before)


def test_threads() -> None:
    """Several threads may call the same module, with different shapes, at the same time."""
    model, small = unet(), regional(unet())
    shapes = [(1, 3, 20 + i, 30 - i) for i in range(4)] * 2
    wrong: list[Any] = []

    def call(shape: tuple[int, ...], seed: int) -> None:
        try:
            (x,) = random_inputs((shape,), seed=seed)
            with torch.no_grad():
                if difference(small(x), model(x)) > 1e-11:
                    wrong.append(shape)
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=call, args=(s, i)) for i, s in enumerate(shapes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_keyword_arguments() -> None:
    """Inputs by name, as the untouched module takes them."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, image: Tensor, *, shift: Tensor | None = None, scale: float = 1.0) -> Tensor:
            y = self.conv(image) * scale
            return y if shift is None else y + shift

    torch.manual_seed(0)
    model = Named().double()
    small = regional(copy.deepcopy(model))
    image, shift = random_inputs(((1, 3, 23, 29), (1, 4, 23, 29)))
    assert difference(small(image, shift=shift), model(image, shift=shift)) <= 1e-11
    assert difference(small(image=image, scale=3.0), model(image, scale=3.0)) <= 1e-11
    assert difference(small(image), model(image)) <= 1e-11


def test_global_state_is_left_as_found() -> None:
    """Autograd mode, random state, threads and defaults, after a call and after an error."""

    def state() -> tuple[Any, ...]:
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.mkldnn.enabled,
            torch.get_rng_state().tolist(),
        )

    (x,) = random_inputs(IMAGE)
    small = regional(unet())
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            before = state()
            small(x)
            assert state() == before
            with pytest.raises(errors.RangerError):
                small(x[0, 0])
            with pytest.raises(errors.BudgetError):
                ranger_nn.regionalize(unet(), memory=1)(x)
            assert state() == before


def test_an_error_in_the_middle_leaves_the_state() -> None:
    """An exception raised while regions run (here: by the user, in a gradient hook) passes through."""
    small = regional(unet())
    (x,) = random_inputs(IMAGE)
    small(x)
    handle = next(small.parameters()).register_hook(lambda gradient: 1 / 0)
    y = small(x)
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    handle.remove()
    assert torch.is_grad_enabled()
    check(run(small, (x,)), run(unet(), (x,)))


def test_verify_passes_on_a_good_model() -> None:
    """verify=True compares with the untouched network on a small input before the first run."""
    (x,) = random_inputs(IMAGE)
    small = ranger_nn.regionalize(unet(), regions=(11, 13), verify=True)
    assert difference(small(x), unet()(x)) <= 1e-11


def test_distributed_wrapper(tmp_path: Any) -> None:
    """DistributedDataParallel finds the parameters and gets every gradient once."""
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("torch was built without distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(regional(unet()))
        ours, theirs = run(parallel, random_inputs(IMAGE)), run(unet(), random_inputs(IMAGE))
        for mine, wanted in zip(ours.parameters.values(), theirs.parameters.values()):
            assert mine is not None
            assert wanted is not None
            assert difference(mine, wanted, 1e-2 * theirs.largest) <= 1e-11
    finally:
        dist.destroy_process_group()


def test_outputs_have_plain_strides() -> None:
    """Windows are held channels-last; what the caller gets may be viewed as ever."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1))
    x = torch.rand(2, 3, 9, 8)
    for regions in (None, (4, 4), (100, 100)):
        small = ranger_nn.regionalize(model, regions=regions)
        assert small(x).is_contiguous()
        with torch.no_grad():
            assert small(x).is_contiguous()
