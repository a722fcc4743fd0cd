"""What may be regionalized and with what it may be called: each refusal says what to do.

Enter at `check_model`, `check_call` and `check_gradient_hooks`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from ranger_nn.errors import CaptureError, InputError
from ranger_nn.torch.identity import token

_WRAPPERS = {
    "DistributedDataParallel": "wrap the regional module: DistributedDataParallel(regionalize(model.module))",
    "FullyShardedDataParallel": "wrap the regional module: FullyShardedDataParallel(regionalize(model.module))",
    "DataParallel": "regionalize what is inside (model.module), and use DistributedDataParallel around it",
    "OptimizedModule": "regionalize what torch.compile was given (model._orig_mod)",
}


def check_model(model: Any) -> None:
    """Raises InputError for what is no module, and for modules that hide what they compute."""
    if not isinstance(model, nn.Module):
        raise InputError(f"regionalize takes a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        kind, place = type(module).__name__, f"its {name!r}" if name else "it"
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"regionalize cannot capture {type(model).__name__}: {place} is compiled by TorchScript, whose operators "
                "torch.export does not see. Give the Python module that it was made from, with its state_dict."
            )
        if kind in _WRAPPERS and type(module).__module__.startswith("torch."):
            raise InputError(f"regionalize cannot look into {kind} ({place} is one): {_WRAPPERS[kind]}.")


def check_call(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Raises InputError for inputs that no region can be cut from, or that are called in a way no region follows."""
    name = type(model).__name__
    leaves = pytree.tree_leaves((args, kwargs), is_leaf=lambda x: isinstance(x, PackedSequence))
    for leaf in leaves:
        _check_leaf(name, leaf)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    if not tensors:
        raise InputError(f"{name} was called without a tensor: regions are cut from input tensors")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise InputError(
            f"{name} was called inside a transform of torch.func (grad, vmap, jvp ...), which cannot look into a program of "
            "regions: call the untouched module there (.module), or use torch.autograd."
        )
    level: Any = forward_ad
    if level._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None for x in tensors + [*model.parameters()]
    ):
        raise InputError(
            f"{name} was called with dual tensors: a program of regions has no forward-mode derivative. Call the untouched "
            "module there (.module), or use reverse mode."
        )


def _check_leaf(name: str, leaf: Any) -> None:
    if isinstance(leaf, PackedSequence):
        raise InputError(
            f"{name} was called with a PackedSequence, whose lengths are data: a plan is made for shapes. Give the padded "
            "tensor (torch.nn.utils.rnn.pad_packed_sequence), or call the untouched module."
        )
    if isinstance(leaf, (np.ndarray, np.generic)):
        raise InputError(
            f"{name} was called with a NumPy {type(leaf).__name__} of {leaf.dtype}: give a tensor, torch.from_numpy(x)."
        )
    if isinstance(leaf, Tensor) and leaf.is_nested:
        raise InputError(
            f"{name} was called with a nested tensor, whose lengths are data: a plan is made for shapes. Give the padded "
            "tensor (x.to_padded_tensor(0.0)), or call the untouched module."
        )
    if isinstance(leaf, Tensor) and leaf.layout != torch.strided:
        raise InputError(f"inputs must be dense (strided) tensors, got layout {leaf.layout}")


LARGEST = 1 << 38
"""Elements of an input that is planned for (a terabyte in single precision): a plan of more steps than a run would end."""


def example_leaves(model: nn.Module, x: Any) -> tuple[Any, ...]:
    """Tensors and shapes of a tensor, a shape, or a tuple of them; raises InputError for all else."""
    name = type(model).__name__
    many = isinstance(x, tuple) and not isinstance(x, PackedSequence) and not _is_shape(x)
    leaves: tuple[Any, ...] = x if many else (x,)
    for leaf in leaves:
        _check_leaf(name, leaf)
        if not isinstance(leaf, Tensor) and not _is_shape(leaf):
            leaf = x if isinstance(leaf, (int, float)) else leaf  # one size of a shape
            raise InputError(
                f"a plan for {name} is made for a tensor, a shape such as (1, 3, 512, 512), or a tuple of them; got "
                f"{type(leaf).__name__} {str(leaf)[:40]!r}"
            )
        if not isinstance(leaf, Tensor) and min(leaf, default=0) < 0:
            raise InputError(f"a plan for {name} was asked for the shape {tuple(leaf)}: sizes are 0 or more")
        sizes = tuple(map(int, leaf.shape if isinstance(leaf, Tensor) else leaf))
        if prod(sizes) > LARGEST:
            raise InputError(
                f"a plan for {name} was asked for the shape {sizes}, {prod(sizes):,} elements: no more than "
                f"{LARGEST:,} are planned for. Cut the input into several."
            )
    return leaves


def _is_shape(x: Any) -> bool:
    return isinstance(x, (tuple, list)) and all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in x)


def misfit(model: nn.Module, args: Any, kwargs: Any) -> str:
    """Why the model's forward cannot be called with so many or such arguments, or nothing."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # one written in C has none
        return ""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = [*(["1 input"] if len(args) == 1 else [f"{len(args)} inputs"]), *(f"{k}=" for k in kwargs)]
        return f"called with {', '.join(given)}: {error}. Its signature is forward{signature}"
    return ""


def check_gradient_hooks(model: nn.Module) -> None:
    """Raises CaptureError where a hook would see, and may change, gradients within the network."""
    hooked = [n or type(model).__name__ for n, m in model.named_modules() if m._backward_hooks or m._backward_pre_hooks]
    if nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks:
        hooked.append("every module (a global hook)")
    if hooked:
        raise CaptureError(
            f"{hooked[0]} has a backward hook, which would not be called: regions have no gradient of a whole module. Remove "
            "it, register it on the regional module, or use hooks of tensors (parameter.register_hook)."
        )


def leaf_key(x: Any, grad: bool) -> Any:
    """What a plan depends on of one input; of its order in memory too, which decides what is a view and what a copy."""
    if not isinstance(x, Tensor):
        return token(x)
    return tuple(x.shape), x.dtype, x.device, grad and x.requires_grad, x.stride()


def shared(leaves: Sequence[Any]) -> tuple[int, ...]:
    """Of each leaf, the first place where the very same tensor is given: forward may ask whether two are one."""
    places: dict[int, int] = {}
    return tuple(places.setdefault(id(x), i) if isinstance(x, Tensor) else i for i, x in enumerate(leaves))


def stand_ins(leaves: Sequence[Any], grad: bool) -> list[Any]:
    """Tensors like those of a call, with nothing in them; one that is given twice is one."""
    made = [stand_in(x, grad) for x in leaves]
    return [made[i] for i in shared(leaves)]


def stand_in(x: Any, grad: bool) -> Any:
    """A tensor like `x` for capture, with nothing in it."""
    if not isinstance(x, Tensor):
        return x
    like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return like.requires_grad_(grad and x.requires_grad)
