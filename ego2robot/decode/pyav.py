"""Decoding with PyAV, whose wheel brings its own FFmpeg: the default on a CPU.

One forward pass, one thread (there is one process per core). Exact: what is left out inside a stretch
that is decoded is neither due nor needed for what is, and what a seek found is checked before it is used.

Fast leaves out due pictures too where no other refers to them, and the loop filter on any of those that are
left. The picture before is given with its own time, up to 33 ms early with three B-frames at 30 frames/s.
Motion is not corrected for the uneven steps: on real footage at 10 frames/s, the worst case at hand, it
changed by 0.5 % on average, 3 % at most (benchmarks/triage.py --modes).
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.codec.context import Flags2

from ego2robot.blobs import local_blob, open_blob, read_error
from ego2robot.decode.base import FrameBatch
from ego2robot.decode.packets import LOOKAHEAD, References, needed, trimmed
from ego2robot.decode.picture import Batcher
from ego2robot.errors import VideoError
from ego2robot.remote import is_remote
from ego2robot.types import Blob, FrameSpec, VideoInfo

# A frame's time and a due time are sums of rounded numbers; nearer than this they are the same.
EPSILON_S = 0.5e-6
# A jump costs a flush and some reading; less than this ahead, decoding on is cheaper.
WORTH_A_SEEK_S = 0.5
# Without an index, where a seek will land is not known; it may decode from further back.
WORTH_A_BLIND_SEEK_S = 10.0
MAX_WAIT_PACKETS = 300  # without a keyframe, before a stream is decoded as if it needed none
MAX_READ_ERRORS = 16  # in a row, before the rest of a damaged container is given up
# Containers that hold video and do not name other files. A file that pretends to be a playlist would
# otherwise make FFmpeg open whatever it lists.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "flv", "ogg", "asf", "mxf",
    "nut", "ivf", "h264", "hevc", "obu", "mpegvideo", "m4v", "mjpeg", "wav", "mp3", "aac", "flac",
)  # fmt: skip


def locator(blob: Blob) -> str:
    """The address FFmpeg opens: a file, or a byte range of one read in place (its subfile protocol).

    The scheme is always there, so that no file name is taken for a protocol of its own. What lies far away
    is fetched into the cache first, whole.

    Raises:
        OSError: it cannot be fetched.
    """
    blob = local_blob(blob)
    path = f"file:{Path(blob.path).absolute()}"
    if blob.whole_file:
        return path
    return f"subfile,,start,{blob.offset},end,{blob.offset + blob.size},,:{path}"


@contextmanager
def open_stream(name: str, blob: Blob) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its video stream (the first that is no cover picture), one decoding thread.

    What lies far away is read in ranges. libav takes a read that fails for the end of the file: on leaving
    it is raised after all.

    Raises:
        av.FFmpegError: not a video that libav can open.
        VideoError: no video stream, or no decoder for it.
        RemoteError: reading from afar fails, in spite of several tries.
    """
    options = {"protocol_whitelist": "file,subfile", "format_whitelist": ",".join(FORMATS)}
    with ExitStack() as stack:
        file = stack.enter_context(open_blob(blob)) if is_remote(blob.path) else None
        try:
            container = av.open(file or locator(blob), container_options=options, buffer_size=1 << 16)
            with container:
                yield container, _video_stream(name, container)
        except (av.FFmpegError, VideoError):
            _raise_failure(file)
            raise
        _raise_failure(file)


def check_read(container: av.container.InputContainer) -> None:
    """Raises the RemoteError that reading a container from afar failed with; libav takes it for the end."""
    if container.file is not None:
        _raise_failure(container.file.file)


def _raise_failure(file: object) -> None:
    if failure := getattr(file, "failure", None):
        raise failure


def _video_stream(name: str, container: av.container.InputContainer) -> av.VideoStream:
    videos = [s for s in container.streams.video if not s.disposition & _ATTACHED_PICTURE]
    if not videos:
        kinds = sorted({s.type for s in container.streams if s.type in ("audio", "subtitle", "data")})
        only = f" ({' and '.join(kinds)} only)" if kinds else ""
        raise VideoError(name, f"no video stream{only}", "give a file with video", "no_video_stream")
    stream = videos[0]
    if stream.codec_context is None:
        hint = "re-encode it as H.264, HEVC, VP9 or AV1"
        raise VideoError(name, "no decoder for its video stream", hint, "unsupported")
    stream.codec_context.thread_count = 1
    return stream


_ATTACHED_PICTURE = av.stream.Disposition.attached_pic


@dataclass(slots=True)
class Picture:
    """A decoded picture."""

    time_s: float  # presentation time in the stream's own clock
    frame: av.VideoFrame
    corrupt: bool  # damage was reported since the last keyframe before it
    after_damage: bool  # damage was reported since the picture before it: some may be lost between


Packets = Iterator["av.Packet[av.VideoStream] | None"]


def pictures(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    thin: Callable[[Packets], Packets] = lambda packets: packets,
) -> Iterator[Picture]:
    """Decodes from where the container stands, in ascending order of presentation.

    Pictures before the first keyframe (which may refer to what came before it) are left out. Damaged
    packets are passed over. ``thin`` may leave out packets that nothing else is decoded from.
    """
    tick = float(stream.time_base or 1)
    step = float(1 / stream.average_rate) if stream.average_rate else 0.0
    key_pts: int | None = None
    waiting = MAX_WAIT_PACKETS  # for a keyframe to start from
    recent_keys: deque[int] = deque(maxlen=8)
    damage: float | None = None  # presentation time of the latest packet that was damaged
    after_damage = False
    last = -math.inf
    for packet in thin(_packets(container, stream)):
        expected = last + step if last > -math.inf else -math.inf
        if packet is None:  # the container itself is damaged here
            damage, after_damage = expected, True
            continue
        when = packet.pts if packet.pts is not None else packet.dts
        if packet.size and packet.is_keyframe and when is not None:
            recent_keys.append(when)
            if waiting:
                key_pts = when
            waiting = 0
        if waiting and packet.size:
            waiting -= 1
            continue
        found: list[av.VideoFrame] = []
        broken = packet.is_corrupt
        try:
            found = packet.decode()
        except av.FFmpegError:
            broken = True
        if broken:
            at = when * tick if when is not None else expected
            damage, after_damage = max(at, damage or at), True
        for frame in found:
            pts = frame.pts if frame.pts is not None else frame.dts
            if pts is not None and key_pts is not None and pts < key_pts:
                continue
            time_s = pts * tick if pts is not None else max(last + step, 0.0)
            if frame.is_corrupt:
                damage, after_damage = max(time_s, damage or time_s), True
            elif damage is not None and time_s > damage and (frame.key_frame or pts in recent_keys):
                damage = None
            if time_s > last:  # repeated or rewound time stamps cannot be shown in order
                last = time_s
                yield Picture(time_s, frame, damage is not None, after_damage)
                after_damage = damage is not None


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> Packets:
    """Packets to the end, the empty one that flushes last; None where reading failed but went on.

    Raises:
        RemoteError: what is far away cannot be read any more; that is no end and no damage.
    """
    errors = 0
    while True:
        try:
            for packet in container.demux(stream):
                check_read(container)
                errors = 0
                yield packet
            return
        except av.FFmpegError:
            check_read(container)
            errors += 1
            if errors > MAX_READ_ERRORS:
                return
            yield None


def container_of(name: str, blob: Blob) -> str:
    """libav's name of the container, such as ``mpegts``."""
    with open_stream(name, blob) as (container, _):
        return str(container.format.name)


def packet_times(name: str, blob: Blob) -> np.ndarray:
    """Presentation times of all frames in the order of the packets: float64 [n], the stream's own clock,
    seconds. Reads the whole video, decodes nothing."""
    with open_stream(name, blob) as (container, stream):
        tick = float(stream.time_base or 1)
        packets = (p for p in _packets(container, stream) if p is not None and p.size and not p.is_discard)
        return np.array([p.pts * tick for p in packets if p.pts is not None])


class PyAV:
    """See :class:`ego2robot.decode.base.Backend`."""

    name = "pyav"
    devices: tuple[str, ...] = ("cpu",)
    planes: tuple[str, ...] = ("rgb",)

    def missing(self) -> str | None:
        return None  # the package depends on it

    def version(self) -> str:
        return f"{av.__version__} (FFmpeg {av.ffmpeg_version_info})"

    def refuses(self, info: VideoInfo) -> str | None:
        try:
            av.codec.Codec(info.codec, "r")
        except av.codec.codec.UnknownCodecError:
            return f"this FFmpeg has no decoder for {info.codec}"
        return None

    def read(
        self,
        name: str,
        blob: Blob,
        info: VideoInfo,
        times_s: np.ndarray,
        spec: FrameSpec,
        device: str,
        fast: bool = False,
    ) -> Iterator[FrameBatch]:
        if not len(times_s):
            return
        due = (np.asarray(times_s, np.float64) + info.start_s).tolist()
        try:
            with ExitStack() as stack:
                yield from _Pass(name, blob, info, due, fast, stack).batches(Batcher(name, spec, info))
        except (av.FFmpegError, OSError) as error:
            raise read_error(name, error) from None


class _Pass:
    """One forward pass over a stream for the pictures on screen at ``due`` (the stream's own clock)."""

    container: av.container.InputContainer
    stream: av.VideoStream

    def __init__(
        self, name: str, blob: Blob, info: VideoInfo, due: list[float], fast: bool, stack: ExitStack
    ) -> None:
        self.name, self.blob, self.info, self.due, self.stack = name, blob, info, due, stack
        self.fast = fast
        self.until = [t + EPSILON_S for t in due]  # a picture of this time is still on screen then
        self.left_out: deque[float] = deque(maxlen=4 * LOOKAHEAD)  # times of pictures that nobody asked for
        self.sought_s = -math.inf
        # Never so far from one to the next that jumping would pay: groups of pictures can be read ahead.
        gaps = (after - before for before, after in itertools.pairwise(due))
        self.dense = not fast and max(gaps, default=math.inf) <= WORTH_A_SEEK_S
        self._open()

    def batches(self, batcher: Batcher) -> Iterator[FrameBatch]:
        due, n, i = self.due, len(self.due), 0
        held: Picture | None = None
        start = self.info.start_s
        source = self._skip_to(due[0], start) or self._pictures()
        while i < n:
            picture = next(source, None)
            # The last picture stays for its own duration, any other until the next one comes.
            until = picture.time_s if picture else self._end_of(held)
            while i < n and due[i] + EPSILON_S < until:
                shown = held or picture  # nothing comes before the first picture of a video
                assert shown is not None
                # Around damage, a hole is a picture that was lost, not one that stays long.
                lost = picture is not None and picture.after_damage and self._hole(shown.time_s, until)
                full = batcher.add(shown.frame, shown.time_s - start, shown.corrupt or lost)
                i += 1
                if full:
                    yield full
            if picture is None:
                break
            held = picture
            if i < n and (ahead := self._skip_to(due[i], picture.time_s)):
                source, held = ahead, None
        if held is None and i == 0:
            raise VideoError(self.name, "no picture can be decoded", "re-download or re-encode the file")
        if rest := batcher.take():
            yield rest

    def _open(self) -> None:
        self.stack.close()
        self.container, self.stream = self.stack.enter_context(open_stream(self.name, self.blob))
        self.tick = float(self.stream.time_base or 1)
        context = self.stream.codec_context
        self.references = References(self.info.codec, context.extradata)
        if self.fast:
            context.options = {"skip_loop_filter": "noref"}
            context.flags2 |= Flags2.fast

    def _pictures(self) -> Iterator[Picture]:
        return pictures(self.container, self.stream, self._thin)

    def _thin(self, packets: Packets) -> Packets:
        if self.dense:
            packets = trimmed(packets, self.references, self.until, self.tick, self.left_out.append)
        due = self.until if not self.fast else []
        return needed(packets, self.references, due, self.tick, self.left_out.append)

    def _hole(self, shown_s: float, until_s: float) -> bool:
        """Whether the picture after the one shown never came, counting those that were left out."""
        next_s = min((t for t in self.left_out if shown_s < t < until_s), default=until_s)
        return next_s - shown_s > 1.5 / self.info.fps

    def _end_of(self, last: Picture | None) -> float:
        if last is None:
            return -math.inf
        return last.time_s + max(last.frame.duration * self.tick, 1 / self.info.fps)

    def _skip_to(self, target_s: float, now_s: float) -> Iterator[Picture] | None:
        """Pictures from the last keyframe before ``target_s``, or None when decoding on is no slower."""
        if target_s - now_s <= WORTH_A_SEEK_S or target_s == self.sought_s:
            return None
        index = self.stream.index_entries
        if len(index) and index[-1].timestamp * self.tick >= target_s:
            k = index.search_timestamp(math.floor(target_s / self.tick), backward=True)
            if k < 0 or index[k].timestamp * self.tick - now_s <= WORTH_A_SEEK_S:
                return None
        elif target_s - now_s <= WORTH_A_BLIND_SEEK_S:
            return None
        self.sought_s = target_s  # once: a seek that had to go further back would be tried for ever
        back = 0.0
        while target_s - back > self.info.start_s:
            try:
                self.container.seek(math.floor((target_s - back) / self.tick), stream=self.stream)
            except av.FFmpegError:
                break
            source = self._pictures()
            first = next(source, None)
            # Indices go by decoding time, some containers only guess: too late means try earlier.
            if first and first.time_s <= target_s + EPSILON_S:
                return itertools.chain((first,), source)
            back = max(1.0, 2 * back)
        self._open()
        return self._pictures()
