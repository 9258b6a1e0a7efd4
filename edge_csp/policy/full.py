"""The full cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edge_csp.policy.base import BoolArray, Observation, Policy


@dataclass(frozen=True)
class FullPolicy(Policy):
    """Keeps every cell, whatever the budget: what all other policies are measured against."""

    name: ClassVar[str] = "full"
    needs: ClassVar[frozenset[str]] = frozenset()

    def n_keep(self, budget: int, n_cell: int) -> int:
        return n_cell

    def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        return np.ones(observation.shape, np.bool_)
