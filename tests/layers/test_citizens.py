"""Good citizens in PyTorch, all layers alike: state_dict, compile, export, autocast, DDP on two processes, pickling."""

from __future__ import annotations

import copy
import faulthandler
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from ranger_nn import Blocks, Grid, KMeans, TimeSlices
from ranger_nn.aggregate import Softmax, WeightedMean
from ranger_nn.torch import BlockDense, ClusteredAttention, RegionalAggregator, SlicedRNN
from tests.pages import example


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def cnn() -> nn.Module:
    """(batch, 2, h, w) -> (batch, 3)."""
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


# Seconds until a process of two that hangs ends itself; both need five on a quiet machine. Twice this is below the time
# limit of a test.
PATIENCE = 120

Case = tuple[Callable[[], nn.Module], tuple[int, ...]]
REGIONAL: dict[str, Case] = {
    name: (lambda name=name: RegionalAggregator(Grid(2, 2), name, local=cnn()), (4, 2, 7, 10))
    for name in ("sum", "mean", "weighted_mean", "max", "min", "logsumexp", "softmax", "moments", "concat")
}
CASES: dict[str, Case] = {
    **REGIONAL,
    "gated softmax": (
        lambda: RegionalAggregator(Grid(2, 2), Softmax(hidden=4, gated=True), local=cnn()),
        (4, 2, 7, 10),
    ),
    "predicted": (lambda: RegionalAggregator(Grid(2, 2), WeightedMean("predicted"), local=cnn()), (4, 2, 7, 10)),
    "blended": (
        lambda: RegionalAggregator(Grid(2, 2, overlap=1, window="cosine"), "stitch", local=nn.Conv2d(2, 3, 1)),
        (4, 2, 7, 10),
    ),
    "coordinates": (
        lambda: RegionalAggregator(Grid(2, 2), "stitch", local=nn.Conv2d(4, 3, 1), coordinates=True),
        (4, 2, 7, 10),
    ),
    "per region": (
        lambda: RegionalAggregator(TimeSlices(3), "stitch", local=nn.Linear(4, 5), per_region=True),
        (4, 11, 4),
    ),
    "a list": (lambda: RegionalAggregator(TimeSlices(2), "sum", local=[nn.Linear(4, 5), nn.Linear(4, 5)]), (4, 10, 4)),
    "memory": (lambda: RegionalAggregator(Grid(2, 2), "mean", local=cnn(), memory="1MB"), (4, 2, 7, 10)),
    "blocks": (lambda: BlockDense(5, Blocks(2, 3), "relu"), (4, 3, 7)),
    "sliced": (lambda: SlicedRNN(nn.GRU(3, 4, batch_first=True), (4, 2)), (4, 11, 3)),
    "sliced cell": (lambda: SlicedRNN(nn.LSTMCell(3, 4), (4, 2)), (4, 11, 3)),
    "attention": (lambda: ClusteredAttention(2, KMeans(3, balanced=True, update="none"), features=8), (4, 11, 8)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    """The layer, its lazy parameters set, and an input."""
    make, shape = CASES[name]
    net, x = make(), torch.randn(shape)
    net(x)
    return net, x


@pytest.mark.parametrize("name", CASES)
def test_state_dict_and_copies(name: str, tmp_path: Path) -> None:
    """Into a new layer (also one that is still lazy), through a file, by pickle and by copy: the same numbers."""
    net, x = made(name)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other = CASES[name][0]()
    other.load_state_dict(torch.load(tmp_path / "net.pt"))
    assert torch.equal(other(x), net(x))
    again = copy.deepcopy(net)
    assert torch.equal(again(x), net(x))
    assert not {id(p) for p in again.parameters()} & {id(p) for p in net.parameters()}


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("memory", "sliced")])
def test_compile(name: str) -> None:
    """One graph, forward and gradient."""
    net, x = made(name)
    torch._dynamo.reset()  # or layers of other kinds count as compilations of this one
    fast = torch.compile(net, backend="aot_eager", fullgraph=True)
    grads = []
    for f in (fast, net):
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        grads.append([y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *net.parameters()])])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in CASES if n != "memory"])
def test_export(name: str) -> None:
    net, x = made(name)
    program = torch.export.export(net.eval(), (x,))
    torch.testing.assert_close(program.module()(x), net(x))


@pytest.mark.parametrize("name", CASES)
def test_autocast(name: str) -> None:
    """Near the numbers in full, parameters and their gradients in full."""
    net, x = made(name)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(leaf)
    torch.testing.assert_close(y.float(), net(x), rtol=0.1, atol=0.1)
    y.float().square().sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


def _worker(rank: int, world: int, folder: str, names: list[str]) -> None:
    """One of two processes: half of the batch, gradients averaged over both."""
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    try:
        for name in names:
            torch.manual_seed(0)
            net, x = made(name)
            parallel = nn.parallel.DistributedDataParallel(net)
            parallel(x.chunk(world)[rank]).square().sum().backward()
            torch.save([p.grad for p in net.parameters()], f"{folder}/{name}-{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


def test_two_processes(tmp_path: Path) -> None:
    """The gradient of both halves of a batch is half that of the whole.

    Gloo's sockets have been seen to find each other never, on a loaded machine: a process that hangs shows where, ends
    itself, and the pair is started once more. An exception in a process is never tried again."""
    names = ["softmax", "per region", "memory", "blocks", "sliced", "attention"]
    try:
        mp.spawn(_worker, (2, str(tmp_path), names), nprocs=2)
    except mp.ProcessExitedException:
        tmp_path = tmp_path / "again"
        tmp_path.mkdir()
        mp.spawn(_worker, (2, str(tmp_path), names), nprocs=2)
    for name in names:
        torch.manual_seed(0)
        net, x = made(name)
        net(x).square().sum().backward()
        shares = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1)]
        for p, *both in zip(net.parameters(), *shares):
            for share in both:
                torch.testing.assert_close(share, p.grad / 2, rtol=1e-4, atol=1e-5)


def test_hooks_and_frozen_parameters() -> None:
    """A frozen local network gets no gradient, also in the loop; hooks on it run."""
    for memory in (None, "1MB"):
        net = RegionalAggregator(Grid(2, 2), "softmax", local=cnn(), memory=memory)
        x = torch.randn(2, 2, 7, 10, requires_grad=True)
        net(x)
        net.local.requires_grad_(False)
        calls: list[Any] = []
        net.local[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        net(x).sum().backward()
        assert calls
        assert x.grad is not None
        assert all(p.grad is None for p in net.local.parameters())
        assert all(p.grad is not None for p in net.score.parameters())


def test_training_and_evaluation_reach_the_local_network() -> None:
    """`eval()` turns dropout off, in stacked copies as well."""
    x = torch.ones(2, 8, 3)
    for per_region in (False, True):
        local = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
        net = RegionalAggregator(TimeSlices(4), "stitch", local=local, per_region=per_region)
        assert not torch.equal(net(x), net(x))
        net.eval()
        assert torch.equal(net(x), net(x))


def test_dtype_and_module_moves() -> None:
    """`double()` moves everything that the layer computes with."""
    for name in CASES:
        net, x = made(name)
        assert net.double()(x.double()).dtype == torch.float64


def test_a_list_with_a_network_that_has_no_parameters() -> None:
    """In the loop: a region whose result depends on nothing that is trained has no backward."""
    x, linear = torch.randn(2, 6, 4), nn.Linear(4, 4)
    net = RegionalAggregator(TimeSlices(2), "sum", local=[nn.Identity(), linear], memory="1MB")
    net(x).sum().backward()
    assert linear.bias.grad is not None
    torch.testing.assert_close(linear.bias.grad, torch.full((4,), 6.0))


def test_aggregators_of_torch_geometric() -> None:
    """Any callable joins the list of results; theirs take them stacked."""
    aggr = pytest.importorskip("torch_geometric.nn.aggr")
    x, local = torch.randn(2, 2, 6, 6), cnn()
    parts = torch.stack([local(r) for row in x.split(3, 2) for r in row.split(3, 3)])
    for theirs, direct in ((aggr.StdAggregation(), None), (aggr.MedianAggregation(), parts.median(0).values)):
        net = RegionalAggregator(
            Grid(2, 2), lambda given, theirs=theirs: theirs(torch.stack(given, 1))[:, 0], local=local
        )
        y = net(x)
        assert y.shape == (2, 3)
        if direct is not None:
            torch.testing.assert_close(y, direct)


def test_the_article_s_example() -> None:
    """Ten epochs with its two-argument form; the sum is h1 + h2; section 4's blocks, forward and gradient."""
    article = example("article_torch")
    losses = article.train()
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    net, x = article.SimpleNet(), torch.rand(7, 2)
    assert torch.equal(net(x), net.out(net.h1(x) + net.h2(x)))
    assert len(list(net.parameters())) == 6
    assert max(article.blocks_of_five()) < 1e-14
