"""Which patches of the pictures are left in the cache, and where in the picture they lie.

libmtmd tells how many cells a part of a picture fills, in which order the parts come, and the pixels that the encoder
got of each. From this and from what is known of its encoders follow the grid of patches and their place in the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_csp.errors import ModelError
from edge_csp.items import Item
from edge_csp.policy import Span

Box = tuple[float, float, float, float]
"""left, top, right, bottom in pixels of the picture; beyond its edges lies padding."""

_STRETCHED = {"idefics3", "internvl", "minimax_m3", "youtuvl", "yasa2", "hunyuanvl"}
"""Encoders that get whole pictures stretched to their size (image_resize_pad, image_pad_ov in clip.cpp); others pad."""
_TILED = {"idefics3": True, "internvl": False}
"""Encoders whose pictures come as tiles, row by row, and then all of it once more, made small; are tiles stretched?"""
_QUERIES = {"resampler", "deepseekocr2"}
"""Encoders whose cells stand for learned queries, not for patches."""
_ROW_ENDS = {"pixtral", "lightonocr"}
"""Encoders that may put one more cell between two rows of patches."""


@dataclass(frozen=True)
class PictureMap:
    """What is left of a part of a picture; most pictures have one part.

    number: of the picture, from 1. part: of its parts, from 0. size: (width, height) in pixels that the encoder got.
    share: f32 [n_layer, ny, nx], the share of the KV heads of a layer that kept the cell of the patch.
    """

    name: str
    sha256: str
    number: int
    part: int
    size: tuple[int, int]
    share: NDArray[np.float32]


@dataclass(frozen=True)
class TurnUse:
    """Text of a turn, from 1, with its answer; 0 is the system message. kept: mean over layers and KV heads."""

    number: int
    n_cell: int
    kept: float


def picture_maps(items: Sequence[Item], numbers: NDArray[np.int32], projector: str | None) -> list[PictureMap]:
    """What is left of every part of every picture.

    numbers: i32 [n_layer, n_head_kv, n_cell], see Context.cell_numbers(). projector: type of the encoder.

    Raises ModelError if the cells of a picture do not lie on a grid that is known.
    """
    kept = _count_heads(items, numbers)
    maps: list[PictureMap] = []
    begin = n_picture = 0
    for item in items:
        if isinstance(item.key, tuple):
            n_picture += item.is_new_picture
            columns, rows, stride = grid(item, projector)
            share = np.zeros((len(kept), rows * stride), np.float32)
            share[:, : item.n_cell] = kept[:, begin : begin + item.n_cell] / numbers.shape[1]
            share = share.reshape(-1, rows, stride)[..., :columns]
            sha256, part = item.key
            maps.append(PictureMap(item.name, sha256, n_picture, part, item.size, share))
        begin += item.n_cell
    return maps


def spans_of(items: Sequence[Item], projector: str | None) -> list[Span]:
    """The parts of pictures and the runs of text between them, as policies see them."""
    spans: list[Span] = []
    n_text = 0
    for item in items:
        if not item.is_picture:
            n_text += 1
            continue
        if n_text:
            spans.append(Span(n_text))
        n_text = 0
        try:
            columns, _, stride = grid(item, projector)
        except ModelError:
            columns = stride = 0
        columns = columns if columns == stride else 0
        spans.append(Span(item.n_cell, is_picture=True, columns=columns))
    return [*spans, Span(n_text)] if n_text else spans


def turn_uses(items: Sequence[Item], numbers: NDArray[np.int32], begins: Sequence[int]) -> list[TurnUse]:
    """What is left of the text of the system message, if there is one, and of every turn.

    begins: items before each turn, and before what follows the last one.
    """
    kept = _count_heads(items, numbers).mean(axis=0) / numbers.shape[1]
    is_text = np.repeat([not item.is_picture for item in items], [item.n_cell for item in items])
    n_before = np.concatenate([[0], np.cumsum([item.n_cell for item in items], dtype=np.int64)])
    uses: list[TurnUse] = []
    for number, (begin, end) in enumerate(zip([0, *begins], begins, strict=False)):
        cells = slice(n_before[begin], n_before[end])
        n_cell = int(is_text[cells].sum())
        if number or n_cell:
            uses.append(TurnUse(number, n_cell, float(kept[cells][is_text[cells]].sum())))
    return uses


def _count_heads(items: Sequence[Item], numbers: NDArray[np.int32]) -> NDArray[np.int64]:
    """KV heads of every layer that kept each token and picture cell, [n_layer, n_token]."""
    n_token = sum(item.n_cell for item in items)
    return np.stack([np.bincount(layer.ravel(), minlength=n_token) for layer in numbers])


def grid(item: Item, projector: str | None) -> tuple[int, int, int]:
    """Columns and rows of the patches of a picture part, and the cells from one row to the next.

    A cell stands for a square of the pixels that the encoder got. Raises ModelError where that does not come out even.
    """
    width, height = item.size
    if width and height and projector not in _QUERIES:
        for side in range(1, math.gcd(width, height) + 1):
            if width % side or height % side:
                continue
            columns, rows = width // side, height // side
            if columns * rows == item.n_cell:
                return columns, rows, columns
            if projector in _ROW_ENDS and (columns + 1) * rows == item.n_cell + 1:
                return columns, rows, columns + 1
    raise ModelError(
        f"{item.name}: the {item.n_cell} cells that the encoder ({projector or 'of an unknown type'}) makes of "
        f"{width}x{height} pixels are not known to lie on a grid: there is no map of this picture"
    )


def boxes(picture: tuple[int, int], sizes: Sequence[tuple[int, int]], projector: str | None) -> list[Box]:
    """Where the parts of a picture lie in it. picture: its (width, height). sizes: pixels that the encoder got of each.

    The last part of several is the whole picture, the others are tiles of it. Their number is known; of the ways to lay
    out so many, encoders choose the one whose shape is nearest to that of the picture.

    Raises ModelError for several parts of an encoder whose tiles are not known here.
    """
    width, height = picture
    if len(sizes) == 1:
        return [(0, 0, width, height) if projector in _STRETCHED else _padded(picture, sizes[0])]
    if projector not in _TILED:
        raise ModelError(
            f"a picture of {width}x{height} pixels is read in {len(sizes)} parts, and where they lie is not known for "
            f"this encoder ({projector or 'of an unknown type'}): there is no map of it"
        )
    n_tile = len(sizes) - 1
    layouts = [(columns, n_tile // columns) for columns in range(1, n_tile + 1) if n_tile % columns == 0]
    columns, rows = min(layouts, key=lambda layout: abs(math.log(layout[0] / layout[1] * height / width)))
    size = columns * sizes[0][0], rows * sizes[0][1]
    left, top, right, bottom = (0, 0, width, height) if _TILED[projector] else _padded(picture, size)
    x, y = ([a + (b - a) * i / n for i in range(n + 1)] for a, b, n in ((left, right, columns), (top, bottom, rows)))
    tiles: list[Box] = [(x[i], y[j], x[i + 1], y[j + 1]) for j in range(rows) for i in range(columns)]
    return [*tiles, (0, 0, width, height)]


def _padded(picture: tuple[int, int], size: tuple[int, int]) -> Box:
    """The picture is made as large as fits into `size`, and lies in the middle of it."""
    scale = min(size[0] / picture[0], size[1] / picture[1])
    x, y = ((inner - outer / scale) / 2 for inner, outer in zip(picture, size, strict=True))
    return x, y, picture[0] - x, picture[1] - y
