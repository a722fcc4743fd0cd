"""Keras's side of a run from file to file: `execute.files.framework.Framework` for a model whose plan runs step by step.

A step is one call of a function that the back end compiles once for each sweep (PyTorch runs it as it is):

    STEP     (t, rows of stored values, whole values, windows) -> (windows, rows of results, rows that reductions take)
    MERGE    (state, rows) -> state, as the loop of `execute.Sweep` does between steps

Enter at `KerasFiles`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import keras
import numpy as np
from keras import ops

from ranger_nn.core import program as P
from ranger_nn.core.graph import Value
from ranger_nn.core.program import Instruction, Read
from ranger_nn.execute.files.steps import Rows, slices, wholes
from ranger_nn.execute.guard import Form
from ranger_nn.io.fingerprint import NoFingerprintError, fingerprint
from ranger_nn.io.journal import UNKNOWN
from ranger_nn.io.protocol import Array
from ranger_nn.keras import private
from ranger_nn.keras.capture import Captured
from ranger_nn.keras.compiled import compiled
from ranger_nn.keras.execute import Runner, Sweep
from ranger_nn.keras.guard import standardised
from ranger_nn.keras.loops import tracing
from ranger_nn.planning.rolled_search import Rolled


class KerasEngine:
    """Binds instructions of one rolled plan to calls of the running back end."""

    def __init__(self, rolled: Rolled) -> None:
        """Kernels are bound here."""
        self.graph, self.rolled = rolled.graph, rolled
        self.sweeps = Runner(rolled).sweeps
        self._functions: dict[int, Callable[..., Any]] = {}

    @staticmethod
    def narrow(x: Any, dim: int, start: int, length: int) -> Any:
        """A slice."""
        return x[(slice(None),) * dim + (slice(start, start + length),)]

    @staticmethod
    def join(parts: Sequence[Any], dim: int) -> Any:
        """Concatenation."""
        return ops.concatenate(list(parts), axis=dim)

    @staticmethod
    def form(x: Any) -> Form:
        """Shape and dtype."""
        return tuple(x.shape), standardised(x.dtype)

    def sweep(self, level: int) -> Sweep:
        """The sweep of a level that has steps."""
        found = self.sweeps[level]
        assert found is not None
        return found

    def bind(self, i: Instruction) -> Callable[..., Any]:
        """The closure of one instruction."""
        if i.op == P.RUN:
            whole: Callable[..., Any] = self.graph.nodes[i.node].kernel.whole
            return whole
        if i.op == P.TRIM:
            return lambda x: x
        if i.op == P.BEGIN:
            step = self.sweep(i.sweep).step
            return lambda: [step.zeros(f, f.kept) for f in step.flows]
        if i.op == P.STEP:
            return self._step(i)
        if i.op == P.FINISH:
            kernel = self.graph.nodes[i.node].kernel
            return lambda state: kernel.finish(tuple(state))
        sweep = self.sweep(i.sweep)
        call = next(c for c in sweep.lifts if c.node == i.node)
        if i.op == P.LIFT:
            return lambda: sweep.empty(call)
        (t,) = i.count
        return lambda state, rows: sweep.lift(call, t, state, rows)

    def _step(self, i: Instruction) -> Callable[..., Any]:
        (t,), taken, loop = i.count, list(self.sweep(i.sweep).step.slices), self.sweep(i.sweep).loop
        assert taken == slices(loop) and list(self.sweep(i.sweep).step.wholes) == wholes(loop)
        pads = [self._padded(rows, read, t) for rows, read in zip(taken, i.reads, strict=False)]
        function = self._function(i.sweep)

        def call(*given: Any) -> Any:
            *rest, windows = given
            rows = [pad(x) for pad, x in zip(pads, rest, strict=False)]
            after, made, lifted = function(t, windows, rows, rest[len(pads) :])
            return after, *made, *lifted

        return call

    def _padded(self, rows: Rows, read: Read, t: int) -> Callable[[Any], Any]:
        """To all the rows that a step takes: the nearest row for those outside; zeros where nothing reads them."""
        v, dim, rate, first, length = rows
        value = self.graph.values[v]
        shape = [length if d == dim else n for d, n in enumerate(value.shape)]
        if not read.parts:
            return lambda _: ops.zeros(shape, value.dtype)
        lo, hi = read.box[dim]
        start = rate * t + first
        if (lo, hi) == (start, start + length):
            return lambda x: x
        index = np.clip(np.arange(start, start + length), lo, hi - 1) - lo
        return lambda x: ops.take(x, index, axis=dim)

    def _function(self, level: int) -> Callable[..., Any]:
        """One step, compiled when it is first called; no gradients."""
        if level not in self._functions:
            step = self.sweep(level).step

            def run(t: Any, windows: Any, rows: Any, given: Any) -> Any:
                with tracing(gradients=False, executor=True):
                    return step(t, windows, rows, given)

            self._functions[level] = compiled(run)
        return self._functions[level]


class KerasFiles:
    """A captured model and its plan.

    Args:
        model: the caller's.
        captured: what it does.
        rolled: its plan.
        channels_last: where the channels of pictures are.
    """

    def __init__(self, model: Any, captured: Captured, rolled: Rolled, channels_last: bool) -> None:
        self.model, self.captured, self.rolled, self.channels_last = model, captured, rolled, channels_last

    @cached_property
    def engine(self) -> KerasEngine:
        """Made where something is to run."""
        return KerasEngine(self.rolled)

    # ---- numbers in and out

    def tensor(self, block: Array, dtype: str | None = None) -> Any:
        """The back end's own."""
        return ops.convert_to_tensor(np.ascontiguousarray(block), dtype)

    def array(self, x: Any) -> Array:
        """A copy, or a view of what lies on the CPU."""
        if isinstance(x, np.ndarray):
            return x
        wide = ops.cast(x, "float32") if standardised(x.dtype) == "bfloat16" else x
        return np.asarray(ops.convert_to_numpy(wide))

    def picture(self, region: Any) -> Array:
        """Channels in front."""
        found = self.array(region)[0]
        return np.moveaxis(found, -1, 0) if self.channels_last else found

    def stand_in(self, value: Value, shape: Sequence[int]) -> Any:
        """Zeros."""
        return ops.zeros(tuple(shape), value.dtype)

    def kept(self, x: Any) -> Array:
        """Of bfloat16 the upper half of float32."""
        if standardised(x.dtype) != "bfloat16":
            return np.ascontiguousarray(self.array(x))
        return (np.ascontiguousarray(self.array(x)).view(np.uint32) >> 16).astype(np.uint16)

    def restored(self, block: Array, dtype: str) -> Any:
        """The same bits."""
        if dtype != "bfloat16":
            return self.tensor(block)
        return ops.cast(self.tensor((block.astype(np.uint32) << 16).view(np.float32)), dtype)

    def kept_dtype(self, dtype: str) -> str:
        """NumPy has no bfloat16."""
        return "uint16" if dtype == "bfloat16" else dtype

    # ---- running

    def externals(self) -> list[Any]:
        """As the layers see them."""
        values, found = self.captured.graph.values, []
        for v, (kind, source) in self.captured.sources.items():
            known = None if kind == "input" else ops.convert_to_tensor(source)
            found.append(known if known is None or kind == "constant" else ops.cast(known, values[v].dtype))
        return found

    def step_stand_ins(self, i: Instruction) -> list[Any]:
        """Zeros for what a step reads."""
        sweep = self.engine.sweep(i.sweep)
        values, known = self.rolled.graph.values, dict(zip(self.captured.sources, self.externals(), strict=True))
        found = [self.stand_in(values[s[0]], [hi - lo for lo, hi in r.box]) for s, r in zip(sweep.slices, i.reads)]
        for v in sweep.wholes:
            found.append(known[v] if known.get(v) is not None else self.stand_in(values[v], values[v].shape))
        return [*found, [sweep.step.zeros(f, f.kept) for f in sweep.flows]]

    def wait(self) -> None:
        """Reading a number back waits for all before it on one device; JAX is asked."""
        if keras.backend.backend() == "jax":
            importlib.import_module("jax").effects_barrier()

    def quiet(self) -> AbstractContextManager[Any]:
        """On PyTorch `no_grad`."""
        if keras.backend.backend() == "torch":
            found: AbstractContextManager[Any] = importlib.import_module("torch").no_grad()
            return found
        return nullcontext()

    # ---- what this is

    def written_out(self) -> str:
        """The configuration, with layers named by their order: names count on in one process. And what layers that are not
        Keras's own do in `call`; and the rows that each step takes.
        """
        text = json.dumps(_plain(keras.saving.serialize_keras_object(self.model)), sort_keys=True)
        names = dict.fromkeys(re.findall(r'"name": "([^"]+)"', text))
        for n, name in enumerate(names):
            text = text.replace(f'"{name}"', f'"#{n}"')
        try:
            return f"{text}\n{self.rolled.loops}" + "".join(map(_own, private.layers_of(self.model)))
        except NoFingerprintError as error:
            return f"{UNKNOWN}{self.model.name} uses {error}"

    def weights(self) -> str:
        """SHA-256 of all bits, with their types and shapes."""
        found = hashlib.sha256()
        for x in self.externals():
            if x is not None:
                block = np.ascontiguousarray(self.kept(x))
                found.update(f"{standardised(x.dtype)} {block.shape}".encode())
                found.update(block.reshape(-1).view(np.uint8).data)
        return found.hexdigest()

    def versions(self) -> dict[str, Any]:
        """Of libraries and the processor."""
        name = keras.backend.backend()
        return {
            "Ranger": importlib.import_module("ranger_nn").__version__,
            "Keras": keras.__version__,
            name: importlib.import_module(name).__version__,
            "NumPy": np.__version__,
            "processor": platform.processor() or platform.machine(),
        }

    def setting(self) -> dict[str, Any]:
        """Threads decide in which order is summed."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        flags = {name: os.environ.get(name, "") for name in ("OMP_NUM_THREADS", "XLA_FLAGS", "TF_ENABLE_ONEDNN_OPTS")}
        return {"cores": cores, **flags}


def _plain(config: Any) -> Any:
    """What JSON holds of a configuration, without what only says how the model was built and trained."""
    if isinstance(config, dict):
        left = ("build_config", "compile_config", "registered_name")
        return {str(k): _plain(v) for k, v in config.items() if k not in left}
    if isinstance(config, list | tuple):
        return [_plain(v) for v in config]
    return config if isinstance(config, str | int | float | bool | type(None)) else repr(config)


def _own(layer: Any) -> str:
    kind = type(layer)
    ours = kind.__module__.startswith(("keras.", "ranger_nn."))
    return "" if ours else f"\n{kind.__name__} {fingerprint(kind.call)}"
