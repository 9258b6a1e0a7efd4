"""Pictures: open, turn upright, convert to RGB, limit, hash. Every change is reported in words.

What comes out is what the vision encoder is given. Nothing here knows models: a model's own resizing is done by its
encoder. Pictures are hashed by content, so that the same picture is known again wherever it comes from.
"""

import hashlib
import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from edge_csp.errors import ImageError

__all__ = ["MAX_PIXELS", "MAX_SIDE", "MEDIA_MARKER", "Picture", "load_picture", "resize"]

MAX_SIDE = 4096
"""Longest side in pixels; larger pictures are resized."""
MAX_PIXELS = 100_000_000
"""Pictures with more pixels are refused before they are decoded."""
MEDIA_MARKER = "<__media__>"
"""Stands for one picture in a rendered prompt; the default marker of libmtmd."""

# Picture formats only: no EPS or WMF (Pillow starts other programs for them) and nothing without a signature.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000", "QOI")
_HEIC = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}  # brands in an ISO media file's head
_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF"}
_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MODES = {
    "1": "1-bit",
    "L": "greyscale",
    "LA": "greyscale with alpha",
    "P": "palette",
    "PA": "palette with alpha",
    "RGBA": "RGB with alpha",
}
_LOCK = threading.Lock()  # warnings.catch_warnings is not thread-safe


@dataclass(frozen=True)
class Picture:
    """One picture, ready for the vision encoder. Pictures are equal if their content and history are.

    name: file name, or what the caller called it. rgb: u8 [h, w, 3], C-contiguous, read-only. sha256: hex digest over
    size and pixels. original_size: (width, height) in the file, upright. notes: every conversion and resize, in words.
    """

    name: str
    rgb: npt.NDArray[np.uint8] = field(repr=False, compare=False)
    sha256: str
    original_size: tuple[int, int]
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        height, width, _ = self.rgb.shape
        return width, height


def load_picture(
    source: str | Path | bytes | Image.Image,
    *,
    name: str | None = None,
    max_side: int = MAX_SIDE,
    max_pixels: int = MAX_PIXELS,
) -> Picture:
    """Load a picture from a file, from the bytes of a file, or from a Pillow image (which stays as it is).

    name: shown in messages; default: the path. max_side: longest side in pixels, larger pictures are resized to it.
    max_pixels: pictures with more are refused, from the header alone. Pillow's own limit stays in force too.

    Raises ImageError for anything that is not a whole picture of a known format, and above max_pixels.
    """
    if max_side < 1:
        raise ImageError(f"max_side is {max_side}, but must be at least 1")
    if isinstance(source, Image.Image):
        shown = name or str(getattr(source, "filename", "") or "picture")
        with _decoding(shown, max_pixels) as notes:
            image = _to_rgb(source, shown, max_pixels, notes)
    else:
        shown = name or ("picture" if isinstance(source, bytes) else str(source))
        with _opened(source, shown) as stream, _decoding(shown, max_pixels) as notes:
            image = _to_rgb(_open_image(stream, shown), shown, max_pixels, notes)
    original_size = image.size
    scale = max_side / max(image.size)
    if scale < 1:
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        notes.append(f"resized from {image.width}x{image.height} to {size[0]}x{size[1]} (the limit is {max_side})")
        image = image.resize(size, Image.Resampling.LANCZOS)
    return _picture(image, shown, original_size, notes)


def resize(picture: Picture, size: tuple[int, int]) -> Picture:
    """Return `picture` resized to `size` (width, height) in pixels, with a note; itself if it has that size.

    Raises ImageError if a side is below 1 or the picture would have more than MAX_PIXELS.
    """
    width, height = size
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise ImageError(f"{picture.name}: cannot resize to {width}x{height}; the limits are 1 and {MAX_PIXELS} pixels")
    if size == picture.size:
        return picture
    image = Image.fromarray(picture.rgb).resize(size, Image.Resampling.LANCZOS)
    note = f"resized from {picture.size[0]}x{picture.size[1]} to {width}x{height}"
    return _picture(image, picture.name, picture.original_size, [*picture.notes, note])


def _picture(image: Image.Image, name: str, original_size: tuple[int, int], notes: list[str]) -> Picture:
    """Make a Picture of an RGB image."""
    rgb = np.array(image, dtype=np.uint8, order="C")
    rgb.setflags(write=False)
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(rgb.data)
    return Picture(name, rgb, digest.hexdigest(), original_size, tuple(notes))


@contextmanager
def _opened(source: str | Path | bytes, shown: str) -> Iterator[BinaryIO]:
    """Open a regular file, or the bytes of one, that is not empty."""
    with ExitStack() as stack:
        stream: BinaryIO
        if isinstance(source, bytes):
            stream = io.BytesIO(source)
        else:
            try:
                if Path(source).is_dir():
                    raise ImageError(f"{shown}: is a directory, not a picture")
                if Path(source).exists() and not Path(source).is_file():
                    raise ImageError(f"{shown}: is not a regular file")
                stream = stack.enter_context(Path(source).open("rb"))
            except FileNotFoundError:
                raise ImageError(f"{shown}: no such file") from None
            except (OSError, ValueError) as error:  # ValueError: a NUL in the path
                raise ImageError(f"{shown}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
        if stream.read(1) == b"":
            raise ImageError(f"{shown}: the file is empty (0 bytes)")
        stream.seek(0)
        yield stream


@contextmanager
def _decoding(shown: str, max_pixels: int) -> Iterator[list[str]]:
    """Run Pillow: its warnings become notes, whatever its decoders raise becomes an ImageError."""
    notes: list[str] = []
    with _LOCK, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
        try:
            yield notes
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            found, limit = (int(number) for number in re.findall(r"\d+", f"{error} 0 0")[:2])
            raise ImageError(f"{shown}: {found} pixels, the limit is {min(limit, max_pixels)} pixels") from None
        except Exception as error:  # damaged files make the decoders raise nearly anything
            reason = str(error) or type(error).__name__
            raise ImageError(f"{shown}: the picture is damaged or cut off ({reason})") from error
        notes += [f"warning from the decoder: {warning.message}" for warning in caught]


def _open_image(stream: BinaryIO, shown: str) -> Image.Image:
    """Read the header of a picture; its first frame, if there are several."""
    Image.init()
    formats = [known for known in _FORMATS if known in Image.OPEN]
    try:
        return Image.open(stream, formats=formats)
    except UnidentifiedImageError:
        stream.seek(0)
        head = stream.read(12)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC:
        raise ImageError(f"{shown}: HEIC pictures are not supported; save it as JPEG or PNG")
    for signature, name in _SIGNATURES.items():
        if head.startswith(signature):
            raise ImageError(f"{shown}: the picture is damaged or cut off ({name} without its data)")
    raise ImageError(f"{shown}: not a picture of a known format ({', '.join(formats)})")


def _to_rgb(image: Image.Image, shown: str, max_pixels: int, notes: list[str]) -> Image.Image:
    """Decode, turn upright and convert to 8-bit RGB on white. Nothing is decoded above `max_pixels`."""
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{shown}: the picture has no pixels ({width}x{height})")
    if width * height > max_pixels:
        raise ImageError(f"{shown}: {width}x{height} is {width * height} pixels, the limit is {max_pixels} pixels")
    if getattr(image, "is_animated", False):
        notes.append(f"has {getattr(image, 'n_frames', 'several')} frames: frame {image.tell() + 1} is used")
    if any(";16" in str(tile) for tile in getattr(image, "tile", ())) and not image.mode.startswith("I"):
        notes.append("16 bits per channel reduced to 8")
    image.load()
    image = _upright(image, notes)
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        return _from_numbers(image, notes).convert("RGB")
    if image.has_transparency_data:
        # Pillow has no direct way from premultiplied greyscale
        rgba = (image.convert("LA") if mode == "La" else image).convert("RGBA")
        opaque = rgba.getchannel("A").getextrema() == (255, 255)
        notes.append(f"{_MODES.get(mode, mode)} converted to RGB" + ("" if opaque else ", transparency shown on white"))
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if mode != "RGB":
        notes.append(f"{_MODES.get(mode, mode)} converted to RGB")
    return image.convert("RGB")


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    """Apply the EXIF orientation."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception as error:  # a damaged EXIF block is no reason to refuse the pixels
        notes.append(f"EXIF orientation cannot be read ({error or type(error).__name__})")
        return image
    if orientation not in _UPRIGHT:
        return image
    notes.append(f"turned upright (EXIF orientation {orientation})")
    return image.transpose(_UPRIGHT[orientation])


def _from_numbers(image: Image.Image, notes: list[str]) -> Image.Image:
    """Reduce 16-bit, 32-bit and floating-point greyscale to 8 bits.

    White is 65535 for integers and 1.0 for floats, or the largest value if that is above it; negative is black.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
    white = max(float(values.max()), 1.0 if image.mode == "F" else 65535.0)
    notes.append(f"greyscale of mode {image.mode} reduced to 8 bits (white is {white:g})")
    return Image.fromarray(np.rint(values.clip(0, white) * (255 / white)).astype(np.uint8))
