"""`--where`: which samples a run wants, by the fields of their JSON records. Knows no shards and no captions.

An expression in Python's syntax, such as `NSFW in ['UNLIKELY'] and similarity > 0.3`. It is parsed by `ast`,
checked against a list of what is known, and turned into closures: nothing of it is ever executed as Python.

- A bare name is a field of the record; `record['odd name']` reads any name, `meta['a']['b']` and `tags[0]` go
  inside. What is not there is None.
- Numbers, text, True, False, None, and lists, tuples or sets of these. `and`, `or`, `not`, parentheses.
- `== != < <= > >= in`, `not in`, chains such as `0.2 < punsafe < 0.5`, and `is None`, `is not None`.
- `+ - * /` on numbers; anything else in them, and a division by zero, gives None. `len(x)`, `lower(text)`.

Meanings are Python's, but nothing raises. An order between things that have none (None, text and a number) is
False, and so is `in` something that holds nothing. Types are not converted: what writes the records (img2dataset)
keeps numbers as numbers, so that the text "0.31" is not above 0.3. NaN is above and below nothing. A `not` in
front of a comparison therefore keeps records without the field: add `and x is not None` where that is not meant.
"""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NoReturn

from data.errors import DataConfigError
from data.samples import RawSample, SampleError, record_of

_MAX_CHARACTERS = 4096
_MAX_DEPTH = 64
_MAX_BITS = 1024  # of a whole number in arithmetic: products must not grow for ever
_RECORD = "record"
_ALLOWED = (
    "known are field names and record['odd name'], numbers, text, True, False, None, lists of these, "
    "== != < <= > >= in, not in, is None, and, or, not, + - * /, parentheses, len(), lower()"
)

_Value = Callable[[Mapping[str, Any]], Any]


class Where:
    """A parsed expression; made by `parse`. `fields` are the names of the record's fields that it reads."""

    def __init__(self, text: str, value: _Value, fields: Iterable[str]):
        self.text = text
        self.fields = frozenset(fields)
        self._value = value

    @classmethod
    def parse(cls, text: str) -> Where:
        """The expression `text`. DataConfigError names the part that is not understood, and what would be."""
        if len(text) > _MAX_CHARACTERS:
            raise DataConfigError(f"--where: {len(text)} characters; at most {_MAX_CHARACTERS} are read")
        text = text.strip()
        compiler = _Compiler(text)
        return cls(text, compiler.compile(_parse(text)), compiler.fields)

    def keeps(self, record: Mapping[str, Any]) -> bool:
        """Whether the expression holds for a record. Never raises."""
        return bool(self._value(record))

    def __reduce__(self) -> tuple[Callable[[str], Where], tuple[str]]:
        return Where.parse, (self.text,)


class Filter:
    """A `Where` on raw samples."""

    def __init__(self, where: Where):
        self.where = where

    def keeps(self, raw: RawSample) -> bool:
        """Whether the sample's JSON record passes. A sample without a record, or with a broken one, does not."""
        try:
            record = record_of(raw)
        except SampleError:
            return False
        return isinstance(record, Mapping) and self.where.keeps(record)


def _parse(text: str) -> ast.expr:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in a text are the user's business
            return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        place = _offset(text, error.lineno or 1, error.offset - 1) if error.offset else len(text)
        rest = text[place:].split(maxsplit=1)
        _refuse(text, place, rest[0] if rest else "", f"is not understood ({error.msg})")
    except (ValueError, RecursionError, MemoryError) as error:
        _refuse(text, 0, text, f"cannot be read ({str(error) or 'nested too deeply'})")


class _Compiler:
    """Turns the nodes that are known into closures over the record, and collects the fields' names."""

    def __init__(self, text: str):
        self.text = text
        self.fields: set[str] = set()
        self._depth = 0

    def compile(self, node: ast.expr) -> _Value:
        """`node` as a function of the record. DataConfigError for what is not on the list."""
        method = self._KNOWN.get(type(node))
        if method is None:
            self._refuse(node, "is not allowed")
        if self._depth >= _MAX_DEPTH:
            self._refuse(node, f"is nested too deeply (more than {_MAX_DEPTH} levels)")
        self._depth += 1
        value = method(self, node)
        self._depth -= 1
        return value

    def _constant(self, node: ast.Constant) -> _Value:
        value = self._literal(node)
        return lambda record: value

    def _literal(self, node: ast.expr) -> Any:
        """The value of a number (with a sign, too), text, True, False or None."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            number = node.operand.value if isinstance(node.operand, ast.Constant) else None
            if isinstance(number, int | float):
                return -number if isinstance(node.op, ast.USub) else number
        self._refuse(node, "is no number, text, True, False or None")

    def _list(self, node: ast.List) -> _Value:
        items = [self._literal(item) for item in node.elts]
        return lambda record: items

    def _tuple(self, node: ast.Tuple) -> _Value:
        items = tuple(self._literal(item) for item in node.elts)
        return lambda record: items

    def _set(self, node: ast.Set) -> _Value:
        items = frozenset(self._literal(item) for item in node.elts)
        return lambda record: items

    def _name(self, node: ast.Name) -> _Value:
        if node.id == _RECORD:
            self._refuse(node, "is the record itself: write record['name']")
        return self._field(node.id)

    def _field(self, name: str) -> _Value:
        self.fields.add(name)
        return lambda record: record.get(name)

    def _subscript(self, node: ast.Subscript) -> _Value:
        key = node.slice.value if isinstance(node.slice, ast.Constant) else None
        is_field = isinstance(node.value, ast.Name) and node.value.id == _RECORD
        if isinstance(key, str) and is_field:
            return self._field(key)
        if not isinstance(key, str) and (type(key) is not int or is_field):
            self._refuse(node.slice, "is no name in quotes, nor (in a list) a number that counts from 0")
        whole = self.compile(node.value)
        return lambda record: _inside(whole(record), key)

    def _boolop(self, node: ast.BoolOp) -> _Value:
        values = [self.compile(value) for value in node.values]
        return _all_of(values) if isinstance(node.op, ast.And) else _any_of(values)

    def _unaryop(self, node: ast.UnaryOp) -> _Value:
        value = self.compile(node.operand)
        if isinstance(node.op, ast.Not):
            return lambda record: not value(record)
        if isinstance(node.op, ast.USub):
            return lambda record: _calculate(operator.sub, 0, value(record))
        if isinstance(node.op, ast.UAdd):
            return lambda record: _calculate(operator.add, 0, value(record))
        self._refuse(node, "has an operator that is not allowed")

    def _binop(self, node: ast.BinOp) -> _Value:
        calculate = _ARITHMETIC.get(type(node.op))
        if calculate is None:
            self._refuse(node, "has an operator that is not allowed")
        for side in (node.left, node.right):
            if isinstance(side, ast.Constant) and not _is_number(side.value):
                self._refuse(side, "is no number, and + - * / are for numbers")
        left, right = self.compile(node.left), self.compile(node.right)
        return lambda record: _calculate(calculate, left(record), right(record))

    def _compare(self, node: ast.Compare) -> _Value:
        steps = []
        for sign, side in zip(node.ops, node.comparators, strict=True):
            if isinstance(sign, ast.Is | ast.IsNot) and not (isinstance(side, ast.Constant) and side.value is None):
                self._refuse(side, "follows `is`, which is for None only; write ==")
            steps.append((_COMPARISONS[type(sign)], self.compile(side)))
        first = self.compile(node.left)
        if len(steps) == 1:
            ((compare, second),) = steps
            return lambda record: compare(first(record), second(record))
        return lambda record: _holds(first(record), steps, record)

    def _call(self, node: ast.Call) -> _Value:
        function = _FUNCTIONS.get(node.func.id) if isinstance(node.func, ast.Name) else None
        if function is None or node.keywords or len(node.args) != 1:
            self._refuse(node, "is not allowed: the only calls are len(x) and lower(text)")
        value = self.compile(node.args[0])
        return lambda record: function(value(record))

    def _attribute(self, node: ast.Attribute) -> _Value:
        self._refuse(node, "is not allowed: a field inside a field is a['b'], a name with a dot record['a.b']")

    def _refuse(self, node: ast.expr, why: str) -> NoReturn:
        line = _lines(self.text)[node.lineno - 1]
        characters = len(line.encode()[: node.col_offset].decode(errors="ignore"))
        part = ast.get_source_segment(self.text, node) or ""
        _refuse(self.text, _offset(self.text, node.lineno, characters), part, why)

    _KNOWN: ClassVar[dict[type[ast.expr], Callable[[_Compiler, Any], _Value]]] = {
        ast.Constant: _constant,
        ast.List: _list,
        ast.Tuple: _tuple,
        ast.Set: _set,
        ast.Name: _name,
        ast.Subscript: _subscript,
        ast.BoolOp: _boolop,
        ast.UnaryOp: _unaryop,
        ast.BinOp: _binop,
        ast.Compare: _compare,
        ast.Call: _call,
        ast.Attribute: _attribute,
    }


def _refuse(text: str, offset: int, part: str, why: str) -> NoReturn:
    named = repr(_short(part, 60)) if part.strip() else "the end" if text else "an empty expression"
    raise DataConfigError(f"--where {_short(text, 120)}: at character {offset + 1}: {named} {why}; {_ALLOWED}")


def _short(text: str, limit: int) -> str:
    """One printable line of at most `limit` characters."""
    line = " ".join(text.encode(errors="backslashreplace").decode().split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _lines(text: str) -> list[str]:
    """Lines as Python counts them, with their ends."""
    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n|$)", text)


def _offset(text: str, line: int, character: int) -> int:
    """The place of a character of a line (lines from 1 on) in the whole text."""
    return min(len(text), sum(map(len, _lines(text)[: line - 1])) + max(0, character))


def _all_of(values: list[_Value]) -> _Value:
    def value(record: Mapping[str, Any]) -> Any:
        last = None
        for one in values:
            last = one(record)
            if not last:
                break
        return last

    return value


def _any_of(values: list[_Value]) -> _Value:
    def value(record: Mapping[str, Any]) -> Any:
        last = None
        for one in values:
            last = one(record)
            if last:
                break
        return last

    return value


def _holds(left: Any, steps: list[tuple[Callable[[Any, Any], bool], _Value]], record: Mapping[str, Any]) -> bool:
    """Whether every link of a chain of comparisons holds, each between neighbours."""
    for compare, value in steps:
        right = value(record)
        if not compare(left, right):
            return False
        left = right
    return True


def _inside(whole: Any, key: str | int) -> Any:
    if isinstance(whole, Mapping):
        return whole.get(key)
    is_place = isinstance(whole, list) and isinstance(key, int) and key < len(whole)
    return whole[key] if is_place else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _calculate(operation: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    for value in (left, right):
        if not _is_number(value) or (isinstance(value, int) and value.bit_length() > _MAX_BITS):
            return None
    try:
        return operation(left, right)
    except (ZeroDivisionError, OverflowError):
        return None


def _careful(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """`compare`, and False where it has no answer."""

    def careful(left: Any, right: Any) -> bool:
        try:
            return compare(left, right)
        except (TypeError, RecursionError):
            return False

    return careful


_in = _careful(lambda left, right: left in right)

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: _careful(operator.eq),
    ast.NotEq: _careful(operator.ne),
    ast.Lt: _careful(operator.lt),
    ast.LtE: _careful(operator.le),
    ast.Gt: _careful(operator.gt),
    ast.GtE: _careful(operator.ge),
    ast.In: _in,
    ast.NotIn: lambda left, right: not _in(left, right),
    ast.Is: lambda left, right: left is right,
    ast.IsNot: lambda left, right: left is not right,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "len": lambda value: len(value) if isinstance(value, str | list | tuple | Mapping) else None,
    "lower": lambda value: value.lower() if isinstance(value, str) else None,
}
