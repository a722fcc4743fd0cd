"""From MODEL and INPUT as text to a module and tensors on their device.

This is where the command line meets PyTorch: `import_torch` is called when a command runs, never
when a file of this folder is imported.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ranger_nn.errors import InputError, MissingExtraError
from ranger_nn.io.inputs import load_input, parse_input

if TYPE_CHECKING:
    from torch import Tensor, nn


def import_torch() -> ModuleType:
    """PyTorch, with its C++ side told to report errors only: warnings there speak of its own insides."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise MissingExtraError(
            "the command line needs PyTorch, which is not installed. Install it with: pip install 'ranger-nn[torch]'"
        ) from error


def load_model(chosen: argparse.Namespace, training: bool = False) -> nn.Module:
    """The module that MODEL names, on its device, in its dtype and mode.

    Raises:
        InputError: no such archive, module or factory, or it does not give a `torch.nn.Module`.
    """
    torch = import_torch()
    _check_device(torch, chosen.device)
    torch.manual_seed(chosen.seed)
    text: str = chosen.model
    if text.lower().endswith(".keras"):
        raise InputError(
            f"MODEL {text!r} is a file of Keras's, which `ranger-nn run` takes from file to file alone: one INPUT that is a file, "
            "and an output that ends in .zarr, .tif or .npy. In memory use ranger_nn.regionalize."
        )
    model = _load_archive(text) if text.lower().endswith(".pt2") else _call_factory(text)
    _check_kind(torch, model, text)
    _check_number(model, chosen)
    _set_mode(model, text, training)
    dtype = getattr(torch, chosen.dtype) if chosen.dtype else None
    return model.to(device=chosen.device, dtype=dtype)


def _check_kind(torch: Any, model: Any, text: str) -> None:
    """A module that can be captured; of the wrappers that cannot, what to give instead."""
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"MODEL {text!r} gave {type(model).__name__}, not a torch.nn.Module.")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"MODEL {text!r} gave a TorchScript module, which has no Python to capture. Give the module it was made of."
        )
    if isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
        raise InputError(
            f"MODEL {text!r} gave {type(model).__name__}, which sends inputs to other devices. Give its .module."
        )
    if type(model).__module__ == "ranger_nn.torch.module":
        raise InputError(f"MODEL {text!r} gave a module that is regionalized already. Give the untouched one.")


def _check_number(model: nn.Module, chosen: argparse.Namespace) -> None:
    """As many INPUTs as forward takes; told before capture, whose words are about graphs."""
    unfit = _why_not_called_with(model.forward, chosen.inputs)
    if unfit:
        raise InputError(
            f"MODEL {chosen.model!r} does not take {len(chosen.inputs)} INPUT(s) in order: its forward{unfit}. "
            "Give one INPUT for each tensor that it takes by position."
        )


def _why_not_called_with(function: Any, arguments: Sequence[object]) -> str:
    """The signature and what is wrong; nothing if the call suits, or if the call itself must tell."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # not written in Python
        return ""
    try:
        signature.bind(*arguments)
    except TypeError as error:
        return f"{signature}: {error}"
    return ""


def load_inputs(chosen: argparse.Namespace, model: nn.Module) -> tuple[Tensor, ...]:
    """One tensor per INPUT; floating-point values take the dtype of the model."""
    torch = import_torch()
    torch.manual_seed(chosen.seed)
    dtype = _dtype_of(torch, chosen, model)
    return tuple(_load_tensor(torch, text, dtype, chosen.device) for text in chosen.inputs)


def load_shapes(chosen: argparse.Namespace, model: nn.Module) -> tuple[Tensor, ...]:
    """One tensor without values (on the meta device) per INPUT: enough for a plan, whatever its size."""
    torch = import_torch()
    dtype = _dtype_of(torch, chosen, model)
    return tuple(_meta_tensor(torch, text, dtype) for text in chosen.inputs)


def leaves(outputs: Any) -> tuple[Tensor, ...]:
    """All tensors of a model's outputs, however nested, in their order."""
    torch = import_torch()
    pytree = importlib.import_module("torch.utils._pytree")
    return tuple(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor))


@contextmanager
def threads(chosen: argparse.Namespace) -> Iterator[None]:
    """The stated number of threads inside the `with` block, the former number after it."""
    torch = import_torch()
    before = torch.get_num_threads()
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_device(torch: Any, name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name!r} is not a device. Give cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name!r}: bytes are counted on cpu and cuda only. Give one of these.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name!r}: PyTorch finds no CUDA device here. Leave the option out for the CPU.")


def _load_archive(path: str) -> Any:
    if Path(path).is_dir():
        raise InputError(f"MODEL {path!r} is a folder, not an archive of torch.export.")
    if not Path(path).is_file():
        raise InputError(f"MODEL {path!r}: there is no such file.")
    if not os.access(path, os.R_OK):
        raise InputError(f"MODEL {path!r}: the file may not be read.")
    return importlib.import_module("ranger_nn.cli.archive.load").load_archive(path)


def _call_factory(text: str) -> Any:
    module_name, colon, attributes = text.partition(":")
    if not (module_name and colon and attributes):
        raise InputError(
            f"MODEL {text!r} is neither a .pt2 archive nor of the form package.module:factory.{_what_file_it_is(text)}"
        )
    with _working_folder_importable():
        try:
            found: Any = importlib.import_module(module_name)
        except (ImportError, ValueError, TypeError) as error:  # the last two: of names such as ".a" and "a..b"
            raise InputError(f"MODEL {text!r}: cannot import {module_name!r}: {error}.") from error
        for attribute in attributes.split("."):
            if not hasattr(found, attribute):
                raise InputError(f"MODEL {text!r}: {module_name!r} has no {attributes!r}.")
            found = getattr(found, attribute)
        if not callable(found):
            raise InputError(f"MODEL {text!r}: {attributes!r} is not callable. Name a function or class.")
        if isinstance(found, import_torch().nn.Module):
            return found
        unfit = _why_not_called_with(found, ())
        if unfit:
            raise InputError(f"MODEL {text!r}: it is called without arguments, but takes {unfit}.")
        return found()


def _what_file_it_is(text: str) -> str:
    """What to do with a file of another kind; nothing of it is read."""
    if Path(text).is_dir() and text:
        return " It is a folder."
    if not Path(text).is_file():
        return ""
    return (
        " It is a file: of torch.save or TorchScript (.pt, .pth, .ts) nothing is loaded here, for it holds objects or "
        "code without a graph. Write a factory that makes the module and loads it, or export it with torch.export.save."
    )


@contextmanager
def _working_folder_importable() -> Iterator[None]:
    """Console scripts do not look in the working folder, where a user's model usually is."""
    folder = os.getcwd()
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)


def _set_mode(model: nn.Module, text: str, training: bool) -> None:
    try:
        model.train(training)
    except NotImplementedError as error:
        # An exported module has the mode that it was exported in.
        if training:
            raise InputError(
                f"MODEL {text!r}: an exported archive cannot be put into training mode. "
                "Give package.module:factory for --train."
            ) from error


def _dtype_of(torch: Any, chosen: argparse.Namespace, model: nn.Module) -> Any:
    if chosen.dtype:
        return getattr(torch, chosen.dtype)
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floating, torch.float32)


def _load_tensor(torch: Any, text: str, dtype: Any, device: str) -> Tensor:
    given = parse_input(text)
    if isinstance(given, tuple):
        with _one_that_fits(text):
            return torch.rand(given, dtype=dtype, device=device)
    tensor = torch.from_numpy(load_input(given).copy())
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _meta_tensor(torch: Any, text: str, dtype: Any) -> Tensor:
    given = parse_input(text)
    if isinstance(given, tuple):
        with _one_that_fits(text):
            return torch.empty(given, dtype=dtype, device="meta")
    return _load_tensor(torch, text, dtype, "cpu").to("meta")


@contextmanager
def _one_that_fits(text: str) -> Iterator[None]:
    """PyTorch's allocator and its size arithmetic raise RuntimeError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise InputError(
            f"INPUT {text!r} is larger than this machine can hold. Give a smaller shape; `plan` takes all that PyTorch "
            "can count (2**63 bytes), and `run` reads a file region by region."
        ) from error
