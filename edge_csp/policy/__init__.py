"""Policies: which cells of the KV cache stay. POLICIES maps the names that users give to classes."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from edge_csp.errors import PolicyError
from edge_csp.policy.base import Observation, Policy
from edge_csp.policy.csp import CspPolicy
from edge_csp.policy.full import FullPolicy
from edge_csp.policy.h2o import H2oPolicy
from edge_csp.policy.keydiff import KeyDiffPolicy
from edge_csp.policy.lookm import LookMPolicy
from edge_csp.policy.snapkv import SnapKvPolicy
from edge_csp.policy.streaming import StreamingPolicy
from edge_csp.policy.uniform_random import RandomPolicy

__all__ = [
    "POLICIES",
    "CspPolicy",
    "FullPolicy",
    "H2oPolicy",
    "KeyDiffPolicy",
    "LookMPolicy",
    "Observation",
    "Policy",
    "RandomPolicy",
    "SnapKvPolicy",
    "StreamingPolicy",
    "make_policy",
]

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        CspPolicy,
        SnapKvPolicy,
        H2oPolicy,
        LookMPolicy,
        StreamingPolicy,
        KeyDiffPolicy,
        RandomPolicy,
        FullPolicy,
    )
}


def make_policy(name: str, **settings: Any) -> Policy:
    """The policy of that name. Raises PolicyError for an unknown name, an unknown setting or a value out of range."""
    if name not in POLICIES:
        raise PolicyError(f"no policy is named {name!r}; there are {', '.join(sorted(POLICIES))}")
    known = {field.name for field in fields(POLICIES[name])}
    if unknown := sorted(settings.keys() - known):
        has = f"its settings are {', '.join(sorted(known))}" if known else "it has no settings"
        raise PolicyError(f"policy {name} does not know {', '.join(unknown)}; {has}")
    return POLICIES[name](**settings)
