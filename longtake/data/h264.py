"""How pictures become H.264: colours by BT.709, said so in the file, and the same bytes for the same pictures.

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
_BT709, _LIMITED = 1, 1  # ITU-T H.273: matrix, primaries and transfer of BT.709; luma 16 .. 235


def add_h264(
    container: Any, rate: Fraction | int, height: int, width: int, *, pixels: str, threads: int, **options: str
) -> Any:
    """A stream of `height` x `width` pictures in an open container; `pixels` yuv420p or yuv444p, `options` x264's.

    The bytes depend on the number of `threads`, which is therefore not that of the machine.
    """
    stream = container.add_stream("libx264", rate=rate, options={**_EXACT, **options})
    configure(stream.codec_context, height, width, pixels, threads=threads)
    return stream


def configure(codec: Any, height: int, width: int, pixels: str, *, threads: int) -> None:
    """Size, kind of pixels and colours of an encoder that is not open yet; arguments as those of `add_h264`."""
    codec.height, codec.width, codec.pix_fmt = height, width, pixels
    codec.thread_count = threads
    codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
    codec.color_range = _LIMITED


def picture_of(picture: NDArray[np.uint8], pixels: str) -> Any:
    """A picture, uint8 [h, w, 3], as an encoder of these `pixels` takes it."""
    import av

    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    return frame.reformat(format=pixels, dst_colorspace=_BT709, dst_color_range=_LIMITED)


def encode(stream: Any, picture: NDArray[np.uint8]) -> Any:
    """The packets that come of one more picture, uint8 [h, w, 3]."""
    return stream.encode(picture_of(picture, stream.pix_fmt))
