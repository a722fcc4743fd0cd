"""Clustered attention beside full attention: time, and how much of full attention it keeps.

python -m benchmarks.clustered_attention                        PyTorch: time (partition included), then quality
KERAS_BACKEND=jax python -m benchmarks.clustered_attention --keras      Keras: time on that back end (attention, layer)

N = 16384 tokens, 4 heads, regions of 256. d = 64 is the width of a head, what `F.scaled_dot_product_attention` takes; the
other reading, 64 for all heads together (16 each), is the second row. "Attention" is q, k, v to result: ours routes
queries and keys in every call. "Layer" has the projections on both sides, and in training ours also moves its centres.

Quality, N = 4096, one head of 64: tokens of 24 clusters of uneven size that come in runs of 16, and the 8 x 8 patches of a
photograph. Regions of 256 by K-means, random, and contiguous; "best keys" are each query's own 256 best, which no
partition can exceed. Kept: the share of full attention's weights that fall into the query's region.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import interleaved
from ranger_nn import KMeans
from ranger_nn.layers.routing import balanced_slots_now
from ranger_nn.torch import ClusteredAttention
from ranger_nn.torch.layers.attention import clustered_attention

TOKENS, HEADS, REGION = 16384, 4, 256
INFERENCE, TRAINING = 8.0, 20.0
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Full(nn.Module):
    """The same projections around full attention."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, N, features)."""
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def verdict(name: str, taken: dict[str, float], target: float | None) -> None:
    """Print a ratio beside what it should reach."""
    ratio = taken["full"] / taken["ours"]
    against = "" if target is None else f" (>= {target:.0f}){'' if ratio >= target else ' MISSED'}"
    print(
        f"{name}: full {taken['full']:.2f} s, ours {taken['ours'] * 1e3:.0f} ms, {ratio:.1f} times{against}", flush=True
    )


def warmed(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Medians after one run of each."""
    for work in works.values():
        work()
    return interleaved(works, repeats)


def inference(run: Callable[[], Any]) -> Callable[[], Any]:
    """Without gradients."""

    def work() -> None:
        with torch.no_grad():
            run()

    return work


def speed(tokens: int, width: int, repeats: int) -> None:
    """Attention alone, then the layer; heads of `width`."""
    q, k, v = (torch.randn(1, HEADS, tokens, width) for _ in range(3))
    centres = F.normalize(torch.randn(HEADS, tokens // REGION, width), dim=-1)
    runs: dict[str, Callable[[], Tensor]] = {
        "full": lambda: F.scaled_dot_product_attention(q, k, v),
        "ours": lambda: clustered_attention(q, k, v, centres),
    }
    place = f"N = {tokens}, {HEADS} heads of {width}"
    verdict(f"attention, {place}, inference", warmed({n: inference(f) for n, f in runs.items()}, repeats), INFERENCE)
    for t in (q, k, v):
        t.requires_grad_()
    steps = {n: lambda f=f: f().sum().backward() for n, f in runs.items()}
    verdict(f"attention, {place}, training", warmed(steps, repeats), TRAINING)

    features = HEADS * width
    nets = {
        "full": Full(features),
        "ours": ClusteredAttention(HEADS, KMeans(tokens // REGION, balanced=True), features=features),
    }
    x = torch.randn(1, tokens, features)
    works: dict[str, Callable[[], Any]] = {n: lambda net=net: net(x) for n, net in nets.items()}
    nets["ours"].eval()
    verdict(f"layer, {place}, inference", warmed({n: inference(f) for n, f in works.items()}, repeats), None)
    nets["ours"].train()
    verdict(
        f"layer, {place}, training",
        warmed({n: lambda f=f: f().sum().backward() for n, f in works.items()}, repeats),
        None,
    )
    start = time.perf_counter()
    nets["ours"].adapt(x)
    print(f"K-means of all heads, once before training: {time.perf_counter() - start:.2f} s", flush=True)


# ------------------------------------------------------------------------------------------ quality


def clusters(tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, 1, tokens, width): 24 directions, the commonest five times as common as the rarest, in runs of 16."""
    g = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(24, width, generator=g), dim=-1)
    kinds = torch.multinomial(torch.linspace(1, 5, 24), tokens // 16, replacement=True, generator=g)
    kinds = kinds.repeat_interleave(16)

    def drawn(size: float) -> Tensor:
        noise = torch.randn(tokens, width, generator=g) * (0.5 / width**0.5)
        return (size * F.normalize(directions[kinds] + noise, dim=-1))[None, None]

    return drawn(8.0), drawn(8.0), drawn(1.0) + torch.randn(1, 1, tokens, width, generator=g) * 0.1


def patches(tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """q = k = v of the patches of a photograph: principal components, of one length."""
    from skimage.data import astronaut

    side = 512 // int(tokens**0.5)
    image = torch.tensor(astronaut()).float() / 255
    rows = image.unfold(0, side, side).unfold(1, side, side).reshape(tokens, -1)
    rows = rows - rows.mean(0)
    parts = torch.linalg.svd(rows, full_matrices=False)[0][:, :width]
    x = 7 * F.normalize(parts * width**0.5, dim=-1)[None, None]
    return x, x, x


def routed(centres: Tensor, t: Tensor) -> Tensor:
    """Region of each token, as the layer routes them."""
    scores = F.normalize(t[0, 0], dim=-1) @ centres.T
    return torch.from_numpy(balanced_slots_now(scores[None].numpy(), REGION)[0]) // REGION


def quality(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Weights kept, and relative L2 of the result, by partition."""
    tokens, width = q.shape[2:]
    weights = (q[0, 0] @ k[0, 0].T / width**0.5).softmax(-1)
    full = weights @ v[0, 0]

    def row(partition: str, inside: Tensor, result: Tensor | None = None) -> None:
        part = weights * inside
        y = part / part.sum(1, keepdim=True) @ v[0, 0] if result is None else result[0, 0]
        away = ((y - full).norm() / full.norm()).item()
        print(f"{name}, {partition}: kept {part.sum(1).mean():.1%}, relative L2 {away:.3f}", flush=True)

    both = F.normalize(torch.cat([q[0, 0], k[0, 0]]), dim=-1)
    centres = torch.tensor(KMeans(tokens // REGION).fit(both.numpy()), dtype=torch.float32)
    inside = routed(centres, q)[:, None] == routed(centres, k)
    for summaries in (False, True):
        y = clustered_attention(q, k, v, centres[None], summaries=summaries)
        row("K-means regions" + (" and summaries" if summaries else ""), inside, y)
    shuffled, places = torch.randperm(tokens) // REGION, torch.arange(tokens) // REGION
    row("random regions", shuffled[:, None] == shuffled)
    row("contiguous regions", places[:, None] == places)
    best = weights.topk(REGION, dim=1).values[:, -1:]
    row("best keys", weights >= best)


# -------------------------------------------------------------------------------------------- Keras


def keras_models(tokens: int, width: int, projected: bool) -> dict[str, Any]:
    """Keras's own full attention and ours, compiled.

    projected: the layers, `MultiHeadAttention` and `ClusteredAttention`; else attention alone, where q, k and v are the
    input times a learned vector each, so that there is something to train.
    """
    import keras
    from keras import ops

    from ranger_nn.keras import ClusteredAttention as KerasClustered

    features = HEADS * width

    class Scaled(keras.layers.Layer):
        """Attention of scaled inputs (1, tokens, features)."""

        def __init__(self, clustered: Any) -> None:
            super().__init__()
            self.clustered = clustered

        def build(self, shape: Any) -> None:
            self.scale = self.add_weight((3, features), initializer="ones")
            if self.clustered is not None:
                self.clustered.build(shape)

        def call(self, x: Any) -> Any:
            q, k, v = (
                ops.reshape(x * s, (1, tokens, HEADS, width)) for s in ops.unstack(ops.convert_to_tensor(self.scale), 3)
            )
            if self.clustered is None:
                return ops.reshape(ops.dot_product_attention(q, k, v), (1, tokens, features))
            parts = [ops.reshape(ops.transpose(t, (0, 2, 1, 3)), (HEADS, tokens, width)) for t in (q, k, v)]
            y = self.clustered._attend(*parts, None, False)
            return ops.reshape(ops.transpose(y, (1, 0, 2)), (1, tokens, features))

    found = {}
    for name in ("full", "ours"):
        inputs = keras.Input((tokens, features), batch_size=1)
        clustered = KerasClustered(HEADS, KMeans(tokens // REGION, balanced=True)) if name == "ours" else None
        if not projected:
            outputs = Scaled(clustered)(inputs)
        elif clustered is None:
            outputs = keras.layers.MultiHeadAttention(HEADS, width)(inputs, inputs)
        else:
            outputs = clustered(inputs)
        found[name] = keras.Model(inputs, outputs)
        found[name].compile("sgd", "mse", jit_compile="auto")
    return found


def keras_speed(tokens: int, width: int, repeats: int) -> None:
    """`predict_on_batch` and `train_on_batch`: attention alone, then the layer, whose centres move in training."""
    import keras
    import numpy as np

    features = HEADS * width
    x, y = np.random.randn(1, tokens, features).astype("float32"), np.zeros((1, tokens, features), "float32")
    for kind in ("attention", "layer"):
        models = keras_models(tokens, width, kind == "layer")
        targets = (INFERENCE, TRAINING) if kind == "attention" else (None, None)
        place = f"Keras on {keras.backend.backend()}, {kind}, N = {tokens}, {HEADS} heads of {width}"
        predict: dict[str, Callable[[], Any]] = {n: lambda m=m: m.predict_on_batch(x) for n, m in models.items()}
        verdict(f"{place}, inference", warmed(predict, repeats), targets[0])
        train: dict[str, Callable[[], Any]] = {n: lambda m=m: m.train_on_batch(x, y) for n, m in models.items()}
        verdict(f"{place}, training", warmed(train, repeats), targets[1])


def main() -> None:
    """All parts, or Keras alone."""
    given = common.given(__doc__, 3, tokens=TOKENS)
    if given.keras:
        for width in (64, 16):
            keras_speed(given.tokens, width, given.repeats)
        return
    for width in (64, 16):
        speed(given.tokens, width, given.repeats)
    with torch.no_grad():
        quality("clusters", *clusters(4096, 64))
        quality("photograph", *patches(4096, 64))


if __name__ == "__main__":
    main()
