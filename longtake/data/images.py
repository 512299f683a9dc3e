"""Pictures: decoding, fitting to a size, and the folder format of PNG, JPEG or WebP files with captions."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from longtake.data.samples import FileSize, Sample, load_metadata
from longtake.errors import DataError

# What Pillow raises for bytes that are no whole picture; it has no common base class for them.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def fit_image(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """The picture as uint8 [height, width, 3]: cropped centrally to the aspect, then scaled; never stretched."""
    image = image.convert("RGB")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC, centering=(0.5, 0.5))
    return np.array(image, dtype=np.uint8)


def fit_pixels(pixels: NDArray[np.uint8], size: FileSize | None) -> NDArray[np.uint8]:
    """The same for pixels uint8 [h, w, 3]; unchanged when they have the size or none is wanted."""
    if size is None or pixels.shape[:2] == (size.height, size.width):
        return pixels
    return fit_image(Image.fromarray(np.ascontiguousarray(pixels)), size.height, size.width)


def decode_image(data: bytes, where: str, size: FileSize | None = None) -> NDArray[np.uint8]:
    """Pixels uint8 [h, w, 3] of a PNG, JPEG or WebP file, turned upright as its EXIF says, fitted to `size`.

    Raises: DataError naming `where` when the bytes are no whole picture.
    """
    try:
        opened = Image.open(io.BytesIO(data))
    except _DECODE_ERRORS as error:
        raise DataError(f"{where}: {len(data)} bytes cannot be decoded as a picture ({error})") from error
    image = upright_rgb(opened, where)
    return np.array(image, dtype=np.uint8) if size is None else fit_image(image, size.height, size.width)


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
    """A folder of pictures with `metadata.jsonl` (`file_name`, `text`), as many data-set tools write it."""

    def __init__(self, path: Path, size: FileSize | None = None) -> None:
        self.path = path
        self.size = size
        self._rows = load_metadata(path)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Sample:
        file_name, prompt = self._rows[row].check()
        file = self.path / file_name
        where = f"{self._rows[row].where}: image {file}"
        try:
            data = file.read_bytes()
        except OSError as error:
            raise DataError(f"{where} cannot be read ({error.strerror})") from error
        return Sample(name=Path(file_name).stem, prompt=prompt, image=decode_image(data, where, self.size))
