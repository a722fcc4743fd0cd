"""The model of an archive, field by field along PyTorch's own schema.

Each value must have the type that the schema states (its loader does not look, and evaluates a text
that stands for a number), each text the rule of its field. A field that has no rule of its own must be
an identifier: a schema that grows is refused where it is not known, not let through.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Callable
from typing import Any

from torch._export.serde import schema
from torch._export.serde.union import _Union

from ranger_nn.cli.archive.expressions import expression, guard
from ranger_nn.cli.archive.operators import target
from ranger_nn.cli.archive.trees import tree
from ranger_nn.cli.archive.words import (
    Forbidden,
    anything,
    dotted,
    identifier,
    identifier_or_nothing,
    path,
    plain,
)

Rule = Callable[[str], None]

_RULES: dict[str, Rule] = {
    "Node.target": target,
    "Node.name": identifier,
    "Argument.as_operator": target,
    "Argument.as_string": plain,
    "Argument.as_strings": plain,
    "Argument.as_string_to_argument.key": plain,
    "ConstantValue.as_string": plain,
    "NamedArgument.name": identifier_or_nothing,
    "SymExpr.expr_str": expression,
    "ExportedProgram.range_constraints.key": expression,
    "ExportedProgram.guards_code": guard,
    "ExportedProgram.verifiers": identifier_or_nothing,
    "ExportedProgram.torch_version": plain,
    "ModuleCallSignature.in_spec": tree,
    "ModuleCallSignature.out_spec": tree,
    "ModuleCallEntry.fqn": path,
    "GraphModule.metadata": anything,  # JSON, kept as data
    "GraphModule.treespec_namedtuple_fields.key": path,
    "CustomObjArgument.class_fqn": dotted,
    "InputToParameterSpec.parameter_name": path,
    "InputToBufferSpec.buffer_name": path,
    "InputToTensorConstantSpec.tensor_constant_name": path,
    "InputToCustomObjSpec.custom_obj_name": path,
    "BufferMutationSpec.buffer_name": path,
    "ParameterMutationSpec.parameter_name": path,
    "GradientToParameterSpec.parameter_name": path,
    "PayloadConfig.config.key": path,
}
# Arguments of an operator: PyTorch quotes them in what it generates ("bij,bjk->bik", messages of assertions).
_RULES_OF_A_NODE = _RULES | {"Argument.as_string": anything, "Argument.as_strings": anything}
# Remarks of a node (where it stood in the model's source), but for one that names functions.
_METADATA = "Node.metadata"
_INFINITIES = ("Infinity", "-Infinity", "NaN")


class Misplaced(Exception):
    """Where in the model a rule is broken, by what, and the rule."""

    def __init__(self, place: str, rule: str, value: object) -> None:
        super().__init__(f"{place} {rule}; got {str(value)[:120]!r}")


def check_program(model: object) -> None:
    """All of `models/NAME.json`."""
    _check(schema.ExportedProgram, model, "", "", _RULES)


def check_payload(table: object) -> None:
    """All of `NAME_weights_config.json` and its like."""
    _check(schema.PayloadConfig, table, "", "", _RULES)


def _check(kind: Any, value: Any, field: str, place: str, rules: dict[str, Rule]) -> None:
    """`kind`: what the schema says; `field`: its class and name, to find the rule; `place`: for the reader."""
    kind, optional = _plain_kind(kind)
    if optional and value is None:
        return
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        _check_object(kind, value, place, rules)
    elif typing.get_origin(kind) is list:
        _must(isinstance(value, list), place, "must be a list", value)
        for index, part in enumerate(value):
            _check(typing.get_args(kind)[0], part, field, f"{place}[{index}]{_named(part)}", rules)
    elif typing.get_origin(kind) is dict:
        _check_table(typing.get_args(kind)[1], value, field, place, rules)
    else:
        _check_scalar(kind, value, field, place, rules)


def _check_object(kind: type, value: Any, place: str, rules: dict[str, Rule]) -> None:
    _must(isinstance(value, dict), place, f"must be {kind.__name__}", value)
    if kind is schema.Graph:
        rules = _RULES  # also of a graph inside a node: its inputs are not quoted
    elif kind is schema.NamedArgument:
        rules = _RULES_OF_A_NODE
    hints = _hints(kind)
    if issubclass(kind, _Union):
        known = len(value) == 1 and next(iter(value)) in hints
        _must(known, place, f"must be one of the kinds of {kind.__name__}", list(value))
    for name, part in value.items():
        if name in hints:  # PyTorch does not read the others
            _check(hints[name], part, f"{kind.__name__}.{name}", f"{place}.{name}".lstrip("."), rules)


def _check_table(kind: Any, value: Any, field: str, place: str, rules: dict[str, Rule]) -> None:
    _must(isinstance(value, dict), place, "must be a table", value)
    for key, part in value.items():
        _apply(rules.get(f"{field}.key", identifier), key, f"a name in {place}")
        if field == _METADATA:
            _must(isinstance(part, str), place, "must be text", part)
            _apply(_source_functions if key == "source_fn_stack" else anything, part, f"{place}.{key}")
        else:
            _check(kind, part, field, f"{place}[{key}]", rules)


def _check_scalar(kind: Any, value: Any, field: str, place: str, rules: dict[str, Rule]) -> None:
    if kind is str:
        _must(isinstance(value, str), place, "must be text", value)
        _apply(rules.get(field, identifier), value, place)
    elif kind is bool:
        _must(isinstance(value, bool), place, "must be true or false", value)
    elif kind is float:
        number = isinstance(value, float | int) and not isinstance(value, bool)
        _must(number or value in _INFINITIES, place, "must be a number", value)
    elif kind is int or (isinstance(kind, type) and issubclass(kind, enum.IntEnum)):
        _must(type(value) is int, place, "must be a whole number", value)
    else:
        raise Misplaced(place, f"has a type that is not known here, {kind}", value)


def _source_functions(text: str) -> None:
    """`name,torch.nn.functional.relu;...`: looked up by PyTorch as an attribute."""
    for part in text.split(";"):
        for word in part.split(","):
            dotted(word)


def _apply(rule: Rule, text: str, place: str) -> None:
    try:
        rule(text)
    except Forbidden as error:
        raise Misplaced(place, str(error), text) from error


def _must(holds: bool, place: str, rule: str, value: object) -> None:
    if not holds:
        raise Misplaced(place or "the model", rule, value)


def _named(part: Any) -> str:
    """A node's own name beside its number."""
    name = part.get("name") if isinstance(part, dict) else None
    return f" {name[:60]!r}" if isinstance(name, str) and name else ""


def _plain_kind(kind: Any) -> tuple[Any, bool]:
    """Without `Annotated` and `None`; whether it may be None."""
    if typing.get_origin(kind) is typing.Annotated:
        return _plain_kind(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (inner,) = (part for part in typing.get_args(kind) if part is not type(None))
        return _plain_kind(inner)[0], True
    return kind, False


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, globalns=vars(schema))
