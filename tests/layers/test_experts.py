"""`RegionExperts` in PyTorch: each sample through its own network, result and gradient; centres; wrong use; citizens."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ranger_nn import Grid, InputError, KMeans, PartitionError
from ranger_nn.layers.clusters import EMPTY_AFTER
from ranger_nn.torch import RegionExperts
from ranger_nn.torch.layers.stacked import Stacked

KINDS = [KMeans(5), KMeans(5, balanced=True), KMeans(5, balanced=True, capacity=9), KMeans(1), KMeans(40)]


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def mlp(inputs: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, 2))


def one_by_one(net: RegionExperts, x: Tensor, region: Tensor, mask: Tensor | None) -> Tensor:
    """Each sample alone through the network of its region."""
    rows = []
    for k, sample in enumerate(x.reshape(-1, x.shape[-1])):
        own = {n: getattr(net.local, n.replace(".", "/"))[region[k]] for n, _ in net.local.module.named_parameters()}
        rows.append(functional_call(net.local.module, own, (sample[None],))[0])
    y = torch.stack(rows)
    if mask is not None:
        y = torch.where(mask.reshape(-1, 1), y, 0)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: f"{k.clusters}-{k.balanced}-{k.capacity}")
@pytest.mark.parametrize("shape", [(23, 4), (3, 11, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_each_sample_through_its_own_network(kind: KMeans, shape: tuple[int, ...], masked: bool) -> None:
    """Result, gradient of the input and of all networks."""
    net, x = RegionExperts(kind, mlp()).eval(), torch.randn(shape, requires_grad=True)
    mask = torch.rand(shape[:-1]) < 0.7 if masked else None
    y = net(x, mask)
    region = net.clusters(x, mask).region
    if not kind.balanced:
        direct = torch.cdist(x.detach().reshape(-1, 4), net.clusters.centres).argmin(1)
        assert torch.equal(region, direct)
    wanted = one_by_one(net, x, region, mask)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-13)
    pull, leaves = torch.randn_like(y), [x, *net.local.parameters()]
    for a, b in zip(*(torch.autograd.grad((out * pull).sum(), leaves) for out in (y, wanted))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("lead", [(5,), (2, 3)])
@pytest.mark.parametrize("owner", [None, torch.tensor([2, 0, 2, 1])])
def test_linear_layers_in_a_row(lead: tuple[int, ...], owner: Tensor | None) -> None:
    """One product for each Linear: each copy alone gives the same, forward and gradient."""
    local = nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.Sequential(nn.GELU(), nn.Linear(6, 3)), nn.Dropout(), nn.Tanh()
    )
    net = Stacked(local, 3).eval()
    assert net._row is not None
    x = torch.randn(3 if owner is None else 4, *lead, 4, requires_grad=True)
    each = range(3) if owner is None else owner.tolist()
    found = net(owner, x)
    alone = torch.stack([functional_call(local, net._state(i), (part,)) for i, part in zip(each, x)])
    torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-13)
    pull, leaves = torch.randn_like(found), [x, *net.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * pull).sum(), leaves) for y in (found, alone))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_what_is_not_such_a_row() -> None:
    """Modules of other kinds, hooks, and a layer that comes twice: as vmap runs them."""
    twice, hooked = nn.Linear(4, 4), nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, given, y: y + 1)
    for local in (nn.Sequential(twice, nn.Tanh(), twice), nn.Sequential(hooked), nn.Sequential(nn.LayerNorm(4))):
        net, x = Stacked(local, 3), torch.randn(3, 5, 4)
        assert net._row is None
        alone = torch.stack([functional_call(local, net._state(i), (part,)) for i, part in enumerate(x)])
        torch.testing.assert_close(net(None, x), alone, rtol=1e-12, atol=1e-13)


def test_uneven_loads() -> None:
    """Almost all samples in one region: blocks, not a table as long as the largest load."""
    net = RegionExperts(KMeans(8), mlp(), features=4).eval()
    x = torch.cat([net.clusters.centres[:1].expand(300, 4), net.clusters.centres]) + 0.01 * torch.randn(308, 4)
    routes = net.clusters(x)
    assert routes.owner is not None
    assert routes.shape[0] * routes.shape[1] < 2 * 308
    torch.testing.assert_close(net(x), one_by_one(net, x, routes.region, None), rtol=1e-12, atol=1e-13)


def test_balanced_regions_are_full() -> None:
    net, x = RegionExperts(KMeans(4, balanced=True), mlp()), torch.randn(20, 4)
    net.eval()
    assert torch.bincount(net.clusters(x).region).tolist() == [5] * 4


def test_second_derivatives() -> None:
    net, x = RegionExperts(KMeans(3), mlp()).eval(), torch.randn(7, 4, requires_grad=True)
    net(x)
    assert torch.autograd.gradgradcheck(net, (x,))


def test_absent_samples_do_not_count() -> None:
    """Not even if they are NaN: neither in results, nor in gradients, nor for the centres."""
    x = torch.randn(12, 4)
    mask = torch.arange(12) < 8
    broken = torch.where(mask[:, None], x, torch.nan).requires_grad_()
    for kind in (KMeans(3, decay=0.5), KMeans(3, balanced=True, decay=0.5)):
        nets = [RegionExperts(kind, mlp()) for _ in range(2)]
        nets[0](x)
        nets[1](x)
        nets[1].load_state_dict(nets[0].state_dict())
        y, z = nets[0](broken, mask), nets[1](torch.where(mask[:, None], x, 7.0), mask)
        torch.testing.assert_close(y, z)
        assert (y[8:] == 0).all()
        torch.testing.assert_close(nets[0].clusters.centres, nets[1].clusters.centres)
        (grad,) = torch.autograd.grad(y.sum(), broken)
        assert grad.isfinite().all()
        assert (grad[8:] == 0).all()


# ----------------------------------------------------------------------------------------- centres


def test_moving_average() -> None:
    """By hand; at rest in evaluation and with "none"."""
    net, x = RegionExperts(KMeans(3, decay=0.75), mlp(), features=4), torch.randn(50, 4)
    before = net.clusters.centres.clone()
    region = torch.cdist(x, before).argmin(1)
    means = torch.stack([x[region == r].mean(0) for r in range(3)])
    net(x)
    torch.testing.assert_close(net.clusters.centres, 0.75 * before + 0.25 * means)
    for still in (net.eval(), RegionExperts(KMeans(3, update="none"), mlp(), features=4)):
        before = still.clusters.centres.clone()
        still(x)
        assert torch.equal(still.clusters.centres, before)


def test_gradient() -> None:
    """SGD on the quantisation error at rate r is the moving average with decay 1 - r, whatever the loss."""
    nets = [RegionExperts(KMeans(3, update=u, decay=0.9), mlp(), features=4) for u in ("gradient", "ema")]
    x = torch.randn(50, 4)
    assert len(list(nets[0].parameters())) == len(list(nets[1].parameters())) + 1
    for _ in range(3):
        nets[0].zero_grad()
        nets[0](x).mul(0).sum().backward()
        torch.optim.SGD([nets[0].clusters.centres], 0.1).step()
        nets[1](x)
    torch.testing.assert_close(nets[0].clusters.centres.detach(), nets[1].clusters.centres)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_empty_regions_begin_anew(update: str) -> None:
    """Centres far from all samples get some within the training."""
    net, x = RegionExperts(KMeans(4, update=update), mlp(), features=4), torch.randn(64, 4)
    with torch.no_grad():
        net.clusters.centres.add_(100)
    sgd = torch.optim.SGD(net.parameters(), 0.5)
    for _ in range(6 + EMPTY_AFTER * 4 // 64 * 12):
        sgd.zero_grad()
        net(x).sum().backward()
        sgd.step()
    assert torch.bincount(net.eval().clusters(x).region, minlength=4).min() > 0


def test_adapt() -> None:
    """The same for the same seed; of tokens too; in evaluation each sample goes to its cluster."""
    where = 10 * torch.eye(4)
    x = where[torch.arange(40) % 4] + 0.1 * torch.randn(40, 4)
    nets = [RegionExperts(KMeans(4, seed=3), mlp()) for _ in range(2)]
    nets[0].adapt(x)
    nets[1].adapt(x.reshape(4, 10, 4))
    assert torch.equal(nets[0].clusters.centres, nets[1].clusters.centres)
    region = nets[0].eval().clusters(x).region
    assert all(len(region[k::4].unique()) == 1 for k in range(4))
    assert len(region.unique()) == 4


# --------------------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("use", "error", "says"),
    [
        (lambda x: RegionExperts(Grid(2), mlp()), PartitionError, "KMeans.regions.; got Grid"),
        (lambda x: RegionExperts(KMeans(2), [mlp(), mlp()]), PartitionError, "torch.nn.Module; got list"),
        (lambda x: RegionExperts(KMeans(2), nn.BatchNorm1d(4)), PartitionError, "buffers .running_mean, "),
        (lambda x: RegionExperts(KMeans(2), nn.GRU(4, 4)), PartitionError, "recurrent layers"),
        (
            lambda x: RegionExperts(KMeans(3, balanced=True, capacity=2), mlp())(x),
            PartitionError,
            "3 clusters of capacity 2 hold 6, there are 9; give a capacity of at least 3",
        ),
        (lambda x: RegionExperts(KMeans(3), nn.Flatten(0))(x), PartitionError, "must keep them"),
        (lambda x: RegionExperts(KMeans(3), mlp(), features=5)(x), InputError, "5 features; got shape .9, 4."),
        (lambda x: RegionExperts(KMeans(3), mlp())(x[0]), InputError, r"got shape \(4,\)"),
        (lambda x: RegionExperts(KMeans(3), mlp())(x[:0]), InputError, r"at least one sample; got shape \(0, 4\)"),
        (
            lambda x: RegionExperts(KMeans(3), mlp())(x, torch.ones(3, dtype=torch.bool)),
            InputError,
            r"\(9,\); got \(3,\)",
        ),
        (lambda x: RegionExperts(KMeans(10), mlp()).adapt(x), InputError, "10 clusters .* the data has 9"),
        (lambda x: RegionExperts(KMeans(3), mlp()).adapt(x / 0), InputError, "36 of 36 are NaN"),
        (
            lambda x: RegionExperts(KMeans(3), mlp())(x.index_fill(0, torch.tensor([2]), torch.nan)),
            InputError,
            "1 of 9",
        ),
    ],
)
def test_wrong_use(use: Callable[[Tensor], object], error: type[ValueError], says: str) -> None:
    with pytest.raises(error, match=says):
        use(torch.randn(9, 4))


# ---------------------------------------------------------------------------------------- citizens


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_state_dict(update: str) -> None:
    """Centres are in it; a layer that has seen no input takes them as well."""
    net, x = RegionExperts(KMeans(3, update=update), mlp()), torch.randn(30, 4)
    net(x)
    other = RegionExperts(KMeans(3, update=update, seed=1), mlp())
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(x), net.eval()(x))
    assert {"clusters.centres", "clusters.unseen"} < set(net.state_dict())


KINDS = [
    KMeans(3, balanced=True),
    pytest.param(KMeans(3), marks=pytest.mark.slow),
    pytest.param(KMeans(3, update="gradient"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_compile(kind: KMeans) -> None:
    """Forward, backward, and a training step of the centres, in one graph; then another batch size."""
    net = RegionExperts(kind, mlp(), features=4)
    twin = RegionExperts(kind, mlp(), features=4)
    twin.load_state_dict(net.state_dict())
    torch._dynamo.reset()
    quick = torch.compile(net, backend="aot_eager", fullgraph=True)
    for rows in (12, 18):
        x = torch.randn(rows, 4, requires_grad=True)
        y, z = quick(x), twin(x)
        torch.testing.assert_close(y, z)
        for a, b in zip(
            torch.autograd.grad(y.square().sum(), [x, *net.parameters()]),
            torch.autograd.grad(z.square().sum(), [x, *twin.parameters()]),
        ):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(net.clusters.centres, twin.clusters.centres)


@pytest.mark.parametrize("balanced", [False, True])
def test_export(balanced: bool) -> None:
    net, x = RegionExperts(KMeans(3, balanced=balanced), mlp(), features=4).eval(), torch.randn(12, 4)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))


def test_autocast() -> None:
    """Networks in bfloat16, routing in float32."""
    net, x = RegionExperts(KMeans(5), mlp(), features=4).float(), torch.randn(40, 4).float()
    region = net.eval().clusters(x).region
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).dtype == torch.bfloat16
        assert torch.equal(net.clusters(x).region, region)
    net.train()
    assert net.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_distributed(tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(RegionExperts(KMeans(3), mlp(), features=4))
        net(torch.randn(9, 4)).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
    finally:
        torch.distributed.destroy_process_group()
