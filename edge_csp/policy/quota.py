"""Quotas: every picture and every run of text keeps its share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from edge_csp.errors import PolicyError
from edge_csp.policy import kernels
from edge_csp.policy.base import BoolArray, FloatArray, Observation, Policy, Span

NEIGHBOURS, NEIGHBOUR_WEIGHT = 3, np.float32(0.9)
"""Words are several tokens: a token of text is worth nearly as much as the best of its neighbours."""


@dataclass(frozen=True)
class QuotaPolicy(Policy):
    """Every picture and every run of text keeps cells in proportion to its size, a token of text as many as several
    patches: what a conversation goes on with is not decided by one question.

    Within its quota, text keeps by turns the longest keys (their norm tells what will be attended for before anybody
    asks) and what the last queries look at; pictures keep by turns patches that are spread evenly, and what the last
    queries look at. The places of the last queries are those of CSP: with a question in the window, those of text are
    ranked by their own modality and those of pictures by the other one.

    Own work, see docs/quality.md. Key norms: arXiv 2406.11430, where the short ones stay; `sign` turns that around.
    Places are shared out by the method of Sainte-Laguë.

    text_weight: of a token of text, beside 1 of a patch
    sign: 1 keeps long keys, -1 short ones
    """

    name: ClassVar[str] = "quota"
    needs: ClassVar[frozenset[str]] = frozenset({"key_norm", "scores"})

    text_weight: float = 4.0
    sign: int = 1

    def __post_init__(self) -> None:
        if not self.text_weight > 0:
            raise PolicyError(f"text_weight is {self.text_weight}; it must be more than 0")
        if self.sign not in (1, -1):
            raise PolicyError(f"sign is {self.sign}; it must be 1 or -1")

    def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        spans = observation.spans
        is_picture = np.array([span.is_picture for span in spans])[observation.span]
        rankings = [
            np.where(is_picture, of_picture, of_text)
            for of_text, of_picture in zip(
                self.text_rankings(observation), self.picture_rankings(observation), strict=True
            )
        ]
        rank = kernels.rank_in_spans(rankings, observation.span, protected)
        weight = np.array([span.n_cell * (1 if span.is_picture else self.text_weight) for span in spans], np.float32)
        return kernels.top_select(weight[observation.span] / (rank + np.float32(0.5)), protected, n_keep)

    def text_rankings(self, observation: Observation) -> list[FloatArray]:
        """Rankings f32 [n_layer, n_head_kv, n_cell] that take turns in a run of text, the largest first; as many as
        picture_rankings() gives.
        """
        return [self._key_norm(observation), attention(observation)]

    def picture_rankings(self, observation: Observation) -> list[FloatArray]:
        """Rankings that take turns in a picture."""
        return [spread(observation), attention(observation)]

    def _key_norm(self, observation: Observation) -> FloatArray:
        norms = observation.key_norm
        if self.sign < 0:
            norms = np.float32(1) / (1 + norms)
        worth: FloatArray = np.maximum(norms, NEIGHBOUR_WEIGHT * kernels.pool_max(norms, NEIGHBOURS))
        return worth


@dataclass(frozen=True)
class CuedQuotaPolicy(QuotaPolicy):
    """Like quota, and text also keeps what the model looks at when it is asked about the pictures behind it.

    Cues are run right after every picture and taken back, see Pruning.cues.
    """

    name: ClassVar[str] = "quota+"
    needs: ClassVar[frozenset[str]] = frozenset({"key_norm", "scores", "cue"})

    def text_rankings(self, observation: Observation) -> list[FloatArray]:
        return [self._key_norm(observation), observation.cue, attention(observation)]

    def picture_rankings(self, observation: Observation) -> list[FloatArray]:
        evenly = spread(observation)
        return [evenly, evenly, attention(observation)]


def attention(observation: Observation) -> FloatArray:
    """Attention mass from all queries of the window, f32 [n_layer, n_head_kv, n_cell]."""
    total: FloatArray = observation.scores.sum(axis=2)
    return total


def spread(observation: Observation) -> FloatArray:
    """Ranks the cells of every span so that those of the highest ranks lie evenly over it, f32 as the cells."""
    table = np.concatenate([spread_of(span) for span in observation.spans])
    begins = np.cumsum([0, *(span.n_cell for span in observation.spans[:-1])])
    return table[np.minimum(begins[observation.span] + observation.offset, table.size - 1)]


@lru_cache(maxsize=64)
def spread_of(span: Span) -> FloatArray:
    """Minus the threshold of every cell in Bayer's ordered dither (of a line, if the grid is not known)."""
    y, x = np.divmod(np.arange(span.n_cell), span.columns or span.n_cell)
    threshold = np.zeros(span.n_cell, np.float32)
    scale = np.float32(1)
    for bit in range(max(span.n_cell - 1, 1).bit_length()):
        if span.columns:
            scale /= 4
            threshold += scale * (2 * ((x >> bit ^ y >> bit) & 1) + (y >> bit & 1))
        else:
            scale /= 2
            threshold += scale * (x >> bit & 1)
    return -threshold
