"""What a session has done, and what is in its cache."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edge_csp.items import Item


@dataclass
class Counters:
    """What a session has done so far. Times in seconds."""

    n_turn: int = 0
    n_text_cell: int = 0
    """Text tokens evaluated, prompts and answers."""
    n_picture_cell: int = 0
    n_picture: int = 0
    """Picture parts evaluated."""
    n_encoded: int = 0
    """Picture parts that went through the encoder; the others came from memory or from disk."""
    n_from_disk: int = 0
    """Picture parts whose embeddings came from disk."""
    n_generated: int = 0
    n_eviction: int = 0
    n_evicted: int = 0
    """Cells evicted per layer and KV head."""
    n_rehearsed: int = 0
    """Tokens evaluated to find out what later questions may need, see rehearsal.py."""
    n_reread: int = 0
    """Pictures that were read again for an answer, see Pruning.reread."""
    n_reread_cell: int = 0
    """Cells evaluated for that: the pictures, the questions again, and then the answers again."""
    n_restart: int = 0
    """Times that everything had to be evaluated again."""
    encode_s: float = 0.0
    prefill_s: float = 0.0
    rehearse_s: float = 0.0
    reread_s: float = 0.0
    evict_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True)
class PictureUse:
    """A picture in the conversation. n_cell: cells it filled. kept: cells left, mean over layers and KV heads."""

    name: str
    n_cell: int
    kept: float
    pinned: bool = False


@dataclass(frozen=True)
class CacheUse:
    """What is in the cache now. Cells of text and pictures add up to n_cell.

    n_token: cells that the whole conversation would fill. text_kept: mean over layers and KV heads.
    """

    n_token: int
    n_cell: int
    bytes_per_cell: int
    n_text: int
    text_kept: float
    pictures: tuple[PictureUse, ...]


def picture_uses(
    items: Sequence[Item], positions: NDArray[np.int32] | None, pinned: Container[int]
) -> tuple[PictureUse, ...]:
    """The pictures among the items. positions: i32 [n_layer, n_head_kv, n_cell], of the cells that are left, None for
    all. pinned: numbers of pictures, from 1.
    """
    pictures: list[PictureUse] = []
    begin = 0
    for item in items:
        end = begin + item.n_pos
        if item.is_picture:
            kept = float(item.n_cell)
            if positions is not None:
                n_row = positions.shape[0] * positions.shape[1]
                kept = float(((positions >= begin) & (positions < end)).sum()) / n_row
            if item.is_new_picture:
                pictures.append(PictureUse(item.name, item.n_cell, kept, len(pictures) + 1 in pinned))
            else:  # a tile of the picture before
                whole = pictures.pop()
                pictures.append(replace(whole, n_cell=whole.n_cell + item.n_cell, kept=whole.kept + kept))
        begin = end
    return tuple(pictures)
