"""Uploaded pictures: looked at before they are decoded, decoded within limits. Must know no path and no address."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from longtake.data.images import fit_image, open_image, upright_rgb
from longtake.errors import DataError
from longtake.serve.errors import ApiError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "MPO")
_THUMBNAIL = 112


def read_picture(data: bytes, height: int, width: int, most_pixels: int) -> NDArray[np.uint8]:
    """uint8 [height, width, 3] of an uploaded file, as `prepare_image` would make it.

    Raises: ApiError for no picture, another kind of file, and more pixels than are taken: by its head, before anything
    of that size is allocated.
    """
    try:
        picture = open_image(data, "the picture")
        if picture.format not in FORMATS:
            raise DataError("it is of another kind")
        if picture.width * picture.height > most_pixels:
            raise ApiError(
                413,
                "too_large",
                f"the picture has {picture.width}x{picture.height} pixels, and {most_pixels} at most are taken",
                "scale it down",
            )
        return fit_image(upright_rgb(picture, "the picture"), height, width)
    except DataError:
        raise ApiError(
            422, "unusable", "the file is no picture that can be read", f"give a whole file of {', '.join(FORMATS[:5])}"
        ) from None


def png(picture: NDArray[np.uint8]) -> bytes:
    """A picture uint8 [h, w, 3] without loss."""
    return _file(picture, "PNG", compress_level=1)


def thumbnail(picture: NDArray[np.uint8]) -> bytes:
    """A small JPEG of a picture."""
    from PIL import Image

    small: Image.Image = Image.fromarray(picture)
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    if max(small.size) < _THUMBNAIL // 2:
        factor = _THUMBNAIL // max(small.size)
        small = small.resize((small.width * factor, small.height * factor), 0)
    return _file(np.asarray(small), "JPEG", quality=80)


def _file(picture: NDArray[np.uint8], kind: str, **options: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, **options)
    return file.getvalue()
