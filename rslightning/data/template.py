"""What decides how a DataModule renders its rows: its code, as far as it can be seen."""

import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Final

PLAIN: Final = (str, bytes, int, float, bool, type(None))
INSTALLED: Final = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
PACKAGES: Final = frozenset(["site-packages", "dist-packages"])
"""Folders of installed packages, of a user or of a system, wherever they are."""


def template_source(kind: type, base: type) -> list[str]:
    """Return texts that change when `kind` may render rows in another way than before.

    They are the code of its classes without those of `base`, and what their functions name of
    their modules: plain values (texts, numbers, patterns, lists and the like), functions and
    classes of the same module or of another one that is not installed, and so on from there.
    Not seen are attributes of an instance (name those that matter in `settings`), values of
    other kinds, what is taken out of an imported module by a dot, and installed packages.

    Args:
        kind: A DataModule's class.
        base: The class whose code does not count.
    """
    todo: list[Any] = [each for each in kind.__mro__ if each not in base.__mro__]
    seen, texts = set(todo), []
    while todo:
        thing = todo.pop()
        texts.append(_code(thing))
        for function in _functions(thing):
            for name, value in _globals(function):
                if isinstance(value, FunctionType | type):
                    if value not in seen and _belongs_to(function, value):
                        seen.add(value)
                        todo.append(value)
                elif (said := _said(value)) is not None:
                    texts.append(f"{function.__module__}.{name} = {said}")
    return sorted(set(texts))


def _functions(thing: Any) -> Iterator[FunctionType]:
    """Yield a function itself, or those that a class defines."""
    for value in vars(thing).values() if isinstance(thing, type) else [thing]:
        if isinstance(value, property):
            value = value.fget
        value = inspect.unwrap(getattr(value, "__func__", value))
        if isinstance(value, FunctionType):
            yield value


def _globals(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the names that a function's code looks up in its module, with their values."""
    for name in _names(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _names(code: CodeType) -> set[str]:
    inner = [_names(value) for value in code.co_consts if isinstance(value, CodeType)]
    return set(code.co_names).union(*inner)


def _belongs_to(function: FunctionType, value: FunctionType | type) -> bool:
    """Tell whether what a function uses is of its module, or of one that is not installed."""
    if value.__module__ == function.__module__:
        return True
    try:
        file = Path(inspect.getfile(value)).absolute()
    except (OSError, TypeError):  # built in
        return False
    is_installed = any(file.is_relative_to(folder) for folder in INSTALLED)
    return not is_installed and PACKAGES.isdisjoint(file.parts)


def _code(thing: Any) -> str:
    """Return the source of a class or function, or what it was compiled to if it was typed in."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        pass
    if isinstance(thing, type):
        parts = [f"{name} = {_said(value)}" for name, value in vars(thing).items()]
        return "\n".join([thing.__qualname__, *parts, *map(_code, _functions(thing))])
    return _compiled(thing.__code__)


def _compiled(code: CodeType) -> str:
    inner = [_compiled(c) if isinstance(c, CodeType) else _said(c) for c in code.co_consts]
    return f"{code.co_name} {code.co_code.hex()} {code.co_names} {inner}"


def _said(value: Any) -> str | None:
    """Return a text that is the same for equal plain values in every process, None for others."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, re.Pattern):
        return f"{value.pattern!r} {value.flags}"
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, list | tuple | set | frozenset):
        parts = [_said(each) for each in value]
        if None in parts:
            return None
        ordered = parts if isinstance(value, list | tuple) else sorted(map(str, parts))
        return f"{type(value).__name__} {ordered}"
    return None
