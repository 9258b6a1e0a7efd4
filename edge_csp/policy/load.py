"""Policies of the user, and settings as text."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from edge_csp.errors import EdgeCspError, PolicyError
from edge_csp.policy.base import MEASURED, Policy

GROUP = "edge_csp.policies"
"""Entry points by which packages offer policies."""
BOOLS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def find_policy(name: str, known: Iterable[str] = ()) -> type[Policy]:
    """The class that a path "package.module:Class" or "file.py:Class" or an entry point names.

    known: names that an error tells as well. Raises PolicyError.
    """
    if ":" in name:
        place, _, attribute = name.rpartition(":")
        return _policy_class(name, lambda: _attribute(_module(place), attribute))
    offered = [point for point in entry_points(group=GROUP) if point.name == name]
    if not offered:
        names = sorted({*known, *entry_points(group=GROUP).names})
        raise PolicyError(
            f"no policy is named {name!r}; there are {', '.join(names)}, and your own as module:Class or file.py:Class"
        )
    if len(offered) > 1:
        raise PolicyError(f"policy {name} is offered by {' and '.join(sorted(point.value for point in offered))}")
    return _policy_class(name, offered[0].load)


def _policy_class(name: str, load: Callable[[], object]) -> type[Policy]:
    """What `load` loads, if that is a policy."""
    try:
        found = load()
    except EdgeCspError:
        raise
    except (Exception, SystemExit) as error:
        raise PolicyError(f"policy {name} cannot be loaded: {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise PolicyError(f"policy {name} is no subclass of edge_csp.Policy, but {_named(found)}")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise PolicyError(f"policy {name} has no method {', '.join(missing)}")
    if not (isinstance(getattr(found, "name", None), str) and found.name):
        raise PolicyError(f'policy {name} has no name: write name: ClassVar[str] = "…" in the class')
    if "__dataclass_params__" not in vars(found) or not is_dataclass(found):
        raise PolicyError(f"policy {name} is no dataclass: write @dataclass(frozen=True) above the class")
    if not isinstance(found.needs, frozenset) or found.needs - MEASURED.keys():
        raise PolicyError(f"policy {name} needs {found.needs!r}; it must be a frozenset of {', '.join(MEASURED)}")
    return found


def _module(place: str) -> ModuleType:
    """The module of a dotted name, or of a file; files are told by their ending."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).expanduser().resolve()
    name = f"edge_csp_policy_of_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise PolicyError(f"policy file {place} does not exist")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _attribute(module: ModuleType, name: str) -> object:
    if not hasattr(module, name):
        raise PolicyError(f"{module.__file__ or module.__name__} has no {name!r}")
    return getattr(module, name)


def _named(found: object) -> str:
    return f"the class {found.__qualname__}" if isinstance(found, type) else f"of the type {type(found).__name__}"


def with_settings(policy: type[Policy], texts: Iterable[str], settings: Mapping[str, Any]) -> Policy:
    """A policy with settings, and with settings as "name=value". Raises PolicyError."""
    values = dict(settings)
    given = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise PolicyError(f"policy setting {text!r} is not of the form name=value")
        given.append((name.strip(), value.strip()))
    known = [field.name for field in fields(policy) if field.init]
    if unknown := sorted({*values, *dict(given)} - {*known}):
        has = f"its settings are {', '.join(sorted(known))}" if known else "it has no settings"
        raise PolicyError(f"policy {policy.name} does not know {', '.join(unknown)}; {has}")
    for name, value in given:
        if name in values:
            raise PolicyError(f"policy setting {name} is given twice")
        values[name] = _read(policy, name, value)
    try:
        return policy(**values)
    except EdgeCspError:
        raise
    except Exception as error:
        raise PolicyError(f"policy {policy.name} refuses its settings: {error}") from error


def _read(policy: type[Policy], name: str, text: str) -> Any:
    """The value of a setting."""
    try:
        kind = get_type_hints(policy)[name]
    except NameError as error:
        raise PolicyError(f"policy {policy.name}: the type of {name} cannot be told: {error}") from error
    kinds = list(get_args(kind)) if get_origin(kind) in (Union, UnionType) else [kind]
    if NoneType in kinds and text.lower() == "none":
        return None
    for kind in kinds:
        if get_origin(kind) is Literal and text in get_args(kind):
            return text
        if kind is bool and text.lower() in BOOLS:
            return BOOLS[text.lower()]
        if kind in (int, float, str):
            try:
                return kind(text)
            except ValueError:
                continue
    expected = " or ".join(_type_name(kind) for kind in kinds if kind is not NoneType)
    raise PolicyError(f"policy setting {name} is {text!r}; it must be {expected}")


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    names = {int: "a whole number", float: "a number", bool: "on or off", str: "text"}
    return names.get(kind, f"of the type {getattr(kind, '__name__', kind)}, which no text can give")
