"""The default: CSP for the question that is there, and something of every picture for those that come later."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, get_args

import numpy as np

from edge_csp.errors import PolicyError
from edge_csp.policy import kernels
from edge_csp.policy.base import BoolArray, FloatArray, Observation, Policy

LongKeys = Literal["auto", "yes", "no"]


@dataclass(frozen=True)
class BlendPolicy(Policy):
    """Three rankings share the cells: CSP's two, and one that gives every picture a part of its own, or that of the
    newest text if there are no pictures.

    What the last queries look at is the best that is known of text, and of pictures if a question about them is there;
    but it may be one picture of many. So in models whose attention to pictures goes to long keys, a part of the cells
    is shared out over all pictures, in proportion to their size, and within a picture goes to the longest keys: they
    will be looked at whatever is asked. Models that look at short ones are left to CSP's rule. Key norms tell nothing
    about text (docs/quality.md), and rank none of it. Text alone goes on from where it is: half of its cells are the
    newest, as in H2O, without which code, JSON and chats lose their thread.

    Sources: arXiv 2412.04652 (self and cross), 2406.11430 (key norms: there the short ones stay), 2306.14048 (newest).
    Places are shared out over the pictures by the method of Sainte-Laguë.

    self_share:    of the ranking by attention from a cell's own modality
    cross_share:   of that by attention from all other modalities
    picture_share: of that within each picture
    newest_share:  of that of the newest text, if there are no pictures
    long_keys:     "yes" if the model's attention to pictures goes to long keys, "no" if not, "auto" to find out
    """

    name: ClassVar[str] = "blend"
    needs: ClassVar[frozenset[str]] = frozenset({"key_norm", "scores"})

    self_share: int = 2
    cross_share: int = 1
    picture_share: int = 2
    newest_share: int = 3
    long_keys: LongKeys = "auto"

    def __post_init__(self) -> None:
        _check(self)

    def fit(self, layers: Iterable[Observation]) -> BlendPolicy:
        return replace(self, long_keys=_find_out(layers)) if self.long_keys == "auto" else self

    def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        own, cross = observation.score_self, observation.score_cross
        if not has_pictures(observation):
            shares = [self.self_share, self.cross_share, self.newest_share]
            return kernels.share_select([own, cross, newest(observation)], shares, protected, n_keep)
        if self.long_keys == "no":
            return kernels.csp_select(own, cross, protected, 1, 1, n_keep)
        within = in_each_picture(observation.key_norm, observation)
        shares = [self.self_share, self.cross_share, self.picture_share]
        return kernels.share_select([own, cross, within], shares, protected, n_keep)


@dataclass(frozen=True)
class RehearsedBlendPolicy(Policy):
    """What is looked at while the text is repeated and the pictures are described, beside a part for each picture and
    what the last queries look at.

    It costs passes through the model before an eviction, see rehearsal.py, and keeps nearly everything that questions
    may ask about later: facts in text, which no attention before the question tells apart, and what pictures show.

    Sources: arXiv 2505.23416 (repeating; there without the lengths of values). Own work: describing, and rankings that
    share the cells.

    repeated_share:  of the ranking by the attention while text was repeated, times the length of the value
    described_share: of that by the attention of descriptions and the cues for them
    picture_share:   of that within each picture, by long keys as in BlendPolicy, else by descriptions
    self_share:      of that by the attention of the last queries, from a cell's own modality
    newest_share:    of that of the newest text, if there are no pictures
    long_keys:       as in BlendPolicy
    """

    name: ClassVar[str] = "blend+"
    needs: ClassVar[frozenset[str]] = frozenset({"key_norm", "scores", "value_norm", "repeated", "described"})

    repeated_share: int = 4
    described_share: int = 2
    picture_share: int = 2
    self_share: int = 1
    newest_share: int = 2
    long_keys: LongKeys = "auto"

    def __post_init__(self) -> None:
        _check(self)

    def fit(self, layers: Iterable[Observation]) -> RehearsedBlendPolicy:
        return replace(self, long_keys=_find_out(layers)) if self.long_keys == "auto" else self

    def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        rankings = [observation.repeated * observation.value_norm, observation.score_self]
        shares = [self.repeated_share, self.self_share]
        if has_pictures(observation):
            within = observation.described if self.long_keys == "no" else observation.key_norm
            rankings += [observation.described, in_each_picture(within, observation)]
            shares += [self.described_share, self.picture_share]
        else:
            rankings.append(newest(observation))
            shares.append(self.newest_share)
        return kernels.share_select(rankings, shares, protected, n_keep)


def has_pictures(observation: Observation) -> bool:
    return any(span.is_picture for span in observation.spans)


def _check(policy: Policy) -> None:
    """Raises PolicyError if a share is negative, or `long_keys` none of its values."""
    for setting in fields(policy):
        value = getattr(policy, setting.name)
        if setting.name == "long_keys":
            if value not in get_args(LongKeys):
                raise PolicyError(f"long_keys is {value!r}; it must be one of {', '.join(get_args(LongKeys))}")
        elif value < 0:
            raise PolicyError(f"{setting.name} is {value}; it must be 0 or more")


def newest(observation: Observation) -> FloatArray:
    """The newest cells first, f32 [n_layer, n_head_kv, n_cell]."""
    return np.broadcast_to(np.arange(1, observation.n_cell + 1, dtype=np.float32), observation.shape)


def _find_out(layers: Iterable[Observation]) -> LongKeys:
    """Whether it does; "auto" if no query of the window has looked at a picture from outside."""
    preference = float(sum(prefers_long_keys(layer).sum() for layer in layers))
    return "auto" if preference == 0 else "yes" if preference > 0 else "no"


def prefers_long_keys(observation: Observation) -> FloatArray:
    """How much more of the attention to pictures goes to the longest quarter of their keys than to the shortest, as a
    share of it, f32 [n_layer], mean over the heads.
    """
    is_picture = np.array([span.is_picture for span in observation.spans])[observation.span]
    cross, found = observation.score_cross, np.zeros(observation.shape[:2], np.float32)
    for row in np.ndindex(found.shape):
        picture = is_picture[row]
        norm, mass = observation.key_norm[row][picture], cross[row][picture]
        n = len(norm) // 4
        if n and (total := mass.sum()) > 0:
            ordered = np.partition(norm, (n - 1, len(norm) - n))
            found[row] = (mass[norm >= ordered[-n]].sum() - mass[norm <= ordered[n - 1]].sum()) / total
    preference: FloatArray = found.mean(axis=1)
    return preference


def in_each_picture(values: FloatArray, observation: Observation) -> FloatArray:
    """A ranking of which every picture has a part in proportion to its size: its best cells by `values`.

    values: f32 [n_layer, n_head_kv, n_cell]; returns the same, > 0 in pictures, 0 in text.
    """
    size = np.array([span.n_cell if span.is_picture else 0 for span in observation.spans], np.float32)
    nothing = np.zeros(observation.shape, np.bool_)
    rank = kernels.rank_in_spans([values], observation.span, nothing)
    ranking: FloatArray = size[observation.span] / (rank + np.float32(0.5))
    return ranking
