"""LOOK-M."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt

from edge_csp.errors import PolicyError
from edge_csp.policy.base import BoolArray, FloatArray, IntArray, Observation, Policy
from edge_csp.policy.kernels import ranked_select
from edge_csp.policy.keydiff import normalised

Merge = Literal["none", "average", "pivotal", "weighted"]
TEXT = 0
CHUNK = 1024
"""Evicted cells that are compared at once with those that stay."""


@dataclass(frozen=True)
class LookMPolicy(Policy):
    """Text stays before pictures, each ranked by the attention of all queries; what goes can be merged into what stays.

    Source: arXiv 2406.18139. The paper adds the highest attention to that of text, so that pictures get what text
    leaves; the released code keeps text beyond the budget too, this one keeps to it. Merging follows the formulas of
    the paper, see merge_rows(); the released code also leaves out evicted cells that are unlike all others, by a mask
    that is shared by heads that evict different cells.

    merge: what happens to evicted rows: "none", "average", "pivotal" or "weighted"
    """

    name: ClassVar[str] = "lookm"
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})

    merge: Merge = "none"

    def __post_init__(self) -> None:
        if self.merge not in get_args(Merge):
            raise PolicyError(f"merge is {self.merge!r}; it must be one of {', '.join(get_args(Merge))}")

    def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        mass, is_text = observation.mass, observation.tag == TEXT
        lowest = np.finfo(np.float32).tiny  # text without attention comes before pictures too
        text = np.where(is_text, np.fmax(mass, lowest), np.float32(0))
        others = np.where(is_text, np.float32(0), mass)
        return ranked_select(text, others, protected, n_keep)

    @property
    def merges(self) -> bool:
        return self.merge != "none"

    def merge_rows(
        self, observation: Observation, k: FloatArray, v: FloatArray, cells: IntArray
    ) -> tuple[FloatArray, FloatArray]:
        """Every evicted row goes to the row that stays and whose key is most similar (cosine), K and V alike.

        A row c with the evicted rows e_1 .. e_m becomes (c + x_1 + .. + x_m) / (m + 1), where x_i is e_i (average),
        (c + e_i) / 2 (pivotal) or e_i times its similarity (weighted). Keys are compared and merged as they are in the
        cache, with the rotations of their positions, as in the released code: rotating the evicted key to the position
        of the other one first would be a different method. If similar keys are equally similar, the earlier one wins.
        """
        k, v = k.copy(), v.copy()
        for keys, values, kept in zip(k, v, cells, strict=True):
            evicted = np.setdiff1d(np.arange(len(keys)), kept, assume_unique=True)
            target, similarity = nearest(keys[evicted], keys[kept])
            for rows in (keys, values):
                rows[kept] = self._merged(rows[kept], rows[evicted], target, similarity[:, None])
        return k, v

    def _merged(
        self, kept: FloatArray, evicted: FloatArray, target: npt.NDArray[np.intp], similarity: FloatArray
    ) -> FloatArray:
        """The rows `kept`, with the evicted row i merged into row target[i]."""
        if self.merge == "pivotal":
            evicted = (evicted + kept[target]) * np.float32(0.5)
        elif self.merge == "weighted":
            evicted = evicted * similarity
        order = np.argsort(target, kind="stable")
        targets, begin, n = np.unique(target[order], return_index=True, return_counts=True)
        merged = kept.copy()
        if targets.size:
            merged[targets] += np.add.reduceat(evicted[order], begin, axis=0)
            merged[targets] /= (n + 1).astype(np.float32)[:, None]
        return merged


def nearest(evicted: FloatArray, kept: FloatArray) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """For every evicted key the kept one of highest cosine similarity, as its number, and this similarity.

    evicted: f32 [n_evicted, head_dim]; kept: f32 [n_keep, head_dim]. A key of length 0 is like no other.
    """
    target, highest = np.empty(len(evicted), np.intp), np.empty(len(evicted), np.float32)
    others = normalised(kept).T
    for begin in range(0, len(evicted), CHUNK):
        part = slice(begin, begin + CHUNK)
        similarity = normalised(evicted[part]) @ others
        target[part] = similarity.argmax(axis=1)
        highest[part] = similarity.max(axis=1)
    return target, highest
