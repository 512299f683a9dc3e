"""Pictures: decoding as viewers show them, and fitting to a size."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from longtake.data.file_rows import what_it_is
from longtake.data.samples import Sizes, nearest_size
from longtake.errors import DataError

# What Pillow raises for bytes that are no whole picture; it has no common base class for them.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_MOVING = ("GIF", "PNG", "WEBP", "AVIF")  # of several pictures in these files viewers show all, one after the other
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@contextmanager
def _refusing(what: str, fix: str = "") -> Iterator[None]:
    """What Pillow raises inside becomes a DataError."""
    try:
        yield
    except _DECODE_ERRORS as error:
        raise DataError(f"{what} ({error}){fix}") from error


def fit_image(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """The picture as uint8 [height, width, 3]: cropped centrally to the aspect, then scaled; never stretched."""
    image = image.convert("RGB")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC, centering=(0.5, 0.5))
    return np.array(image, dtype=np.uint8)


def fit_pixels(pixels: NDArray[np.uint8], sizes: Sizes) -> NDArray[np.uint8]:
    """The same for pixels uint8 [h, w, 3] and the nearest of `sizes`; unchanged when they have it or there is none."""
    if not sizes:
        return pixels
    size = sizes[nearest_size(sizes, *pixels.shape[:2])]
    if pixels.shape[:2] == (size.height, size.width):
        return pixels
    return fit_image(Image.fromarray(np.ascontiguousarray(pixels)), size.height, size.width)


def decode_image(data: bytes, where: str, sizes: Sizes = ()) -> NDArray[np.uint8]:
    """Pixels uint8 [h, w, 3] of a picture file as viewers show it (`upright_rgb`), fitted to the nearest of `sizes`.

    Raises: DataError naming `where` when the bytes are no whole picture.
    """
    return fit_pixels(np.array(upright_rgb(open_image(data, where), where), dtype=np.uint8), sizes)


def image_size(data: bytes, where: str) -> tuple[int, int]:
    """(height, width) of a picture as `decode_image` would give it, from the head of the file alone.

    Raises: DataError naming `where`.
    """
    opened = open_image(data, where)
    with _refusing(f"{where}: its EXIF cannot be read"):
        lies = opened.getexif().get(0x0112, 1) >= 5  # orientations that exchange height and width
    return (opened.width, opened.height) if lies else (opened.height, opened.width)


def open_image(data: bytes, where: str) -> Image.Image:
    """The picture in the bytes of a file, not decoded yet. Raises: DataError naming `where`."""
    with _refusing(f"{where}: {len(data)} bytes cannot be decoded as a picture"):
        try:
            return Image.open(io.BytesIO(data))
        except UnidentifiedImageError:
            if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
                _read_heic(where)
                return Image.open(io.BytesIO(data))
            raise ValueError(what_it_is(data) or "no format that Pillow knows") from None


def _read_heic(where: str) -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise DataError(f"{where} is HEIC; install pillow-heif to read it, or convert it to JPEG") from error
    register_heif_opener()


def upright_rgb(image: Image.Image, where: str) -> Image.Image:
    """The picture as viewers show it: upright as its EXIF says, in sRGB by its profile, transparent parts on white.

    Raises: DataError naming `where` when the file is damaged, moves, or has more than 8 bits a channel.
    """
    with _refusing(f"{where} cannot be decoded as a picture", "; give a whole PNG, JPEG or WebP file"):
        image.load()  # a truncated file is found here
        number = getattr(image, "n_frames", 1) if image.format in _MOVING else 1
        profile = image.info.get("icc_profile")
        image = ImageOps.exif_transpose(image)
    if number > 1:
        raise DataError(f"{where} moves: it holds {number} pictures; give a still one, or a video file")
    if image.mode[0] in "IF":  # 16 and 32 bits a channel: PIL would clip, not scale
        raise DataError(f"{where} has {image.mode} pixels; only 8 bits a channel are read: convert it to 8-bit RGB")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    with _refusing(f"{where}: its {image.mode} colours cannot be shown", "; convert it to sRGB"):
        image = _in_srgb(image, profile) if profile else image.convert("RGB")
    if alpha is None:
        return image
    image.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The picture in sRGB. Raises: ValueError or OSError when its ICC profile is damaged or not for its pixels."""
    from PIL import ImageCms

    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    kinds = {"RGB": ("1", "L", "LA", "P", "PA", "RGB", "RGBA"), "GRAY": ("1", "L", "LA"), "CMYK": ("CMYK",)}
    if image.mode not in kinds.get(space, ()):
        raise ValueError(f"its colour profile is for {space}")
    image = image.convert("L" if space == "GRAY" else space)
    try:
        shown = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError as error:
        raise ValueError(f"its colour profile is damaged: {error}") from error
    assert shown is not None
    return shown
