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
    """Three rankings share the cells: CSP's two, and one that gives every picture a part of its own.

    What the last queries look at is the best that is known of text, and of pictures if a question about them is there;
    but it may be one picture of many. So a part of the cells is shared out over all pictures, in proportion to their
    size; within a picture it goes to the longest keys, which attract attention whatever is asked. Key norms tell
    nothing about text (docs/quality.md), and rank none of it. A conversation without pictures is left to CSP's rule.

    Sources: arXiv 2412.04652 (self and cross), 2406.11430 (key norms: there the short ones stay). Places are shared out
    by the method of Sainte-Laguë.

    self_share:  of the ranking by attention from a cell's own modality
    cross_share: of that by attention from all other modalities
    key_share:   of that by key norms within each picture
    """

    name: ClassVar[str] = "blend"
    needs: ClassVar[frozenset[str]] = frozenset({"key_norm", "scores"})

    self_share: int = 2
    cross_share: int = 1
    key_share: int = 2

    def __post_init__(self) -> None:
        _check_shares(self)

    def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        rankings, shares = [observation.score_self, observation.score_cross], [self.self_share, self.cross_share]
        if has_pictures(observation):
            rankings.append(in_each_picture(observation.key_norm, observation))
            shares.append(self.key_share)
        return kernels.share_select(rankings, shares, protected, n_keep)


@dataclass(frozen=True)
class RehearsedBlendPolicy(Policy):
    """What is looked at while the text is repeated and the pictures are described, beside the long keys of each picture
    and what the last queries look at.

    It costs passes through the model before an eviction, see rehearsal.py, and keeps nearly everything that questions
    may ask about later: facts in text, which no attention before the question tells apart, and what pictures show.

    Sources: arXiv 2505.23416 (repeating; there without the lengths of values). Own work: describing, and rankings that
    share the cells.

    repeated_share:  of the ranking by the attention while text was repeated, times the length of the value
    described_share: of that by the attention of descriptions and the cues for them
    key_share:       of that by key norms within each picture
    self_share:      of that by the attention of the last queries, from a cell's own modality
    """

    name: ClassVar[str] = "blend+"
    needs: ClassVar[frozenset[str]] = frozenset({"key_norm", "scores", "value_norm", "repeated", "described"})

    repeated_share: int = 4
    described_share: int = 2
    key_share: int = 2
    self_share: int = 1

    def __post_init__(self) -> None:
        _check_shares(self)

    def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        rankings = [observation.repeated * observation.value_norm, observation.score_self]
        shares = [self.repeated_share, self.self_share]
        if has_pictures(observation):
            rankings += [observation.described, in_each_picture(observation.key_norm, observation)]
            shares += [self.described_share, self.key_share]
        return kernels.share_select(rankings, shares, protected, n_keep)


def has_pictures(observation: Observation) -> bool:
    return any(span.is_picture for span in observation.spans)


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
