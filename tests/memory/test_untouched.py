"""What the untouched network takes: found on fake tensors, held against the counter; where no plan saves, it is the plan.

RANGER_EXAMPLES sets the number of random cases, RANGER_SEED the first of them, as in `test_random.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ranger_nn
from ranger_nn import errors
from ranger_nn.planning.search import with_margin
from ranger_nn.torch import untouched
from ranger_nn.torch.one_call import Call
from ranger_nn.torch.untouched import Untouched, untouched_peak
from tests.memory.test_promise import peak, work_of
from tests.memory.test_random import cases, draw


@pytest.mark.parametrize("seed", cases())
def test_of_random_layers(seed: int) -> None:
    """Never less than what is measured."""
    case = draw(seed)
    assert case is not None
    x, model = case.input(), case.model
    grad = case.mode != "inference" and (x.requires_grad or any(p.requires_grad for p in model.parameters()))
    with case.context():
        try:
            measured = peak(work_of(model, x, grad))
        except NotImplementedError as error:  # of some types on the CPU
            pytest.skip(str(error))
        found = untouched_peak(model, (x,), {}, grad)
    assert found is not None and measured <= with_margin(found)


class Block(nn.Module):
    """Attention and an MLP, with what surrounds them: nothing here is cut with a gain in training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.read, self.write = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.read(self.norm(x)).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        scores = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1)
        x = x + self.write((scores @ v).transpose(1, 2).reshape(x.shape))
        return x + self.mlp(x)


def test_a_step_of_training_takes_no_more_than_untouched() -> None:
    """The network is called as it is: the very bytes, and the numbers, with gradients of gradients."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()), torch.randn(2, 96, 32, requires_grad=True)
    small = ranger_nn.regionalize(model)
    plan = small.plan_for(x)
    assert plan.sweeps == () and "as it is" in plan.whole[0]
    assert peak(work_of(small, x, True)) == peak(work_of(model, x, True)) == plan.projected
    (first,) = torch.autograd.grad(small(x).sum(), x, create_graph=True)
    (wanted,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    torch.testing.assert_close(first, wanted, rtol=0, atol=0)
    assert "as it is" in str(plan)


def test_a_budget_of_what_it_takes_untouched_is_enough() -> None:
    """And one byte less is refused, or met by a plan."""
    model, x = nn.Sequential(Block(), Block()), torch.randn(2, 96, 32, requires_grad=True)
    projected = ranger_nn.plan(model, x, training=True).projected
    assert ranger_nn.regionalize(model, projected).plan_for(x).projected <= projected
    with pytest.raises(errors.BudgetError) as error:
        ranger_nn.plan(model, x, 1000, training=True)
    assert (error.value.least or 0) <= projected


class Scaled(nn.Module):
    """A number as a factor: autograd keeps it as a tensor that no operator makes."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x * 0.5) * 0.25


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "depthwise volume": (lambda: nn.Conv3d(8, 8, 3, padding=1, groups=8), (1, 8, 8, 12, 12)),
    "patches": (lambda: nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.Flatten(2), nn.Linear(36, 5)), (1, 3, 48, 48)),
    "heavy weights": (lambda: nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.ReLU()), (2, 128, 3, 3)),
    "up and down": (
        lambda: nn.Sequential(nn.Conv2d(3, 9, 4, 2), Scaled(), nn.ConvTranspose2d(9, 3, 4, 2)),
        (1, 3, 34, 34),
    ),
    "signal": (lambda: nn.Sequential(nn.Conv1d(4, 16, 5), Scaled(), nn.Conv1d(16, 16, 5)), (2, 4, 500)),
    "digits": (
        lambda: nn.Sequential(nn.Conv2d(1, 6, 5), nn.MaxPool2d(2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(864, 10)),
        (3, 1, 28, 28),
    ),
    "transformer": (Block, (2, 33, 32)),
}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", NETS)
def test_counted_to_the_byte(name: str, training: bool) -> None:
    """A budget of what the untouched network was measured to take is enough, and none is asked for above it."""
    torch.manual_seed(0)
    make, shape = NETS[name]
    model, x = make(), torch.randn(shape, requires_grad=training)
    measured = peak(work_of(model, x, training))
    told = Untouched(model, (x,), {}, training)
    assert told.counted(0, 1 << 40) == measured
    assert told.counted(measured, 1 << 40) == measured
    allowed = ranger_nn.plan(model, x, measured, training=training)
    assert allowed.projected <= measured
    small = ranger_nn.regionalize(model, measured)
    assert peak(work_of(small, x, training)) <= measured
    with pytest.raises(errors.BudgetError) as error:
        ranger_nn.plan(model, x, 1, training=training)
    least = error.value.least or 0
    assert least <= measured
    assert ("gains nothing" in str(error.value)) == (least == measured)


def test_operators_are_called_only_where_they_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where a plan fits, nor where the network certainly needs more; nor on tensors larger than is allowed."""
    called: list[Call] = []

    def counted(call: Call, left_out: bool = False) -> None:
        called.append(call)

    monkeypatch.setattr(Call, "counted", counted)
    model, x = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 3, 3)), torch.randn(1, 3, 256, 256)
    ranger_nn.plan(model, x, ranger_nn.plan(model, x).projected // 2)
    with pytest.raises(errors.BudgetError):
        ranger_nn.plan(model, x, 1)
    assert not called
    monkeypatch.setattr(untouched, "ROOM", 0)
    told = Untouched(model, (x,), {}, False)
    least = told.counted(1, 1 << 40)
    assert not called and least is not None and least >= (told.bound() or 0)
    assert told.counted(12 * x.nbytes, 1 << 40) is not None
    assert called and all(c.nbytes <= 12 * x.nbytes for c in called)


def test_nothing_is_left_behind() -> None:
    """Generators, running statistics, gradients and the modules' fields are as before."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 5))
    x = torch.randn(2, 3, 8, 8)
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    fields = [dict(m.__dict__) for m in model.modules()]
    assert untouched_peak(model, (x,), {}, True)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert fields == [dict(m.__dict__) for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_where_it_cannot_be_told() -> None:
    """A kernel that is a network inside, a tensor that no module registers, a regional module inside."""
    fast = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    with torch.no_grad():
        assert untouched_peak(fast, (torch.randn(2, 8, 16),), {}, False) is None

    class Prompt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.given = [torch.randn(8, requires_grad=True)]

        def forward(self, x: Tensor) -> Tensor:
            return x * self.given[0]

    prompt = Prompt()
    assert untouched_peak(prompt, (torch.randn(2, 8),), {}, True) is None
    assert prompt.given[0].grad is None
    inside = nn.Sequential(ranger_nn.regionalize(nn.Conv2d(3, 3, 3)))
    assert untouched_peak(inside, (torch.randn(1, 3, 8, 8),), {}, False) is None
