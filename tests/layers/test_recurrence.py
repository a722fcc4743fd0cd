"""Linear recurrences in PyTorch: against the step loop in float64, streams, masks, good citizens, wrong use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ranger_nn import InputError, PartitionError
from ranger_nn.torch import LRU, GatedLinearAttention, MinGRU, linear_scan


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def loop(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """Step by step."""
    states = []
    for decay, value in zip(a.unbind(1), b.unbind(1)):
        h = decay * h + value
        states.append(h)
    return torch.stack(states, 1)


def close(one: Any, other: Any, tolerance: float = 1e-11) -> None:
    """Relative to the largest number."""
    for p, q in zip(one, other):
        assert p.shape == q.shape
        assert (p - q).abs().max() <= tolerance * q.abs().max().clamp_min(1e-300)


DECAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "in (0, 1)": lambda a: a.abs().clamp(max=1),
    "exactly 0": lambda a: a * (a.real > 0.2),
    "all 0": lambda a: a * 0,
    "tiny": lambda a: a * 1e-200,
    "negative": lambda a: -a.abs().clamp(max=1),
    "above 1": lambda a: a * 0 + 1.01,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("decay", DECAYS)
@settings(deadline=None, max_examples=8)
@given(
    steps=st.one_of(st.integers(1, 40), st.sampled_from([64, 65, 257, 700])),
    chunk=st.sampled_from([None, 1, 3, 16, 1000]),
    seed=st.integers(0, 9),
)
def test_equals_the_step_loop(dtype: torch.dtype, decay: str, steps: int, chunk: int | None, seed: int) -> None:
    """Forward and gradient, any length, any chunk."""
    g = torch.Generator().manual_seed(seed)
    a = DECAYS[decay](torch.randn(2, steps, 3, generator=g, dtype=dtype)).to(dtype).requires_grad_()
    b = torch.randn(2, steps, 3, generator=g, dtype=dtype, requires_grad=True)
    start = torch.randn(2, 3, generator=g, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, steps, 3, generator=g, dtype=dtype)
    ours, theirs = linear_scan(a, b, start, chunk), loop(a, b, start)
    wanted = (a, b, start)
    close([ours], [theirs])
    close(torch.autograd.grad(ours, wanted, grad), torch.autograd.grad(theirs, wanted, grad))


def test_float32_is_within_1e_5_of_the_float64_loop() -> None:
    a, b, grad = torch.rand(1, 5000, 4), torch.randn(1, 5000, 4), torch.randn(1, 5000, 4)
    results = []
    for scan, dtype in ((linear_scan, torch.float32), (loop, torch.float64)):
        x, y = a.float().to(dtype).requires_grad_(), b.float().to(dtype).requires_grad_()
        h = scan(x, y, torch.zeros(1, 4, dtype=dtype))
        results.append([h, *torch.autograd.grad(h, (x, y), grad.float().to(dtype))])
    close([v.double() for v in results[0]], results[1], 1e-5)


def test_gradients_of_gradients() -> None:
    a, b = (torch.randn(1, 7, 2, requires_grad=True) for _ in range(2))
    start = torch.randn(1, 2, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda *v: linear_scan(*v, 3), (a, b, start))


def test_other_layouts() -> None:
    """Strides of every kind, a gradient without memory, trailing axes, no initial state."""
    a = torch.rand(3).expand(2, 100, 3)
    b = torch.randn(100, 2, 3).transpose(0, 1).requires_grad_()
    close([linear_scan(a, b)], [loop(a, b, torch.zeros(2, 3))])
    linear_scan(a, b).sum().backward()
    assert b.grad is not None
    close([b.grad], [torch.autograd.grad(loop(a, b, torch.zeros(2, 3)).sum(), b)[0]])
    many = torch.rand(2, 70, 3, 2, 2)
    close([linear_scan(many, many)], [loop(many, many, torch.zeros(2, 3, 2, 2))])
    assert linear_scan(torch.rand(2, 70), torch.rand(2, 70)).shape == (2, 70)
    assert linear_scan(torch.rand(0, 70, 3), torch.rand(0, 70, 3)).shape == (0, 70, 3)


def test_half_precision_accumulates_in_float32() -> None:
    a, b = torch.full((1, 4096, 1), 1.0, dtype=torch.bfloat16), torch.ones(1, 4096, 1, dtype=torch.bfloat16)
    y = linear_scan(a, b)
    assert y.dtype == torch.bfloat16
    assert y[0, -1, 0] == 4096  # in bfloat16 the sum stops at 256


def test_backward_keeps_a_and_h() -> None:
    kept = []
    a, b = (torch.rand(1, 500, 4, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_scan(a, b)
    assert sum(t.numel() for t in kept) == 2 * a.numel() + 4


def min_gru(net: MinGRU, x: Tensor, h: Tensor) -> Tensor:
    """Feng et al. 2024, section 3.1, step by step."""
    states = []
    for step in x.unbind(1):
        gate, candidate = net.input(step).chunk(2, -1)
        h = (1 - gate.sigmoid()) * h + gate.sigmoid() * candidate
        states.append(h)
    return torch.stack(states, 1)


def lru(net: LRU, x: Tensor, state: Tensor) -> Tensor:
    """Orvieto et al. 2023, section 3, with B and C as complex matrices."""
    n, h = net.units, torch.view_as_complex(state)
    eigenvalues = torch.exp(torch.complex(-net.nu.exp(), net.theta.exp()))
    b = torch.complex(net.input.weight[:n], net.input.weight[n:])
    c = torch.complex(net.output.weight[:, :n], net.output.weight[:, n:])
    outputs = []
    for step in x.unbind(1):
        h = eigenvalues * h + net.gamma.exp() * (step.to(b.dtype) @ b.T)
        outputs.append((h @ c.T).real + net.skip * step)
    return torch.stack(outputs, 1)


def attention(net: GatedLinearAttention, x: Tensor, state: Tensor) -> Tensor:
    """Yang et al. 2024, equation 3; Katharopoulos et al. 2020, equations 18 to 20."""
    outputs = []
    for step in x.unbind(1):
        q, k, v = (net._split(t[:, None])[:, :, 0] for t in net.input(step).split([net.keys, net.keys, net.units], -1))
        if net.gated:
            alpha = net._split(net.decay(step)[:, None])[:, :, 0].sigmoid() ** (1 / 16)
            state = alpha[..., None] * state + k[..., None] * v[..., None, :]
            o = (q[..., None] * state).sum(-2) / q.shape[-1] ** 0.5
            outputs.append(net.output(nn.functional.silu(net.gate(step)) * net.norm(o).flatten(1)))
        else:
            q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
            state = state + k[..., None] * nn.functional.pad(v, (0, 1), value=1.0)[..., None, :]
            o = (q[..., None] * state).sum(-2)
            outputs.append(net.output((o[..., :-1] / o[..., -1:]).flatten(1)))
    return torch.stack(outputs, 1)


LAYERS: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "minGRU": (lambda **k: MinGRU(8, features=6, **k), min_gru),
    "LRU": (lambda **k: LRU(8, features=6, **k), lru),
    "gated attention": (lambda **k: GatedLinearAttention(8, features=6, heads=2, **k), attention),
    "linear attention": (lambda **k: GatedLinearAttention(8, features=6, heads=2, gated=False, **k), attention),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("steps", "chunk"), [(1, None), (7, 4), (50, 16), (150, None), (40, 12)])
def test_layers_equal_their_papers(name: str, steps: int, chunk: int | None) -> None:
    make, paper = LAYERS[name]
    net, x = make(chunk=chunk), torch.randn(2, steps, 6, requires_grad=True)
    state = torch.rand(2, *net.state_shape)
    ours, theirs = net(x, state), paper(net, x, state)
    close([ours], [theirs])
    grad, wanted = torch.randn_like(ours), [x, *net.parameters()]
    close(torch.autograd.grad(ours, wanted, grad), torch.autograd.grad(theirs, wanted, grad), 1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_streams_masks_and_time_first(name: str) -> None:
    make, _ = LAYERS[name]
    net, x = make(return_state=True), torch.randn(2, 90, 6)
    whole, last = net(x)
    parts, state = [], None
    for part in x.split([1, 40, 49], 1):
        y, state = net(part, state)
        parts.append(y)
    close([torch.cat(parts, 1), state], [whole, last], 1e-12)
    mask = torch.rand(2, 90) > 0.4
    mask[:, 0] = True
    masked, state = net(x, mask=mask)
    for i in range(2):
        there, kept = net(x[i : i + 1, mask[i]])
        close([masked[i : i + 1, mask[i]], state[i : i + 1]], [there, kept], 1e-12)
    net.batch_first = False
    close(net(x.transpose(0, 1), mask=mask.transpose(0, 1)), (masked.transpose(0, 1), state), 1e-15)


def test_gates_that_close_do_not_overflow() -> None:
    """Log decays far below what exp of their sum can hold."""
    net, x = GatedLinearAttention(8, features=6, heads=2), torch.randn(2, 150, 6)
    net.float()
    with torch.no_grad():
        net.decay[1].bias[:2], net.decay[1].bias[2:] = -500.0, 20.0
    ours = net(x.float())
    net.double()
    theirs = attention(net, x, torch.zeros(2, *net.state_shape))
    close([ours.double()], [theirs], 1e-5)
    net.float()(x.float()).sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_citizen(name: str) -> None:
    """state_dict, compile, export with any number of steps, autocast."""
    make, _ = LAYERS[name]
    net, other, x = make(), make(), torch.randn(2, 70, 6)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    any_length = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time", min=3)}
    dynamic = None if isinstance(net, GatedLinearAttention) else ((any_length,))
    exported = torch.export.export(net, (x,), dynamic_shapes=dynamic).module()
    close([exported(x)], [net(x)], 1e-14)
    if dynamic is not None:
        close([exported(x[:1, :33])], [net(x[:1, :33])], 1e-14)
    compiled = torch.compile(net, backend="aot_eager")
    close(
        torch.autograd.grad(compiled(x).square().sum(), list(net.parameters())),
        torch.autograd.grad(net(x).square().sum(), list(net.parameters())),
        1e-12,
    )
    net.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x.float())
        y.sum().backward()
    torch.testing.assert_close(y.float(), net(x.float()), rtol=0.1, atol=0.1)


def test_lru_begins_on_its_ring() -> None:
    net = LRU(500, features=2, r_min=0.8, r_max=0.9, max_phase=1.0)
    size, angle = torch.exp(-net.nu.exp()), net.theta.exp()
    assert size.min() >= 0.8 and size.max() <= 0.9 and angle.max() <= 1
    torch.testing.assert_close(net.gamma.exp(), (1 - size**2).sqrt())


X = torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda: linear_scan(X, X[:, :4]), r"a \(2, 5, 3\) and b \(2, 4, 3\)"),
        (lambda: linear_scan(X[0, 0], X[0, 0]), r"got a \(3,\)"),
        (lambda: linear_scan(X[:, :0], X[:, :0]), "at least one step"),
        (lambda: linear_scan(X, X, X), r"\(2, 3\) for b \(2, 5, 3\); got \(2, 5, 3\)"),
        (lambda: linear_scan(X, X, chunk=0), "at least 1; got 0"),
        (lambda: MinGRU(4, features=3, chunk=0), "at least 1; got 0"),
        (lambda: MinGRU(0, features=3), "units of MinGRU is a positive integer; got 0"),
        (lambda: MinGRU(4, features=2)(X), r"features=2\); got shape \(2, 5, 3\)"),
        (lambda: MinGRU(4, features=3)(X[:, :0]), "at least one step"),
        (lambda: MinGRU(4, features=3)(X, torch.zeros(2, 3)), r"has shape \(2, 4\) .* got \(2, 3\)"),
        (lambda: LRU(4, features=3)(X, torch.zeros(2, 4)), r"has shape \(2, 4, 2\)"),
        (lambda: LRU(4, features=3)(X, mask=torch.ones(2, 4)), r"= \(2, 5\); got \(2, 4\)"),
        (lambda: LRU(4, features=3, r_min=0.9, r_max=0.5), "r_min=0.9, r_max=0.5"),
        (lambda: GatedLinearAttention(8, features=3, heads=3), "3 heads for 4 and 8"),
        (lambda: GatedLinearAttention(8, features=3, rank=0), "rank.* got 0"),
    ],
)
def test_wrong_use(use: Callable[[], object], says: str) -> None:
    with pytest.raises((PartitionError, InputError), match=says):
        use()
