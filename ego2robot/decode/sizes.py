"""How many bytes each picture of a video takes: what can be known of it without decoding anything."""

from __future__ import annotations

import math
from dataclasses import dataclass

import av
import numpy as np

from ego2robot.blobs import read_error
from ego2robot.decode.pyav import MAX_READ_ERRORS, open_stream
from ego2robot.decode.stills import OPENERS
from ego2robot.types import Blob, VideoInfo

EARLIER_S = 10.0  # a seek without an index lands near, not before


@dataclass(frozen=True)
class Sizes:
    """The packets of a stretch of video, in the order of the stream.

    Attributes:
        times_s: float64 [n], decoding times, seconds after the video's first frame; they are at most the
            reordering (some frames) before the presentation times.
        bytes: float64 [n].
        key: bool [n].
    """

    times_s: np.ndarray
    bytes: np.ndarray
    key: np.ndarray


def packet_sizes(name: str, blob: Blob, info: VideoInfo, begin_s: float, end_s: float) -> Sizes:
    """The packets from the keyframe at or before ``begin_s`` to ``end_s``.

    Taken from the container's index where that is whole (MP4, MOV: no packet is read), else the stretch is
    read. Memory depends on the length of the stretch.

    Raises:
        VideoError: the file cannot be read.
    """
    if info.codec in OPENERS:  # each picture stands alone; their sizes tell nothing
        first = max(0, math.floor(begin_s * info.fps))
        times_s = np.arange(first, min(info.n_frames, math.floor(end_s * info.fps) + 1)) / info.fps
        return Sizes(times_s, np.ones(len(times_s)), np.ones(len(times_s), bool))
    try:
        with open_stream(name, blob) as (container, stream):
            tick = float(stream.time_base or 1)
            begin, end = ((t + info.start_s) / tick for t in (begin_s, end_s))
            rows = _from_index(stream, begin, end)
            if rows is None:
                rows = _from_packets(container, stream, begin, end, EARLIER_S / tick)
    except (av.FFmpegError, OSError) as error:
        raise read_error(name, error) from None
    table = np.array(rows, np.float64).reshape(-1, 3)
    return Sizes(table[:, 0] * tick - info.start_s, table[:, 1], table[:, 2] > 0)


Row = tuple[int, int, bool]  # time in the stream's time base, bytes, keyframe


def _from_index(stream: av.VideoStream, begin: float, end: float) -> list[Row] | None:
    entries = stream.index_entries
    if not len(entries) or len(entries) != stream.frames:
        return None
    first = max(0, entries.search_timestamp(math.floor(begin), backward=True))
    rows: list[Row] = []
    for k in range(first, len(entries)):
        entry = entries[k]
        if entry.timestamp > end:
            break
        rows.append((entry.timestamp, entry.size, entry.is_keyframe))
    # Some containers index positions only.
    return rows if all(size > 0 for _, size, _ in rows) else None


def _from_packets(
    container: av.container.InputContainer, stream: av.VideoStream, begin: float, end: float, earlier: float
) -> list[Row]:
    rows: list[Row] = []
    errors = 0
    try:
        container.seek(math.floor(begin - earlier), stream=stream)
    except av.FFmpegError:  # from where it stands, then: the start
        errors += 1
    while errors <= MAX_READ_ERRORS:
        try:
            for packet in container.demux(stream):
                when = packet.dts if packet.dts is not None else packet.pts
                if when is None or not packet.size:
                    continue
                if when > end:
                    return rows
                if rows or packet.is_keyframe:
                    rows.append((when, packet.size, packet.is_keyframe))
                if packet.is_keyframe and when <= begin:
                    del rows[:-1]
            return rows
        except av.FFmpegError:
            errors += 1
    return rows
