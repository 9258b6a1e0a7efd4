"""Pictures: formats, modes, limits, damaged files."""

import dataclasses
import io
import os
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from edge_csp.errors import ImageError
from edge_csp.images import MAX_PIXELS, Picture, load_picture, resize

RED, WHITE = (255, 0, 0), (255, 255, 255)


def gradient(width: int = 8, height: int = 6) -> Image.Image:
    """An RGB picture whose pixels all differ."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 30, y * 40, x + y], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def noise_jpeg() -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")


def png_header(width: int, height: int, depth: int = 8, color: int = 2, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture.{form.lower()}"
    path.write_bytes(encoded(gradient(), form, **({"lossless": True} if form == "WEBP" else {})))
    picture = load_picture(path)
    assert picture.name == str(path)
    assert picture.notes == ()
    assert picture.size == picture.original_size == (8, 6)
    np.testing.assert_array_equal(picture.rgb, np.asarray(gradient()))


def test_what_a_picture_is() -> None:
    picture = load_picture(gradient())
    assert (picture.rgb.shape, picture.rgb.dtype) == ((6, 8, 3), np.uint8)
    assert picture.rgb.flags.c_contiguous
    assert not picture.rgb.flags.writeable
    with pytest.raises(dataclasses.FrozenInstanceError):
        picture.name = "other"  # type: ignore[misc]
    assert picture == load_picture(encoded(gradient(), "PNG"))
    assert len({picture, load_picture(gradient())}) == 1


def test_sources_agree(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(gradient(), "PNG"))
    pictures = [
        load_picture(tmp_path / "a.png", name="a"),
        load_picture(str(tmp_path / "a.png"), name="a"),
        load_picture((tmp_path / "a.png").read_bytes(), name="a"),
        load_picture(gradient(), name="a"),
    ]
    assert len(set(pictures)) == 1


def test_hash_is_of_the_content() -> None:
    base = load_picture(Image.new("RGB", (4, 2), RED))
    assert base.sha256 == load_picture(encoded(Image.new("RGB", (4, 2), RED), "BMP")).sha256
    assert base.sha256 != load_picture(Image.new("RGB", (2, 4), RED)).sha256  # same bytes, other shape
    assert base.sha256 != load_picture(Image.new("RGB", (4, 2), WHITE)).sha256
    assert len(base.sha256) == 64


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = gradient()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL transpose that the viewer's one takes back
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = load_picture(encoded(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(picture.rgb, np.asarray(upright))
    assert picture.original_size == upright.size
    assert picture.notes == (() if orientation == 1 else (f"turned upright (EXIF orientation {orientation})",))


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_damaged_exif_does_not_matter(exif: bytes) -> None:
    assert load_picture(encoded(gradient(), "PNG", exif=exif)).size == (8, 6)


@pytest.mark.parametrize(
    ("mode", "color", "expected", "note"),
    [
        ("1", 1, WHITE, "1-bit converted to RGB"),
        ("L", 7, (7, 7, 7), "greyscale converted to RGB"),
        ("LA", (0, 255), (0, 0, 0), "greyscale with alpha converted to RGB"),
        ("LA", (0, 0), WHITE, "greyscale with alpha converted to RGB, transparency shown on white"),
        ("La", (0, 0), WHITE, "La converted to RGB, transparency shown on white"),
        ("RGBA", (255, 0, 0, 255), RED, "RGB with alpha converted to RGB"),
        ("RGBA", (255, 0, 0, 0), WHITE, "RGB with alpha converted to RGB, transparency shown on white"),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204), "RGB with alpha converted to RGB, transparency shown on white"),
        ("RGBa", (0, 0, 0, 0), WHITE, "RGBa converted to RGB, transparency shown on white"),
        ("CMYK", (0, 255, 255, 0), RED, "CMYK converted to RGB"),
        ("YCbCr", (255, 128, 128), WHITE, "YCbCr converted to RGB"),
        ("HSV", (0, 255, 255), RED, "HSV converted to RGB"),
        ("I;16", 65535, WHITE, "greyscale of mode I;16 reduced to 8 bits (white is 65535)"),
        ("I;16", 257 * 3, (3, 3, 3), "greyscale of mode I;16 reduced to 8 bits (white is 65535)"),
        ("I;16B", 65535, WHITE, "greyscale of mode I;16B reduced to 8 bits (white is 65535)"),
        ("I", 65535, WHITE, "greyscale of mode I reduced to 8 bits (white is 65535)"),
        ("I", 1 << 20, WHITE, "greyscale of mode I reduced to 8 bits (white is 1.04858e+06)"),
        ("I", -5, (0, 0, 0), "greyscale of mode I reduced to 8 bits (white is 65535)"),
        ("F", 1.0, WHITE, "greyscale of mode F reduced to 8 bits (white is 1)"),
        ("F", 0.2, (51, 51, 51), "greyscale of mode F reduced to 8 bits (white is 1)"),
        ("F", float("nan"), (0, 0, 0), "greyscale of mode F reduced to 8 bits (white is 1)"),
        ("F", float("inf"), (0, 0, 0), "greyscale of mode F reduced to 8 bits (white is 1)"),
    ],
)
def test_modes(mode: str, color: object, expected: tuple[int, ...], note: str) -> None:
    picture = load_picture(Image.new(mode, (2, 1), color))
    assert picture.rgb.tolist() == [[list(expected)] * 2]
    assert picture.notes == (note,)


def test_palettes_with_transparency() -> None:
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((0, 0), 0)
    assert load_picture(encoded(palette, "PNG")).rgb.tolist() == [[[0, 0, 0], list(RED)]]
    picture = load_picture(encoded(palette, "PNG", transparency=b"\x00\xff"))
    assert picture.rgb.tolist() == [[list(WHITE), list(RED)]]
    assert picture.notes == ("palette converted to RGB, transparency shown on white",)
    grey = load_picture(encoded(Image.new("L", (1, 1), 9), "PNG", transparency=9))
    assert grey.rgb.tolist() == [[list(WHITE)]]
    rgb = load_picture(encoded(Image.new("RGB", (1, 1), RED), "PNG", transparency=RED))
    assert rgb.rgb.tolist() == [[list(WHITE)]]


def test_16_bit_files() -> None:
    grey = load_picture(encoded(Image.new("I;16", (2, 2), 32768), "PNG"))
    assert grey.rgb[0, 0].tolist() == [128, 128, 128]
    color = load_picture(png_header(1, 1, depth=16, data=b"\0" + bytes([255, 255, 0, 0, 128, 0])))
    assert color.rgb.tolist() == [[[255, 0, 128]]]
    assert color.notes == ("16 bits per channel reduced to 8",)


def test_cmyk_jpeg() -> None:
    picture = load_picture(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(picture.rgb.astype(int) - RED).max() <= 3
    assert picture.notes == ("CMYK converted to RGB",)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_is_used(form: str) -> None:
    if form == "WEBP" and not features.check("webp"):
        pytest.skip("Pillow without webp")
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, WHITE, (0, 0, 255))]
    options = {"lossless": True} if form == "WEBP" else {}
    picture = load_picture(encoded(frames[0], form, save_all=True, append_images=frames[1:], **options))
    assert picture.rgb[0, 0].tolist() == list(RED)
    assert picture.notes[0] == "has 3 frames: frame 1 is used"


def test_pillow_images_stay_as_they_are() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, WHITE, (0, 0, 255))]
    image = Image.open(io.BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    with image:
        image.seek(1)
        assert load_picture(image, name="loop").notes[0] == "has 3 frames: frame 2 is used"
        assert image.tell() == 1


def test_larger_pictures_are_resized() -> None:
    picture = load_picture(Image.new("RGB", (300, 100), RED), max_side=30)
    assert (picture.size, picture.original_size) == ((30, 10), (300, 100))
    assert picture.notes == ("resized from 300x100 to 30x10 (the limit is 30)",)
    assert load_picture(Image.new("RGB", (30, 10)), max_side=30).notes == ()


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 4096)])
def test_extreme_shapes(size: tuple[int, int]) -> None:
    picture = load_picture(encoded(Image.new("RGB", size, RED), "PNG"))
    assert max(picture.size) == min(4096, max(size))
    assert min(picture.size) == min(size)
    assert (picture.rgb == RED).all()


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 60))
def test_limits_hold_for_all_sizes(width: int, height: int, max_side: int) -> None:
    picture = load_picture(Image.new("L", (width, height)), max_side=max_side)
    assert max(picture.size) == min(max_side, max(width, height))
    assert picture.original_size == (width, height)
    assert any("resized" in note for note in picture.notes) == (max(width, height) > max_side)
    wide, narrow = max(picture.size), min(picture.size)
    assert narrow == max(1, round(min(width, height) * min(1, wide / max(width, height))))


def test_resize() -> None:
    picture = load_picture(Image.new("RGB", (8, 4), RED), name="red")
    assert resize(picture, (8, 4)) is picture
    small = resize(picture, (2, 3))
    assert (small.size, small.original_size, small.name) == ((2, 3), (8, 4), "red")
    assert small.notes == ("resized from 8x4 to 2x3",)
    assert small.sha256 == load_picture(Image.new("RGB", (2, 3), RED)).sha256
    assert not small.rgb.flags.writeable


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (100_000, 100_000)])
def test_resize_refused(size: tuple[int, int], refuses) -> None:
    with refuses(ImageError, "red", f"{size[0]}x{size[1]}", MAX_PIXELS):
        resize(load_picture(Image.new("RGB", (1, 1), RED), name="red"), size)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.png", b"", ("empty", "0 bytes")),
        ("text.png", b"This is a text, not a picture.\n" * 9, ("not a picture of a known format", "PNG")),
        ("cut.jpg", noise_jpeg()[:1500], ("damaged or cut off", "truncated")),
        ("head.jpg", noise_jpeg()[:20], ("picture",)),
        ("cut.png", encoded(gradient(), "PNG")[:-40], ("damaged or cut off",)),
        ("broken.png", encoded(gradient(), "PNG").replace(b"IDAT", b"IDAQ"), ("picture",)),
        ("phone.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", ("HEIC", "JPEG")),
        ("bomb.png", png_header(50_000, 50_000), (2_500_000_000, MAX_PIXELS)),
        ("large.png", png_header(12_000, 9_000), ("12000x9000", 108_000_000, MAX_PIXELS)),  # Pillow would only warn
        ("script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ("not a picture of a known format",)),
        ("line\nbreak.png", b"x", ("line break.png",)),
        ("esc\x1b[2J.png", b"x", ("not a picture of a known format",)),
    ],
)
def test_bad_files(name: str, content: bytes, words: tuple[object, ...], tmp_path: Path, refuses) -> None:
    path = tmp_path / name
    try:
        path.write_bytes(content)
    except OSError:
        pytest.skip("the file system does not know such names")
    with refuses(ImageError, *words, *([name] if name.isprintable() else [])):
        load_picture(path)
    if content:
        with refuses(ImageError, *[word for word in words if word != "line break.png"], "upload"):
            load_picture(content, name="upload")


def test_paths_that_are_no_files(tmp_path: Path, refuses) -> None:
    with refuses(ImageError, tmp_path, "directory"):
        load_picture(tmp_path)
    with refuses(ImageError, tmp_path / "gone.png", "no such file"):
        load_picture(tmp_path / "gone.png")
    with refuses(ImageError, "cannot be read"):
        load_picture("nul\0.png")
    with refuses(ImageError, "empty", "0 bytes"):
        load_picture(b"")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        with refuses(ImageError, tmp_path / "pipe.png", "not a regular file"):
            load_picture(tmp_path / "pipe.png")


def test_limits_of_arguments(refuses) -> None:
    with refuses(ImageError, "max_side", 0, 1):
        load_picture(gradient(), max_side=0)
    with refuses(ImageError, "tiny", "8x6", 48, 47):
        load_picture(gradient(), name="tiny", max_pixels=47)
    with refuses(ImageError, "no pixels", "0x5"):
        load_picture(Image.new("RGB", (0, 5)))


def test_bombs_stop_at_the_lower_limit(refuses) -> None:
    with refuses(ImageError, 2_500_000_000, 1000):
        load_picture(png_header(50_000, 50_000), max_pixels=1000)
    with refuses(ImageError, 2_500_000_000, 2 * (Image.MAX_IMAGE_PIXELS or 0)):
        load_picture(png_header(50_000, 50_000), max_pixels=10**12)


def test_pillow_is_left_as_it_was() -> None:
    before = Image.MAX_IMAGE_PIXELS, warnings.filters[:]
    with pytest.raises(ImageError):
        load_picture(png_header(50_000, 50_000))
    assert before == (Image.MAX_IMAGE_PIXELS, warnings.filters[:])


def test_decoder_warnings_become_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    def getexif(self: Image.Image) -> Image.Exif:
        warnings.warn("odd file", UserWarning, stacklevel=1)
        return Image.Exif()

    monkeypatch.setattr(Image.Image, "getexif", getexif)
    assert "warning from the decoder: odd file" in load_picture(Image.new("RGB", (1, 1))).notes


@given(st.integers(0, 10**6), st.integers(0, 255))
def test_damaged_bytes_never_escape(position: int, value: int) -> None:
    content = bytearray(encoded(gradient(), "PNG"))
    content[position % len(content)] = value
    with suppress(ImageError):
        assert isinstance(load_picture(bytes(content)), Picture)
