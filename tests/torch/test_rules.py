"""Operators that have a region rule: they are cut, and give the untouched numbers and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ranger_nn
from ranger_nn.planning.report import Plan
from tests.nets import between
from tests.support import compare, random_inputs

SHAPE = (1, 3, 13, 11)


class Products(nn.Module):
    """Channels mixed by every form of a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
        self.both = nn.Bilinear(6, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        t = x.permute(0, 2, 3, 1)
        flat = t.reshape(-1, c)
        y = torch.addmm(self.b, flat, self.w) + torch.mm(flat, self.w.T) + torch.mv(flat, self.b)[:, None]
        y = y.reshape(t.shape) + torch.tensordot(t, self.w, dims=([3], [1])) + self.both(t, t.sin()) + t @ self.w
        y = y + torch.einsum("...c,dc->...d", t, self.w) + (t @ self.b)[..., None] + torch.inner(t, self.w)
        rows = x.reshape(n, c, h * w)
        z = torch.bmm(self.w[None], rows) + torch.baddbmm(self.b[None, :, None], self.w.T[None], rows) + self.w @ rows
        return (
            y.permute(0, 3, 1, 2)
            + z.reshape(x.shape)
            + torch.addbmm(self.b[:, None], self.w[None], rows).reshape(x.shape)
        )


def pointwise(x: Tensor) -> Tensor:
    """What ATen does not tag, and what is composite."""
    turned = torch.polar(x.abs() + 1, x)
    same = torch.isclose(x, x.round(), atol=0.2) & torch.greater(x, 0) & torch.isreal(x)
    y = F.hardswish(x) + F.logsigmoid(x) + torch.rsub(x, 1) + torch.special.ndtr(x) + torch.divide(x, 2) + turned.real
    return (
        y * torch.logical_not(same)
        + torch.ones_like(x) * x.new_full(x.shape, 0.5)
        + torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)
    )


def scans(x: Tensor) -> Tensor:
    """Along channels and along columns, while rows are cut."""
    y = x.cumprod(1) + x.logcumsumexp(3) + x.cummax(1).values + x.sort(1, descending=True).values
    y = y + torch.fft.irfft(torch.fft.rfft(x, dim=3) * 0.5, n=x.shape[3], dim=3) + F.channel_shuffle(x, 2)
    return y + x.topk(1, 1).values + x.fliplr() + torch.linalg.cross(x[:, :3], x[:, 3:], dim=1).repeat(1, 2, 1, 1)


def reductions(x: Tensor) -> Tensor:
    """Some over channels, some over what is cut."""
    spread, centre = torch.std_mean(x, (2, 3), keepdim=True)
    y = (x - centre) / (spread + x.std((1, 2, 3), keepdim=True)) + torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
    y = (
        y
        + x.median(1, keepdim=True).values
        + x.nansum(1, keepdim=True)
        + (x > 0).any(1, keepdim=True)
        + x.norm(dim=1)[:, None]
    )
    far = x.flatten(2).max(2).values[..., None, None] + (x > 0).sum((2, 3), keepdim=True) + F.mse_loss(x, x.sin())
    return y + far + torch.var_mean(x, 1, keepdim=True)[1] + F.huber_loss(x, x.cos(), reduction="none")


def lookups(x: Tensor) -> Tensor:
    """Indices that are constant, and such as depend on the values."""
    places = x.argmax(1, keepdim=True)
    y = x[:, [2, 0, 5, 5, 1, 1]] + x.index_select(1, torch.tensor([0, 0, 1, 3, 4, 2])) + x.gather(1, places)
    where = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 13), torch.linspace(-1, 1, 11), indexing="ij"), -1)
    moved = F.grid_sample(x, where[None].to(x) + 0.1 * x.permute(0, 2, 3, 1)[..., :2].tanh(), align_corners=False)
    kinds = F.one_hot(places[:, 0], 6).permute(0, 3, 1, 2) + torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0]).to(x))
    return y + kinds + moved + torch.take_along_dim(x, places, 1)


def globe(x: Tensor) -> Tensor:
    """Columns wrap, rows do not."""
    for _ in range(2):
        x = F.pad(x, (2, 1, 0, 0), mode="circular")
        x = torch.roll(F.avg_pool2d(F.pad(x, (0, 0, 1, 1)), (3, 4), 1), 3, 3)
    return torch.cat([x[..., -1:], x, x[..., :1]], -1)


def pools(x: Tensor) -> Tensor:
    """Windows as large as the map and larger; rows gain as many as they like."""
    y = F.avg_pool2d(x, 29, 1, 14) + F.avg_pool2d(x, 29, 1, 14, count_include_pad=False) + F.max_pool2d(x, 29, 1, 14)
    far = F.avg_pool2d(x, 40, 60, 20, divisor_override=3) + F.max_pool2d(x, (13, 11))
    far = far + F.adaptive_max_pool2d(x, 1) + F.avg_pool2d(x, 40, 60, 15, count_include_pad=False)
    return y + far + F.adaptive_avg_pool2d(x, (13, 1)) + F.adaptive_max_pool2d(x, (26, 11))[:, :, ::2]


KINDS: dict[str, Callable[[], nn.Module]] = {
    "products": lambda: between(Products()),
    **{f.__name__: (lambda f=f: between(f)) for f in (pointwise, scans, reductions, lookups, globe, pools)},
}


@pytest.mark.parametrize("schedule", ["slide", "tile"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_cut(kind: str, schedule: str) -> None:
    """Numbers, gradients, and nothing stays whole along the rows."""
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    model(torch.randn(SHAPE))
    (x,) = random_inputs((SHAPE,))
    small = compare(model.double(), lambda m: ranger_nn.regionalize(m, regions=(3,), schedule=schedule), (x,))
    plan = small.plan_for(x.requires_grad_())
    assert [w for w in plan.whole if "grid_sampler" not in w] == []  # what is sampled is finished before
    assert max(row.regions for row in plan.sweeps) == 5


def test_of_equal_maxima_the_first_takes_the_gradient() -> None:
    """Pools and `max` give the gradient to one element, wherever the regions' borders lie."""

    class Ties(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            pools = [F.adaptive_max_pool2d(x, 1), F.max_pool2d(x, (13, 11)), F.max_pool2d(x, 29, 1, 14)]
            return [*pools, F.adaptive_max_pool2d(x, (4, 3)), x.flatten(2).max(2).values, x.flatten(2).min(2).values]

    x = random_inputs((SHAPE,))[0].round().clamp(-1, 1)
    for regions, schedule in (((3,), "slide"), ((4, 5), "tile")):
        compare(Ties(), lambda m, r=regions, s=schedule: ranger_nn.regionalize(m, regions=r, schedule=s), (x,))


def test_a_product_is_cut_along_its_larger_side() -> None:
    """A few queries times the whole map: the map is cut, whichever side it stands on."""

    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.stem = nn.Parameter(torch.randn(1, 5, 6)), nn.Conv2d(3, 6, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bqc,bchw->bqhw", self.queries * x.mean(), self.stem(x)).exp()

    plan = ranger_nn.plan(Masks(), (1, 3, 32, 32), regions=(8,))
    assert plan.whole == ()


def test_what_is_lost_is_said() -> None:
    """In the table, and as a number in the JSON."""
    spectrum = lambda x: torch.fft.ifft2(torch.fft.fft2(x)).real  # noqa: E731
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(between(spectrum)[:2], nn.Conv2d(6, 4, 3, padding=1), *layers)
    plan = ranger_nn.plan(model, (1, 3, 16, 16), regions=(8,))
    assert "fft_fft2_0" in plan.whole[0]
    assert "14 operators after it are not cut" in str(plan)
    assert Plan.from_json(plan.to_json()).uncut == 14


def test_pools_larger_than_their_map_are_projected_by_what_they_take() -> None:
    """No border of the kernel's size is filled."""
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.AvgPool2d(513, 1, 256), nn.Conv2d(64, 4, 1))
    assert ranger_nn.plan(model, (1, 3, 16, 16), regions=(4,)).projected < 40 * 64 * 16 * 16 * 4


class Noisy(nn.Module):
    """Attention with dropout, and a random slope: both draw numbers, and pass a gradient on."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        t = x.flatten(2).mT
        return F.scaled_dot_product_attention(t, t, t, dropout_p=0.5), F.rrelu(x - 1, 0.1, 0.9, training=True)


def test_backward_meets_the_random_numbers_of_forward() -> None:
    """The gradient is that of the very numbers which forward drew: a difference quotient with the same seed tells."""
    x, step = random_inputs((SHAPE,))[0], 1e-6 * random_inputs((SHAPE,), seed=3)[0]
    small = ranger_nn.regionalize(Noisy(), regions=(3,), schedule="slide")

    def value(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        first, second = small(x)
        return (first**2).sum() + (second**2).sum()

    given = x.clone().requires_grad_()
    value(given).backward()
    assert given.grad is not None
    moved = (value((x + step).requires_grad_()) - value((x - step).requires_grad_())).item() / 2
    assert moved == pytest.approx((given.grad * step).sum().item(), rel=1e-5)


def test_a_chain_keeps_the_channels_of_its_members_whole() -> None:
    """Of a matrix the channels are the last dimension: a per-channel slope in a fused chain must not see a part of them."""
    model = nn.Sequential(nn.Tanh(), nn.PReLU(5), nn.Tanh())
    for schedule in ("slide", "tile"):
        compare(
            model.double(),
            lambda m, s=schedule: ranger_nn.regionalize(m, regions=(2,), schedule=s),
            random_inputs(((7, 5),)),
        )


def test_causal_attention_has_its_gradient() -> None:
    """An operator that could draw random numbers, and draws none here, passes the gradient on."""

    class Causal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            t = x.flatten(2).mT
            return F.scaled_dot_product_attention(t, t.sin(), t, is_causal=True).mT.view_as(x)

    model = between(Causal())
    model(torch.randn(SHAPE))
    compare(model.double(), lambda m: ranger_nn.regionalize(m, regions=(3,), schedule="slide"), random_inputs((SHAPE,)))
