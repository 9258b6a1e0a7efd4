"""Policies: which cells of the KV cache stay. POLICIES maps the names that users give to classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from edge_csp.policy.base import Observation, Policy, Span
from edge_csp.policy.blend import BlendPolicy, RehearsedBlendPolicy
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
    "BlendPolicy",
    "CspPolicy",
    "FullPolicy",
    "H2oPolicy",
    "KeyDiffPolicy",
    "LookMPolicy",
    "Observation",
    "Policy",
    "RandomPolicy",
    "RehearsedBlendPolicy",
    "SnapKvPolicy",
    "Span",
    "StreamingPolicy",
    "make_policy",
]

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        BlendPolicy,
        RehearsedBlendPolicy,
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


def make_policy(name: str, texts: Iterable[str] = (), /, **settings: Any) -> Policy:
    """The policy of that name.

    name: of POLICIES, or a policy of the user: "package.module:Class", "folder/file.py:Class", or the name of an entry
    point of the group edge_csp.policies. That one is tried on some small cases first, see check_policy().
    texts: settings as "name=value", read by the type of the setting.

    Raises PolicyError for an unknown name, a class that cannot be loaded or breaks the contract, an unknown setting, or
    a value that cannot be read or is out of range.
    """
    from edge_csp.policy import load

    policy = POLICIES.get(name) or load.find_policy(name, POLICIES)
    made = load.with_settings(policy, texts, settings)
    if policy is not POLICIES.get(name):
        from edge_csp.policy.check import check_policy

        check_policy(made)
    return made
