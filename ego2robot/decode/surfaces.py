"""From decoded surfaces to the frames that every stage shares. The same for every decoder that leaves
luma and chroma planes on a device.

A surface is what a hardware decoder writes: full size, NV12 or P010, pitched. It belongs to the decoder
and may be overwritten by the next packet, so the few that are due are converted at once, straight into
the batch; the others are never read. Packets come from libav, as on the CPU: exact times, byte ranges,
seeks and damaged containers are the same for all.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import av
import numpy as np
import torch
from ego2robot_kernels.motion import SIZE as GREY_SIZE

from ego2robot.blobs import read_error
from ego2robot.decode.base import FrameBatch
from ego2robot.decode.packets import LOOKAHEAD, References, needed
from ego2robot.decode.pyav import (
    EPSILON_S,
    MAX_READ_ERRORS,
    MAX_WAIT_PACKETS,
    WORTH_A_BLIND_SEEK_S,
    WORTH_A_SEEK_S,
    check_read,
    open_stream,
)
from ego2robot.errors import VideoError
from ego2robot.types import Blob, FrameSpec, VideoInfo

BATCH = 16
MAX_HELD_BACK = 128  # packets without a picture, before a decoder is given up; codecs reorder 16
Matrix = Literal["bt601", "bt709", "bt2020"]
Siting = Literal["left", "center", "topleft"]
# ITU-T H.273 matrix coefficients; 2 is "unspecified", which swscale takes for BT.601.
MATRICES: dict[int, Matrix] = {
    1: "bt709", 2: "bt601", 4: "bt601", 5: "bt601", 6: "bt601", 9: "bt2020", 10: "bt2020",
}  # fmt: skip
HINT = "use decode.backend=pyav"


class DamagedPacketError(Exception):
    """A packet that the decoder rejects; decoding goes on behind it."""


class DecoderError(Exception):
    """The decoder cannot go on with this video: another one has to."""


class Planes(NamedTuple):
    """One picture on the device.

    Attributes:
        luma: uint8, or uint16 with the value in the high bits, [H, W], any row stride.
        chroma: same type, [ceil(H / 2), ceil(W / 2), 2].
        damaged: it is not to be used; what else is damaged is told with the next picture.
    """

    luma: torch.Tensor
    chroma: torch.Tensor
    matrix: Matrix
    full_range: bool
    siting: Siting = "left"
    damaged: bool = False


class Decoded(NamedTuple):
    """A picture as an engine hands it over, in order of presentation.

    Attributes:
        pts: of the packet it came in, in the stream's time base; None where that had none.
        planes: its planes; only called before the engine gets its next packet, unless ``lasts``.
        lasts: the planes stay as they are for as long as this is held.
        damage: pts of the latest picture, shown or yet to come, that was found to be damaged by now.
    """

    pts: int | None
    corrupt: bool
    planes: Callable[[], Planes]
    lasts: bool
    damage: int | None = None


class Engine(Protocol):
    """A decoder of one stream's packets."""

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """The CUDA stream on which planes become ready and are converted; None on a CPU."""

    @property
    def silent(self) -> bool:
        """It does not report pictures that it dropped."""

    def decode(self, packet: av.Packet) -> list[Decoded]:
        """Raises av.FFmpegError, DamagedPacketError or DecoderError."""

    def drain(self) -> list[Decoded]:
        """The pictures that are left at the end of the stream."""

    def reset(self) -> None:
        """Forgets the stream's position; the next packet is a keyframe."""


@dataclass(slots=True)
class Surface:
    """A picture in its place in the stream.

    Attributes:
        time_s: in the stream's own clock.
        duration_s: as the container says, 0 where it does not.
        corrupt: damage was reported since the last keyframe before it.
        after_damage: damage was reported since the picture before it: some may be lost between.
        next_s: the earliest later presentation time of a packet that is already known.
    """

    time_s: float
    duration_s: float
    corrupt: bool
    after_damage: bool
    next_s: float
    planes: Callable[[], Planes]
    lasts: bool


class Source(Protocol):
    """Surfaces of one video, from where it stands."""

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """As of :class:`Engine`."""

    @property
    def left_out(self) -> Iterable[float]:
        """Times of the latest pictures that were not decoded, as they are neither due nor needed."""

    def surfaces(self) -> Iterator[Surface]:
        """In ascending order of ``time_s``. One may only be read before the next is asked for."""

    def jump(self, target_s: float, now_s: float) -> Iterator[Surface] | None:
        """Surfaces from the last keyframe before ``target_s``; None when decoding on is no slower."""


def read(
    name: str, source: Source, info: VideoInfo, times_s: np.ndarray, spec: FrameSpec, device: str
) -> Iterator[FrameBatch]:
    """The frames on screen at ``times_s``, as :meth:`ego2robot.decode.base.Backend.read` promises.

    Frames on a GPU are ready for the stream that is current when their batch is taken.

    Raises:
        VideoError: ``unsupported`` when the decoder cannot go on; no picture can be decoded.
    """
    picker = _Picker(info, times_s, spec, device, source)
    surfaces = source.jump(picker.due[0], info.start_s) or source.surfaces()
    while not picker.done:
        surface = next(surfaces, None)
        at = picker.at
        yield from picker.show(surface)
        if surface is None:
            break
        if not picker.done and picker.at > at and (ahead := source.jump(picker.next_due, surface.time_s)):
            surfaces = ahead
            picker.forget()
    if picker.at == 0 and not picker.seen:
        raise VideoError(name, "no picture can be decoded", "re-download or re-encode the file")
    if rest := picker.take():
        yield rest


def read_packets(
    name: str,
    blob: Blob,
    info: VideoInfo,
    times_s: np.ndarray,
    spec: FrameSpec,
    device: str,
    make: Callable[[av.VideoStream], AbstractContextManager[Engine]],
    fast: bool = False,
) -> Iterator[FrameBatch]:
    """:func:`read` of the packets of a video; arguments as of :class:`PacketSource`."""
    if not len(times_s):
        return
    try:
        with PacketSource(name, blob, info, times_s, make, fast) as source:
            yield from read(name, source, info, times_s, spec, device)
    except DecoderError as error:
        raise VideoError(name, str(error), HINT, "unsupported") from None
    except (av.FFmpegError, OSError) as error:
        raise read_error(name, error) from None


class _Picker:
    """Finds the surfaces that are on screen at the due times and draws them into batches."""

    def __init__(
        self,
        info: VideoInfo,
        times_s: np.ndarray,
        spec: FrameSpec,
        device: str,
        source: Source,
    ) -> None:
        self.due: list[float] = (np.asarray(times_s, np.float64) + info.start_s).tolist()
        self.at = 0  # index of the due time that is filled next
        self.seen = False
        self._info, self._spec, self._device = info, spec, device
        self._source, self._stream = source, source.stream
        self._content = spec.content(info.width, info.height)
        self._held: Surface | None = None
        self._drawn: tuple[Surface, torch.Tensor, torch.Tensor] | None = None  # what one became
        self._first = 0
        self._frames_THWC: torch.Tensor | None = None
        self._greys: list[torch.Tensor] = []
        self._times: list[float] = []
        self._corrupt: list[bool] = []

    @property
    def done(self) -> bool:
        return self.at == len(self.due)

    @property
    def next_due(self) -> float:
        return self.due[self.at]

    def forget(self) -> None:
        """Nothing is on screen: the source has jumped."""
        self._held = self._drawn = None

    def show(self, surface: Surface | None) -> Iterator[FrameBatch]:
        """Takes the next surface (None: the stream has ended); yields batches that became full."""
        held = self._held
        if surface:
            self.seen, until = True, surface.time_s
        else:  # the last picture stays for its own duration, any other until the next one comes
            until = held.time_s + max(held.duration_s, 1 / self._info.fps) if held else -math.inf
        while not self.done and self.next_due + EPSILON_S < until:
            shown = held or surface
            assert shown is not None
            # Around damage, a hole is a picture that was lost, not one that stays long.
            lost = surface is not None and surface.after_damage and self._hole(shown.time_s, until)
            early = shown.time_s > self.next_due + EPSILON_S  # its predecessor could not be decoded
            self._fill(shown, shown.corrupt or lost or early)
            self.at += 1
            if len(self._times) == BATCH:
                yield self._taken()
        self._held = surface
        if surface is None or self.done or surface.lasts or self._is_drawn(surface):
            return
        # It must be read now or never. Where a packet for a later picture, still before the due time,
        # is known, never: should that one be lost, the frame counts as damaged.
        if surface.next_s > self.next_due + EPSILON_S:
            self._draw(surface)

    def take(self) -> FrameBatch | None:
        """What has been collected, None where that is nothing."""
        return self._taken() if self._times else None

    def _hole(self, shown_s: float, until_s: float) -> bool:
        """Whether the picture after the one shown never came, counting those that were left out."""
        next_s = min((t for t in self._source.left_out if shown_s < t < until_s), default=until_s)
        return next_s - shown_s > 1.5 / self._info.fps

    def _fill(self, shown: Surface, corrupt: bool) -> None:
        k = len(self._times)
        if shown is self._held and not (shown.lasts or self._is_drawn(shown)):
            corrupt = True  # overwritten, as a later picture was promised that never came
        with self._on_stream():
            frames_THWC = self._batch()
            if corrupt:
                frames_THWC[k].zero_()
                self._greys.append(self._no_grey())
            else:
                frame_HWC, grey_hw = self._draw(shown)
                corrupt = shown.corrupt
                if frame_HWC.data_ptr() != frames_THWC[k].data_ptr():
                    frames_THWC[k].copy_(frame_HWC)
                self._greys.append(grey_hw)
        self._times.append(shown.time_s - self._info.start_s)
        self._corrupt.append(corrupt)

    def _draw(self, surface: Surface) -> tuple[torch.Tensor, torch.Tensor]:
        """Converts a surface into the next free frame of the batch: frame [H, W, 3] and grey [h, w]."""
        if self._drawn and self._is_drawn(surface):
            return self._drawn[1:]
        from ego2robot_kernels.surface import convert_surfaces

        luma, chroma, matrix, full_range, siting, damaged = surface.planes()
        surface.corrupt |= damaged
        stored_height = self._info.width if self._info.rotation % 180 else self._info.height
        if len(luma) != stored_height:  # another size on the way, or a crop that was not applied
            raise DecoderError(f"pictures are {len(luma)} rows high, not {stored_height}")
        k = len(self._times)
        with self._on_stream():
            frames_THWC = self._batch()
            out = frames_THWC[k : k + 1]
            _, grey_Bhw = convert_surfaces(
                [luma],
                [chroma],
                height=self._spec.height,
                width=self._spec.width,
                content=self._content,
                rotation=self._info.rotation,
                matrix=matrix,
                full_range=full_range,
                out=out,
                siting=siting,
            )
        self._drawn = surface, out[0], grey_Bhw[0]
        return self._drawn[1:]

    def _is_drawn(self, surface: Surface) -> bool:
        return self._drawn is not None and self._drawn[0] is surface

    def _batch(self) -> torch.Tensor:
        if self._frames_THWC is None:
            shape = (BATCH, self._spec.height, self._spec.width, 3)
            self._frames_THWC = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        return self._frames_THWC

    def _no_grey(self) -> torch.Tensor:
        return torch.zeros(GREY_SIZE, dtype=torch.uint8, device=self._device)

    def _taken(self) -> FrameBatch:
        n, frames_THWC = len(self._times), self._frames_THWC
        assert frames_THWC is not None
        with self._on_stream():
            greys_Thw = torch.stack(self._greys)
        if self._stream is not None:
            caller = torch.cuda.current_stream(frames_THWC.device)
            caller.wait_stream(self._stream)
            for tensor in (frames_THWC, greys_Thw):
                tensor.record_stream(caller)
        batch = FrameBatch(
            self._first, frames_THWC[:n], np.array(self._times), np.array(self._corrupt), greys_Thw
        )
        self._first += n
        self._frames_THWC, self._greys, self._times, self._corrupt = None, [], [], []
        return batch

    def _on_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()


class _Known:
    """What the packets that were read say about pictures that are still to come.

    Attributes:
        start: pts of the keyframe that decoding started from; what comes before it is not shown.
        keys: pts of the latest keyframes, more of them than any decoder holds back.
        coming: heap of pts and duration of the pictures that are not out.
    """

    def __init__(self) -> None:
        self.start: int | None = None
        self.keys: deque[int] = deque(maxlen=64)
        self.coming: list[tuple[int, int]] = []

    def pop(self, pts: int | None) -> tuple[int, int | None]:
        """The duration of the picture that is out now, and the latest one that was skipped before it."""
        duration, dropped = 0, None
        while pts is not None and self.coming and self.coming[0][0] <= pts:
            due, length = heapq.heappop(self.coming)
            if due == pts:
                duration = length
            elif self.start is None or due >= self.start:
                dropped = due
        return duration, dropped


class Seeker:
    """Where in a stream it is worth jumping to.

    Args:
        start_s: presentation time of the video's first picture.
    """

    def __init__(self, stream: av.VideoStream, start_s: float) -> None:
        self._stream, self._start_s = stream, start_s
        self._tick = float(stream.time_base or 1)
        self._sought_s = -math.inf

    def worthwhile(self, target_s: float, now_s: float) -> bool:
        """Whether a jump to ``target_s`` beats decoding on from ``now_s``."""
        if target_s - now_s <= WORTH_A_SEEK_S or target_s == self._sought_s:
            return False
        index = self._stream.index_entries
        if len(index) and index[-1].timestamp * self._tick >= target_s:
            k = index.search_timestamp(math.floor(target_s / self._tick), backward=True)
            if k < 0 or index[k].timestamp * self._tick - now_s <= WORTH_A_SEEK_S:
                return False
        elif target_s - now_s <= WORTH_A_BLIND_SEEK_S:
            return False
        self._sought_s = target_s  # once: a seek that had to go further back would be tried for ever
        return True

    def tries(self, target_s: float) -> Iterator[int]:
        """Positions to seek to, in ticks. Indices go by decoding time, some containers only guess: what
        turns out to be too late is tried further back."""
        back = 0.0
        while target_s - back > self._start_s:
            yield math.floor((target_s - back) / self._tick)
            back = max(1.0, 2 * back)


class PacketSource:
    """Surfaces of the packets that libav's demuxer reads, decoded by an engine.

    Args:
        times_s: the due times. Pictures that are on screen at none and that no other refers to are not
            decoded.
        make: the engine for a stream; the source keeps it until it is closed.
        fast: leave out all pictures that no other refers to, due or not.
    """

    def __init__(
        self,
        name: str,
        blob: Blob,
        info: VideoInfo,
        times_s: np.ndarray,
        make: Callable[[av.VideoStream], AbstractContextManager[Engine]],
        fast: bool = False,
    ) -> None:
        self._name, self._blob, self._codec = name, blob, info.codec
        due = np.asarray(times_s, np.float64) + info.start_s + EPSILON_S
        self._due: list[float] = [] if fast else due.tolist()
        self.left_out: deque[float] = deque(maxlen=4 * LOOKAHEAD)
        self._stack = ExitStack()
        self._open()
        self._seeker = Seeker(self._stream, info.start_s)
        self._engine = self._stack.enter_context(make(self._stream))
        self.stream = self._engine.stream

    def __enter__(self) -> PacketSource:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._file.close()

    def surfaces(self) -> Iterator[Surface]:
        """As libav's own pictures are judged: none before the first keyframe, damaged packets are passed
        over, and everything is suspect from there to the next keyframe."""
        tick = self._tick
        step = float(1 / self._stream.average_rate) if self._stream.average_rate else 0.0
        known = _Known()
        damage: float | None = None  # presentation time of the latest packet that was damaged
        after_damage = False
        last = -math.inf
        # One packet is read ahead, so that where pictures are not reordered the next time is known.
        for packet in _one_ahead(self._chosen(known)):
            expected = last + step if last > -math.inf else -math.inf
            if packet is None:  # the container itself is damaged here
                damage, after_damage = expected, True
                continue
            when = packet.pts if packet.pts is not None else packet.dts
            found: list[Decoded] = []
            broken = packet.is_corrupt
            try:
                found = self._engine.decode(packet) if packet.size else self._engine.drain()
            except (av.FFmpegError, DamagedPacketError):
                broken = True
            if broken:
                at = when * tick if when is not None else expected
                damage, after_damage = max(at, damage or at), True
            for pts, corrupt, planes, lasts, damage_pts in found:
                if pts is not None and known.start is not None and pts < known.start:
                    continue
                time_s = pts * tick if pts is not None else max(last + step, 0.0)
                duration, dropped = known.pop(pts)
                if dropped is not None and self._engine.silent and dropped * tick > last:
                    damage, after_damage = max(dropped * tick, damage or -math.inf), True
                if damage_pts is not None and (known.start is None or damage_pts >= known.start):
                    damage, after_damage = max(damage_pts * tick, damage or -math.inf), True
                if corrupt:
                    damage, after_damage = max(time_s, damage or time_s), True
                elif damage is not None and time_s > damage and pts in known.keys:
                    damage = None
                if time_s > last:  # repeated or rewound time stamps cannot be shown in order
                    last = time_s
                    next_s = known.coming[0][0] * tick if known.coming else math.inf
                    suspect = damage is not None
                    length_s = duration * tick
                    surface = Surface(time_s, length_s, suspect, after_damage, next_s, planes, lasts)
                    yield surface
                    after_damage = suspect
                    if surface.corrupt and not suspect:  # it came to light when it was read
                        damage, after_damage = time_s, True

    def _chosen(self, known: _Known) -> Iterator[av.Packet | None]:
        """Packets that are to be decoded, from the first keyframe on; None where reading failed."""
        waiting = MAX_WAIT_PACKETS  # for a keyframe to start from
        references = References(self._codec, self._stream.codec_context.extradata)
        for packet in needed(self._packets(), references, self._due, self._tick, self.left_out.append):
            if packet is None or not packet.size:
                yield packet
                continue
            when = packet.pts if packet.pts is not None else packet.dts
            if packet.is_keyframe and when is not None:
                known.keys.append(when)
                if waiting:
                    known.start = when
                waiting = 0
            if waiting:
                waiting -= 1
                continue
            if packet.pts is not None and not packet.is_discard:
                heapq.heappush(known.coming, (packet.pts, packet.duration or 0))
                if len(known.coming) > MAX_HELD_BACK:
                    raise DecoderError(f"no picture comes of {MAX_HELD_BACK} packets")
            yield packet

    def jump(self, target_s: float, now_s: float) -> Iterator[Surface] | None:
        if not self._seeker.worthwhile(target_s, now_s):
            return None
        for at in self._seeker.tries(target_s):
            try:
                self._container.seek(at, stream=self._stream)
            except av.FFmpegError:
                break
            self._engine.reset()
            source = self.surfaces()
            first = next(source, None)
            if first and first.time_s <= target_s + EPSILON_S:
                return itertools.chain((first,), source)
        self._file.close()
        self._open()
        self._engine.reset()
        return self.surfaces()

    def _open(self) -> None:
        self._file = ExitStack()
        self._container, self._stream = self._file.enter_context(open_stream(self._name, self._blob))
        self._tick = float(self._stream.time_base or 1)

    def _packets(self) -> Iterator[av.Packet | None]:
        """Packets to the end, the empty one that flushes last; None where reading failed but went on."""
        errors = 0
        while True:
            try:
                for packet in self._container.demux(self._stream):
                    check_read(self._container)
                    errors = 0
                    yield packet
                return
            except av.FFmpegError:
                check_read(self._container)
                errors += 1
                if errors > MAX_READ_ERRORS:
                    return
                yield None


def planes(luma: torch.Tensor, chroma: torch.Tensor, codec: str, space: int, colour_range: int) -> Planes:
    """Planes with the colours that libav's tags mean (ITU-T H.273 matrix; range 2 is full).

    Raises:
        DecoderError: a matrix that the conversion does not know.
    """
    if space not in MATRICES:
        raise DecoderError(f"colours are stored with matrix {space} of ITU-T H.273")
    siting: Siting = "left" if codec in ("h264", "hevc") else "center"
    return Planes(luma, chroma, MATRICES[space], colour_range == 2, siting)


class Scaled:
    """Collects full-size RGB pictures that a decoder left on a device, scaled into frames, in batches.

    For decoders that give no surfaces. The box average is computed in float32: within one level of what
    :func:`ego2robot_kernels.surface.convert_surfaces` gives.

    Args:
        info: ``rotation`` 0 where the decoder has turned its pictures.
    """

    def __init__(self, info: VideoInfo, spec: FrameSpec, device: str) -> None:
        self._shape = (BATCH, spec.height, spec.width, 3)
        self._turns, self._device = info.rotation // 90, device
        self._top, self._left, self._height, self._width = spec.content(info.width, info.height)
        self._weights: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.first = 0  # index into the due times of the batch's first frame
        self._frames_THWC: torch.Tensor | None = None
        self._times: list[float] = []
        self._corrupt: list[bool] = []

    def add(self, rgb_HWC: torch.Tensor | None, time_s: float, corrupt: bool) -> FrameBatch | None:
        """Takes the next due picture (None: lost, stays black); returns the batch when it is full."""
        if self._frames_THWC is None:
            self._frames_THWC = torch.zeros(self._shape, dtype=torch.uint8, device=self._device)
        if rgb_HWC is not None:
            upright_HWC = torch.rot90(rgb_HWC, -self._turns, (0, 1))
            frame_HWC = self._frames_THWC[len(self._times)]
            inside = frame_HWC[self._top :, self._left :][: self._height, : self._width]
            inside.copy_(self._scaled(upright_HWC))
        self._times.append(time_s)
        self._corrupt.append(corrupt)
        return self.take() if len(self._times) == BATCH else None

    def take(self) -> FrameBatch | None:
        """What has been collected, None where that is nothing."""
        n = len(self._times)
        if self._frames_THWC is None or not n:
            return None
        frames_THWC = self._frames_THWC[:n]
        batch = FrameBatch(self.first, frames_THWC, np.array(self._times), np.array(self._corrupt))
        self.first += n
        self._frames_THWC, self._times, self._corrupt = None, [], []
        return batch

    def _scaled(self, rgb_HWC: torch.Tensor) -> torch.Tensor:
        size = rgb_HWC.shape[0], rgb_HWC.shape[1]
        if size not in self._weights:
            down, across = area_weights(size[0], self._height), area_weights(size[1], self._width)
            self._weights = {size: (down.to(self._device), across.to(self._device))}
        down_hH, across_wW = self._weights[size]
        rows = torch.einsum("hH,HWc->hWc", down_hH, rgb_HWC.float())
        small = torch.einsum("wW,hWc->hwc", across_wW, rows)
        return small.add_(0.5).clamp_(0, 255.5)


def area_weights(n: int, target: int) -> torch.Tensor:
    """float32 [target, n]: how much of each of ``n`` samples is in each of ``target``: box average where
    they become fewer, linear interpolation between centres where they become more."""
    if target <= n:
        edges = np.arange(target + 1) * (n / target)
        at = np.arange(n)
        inside = np.minimum(edges[1:, None], at + 1) - np.maximum(edges[:-1, None], at)
        weights = np.clip(inside, 0, None)
    else:
        centres = np.clip((np.arange(target) + 0.5) * n / target - 0.5, 0, n - 1)
        weights = np.clip(1 - np.abs(centres[:, None] - np.arange(n)), 0, None)
    return torch.from_numpy((weights / weights.sum(1, keepdims=True)).astype(np.float32))


def _one_ahead(packets: Iterator[av.Packet | None]) -> Iterator[av.Packet | None]:
    for packet, _ in itertools.pairwise(itertools.chain(packets, (None,))):
        yield packet


class EnginePool:
    """Engines that are kept for the next video of the same kind, per thread.

    Args:
        keep: how many are kept idle in one thread; each holds its surfaces on the GPU.
    """

    def __init__(self, keep: int = 2) -> None:
        self._local = threading.local()
        self._keep = keep

    def take(self, key: object) -> Any | None:
        """An idle engine of this kind, None where there is none."""
        return self._idle.pop(key, None)

    def give(self, key: object, engine: Any) -> list[Any]:
        """Keeps an engine that has been reset; returns those that have to go, unused for longest."""
        gone = [self._idle.pop(key)] if key in self._idle else []
        self._idle[key] = engine
        while len(self._idle) > self._keep:
            gone.append(self._idle.popitem(last=False)[1])
        return gone

    @property
    def _idle(self) -> OrderedDict[object, Any]:
        if not hasattr(self._local, "idle"):
            self._local.idle = OrderedDict()
        idle: OrderedDict[object, Any] = self._local.idle
        return idle
