"""SnapKV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from edge_csp.errors import PolicyError
from edge_csp.policy import kernels
from edge_csp.policy.base import BoolArray, Observation, Policy


@dataclass(frozen=True)
class SnapKvPolicy(Policy):
    """Cells that the last queries look at stay, whatever their modality, with their neighbours.

    Source: arXiv 2404.14469; over the query heads of a KV head the attention is averaged. The window (`n_obs`) and the
    recent cells are settings of the runtime.

    pool:    number of neighbouring cells that are pooled first (odd); 1 is off
    pooling: "avg" or "max" of them
    """

    name: ClassVar[str] = "snapkv"

    pool: int = 5
    pooling: Literal["avg", "max"] = "avg"

    def __post_init__(self) -> None:
        if self.pool < 1 or self.pool % 2 == 0:
            raise PolicyError(f"pool is {self.pool}; it must be an odd number of cells, 1 or more")
        if self.pooling not in ("avg", "max"):
            raise PolicyError(f"pooling is {self.pooling!r}; it must be avg or max")

    def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        attention = observation.scores.sum(axis=2)
        if self.pool > 1:
            pool = kernels.pool if self.pooling == "avg" else kernels.pool_max
            attention = pool(attention, self.pool)
        return kernels.top_select(attention, protected, n_keep)
