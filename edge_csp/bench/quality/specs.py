"""Policies as written on the command line: NAME, or NAME:SETTING=VALUE,…

Settings are those of the policy, and those of `Pruning` (n_obs=16, n_recent=8, cues=Describe picture {n}. …).
`downsample` is no policy: it takes fewer picture tokens, and evicts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from edge_csp.errors import BenchError
from edge_csp.policy import Policy, make_policy
from edge_csp.policy.base import REHEARSED
from edge_csp.pruning import Pruning

DOWNSAMPLE = "downsample"
DEFAULTS = (
    "blend",
    "blend+",
    "csp",
    "csp:pool=5",
    "snapkv",
    "h2o",
    "lookm",
    "lookm:merge=pivotal",
    "streaming",
    "keydiff",
    "random",
    "full",
    DOWNSAMPLE,
)
"""What is compared unless something else is asked for. csp is csp as it was published."""
REFERENCE = "blend"
"""What the others are compared with."""
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
    def rereads(self) -> bool:
        """True if answers may see pictures once more."""
        return self.policy is not None and self.pruning().reread > 0

    @property
    def rehearses(self) -> bool:
        """True if text is read once more before an eviction."""
        return self.policy is not None and bool(self.policy.needs & REHEARSED)

    @property
    def keeps_all(self) -> bool:
        return self.policy is not None and self.policy.n_keep(1, 2) > 1


def parse_spec(text: str) -> Spec:
    """Raises PolicyError for an unknown policy or setting, BenchError for what cannot be measured."""
    head, _, tail = text.rpartition(":")
    name, given = (head, tail.split(",")) if "=" in tail and head else (text, [])
    if name == DOWNSAMPLE:
        if given:
            raise BenchError(f"{DOWNSAMPLE} has no settings: {text!r}")
        return Spec(text, None)
    own = [one for one in given if one.partition("=")[0].strip() not in OVERRIDES]
    policy = make_policy(name, own)
    return Spec(text, policy, tuple(_override(text, one) for one in given if one not in own))


def _override(text: str, given: str) -> tuple[str, Any]:
    """A setting of Pruning: a number, or what to ask about pictures."""
    name, _, value = (part.strip() for part in given.partition("="))
    if name == "cues":
        return name, (value,)
    kind = type(getattr(Pruning, name))
    try:
        number = kind(value)
        if not 0 <= number < math.inf:
            raise ValueError
    except ValueError:
        raise BenchError(f"{name} is {value!r} in {text!r}: it is a number, 0 or more") from None
    return name, number


AFTERWARDS = frozenset({"scores", "key_norm", "value_norm", "keys"})
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
