"""A params section -> an object, strictly: the constructor's signature is the schema.

`construct(target, section, path)` calls `target(**section)` after checking every key and value against the type
hints. Supported hints: bool, int, float, str, None, Literal, unions of these, tuple[X, ...], tuple[X, Y],
list[X], dict[str, X], dataclasses (nested sections), `Annotated[number, Range(...)]`, and `Choice` (a
section with a `name`, such as a network). Errors name the path, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class Choice:
    """A parameter that is a section with a `name`, such as a network: `choices` maps names to classes."""

    name: ClassVar[str]

    @classmethod
    def choices(cls) -> Mapping[str, type]:
        raise NotImplementedError(f"{cls.__name__} lists no choices")


class ConfigError(ValueError):
    """A params value that cannot be used; the message names the path, the value and the way out."""


@dataclass(frozen=True)
class Range:
    """The numbers allowed: low <= x <= high, or strict where `open` says so ("low", "high" or "both")."""

    low: float | None = None
    high: float | None = None
    open: Literal["", "low", "high", "both"] = ""

    def holds(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        above = self.low is None or (value > self.low if self.open in ("low", "both") else value >= self.low)
        below = self.high is None or (value < self.high if self.open in ("high", "both") else value <= self.high)
        return above and below

    def __str__(self) -> str:
        parts = []
        if self.low is not None:
            parts.append(f"{'above' if self.open in ('low', 'both') else 'at least'} {self.low:g}")
        if self.high is not None:
            parts.append(f"{'below' if self.open in ('high', 'both') else 'at most'} {self.high:g}")
        return " and ".join(parts) or "finite"


Positive = Annotated[int, Range(1)]
NonNegative = Annotated[int, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
PositiveFloat = Annotated[float, Range(0, None, "low")]
NonNegativeFloat = Annotated[float, Range(0)]


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """'; did you mean "x"?', or the list of what there is."""
    allowed = sorted(map(str, allowed))
    close = difflib.get_close_matches(str(word), allowed, n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else f"; allowed: {', '.join(allowed) or 'nothing'}"


def construct(target: Callable[..., T], section: Any, path: str, **given: Any) -> T:
    """`target(**given, **section)`, checked.

    Args:
        target: a class or function whose keyword parameters have type hints.
        section: a mapping as read from YAML or JSON.
        path: where the section stands, for messages ("runs.vae.method").
        given: arguments that the caller supplies and the section may not name.
    Raises: ConfigError naming the path of what is wrong.
    """
    arguments = checked(target, section, path, given)
    try:
        return target(**given, **arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def checked(target: Callable[..., Any], section: Any, path: str, given: Iterable[str] = ()) -> dict[str, Any]:
    """The section's values as `target` takes them; nothing is called but nested constructors."""
    if not isinstance(section, Mapping):
        raise ConfigError(f"{path}: expected a section of keys, found {section!r}")
    hints = _hints(target)
    names = [name for name in inspect.signature(target).parameters if name not in set(given)]
    arguments: dict[str, Any] = {}
    for key, value in section.items():
        if key not in names:
            raise ConfigError(f"{path}.{key}: unknown key{did_you_mean(key, names)}")
        arguments[key] = convert(value, hints[key], f"{path}.{key}")
    for name in names:
        if inspect.signature(target).parameters[name].default is inspect.Parameter.empty and name not in arguments:
            raise ConfigError(f"{path}.{name}: missing; expected {describe(hints[name])}")
    return arguments


def defaults(target: Callable[..., Any], arguments: Mapping[str, Any], given: Iterable[str] = ()) -> dict[str, Any]:
    """Every parameter of `target` with its value, defaults filled, as plain JSON."""
    filled = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if name not in set(given):
            filled[name] = plain(arguments.get(name, parameter.default))
    return filled


def plain(value: Any) -> Any:
    """Dataclasses, tuples and named choices as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {"name": type(value).name} if isinstance(value, Choice) else {}
        return named | {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    source = target.__init__ if inspect.isclass(target) else target
    return get_type_hints(source, include_extras=True)


def describe(hint: Any) -> str:
    """A hint in words, for messages."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{describe(args[0])} {args[1]}"
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin in (tuple, list):
        return f"a list of {describe(args[0])}" if args else "a list"
    if origin is dict:
        return "a section of keys"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(hint, f"a {getattr(hint, '__name__', hint)} section")


def _wrong(value: Any, hint: Any, path: str) -> ConfigError:
    trap = ""
    if isinstance(value, str) and not isinstance(hint, str):
        try:
            float(value)
            trap = f' (YAML reads {value} as text: write it as a number with a point, such as "1.0e-3")'
        except ValueError:
            pass
    return ConfigError(f"{path}: {value!r} is not {describe(hint)}{trap}")


def convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as `hint` asks for it, or ConfigError."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        number = convert(value, args[0], path)
        if number is not None and not args[1].holds(number):
            raise ConfigError(f"{path}: {value!r} is not {describe(hint)}")
        return number
    if origin is Literal:
        if value in args and type(value) in {type(arg) for arg in args}:
            return value
        raise ConfigError(f"{path}: {value!r} is not known{did_you_mean(value, args)}")
    if origin in (Union, types.UnionType):
        return _convert_union(value, args, hint, path)
    if origin in (tuple, list):
        return _convert_sequence(value, origin, args, hint, path)
    if origin is dict or origin is Mapping:
        if not isinstance(value, Mapping):
            raise _wrong(value, hint, path)
        return {str(key): convert(item, args[1], f"{path}.{key}") for key, item in value.items()}
    if hint is type(None) or hint is None:
        if value is None:
            return None
        raise _wrong(value, hint, path)
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if hint in (int, bool, str):
        if type(value) is hint:
            return value
        raise _wrong(value, hint, path)
    if hint is float:
        raise _wrong(value, hint, path)
    if inspect.isclass(hint) and issubclass(hint, Choice):
        return _choose(value, hint, path)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else construct(hint, value, path)
    if inspect.isclass(hint) and isinstance(value, hint):
        return value
    raise _wrong(value, hint, path)


def _convert_union(value: Any, args: tuple[Any, ...], hint: Any, path: str) -> Any:
    if value is None and type(None) in args:
        return None
    options = [arg for arg in args if arg is not type(None)]
    if len(options) == 1:
        return convert(value, options[0], path)
    for arg in options:
        try:
            return convert(value, arg, path)
        except ConfigError:
            continue
    raise _wrong(value, hint, path)


def _convert_sequence(value: Any, origin: type, args: tuple[Any, ...], hint: Any, path: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong(value, hint, path)
    if origin is list or (len(args) == 2 and args[1] is Ellipsis):
        return origin(convert(item, args[0], f"{path}[{i}]") for i, item in enumerate(value))
    if len(value) != len(args):
        raise ConfigError(f"{path}: {value!r} has {len(value)} items, expected {len(args)}")
    return tuple(convert(item, arg, f"{path}[{i}]") for i, (item, arg) in enumerate(zip(value, args, strict=True)))


def _choose(value: Any, hint: Any, path: str) -> Any:
    """A section with a `name` out of `hint.choices()`: name -> class."""
    choices: Mapping[str, type] = hint.choices()
    if isinstance(value, tuple(choices.values())):
        return value
    if not isinstance(value, Mapping) or "name" not in value:
        raise ConfigError(f"{path}: expected a section with a name, found {value!r}{did_you_mean('', choices)}")
    name = value["name"]
    if not isinstance(name, str) or name not in choices:
        raise ConfigError(f"{path}.name: {name!r} is not known{did_you_mean(name, choices)}")
    return construct(choices[name], {key: item for key, item in value.items() if key != "name"}, path)
