"""Packets as NVIDIA's parser wants them: H.264 and HEVC with start codes, their headers first.

Lengths in the container's headers are never believed further than the bytes that are there.
"""

from __future__ import annotations

from collections.abc import Iterator

import av
from av.bitstream import BitStreamFilterContext

START_CODE = b"\0\0\0\1"
FILTERS = {"h264": "h264_mp4toannexb", "hevc": "hevc_mp4toannexb"}


def headers(codec: str, extradata: bytes | None) -> bytes:
    """The parameter sets or sequence header of a stream, as they stand before a keyframe; may be empty.

    Args:
        extradata: ``avcC``, ``hvcC`` or ``av1C`` of the container, or the headers themselves.
    """
    data = bytes(extradata or b"")
    if codec == "av1" and len(data) >= 4 and data[0] & 0x80:  # AV1 in ISO base media, 2.3.3
        return data[4:]
    if codec not in FILTERS or not _is_record(codec, data):
        return data if codec in (*FILTERS, "av1") else b""
    units = _h264_units(data) if codec == "h264" else _hevc_units(data)
    return b"".join(START_CODE + unit for unit in units if unit)


def _is_record(codec: str, data: bytes) -> bool:
    """A configuration record of ISO/IEC 14496-15 rather than NAL units behind start codes."""
    if codec == "h264":
        return len(data) >= 7 and data[0] == 1
    return len(data) >= 23 and data[:3] not in (b"\0\0\0", b"\0\0\1")


def _h264_units(data: bytes) -> Iterator[bytes]:
    """ISO/IEC 14496-15, 5.3.3.1: sequence, then picture parameter sets, each behind its length."""
    at = 5
    for mask in (0x1F, 0xFF):
        if at >= len(data):
            return
        count, at = data[at] & mask, at + 1
        for _ in range(count):
            length = int.from_bytes(data[at : at + 2], "big")
            yield data[at + 2 : at + 2 + length]
            at += 2 + length


def _hevc_units(data: bytes) -> Iterator[bytes]:
    """ISO/IEC 14496-15, 8.3.3.1: arrays of NAL units of one type."""
    at = 23
    for _ in range(data[22]):
        count, at = int.from_bytes(data[at + 1 : at + 3], "big"), at + 3
        for _ in range(count):
            length = int.from_bytes(data[at : at + 2], "big")
            yield data[at + 2 : at + 2 + length]
            at += 2 + length
            if at >= len(data):
                return


class StartCodes:
    """Turns packets of a stream whose NAL units have lengths into ones with start codes."""

    def __init__(self, stream: av.VideoStream) -> None:
        codec = stream.codec_context.codec.canonical_name
        record = codec in FILTERS and _is_record(codec, bytes(stream.codec_context.extradata or b""))
        self._filter = BitStreamFilterContext(FILTERS[codec], stream) if record else None

    def __call__(self, packet: av.Packet) -> list[av.Packet]:
        """Usually one packet. Raises av.FFmpegError where a length does not fit."""
        return [packet] if self._filter is None else self._filter.filter(packet)

    def reset(self) -> None:
        if self._filter is not None:
            self._filter.flush()


def vp9_shown(data: bytes | memoryview) -> int:
    """How many pictures a VP9 packet shows (VP9 Bitstream Specification 0.6, 6.2 and Annex B)."""
    parts = [(0, len(data))]
    if data and data[-1] & 0xE0 == 0xC0:  # the index of a superframe
        width, count = (data[-1] >> 3 & 3) + 1, (data[-1] & 7) + 1
        start = len(data) - 2 - width * count
        if start >= 0 and data[start] == data[-1]:
            parts, at = [], 0
            for k in range(count):
                field = start + 1 + k * width
                length = int.from_bytes(data[field : field + width], "little")
                parts.append((at, at + length))
                at += length
    return sum(_vp9_is_shown(data[at:end]) for at, end in parts if at < end <= len(data))


def _vp9_is_shown(frame: bytes | memoryview) -> bool:
    bits = int.from_bytes(bytes(frame[:2]).ljust(2, b"\0"), "big")
    profile_3 = bits >> 12 & 3 == 3
    shift = 10 if profile_3 else 11
    existing, show = bits >> shift & 1, bits >> (shift - 2) & 1
    return bool(existing or show)
