"""Fragmented mp4 of H.264 that is encoded already: a head, then a fragment for each piece of video, at any time in it.

A muxer gives a fragment out when the next one begins, and cannot go back in time; both a live viewer needs.
Source: ISO/IEC 14496-12 (boxes), 14496-15 (avcC).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from mmap import mmap

from longtake.data.h264 import BT601, BT709
from longtake.serve.h264 import Headers, Size, length_prefixed

TICKS = 512  # of the media's clock for a frame
_MATRIX = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
_KEY, _DELTA = 0x02000000, 0x01010000  # depends on no other sample; depends on others and is no sync sample


def _box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def _full(kind: bytes, *parts: bytes, version: int = 0, flags: int = 0) -> bytes:
    return _box(kind, struct.pack(">I", version << 24 | flags), *parts)


def head(headers: Headers, size: Size, fps: int) -> bytes:
    """The init segment: file type, and a movie with one track and no samples."""
    sps, pps = headers.sps, headers.pps
    config = _box(
        b"avcC",
        bytes([1, *sps[1:4], 0xFF, 0xE1])
        + struct.pack(">H", len(sps))
        + sps
        + b"\1"
        + struct.pack(">H", len(pps))
        + pps,
        # What High profile says once more: 4:2:0, eight bits, no extensions of the SPS
        b"\xfd\xf8\xf8\0" if sps[1] in (100, 110, 122, 144) else b"",
    )
    colour = _box(b"colr", struct.pack(">4sHHHB", b"nclx", BT709, BT709, BT601, 0))
    entry = _box(
        b"avc1",
        struct.pack(">6xH16xHHIII H32sHh", 1, size.width, size.height, 0x480000, 0x480000, 0, 1, b"", 24, -1),
        config,
        colour,
    )
    empty = struct.pack(">I", 0)
    tables = _box(
        b"stbl",
        _full(b"stsd", struct.pack(">I", 1), entry),
        *(_full(kind, empty) for kind in (b"stts", b"stsc")),
        _full(b"stsz", struct.pack(">II", 0, 0)),
        _full(b"stco", empty),
    )
    data = _box(b"dinf", _full(b"dref", struct.pack(">I", 1), _full(b"url ", flags=1)))
    media = _box(
        b"mdia",
        _full(b"mdhd", struct.pack(">IIIIHH", 0, 0, TICKS * fps, 0, 0x55C4, 0)),
        _full(b"hdlr", struct.pack(">I4s12x", 0, b"vide"), b"video\0"),
        _box(b"minf", _full(b"vmhd", bytes(8), flags=1), data, tables),
    )
    track = _full(
        b"tkhd",
        struct.pack(">IIIII8xhhhH", 0, 0, 1, 0, 0, 0, 0, 0, 0),
        _MATRIX,
        struct.pack(">II", size.width << 16, size.height << 16),
        flags=3,
    )
    movie = _full(
        b"mvhd", struct.pack(">IIIIiH10x", 0, 0, TICKS * fps, 0, 0x10000, 0x100), _MATRIX, bytes(24), b"\0\0\0\2"
    )
    extends = _box(b"mvex", _full(b"trex", struct.pack(">IIIII", 1, 1, TICKS, 0, 0)))
    kinds = _box(b"ftyp", b"isom\0\0\2\0isomiso6avc1mp41")
    return kinds + _box(b"moov", movie, _box(b"trak", track, media), extends)


def fragment(units: Sequence[bytes], first: int) -> bytes:
    """Access units that begin with a keyframe, as the pictures from number `first` on."""
    samples = [length_prefixed(unit) for unit in units]
    flags = [_KEY] + [_DELTA] * (len(samples) - 1)
    table = b"".join(struct.pack(">II", len(sample), flag) for sample, flag in zip(samples, flags))

    def movie(offset: int) -> bytes:
        run = _full(b"trun", struct.pack(">Ii", len(samples), offset), table, flags=0x601)
        time = _full(b"tfdt", struct.pack(">Q", first * TICKS), version=1)
        track = _full(b"tfhd", struct.pack(">II", 1, TICKS), flags=0x020008)
        return _box(b"moof", _full(b"mfhd", struct.pack(">I", first + 1)), _box(b"traf", track, time, run))

    return movie(len(movie(0)) + 8) + _box(b"mdat", *samples)


_TIME_AT = 8 + 16 + 8 + 20 + 12  # moof, mfhd, traf, tfhd, and the head of tfdt


def moved(data: bytes, first: int) -> bytes:
    """A fragment of `fragment`, as the pictures from number `first` on."""
    return data[:_TIME_AT] + struct.pack(">Q", first * TICKS) + data[_TIME_AT + 8 :]


def span(data: bytes | mmap, offset: int) -> tuple[int, int, int] | None:
    """Number of the first picture, their count, and the bytes of the fragment at an offset; None: no whole one."""
    if data[offset + 4 : offset + 8] != b"moof" or len(data) < offset + _TIME_AT + 28:
        return None
    (movie,) = struct.unpack_from(">I", data, offset)
    if data[offset + movie + 4 : offset + movie + 8] != b"mdat":
        return None
    (media,) = struct.unpack_from(">I", data, offset + movie)
    (time,) = struct.unpack_from(">Q", data, offset + _TIME_AT)
    (count,) = struct.unpack_from(">I", data, offset + _TIME_AT + 8 + 12)
    return None if len(data) < offset + movie + media else (time // TICKS, count, movie + media)
