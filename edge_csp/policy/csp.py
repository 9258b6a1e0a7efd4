"""Cross-Self Pruning (CSP)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from edge_csp.errors import PolicyError
from edge_csp.policy import kernels
from edge_csp.policy.base import BoolArray, Observation, Policy


@dataclass(frozen=True)
class CspPolicy(Policy):
    """Two rankings share the budget: attention from a cell's own modality, and from all other modalities.

    Source: arXiv 2412.04652, with the rules of llama_csp_select() (see kernels.csp_select); if wanted, with scores
    averaged over neighbours, as SnapKV (arXiv 2404.14469) does.

    cross_ratio: share of the past cells that the ranking by other modalities gets, 0 .. 1
    pool:        average the scores over this many neighbouring cells first (odd); 1 is off: the published rule, that of
                 llama_csp_select(), and the better one on real language weights (docs/quality.md)
    """

    name: ClassVar[str] = "csp"

    cross_ratio: float = 0.5
    pool: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.cross_ratio <= 1:
            raise PolicyError(f"cross_ratio is {self.cross_ratio}; it must be between 0 and 1")
        if self.pool < 1 or self.pool % 2 == 0:
            raise PolicyError(f"pool is {self.pool}; it must be an odd number of cells, 1 or more")

    def shares(self, n_past: int) -> tuple[int, int]:
        """(k_self, k_cross) of n_past cells: the budget without the recent ones. Rounded in favour of k_self."""
        k_cross = math.floor(Fraction(str(float(self.cross_ratio))) * n_past)
        return n_past - k_cross, k_cross

    def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        own, cross = observation.score_self, observation.score_cross
        keep = np.empty_like(protected)
        for il, kept in enumerate(protected):
            k_self, k_cross = self.shares(n_keep - n_recent(kept))
            rankings = own[il], cross[il]
            if self.pool > 1:
                rankings = kernels.pool(own[il], self.pool), kernels.pool(cross[il], self.pool)
            keep[il] = kernels.csp_select(*rankings, kept, k_self, k_cross, n_keep)
        return keep


def n_recent(protected: BoolArray) -> int:
    """Cells at the end that are protected in every head of bool [n_head_kv, n_cell]."""
    others = np.flatnonzero(~protected.all(axis=0))
    return int(protected.shape[-1] - 1 - others[-1]) if others.size else int(protected.shape[-1])
