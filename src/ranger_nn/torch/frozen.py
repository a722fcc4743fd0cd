"""What capture would freeze and no plan can follow: attributes that forward writes for its next call, and Python's dice.

A module that counts its calls, takes the next of an iterator, or keeps the last output, gives another result each time; a plan would give the first one
for ever. Notes and caches (sizes seen, positions computed once) are written too and change nothing: a second capture, of
the state that the first one left, tells which it is. Enter at `exported`.
"""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.export import ExportedProgram

from ranger_nn.errors import CaptureError
from ranger_nn.torch.identity import is_iterator, position, token
from ranger_nn.torch.twin import Twin, inside, plain

_OF_MODULES = frozenset(nn.Module().__dict__)
"""Fields that every module has: forward writes none of them."""
_DICE = (random._inst, np.random.mtrand._rand)
Key = tuple[str, str | int]
"""Name of a module and of its field, or what is held elsewhere and its number there."""
Fields = dict[Key, Any]


def exported(
    model: nn.Module, export: Callable[[nn.Module], ExportedProgram], very: Callable[[Tensor], Tensor]
) -> ExportedProgram:
    """`export` of a twin of `model`, with the caller's own tensors as constants; `very` tells of a constant which tensor of
    the twin it is.

    Raises:
        CaptureError: the program of the next call would be another one.
    """
    twin = Twin(model)
    before, dice, own = _fields(twin), _dice(), _own_dice(twin)
    program = export(twin.module)
    if _own_dice(twin) != own:
        _refuse_own_dice(model, program, export)
    if _dice() != dice:
        _refuse_dice(model, program, export)
    after = _fields(twin)
    written = [key for key in after if after[key] != before.get(key)]
    if written:
        _refuse_memory(twin, written, program, export)
    return twin.restored(program, very)


def _fields(twin: Twin) -> Fields:
    """Attributes of the modules, and what closures and the containers and objects that they hold have in them, as of now."""
    found = {
        (name, field): _now(value)
        for name, module in twin.module.named_modules()
        for field, value in module.__dict__.items()
        if field not in _OF_MODULES and field not in getattr(type(module), "NOT_IN_TWINS", ())
    }
    found.update({(f"a value of {type(x).__name__}", i): _now(x) for i, x in enumerate(twin.held())})
    return found


def _now(x: Any, depth: int = 0) -> Any:
    if depth > 3:  # notes of notes of notes
        return token(x)
    if isinstance(x, dict):
        return [(token(k), _now(v, depth + 1)) for k, v in x.items()]
    if isinstance(x, (list, tuple)):
        return [_now(v, depth + 1) for v in x]
    if isinstance(x, (set, frozenset)):
        return set(map(token, x))
    if isinstance(x, types.CellType):
        return _now(inside(x), depth + 1)
    if is_iterator(x):
        return position(x)
    if plain(x) and not isinstance(x, nn.Module):
        return _now(x.__dict__, depth + 1)
    return token(x)


def _refuse_memory(
    twin: Twin,
    written: list[Key],
    first: ExportedProgram,
    export: Callable[[nn.Module], ExportedProgram],
) -> None:
    """The second call: what the first one computed and left is there as a tensor of its own."""
    modules, held = dict(twin.module.named_modules()), twin.held()
    left: dict[int, Key] = {}
    for name, field in written:
        if isinstance(field, int):
            _solid(held[field], (name, field), left)
        else:
            modules[name].__dict__[field] = _solid(modules[name].__dict__[field], (name, field), left)
    before = _fields(twin)
    try:
        second = export(twin.module)
    except Exception as error:
        raise _memory(twin.module, written) from error
    read = {left[id(c)] for c in second.constants.values() if id(c) in left}
    same = _text(first) == _text(second)
    if same and not read:
        return
    after = _fields(twin)
    if not read or any(after.get(key) != before[key] for key in read):
        raise _memory(twin.module, written)


def _solid(x: Any, key: Key, left: dict[int, Key]) -> Any:
    """With tensors in the place of fake ones, which belong to the capture that made them."""
    if isinstance(x, FakeTensor):
        with torch._C._DisableTorchDispatch():
            made = torch.empty_strided(
                tuple(map(int, x.shape)), tuple(map(int, x.stride())), dtype=x.dtype, device=x.device
            )
        left[id(made)] = key
        return made
    if isinstance(x, dict):
        for k, v in x.items():
            x[k] = _solid(v, key, left)
    elif isinstance(x, list):
        x[:] = [_solid(v, key, left) for v in x]
    elif type(x) is tuple:
        return tuple(_solid(v, key, left) for v in x)
    elif isinstance(x, types.CellType):
        if (held := inside(x)) is not None:
            x.cell_contents = _solid(held, key, left)
    elif isinstance(getattr(x, "__dict__", None), dict) and plain(x):
        _solid(x.__dict__, key, left)
    return x


def _text(program: ExportedProgram) -> str:
    modules = program.graph_module.modules()
    return "\n".join(str(m.graph) for m in modules if isinstance(m, torch.fx.GraphModule))


def _memory(model: nn.Module, written: list[Key]) -> CaptureError:
    names = ", ".join(
        name if isinstance(field, int) else ".".join(filter(None, (name, field))) for name, field in written[:3]
    )
    return CaptureError(
        f"{type(model).__name__} writes {names} in forward and reads it in the next call: a plan, made once, would give the "
        "first call's result each time. Keep it in a buffer (register_buffer) that is updated in place, or pass it as an "
        "input and give it back as an output."
    )


def _dice() -> Any:
    state: Any = np.random.get_state()
    return random.getstate(), state[1].tobytes(), state[2]


def _own_dice(twin: Twin) -> list[Any]:
    """States of generators that the model holds."""
    found: list[Any] = []
    for x in twin.sources:
        if isinstance(x, random.Random):
            found.append(x.getstate())
        elif isinstance(x, (np.random.Generator, np.random.RandomState)):
            state = x.bit_generator.state if isinstance(x, np.random.Generator) else x.get_state(legacy=False)
            found.append(repr(state))
    return found


def _refuse_own_dice(model: nn.Module, first: ExportedProgram, export: Callable[[nn.Module], ExportedProgram]) -> None:
    if any(m.training for m in model.modules()) or _text(first) != _text(export(Twin(model).module)):
        raise CaptureError(
            f"{type(model).__name__} draws from a random generator of Python's or NumPy's that it holds: a plan, made once, "
            "would repeat the first draw for ever. Draw with torch.rand on tensors, or put the module in eval() mode."
        )


def _refuse_dice(model: nn.Module, first: ExportedProgram, export: Callable[[nn.Module], ExportedProgram]) -> None:
    """Some thread has drawn: this one's functions are looked at while it exports again.

    A draw that nobody uses (LayerDrop in eval mode) leaves the program as it is; in training the branch not taken may be rare.
    """
    found: list[str] = []

    def look(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and not found and _throws(frame.f_code.co_names, frame.f_globals):
            found.append(f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})")

    profile = sys.getprofile()
    sys.setprofile(look)
    try:
        second = export(Twin(model).module)
    finally:
        sys.setprofile(profile)
    if found and (any(m.training for m in model.modules()) or _text(first) != _text(second)):
        raise CaptureError(
            f"{type(model).__name__} draws from Python's or NumPy's random numbers at {found[0]}: a plan, made once, would "
            "repeat the first draw for ever. Draw with torch.rand on tensors, or put the module in eval() mode."
        )


def _throws(names: tuple[str, ...], known: dict[str, Any]) -> bool:
    """True where a function of these globals, which names these, uses the global generators."""
    if str(known.get("__name__", "")).partition(".")[0] in ("torch", "numpy", "random", "ranger_nn", "sympy"):
        return False
    for name in names:
        x = known.get(name)
        if x is random or x is np.random or (x is np and "random" in names) or getattr(x, "__self__", x) in _DICE:
            return True
    return False
