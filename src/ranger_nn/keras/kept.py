"""What a layer's `call` leaves behind in Python: noticed, compared and put back.

A call that counts, or takes the next of a list, does something else each time, and a trace would freeze one of them. A
trace also runs `call` more often than its caller does. Containers, objects, classes, globals and generators that a layer
reaches are copied one level deep before, and hold the same again afterwards. Enter at `Kept`.
"""

from __future__ import annotations

import array
import copy
import itertools
import random
from collections import deque
from collections.abc import Iterator
from types import CellType, FunctionType
from typing import Any

import keras
import numpy as np
from keras import ops

from ranger_nn.keras import private
from ranger_nn.keras.identity import Same, walked

LARGEST = 1 << 20
"""Bytes of an array above which it is data: not copied."""
DEEPEST = 5
"""Levels of containers in containers that are compared."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
Content = dict[Any, Any]


class Kept:
    """The state of what a layer reaches, at first that when this was made."""

    def __init__(self, layer: Any) -> None:
        self._places = [p for p in walked(layer).places if _known(p)]
        self._first = self.now()

    def now(self) -> list[Content]:
        """All of it, to be given to `restore`."""
        return [_content(p) for p in self._places]

    def changed(self) -> dict[str, Any]:
        """What differs from the beginning: name -> mark of what it is now."""
        found = {}
        for number, (place, before) in enumerate(zip(self._places, self._first, strict=True)):
            after = _content(place)
            for key in dict.fromkeys([*before, *after]):
                if not _alike(before.get(key, before), after.get(key, after)):
                    name = key if isinstance(key, str) else f"{type(place).__name__}[{key!r}]"
                    found[f"{name}#{number}"] = mark(after.get(key))
        return found

    def restore(self, content: list[Content] | None = None) -> None:
        """As at the beginning, or as `now` found it. What Keras built stays."""
        for place, before in zip(self._places, content or self._first, strict=True):
            after = _content(place)
            same = len(before) == len(after) and all(k in after and _alike(v, after[k]) for k, v in before.items())
            if not same and not _built(place, before, after):
                _put_back(place, before, after)


def mark(x: Any, depth: int = 0) -> Any:
    """Equal for what two calls alike leave behind: symbolic tensors by shape, numbers by value."""
    if isinstance(x, keras.KerasTensor):
        return "symbolic", tuple(x.shape), str(x.dtype)
    if isinstance(x, _PLAIN):
        return type(x), repr(x)
    if isinstance(x, np.ndarray | np.generic) or (ops.is_tensor(x) and not isinstance(x, keras.Variable)):
        found = np.asarray(ops.convert_to_numpy(x))
        return found.shape, str(found.dtype), found.tobytes()
    if isinstance(x, _Stood):
        return x.state
    if depth > DEEPEST or isinstance(x, (keras.Variable, keras.Layer, FunctionType, type)):
        return Same(x)
    if isinstance(x, dict):
        return "pairs", tuple((mark(k, depth + 1), mark(v, depth + 1)) for k, v in x.items())
    if isinstance(x, (list, tuple, deque)):
        return "sequence", tuple(mark(v, depth + 1) for v in x)
    if isinstance(x, (set, frozenset)):
        return "set", tuple(sorted(map(repr, x)))
    held = getattr(x, "__dict__", None)
    return (type(x), mark(dict(held), depth + 1)) if isinstance(held, dict) else (type(x), repr(x))


class _Stood:
    """An iterator, which cannot be set back: a copy of it takes its place."""

    def __init__(self, it: Any) -> None:
        self.it, self.copy = it, copy.copy(it)
        self.state = repr(self.copy) if isinstance(it, itertools.count) else repr(it.__reduce__()[1:])


def _stood(x: Any) -> Any:
    if not isinstance(x, Iterator):
        return x
    try:
        return _Stood(x)
    except Exception:  # a generator
        return x


def _known(x: Any) -> bool:
    kinds = (list, deque, dict, set, bytearray, array.array, random.Random, np.random.Generator, np.ndarray, CellType)
    if isinstance(x, np.ndarray):
        return bool(x.flags.writeable and x.nbytes <= LARGEST and not x.dtype.hasobject)
    return isinstance(x, (*kinds, type, FunctionType)) or isinstance(getattr(x, "__dict__", None), dict)


def _content(x: Any) -> Content:
    """One level of it, by places."""
    if isinstance(x, (np.ndarray, bytearray, array.array)):
        return {"array": (np.asarray(x).shape, np.asarray(x).tobytes())}
    if isinstance(x, random.Random):
        return {"generator": x.getstate()}
    if isinstance(x, np.random.Generator):
        return {"generator": copy.deepcopy(x.bit_generator.state)}
    if isinstance(x, (list, deque)):
        return {k: _stood(v) for k, v in enumerate(x)}
    if isinstance(x, set):
        return dict.fromkeys(x)
    return {k: _stood(v) for k, v in _named(x).items()}


def _named(x: Any) -> Content:
    if isinstance(x, dict):
        return dict(x)
    if isinstance(x, CellType):
        try:
            return {"cell": x.cell_contents}
        except ValueError:  # not yet filled
            return {}
    if isinstance(x, FunctionType):
        return {k: x.__globals__[k] for k in x.__code__.co_names if k in x.__globals__}
    if isinstance(x, type):
        return {k: v for k, v in vars(x).items() if not k.startswith("__") and not k.startswith("_abc_")}
    skipped = private.BOOKKEEPING | {"_modules", "_obj_reference_counts_dict"} if isinstance(x, keras.Operation) else ()
    return {k: v for k, v in list(vars(x).items()) if k not in skipped and not k.startswith("_self_")}


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, _Stood) and isinstance(b, _Stood):
        return a.it is b.it and bool(a.state == b.state)
    return a is b or (type(a) is type(b) and isinstance(a, (*_PLAIN, tuple)) and _same(a, b))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    return repr(a) == repr(b)


def _built(place: Any, before: Content, after: Content) -> bool:
    """Whether Keras has built something there meanwhile."""
    new = [v for k, v in after.items() if v is not before.get(k, before)]
    return any(isinstance(leaf, (keras.Layer, keras.Variable)) for v in new for leaf in keras.tree.flatten(v))


def _put_back(x: Any, before: Content, after: Content) -> None:
    values = {k: v.copy if isinstance(v, _Stood) else v for k, v in before.items()}
    if isinstance(x, np.ndarray):
        x[...] = np.frombuffer(values["array"][1], x.dtype).reshape(x.shape)
    elif isinstance(x, bytearray):
        x[:] = values["array"][1]
    elif isinstance(x, array.array):
        x[:] = array.array(x.typecode, values["array"][1])
    elif isinstance(x, random.Random):
        x.setstate(values["generator"])
    elif isinstance(x, np.random.Generator):
        x.bit_generator.state = values["generator"]
    elif isinstance(x, (list, deque)):
        x.clear()
        x.extend(values.values())
    elif isinstance(x, set):
        x.clear()
        x.update(values)
    else:
        _put_back_names(x, before, values, after)


def _put_back_names(x: Any, before: Content, values: Content, after: Content) -> None:
    if isinstance(x, CellType):
        x.cell_contents = values.get("cell")
        return
    for k in [k for k in after if k not in before]:
        delattr(x, k) if isinstance(x, type) else _dict_of(x).pop(k, None)
    for k, v in before.items():
        if k not in after or not _alike(v, after[k]):
            setattr(x, k, values[k]) if isinstance(x, type) else _dict_of(x).__setitem__(k, values[k])


def _dict_of(x: Any) -> Any:
    return x if isinstance(x, dict) else x.__globals__ if isinstance(x, FunctionType) else vars(x)
