"""From a video to clips and units of work: where to cut, by a recipe's ``clips``. Pure functions.

Every id comes from the bytes and the span, so that the same footage makes the same plan wherever it
lies and whatever it is called.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ego2robot import config
from ego2robot.errors import VideoError
from ego2robot.types import Clip, Span, Unit, Video, VideoInfo, clip_id, short_id

# A unit covers at most so much of a video, and costs about so much to decode at most: what a crash can lose,
# and what the last worker may be busy with while the others have ended.
UNIT_SPAN_S, UNIT_COST_S = 300.0, 90.0
# A unit may end so much of its span earlier, where less of a group of pictures is decoded twice.
EARLIER = 0.25
# Frames of clips that overlap, or wait for one before them, that a unit may hold at once; unless one clip
# alone is longer.
HELD_FRAMES = 720
# Seconds of one CPU core per million decoded pixels, for ordering and ETA only; the run corrects it.
DECODE_COST = {"h264": 0.0022, "hevc": 0.0026, "vp9": 0.0022, "av1": 0.0030}
MOST_LANES = 64  # that are looked through for room
TOLERANCE_S = 1.0  # that an annotation may reach beyond its video: rounded, or timed by another clock
PART = "part"  # of a span that was cut: "2/3"


def clips_of(video_id: str, info: VideoInfo, clips: config.Clips) -> list[Clip]:
    """The clips of a video without annotations or cuts: every ``stride_s``, ``duration_s`` long, on the grid.

    Starts are rounded to the grid. The last clip may be shorter, down to ``min_frames``.
    """
    return _windows(video_id, 0, _available(info, clips), clips)


def cut_video(
    name: str,
    video_id: str,
    info: VideoInfo,
    clips: config.Clips,
    spans: Sequence[Span] = (),
    shots_s: Sequence[float] = (),
) -> tuple[list[Clip], list[VideoError]]:
    """The clips of a video by ``clips.policy``, in ascending order, and what could not be used.

    Annotated spans and whole videos are rounded to the grid; what is longer than ``max_s`` is cut in parts
    of equal length, and ``part`` in their meta says which. Annotations of the same time become one clip that
    has the fields of both, those that differ joined by ``; ``. No clip goes across a cut.

    Args:
        name: the video, for messages.
        spans: what its dataset annotates, in any order.
        shots_s: ascending times of the first pictures after cuts.

    Returns:
        The clips, and one problem for each cause for which spans were left out: empty or reversed, outside
        the video by more than a second, too short.
    """
    policy = clips.policy
    if policy == "auto":
        policy = "annotated" if spans else "windows"
    available = _available(info, clips)
    # The first grid time at or after a cut shows the new shot.
    borders = [math.ceil(t * clips.sample_fps - 1e-6) for t in shots_s]
    borders = sorted({0, available, *(b for b in borders if 0 < b < available)})
    if policy == "windows":
        shots = itertools.pairwise(borders)
        return [clip for a, b in shots for clip in _windows(video_id, a, b, clips)], []
    if policy == "whole":
        spans = (Span(0.0, math.inf),)
    found: dict[tuple[int, int], dict[str, str]] = {}
    refused: dict[str, list[str]] = {}
    if not spans:
        refused["no span of it is annotated"] = []
    for span in spans:
        if (cause := _refusal(span, info.duration_s)) is None:
            first = max(0, round(span.start_s * clips.sample_fps))
            stop = min(available, round(min(span.end_s, info.duration_s + 1) * clips.sample_fps))
            inside = [first, *(b for b in borders if first < b < stop), stop]
            pieces = [p for a, b in itertools.pairwise(inside) for p in _equal_parts(a, b, clips)]
            for k, piece in enumerate(pieces):
                part = {PART: f"{k + 1}/{len(pieces)}"} if len(pieces) > 1 else {}
                if piece[1] >= min(clips.min_frames, _longest(clips)):
                    found[piece] = _joined(found.get(piece), {**span.meta, **part})
                else:
                    cause = f"shorter than clips.min_frames={clips.min_frames}"
        if cause:
            refused.setdefault(cause, []).append(f"{span.start_s:g} to {span.end_s:g} s")
    whole = policy == "whole"
    problems = [_problem(name, cause, times, len(spans)) for cause, times in refused.items() if not whole]
    fps = clips.sample_fps
    return [
        Clip(clip_id(video_id, first, n, fps), video_id, first, n, fps, meta)
        for (first, n), meta in sorted(found.items(), key=lambda item: item[0])
    ], problems


def _available(info: VideoInfo, clips: config.Clips) -> int:
    """Grid times before the video's end."""
    return math.ceil(info.duration_s * clips.sample_fps - 1e-6)


def _longest(clips: config.Clips) -> int:
    return max(1, math.floor(clips.max_s * clips.sample_fps))


def _windows(video_id: str, begin: int, end: int, clips: config.Clips) -> list[Clip]:
    fps = clips.sample_fps
    length = max(1, round(clips.duration_s * fps))
    found: list[Clip] = []
    for i in range(end - begin):
        first = begin + round(i * clips.stride_s * fps)
        n = min(length, end - first)
        if n < min(clips.min_frames, length):
            break
        if not found or first > found[-1].first:
            found.append(Clip(clip_id(video_id, first, n, fps), video_id, first, n, fps))
    return found


def _equal_parts(first: int, stop: int, clips: config.Clips) -> list[tuple[int, int]]:
    """(first, frames) of parts that are as long as each other, to a frame."""
    n = max(0, stop - first)
    k = max(1, math.ceil(n / _longest(clips)))
    borders = [first + i * n // k for i in range(k + 1)]
    return [(a, b - a) for a, b in itertools.pairwise(borders)]


def _refusal(span: Span, duration_s: float) -> str | None:
    if math.isnan(span.start_s) or math.isnan(span.end_s) or math.isinf(span.start_s):
        return "without a time"
    if span.end_s <= span.start_s:
        return "empty or reversed"
    beyond = math.isfinite(span.end_s) and span.end_s > duration_s + TOLERANCE_S
    if beyond or span.start_s >= duration_s or span.end_s <= 0 or span.start_s < -TOLERANCE_S:
        return f"outside the video (0 to {duration_s:.2f} s)"
    return None


def _problem(name: str, cause: str, times: Sequence[str], n: int) -> VideoError:
    if not times:
        return VideoError(name, cause, "use clips.policy=windows or whole for it", "metadata")
    text = f"{len(times)} of {n} annotated spans are {cause}, the first {times[0]}"
    return VideoError(name, text, "left out", "metadata")


def _joined(one: Mapping[str, str] | None, other: Mapping[str, str]) -> dict[str, str]:
    merged = dict(one or {})
    for key, value in other.items():
        have = merged.get(key)
        if have is None or value in have.split("; "):
            merged[key] = value if have is None else have
        else:
            merged[key] = f"{have}; {value}"
    return merged


def units_of(video: Video, clips: Sequence[Clip], keyframes_s: np.ndarray | None = None) -> list[Unit]:
    """Groups the clips of a probed video into units of at most ``UNIT_SPAN_S`` and about ``UNIT_COST_S``.

    Args:
        clips: in ascending order.
        keyframes_s: float64 [len(clips)], the keyframe at or before each clip's start, NaN where unknown. A
            unit that begins between keyframes decodes what lies before it once more, so that units are cut
            where that is least. Without them, at whole multiples of their span.
    """
    span_s = span_of(video)
    if keyframes_s is None:
        groups: dict[int, list[Clip]] = {}
        for clip in clips:
            groups.setdefault(int(clip.start_s // span_s), []).append(clip)
        cut = list(groups.values())
    else:
        cut = list(_at_keyframes(clips, keyframes_s, span_s))
    return [unit_of(video, lane) for group in cut for lane in _lanes(group)]


def unit_of(video: Video, clips: Sequence[Clip]) -> Unit:
    """Some clips of a probed video, in ascending order, as one unit."""
    name = short_id("unit", video.video_id, *(clip.clip_id for clip in clips))
    return Unit(name, video, tuple(clips), _cost(video, clips))


def _at_keyframes(clips: Sequence[Clip], keyframes_s: np.ndarray, span_s: float) -> Iterator[list[Clip]]:
    starts_s = np.array([clip.start_s for clip in clips])
    ends_s = np.maximum.accumulate([clip.end_s for clip in clips])
    # Seconds before a clip that are decoded once more when a unit begins with it.
    again_s = np.zeros(len(clips))
    again_s[1:] = np.maximum(0.0, ends_s[:-1] - np.minimum(np.nan_to_num(keyframes_s, nan=0.0), starts_s)[1:])
    begin = 0
    while begin < len(clips):
        limit_s = starts_s[begin] + span_s
        end = int(np.searchsorted(starts_s, limit_s, side="right"))
        if end < len(clips):
            earliest = int(np.searchsorted(starts_s, limit_s - EARLIER * span_s))
            choice = range(max(begin + 1, earliest), end + 1)
            end = min(reversed(choice), key=lambda k: again_s[k]) if choice else max(begin + 1, end)
        yield list(clips[begin:end])
        begin = end


def _lanes(clips: Sequence[Clip]) -> list[list[Clip]]:
    """Clips in order, parted so that no part holds more than ``HELD_FRAMES`` at once."""
    lanes: list[list[Clip]] = []
    holding: list[deque[Clip]] = []
    for clip in clips:
        for at in range(max(0, len(lanes) - MOST_LANES), len(lanes)):
            held = holding[at]
            # Answers come in order: who has ended waits for who began earlier.
            while held and held[0].first + held[0].n_frames <= clip.first:
                held.popleft()
            if not held or sum(c.n_frames for c in held) + clip.n_frames <= HELD_FRAMES:
                break
        else:
            at = len(lanes)
            lanes.append([])
            holding.append(deque())
        lanes[at].append(clip)
        holding[at].append(clip)
    return lanes


def span_of(video: Video) -> float:
    """Seconds of a video that a unit may cover: whole minutes, or a part of one where that costs much."""
    a_second = _second_s(video)
    span_s = min(UNIT_SPAN_S, UNIT_COST_S / max(a_second, 1e-9))
    return 60.0 * (span_s // 60) if span_s >= 60 else max(5.0, 5.0 * (span_s // 5))


def _second_s(video: Video) -> float:
    """What decoding a second of a video takes."""
    assert video.info is not None
    megapixels = video.info.width * video.info.height / 1e6
    return video.info.fps * megapixels * DECODE_COST.get(video.info.codec, 0.003)


def _cost(video: Video, clips: Sequence[Clip]) -> float:
    """Seconds of decoding: the union of the clips' spans, and half a usual GOP before each gap."""
    seconds, end = 0.0, -math.inf
    for clip in clips:
        seconds += max(0.0, clip.end_s - max(clip.start_s, end))
        seconds += 1.0 if clip.start_s > end else 0.0
        end = max(end, clip.end_s)
    return seconds * _second_s(video)
