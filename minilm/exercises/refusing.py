"""While a learner's code is checked, the package's own version of what it is to write raises."""

import importlib
import inspect
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from minilm.errors import ConfigError

__all__ = ["CallsPackageError", "refusing"]


class CallsPackageError(Exception):
    """The learner's code called what it was to write."""


KEPT = frozenset({"__repr__", "__eq__", "__hash__", "__del__"})  # Python itself may call these


@contextmanager
def refusing(names: Sequence[str]) -> Iterator[None]:
    """While it lasts, calling any of these raises, whatever name it was imported under.

    It is the code inside the function objects that is exchanged, so that every alias is met.

    Args:
        names: Dotted names below `minilm`: functions, methods, classes or modules.

    Raises:
        ConfigError: If minilm has no such thing, or it is not written in Python.
    """
    swapped: list[tuple[types.FunctionType, types.CodeType]] = []
    closed: list[Any] = []  # classes that had no __init__ of their own
    try:
        for one in [each for name in names for each in _members(name)]:
            found = _resolve(one)
            if inspect.isclass(found) and "__init__" not in vars(found):
                code = _refusal(one, 0)
                found.__init__ = types.FunctionType(code, globals())  # type: ignore[method-assign]
                closed.append(found)
            for function in _functions(one):
                code = function.__code__
                swapped.append((function, code))
                function.__code__ = _refusal(one, len(code.co_freevars))
        yield
    finally:
        for function, code in reversed(swapped):
            function.__code__ = code
        for found in closed:
            del found.__init__


def _resolve(name: str) -> Any:
    """`ngram.AddK.log_probs` -> the thing as its class stores it."""
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(["minilm", *parts[:split]]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[split:]:
                found = inspect.getattr_static(found, part)
        except AttributeError:
            break
        return found
    raise ConfigError(f"minilm has no {name}; fix `forbid`")


def _members(name: str) -> list[str]:
    """The functions and classes of a module; of anything else, itself."""
    found = _resolve(name)
    if not inspect.ismodule(found):
        return [name]
    return [f"{name}.{public}" for public in found.__all__ if callable(getattr(found, public))]


def _functions(name: str) -> list[types.FunctionType]:
    """The Python functions that do the work of a function, method or class of minilm."""
    found = _resolve(name)
    if inspect.isclass(found):
        members = [value for key, value in vars(found).items() if key not in KEPT]
        return [function for member in members for function in _unwrapped(member)]
    functions = _unwrapped(found)
    if not functions:
        raise ConfigError(f"minilm.{name} is not written in Python; `forbid` cannot replace it")
    return functions


def _unwrapped(member: Any) -> list[types.FunctionType]:
    """The Python functions inside a function, method, property or cache."""
    if isinstance(member, types.FunctionType):
        ours = (member.__module__ or "").startswith("minilm")  # a Protocol's __init__ is typing's
        return [member] if ours else []
    if isinstance(member, staticmethod | classmethod):
        return _unwrapped(member.__func__)
    if isinstance(member, property):
        return [one for part in (member.fget, member.fset) for one in _unwrapped(part)]
    if isinstance(member, cached_property):
        return _unwrapped(member.func)
    if hasattr(member, "cache_clear"):
        member.cache_clear()  # what the cache knows would be told without a call
    return _unwrapped(member.__wrapped__) if hasattr(member, "__wrapped__") else []


def _refusal(name: str, free: int) -> types.CodeType:
    """Code that raises, with as many free variables as the code that it stands in for."""
    cells = [f"cell{index}" for index in range(free)]
    source = [
        "def outer():",
        *(f"    {cell} = None" for cell in cells),
        "    def refuse(*args, **kwargs):",
        *(f"        {cell}" for cell in cells),
        "        from minilm.exercises.refusing import CallsPackageError",
        f"        raise CallsPackageError({name!r})",
        "    return refuse",
    ]
    space: dict[str, Any] = {}
    exec(compile("\n".join(source), "<minilm's own, replaced during a check>", "exec"), space)
    code: types.CodeType = space["outer"]().__code__
    return code
