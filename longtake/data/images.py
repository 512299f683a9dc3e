"""Pictures: decoding, fitting to a size, and folders of PNG, JPEG or WebP files with captions."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from longtake.data.file_rows import identities, list_files
from longtake.data.samples import Sample, Sizes, nearest_size
from longtake.errors import DataError

# What Pillow raises for bytes that are no whole picture; it has no common base class for them.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


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
    """Pixels uint8 [h, w, 3] of a PNG, JPEG or WebP file, upright as its EXIF says, fitted to the nearest of `sizes`.

    Raises: DataError naming `where` when the bytes are no whole picture.
    """
    return fit_pixels(np.array(upright_rgb(_open(data, where), where), dtype=np.uint8), sizes)


def image_size(data: bytes, where: str) -> tuple[int, int]:
    """(height, width) of a picture as `decode_image` would give it, from the head of the file alone.

    Raises: DataError naming `where`.
    """
    opened = _open(data, where)
    try:
        lies = opened.getexif().get(0x0112, 1) >= 5  # orientations that exchange height and width
    except _DECODE_ERRORS as error:
        raise DataError(f"{where}: its EXIF cannot be read ({error})") from error
    return (opened.width, opened.height) if lies else (opened.height, opened.width)


def _open(data: bytes, where: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except _DECODE_ERRORS as error:
        raise DataError(f"{where}: {len(data)} bytes cannot be decoded as a picture ({error})") from error


def upright_rgb(image: Image.Image, where: str) -> Image.Image:
    """The decoded picture as RGB: upright as its EXIF says, transparent parts on white.

    Raises: DataError naming `where` when the file is damaged or has more than 8 bits a channel.
    """
    try:
        image.load()  # a truncated file is found here
        image = ImageOps.exif_transpose(image)
    except _DECODE_ERRORS as error:
        raise DataError(
            f"{where} cannot be decoded as a picture ({error}); give a whole PNG, JPEG or WebP file"
        ) from error
    if image.mode[0] in "IF":  # 16 and 32 bits a channel: PIL would clip, not scale
        raise DataError(f"{where} has {image.mode} pixels; only 8 bits a channel are read: convert it to 8-bit RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class ImageFolder:
    """A folder of pictures with captions, in any of the ways of `file_rows.py`."""

    def __init__(self, path: Path, sizes: Sizes = ()) -> None:
        self.path = path
        self.sizes = sizes
        self._rows = list_files(path, "images")

    def identities(self) -> Iterable[str]:
        """Names of the files, and prompts that are known without reading a caption."""
        return identities(self._rows, self.path)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Sample:
        file, prompts = self._rows[row].check()
        where = self._rows[row].where
        image = decode_image(self._bytes(row, file), f"{where}: image {file}", self.sizes)
        return Sample(file.stem, prompts[0], image, prompts=prompts, where=where)

    def pixel_size(self, row: int) -> tuple[int, int]:
        """(height, width) of the picture on disk, upright. Raises: DataError."""
        file, _ = self._rows[row].check()
        return image_size(self._bytes(row, file), f"{self._rows[row].where}: image {file}")

    def _bytes(self, row: int, file: Path) -> bytes:
        try:
            return file.read_bytes()
        except OSError as error:
            raise DataError(f"{self._rows[row].where}: image {file} cannot be read ({error.strerror})") from error
