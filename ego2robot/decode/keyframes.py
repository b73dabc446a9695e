"""Where the keyframes of a video are, from its container's index: no packet is read, nothing is decoded."""

from __future__ import annotations

import math

import av
import numpy as np

from ego2robot.blobs import read_error
from ego2robot.decode.pyav import open_stream
from ego2robot.types import Blob, VideoInfo


def keyframes_before(name: str, blob: Blob, info: VideoInfo, times_s: np.ndarray) -> np.ndarray | None:
    """The keyframe at or before each of some times: float64 [n], seconds after the video's first frame.

    An index goes by decoding time, which lies before the presentation of a picture by the same for all
    keyframes of a stream; that is put right by the first.

    Args:
        times_s: float64 [n], seconds after the video's first frame.

    Returns:
        NaN where there is none before; None where the container has no index of all its frames (MP4 and
        MOV have one, also in fragments that have been read).

    Raises:
        VideoError: the file cannot be read.
    """
    try:
        with open_stream(name, blob) as (_, stream):
            entries = stream.index_entries
            if not len(entries) or len(entries) != stream.frames:
                return None
            tick = float(stream.time_base or 1)
            shift_s = info.start_s - entries[0].timestamp * tick
            found = np.full(len(times_s), np.nan)
            for i, time_s in enumerate(np.asarray(times_s, np.float64).tolist()):
                at = math.floor((time_s + info.start_s - shift_s) / tick + 0.5)
                k = entries.search_timestamp(at, backward=True)
                if k >= 0:
                    found[i] = entries[k].timestamp * tick + shift_s - info.start_s
            return found
    except (av.FFmpegError, OSError) as error:
        raise read_error(name, error) from None
