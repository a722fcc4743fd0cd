"""Which operators an archive may name.

PyTorch finds them by attribute look-up from the package `torch`, so that `torch.os.system` would be
one. Here a name is an operator of a known namespace in the dispatcher's own list, or stands in one of
the short lists below, or was registered by the user's Python in this process.
"""

from __future__ import annotations

import os
import re

import torch

from ranger_nn.cli.archive.words import Forbidden

_OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)")
_NAMESPACES = {"aten", "prims", "quantized_decomposed", "torchvision"}
# Of these namespaces what opens a file.
_REFUSED = {"aten::from_file"}
# Those that torch.export makes of control flow and contexts; the others call objects, libraries or print.
_HIGHER_ORDER = {
    "torch.ops.higher_order." + name for name in (
        "cond", "while_loop", "scan", "associative_scan", "map_impl", "wrap_with_set_grad_enabled",
        "wrap_with_autocast", "auto_functionalized", "auto_functionalized_v2", "out_dtype", "wrap", "hints_wrapper",
        "tag_activation_checkpoint", "invoke_subgraph", "flex_attention", "strict_mode", "with_effects",
    )
}  # fmt: skip
# Arithmetic on sizes, and the levels of vmap and jvp.
_FUNCTIONS = {
    *("_operator." + name for name in (
        "eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "mul", "add", "sub", "floordiv", "mod", "pow", "truediv",
        "and_", "or_", "xor", "lshift", "rshift", "getitem", "not_", "abs",
    )),
    *("math." + name for name in ("trunc", "floor", "ceil", "sqrt", "log2")),
    *("torch." + name for name in (
        "sym_not", "sym_int", "sym_float", "sym_ite", "sym_max", "sym_min", "sym_sqrt", "sym_sum",
        "_sym_sqrt", "_sym_log2",
    )),
    "torch.fx.experimental.symbolic_shapes.sym_sqrt",
    *("torch._functorch.predispatch." + name for name in (
        "_add_batch_dim", "_remove_batch_dim", "_vmap_increment_nesting", "_vmap_decrement_nesting", "_make_dual",
        "_unpack_dual", "_jvp_increment_nesting", "_jvp_decrement_nesting", "_unwrap_for_grad", "_enter_dual_level",
        "_exit_dual_level", "lazy_load_decompositions",
    )),
}  # fmt: skip


def target(text: str) -> None:
    """The operator of a node."""
    if text in _FUNCTIONS or text in _HIGHER_ORDER:
        return
    matched = _OPERATOR.fullmatch(text)
    if not matched:
        raise Forbidden("must be an operator, torch.ops.NAMESPACE.NAME.OVERLOAD")
    namespace, name, overload = matched.groups()
    operator = f"{namespace}::{name}"
    if operator in _REFUSED:
        raise Forbidden("must be an operator on tensors; this one opens files")
    full = operator if overload == "default" else f"{operator}.{overload}"
    if full not in torch._C._dispatch_get_all_op_names():
        raise Forbidden(
            "must be an operator that this process knows; register it first, which on the command line the factory "
            "of package.module:factory can do"
        )
    if namespace not in _NAMESPACES and not _is_the_users(operator, full):
        raise Forbidden(f"must be of {', '.join(sorted(_NAMESPACES))} or registered by your own Python")


def _is_the_users(operator: str, full: str) -> bool:
    """Defined by Python outside of PyTorch's own folder: what a process registers, it trusts."""
    defined = torch._library.custom_ops.OPDEFS.get(operator)
    if defined is not None:
        return defined._init_fn.__module__.partition(".")[0] != "torch"
    registered = re.search(r"^debug: registered at (.+):\d+$", torch._C._dispatch_dump(full), re.MULTILINE)
    if registered is None or not registered[1].endswith(".py"):
        return False
    ours = os.path.dirname(os.path.abspath(torch.__file__))
    return not os.path.abspath(registered[1]).startswith(ours + os.sep)
