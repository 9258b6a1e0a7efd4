"""H2O."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from edge_csp.errors import PolicyError
from edge_csp.policy.base import BoolArray, Observation, Policy
from edge_csp.policy.kernels import ranked_select


@dataclass(frozen=True)
class H2oPolicy(Policy):
    """Heavy hitters stay: a part of the budget is for the last cells, the rest for those with most attention so far.

    Source: arXiv 2306.14048. Attention is accumulated over all queries and not divided by their number, so that early
    cells have an advantage, as published.

    recent: share of the budget for the last cells, 0 .. 1
    """

    name: ClassVar[str] = "h2o"
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})

    recent: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.recent <= 1:
            raise PolicyError(f"recent is {self.recent}; it must be between 0 and 1")

    def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        n_recent = math.floor(Fraction(str(float(self.recent))) * n_keep)
        last = np.maximum(np.arange(1 - observation.n_cell, 1) + n_recent, 0).astype(np.float32)
        return ranked_select(np.broadcast_to(last, observation.shape), observation.mass, protected, n_keep)
