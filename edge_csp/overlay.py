"""Pictures with what was evicted of them darkened, drawn and written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from edge_csp.errors import ImageError

MIN_SIDE, MAX_SIDE = 256, 1024
"""Longest side of an overlay in pixels. Smaller pictures are enlarged by a whole factor."""
SHEET_SIDE = 256
DARKEST = 0.15
"""What is left of the light of a patch that no head kept."""
BORDER = 0.2
"""How much lighter the borders between patches are, from 0 (not) to 1 (white)."""

_SOFTWARE = "edge-csp map"  # stands in every file that is written here: only such files are written over

Patches = tuple[tuple[float, float, float, float], NDArray[np.floating]]
"""Where patches lie (left, top, right, bottom in pixels of the picture), and their shares [ny, nx], 0 to 1."""


def draw_kept(rgb: NDArray[np.uint8], patches: Sequence[Patches]) -> Image.Image:
    """A picture, u8 [h, w, 3], with every patch as dark as many heads evicted it. What no patch covers is evicted."""
    picture = _resized(Image.fromarray(rgb))
    width, height = picture.size
    scale_x, scale_y = width / rgb.shape[1], height / rgb.shape[0]
    share = np.zeros((height, width), np.float32)
    border = np.zeros((height, width), np.bool_)
    for (left, top, right, bottom), shares in patches:
        n_row, n_column = shares.shape
        x, on_x = _lines(left * scale_x, right * scale_x, n_column, width)
        y, on_y = _lines(top * scale_y, bottom * scale_y, n_row, height)
        inside = np.ix_(y >= 0, x >= 0)
        share[inside] = shares[np.ix_(y[y >= 0], x[x >= 0])]
        border[inside] = (on_y[:, None] | on_x)[inside]
    light = np.asarray(picture) * (DARKEST + (1 - DARKEST) * share)[..., None]
    light[border] += (255 - light[border]) * BORDER
    return Image.fromarray(np.rint(light).astype(np.uint8))


def _resized(picture: Image.Image) -> Image.Image:
    longest = max(picture.size)
    scale = math.ceil(MIN_SIDE / longest) if longest < MIN_SIDE else min(1.0, MAX_SIDE / longest)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX)


def _lines(begin: float, end: float, n_patch: int, n_pixel: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The patch (-1: none) in which the middle of every pixel of a line lies, and whether another one begins there."""
    patch = np.floor((np.arange(n_pixel) + 0.5 - begin) / (end - begin) * n_patch).astype(np.int64)
    patch[(patch < 0) | (patch >= n_patch)] = -1
    return patch, np.diff(patch, prepend=patch[0]) != 0


def contact_sheet(overlays: Sequence[Image.Image]) -> Image.Image:
    """All overlays on one sheet, row by row; none may be wider or higher than SHEET_SIDE."""
    side, gap = SHEET_SIDE, 4
    n_column = math.ceil(math.sqrt(len(overlays)))
    n_row = math.ceil(len(overlays) / n_column)
    sheet = Image.new("RGB", (n_column * (side + gap) + gap, n_row * (side + gap) + gap), "white")
    for i, overlay in enumerate(overlays):
        row, column = divmod(i, n_column)
        sheet.paste(overlay, (gap + column * (side + gap), gap + row * (side + gap)))
    return sheet


def prepare_files(paths: Iterable[Path]) -> None:
    """Make the folders of files to be written. Raises ImageError if there are other files in their place."""
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not _is_own(path):
                raise ImageError(f"{path} exists and was not written by `{_SOFTWARE}`: give another folder, or move it")
        except OSError as error:
            raise ImageError(f"{path} cannot be written ({error.strerror or error})") from error


def write(overlay: Image.Image, path: Path) -> None:
    """Write a PNG. Raises ImageError if that fails."""
    info = PngInfo()
    info.add_text("Software", _SOFTWARE)
    try:
        overlay.save(path, "PNG", optimize=True, pnginfo=info)
    except OSError as error:
        raise ImageError(f"{path} cannot be written ({error.strerror or error})") from error


def _is_own(path: Path) -> bool:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software") == _SOFTWARE
    except Exception:  # a folder, or a picture so damaged that it makes the decoder raise nearly anything
        return False
