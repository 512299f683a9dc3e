"""How pictures become H.264: colours by a matrix that the file names, and the same bytes for the same pictures.

Must know no model and no file.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

# x264's fast arithmetic for its macroblock tree depends on where in memory a row begins: the same pictures would give
# other bytes. Its exact one does not, and is the same on every processor.
_EXACT = {"x264-params": "cpu-independent=1"}
BT709, BT601 = 1, 6  # ITU-T H.273: matrices; the first is also the number of BT.709's primaries and transfer
_LIMITED = 1  # luma 16 .. 235
_IN_SWSCALE = {BT709: 1, BT601: 5}


def add_h264(
    container: Any,
    rate: Fraction | int,
    height: int,
    width: int,
    *,
    pixels: str,
    threads: int,
    matrix: int = BT709,
    **options: str,
) -> Any:
    """A stream of `height` x `width` pictures in an open container; `pixels` yuv420p or yuv444p, `matrix` BT709 or
    BT601, `options` x264's.

    The bytes depend on the number of `threads`, which is therefore not that of the machine.
    """
    stream = container.add_stream("libx264", rate=rate, options={**_EXACT, **options})
    configure(stream.codec_context, height, width, pixels, threads=threads, matrix=matrix)
    return stream


def configure(codec: Any, height: int, width: int, pixels: str, *, threads: int, matrix: int = BT709) -> None:
    """Size, kind of pixels and colours of an encoder that is not open yet; arguments as those of `add_h264`."""
    codec.height, codec.width, codec.pix_fmt = height, width, pixels
    codec.thread_count = threads
    add_colours(codec, matrix)


def picture_of(picture: NDArray[np.uint8], pixels: str, matrix: int = BT709) -> Any:
    """A picture, uint8 [h, w, 3], as an encoder of these `pixels` and this `matrix` takes it."""
    import av

    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    # Else it starts a thread a processor for each picture: on 32 cores 8 ms for 64x64 pixels, and 11 for 480x832.
    return frame.reformat(format=pixels, dst_colorspace=_IN_SWSCALE[matrix], dst_color_range=_LIMITED, threads=1)


def add_colours(codec: Any, matrix: int) -> None:
    """Has an encoder's files say what `picture_of` does with colours."""
    codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range = matrix, BT709, BT709, _LIMITED


def encode(stream: Any, picture: NDArray[np.uint8]) -> Any:
    """The packets that come of one more picture, uint8 [h, w, 3]."""
    return stream.encode(picture_of(picture, stream.pix_fmt, int(stream.codec_context.colorspace)))
