"""Gin: files and `--gin.NAME=VALUE` flags become one validated object. The only module that imports gin.

Gin accepts a macro nobody uses, so a misspelt `TRAIN_STEP = 100` would train for the default number of
steps. Therefore every file is parsed twice: once without effect, for `gin_check` to find what is misspelt,
missing or unused and where it was written, and then by gin itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import re
import tokenize
from collections.abc import Iterator
from typing import Any, NamedTuple

import gin
from gin import config as gin_internals
from gin import config_parser

from pit_jax.cli import gin_check, shipped
from pit_jax.cli.gin_check import Binding, Import, Macro, Place, Reference
from pit_jax.cli.gin_files import Library
from pit_jax.core.errors import ConfigError, PitError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GinSource:
    """What the user gave: files in order, then bindings (`NAME=VALUE`) that override them.

    defaults: bindings for macros that neither files nor flags set, when they are used at all; a command that
    only looks at data has no use for `MODEL_DIR`.
    """

    files: tuple[str, ...]
    bindings: tuple[str, ...] = ()
    search_paths: tuple[str, ...] = ()
    defaults: tuple[str, ...] = ()


class Built(NamedTuple):
    """An object made by gin, and the configuration it was made of as text that gin can read again."""

    value: Any
    text: str


def build(source: GinSource, root: str) -> Built:
    """Parse `source` and construct the object of class `root` (`module:Class`) that it describes.

    Raises:
      ConfigError: a file is missing or malformed; a parameter, macro, module or class is misspelt; a required
        macro is not bound; a macro is bound but unused; or the object refuses a value.
    """
    shipped.make_importable()
    library = Library(search_paths=source.search_paths)
    statements = _scan(source, library)
    if gin_check.unbound(statements) and source.defaults:
        source = _with_defaults(source, gin_check.unbound(statements))
        statements = _scan(source, library)
    gin_check.check(statements)
    _parse(source, library)
    module, _, name = root.partition(":")
    cls = getattr(importlib.import_module(module), name)
    if not gin_check.mentions(statements, cls):
        raise ConfigError(
            f"The gin files bind nothing of {module}.{name}, so there is nothing to run. "
            f"Start from a recipe: {', '.join(shipped.recipes()) or 'none is shipped'}."
        )
    try:
        value = gin.get_configurable(cls)()
    except PitError as error:
        raise ConfigError(gin_check.locate(_plain(error), statements)) from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(_misfit(error)) from error
    return Built(value, gin.operative_config_str(max_line_length=120))


def bindings_in(text: str) -> dict[str, str]:
    """Return what a configuration text binds: parameter or macro -> value, both as written."""
    return {
        statement.key: repr(statement.value)
        for statement in _statements(text, Place(None, 0, ""))
        if isinstance(statement, Binding)
    }


def _with_defaults(source: GinSource, unbound: set[str]) -> GinSource:
    needed = tuple(binding for binding in source.defaults if binding.partition("=")[0].strip() in unbound)
    return dataclasses.replace(source, bindings=source.bindings + needed)


class _Recorder(config_parser.ParserDelegate):
    """Keeps references and macros as they are written, where gin's own delegate would resolve them."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        return Reference(scoped_configurable_name.rsplit("/", 1)[-1], evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


def _scan(source: GinSource, library: Library) -> list[Binding | Import]:
    """Return every statement of `source`, included files in place, without resolving or importing anything."""
    if not source.files:
        raise ConfigError(
            f"No gin file given. Name a recipe with --gin_file=NAME; shipped: {', '.join(shipped.recipes())}."
        )
    statements: list[Binding | Import] = []
    for name in source.files:
        statements += _scan_file(name, f"--gin_file={name}", library, ())
    for binding in source.bindings:
        place = Place(None, 0, f"--gin.{binding}")
        statements += (s for s in _statements(binding, place) if not isinstance(s, config_parser.IncludeStatement))
    return statements


def _scan_file(name: str, asked_by: str, library: Library, parents: tuple[str, ...]) -> list[Binding | Import]:
    path = library.find(name, asked_by)
    if path in parents:
        raise ConfigError(f"gin file {path!r} includes itself: {' -> '.join((*parents, path))}. Remove one include.")
    statements: list[Binding | Import] = []
    for statement in _statements(library.read(path), Place(name, 0, "")):
        if isinstance(statement, config_parser.IncludeStatement):
            where = Place(name, statement.location.line_num, "")
            statements += _scan_file(statement.filename, f"included at {where}", library, (*parents, path))
        else:
            statements.append(statement)
    return statements


def _statements(text: str, origin: Place) -> Iterator[Binding | Import | config_parser.IncludeStatement]:
    """Yield a text's statements, turning gin's syntax errors into messages with file, line and likely cause."""
    imports: dict[str, Import] = {}
    dynamic = False
    try:
        for statement in config_parser.ConfigParser(text, _Recorder()):
            place = origin if origin.file is None else origin._replace(line=statement.location.line_num)
            if isinstance(statement, config_parser.ImportStatement):
                dynamic |= statement.module.startswith("__gin__.")
                if not statement.module.startswith("__gin__."):
                    bare = not (statement.is_from or statement.alias)
                    named = statement.bound_name() if bare else statement.module
                    made = Import(statement.module, named, statement.partial_path(), place)
                    imports[statement.bound_name()] = made
                    yield made
            elif isinstance(statement, config_parser.BindingStatement):
                scope, selector, parameter, value, _ = statement
                note = statement.location.line_content.partition("#")[2].strip()
                yield Binding(scope, selector, parameter, value, place, imports if dynamic else None, note)
            elif isinstance(statement, config_parser.IncludeStatement):
                yield statement
    except (SyntaxError, tokenize.TokenError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else error.args[1][0]
        message = error.msg if isinstance(error, SyntaxError) else error.args[0]
        place = origin if origin.file is None else origin._replace(line=line or 0)
        what = "a value is no number, list, dict, quoted string, %MACRO or @reference."
        reason = what if message.startswith(("malformed node", "Unable to parse value")) else message.splitlines()[0]
        raise ConfigError(f"{place} cannot be parsed: {reason}{_quoting_hint(text, line)}") from error


def _quoting_hint(text: str, line: int | None) -> str:
    """Say that a string lacks its quotes, if that is what the line looks like."""
    lines = text.splitlines()
    bound = re.match(r"\s*([\w./]+)\s*=\s*([^'\"\[({@%\s][^'\"]*?)\s*$", lines[line - 1] if line and lines else text)
    if not bound:
        return ""
    name, value = bound.groups()
    return f" Strings need quotes of their own: {name} = '{value}' in a file, --gin.{name}=\"'{value}'\" in a shell."


def _parse(source: GinSource, library: Library) -> None:
    """Let gin itself parse the files and bindings; what it still refuses becomes a ConfigError."""
    gin.clear_config()
    try:
        with _reading_through(library):
            for name in source.files:
                gin.parse_config_file(name)
        gin.parse_config([*source.bindings])
    except (SyntaxError, ValueError, AttributeError, NameError, ImportError, OSError) as error:
        raise ConfigError(f"gin refuses the configuration: {str(error).strip()}") from error


@contextlib.contextmanager
def _reading_through(library: Library) -> Iterator[None]:
    """Make gin find included files as `--gin_file` finds them.

    Its own search ends in looking for a Python package of the folder's name, and logs an error per file.
    """
    readers = gin_internals._FILE_READERS
    saved = list(readers)
    readers[:] = [(library.open, library.exists)]  # pyright: ignore (typed as `open` itself)
    try:
        yield
    finally:
        readers[:] = saved


def _plain(error: BaseException) -> str:
    """Return a message without the call path that gin appends to it."""
    return str(error).split("\n  In call to configurable")[0].strip()


def _misfit(error: BaseException) -> str:
    """Explain why a class could not be constructed from what was bound."""
    message = _plain(error).splitlines()[0]
    missing = re.match(r"(\w+)\.__init__\(\) missing \d+ required [\w-]+ arguments?: (.*)", message)
    if missing:
        name, fields = missing.groups()
        return f"{name} needs {fields}, which nothing binds. Add `{name}.FIELD = VALUE` to a gin file."
    called = re.search(r"In call to configurable '(\w+)'", str(error))
    return f"{called[1] if called else 'The configuration'} refuses its values: {message}. --debug shows where."
