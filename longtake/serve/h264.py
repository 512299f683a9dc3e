"""Blocks as H.264 that can be joined anywhere: one encoder a session, a keyframe where each piece begins, no frame held
back. Must know no session.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtake.data.h264 import BT601, configure, picture_of
from longtake.devices import num_cores

LEAST_SIDE = 256
_CRF = "17"
_SLICE_PIXELS = 480 * 832 // 4  # that a thread encodes of a picture; noise of 480x832 takes one thread 24 ms a picture
_OPTIONS = {
    "preset": "veryfast",
    "tune": "zerolatency",  # a frame in, an access unit out
    "crf": _CRF,
    "forced-idr": "1",
}
_PARAMETERS = "cpu-independent=1:repeat-headers=1:annexb=1:keyint=infinite:scenecut=0:bframes=0"
_SPS, _PPS, _IDR = 7, 8, 5


@dataclass(frozen=True)
class Size:
    """What is sent of pictures of `height` x `width`: both sides `factor` times as long, by copies of each pixel."""

    height: int
    width: int
    factor: int

    @classmethod
    def of(cls, height: int, width: int) -> Size:
        factor = -(-LEAST_SIDE // min(height, width))
        return cls(height * factor, width * factor, factor)

    def enlarged(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 [h, w, 3] at this size."""
        return picture if self.factor == 1 else picture.repeat(self.factor, 0).repeat(self.factor, 1)


class LiveEncoder:
    """Pictures uint8 [h, w, 3] to access units, one for one. Must be used by one thread at a time."""

    def __init__(self, size: Size, fps: int) -> None:
        import av

        self.size = size
        codec: Any = av.CodecContext.create("libx264", "w")
        threads = max(1, min(num_cores(), size.height * size.width // _SLICE_PIXELS))
        configure(codec, size.height, size.width, "yuv420p", threads=threads, matrix=BT601)
        codec.thread_type = "SLICE"  # of each picture: threads that share out pictures would hold some back
        codec.time_base, codec.framerate = Fraction(1, fps), Fraction(fps)
        codec.options = {**_OPTIONS, "x264-params": _PARAMETERS}
        self._codec, self._count = codec, 0

    def encode(self, frames: NDArray[np.uint8]) -> list[bytes]:
        """Access units in Annex B, the first of which is a keyframe with SPS and PPS in front."""
        from av.video.frame import PictureType

        units = []
        for index, picture in enumerate(frames):
            frame = picture_of(self.size.enlarged(picture), "yuv420p", BT601)
            frame.pts, self._count = self._count, self._count + 1
            frame.pict_type = PictureType.I if index == 0 else PictureType.NONE
            units.append(b"".join(bytes(packet) for packet in self._codec.encode(frame)))
        return units


def nal_units(unit: bytes) -> list[bytes]:
    """The NAL units of an access unit in Annex B, without their start codes."""
    parts = unit.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1")
    return [part for part in parts if part]


@dataclass(frozen=True)
class Headers:
    """What a decoder must know of a stream before its first picture."""

    sps: bytes
    pps: bytes

    @classmethod
    def of(cls, size: Size, fps: int) -> Headers:
        """Those of each `LiveEncoder` of this size."""
        grey = np.full((1, size.height // size.factor, size.width // size.factor, 3), 128, np.uint8)
        found = {nal[0] & 31: nal for nal in nal_units(LiveEncoder(size, fps).encode(grey)[0])}
        return cls(found[_SPS], found[_PPS])

    @property
    def codec(self) -> str:
        """Its name in RFC 6381: profile, constraints, level."""
        return f"avc1.{self.sps[1:4].hex()}"


def length_prefixed(unit: bytes) -> bytes:
    """An access unit as mp4 holds it: each NAL unit behind its length, without SPS and PPS, which its head holds."""
    kept = [nal for nal in nal_units(unit) if nal[0] & 31 not in (_SPS, _PPS)]
    return b"".join(len(nal).to_bytes(4, "big") + nal for nal in kept)
