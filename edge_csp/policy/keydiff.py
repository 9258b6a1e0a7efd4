"""KeyDiff."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edge_csp.policy.base import BoolArray, FloatArray, Observation, Policy
from edge_csp.policy.kernels import top_select


@dataclass(frozen=True)
class KeyDiffPolicy(Policy):
    """Keys that are least like the mean key stay; no attention is needed.

    Source: arXiv 2504.15364: cosine similarity to the mean of the normalised keys of the head, which have the rotation
    of their positions, as in the cache. It has no settings.
    """

    name: ClassVar[str] = "keydiff"
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})

    def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        keep = np.empty_like(protected)
        for il, keys in enumerate(observation.keys):
            keep[il] = top_select(2 - similarity_to_mean(keys), protected[il], n_keep)  # scores > 0
        return keep


def similarity_to_mean(keys: FloatArray) -> FloatArray:
    """Cosine similarity of every key to the mean of the normalised keys, f32 [n_head_kv, n_cell].

    keys: f32 [n_head_kv, n_cell, head_dim]; a key of length 0 is like no other.
    """
    lengths = np.sqrt(np.einsum("hcd,hcd->hc", keys, keys))
    scale = 1 / np.maximum(lengths, np.finfo(np.float32).tiny)
    mean = normalised(scale[:, None] @ keys / np.float32(keys.shape[1]))
    similarity: FloatArray = (keys @ mean.swapaxes(1, 2))[..., 0] * scale
    return similarity


def normalised(rows: FloatArray) -> FloatArray:
    """Rows f32 [..., head_dim] of length 1; those of length 0 as they are."""
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit: FloatArray = rows / np.maximum(length, np.finfo(np.float32).tiny)
    return unit
