"""Random cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edge_csp.errors import PolicyError
from edge_csp.policy.base import BoolArray, Observation, Policy
from edge_csp.policy.kernels import top_select


@dataclass(frozen=True)
class RandomPolicy(Policy):
    """Keeps unprotected cells drawn uniformly, in every layer and head anew: the floor that a policy has to beat.

    seed: the same seed and cache shape give the same cells, >= 0
    """

    name: ClassVar[str] = "random"
    needs: ClassVar[frozenset[str]] = frozenset()

    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise PolicyError(f"seed is {self.seed}; it must be 0 or more")

    def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        n_layer, n_head_kv, n_cell = observation.shape
        draws = np.empty(observation.shape, np.float32)
        for i in range(n_layer):
            generator = np.random.default_rng((self.seed, n_cell, observation.first_layer + i))
            draws[i] = 1 - generator.random((n_head_kv, n_cell), np.float32)
        return top_select(draws, protected, n_keep)
