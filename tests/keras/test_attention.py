"""ClusteredAttention in Keras: PyTorch's numbers, full attention with one region, masks, files, fit, jit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from keras import ops

from ranger_nn import InputError, KMeans
from ranger_nn.keras import ClusteredAttention
from ranger_nn.torch import ClusteredAttention as TorchAttention

BACKEND = keras.backend.backend()


def tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


def as_numpy(x: object) -> np.ndarray:
    return ops.convert_to_numpy(x)


def twin(layer: ClusteredAttention, x: np.ndarray) -> TorchAttention:
    """PyTorch's, with the same weights."""
    layer(x)
    other = TorchAttention(layer.heads, layer.partition, features=x.shape[-1], summaries=layer.summaries).eval()
    with torch.no_grad():
        for ours, theirs in ((layer.project, other.project), (layer.out, other.out)):
            theirs.weight.copy_(torch.tensor(as_numpy(ours.kernel)).T)
            theirs.bias.copy_(torch.tensor(as_numpy(ours.bias)))
        other.centres.copy_(torch.nn.functional.normalize(torch.tensor(as_numpy(layer.centres)), dim=-1))
    return other


@pytest.mark.parametrize("summaries", [False, True])
@pytest.mark.parametrize("n", [12, 11])
def test_equals_pytorch(summaries: bool, n: int) -> None:
    """Also where regions are filled up and tokens are masked."""
    layer, x = ClusteredAttention(2, KMeans(3, balanced=True), summaries=summaries), tokens(2, n, 8)
    other = twin(layer, x)
    with torch.no_grad():
        np.testing.assert_allclose(as_numpy(layer(x)), other(torch.tensor(x)).numpy(), rtol=1e-4, atol=1e-5)
        if n == 12:
            mask = np.arange(12) < np.array([[12], [7]])
            theirs = other(torch.tensor(x), torch.tensor(mask)).numpy()
            np.testing.assert_allclose(as_numpy(layer(x, mask=mask))[mask], theirs[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("jit", [False, True])
def test_fit_save_load(jit: bool, tmp_path: Path) -> None:
    if jit and BACKEND == "torch":
        pytest.skip("Keras compiles on torch through inductor, which needs a C++ compiler")
    if not jit and BACKEND == "jax":
        pytest.skip("JAX without jit compiles each operator by itself, which takes long")
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16, 8))
    layer = ClusteredAttention(2, KMeans(4, balanced=True, decay=0.9))
    model = keras.Model(inputs, keras.layers.Dense(1)(layer(inputs)))
    model.compile(keras.optimizers.Adam(0.02), "mse", jit_compile=jit)
    x = tokens(8, 16, 8)
    y, centres = 2 + x[..., :1] / 4, as_numpy(layer.centres)
    before = model.evaluate(x, y, verbose=0)
    model.fit(x, y, epochs=12, verbose=0)
    assert model.evaluate(x, y, verbose=0) < before
    assert not np.allclose(as_numpy(layer.centres), centres)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("summaries", [False, True])
def test_gradients_and_centres_equal_pytorch(summaries: bool) -> None:
    """One training step of plain descent: weights, and centres that have moved."""
    x = tokens(2, 12, 8)
    layer = ClusteredAttention(2, KMeans(3, balanced=True, decay=0.5), summaries=summaries)
    inputs = keras.Input((12, 8))
    model = keras.Model(inputs, layer(inputs))
    other = twin(layer, x).train()
    model.compile(keras.optimizers.SGD(1.0), "mse", jit_compile=False)
    model.train_on_batch(x, x)
    sgd = torch.optim.SGD(other.parameters(), 1.0)
    torch.nn.functional.mse_loss(other(torch.tensor(x)), torch.tensor(x)).backward()
    sgd.step()
    for ours, theirs in ((layer.project, other.project), (layer.out, other.out)):
        np.testing.assert_allclose(as_numpy(ours.kernel), theirs.weight.detach().numpy().T, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(as_numpy(layer.centres), other.centres.numpy(), rtol=1e-3, atol=1e-5)


def test_adapt_and_mixed_precision() -> None:
    layer, x = ClusteredAttention(2, KMeans(4, balanced=True), dtype="mixed_bfloat16"), tokens(2, 16, 8)
    layer.adapt(x)
    assert keras.backend.standardize_dtype(layer(x).dtype) == "bfloat16"
    x[0, 0, 0] = np.nan
    with pytest.raises(InputError, match="1 of 256"):
        layer.adapt(x)


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda: ClusteredAttention(3, KMeans(2, balanced=True))(tokens(1, 4, 8)), "3 heads for 8 features"),
        (lambda: ClusteredAttention(2, KMeans(2)), "balanced=True"),
        (lambda: ClusteredAttention(2, KMeans(2, balanced=True), causal=True), "causal"),
        (lambda: ClusteredAttention(2, KMeans(2, balanced=True, capacity=3))(tokens(1, 7, 8)), "at least 4"),
        (lambda: ClusteredAttention(2, KMeans(2, balanced=True))(keras.Input((None, 8))), "known number of tokens"),
        (lambda: ClusteredAttention(2, KMeans(8, balanced=True))(tokens(1, 7, 8)), "8 regions .* 7 tokens"),
        (
            lambda: ClusteredAttention(2, KMeans(2, balanced=True))(tokens(1, 7, 8), mask=np.ones((1, 7), "float32")),
            r"\(1, 7\) bool.*float32",
        ),
    ],
)
def test_wrong_use(use: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        use()
