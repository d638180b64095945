"""Configuration of a MONAI bundle, parsed without running anything in it.

Values that start with `$` are Python. Those that the runtime needs may consist of literals,
references, arithmetic, `len` and conditional expressions; everything else is refused by name.

Source: MONAI 1.6.1, `monai.bundle.ConfigParser` and `ReferenceResolver`.
"""

from __future__ import annotations

import ast
import copy
import operator
import posixpath
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from attnseg.imports.folder import read_json
from attnseg.runtime.errors import ExportError

_REFERENCE = re.compile(r"@\w+(?:(?:::|#)\w+)*")
_NAME = "reference_{}_of_the_config"
_DEEPEST = 50
_MOST_ITEMS = 10_000  # of one value, after its references are replaced
_LONGEST = 1000  # characters of an expression
_MOST_BITS = 64  # of an integer that is computed
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_FLOAT32 = ("float32", "$torch.float32", "$torch.float", "$np.float32", "$numpy.float32")


class _UnknownError(Exception):
    """An expression is not one of those that are understood."""


class Config:
    """A parsed `inference.json`.

    Attributes:
        path: The file, for messages.
        root: Content of the file.
    """

    def __init__(self, path: Path) -> None:
        """Read a file.

        Raises:
            ExportError: The file is missing, not JSON, or no object.
        """
        self.path = path
        self.root = read_json(path)
        self._items = 0
        self._known: dict[str, Any] = {}
        self._unknown: str | None = None

    def lenient(self) -> Config:
        """The config, in which the value of Python that is not recognised is `?`."""
        found = copy.copy(self)
        found._unknown, found._known = "?", {}
        return found

    def section(self, name: str) -> Any:
        """A section as it is written; None if it is missing."""
        return self.root.get(name)

    def component(self, *names: str) -> Component:
        """Component of the first of these sections that is there.

        Raises:
            ExportError: There is none, or it names no class.
        """
        for name in names:
            found = self.root.get(name)
            if isinstance(found, str) and _REFERENCE.fullmatch(found):
                found = self.shallow(found, name)
            if isinstance(found, dict):
                return Component(self, found, name)
        raise ExportError(
            f"{self.path}: has no section {names[0]}, or it is no component with a _target_"
        )

    def transforms(self, name: str) -> list[Component]:
        """Transforms of a `Compose`, without those that are disabled."""
        compose = self.component(name)
        if compose.name != "Compose":
            compose.refuse("is no Compose")
        raw = compose.raw("transforms")
        field = f"{name}.transforms"
        steps = self.shallow(raw, field)
        if not isinstance(steps, list):
            compose.refuse("has no list of transforms")
        compose.done()
        fields = ((self.shallow(step, field), f"{field}[{i}]") for i, step in enumerate(steps))
        found = [Component(self, step, field) for step, field in fields]
        return [step for step in found if not step.flag("_disabled_", False)]

    def value(self, raw: Any, field: str) -> Any:
        """Value with its references and expressions replaced."""
        self._items = 0
        return self._deep(raw, field, 0)

    def _deep(self, raw: Any, field: str, depth: int) -> Any:
        self._items += 1
        if self._items > _MOST_ITEMS:
            raise ExportError(f"{self.path}: {field} has more than {_MOST_ITEMS} items")
        found = self.shallow(raw, field, depth)
        if isinstance(found, list | tuple):
            return [self._deep(item, field, depth + 1) for item in found]
        if isinstance(found, dict):
            return {key: self._deep(item, field, depth + 1) for key, item in found.items()}
        return found

    def shallow(self, raw: Any, field: str, depth: int = 0) -> Any:
        """Value of which the items of lists and objects are not replaced.

        A reference to a list or an object is that of the config itself, not a copy.
        """
        if depth > _DEEPEST:
            raise ExportError(f"{self.path}: {field} refers to itself")
        if not isinstance(raw, str):
            return raw
        if raw.startswith("$"):
            return self._expression(raw, field, depth)
        if raw.startswith("%"):
            self._refuse(field, raw, "is a macro")
        return self._lookup(raw, field, depth) if _REFERENCE.fullmatch(raw) else raw

    def _lookup(self, reference: str, field: str, depth: int) -> Any:
        """Value that a reference leads to; resolved once, or chains would double the time."""
        if reference not in self._known:
            self._known[reference] = self._resolved(reference, field, depth)
        return self._known[reference]

    def _resolved(self, reference: str, field: str, depth: int) -> Any:
        found: Any = self.root
        for key in re.split("::|#", reference[1:]):
            found = self.shallow(found, field, depth + 1)
            try:
                found = found[int(key) if isinstance(found, list) else key]
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise ExportError(
                    f"{self.path}: {field} refers to {reference}, which does not exist"
                ) from error
        return self.shallow(found, field, depth + 1)

    def _expression(self, text: str, field: str, depth: int) -> Any:
        names: dict[str, str] = {}

        def named(match: re.Match[str]) -> str:
            name = _NAME.format(len(names))
            names[name] = match[0]
            return name

        def evaluate(node: ast.expr) -> Any:
            match node:
                case ast.Constant(value=value) if isinstance(value, int | float | str | None):
                    return value
                case ast.List(elts=items) | ast.Tuple(elts=items):
                    return [evaluate(item) for item in items]
                case ast.Name(id=name) if name in names:
                    return self._lookup(names[name], field, depth)
                case ast.UnaryOp(op=sign, operand=value) if type(sign) in _UNARY:
                    return _UNARY[type(sign)](evaluate(value))
                case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _ARITHMETIC:
                    return _arithmetic(sign, evaluate(left), evaluate(right))
                case ast.IfExp(test=test, body=first, orelse=second):
                    return evaluate(first if evaluate(test) else second)
                case ast.Call(func=ast.Name(id="len"), args=[value], keywords=[]):
                    return len(evaluate(value))
                case ast.Call(func=ast.Attribute() as name, args=parts, keywords=[]) if (
                    ast.unparse(name) == "os.path.join"
                ):
                    return _bounded(posixpath.join(*(evaluate(part) for part in parts)))
            raise _UnknownError

        try:
            if len(text) > _LONGEST:
                raise _UnknownError
            source = _REFERENCE.sub(named, text[1:]).strip()
            return evaluate(ast.parse(source, mode="eval").body)
        except (
            _UnknownError,
            SyntaxError,
            TypeError,
            ValueError,
            ArithmeticError,
            RecursionError,
        ) as error:
            if self._unknown is not None:
                return self._unknown
            self._refuse(field, text, "is Python that is not recognised", error)

    def _refuse(
        self, field: str, text: str, reason: str, error: Exception | None = None
    ) -> NoReturn:
        shown = text if len(text) <= 160 else f"{text[:160]}..."
        raise ExportError(
            f"{self.path}: {field} {reason}: {shown}", "write the value itself"
        ) from error


def _arithmetic(sign: ast.operator, left: Any, right: Any) -> Any:
    """Result of an operator on numbers, or the sum of two lists or texts."""
    numbers = all(isinstance(value, int | float) for value in (left, right))
    same = type(left) is type(right) and isinstance(left, list | str)
    if not numbers and not (same and isinstance(sign, ast.Add)):
        raise _UnknownError
    return _bounded(_ARITHMETIC[type(sign)](left, right))


def _bounded(value: Any) -> Any:
    """A result, unless expressions that refer to each other make it grow without bound."""
    if isinstance(value, list | str) and len(value) > _MOST_ITEMS:
        raise _UnknownError
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise _UnknownError
    return value


class Component:
    """A class of MONAI that a config names, and its arguments, each of which must be understood.

    A class of another module is refused, whatever its name is.

    Attributes:
        name: Name of the class without its module; that of a dictionary transform ends in `d`.
        module: Module that is named; empty if none is.
        field: Position in the config, for messages.
    """

    def __init__(self, config: Config, raw: Any, field: str) -> None:
        if not isinstance(raw, dict) or not isinstance(raw.get("_target_"), str):
            raise ExportError(f"{config.path}: {field} names no class")
        self._config, self.field = config, field
        self.module, _, name = raw["_target_"].rpartition(".")
        if self.module.split(".")[0] not in ("", "monai"):
            raise ExportError(
                f"{config.path}: {field} names {raw['_target_']}, which is no class of MONAI",
                "import bundles that use MONAI's own classes",
            )
        self.name = re.sub(r"(?<=[a-z])(D|Dict)$", "d", name)
        described = ("_target_", "_desc_", "_requires_")
        self._arguments = {key: value for key, value in raw.items() if key not in described}

    def refuse(self, reason: str, mend: str = "") -> NoReturn:
        """Raise the error that names this component."""
        where = f"{self._config.path}: {self.field} ({self.name})"
        raise ExportError(f"{where} {reason}", mend)

    def raw(self, argument: str) -> Any:
        """Argument as it is written; None if it is missing."""
        return self._arguments.pop(argument, None)

    def take(self, argument: str, default: Any = None) -> Any:
        """Value of an argument."""
        if argument not in self._arguments:
            return default
        return self._config.value(self.raw(argument), f"{self.field}.{argument}")

    def flag(self, argument: str, default: bool) -> bool:
        """Value of an argument that is true or false."""
        found = self._single(self.take(argument, default))
        if not isinstance(found, bool):
            self.refuse(f"has {argument} {found!r}, not true or false")
        return found

    def number(self, argument: str, default: float | None = None) -> float:
        """Value of an argument that is a number."""
        found = self._single(self.take(argument, default))
        if not is_number(found):
            self.refuse(f"has {argument} {found!r}, not a number")
        return float(found)

    def numbers(self, argument: str, default: Any = None) -> list[float]:
        """Numbers of an argument, which may be a single one."""
        found = self.take(argument, default)
        values = found if isinstance(found, list) else [found]
        if not values or not all(is_number(value) for value in values):
            self.refuse(f"has {argument} {found!r}, not numbers")
        return values

    def expect(self, argument: str, *allowed: Any) -> None:
        """Refuse other values of an argument than these; the first is the default."""
        found = self._single(self.take(argument, allowed[0]))
        if not any(found == value and type(found) is type(value) for value in allowed):
            self.refuse(f"has {argument} {found!r}, which is not supported")

    def expect_section(self, argument: str, name: str = "") -> None:
        """Refuse an argument that is there, and no reference to the section of this name.

        Without a name, the section has that of the argument.
        """
        name = name or argument
        if argument not in self._arguments:
            return
        raw = self.raw(argument)
        found = self._config.lenient().shallow(raw, f"{self.field}.{argument}")
        if found is not self._config.lenient().shallow(f"@{name}", self.field):
            self.refuse(f"has {argument} {str(raw)[:160]}, not @{name}")

    def expect_float32(self) -> None:
        """Refuse another `dtype` than float32."""
        found = self._arguments.pop("dtype", None)
        if found is not None and found not in _FLOAT32:
            self.refuse(f"has dtype {found!r}, not float32")

    def ignore(self, *arguments: str) -> None:
        """Drop arguments that do not change the labels."""
        for argument in arguments:
            self._arguments.pop(argument, None)

    def done(self) -> None:
        """Refuse arguments that were neither taken nor dropped."""
        if self._arguments:
            self.refuse(f"has {', '.join(sorted(self._arguments))}, which is not supported")

    def arguments(self) -> dict[str, Any]:
        """Values of the remaining arguments, of which none may be a component."""
        names = list(self._arguments)
        found = {name: self.take(name) for name in names}
        for name, value in found.items():
            if name.startswith("_") or not _is_plain(value):
                self.refuse(f"has {name} {value!r}, which is not a plain value")
        return found

    def key(self) -> str:
        """The one key of a dictionary transform."""
        self.ignore("allow_missing_keys")
        found = self._single(self.take("keys"))
        if not isinstance(found, str):
            self.refuse(f"has the keys {found!r}; one key is supported")
        return found

    @staticmethod
    def _single(value: Any) -> Any:
        """The item of a list of one, as for a transform of one key."""
        return value[0] if isinstance(value, list) and len(value) == 1 else value


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a finite number, and not a truth value."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and abs(value) <= sys.float_info.max


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" not in value and all(_is_plain(item) for item in value.values())
    items: Sequence[Any] = value if isinstance(value, list) else ()
    return all(_is_plain(item) for item in items)
