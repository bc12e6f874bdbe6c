"""What is wrong with a gin configuration, said with the nearest right name, the file and the line.

Works on recorded statements; knows nothing of gin itself.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pit_jax.cli import gin_types
from pit_jax.core.errors import ConfigError, invalid, nearest

REQUIRED = "gin.REQUIRED"


class Place(NamedTuple):
    """Where something was written: a line of a file, or a flag (then `file` is None)."""

    file: str | None
    line: int
    flag: str

    def __str__(self) -> str:
        return self.flag if self.file is None else f"{self.file}:{self.line}"


class Macro(NamedTuple):
    """A use of a macro, `%NAME`."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


class Reference(NamedTuple):
    """A use of a class or function, `@selector` or, evaluated, `@selector()`."""

    selector: str
    evaluate: bool

    def __repr__(self) -> str:
        return f"@{self.selector}{'()' if self.evaluate else ''}"


class Import(NamedTuple):
    """An import statement: its module, the module its name stands for, and the path gin files the contents under.

    `import a.b` imports `a.b` and its name `a` stands for `a`; otherwise both are the same module.
    """

    module: str
    named: str
    path: str
    place: Place


class Binding(NamedTuple):
    """`scope/selector.parameter = value`; a macro has no parameter.

    imports: names the file imports, or None where it does not use dynamic registration.
    note: the comment on its line; beside `%gin.REQUIRED` it says what is to be bound.
    """

    scope: str
    selector: str
    parameter: str
    value: Any
    place: Place
    imports: Mapping[str, Import] | None
    note: str

    @property
    def key(self) -> str:
        """What is bound, as it is written."""
        name = f"{self.selector}.{self.parameter}" if self.parameter else self.selector
        return f"{self.scope}/{name}" if self.scope else name


Statements = Sequence[Binding | Import]


def check(statements: Statements) -> None:
    """Raise a ConfigError for all bad macros at once, or for the first misspelt module, class or parameter."""
    check_macros(statements)  # First, because it needs no module of the configuration, and importing takes seconds.
    for statement in statements:
        if isinstance(statement, Import):
            _module(statement)
    for binding in _bindings(statements):
        _check_parameter(binding, statements)


def check_macros(statements: Statements) -> None:
    """Raise a ConfigError naming macros that are bound but not used, and those that are used but not bound."""
    bound = {b.key: b for b in _bindings(statements) if not b.parameter}
    used = {name for b in _bindings(statements) for name in _macros(b.value)}
    missing = _missing(statements)
    problems = []
    for name in sorted(set(bound) - used):
        hint = nearest(name, used - {REQUIRED}) or f" Macros in use: {', '.join(sorted(used - {REQUIRED})) or 'none'}."
        problems.append(f"macro {name} ({bound[name].place}) is bound but nothing uses it.{hint}")
    for name, binding in sorted(missing.items()):
        note = f", {binding.note}," if binding.value == Macro(REQUIRED) and binding.note else ""
        problems.append(
            f"{name}{note} is required ({binding.place}) but not bound.{nearest(name, bound.keys() - {name})} "
            f"Add --gin.{name}=VALUE or bind it in a gin file."
        )
    if problems:
        raise ConfigError("\n".join(problems))


def unbound(statements: Statements) -> set[str]:
    """Return the names of required macros that nothing binds."""
    return set(_missing(statements))


def mentions(statements: Statements, cls: type) -> bool:
    """Tell whether any statement binds a parameter of `cls` or refers to it, so that gin knows it."""
    return any(_resolve(b, selector) is cls for b in _bindings(statements) for selector in _selectors(b))


def locate(message: str, statements: Statements) -> str:
    """Add to a message that begins with `Class.field = value` where that field was bound, macros included.

    Where scopes bind it to several values, it is the last place with the value of the message.
    """
    named = re.match(r"(\w+)\.(\w+)\b(?: = (.*?) must )?", message)
    if not named:
        return message
    bound = [
        binding
        for binding in _bindings(statements)
        if binding.parameter == named[2] and binding.selector.rsplit(".", 1)[-1] == named[1]
    ]
    macros = {binding.key: binding for binding in _bindings(statements) if not binding.parameter}
    if not bound:
        return message

    def value(binding: Binding) -> Any:
        macro = macros.get(binding.value.name) if isinstance(binding.value, Macro) else None
        return binding.value if macro is None else macro.value

    named_ones = [binding for binding in bound if repr(value(binding)) == named[3]]
    found = (named_ones or bound)[-1]
    places = [found.place, *(macros[name].place for name in _macros(found.value) if name in macros)]
    return f"{message} (set at {', '.join(map(str, places))})"


def _bindings(statements: Statements) -> Iterator[Binding]:
    return (statement for statement in statements if isinstance(statement, Binding))


def _missing(statements: Statements) -> dict[str, Binding]:
    """Return what must still be bound, and where that is said.

    These are macros without a value, and everything whose last value is `%gin.REQUIRED`.
    """
    final = {binding.key: binding for binding in _bindings(statements)}
    missing = {
        name: binding
        for binding in final.values()
        for name in _macros(binding.value)
        if name != REQUIRED and name not in final
    }
    missing |= {key: binding for key, binding in final.items() if binding.value == Macro(REQUIRED)}
    return missing


def _walk(value: Any) -> Iterator[Macro | Reference]:
    """Yield the macros and references nested anywhere in a value."""
    if isinstance(value, Macro | Reference):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(key)
            yield from _walk(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _walk(item)


def _macros(value: Any) -> list[str]:
    return [part.name for part in _walk(value) if isinstance(part, Macro)]


def _selectors(binding: Binding) -> list[str]:
    own = [binding.selector] if binding.parameter else []
    return own + [part.selector for part in _walk(binding.value) if isinstance(part, Reference)]


def _module(statement: Import) -> Any:
    try:
        return importlib.import_module(statement.module)
    except ModuleNotFoundError as error:
        if error.name is None or not (statement.module + ".").startswith(error.name + "."):
            raise ConfigError(
                f"{statement.place} imports {statement.module}, which needs {error.name!r}: {error}."
            ) from error
        raise ConfigError(
            f"{statement.place} imports {statement.module}, but there is no module {error.name!r}. "
            "Check the spelling; modules of the current directory and installed packages can be imported."
        ) from error


def _resolve(binding: Binding, selector: str) -> Any:
    """Return the object a selector names, or None where only gin can tell (no dynamic registration)."""
    if binding.imports is None:
        return None
    name, *attributes = selector.split(".")
    if name == "gin":
        return None
    if name not in binding.imports:
        raise ConfigError(
            f"{binding.place}: {name!r} in {selector!r} is not imported.{nearest(name, binding.imports)} "
            "Every gin file imports what it names, e.g. `from pit_jax.stages import sft`."
        )
    value = importlib.import_module(binding.imports[name].named)
    for attribute in attributes:
        members = dict(inspect.getmembers(value))
        if attribute not in members:
            known = [member for member in members if not member.startswith("_")]
            raise ConfigError(
                f"{binding.place}: {selector!r} does not exist, {value.__name__} has no {attribute!r}."
                f"{nearest(attribute, known)}"
            )
        value = members[attribute]
    return value


def _flag_target(binding: Binding, statements: Statements) -> Any:
    """Return the object a flag's partial selector means, such as `Sft` or `sft.Sft`, among those the files name.

    None where the files do not use dynamic registration and only gin can tell.
    """
    known: dict[str, Any] = {}
    for other in _bindings(statements):
        for selector in _selectors(other) if other.imports is not None else ():
            value = _resolve(other, selector)
            if value is not None and other.imports is not None:
                name, _, rest = selector.partition(".")
                known[f"{other.imports[name].path}.{rest}"] = value
    found = {path: value for path, value in known.items() if f".{path}".endswith(f".{binding.selector}")}
    if known and not found:
        short = {path.rsplit(".", 1)[-1] for path in known}
        raise ConfigError(
            f"{binding.place}: the gin files name nothing called {binding.selector!r}."
            f"{nearest(binding.selector, short)}"
        )
    return next(iter(found.values()), None)


def _check_parameter(binding: Binding, statements: Statements) -> None:
    """Check that what a binding (and each reference in it) names exists, has the parameter and suits its value."""
    targets = {selector: _resolve(binding, selector) for selector in _selectors(binding)}
    if not binding.parameter:
        return
    target = targets[binding.selector]
    if binding.place.file is None and target is None:
        target = _flag_target(binding, statements)
    if target is None:
        return
    parameters = inspect.signature(target).parameters
    if binding.parameter in parameters:
        _check_kind(binding, target, statements)
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    raise ConfigError(
        f"{binding.place}: {binding.selector} has no parameter {binding.parameter!r}."
        + (nearest(binding.parameter, parameters) or f" It has: {', '.join(parameters)}.")
    )


def _check_kind(binding: Binding, target: Any, statements: Statements) -> None:
    """Check that a value, macros in place, is of the kind that the parameter is declared to be."""
    macros = {b.key: b.value for b in _bindings(statements) if not b.parameter}
    value = _literal(binding.value, macros)
    wanted = gin_types.annotation_of(target, binding.parameter)
    if not gin_types.fits(value, wanted):
        error = invalid(
            f"{target.__name__}.{binding.parameter}", value, f"be {gin_types.describe(wanted)}", "Change the value."
        )
        raise ConfigError(locate(str(error), statements))


def _literal(value: Any, macros: Mapping[str, Any]) -> Any:
    """Return a value with its macros resolved; what gin has to make becomes `Made`."""
    if isinstance(value, Macro) and value.name in macros:
        return _literal(macros[value.name], macros)
    if isinstance(value, Macro | Reference):
        return gin_types.Made(value)
    if isinstance(value, Mapping):
        return {key: _literal(item, macros) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_literal(item, macros) for item in value)
    return value
