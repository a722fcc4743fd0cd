"""Any node of a captured graph, on any rows: what its kernel gives there is what the whole operator gives there."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import KerasTensor, ops, tree

from ranger_nn.core.graph import Node
from ranger_nn.keras.capture import Captured, capture

TINY = {"float64": 1e-11, "float32": 2e-5, "float16": 2e-2, "bfloat16": 1e-1}


def inputs_for(model: keras.Model, shape: Any, seed: int = 0) -> Any:
    """Random inputs of these shapes."""
    rng = np.random.default_rng(seed)
    shapes = shape if isinstance(shape, list) else [shape]
    given = [rng.standard_normal(s) for s in shapes]
    dtypes = (
        [t.dtype for t in tree.flatten(model.inputs)] if getattr(model, "inputs", None) else ["float64"] * len(given)
    )
    made = [
        ops.convert_to_tensor(g.astype("float64" if d == "float64" else "float32"), d) for g, d in zip(given, dtypes)
    ]
    return made if isinstance(shape, list) else made[0]


def captured(model: keras.Model, x: Any, training: bool = False) -> Captured:
    """The graph for such inputs."""
    like = tree.map_structure(lambda t: KerasTensor(tuple(t.shape), dtype=keras.backend.standardize_dtype(t.dtype)), x)
    return capture(model, like, training)


def compiled(function: Any) -> Any:
    """In one piece on JAX, where every operator alone would be compiled for each shape."""
    if keras.backend.backend() != "jax":
        return function
    import jax

    return jax.jit(function)


def evaluate(found: Captured, x: Any) -> dict[int, Any]:
    """Every value, by the untouched operators."""
    flat = tree.flatten(x)
    known: dict[int, Any] = {}
    for v, (kind, source) in found.sources.items():
        dtype = found.graph.values[v].dtype
        tensor = flat[source] if kind == "input" else source.value if kind == "variable" else source
        known[v] = ops.convert_to_tensor(tensor, dtype) if kind == "constant" else ops.cast(tensor, dtype)

    def run(known: dict[int, Any]) -> dict[int, Any]:
        known = dict(known)
        for node in found.graph.nodes:
            result = node.kernel.whole(*[known[v] for v in node.inputs])
            results = result if len(node.outputs) > 1 else [result]
            for v, y in zip(node.outputs, results, strict=True):
                value = found.graph.values[v]
                assert tuple(y.shape) == value.shape, (node.name, tuple(y.shape), value.shape)
                assert keras.backend.standardize_dtype(y.dtype) == value.dtype, (node.name, y.dtype, value.dtype)
                known[v] = y
        return known

    return compiled(run)(known)


def error(a: Any, b: Any) -> float:
    """Largest difference, relative to the largest value."""
    a, b = (np.asarray(ops.convert_to_numpy(ops.cast(t, "float64"))) for t in (a, b))
    if not a.size:
        return 0.0
    return float(np.max(np.abs(a - b)) / max(1.0, float(np.max(np.abs(b)))))


def apart(a: Any, b: Any) -> float:
    """Largest difference, relative to the largest value."""
    a, b = (np.asarray(ops.convert_to_numpy(x)).astype("float64") for x in (a, b))
    return float(np.abs(a - b).max() / np.abs(b).max())


def whole_error(found: Captured, model: Any, x: Any) -> float:
    """The captured graph, run whole, against the model."""
    known = evaluate(found, x)
    theirs = tree.flatten(compiled(model)(x))
    return max(error(known[o], t) for o, t in zip(found.outputs, theirs, strict=True) if o is not None)


def rows_of(x: np.ndarray, dim: int, lo: int, hi: int, fill: float | None, rng: Any) -> np.ndarray:
    """Rows [lo, hi), those outside filled (with noise where they must not matter)."""
    shape = list(x.shape)
    shape[dim] = hi - lo
    made = rng.standard_normal(shape) if fill is None else np.full(shape, fill)
    made = made.astype(x.dtype)
    a, b = max(lo, 0), min(hi, x.shape[dim])
    if b > a:
        made[(slice(None),) * dim + (slice(a - lo, b - lo),)] = x[(slice(None),) * dim + (slice(a, b),)]
    return made


def check_region(found: Captured, node: Node, known: dict[int, Any], dim: int, start: int, rows: int) -> float | None:
    """Error of one node on rows [start, start + rows) of its output; None where no input follows that dimension."""
    out = node.outputs[0]
    linked = [link for row in node.rule.links for link in row if link is not None and link.out_dim == dim]
    if not linked or len(node.outputs) > 1:
        return None
    rng = np.random.default_rng(abs(start))
    xs = []
    for i, (v, row) in enumerate(zip(node.inputs, node.rule.links, strict=True)):
        x = known[v]
        for d, link in enumerate(row):
            if link is not None and link.out_dim == dim and found.graph.values[v].shape[d] > 1:
                lo, hi = link.reach.needs(start, start + rows)
                wide = found.graph.values[v].dtype
                part = rows_of(
                    np.asarray(ops.convert_to_numpy(ops.cast(x, "float64"))), d, lo, hi, node.kernel.fill(i), rng
                )
                x = ops.cast(ops.convert_to_tensor(part), wide)
        xs.append(x)
    options = {"position": ops.convert_to_tensor(start, "int32")} if node.kernel.positional else {}
    y = compiled(node.kernel.region(dim, rows, start))(*xs, **options)
    size = found.graph.values[out].shape[dim]
    a, b = max(start, 0), min(start + rows, size)
    if b <= a:
        return 0.0
    cut = (slice(None),) * dim
    assert y.shape[dim] == rows, (node.name, tuple(y.shape), rows)
    ours, theirs = (np.asarray(ops.convert_to_numpy(ops.cast(t, "float64"))) for t in (y, known[out]))
    return error(ops.convert_to_tensor(ours[(*cut, slice(a - start, b - start))]), theirs[(*cut, slice(a, b))])
