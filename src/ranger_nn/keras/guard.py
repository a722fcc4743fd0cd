"""What every call gives is held to the region that it was asked for: its shape and its dtype.

Shapes are known while a program is traced, so this costs nothing when it runs; on PyTorch it is a comparison of a tuple
and a dtype for each call. A kernel that gave a row too few would otherwise be stretched by the next operator, and nobody
would know. Enter at `held` and `held_whole`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import keras

from ranger_nn.core.graph import Graph, Node
from ranger_nn.errors import LayerError, PlanError
from ranger_nn.keras.kernels import Opaque
from ranger_nn.planning.rolled import Flow

standardised = functools.cache(keras.backend.standardize_dtype)
"""A back end's dtype by the name that all have."""


WHOLE = "the whole"
"""What a node gives all of its rows for, whatever the regions."""


def matches(x: Any, shape: Sequence[int], dtype: str) -> bool:
    """Whether an array has this shape and dtype; lengths that a trace leaves open are none of its faults."""
    if len(x.shape) != len(shape) or standardised(x.dtype) != dtype:
        return False
    return all(a == b or a is None for a, b in zip(x.shape, shape, strict=True))


def held(graph: Graph, node: Node, flow: Flow, t: Any, found: Any) -> Any:
    """What a node gives for the rows of step t, or an error that names both."""
    value = graph.values[flow.value]
    dim = flow.dim or 0
    shape = tuple(flow.rate if d == dim else n for d, n in enumerate(value.shape))
    if matches(found, shape, value.dtype):
        return found
    first = f"{flow.rate * t + flow.ahead}" if isinstance(t, int) else f"{flow.rate}*t{flow.ahead:+d}"
    raise _mismatch(node, found, f"{flow.rate} rows from {first} on of dimension {dim}", shape, value.dtype)


def held_whole(graph: Graph, node: Node, found: Sequence[Any]) -> Sequence[Any]:
    """What a node gives for all of its inputs, or an error that names it."""
    for v, y in zip(node.outputs, found, strict=True):
        value = graph.values[v]
        if not matches(y, value.shape, value.dtype):
            raise (_undeclared if isinstance(node.kernel, Opaque) else _mismatch)(
                node, y, WHOLE, value.shape, value.dtype
            )
    return found


def _mismatch(node: Node, found: Any, region: str, shape: Sequence[int], dtype: str) -> PlanError:
    where = f", in {node.where}" if node.where else ""
    way = "call the untouched model" if region == WHOLE else "regionalize with regions= of the whole size"
    return PlanError(
        f"{node.name} ({node.op}{where}) gave {tuple(found.shape)} {standardised(found.dtype)} for {region}, which asks "
        f"for {tuple(shape)} {dtype}: please report this network; {way} meanwhile"
    )


def _undeclared(node: Node, found: Any, region: str, shape: Sequence[int], dtype: str) -> LayerError:
    return LayerError(
        f"{node.where or node.name} gave {tuple(found.shape)} {standardised(found.dtype)} from {node.op}, where Keras infers "
        f"{tuple(shape)} {dtype}: a plan needs sizes that do not depend on the numbers, as those of nonzero, unique and masks "
        "taken as an index do, and a compute_output_spec that says what the layer gives"
    )
