"""Overlays: what is kept looks as before, what was evicted is dark; files that are not ours are left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_csp.errors import ImageError
from edge_csp.overlay import (
    BORDER,
    DARKEST,
    MAX_SIDE,
    MIN_SIDE,
    SHEET_SIDE,
    contact_sheet,
    draw_kept,
    prepare_files,
    write,
)


def test_patches_are_as_bright_as_heads_kept_them() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
    share = np.array([[1.0, 0.0, 0.5, 1.0], [0.0, 1.0, 1.0, 0.25]])
    drawn = np.asarray(draw_kept(rgb, [((0, 0, 16, 8), share)])).astype(float)
    factor = MIN_SIDE // 16
    assert drawn.shape == (8 * factor, 16 * factor, 3)
    for y, x in np.ndindex(8, 16):
        pixels = drawn[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
        light = DARKEST + (1 - DARKEST) * share[y // 4, x // 4]
        np.testing.assert_allclose(pixels[1:, 1:], np.broadcast_to(rgb[y, x] * light, (15, 15, 3)), atol=0.51)
    before = np.kron(rgb, np.ones((factor, factor, 1)))
    lit = np.kron(share, np.ones((4 * factor, 4 * factor)))[..., None] * (1 - DARKEST) + DARKEST
    changed = np.abs(drawn - before * lit).max(axis=2) > 0.51
    lines = np.zeros(changed.shape, np.bool_)
    lines[4 * factor], lines[:, 4 * factor :: 4 * factor] = True, True
    assert (changed <= lines).all()
    line = (before * lit)[4 * factor]
    np.testing.assert_allclose(drawn[4 * factor], line + (255 - line) * BORDER, atol=0.51)


def test_patches_that_lie_beyond_the_picture() -> None:
    """Half of the columns lie on padding; the picture shows the two in the middle."""
    white = np.full((256, 256, 3), 255, np.uint8)
    drawn = np.asarray(draw_kept(white, [((-128, 0, 384, 256), np.array([[0, 1, 0, 1]]))]))
    assert (drawn[:, :128] == 255).all()
    assert (drawn[:, 129:] == round(255 * DARKEST)).all()


def test_tiles_and_what_no_patch_covers() -> None:
    white = np.full((256, 512, 3), 255, np.uint8)
    boxes = [(0, 0, 128, 256), (128, 0, 256, 256)]
    drawn = np.asarray(draw_kept(white, [(box, np.array([[kept]])) for box, kept in zip(boxes, (0, 1), strict=True)]))
    dark = round(255 * DARKEST)
    assert (drawn[:, :128] == dark).all()
    assert (drawn[:, 129:256] == 255).all()
    assert (drawn[:, 257:] == dark).all()


@pytest.mark.parametrize("size", [(1, 1), (300, 200), (3000, 1), (2, 5000), (4096, 4096)])
def test_sizes(size: tuple[int, int]) -> None:
    drawn = draw_kept(np.zeros((size[1], size[0], 3), np.uint8), [((0, 0, *size), np.ones((3, 3)))])
    assert MIN_SIDE <= max(drawn.size) <= max(MAX_SIDE, 2 * MIN_SIDE)
    assert drawn.width / drawn.height == pytest.approx(size[0] / size[1], rel=0.01) or min(drawn.size) == 1


@pytest.mark.parametrize(("n", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (5, 3, 2), (12, 4, 3)])
def test_contact_sheet(n: int, columns: int, rows: int) -> None:
    sheet = np.asarray(contact_sheet([Image.new("RGB", (SHEET_SIDE, 100), (i, 0, 0)) for i in range(1, n + 1)]))
    assert sheet.shape == (rows * (SHEET_SIDE + 4) + 4, columns * (SHEET_SIDE + 4) + 4, 3)
    assert set(np.unique(sheet[..., 0])) == {*range(1, n + 1), 255}


def test_files(tmp_path: Path) -> None:
    ours, other, damaged = tmp_path / "new" / "a.png", tmp_path / "b.png", tmp_path / "c.png"
    prepare_files([ours])
    write(Image.new("RGB", (2, 2)), ours)
    write(Image.new("RGB", (3, 3)), ours)
    prepare_files([ours, tmp_path / "d.png"])
    with Image.open(ours) as image:
        assert image.size == (3, 3)
    Image.new("RGB", (2, 2)).save(other)
    damaged.write_bytes(ours.read_bytes()[:20])
    for path in (other, damaged, tmp_path):
        with pytest.raises(ImageError, match=f"{path} exists and was not written by `edge-csp map`"):
            prepare_files([ours, path])
    with pytest.raises(ImageError, match=r"b\.png/d\.png cannot be written"):
        prepare_files([other / "d.png"])
    with pytest.raises(ImageError, match=r"none/d\.png cannot be written"):
        write(Image.new("RGB", (2, 2)), tmp_path / "none" / "d.png")
