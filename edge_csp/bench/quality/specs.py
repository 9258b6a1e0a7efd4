"""Policies as written on the command line: NAME, or NAME:SETTING=VALUE,…

Settings are those of the policy, and those of `Pruning` (n_obs=16, n_recent=8 …). `downsample` is no policy: it takes
fewer picture tokens, and evicts nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from edge_csp.errors import BenchError
from edge_csp.policy import Policy, make_policy
from edge_csp.pruning import Pruning

DOWNSAMPLE = "downsample"
OVERRIDES = frozenset(field.name for field in fields(Pruning)) - {"budget", "policy", "cells"}
"""Settings of Pruning that a spec may change."""


@dataclass(frozen=True)
class Spec:
    """text: as given, the name in records. policy: None for downsample. overrides: settings of Pruning, by name."""

    text: str
    policy: Policy | None
    overrides: tuple[tuple[str, Any], ...] = ()

    def pruning(self, cells: int | None = None) -> Pruning:
        if self.policy is None:
            raise BenchError(f"{self.text} evicts nothing")
        return Pruning(policy=self.policy, cells=cells, **dict(self.overrides))

    @property
    def keeps_all(self) -> bool:
        return self.policy is not None and self.policy.n_keep(1, 2) > 1


def parse_spec(text: str) -> Spec:
    """Raises PolicyError for an unknown policy or setting, BenchError for a setting without a value."""
    head, _, tail = text.rpartition(":")
    name, settings = (head, _settings(text, tail)) if "=" in tail and head else (text, {})
    if name == DOWNSAMPLE:
        if settings:
            raise BenchError(f"{DOWNSAMPLE} has no settings: {text!r}")
        return Spec(text, None)
    overrides = tuple((key, value) for key, value in settings.items() if key in OVERRIDES)
    own = {key: value for key, value in settings.items() if key not in OVERRIDES}
    spec = Spec(text, make_policy(name, **own), overrides)
    _check(spec)
    return spec


def _check(spec: Spec) -> None:
    for key, value in spec.overrides:
        default = getattr(Pruning(), key)
        if isinstance(default, int | float) and (isinstance(value, bool | str) or value < 0):
            raise BenchError(f"{key} is {value!r} in {spec.text!r}: it is a number, 0 or more")


def _settings(text: str, given: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in given.split(","):
        key, equals, value = one.partition("=")
        if not (key.strip() and equals and value.strip()):
            raise BenchError(f"{one!r} in {text!r} is no SETTING=VALUE")
        try:
            found[key.strip()] = json.loads(value)
        except ValueError:
            found[key.strip()] = value.strip()
    return found


AFTERWARDS = frozenset({"scores", "key_norm", "keys"})
"""What can be measured of a cache that was read without it in mind; the rest has to be recorded or run meanwhile."""


def groups(specs: Sequence[Spec]) -> list[list[Spec]]:
    """Specs that can look at the same cache: everything that is read or run before the eviction is the same."""
    found: dict[Any, list[Spec]] = {}
    for spec in specs:
        if spec.policy is not None:
            found.setdefault((repr(spec.overrides), spec.policy.needs - AFTERWARDS), []).append(spec)
    return list(found.values())


def n_window(specs: Sequence[Spec]) -> int:
    """Queries that have to be recorded for all of them."""
    return max([Pruning.n_obs, *(spec.pruning().n_obs for spec in specs if spec.policy is not None)])
