"""SlicedRNN in PyTorch: by hand, fillings and lengths that change nothing, denormals, wrong use, good citizens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ranger_nn import InputError, PartitionError
from ranger_nn.layers.slices import Level, levels
from ranger_nn.torch import SlicedRNN
from ranger_nn.torch.layers.sliced_rnn import _flushing


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_hand(net: SlicedRNN, x: Tensor, level: int = 0) -> Tensor:
    """(time, features) -> (state,): slice by slice, one network call each, nothing filled up."""
    network, last = net.levels[level], level == len(net.slices) - 1
    parts = [x] if last else x.split(net.slices[level])
    states = [network(part[None])[0][0, -1] for part in parts]
    return states[0] if last else by_hand(net, torch.stack(states), level + 1)


CELLS: dict[str, Callable[[], nn.RNNBase]] = {
    "gru": lambda: nn.GRU(3, 4, batch_first=True),
    "lstm": lambda: nn.LSTM(3, 4, batch_first=True, proj_size=2),
    "rnn": lambda: nn.RNN(3, 4, num_layers=2, nonlinearity="relu", bias=False, batch_first=True),
}


@pytest.mark.parametrize("name", CELLS)
@settings(deadline=None, max_examples=15)
@given(steps=st.integers(1, 40), slices=st.lists(st.integers(1, 6), min_size=1, max_size=3), data=st.data())
def test_equals_an_explicit_loop(name: str, steps: int, slices: list[int], data: st.DataObject) -> None:
    """Each sample of its own length, forward and gradient."""
    net = SlicedRNN(CELLS[name](), slices)
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, steps), min_size=2, max_size=2)))
    x = torch.randn(2, steps, 3, requires_grad=True)
    ours = net(x, lengths)
    theirs = torch.stack([by_hand(net, x[i, :n]) for i, n in enumerate(lengths.tolist())])
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    wanted = [x, *net.parameters()]
    zero = torch.zeros(())
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), wanted, allow_unused=True) for y in (ours, theirs))):
        torch.testing.assert_close(
            zero if a is None else a,
            zero.expand_as(a) if b is None and a is not None else (zero if b is None else b),
            rtol=1e-10,
            atol=1e-12,
        )


def test_one_level_is_the_plain_network() -> None:
    gru, x = nn.GRU(3, 4, batch_first=True), torch.randn(2, 11, 3)
    assert torch.equal(SlicedRNN(gru, (7,))(x), gru(x)[0][:, -1])


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.LSTMCell, nn.RNNCell])
def test_cells_are_their_modules(cell: type) -> None:
    module = {nn.GRUCell: nn.GRU, nn.LSTMCell: nn.LSTM, nn.RNNCell: nn.RNN}[cell]
    a, b = SlicedRNN(cell(3, 4), (4, 3)), SlicedRNN(module(3, 4, batch_first=True), (4, 3))
    b.load_state_dict({k + "_l0": v for k, v in a.state_dict().items()})
    x, lengths = torch.randn(2, 10, 3), torch.tensor([10, 5])
    torch.testing.assert_close(a(x, lengths), b(x, lengths))


def test_time_first_shared_and_made() -> None:
    x = torch.randn(2, 10, 4)
    shared = SlicedRNN(nn.GRU(4, 4), (3, 2), shared=True)
    assert len(list(shared.parameters())) == 4
    first = SlicedRNN(shared.levels[0], (3, 2), shared=True)
    torch.testing.assert_close(first(x.transpose(0, 1)), shared(x.transpose(0, 1)))
    made = SlicedRNN(lambda width: nn.GRU(width, 5, batch_first=True), (3, 2), features=4)
    assert [n.input_size for n in made.levels] == [4, 5]
    assert made(x).shape == (2, 5)


def test_denormals_are_flushed_in_backward_only() -> None:
    """Long slices: gradients that fade count as zero, and the mode is put back."""
    torch.set_default_dtype(torch.float32)
    gru = nn.GRU(2, 4, batch_first=True)
    with torch.no_grad():
        gru.bias_hh_l0.zero_()
        gru.bias_ih_l0[4:8] = -2.0  # the update gate: old states fade fast
    x = torch.randn(1, 400, 2)
    tiny = torch.finfo(torch.float32).tiny
    grads = []
    for flush in (False, True):
        leaf = x.clone().requires_grad_()
        SlicedRNN(gru, (400,), flush_denormals=flush)(leaf).sum().backward()
        assert leaf.grad is not None
        assert not _flushing()
        grads.append(leaf.grad)
    denormal = [((g != 0) & (g.abs() < tiny)).sum().item() for g in grads]
    assert denormal[0] > 0
    assert denormal[1] == 0
    assert (grads[0] - grads[1]).abs().max() <= 100 * tiny


def test_levels() -> None:
    """The drawing in the module's docstring."""
    assert levels(10, (3, 2, 9)) == [Level(3, 4, 2), Level(2, 2, 0), Level(2, 1, 0)]
    assert levels(32768, (32, 32, 32)) == [Level(32, 1024, 0), Level(32, 32, 0), Level(32, 1, 0)]


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda: SlicedRNN(nn.GRU(3, 4), (0, 2)), "positive integers"),
        (lambda: SlicedRNN(nn.GRU(3, 4), ()), "positive integers"),
        (lambda: SlicedRNN(nn.GRU(3, 4, bidirectional=True)), "one direction"),
        (lambda: SlicedRNN(nn.Linear(3, 4)), "got Linear"),
        (lambda: SlicedRNN(3), "got 3"),
        (lambda: SlicedRNN(lambda width: nn.GRU(width, 2)), "give features"),
        (lambda: SlicedRNN(nn.GRU(3, 4), shared=True), "input_size is 3, the state 4"),
        (lambda: SlicedRNN(nn.GRU(3, 4, batch_first=True))(torch.zeros(2, 0, 3)), "at least one step"),
        (
            lambda: SlicedRNN(nn.GRU(3, 4, batch_first=True))(torch.zeros(2, 5, 3), torch.tensor([5, 6])),
            "from 1 to the 5",
        ),
    ],
)
def test_wrong_use(use: Callable[[], object], says: str) -> None:
    with pytest.raises((PartitionError, InputError), match=says):
        use()


def test_citizen() -> None:
    """state_dict, compile, export, autocast."""
    net, x = SlicedRNN(nn.GRU(3, 4, batch_first=True), (4, 4)), torch.randn(2, 13, 3)
    other = SlicedRNN(nn.GRU(3, 4, batch_first=True), (4, 4))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))
    torch.testing.assert_close(torch.compile(net, backend="eager")(x), net(x))
    net.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x.float())
    torch.testing.assert_close(y.float(), net(x.float()), rtol=0.05, atol=0.05)
