"""StreamingLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edge_csp.errors import PolicyError
from edge_csp.policy.base import BoolArray, Observation, Policy
from edge_csp.policy.kernels import top_select


@dataclass(frozen=True)
class StreamingPolicy(Policy):
    """The first cells, attention sinks, and the last ones stay.

    Source: arXiv 2309.17453. There positions are counted anew in the cache; here every cell keeps its own.

    sink: number of first cells, >= 0
    """

    name: ClassVar[str] = "streaming"
    needs: ClassVar[frozenset[str]] = frozenset()

    sink: int = 4

    def __post_init__(self) -> None:
        if self.sink < 0:
            raise PolicyError(f"sink is {self.sink}; it must be 0 or more")

    def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        rank = np.arange(1, observation.n_cell + 1, dtype=np.float32)
        rank[: self.sink] = np.inf
        return top_select(np.broadcast_to(rank, observation.shape), protected, n_keep)
