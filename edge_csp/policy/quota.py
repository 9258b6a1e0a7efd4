"""Quotas: every picture and every run of text keeps its share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from edge_csp.errors import PolicyError
from edge_csp.policy import kernels
from edge_csp.policy.base import BoolArray, FloatArray, Observation, Policy, Span
from edge_csp.policy.csp import CspPolicy

NEIGHBOURS, NEIGHBOUR_WEIGHT = 3, np.float32(0.9)
SHORT = 0.3
"""Attention goes to short keys if so few of the most attended quarter are longer than the median, by chance half."""


@dataclass(frozen=True)
class QuotaPolicy(Policy):
    """Every picture and every run of text keeps cells in proportion to its size, a token of text as many as several
    patches: what is left of a conversation is not decided by one question.

    Text keeps its longest keys: their norm tells what will be attended for before anybody asks. Pictures keep patches
    that are spread, from the first one on, the more densely the more there is to see: embeddings of blank patches are
    all alike. A share of the cells goes first to what the question looks at, by the rule of CSP; if the conversation
    ends with a picture, there is no question.

    Own work, see docs/quality.md. Key norms: arXiv 2406.11430, where the short ones stay: models differ, and so may
    their layers. Places are shared out by the method of Sainte-Laguë.

    text_weight:    of a token of text, beside 1 of a patch
    question_share: of the cells that are not protected, 0 .. 1
    cross_ratio:    share of these cells that the ranking by other modalities gets, 0 .. 1, see CspPolicy
    sign:           1 keeps long keys, -1 short ones; 0: long ones, but in layers whose attention goes to short ones
    evenness:       share of the patches that do not follow the contrast, more than 0; 1 spreads all evenly
    sharpness:      power of the contrast that they follow, more than 0
    """

    name: ClassVar[str] = "quota"
    needs: ClassVar[frozenset[str]] = frozenset({"key_norm", "scores"})

    text_weight: float = 4.0
    question_share: float = 0.1
    cross_ratio: float = 0.5
    sign: int = 0
    evenness: float = 0.1
    sharpness: float = 2.0

    def __post_init__(self) -> None:
        if not self.text_weight > 0:
            raise PolicyError(f"text_weight is {self.text_weight}; it must be more than 0")
        if not 0 <= self.question_share <= 1:
            raise PolicyError(f"question_share is {self.question_share}; it must be between 0 and 1")
        CspPolicy(self.cross_ratio)
        if self.sign not in (1, 0, -1):
            raise PolicyError(f"sign is {self.sign}; it must be 1, 0 or -1")
        if not 0 < self.evenness <= 1:
            raise PolicyError(f"evenness is {self.evenness}; it must be more than 0, and at most 1")
        if not 0 < self.sharpness < math.inf:
            raise PolicyError(f"sharpness is {self.sharpness}; it must be more than 0, and finite")

    def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        spans, span = observation.spans, observation.span
        if self.question_share and not spans[-1].is_picture:
            protected = self._of_question(observation, n_keep, protected)
        is_picture = np.array([one.is_picture for one in spans])
        rank = kernels.rank_in_spans(self.rankings(observation, is_picture[span]), span, protected)
        weight = np.array([one.n_cell * (1 if one.is_picture else self.text_weight) for one in spans], np.float32)
        return kernels.top_select(weight[span] / (rank + np.float32(0.5)), protected, n_keep)

    def _of_question(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        """The protected cells, and those that the question looks at."""
        own, cross = observation.score_self, observation.score_cross
        kept = np.empty_like(protected)
        for i, layer in enumerate(protected):
            n_protected = int(layer.sum(axis=-1).max())
            n = math.floor(self.question_share * (n_keep - n_protected))
            k_self, k_cross = CspPolicy(self.cross_ratio).shares(n)
            kept[i] = kernels.csp_select(own[i], cross[i], layer, k_self, k_cross, n_protected + n)
        return kept

    def rankings(self, observation: Observation, is_picture: BoolArray) -> list[FloatArray]:
        """Rankings that take turns in every picture and run of text, f32 [n_layer, n_head_kv, n_cell], largest first.

        is_picture: bool [n_layer, n_head_kv, n_cell]
        """
        spread_out = spread(observation, self.evenness, self.sharpness)
        return [np.where(is_picture, spread_out, self._worth(observation, ~is_picture))]

    def _worth(self, observation: Observation, is_text: BoolArray) -> FloatArray:
        """Key norms; a token is worth nearly as much as the best of its neighbours, as words are several tokens."""
        worth = np.empty(observation.shape, np.float32)
        for i, norms in enumerate(observation.key_norm):
            if self.sign < 0 or (self.sign == 0 and attends_to_short(norms, observation.scores[i], is_text[i])):
                norms = np.float32(1) / (1 + norms)
            np.maximum(norms, NEIGHBOUR_WEIGHT * kernels.pool_max(norms, NEIGHBOURS), out=worth[i])
        return worth


@dataclass(frozen=True)
class CuedQuotaPolicy(QuotaPolicy):
    """Like quota; text also keeps, by turns, what the model looks at when it is asked about the pictures behind it.

    Cues are run right after every picture and taken back, see Pruning.cues.
    """

    name: ClassVar[str] = "quota+"
    needs: ClassVar[frozenset[str]] = frozenset({"key_norm", "scores", "cue"})

    def rankings(self, observation: Observation, is_picture: BoolArray) -> list[FloatArray]:
        (first,) = super().rankings(observation, is_picture)
        return [first, np.where(is_picture, first, observation.cue)]


def attends_to_short(norms: FloatArray, scores: FloatArray, is_text: BoolArray) -> bool:
    """True if the attention of a layer to text goes to cells with short keys.

    norms, is_text: [n_head_kv, n_cell]. scores: [n_head_kv, n_modality, n_cell].
    """
    n_long = n_short = 0
    for norm, score, text in zip(norms, scores, is_text, strict=True):
        norm, score = norm[text], score.sum(axis=0)[text]
        if n := len(norm) // 4:
            beside = norm[np.argpartition(score, -n)[-n:]] - np.median(norm)
            n_long += int(np.count_nonzero(beside > 0))
            n_short += int(np.count_nonzero(beside < 0))
    return n_long < SHORT * (n_long + n_short)


def spread(observation: Observation, evenness: float, sharpness: float) -> FloatArray:
    """Ranks the cells of every picture so that those of the highest ranks are spread over it with its density, f32 as
    the cells; 0 in text.
    """
    spans = observation.spans
    is_left = np.zeros(len(spans), np.bool_)
    is_left[observation.span] = True
    tables, begins, size = [np.zeros(1, np.float32)], np.zeros(len(spans), np.int32), 1  # text is at 0
    for i, span in enumerate(spans):
        if is_left[i] and span.is_picture:
            begins[i] = size
            tables.append(-threshold(span.n_cell, span.columns) / density(span, evenness, sharpness))
            size += span.n_cell
    cells = begins[observation.span]
    cells += np.where(cells > 0, observation.offset, np.int32(0))
    ranking: FloatArray = np.concatenate(tables)[np.minimum(cells, size - 1)]
    return ranking


def density(span: Span, evenness: float, sharpness: float) -> FloatArray:
    """How densely cells of a span stay, f32 [n_cell], 1 on average."""
    if span.contrast is None:
        return np.ones(span.n_cell, np.float32)
    contrast = (span.contrast / (span.contrast.max() or 1)) ** np.float32(sharpness)
    followed: FloatArray = contrast / (contrast.mean() or 1)
    return np.float32(evenness) + np.float32(1 - evenness) * followed


@lru_cache(maxsize=64)
def threshold(n_cell: int, columns: int) -> FloatArray:
    """Bayer's ordered dither, of a line if the grid is not known: the cells below a threshold are that share of them
    all, and spread evenly; f32 [n_cell], 0 .. 1, all different.
    """
    y, x = np.divmod(np.arange(n_cell), columns or n_cell)
    thresholds = np.zeros(n_cell, np.float32)
    scale = np.float32(1)
    for bit in range(max(n_cell - 1, 1).bit_length()):
        if columns:
            scale /= 4
            thresholds += scale * (2 * ((x >> bit ^ y >> bit) & 1) + (y >> bit & 1))
        else:
            scale /= 2
            thresholds += scale * (x >> bit & 1)
    return thresholds
