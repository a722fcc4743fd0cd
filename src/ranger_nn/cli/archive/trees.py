"""How inputs and outputs nest, as JSON of PyTorch's pytrees.

Its loader imports the module that an enumeration or the factory of a `defaultdict` names, and the
keys of dicts become generated source.
"""

from __future__ import annotations

import json
from typing import Any

from torch.utils import _pytree

from ranger_nn.cli.archive.words import Forbidden, plain

_FACTORIES = {"list", "dict", "set", "tuple", "int", "float", "bool", "str"}
_NODE = {"type", "context", "children_spec"}


def tree(text: str) -> None:
    """`[1, {"type": ..., "context": ..., "children_spec": [...]}]`."""
    match _parsed(text):
        case [int(), dict(node)]:
            _check_node(node)
        case _:
            raise Forbidden("must be a tree of PyTorch's containers")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Forbidden("must be a tree of PyTorch's containers, as JSON") from error


def _check_node(node: Any) -> None:
    if not isinstance(node, dict) or set(node) != _NODE or not isinstance(node["children_spec"], list):
        raise Forbidden("must be a tree of PyTorch's containers")
    known = _pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
    if node["type"] is not None and not (isinstance(node["type"], str) and node["type"] in known):
        raise Forbidden(f"must be of containers that are registered here; {node['type']!r:.80} is not")
    _check_context(node["context"])
    for child in node["children_spec"]:
        _check_node(child)


def _check_context(context: Any) -> None:
    """The keys of a container: JSON, or JSON as text."""
    if isinstance(context, dict) and "default_factory_module" in context:
        name = context.get("default_factory_name")
        known = context["default_factory_module"] == "builtins" and isinstance(name, str) and name in _FACTORIES
        if not known:
            raise Forbidden("a defaultdict's factory must be one of " + ", ".join(sorted(_FACTORIES)))
    if isinstance(context, str):
        try:
            context = json.loads(context)
        except ValueError:
            plain(context)  # the name of a registered container
    _check_keys(context)


def _check_keys(value: Any) -> None:
    if isinstance(value, dict):
        if "__enum__" in value or "fqn" in value:
            raise Forbidden("keys must be text or numbers; an enumeration's module is not imported")
        for key, part in value.items():
            plain(key)
            _check_keys(part)
    elif isinstance(value, list):
        for part in value:
            _check_keys(part)
    elif isinstance(value, str):
        plain(value)
