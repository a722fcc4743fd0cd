"""Linear recurrences in Keras: against the step loop in float64, gradients, streams, masks, saved and loaded, fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

from ranger_nn.keras import LRU, GatedLinearAttention, MinGRU, linear_scan

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    keras.utils.set_random_seed(0)
    if BACKEND != "jax":
        yield
        return
    import jax

    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def numbers(x: Any) -> Any:
    return ops.convert_to_numpy(x)


def gradients(f: Callable[..., Any], arrays: list[Any], weight: Any) -> list[np.ndarray]:
    """Of sum(weight * f(arrays)), whatever the back end."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        given = [tf.constant(a) for a in arrays]
        with tf.GradientTape() as tape:
            tape.watch(given)
            loss = tf.reduce_sum(f(*given) * weight)
        return [numbers(g) for g in tape.gradient(loss, given)]
    if BACKEND == "jax":
        import jax

        found = jax.grad(lambda v: (f(*v) * weight).sum())([jax.numpy.asarray(a) for a in arrays])
        return [np.asarray(g) for g in found]
    import torch

    leaves = [torch.tensor(a, requires_grad=True) for a in arrays]
    return [g.numpy() for g in torch.autograd.grad((f(*leaves) * torch.tensor(weight)).sum(), leaves)]


def loop(a: Any, b: Any, h: Any) -> Any:
    states = []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return np.stack(states, 1)


def loop_gradients(a: Any, b: Any, start: Any, grad: Any) -> list[Any]:
    """By hand, step by step: `ranger_nn.layers.scan`'s docstring."""
    h, g, carried = loop(a, b, start), np.empty_like(b), np.zeros_like(start)
    for t in range(b.shape[1] - 1, -1, -1):
        g[:, t] = grad[:, t] + carried
        carried = a[:, t] * g[:, t]
    return [g * np.concatenate([start[:, None], h[:, :-1]], 1), g, carried]


def close(one: Any, other: Any, tolerance: float) -> None:
    """Relative to the largest number."""
    assert one.shape == other.shape
    assert np.abs(one - other).max() <= tolerance * max(np.abs(other).max(), 1e-300)


@pytest.mark.parametrize("decay", [0.9, 0.0, 1e-200, -1.0, 1.01])
@pytest.mark.parametrize(("steps", "chunk"), [(1, None), (5, 2), (70, 7), (300, None), (333, 16)])
def test_equals_the_step_loop(decay: float, steps: int, chunk: int | None) -> None:
    a = decay * (RNG.random((2, steps, 3)) if decay in (0.9, -1.0) else np.ones((2, steps, 3)))
    b, start, grad = RNG.standard_normal((2, steps, 3)), RNG.standard_normal((2, 3)), RNG.standard_normal((2, steps, 3))
    close(numbers(linear_scan(a, b, start, chunk)), loop(a, b, start), 1e-12)
    found = gradients(lambda *v: linear_scan(*v, chunk), [a, b, start], grad)
    for ours, theirs in zip(found, loop_gradients(a, b, start, grad)):
        close(ours, theirs, 1e-11)


def test_complex() -> None:
    """Real and imaginary parts in and out, so that conventions of complex gradients do not matter."""
    from ranger_nn.keras.layers.scan import backend

    parts = [0.7 * RNG.standard_normal((2, 90, 3)) for _ in range(4)]
    grad = RNG.standard_normal((2, 90, 3))

    def ours(*v: Any) -> Any:
        return sum(backend().parts(linear_scan(backend().pair(*v[:2]), backend().pair(*v[2:]), None, 8)))

    a, b = parts[0] + 1j * parts[1], parts[2] + 1j * parts[3]
    h = loop(a, b, np.zeros((2, 3), complex))
    close(numbers(ours(*map(ops.convert_to_tensor, parts))), h.real + h.imag, 1e-12)
    da, db, _ = loop_gradients(a.conj(), b.conj(), np.zeros((2, 3), complex), grad * (1 + 1j))
    for found, wanted in zip(gradients(ours, parts, grad), (da.real, da.imag, db.real, db.imag)):
        close(found, wanted, 1e-11)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def silu(x: Any) -> Any:
    return x * sigmoid(x)


def min_gru(net: MinGRU, x: Any, state: Any) -> Any:
    w, b = numbers(net.kernel), numbers(net.bias)
    z, candidate = sigmoid(x @ w[:, :8] + b[:8]), x @ w[:, 8:] + b[8:]
    return loop(1 - z, z * candidate, state)


def lru(net: LRU, x: Any, state: Any) -> Any:
    w, c, nu, theta, gamma, skip = map(numbers, (net.kernel, net.output_kernel, net.nu, net.theta, net.gamma, net.skip))
    eigenvalues = np.exp(-np.exp(nu) + 1j * np.exp(theta))
    b = np.exp(gamma) * (x @ (w[:, :8] + 1j * w[:, 8:]))
    h = loop(np.broadcast_to(eigenvalues, b.shape), b, state[..., 0] + 1j * state[..., 1])
    return (h @ (c[:8] + 1j * c[8:])).real + skip * x


def attention(net: GatedLinearAttention, x: Any, state: Any) -> Any:
    q, k, v = np.split(x @ numbers(net.kernel), [net.keys, 2 * net.keys], -1)
    q, k, v = (t.reshape(*t.shape[:2], net.heads, -1) for t in (q, k, v))
    outputs = []
    if net.gated:
        alpha = sigmoid(x @ numbers(net.decay_in) @ numbers(net.decay_out) + numbers(net.decay_bias)) ** (1 / 16)
        alpha, q = alpha.reshape(q.shape), q / q.shape[-1] ** 0.5
    else:
        q, k = (np.where(t > 0, t + 1, np.exp(np.minimum(t, 0))) for t in (q, k))
        alpha, v = np.ones_like(k), np.concatenate([v, np.ones_like(v[..., :1])], -1)
    for t in range(x.shape[1]):
        state = alpha[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        o = (q[:, t, :, :, None] * state).sum(-2)
        if net.gated:
            o = (o - o.mean(-1, keepdims=True)) / np.sqrt(o.var(-1, keepdims=True) + 1e-5)
            gate = silu(x[:, t] @ numbers(net.gate) + numbers(net.gate_bias))
            outputs.append((gate * o.reshape(len(x), -1)) @ numbers(net.output_kernel))
        else:
            outputs.append((o[..., :-1] / o[..., -1:]).reshape(len(x), -1) @ numbers(net.output_kernel))
    return np.stack(outputs, 1)


LAYERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "minGRU": (lambda **k: MinGRU(8, **k), min_gru),
    "LRU": (lambda **k: LRU(8, **k), lru),
    "gated attention": (lambda **k: GatedLinearAttention(8, heads=2, **k), attention),
    "linear attention": (lambda **k: GatedLinearAttention(8, heads=2, gated=False, **k), attention),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_their_papers_stream_and_mask(name: str) -> None:
    make, paper = LAYERS[name]
    # Keras's own operators round float64 to float32: on PyTorch matmul, on JAX layer normalisation
    coarse = BACKEND == "torch" or (BACKEND, name) == ("jax", "gated attention")
    tolerance = 3e-6 if coarse else 1e-10
    net, x = make(dtype="float64", return_state=True), RNG.standard_normal((2, 83, 6))
    net(x)
    state = RNG.random((2, *net.state_shape))
    whole, last = map(numbers, net(x, state))
    close(whole, paper(net, x, state), tolerance)
    parts = []
    for part in np.split(x, [41], axis=1):
        y, state = net(part, state)
        parts.append(numbers(y))
    close(np.concatenate(parts, 1), whole, tolerance)
    close(numbers(state), last, tolerance)
    mask = RNG.random((2, 83)) > 0.4
    mask[:, 0] = True
    masked, kept = map(numbers, net(x, mask=mask))
    there, end = map(numbers, net(x[:1, mask[0]]))
    close(masked[:1, mask[0]], there, tolerance)
    close(kept[:1], end, tolerance)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_fit_save_load(name: str, jit: bool, tmp_path: Path) -> None:
    if jit and BACKEND == "torch":
        pytest.skip("Keras compiles on torch through inductor, which needs a C++ compiler")
    slow = {"jax": not jit, "tensorflow": jit and name not in ("minGRU", "gated attention")}
    if slow.get(BACKEND):
        pytest.skip("slow: each operator, or one more form of the same loops, is compiled by itself")
    inputs = keras.Input((40, 3))
    layer = LAYERS[name][0](chunk=16)
    model = keras.Model(inputs, layers.Dense(1)(layer(layers.Masking()(inputs))[:, -1]))
    model.compile("adam", "mse", jit_compile=jit)
    x = RNG.standard_normal((8, 40, 3)).astype("float32")
    x[:, -5:] = 0  # masked
    before = model.evaluate(x, x[:, 0, :1], verbose=0)
    model.fit(x, x[:, 0, :1], epochs=5, verbose=0)
    assert model.evaluate(x, x[:, 0, :1], verbose=0) < before
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
    short = model.predict(np.concatenate([x[:, :35], 0 * x[:, :5]], 1), verbose=0)
    np.testing.assert_allclose(short, model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)


def test_the_mask_of_masking_is_used() -> None:
    x = RNG.standard_normal((2, 20, 3)).astype("float32")
    x[:, 12:] = 0
    net = MinGRU(4, return_state=True)
    _, masked = net(layers.Masking()(x))
    _, short = net(x[:, :12])
    np.testing.assert_allclose(numbers(masked), numbers(short), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "policy"), [(n, "mixed_bfloat16") for n in LAYERS] + [("minGRU", "mixed_float16")])
def test_mixed_precision_and_shapes(name: str, policy: str) -> None:
    net, x = LAYERS[name][0](dtype=policy, return_state=True), RNG.standard_normal((2, 80, 6)).astype("float32")
    y, state = net(x)
    assert keras.backend.standardize_dtype(y.dtype) == policy.removeprefix("mixed_")
    assert keras.backend.standardize_dtype(state.dtype) == "float32"
    shapes = net.compute_output_shape((2, 80, 6))
    assert (tuple(y.shape), tuple(state.shape)) == tuple(map(tuple, shapes))
    full = type(net).from_config({**net.get_config(), "dtype": "float32"})
    full(x)
    full.set_weights([numbers(ops.cast(w, "float32")) for w in net.weights])
    close(numbers(ops.cast(state, "float32")), numbers(full(x)[1]), 0.1)


def test_half_precision_accumulates_in_float32() -> None:
    ones = ops.ones((1, 4096, 1), "bfloat16")
    assert float(ops.cast(linear_scan(ones, ones)[0, -1, 0], "float32")) == 4096


@pytest.mark.parametrize("name", ["minGRU", "LRU"])
def test_unknown_time(name: str) -> None:
    inputs = keras.Input((None, 3))
    layer = LAYERS[name][0]()
    model = keras.Model(inputs, layer(inputs))
    for steps in (7, 90):
        x = RNG.standard_normal((2, steps, 3)).astype("float32")
        np.testing.assert_allclose(model.predict(x, verbose=0), numbers(layer(x)), rtol=1e-4, atol=1e-5)


X = np.zeros((2, 5, 3), "float32")


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda: linear_scan(X, X[:, :4]), r"a \(2, 5, 3\) and b \(2, 4, 3\)"),
        (lambda: linear_scan(X[0, 0], X[0, 0]), r"got a \(3,\)"),
        (lambda: linear_scan(X[:, :0], X[:, :0]), "at least one step"),
        (lambda: linear_scan(X, X, X), r"\(2, 3\) for b \(2, 5, 3\); got \(2, 5, 3\)"),
        (lambda: linear_scan(X, X, chunk=0), "at least 1; got 0"),
        (lambda: MinGRU(4, chunk=0), "at least 1; got 0"),
        (lambda: MinGRU(0), "units of MinGRU is a positive integer; got 0"),
        (lambda: MinGRU(4, features=2)(X), r"features=2\); got shape \(2, 5, 3\)"),
        (lambda: MinGRU(4)(X, np.zeros((2, 3), "float32")), r"has shape \(2, 4\) .* got \(2, 3\)"),
        (lambda: LRU(4)(X, mask=np.ones((2, 4), bool)), r"= \(2, 5\); got \(2, 4\)"),
        (lambda: LRU(4, r_min=0.9, r_max=0.5), "r_min=0.9, r_max=0.5"),
        (lambda: GatedLinearAttention(8, heads=3), "3 heads for 4 and 8"),
        (lambda: GatedLinearAttention(8)(keras.Input((None, 3))), "known number of steps"),
    ],
)
def test_wrong_use(use: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        use()
