"""`RegionalAggregator` and `BlockDense` in PyTorch: by hand, with gradients; memory; wrong use; good citizens."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ranger_nn import Blocks, BudgetError, Grid, InputError, KMeans, PartitionError, TimeSlices, measure
from ranger_nn.aggregate import Softmax, WeightedMean
from ranger_nn.torch import BlockDense, RegionalAggregator

REDUCTIONS = ["sum", "mean", "weighted_mean", "max", "min", "logsumexp", "softmax", "moments", "concat"]


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def cnn(channels: int = 3) -> nn.Module:
    """(batch, 2, h, w) -> (batch, channels)."""
    return nn.Sequential(nn.Conv2d(2, channels, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (3, 2, 7, 10), requires_grad=True)


def by_hand(x: Tensor, local: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """`Grid(2, 2)` of 7 x 10: 4 + 3 by 5 + 5."""
    return [local(x[:, :, a:b, c:d]) for a, b in ((0, 4), (4, 7)) for c, d in ((0, 5), (5, 10))]


def direct(name: str, layer: RegionalAggregator, parts: list[Tensor]) -> Tensor:
    """The formula of each aggregator."""
    y = torch.stack(parts)
    shares = torch.tensor([20.0, 20, 15, 15]).reshape(4, 1, 1) / 70
    if name == "softmax":
        (query,) = layer.score.parameters()
        return ((y @ query.T).softmax(0) * y).sum(0)
    return {
        "sum": lambda: y.sum(0),
        "mean": lambda: y.mean(0),
        "weighted_mean": lambda: (shares * y).sum(0),
        "max": lambda: y.amax(0),
        "min": lambda: y.amin(0),
        "logsumexp": lambda: y.logsumexp(0),
        "moments": lambda: torch.cat([y.mean(0), y.var(0, correction=0)], -1),
        "concat": lambda: torch.cat(parts, -1),
    }[name]()


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("memory", [None, "100kB"])
def test_equals_the_formula(name: str, memory: str | None) -> None:
    """Result, gradient of the input and of all parameters."""
    local = cnn()
    layer, x = RegionalAggregator(Grid(2, 2), name, local=local, memory=memory), image()
    ours = layer(x)
    theirs = direct(name, layer, by_hand(x, local))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    pull = torch.randn_like(ours)
    wanted = [x, *local.parameters(), *(p for n, p in layer.named_parameters() if n.startswith("score"))]
    for a, b in zip(*(torch.autograd.grad((y * pull).sum(), wanted) for y in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "grid",
    [
        Grid(2, 3),
        Grid(3, 2, overlap=1),
        Grid(size=(3, 4)),
        Grid(2, 2, overlap=0.5, window="cosine"),
        Grid(3, 3, overlap=2, window="linear"),
    ],
)
@pytest.mark.parametrize("memory", [None, "150kB"])
def test_stitch_of_a_pointwise_network_is_the_network(grid: Grid, memory: str | None) -> None:
    local = nn.Conv2d(2, 5, 1)
    layer, x = RegionalAggregator(grid, "stitch", local=local, memory=memory), image()
    torch.testing.assert_close(layer(x), local(x), rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), [x, *local.parameters()]) for f in (layer, local))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_an_overlap_as_wide_as_the_halo_gives_the_convolution() -> None:
    """Regions that read their halo: equal to the whole, but for the border of the image."""
    local, x = nn.Conv2d(2, 2, 3, padding=1), image()
    torch.testing.assert_close(RegionalAggregator(Grid(2, 3, overlap=1), "stitch", local=local)(x), local(x))
    assert not torch.allclose(RegionalAggregator(Grid(2, 3), "stitch", local=local)(x), local(x))


@pytest.mark.parametrize("cells", ["linear", "norm", "gru"])
def test_one_network_for_each_region(cells: str) -> None:
    """Stacked parameters, in one call or (buffers, recurrent layers) in a loop: as separate modules."""
    local: nn.Module = {
        "linear": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)),
        "norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.Flatten(0, 1), nn.BatchNorm1d(5), nn.Unflatten(0, (2, -1))),
        "gru": lambda: nn.GRU(4, 3, batch_first=True),
    }[cells]()
    layer, x = RegionalAggregator(TimeSlices(3), "stitch", local=local, per_region=True), torch.randn(2, 11, 4)
    assert layer.local.batched == (cells == "linear")
    y = layer(x)
    own = {n: getattr(layer.local, n.replace(".", "/")) for n, _ in local.named_parameters()}
    assert all(not torch.equal(w[0], w[1]) for n, w in own.items() if n.startswith(("0.weight", "weight")))
    for i, part in enumerate((x[:, :4], x[:, 4:8], x[:, 8:])):
        local.load_state_dict({n: w[i] for n, w in own.items()}, strict=False)
        expected = local(part)
        torch.testing.assert_close(y[:, 4 * i : 4 * i + 4], expected[0] if cells == "gru" else expected)
    if cells == "norm":
        tracked = getattr(layer.local, "2/num_batches_tracked")
        assert tracked.tolist() == [1, 1, 1]
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_a_list_of_networks() -> None:
    local = [cnn() for _ in range(4)]
    layer, x = RegionalAggregator(Grid(2, 2), "sum", local=local), image()
    regions = [x[:, :, a:b, c:d] for a, b in ((0, 4), (4, 7)) for c, d in ((0, 5), (5, 10))]
    torch.testing.assert_close(layer(x), sum(f(r) for f, r in zip(local, regions)))
    assert len(list(layer.parameters())) == 8


def test_the_article_s_form() -> None:
    """Any callable that gives parts, any callable per part; the parts are summed."""
    x = torch.randn(6, 4)
    layer = RegionalAggregator(lambda x: [x[:, :2], x[:, 2:]], lambda part: part.square())
    torch.testing.assert_close(layer(x), x[:, :2].square() + x[:, 2:].square())
    joined = RegionalAggregator(
        lambda x: [x[:, :1], x[:, 1:]], lambda parts: torch.cat(parts[::-1], 1), local=torch.exp
    )
    torch.testing.assert_close(joined(x), torch.cat([x[:, 1:], x[:, :1]], 1).exp())
    dense = nn.Linear(2, 3)
    for memory in (None, "1MB"):
        layer = RegionalAggregator(lambda x: [x[:, :2], x[:, 2:]], dense, memory=memory)
        leaf = x.clone().requires_grad_()
        layer(leaf).sum().backward()
        torch.testing.assert_close(leaf.grad, dense.weight.sum(0).repeat(6, 2))


@pytest.mark.parametrize("name", REDUCTIONS[:-1])
def test_absent_regions_do_not_count(name: str) -> None:
    local = cnn()
    layer, x = RegionalAggregator(Grid(2, 2), name, local=local), image()
    layer(x)
    present = torch.tensor([[True] * 4, [True, False, True, False], [False] * 4])
    y = layer(x, present)
    torch.testing.assert_close(y[:1], layer(x)[:1])
    assert (y[2] == 0).all()
    changed = x.detach().clone()
    changed[1, :, :, 5:] += 1  # only regions that are absent
    torch.testing.assert_close(layer(changed, present)[1], y[1])
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (x.grad[2] == 0).all()
    assert (x.grad[1, :, :, 5:] == 0).all()


def test_weights() -> None:
    x = torch.randn(2, 6, 3)
    given = RegionalAggregator(TimeSlices(3), WeightedMean((1.0, 0.0, 3.0)))(x)
    torch.testing.assert_close(given, (x[:, :2] + 3 * x[:, 4:]) / 4)
    sized = RegionalAggregator(TimeSlices(length=4), WeightedMean("size"), local=lambda s: s.mean(1))(x)
    torch.testing.assert_close(sized, x.mean(1))
    predicted = RegionalAggregator(TimeSlices(3), WeightedMean("predicted"), local=lambda s: s.mean(1))
    y = torch.stack([s.mean(1) for s in x.split(2, 1)])
    found = predicted(x)
    w = torch.sigmoid(predicted.score(y)).unsqueeze(-1)
    torch.testing.assert_close(found, (w * y).sum(0) / w.sum(0))


def test_gated_attention_pooling() -> None:
    """Ilse et al. 2018, equations 8 and 9."""
    layer, x = RegionalAggregator(Grid(2, 2), Softmax(hidden=6, gated=True), local=cnn()), image()
    layer(x)
    y = torch.stack(by_hand(x, layer.local))
    v, u = layer.score.score, layer.score.gate
    scores = layer.score.query(v(y) * u(y))
    torch.testing.assert_close(layer(x), (scores.softmax(0) * y).sum(0))


def test_coordinates() -> None:
    seen = []

    def local(x: Tensor) -> Tensor:
        seen.append(x)
        return x[..., :1]

    RegionalAggregator(Grid(2, axes=(1,)), "stitch", local=local, coordinates=True)(torch.zeros(1, 4, 1))
    assert seen[0][..., 1].tolist() == [[-0.5, 0.5], [-0.5, 0.5]]


def test_memory_is_kept() -> None:
    """One region's activations at a time, the same numbers; too little is refused with the least that would do."""
    local = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    x = torch.randn(1, 2, 256, 256)
    peaks, gradients = [], []
    for memory in (None, 6_000_000):
        layer = RegionalAggregator(Grid(8, 8), "mean", local=local, memory=memory)
        layer(x).sum().backward()
        layer.zero_grad()
        with measure() as used:
            layer(x).sum().backward()
        peaks.append(used.peak)
        gradients.append([p.grad.clone() for p in layer.parameters()])
    assert peaks[1] <= 6_000_000 < peaks[0] / 4
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    with pytest.raises(BudgetError, match=r"allow .*, or cut into smaller regions") as refused:
        RegionalAggregator(Grid(2, 2), "mean", local=local, memory="1MB")(x)
    assert refused.value.least is not None
    RegionalAggregator(Grid(2, 2), "mean", local=local, memory=refused.value.least)(x)


def test_random_layers_draw_the_same_twice() -> None:
    """Dropout in the recomputed forward is the forward's."""
    layer, x = (
        RegionalAggregator(TimeSlices(4), "stitch", local=nn.Dropout(0.5), memory="1MB"),
        torch.ones(2, 8, 3, requires_grad=True),
    )
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda x: RegionalAggregator(Grid(8, 2))(x), "8 regions .* 7 elements"),
        (
            lambda x: RegionalAggregator(Grid(2, 2), "mean", local=nn.Conv2d(2, 2, 3))(x),
            r"\(2, 2, 3\) for region 0 and \(2, 1, 3\)",
        ),
        (lambda x: RegionalAggregator(Grid(2, 2), "stitch", local=nn.Conv2d(2, 2, 3))(x), "keep the region's extent"),
        (lambda x: RegionalAggregator(Grid(2, 2), "stich"), "did you mean 'stitch'"),
        (lambda x: RegionalAggregator(Grid(2, 2), "sum", local=[torch.relu] * 3), "4 regions, local has 3"),
        (lambda x: RegionalAggregator(Grid(size=3), per_region=True, local=nn.Linear(2, 2)), "known number of regions"),
        (lambda x: RegionalAggregator(Grid(size=3), "weighted_mean"), 'WeightedMean\\("size"\\)'),
        (lambda x: RegionalAggregator(Grid(2, 2), WeightedMean((1, 2))), "2 weights were given for 4 regions"),
        (lambda x: RegionalAggregator(7), "a partition is a Grid"),
        (lambda x: RegionalAggregator(lambda x: [], "sum")(x), "gave no parts"),
        (lambda x: RegionalAggregator(Grid(2, 2, 2, axes=(0, 1, 2)))(x), "the batch and is not cut"),
        (lambda x: RegionalAggregator(Grid(2, 2), "sum", local=lambda x: x.sum(0))(x), "keeps the batch"),
        (lambda x: RegionalAggregator(Grid(2, 2))(x, torch.ones(3, 5, dtype=torch.bool)), r"\(3, 4\); got \(3, 5\)"),
        (lambda x: RegionalAggregator(TimeSlices(2), coordinates=True)(x), "needs a Grid"),
        (lambda x: RegionalAggregator(Grid(2, 2, axes=(2, 9)))(x), "to cut"),
    ],
)
def test_wrong_use(use: Callable[[Tensor], object], says: str) -> None:
    with pytest.raises(PartitionError, match=says):
        use(image())


# ------------------------------------------------------------------------------------ good citizens


def network() -> nn.Module:
    layer = RegionalAggregator(Grid(2, 2), "softmax", local=cnn(4))
    net = nn.Sequential(layer, nn.Linear(4, 1))
    net(image())
    return net


def test_state_dict() -> None:
    a, x = network(), image()
    b = nn.Sequential(RegionalAggregator(Grid(2, 2), "softmax", local=cnn(4)), nn.Linear(4, 1))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))


@pytest.mark.parametrize("per_region", [False, True])
def test_compile(per_region: bool) -> None:
    layer = RegionalAggregator(Grid(2, 2), "mean", local=cnn(), per_region=per_region)
    x = image()
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fast(x), layer(x))
    (a,) = torch.autograd.grad(fast(x).square().sum(), x)
    (b,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(a, b)


def test_export() -> None:
    net, x = network(), image().detach()
    program = torch.export.export(net.eval(), (x,))
    torch.testing.assert_close(program.module()(x), net(x))


def test_autocast() -> None:
    layer = RegionalAggregator(Grid(2, 2), "mean", local=cnn().float(), memory="1MB").float()
    x = image().float().detach().requires_grad_()
    layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


def test_distributed(tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(network())
        net(image()).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------ KMeans


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def own_network(layer: RegionalAggregator, k: int) -> Callable[[Tensor], Tensor]:
    """Region k's network."""
    if isinstance(layer.local, nn.ModuleList):
        return layer.local[k]
    state = {n: getattr(layer.local, n.replace(".", "/"))[k] for n, _ in layer.local.module.named_parameters()}
    return lambda x: torch.func.functional_call(layer.local.module, state, (x,))


@pytest.mark.parametrize("memory", [None, "200kB"])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("shape", [(23, 4), (3, 11, 4)])
def test_clusters_are_stitched(shape: tuple[int, ...], balanced: bool, separate: bool, memory: str | None) -> None:
    """Every sample through its region's network, result and gradient; absent regions and samples give zero."""
    local: Any = [expert() for _ in range(5)] if separate else expert()
    layer = RegionalAggregator(
        KMeans(5, balanced=balanced), "stitch", local=local, per_region=not separate, memory=memory
    ).eval()
    x, mask = torch.randn(shape, requires_grad=True), torch.rand(shape[:-1]) < 0.8
    present = torch.rand(shape[0], 5) < 0.7
    y = layer(x, present, mask)
    region = layer.clusters(x, mask).region.reshape(shape[:-1])
    there = mask & present.gather(1, region.reshape(shape[0], -1)).reshape(mask.shape)
    every = torch.stack([own_network(layer, k)(x) for k in range(5)])
    wanted = sum(torch.where((there & (region == k))[..., None], every[k], 0) for k in range(5))
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-13)
    leaves = [x, *layer.local.parameters()]
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in (y, wanted))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("memory", [None, "200kB"])
def test_balanced_regions_of_tokens_are_joined(name: str, memory: str | None) -> None:
    """Sets (batch, capacity, d), each its own network, then the aggregator's formula."""
    local = nn.Sequential(expert(), nn.Flatten(1), nn.Linear(6, 2))
    layer = RegionalAggregator(KMeans(4, balanced=True), name, local=local, per_region=True, memory=memory).eval()
    x = torch.randn(3, 12, 4, requires_grad=True)
    y = layer(x)
    region = layer.clusters(x).region.reshape(3, 12)
    order = layer.clusters(x, sets=True).take.reshape(4, 3, 3)
    assert (region.flatten()[order] == torch.arange(4).reshape(4, 1, 1)).all()
    parts = [own_network(layer, k)(x.reshape(36, 4)[order[k]]) for k in range(4)]
    wanted = parts_joined(name, layer, parts)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), [x, *layer.local.parameters()]) for out in (y, wanted))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def parts_joined(name: str, layer: RegionalAggregator, parts: list[Tensor]) -> Tensor:
    """`direct`, of regions of equal shares."""
    return torch.stack(parts).mean(0) if name == "weighted_mean" else direct(name, layer, parts)


@pytest.mark.parametrize("name", REDUCTIONS[:-1])
def test_unbalanced_regions_of_tokens_are_reduced(name: str) -> None:
    """Over all tokens that are there: merging in any grouping gives the same."""
    layer = RegionalAggregator(KMeans(4), name, local=expert(), per_region=True).eval()
    x, mask = torch.randn(1, 12, 4, requires_grad=True), torch.arange(12)[None] < 9
    y = layer(x, mask=mask)
    region = layer.clusters(x).region
    tokens = [own_network(layer, int(region[k]))(x[:, k]) for k in range(9)]
    wanted = parts_joined(name, layer, tokens)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), x) for out in (y, wanted))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("balanced", [False, True])
def test_weights_of_clusters(balanced: bool) -> None:
    """Learned, given; empty places of sets do not count, regions without a token are absent."""
    x = torch.randn(2, 7, 4)
    for over in (WeightedMean(), WeightedMean((1.0, 2, 0, 3))):
        local = (lambda s: s.sum(1)) if balanced else None
        layer = RegionalAggregator(KMeans(4, balanced=balanced), over, local=local).eval()
        layer(x)
        region = layer.clusters(x).region.reshape(2, 7)
        if over.weights == "learned":
            layer.log_weight.data.normal_()
        w = layer.log_weight.exp() if over.weights == "learned" else torch.tensor(over.weights)
        onto = torch.nn.functional.one_hot(region, 4).double()
        sums, loads = torch.einsum("bnr,bnd->brd", onto, x), onto.sum(1)
        share = w * loads if over.weights == "learned" or not balanced else w * (loads > 0)
        values = sums if balanced else sums / loads.clamp_min(1)[..., None]
        wanted = (share[..., None] * values).sum(1) / share.sum(1, keepdim=True)
        torch.testing.assert_close(layer(x), wanted)


def test_networks_with_buffers_for_clusters() -> None:
    """In a loop, region by region."""
    local = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    layer, x = RegionalAggregator(KMeans(3), "stitch", local=local, per_region=True).eval(), torch.randn(20, 4)
    y = layer(x)
    region = layer.clusters(x).region
    for k in range(3):
        torch.testing.assert_close(y[region == k], own_network(layer, k)(x[region == k]))


def test_centres_of_clusters_follow() -> None:
    """As those of RegionExperts: `adapt`, the moving average, the same under memory."""
    x = torch.randn(40, 4)
    layers = [RegionalAggregator(KMeans(3, decay=0.5), "stitch", local=expert(), memory=m) for m in (None, "1MB")]
    for layer in layers:
        layer.adapt(x)
        start = layer.clusters.centres.clone()
        layer(x)
        assert not torch.equal(layer.clusters.centres, start)
    torch.testing.assert_close(layers[0].clusters.centres, layers[1].clusters.centres)


def test_compile_and_export_clusters() -> None:
    for kind in (KMeans(3), KMeans(3, balanced=True)):
        layer, x = RegionalAggregator(kind, "stitch", local=expert(), per_region=True).eval(), torch.randn(2, 9, 4)
        y = layer(x)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), y)
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), y)


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda x: RegionalAggregator(KMeans(2), "mean", local=expert())(x[0]), "lies in one region .* use stitch"),
        (lambda x: RegionalAggregator(KMeans(2), "concat", local=expert())(x), "differ in size: use KMeans.*balanced"),
        (lambda x: RegionalAggregator(KMeans(2), torch.cat, local=expert())(x), "Call takes one result of each region"),
        (
            lambda x: RegionalAggregator(KMeans(2, balanced=True), "stitch", local=nn.Flatten(1), per_region=True)(x),
            "keep them: it was given .3, 4. samples of each region and gave shape .3, 16.",
        ),
        (lambda x: RegionalAggregator(KMeans(2), coordinates=True), "needs a Grid"),
        (lambda x: RegionalAggregator(KMeans(2), "stitch", local=[expert()]), "2 regions, local has 1"),
        (lambda x: RegionalAggregator(KMeans(2), "stitch")(x, torch.ones(3, 5, dtype=torch.bool)), r"\(3, 2\); got"),
        (lambda x: RegionalAggregator(KMeans(2, balanced=True, capacity=3), "stitch")(x), "at least 4"),
        (lambda x: RegionalAggregator(Grid(2, 2)).adapt(x), "fits the centres of KMeans"),
        (lambda x: RegionalAggregator(Grid(2, axes=(1,)))(x, mask=x[..., 0] > 0), "takes present="),
    ],
)
def test_wrong_use_of_clusters(use: Callable[[Tensor], object], says: str) -> None:
    with pytest.raises(PartitionError, match=says):
        use(torch.randn(3, 8, 4))


# --------------------------------------------------------------------------------------- BlockDense


@pytest.mark.parametrize("blocks", [Blocks(2, 2), Blocks(1, 3), Blocks(4, 1), Blocks(5, 5)])
def test_blocks_are_the_uncut_layer(blocks: Blocks) -> None:
    whole, x = nn.Linear(5, 5), torch.randn(3, 4, 5, requires_grad=True)
    cut = BlockDense.from_dense(whole, blocks)
    torch.testing.assert_close(cut(x), whole(x), rtol=1e-13, atol=1e-13)
    a, b = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (cut, whole))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    cut(x).square().sum().backward()
    (dense,) = torch.autograd.grad(whole(x).square().sum(), whole.weight)
    for i, (r, s) in enumerate(cut.rows):
        for j, (c, d) in enumerate(cut.columns):
            torch.testing.assert_close(cut.block(i, j).grad, dense[c:d, r:s].T)


def test_blocks_in_files(tmp_path: Path) -> None:
    """One block at a time need be in memory: the byte counter sees the output, not the weights."""
    whole, x = nn.Linear(512, 512), torch.randn(2, 512)
    BlockDense.from_dense(whole, Blocks(4, 4), store=tmp_path)
    again = BlockDense(512, Blocks(4, 4), features=512, store=tmp_path, use_bias=False)
    with torch.no_grad(), measure() as used:
        y = again(x)
    torch.testing.assert_close(y, x @ whole.weight.T)
    assert used.peak < 100_000 < 512 * 512 * 8
    with pytest.raises(InputError, match="bytes, block"):
        BlockDense(512, Blocks(2, 4), features=512, store=tmp_path)


def test_blocks_take_the_width_of_the_first_input() -> None:
    layer = BlockDense(6, Blocks(2, 3), activation="relu")
    y = layer(torch.randn(2, 7))
    assert y.shape == (2, 6)
    assert (y >= 0).all()
    other = BlockDense(6, Blocks(2, 3), activation="relu")
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 7)
    assert torch.equal(other(x), layer(x))
    with pytest.raises(InputError, match="made for 7 features"):
        layer(torch.randn(2, 8))
    with pytest.raises(PartitionError, match="did you mean 'relu'"):
        BlockDense(6, Blocks(2, 3), activation="rely")
    with pytest.raises(PartitionError, match="9 regions"):
        BlockDense(6, Blocks(9, 1), features=5)


def test_functions_and_modules_in_one_list() -> None:
    """The modules' parameters are found."""
    net = RegionalAggregator(TimeSlices(2), "sum", local=[torch.relu, nn.Linear(4, 4)])
    assert len(list(net.parameters())) == 2
    x = torch.randn(3, 6, 4)
    torch.testing.assert_close(net(x), torch.relu(x[:, :3]) + net.local[1](x[:, 3:]))


def test_running_statistics_count_each_region_once_under_memory() -> None:
    """Neither the measurement nor the recomputation in backward moves them."""

    def made(memory: str | None) -> nn.Module:
        torch.manual_seed(0)
        local = nn.Sequential(nn.Flatten(1), nn.BatchNorm1d(12))
        return RegionalAggregator(TimeSlices(2), "sum", local=[local, nn.Flatten(1)], memory=memory)

    x = torch.randn(3, 6, 4)
    plain, small = made(None), made("1MB")
    for net in (plain, small):
        net(x).sum().backward()
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(small.get_buffer(name), buffer)


def test_nan_in_an_absent_region_reaches_no_gradient() -> None:
    """Scores are made from what is there."""
    net = RegionalAggregator(TimeSlices(2), "softmax", local=lambda s: s.mean(1))
    x = torch.randn(2, 6, 4)
    net(x)
    x[:, 3:] = torch.nan
    net(x, torch.tensor([[True, False]] * 2)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
