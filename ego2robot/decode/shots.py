"""Cuts: where a video goes from one shot to another from one picture to the next.

Where a cut can be, compressed sizes and keyframes say: an encoder has to code the picture after it anew, as
a keyframe or as a packet far larger than those around. Only groups of pictures where that is so, or whose
two keyframes do not show the same place, are decoded, small and grey, and their neighbours compared.

Two pictures are compared by phase correlation (Kuglin and Hines, 1975): the height of its peak does not
depend on where the camera looks, as long as the pictures overlap, nor on brightness and contrast. A turning
head lowers it for many pictures on end, a cut for one.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator

import av
import numpy as np
from av.video.reformatter import Interpolation
from scipy.ndimage import percentile_filter

from ego2robot.blobs import read_error
from ego2robot.decode.pyav import Packets, open_stream, pictures
from ego2robot.decode.sizes import Sizes, packet_sizes
from ego2robot.types import Blob, VideoInfo

WIDTH, HEIGHT = 64, 36  # of the pictures that are compared
BAND = 0.75  # of the waves that such a picture has: the finest are noise
# The peak between neighbours (1: moved, but the same): 0.55 and more on footage of hands at work, 0.28 and
# more on nearly all of a drawn head that turns fast, at most 0.24 between places that have nothing to do
# with each other. A cut is below ``CUT``, and below a share of what is usual around.
CUT, RELATIVE = 0.3, 0.35
AGAIN = 0.4  # of any shortly before with any shortly after: it was no cut, something passed
USUAL = 3  # neighbours on either side; the calmer side counts: a head may turn until the cut
SPIKE = 2.0  # a packet so many times as large as all but the largest tenth of those around may follow a cut
AROUND = 45  # packets on either side
FLASH = 4  # pictures that may be lost in light, or blurred, between two that are alike
FLAT = 2.0  # standard deviation of grey levels below which a picture shows nothing
CONTEXT_S = 0.5  # of what comes after a group of pictures, to know what is usual there


def find_cuts(name: str, blob: Blob, info: VideoInfo) -> list[float]:
    """Times of the first pictures after cuts, ascending, seconds after the video's first frame.

    Hard cuts only: a fade is none. Reads the video's bytes once, and those of suspicious groups of pictures
    twice.

    Raises:
        VideoError: the file cannot be read.
    """
    sizes = packet_sizes(name, blob, info, 0.0, info.duration_s + 10.0)
    keys_s = sizes.times_s[sizes.key]
    if not len(keys_s):
        return []
    found: set[float] = set()
    try:
        suspicious = _spiking(sizes) | _changing(name, blob, keys_s)
        for begin, end in _stretches(suspicious):
            until_s = float(keys_s[end]) + CONTEXT_S if end < len(keys_s) else math.inf
            greys = _greys(name, blob, info, float(keys_s[begin]), until_s)
            found |= {round(time_s, 6) for time_s in cuts_between(greys)}
    except (av.FFmpegError, OSError) as error:
        raise read_error(name, error) from None
    return sorted(found)


def cuts_between(greys: Iterable[tuple[float, np.ndarray]]) -> list[float]:
    """Times of the first pictures after cuts among consecutive ones; see :func:`find_cuts`.

    Args:
        greys: seconds and uint8 [36, 64] of each. Flat ones are passed over. Few are held at a time.
    """
    recent: deque[np.ndarray] = deque(maxlen=2 * FLASH + 2)
    times_s: list[float] = []
    peaks: list[float] = []  # between each picture and the one before it
    apart: list[int] = []  # where no picture shortly before is like one shortly after

    def compare(n_after: int) -> None:
        before, after = list(recent)[:-n_after], list(recent)[-n_after:]
        if peaks[-n_after] < CUT and max(_peak(a, b) for a in before for b in after) < AGAIN:
            apart.append(len(peaks) - n_after)

    for time_s, grey_hw in greys:
        if grey_hw.std() < FLAT:
            continue
        spectrum = _spectrum(grey_hw)
        if recent:
            times_s.append(time_s)
            peaks.append(_peak(recent[-1], spectrum))
        recent.append(spectrum)
        if len(peaks) > FLASH:
            compare(FLASH + 1)
    for n_after in range(min(FLASH, len(peaks)), 0, -1):
        compare(n_after)
    found: list[int] = []
    for k in apart:
        sides = peaks[max(0, k - USUAL) : k], peaks[k + 1 : k + 1 + USUAL]
        usual = max((float(np.median(side)) for side in sides if side), default=1.0)
        if peaks[k] >= RELATIVE * usual:
            continue
        if found and k - found[-1] <= FLASH:  # of several nearby, the clearest
            k = min(found.pop(), k, key=lambda at: peaks[at])  # noqa: PLW2901
        found.append(k)
    return [times_s[k] for k in found]


_WINDOW_HW = np.outer(np.hanning(HEIGHT), np.hanning(WIDTH)).astype(np.float32)
_IN_BAND_hw = (
    (2 * np.abs(np.fft.fftfreq(HEIGHT))[:, None] <= BAND) & (2 * np.fft.rfftfreq(WIDTH) <= BAND)
).astype(np.float32)
_IN_BAND_hw[0, 0] = 0.0  # brightness
_ALIKE = float(np.fft.irfft2(_IN_BAND_hw, s=(HEIGHT, WIDTH)).max())  # peak of a picture with itself


def _spectrum(grey_hw: np.ndarray) -> np.ndarray:
    """Phases of the picture's waves, complex64 [36, 33]; its edges are faded out."""
    waves = np.fft.rfft2((grey_hw.astype(np.float32) - grey_hw.mean()) * _WINDOW_HW)
    return (waves * _IN_BAND_hw / np.maximum(np.abs(waves), 1e-6)).astype(np.complex64)


def _peak(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.fft.irfft2(one * np.conj(other), s=(HEIGHT, WIDTH)).max()) / _ALIKE


def _spiking(sizes: Sizes) -> set[int]:
    """Groups of pictures, by number, in which a packet is far larger than those around; and the last one,
    which no keyframe follows."""
    group = np.maximum(np.cumsum(sizes.key) - 1, 0)
    last = int(group[-1])
    small = ~sizes.key
    if not small.any():
        return {last}
    usual = percentile_filter(sizes.bytes[small], 90, size=2 * AROUND + 1)
    return {*group[small][sizes.bytes[small] > SPIKE * usual].tolist(), last}


def _changing(name: str, blob: Blob, keys_s: np.ndarray) -> set[int]:
    """Groups of pictures whose keyframe and the next group's do not show the same place, or are not there."""
    spectra: dict[int, np.ndarray] = {}
    changing = set(range(len(keys_s) - 1))
    first_s: float | None = None
    with open_stream(name, blob) as (container, stream):
        for picture in pictures(container, stream, _keyframes):
            # Keyframes are known by decoding times: earlier than these by the same for all.
            first_s = picture.time_s if first_s is None else first_s
            k = int(np.abs(keys_s - keys_s[0] - (picture.time_s - first_s)).argmin())
            before = spectra.get(k - 1)
            spectra = {k: _spectrum(_small(picture.frame))}
            if before is not None and _peak(before, spectra[k]) >= CUT:
                changing.discard(k - 1)
    return changing


def _keyframes(packets: Packets) -> Packets:
    return (p for p in packets if p is None or not p.size or p.is_keyframe)


def _stretches(groups: Iterable[int]) -> Iterator[tuple[int, int]]:
    """First and end of consecutive numbers."""
    for _, run in itertools.groupby(enumerate(sorted(groups)), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        yield numbers[0], numbers[-1] + 1


def _greys(
    name: str, blob: Blob, info: VideoInfo, begin_s: float, until_s: float
) -> Iterator[tuple[float, np.ndarray]]:
    """Small grey pictures from the keyframe at ``begin_s`` (a decoding time) on, with their times."""
    with open_stream(name, blob) as (container, stream):
        stream.codec_context.options = {"skip_loop_filter": "all"}
        if begin_s > 0:
            tick = float(stream.time_base or 1)
            container.seek(round((begin_s + info.start_s) / tick), stream=stream)
        for picture in pictures(container, stream):
            if picture.time_s - info.start_s > until_s:
                return
            if not picture.corrupt:
                yield picture.time_s - info.start_s, _small(picture.frame)


def _small(frame: av.VideoFrame) -> np.ndarray:
    grey = frame.reformat(WIDTH, HEIGHT, "gray", interpolation=Interpolation.AREA)
    return np.asarray(grey.to_ndarray(), np.uint8)
