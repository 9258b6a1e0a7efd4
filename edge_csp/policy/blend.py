"""The default: CSP for the question that is there, and something of every picture for those that come later."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np

from edge_csp.errors import PolicyError
from edge_csp.policy import kernels
from edge_csp.policy.base import BoolArray, FloatArray, Observation, Policy


@dataclass(frozen=True)
class BlendPolicy(Policy):
    """Four rankings share the cells: CSP's two, and two that give every picture a share of its own.

    What the last queries look at is the best that is known of text, and of pictures if a question about them is there;
    but it may be one picture of many. So half of the places of pictures are shared out over all of them, in proportion
    to their size: within a picture, to what is looked at most, and to the longest keys, which attract attention
    whatever is asked. Key norms tell nothing about text (docs/quality.md), and rank none of it. A conversation without
    pictures is left to CSP's rule.

    Sources: arXiv 2412.04652 (self and cross), 2406.11430 (key norms: there the short ones stay). Places are shared out
    by the method of Sainte-Laguë.

    self_share:  of the ranking by attention from a cell's own modality
    cross_share: of that by attention from all other modalities
    seen_share:  of the same attention within each picture
    key_share:   of key norms within each picture
    """

    name: ClassVar[str] = "blend"
    needs: ClassVar[frozenset[str]] = frozenset({"key_norm", "scores"})

    self_share: int = 4
    cross_share: int = 2
    seen_share: int = 2
    key_share: int = 2

    def __post_init__(self) -> None:
        _check_shares(self)

    def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        own, cross = observation.score_self, observation.score_cross
        rankings, shares = [own, cross], [self.self_share, self.cross_share]
        for values, share in ((cross, self.seen_share), (observation.key_norm, self.key_share)):
            if share and any(span.is_picture for span in observation.spans):
                rankings.append(in_each_picture(values, observation))
                shares.append(share)
        return kernels.share_select(rankings, shares, protected, n_keep)


@dataclass(frozen=True)
class RehearsedBlendPolicy(Policy):
    """What is looked at while the text is repeated and the pictures are described, and what the last queries look at.

    It costs passes through the model before an eviction, see rehearsal.py, and keeps nearly everything that questions
    may ask about later: facts in text, which no attention before the question tells apart, and what pictures show.

    Sources: arXiv 2505.23416 (repeating). Own work: describing, and rankings that share the cells.

    repeated_share:  of the ranking by the attention while text was repeated
    described_share: of that by the attention of descriptions and the cues for them
    self_share:      of that by the attention of the last queries, from a cell's own modality
    """

    name: ClassVar[str] = "blend+"
    needs: ClassVar[frozenset[str]] = frozenset({"scores", "repeated", "described"})

    repeated_share: int = 4
    described_share: int = 4
    self_share: int = 1

    def __post_init__(self) -> None:
        _check_shares(self)

    def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        rankings = [observation.repeated, observation.described, observation.score_self]
        shares = [self.repeated_share, self.described_share, self.self_share]
        if not any(span.is_picture for span in observation.spans):
            del rankings[1], shares[1]
        return kernels.share_select(rankings, shares, protected, n_keep)


def _check_shares(policy: Policy) -> None:
    """Raises PolicyError if a share is negative."""
    for setting in fields(policy):
        if (value := getattr(policy, setting.name)) < 0:
            raise PolicyError(f"{setting.name} is {value}; it must be 0 or more")


def in_each_picture(values: FloatArray, observation: Observation) -> FloatArray:
    """A ranking of which every picture has a part in proportion to its size: its best cells by `values`.

    values: f32 [n_layer, n_head_kv, n_cell]; returns the same, > 0 in pictures, 0 in text.
    """
    size = np.array([span.n_cell if span.is_picture else 0 for span in observation.spans], np.float32)
    nothing = np.zeros(observation.shape, np.bool_)
    rank = kernels.rank_in_spans([values], observation.span, nothing)
    ranking: FloatArray = size[observation.span] / (rank + np.float32(0.5))
    return ranking
