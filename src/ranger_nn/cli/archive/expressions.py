"""The grammar of shape expressions and guards: integers, symbols and arithmetic.

PyTorch hands the first to `sympy.sympify`, which evaluates them as Python, and puts the second into
the source of a function. Here both are parsed, never evaluated; what is not arithmetic is refused,
and so is a number that would take more memory than a machine has (`9**9**9`): each node gives a
bound of the bits of its value.
"""

from __future__ import annotations

import ast
import re

from ranger_nn.cli.archive.words import Forbidden, plain

# The names that PyTorch gives to sizes: s77, u0, zf1, zuf2. Nothing of Python's or SymPy's looks so.
_SYMBOL = re.compile(r"[a-z]{1,4}[0-9]{1,9}")
_NUMBER = re.compile(r"-?[0-9.]{1,40}(e[+-]?[0-9]{1,4})?")
_CONSTANTS = {"oo", "int_oo", "nan", "inf", "true", "false"}
_SYMBOL_BITS = 64  # a size is an int64
_MOST_BITS = 1 << 16  # a thousand sizes multiplied
_LARGEST_POWER = 64  # dimensions of a tensor are at most this many
_LONGEST = 100_000  # characters; the parser's own stack is kept from overflowing by RecursionError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What SymPy's `srepr` writes for the operators, and the functions of `torch.utils._sympy`.
_FUNCTIONS = _words(
    "Add Mul Pow Max Min Abs Mod floor ceiling Integer Float Rational Symbol Dummy And Or Not Xor ITE Piecewise "
    "ExprCondPair Equality Unequality Eq Ne LessThan GreaterThan StrictLessThan StrictGreaterThan Le Ge Lt Gt "
    "FloorDiv ModularIndexing Where PythonMod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural "
    "FloatPow FloatTrueDiv IntTrueDiv IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt "
    "RoundDecimal ToFloat Identity BitwiseFn_bitwise_and BitwiseFn_bitwise_or BitwiseFn_bitwise_xor "
    "OpaqueUnaryFn_sqrt OpaqueUnaryFn_cos OpaqueUnaryFn_cosh OpaqueUnaryFn_sin OpaqueUnaryFn_sinh "
    "OpaqueUnaryFn_tan OpaqueUnaryFn_tanh OpaqueUnaryFn_asin OpaqueUnaryFn_acos OpaqueUnaryFn_atan "
    "OpaqueUnaryFn_exp OpaqueUnaryFn_log OpaqueUnaryFn_asinh OpaqueUnaryFn_log2"
)
_POWERS = {"Pow", "PowByNatural", "FloatPow", "LShift", "RShift"}
# What PyTorch's printer of guards writes.
_GUARD_FUNCTIONS = _words(
    "abs max min round int float bool IsNonOverlappingAndDenseIndicator cast_symbool_to_symint_guardless "
    "math.floor math.ceil math.trunc math.sqrt math.log2 math.cos math.cosh math.acos math.sin math.sinh math.asin "
    "math.tan math.tanh math.atan math.isnan torch.sym_float torch.sym_int torch.sym_max torch.sym_min "
    "torch._sym_sqrt torch.sym_ite torch.sym_not"
)
_GUARD_CONSTANTS = {"math.inf", "math.nan"}
_METHODS = {"size", "stride", "storage_offset", "dim", "numel"}


def expression(text: str) -> None:
    """A shape expression, as `srepr` or `str` of SymPy writes it."""
    _Arithmetic().check(text)


def guard(text: str) -> None:
    """A condition on the sizes of inputs, such as `L['x'].size()[0] % 4 == 0`."""
    _Guards().check(text)


class _Arithmetic:
    """Walks an expression's tree; `bits` gives a bound of its value, or refuses."""

    functions = _FUNCTIONS

    def check(self, text: str) -> None:
        if len(text) > _LONGEST or not text.isprintable() or "#" in text:
            raise Forbidden("must be one line of arithmetic on sizes")
        try:
            self.bits(ast.parse(text, mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            if isinstance(error, Forbidden):
                raise
            raise Forbidden("must be arithmetic on sizes that Python can parse") from error

    def bits(self, node: ast.expr) -> int:
        found = self._bits(node)
        if found > _MOST_BITS:
            raise Forbidden(f"must stay below numbers of {_MOST_BITS} bits")
        return found

    def _bits(self, node: ast.expr) -> int:
        match node:
            case ast.Constant(value=bool() | float()):
                return _SYMBOL_BITS
            case ast.Constant(value=int(value)):
                return value.bit_length()
            case ast.Name(id=name) if name in _CONSTANTS or _SYMBOL.fullmatch(name):
                return _SYMBOL_BITS
            case ast.UnaryOp(operand=operand):
                return self.bits(operand)
            case ast.BinOp(left=left, op=ast.Pow() | ast.LShift() | ast.RShift(), right=right):
                return self._power(left, right, isinstance(node.op, ast.Pow))
            case ast.BinOp(left=left, op=op, right=right) if not isinstance(op, ast.MatMult):
                return self.bits(left) + self.bits(right)
            case ast.BoolOp(values=parts):
                return self._most(parts)
            case ast.Compare(left=left, ops=ops, comparators=rest) if not any(map(_is_membership, ops)):
                return self._most([left, *rest])
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self._most([test, body, orelse])
            case ast.Call(func=func, args=args, keywords=keywords):
                return self._call(_name(func), args, keywords)
        raise Forbidden(f"must be integers, sizes and arithmetic; {ast.unparse(node)[:80]!r} is none of them")

    def _call(self, name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> int:
        if name not in self.functions:
            raise Forbidden("must be arithmetic; it calls " + (repr(name) if name else "what has no name"))
        if name in ("Symbol", "Dummy", "Float"):
            return _leaf(name, args, keywords)
        if keywords or any(isinstance(arg, ast.Starred) for arg in args):
            raise Forbidden(f"{name} takes plain arguments only")
        if name in _POWERS and len(args) == 2:
            return self._power(args[0], args[1], name not in ("LShift", "RShift"))
        return sum(self.bits(arg) for arg in args)

    def _power(self, base: ast.expr, exponent: ast.expr, power: bool) -> int:
        """The exponent is a small number: no expression can then outgrow the bound unseen."""
        value = _small_number(exponent)
        if value is None:
            raise Forbidden(f"powers and shifts must be by a number of at most {_LARGEST_POWER}")
        return self.bits(base) * max(value, 1) if power else self.bits(base) + value

    def _most(self, parts: list[ast.expr]) -> int:
        return max(self.bits(part) for part in parts)


class _Guards(_Arithmetic):
    """Arithmetic on what is read from the inputs, `L['x'].size()[0]`."""

    functions = _GUARD_FUNCTIONS

    def _bits(self, node: ast.expr) -> int:
        if isinstance(node, ast.Attribute) and _name(node) in _GUARD_CONSTANTS:
            return _SYMBOL_BITS
        if isinstance(node, ast.Call) and _name(node.func) in self.functions:
            return super()._bits(node)
        if isinstance(node, ast.Call | ast.Subscript | ast.Attribute):
            _source(node)
            return _SYMBOL_BITS
        return super()._bits(node)


def _source(node: ast.expr) -> None:
    """An input's size, or a part of the inputs: a chain that starts at `L['name']`."""
    match node:
        case ast.Subscript(value=ast.Name(id="L"), slice=ast.Constant(value=str(name))):
            plain(name)
        case ast.Subscript(value=value, slice=ast.Constant(value=str() | int() as key)):
            if isinstance(key, str):
                plain(key)
            _source(value)
        case ast.Call(func=ast.Attribute(value=value, attr=method), args=[], keywords=[]) if method in _METHODS:
            _source(value)
        case ast.Attribute(value=value, attr=name) if not name.startswith("_"):
            _source(value)
        case _:
            raise Forbidden(f"must be conditions on sizes of inputs; {ast.unparse(node)[:80]!r} is none")


def _leaf(name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> int:
    """Symbol('s77', positive=True) or Float('0.5', precision=53)."""
    rule = _NUMBER if name == "Float" else _SYMBOL
    match args:
        case [ast.Constant(value=str(text))] if rule.fullmatch(text):
            pass
        case [ast.Constant(value=float() | int())] if name == "Float":
            pass
        case _:
            raise Forbidden(f"{name} must hold " + ("a number" if name == "Float" else "a size's name such as 's0'"))
    if not all(word.arg and isinstance(word.value, ast.Constant) for word in keywords):
        raise Forbidden(f"{name} takes assumptions that are True or False only")
    if any(not isinstance(word.value.value, bool | int) for word in keywords if isinstance(word.value, ast.Constant)):
        raise Forbidden(f"{name} takes assumptions that are True or False only")
    return _SYMBOL_BITS


def _small_number(node: ast.expr) -> int | None:
    """The magnitude of a written number, rounded up: 2, -1, Integer(2), Rational(1, 2)."""
    match node:
        case ast.Constant(value=int() | float() as value) if abs(value) <= _LARGEST_POWER:
            return int(abs(value)) + 1
        case ast.UnaryOp(operand=operand):
            return _small_number(operand)
        case ast.Call(func=ast.Name(id="Integer" | "Rational"), args=[first, *_]):
            return _small_number(first)
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str(text))]) if _NUMBER.fullmatch(text):
            return _small_number(ast.Constant(value=float(text)))
    return None


def _name(node: ast.expr) -> str:
    """`max` or `math.floor`; nothing for what has no name of one or two parts."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Name(id=module), attr=name):
            return f"{module}.{name}"
    return ""


def _is_membership(op: ast.cmpop) -> bool:
    return isinstance(op, ast.In | ast.NotIn)
