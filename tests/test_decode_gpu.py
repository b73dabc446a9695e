"""Decoders that leave surfaces on a device give the same frames as the CPU.

What picks, times and converts surfaces is the same for all of them and is held to the contract here on
any machine, with surfaces that libav decodes on the CPU; the decoders themselves are held to it wherever
their GPU and their library exist.
"""

from __future__ import annotations

import ctypes
import itertools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import av
import numpy as np
import pytest
import torch
from ego2robot_kernels.camera import small_greys
from ego2robot_kernels.motion import grey_small
from hypothesis import given
from hypothesis import strategies as st

from ego2robot.decode import cuvid, hardware, policy, probe, read_clips, surfaces
from ego2robot.decode.base import Backend, FrameBatch
from ego2robot.decode.bitstream import StartCodes, headers, vp9_shown
from ego2robot.decode.policy import backends
from ego2robot.decode.surfaces import Decoded, Planes
from ego2robot.errors import UserError, VideoError
from ego2robot.types import Blob, Clip, ClipFrames, FrameSpec, VideoInfo
from tests.footage import frame_number, remux, rotate, write_flat, write_video

SPEC = FrameSpec(180, 320)
SMALL = FrameSpec(90, 160)
PYAV = backends()["pyav"]
SAMPLES = Path(__file__).parents[1].parent / "shared" / "samples"


class SoftwareEngine:
    """Surfaces that libav decodes on the CPU: NV12 or P010, pitched.

    With ``lasts=False`` a surface is overwritten with noise at the next packet, as a hardware decoder
    may do; with ``silent`` it drops what is damaged without a word.
    """

    stream = None

    def __init__(self, stream: av.VideoStream, lasts: bool, silent: bool) -> None:
        self.silent, self._lasts = silent, lasts
        self._tags = stream.codec_context
        self._context = av.CodecContext.create(stream.codec_context.name, "r")
        self._context.extradata = stream.codec_context.extradata
        self._context.thread_count = 1
        self._lent: list[np.ndarray] = []
        self.read = self.packets = 0

    def decode(self, packet: av.Packet) -> list[Decoded]:
        self._overwrite()
        self.packets += 1
        try:
            return self._decoded(self._context.decode(packet))
        except av.FFmpegError:
            if self.silent:
                return []
            raise

    def drain(self) -> list[Decoded]:
        self._overwrite()
        return self._decoded(self._context.decode(None))

    def reset(self) -> None:
        self._overwrite()
        self._context.flush_buffers()

    def _decoded(self, frames: list[av.VideoFrame]) -> list[Decoded]:
        if self.silent:
            frames = [frame for frame in frames if not frame.is_corrupt]
        return [Decoded(f.pts, f.is_corrupt, lambda f=f: self._planes(f), self._lasts) for f in frames]

    def _planes(self, frame: av.VideoFrame) -> Planes:
        self.read += 1
        deep = frame.format.components[0].bits > 8
        dtype = np.uint16 if deep else np.uint8

        def stored(index: int, height: int, width: int) -> np.ndarray:
            plane = frame.planes[index]
            rows = np.frombuffer(memoryview(plane), dtype).reshape(-1, plane.line_size // dtype().itemsize)
            return rows[:height, :width] << (16 - frame.format.components[0].bits if deep else 0)

        half = (-(-frame.height // 2), -(-frame.width // 2))
        luma = np.zeros((frame.height, frame.width + 24), dtype)  # pitched
        luma[:, : frame.width] = stored(0, frame.height, frame.width)
        chroma = np.stack([stored(1, *half), stored(2, *half)], -1)
        self._lent += [luma, chroma]
        space = frame.colorspace if frame.colorspace != 2 else self._tags.colorspace
        full = frame.color_range or self._tags.color_range
        return surfaces.planes(
            torch.from_numpy(luma)[:, : frame.width],
            torch.from_numpy(chroma),
            self._tags.codec.canonical_name,
            int(space),
            int(full),
        )

    def _overwrite(self) -> None:
        if not self._lasts:
            for plane in self._lent:
                plane[:] = np.random.default_rng(0).integers(0, 255, plane.shape)
        self._lent = []


def blob_of(path: Path) -> Blob:
    return Blob(str(path), 0, path.stat().st_size)


Reader = Callable[[Blob, VideoInfo, np.ndarray, FrameSpec], Iterator[FrameBatch]]


def software(
    lasts: bool = True, silent: bool = False, fast: bool = False, made: list[SoftwareEngine] | None = None
) -> Reader:
    def engine(stream: av.VideoStream) -> AbstractContextManager[SoftwareEngine]:
        found = SoftwareEngine(stream, lasts, silent)
        if made is not None:
            made.append(found)
        return nullcontext(found)

    return lambda blob, info, due, spec: surfaces.read_packets(
        "video", blob, info, due, spec, "cpu", engine, fast
    )


class FakeDriver:
    """What nvcuvid does, with libav in the place of the engine: a parser that calls back, surfaces by
    number, pitched and larger than the picture, that are overwritten when their number comes round."""

    def __init__(self, info: VideoInfo) -> None:
        self.decoder = av.CodecContext.create({"av1": "libdav1d"}.get(info.codec, info.codec), "r")
        self.info = info
        self.surfaces: dict[int, tuple[av.VideoFrame, np.ndarray]] = {}
        self.decoding: dict[int, int] = {}  # pts to surface
        self.next = self.mapped = self.wanted = 0
        self.out: list[int] = []

    def cuvidCreateVideoParser(self, handle: Any, parameters: Any) -> int:
        handle._obj.value, self.calls = 1, parameters._obj
        return 0

    def cuvidCreateDecoder(self, handle: Any, wanted: Any) -> int:
        handle._obj.value, self.wanted = 2, wanted._obj.surfaces
        return 0

    def cuvidParseVideoData(self, _: Any, packet: Any) -> int:
        given = packet._obj
        if given.flags & cuvid.PACKET_END:
            frames = self.decoder.decode(None)
            self.decoder.flush_buffers()
        else:
            part = av.Packet(ctypes.string_at(given.payload, given.size))
            part.pts = given.timestamp
            try:
                frames = self.decoder.decode(part)
            except av.FFmpegError:
                return 0  # the driver says nothing either
            if not self._decode(given.timestamp):
                return 1
        for frame in frames:
            if frame.pts not in self.decoding and not self._decode(frame.pts):  # of the first packet
                return 1
            index = self.decoding.pop(frame.pts)
            self.surfaces[index] = frame, self._stored(frame)
            shown = cuvid._Display(index=index, progressive=1, timestamp=frame.pts)
            if not self.calls.on_display(None, ctypes.pointer(shown)):
                return 1
        if given.flags & cuvid.PACKET_END:
            self.decoding.clear()
        return 0

    def _decode(self, pts: int) -> bool:
        sideways = self.info.rotation % 180
        width, height = (
            (self.info.height, self.info.width) if sideways else (self.info.width, self.info.height)
        )
        form = cuvid._Format(
            min_surfaces=4,
            coded_width=-(-width // 16) * 16,
            coded_height=-(-height // 16) * 16,
            display=cuvid._Rect(0, 0, width, height),
            chroma=1,
            bit_depth_minus_8=self.info.bit_depth - 8,
        )
        if not self.wanted and not self.calls.on_sequence(None, ctypes.pointer(form)):
            return False
        if pts in self.decoding or not self.decoder.width:  # headers alone
            return True
        while self.next in self.decoding.values():
            self.next = (self.next + 1) % self.wanted
        self.decoding[pts] = self.next
        self.surfaces.pop(self.next, None)
        self.next = (self.next + 1) % self.wanted
        head = cuvid._PictureHead(index=self.decoding[pts])
        return bool(self.calls.on_decode(None, ctypes.pointer(head)))

    def _stored(self, frame: av.VideoFrame) -> np.ndarray:
        deep = self.info.bit_depth > 8
        height, width = -(-frame.height // 16) * 16, -(-frame.width // 16) * 16
        dtype = np.uint16 if deep else np.uint8
        rows = np.zeros((height + height // 2, width + 32), dtype)
        for index, plane in enumerate(frame.planes):
            h, w = (frame.height, frame.width) if not index else (-(-frame.height // 2), -(-frame.width // 2))
            samples = np.frombuffer(memoryview(plane), dtype).reshape(-1, plane.line_size // dtype().itemsize)
            samples = samples[:h, :w] << (6 if deep else 0)
            if index:
                rows[height : height + h, index - 1 : 2 * w : 2] = samples
            else:
                rows[:h, :w] = samples
        return rows

    def cuvidDecodePicture(self, *_: Any) -> int:
        return 0

    def cuvidGetDecodeStatus(self, _: Any, index: int, status: Any) -> int:
        if index in self.decoding.values():
            status._obj.status = cuvid.IN_PROGRESS
        else:
            corrupt = index in self.surfaces and self.surfaces[index][0].is_corrupt
            status._obj.status = cuvid.CONCEALED if corrupt else 2
        return 0

    def cuvidMapVideoFrame64(self, _: Any, index: int, address: Any, pitch: Any, process: Any) -> int:
        assert not self.out, "the driver has few surfaces to hand out: one at a time"
        rows = self.surfaces[index][1]
        address._obj.value, pitch._obj.value = rows.ctypes.data, rows.strides[0]
        self.out.append(rows.ctypes.data)
        self.mapped += 1
        return 0

    def cuvidUnmapVideoFrame64(self, _: Any, address: int) -> int:
        self.out.remove(address)
        return 0

    def cuvidDestroyVideoParser(self, _: Any) -> int:
        return 0

    cuvidDestroyDecoder = cuvidDestroyVideoParser


class FakeEngine(cuvid.DriverEngine):
    stream = None  # type: ignore[assignment]


def host_planes(
    luma: int,
    chroma: int,
    pitch: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    device: int,
    owner: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    kind = np.uint8 if dtype == torch.uint8 else np.uint16
    found = []
    for address, rows in ((luma, height), (chroma, -(-height // 2))):
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * (rows * pitch)).from_address(address))
        found.append(torch.from_numpy(memory.view(kind).reshape(rows, -1)[:, :width]))
    return found[0], found[1].unflatten(1, (-1, 2))


def driver(made: list[FakeDriver] | None = None) -> Reader:
    """The engine that speaks to the driver, with a driver that is not there."""

    def reader(blob: Blob, info: VideoInfo, due: np.ndarray, spec: FrameSpec) -> Iterator[FrameBatch]:
        @contextmanager
        def engine(stream: av.VideoStream) -> Iterator[FakeEngine]:
            fake = FakeDriver(info)
            if made is not None:
                made.append(fake)
            with ExitStack() as stack:
                for place, name, value in (
                    (cuvid, "_library", lambda: fake),
                    (cuvid, "_driver", MagicMock()),
                    (cuvid.hardware, "context", lambda _: 1),
                    (cuvid.hardware, "device_planes", host_planes),
                    (torch.cuda, "Stream", MagicMock(return_value=MagicMock(cuda_stream=7))),
                    (torch.cuda, "stream", lambda _: nullcontext()),
                ):
                    stack.enter_context(patch.object(place, name, value))
                found = FakeEngine(info.codec, 0)
                found.follow(stream)
                yield found
                found.reset()
                found.close()
                assert not fake.out

        return surfaces.read_packets("video", blob, info, due, spec, "cpu", engine)

    return reader


def of(backend: Backend) -> Reader:
    device = "cuda" if "cuda" in backend.devices else "cpu"
    return lambda blob, info, due, spec: backend.read("video", blob, info, due, spec, device)


def read(
    reader: Reader, path: Path | Blob, times_s: object = None, spec: FrameSpec = SPEC
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """frames [T, H, W, 3], times [T], corrupt [T] of a whole read."""
    blob = path if isinstance(path, Blob) else blob_of(path)
    info = probe("video", blob)
    due = np.arange(0, info.duration_s - 1e-6, 1 / 6) if times_s is None else np.asarray(times_s, np.float64)
    batches = list(reader(blob, info, due, spec))
    if not batches:
        return np.zeros((0, spec.height, spec.width, 3), np.uint8), np.zeros(0), np.zeros(0, bool)
    sizes = [len(b.times_s) for b in batches]
    assert [b.first for b in batches] == list(itertools.accumulate(sizes[:-1], initial=0))
    assert max(sizes) <= 16
    return (
        torch.cat([b.frames_THWC.cpu() for b in batches]).numpy(),
        np.concatenate([b.times_s for b in batches]),
        np.concatenate([b.corrupt for b in batches]),
    )


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return 99.0 if error == 0 else 10 * np.log10(255**2 / error)


def numbers(frames_THWC: np.ndarray) -> list[int]:
    return [frame_number(frame) for frame in frames_THWC]


def present(backend: Backend) -> str | None:
    """None where a decoder can leave frames on a GPU here, else why not."""
    if missing := backend.missing():
        return missing
    return None if "cuda" in backend.devices else "not built with CUDA, or no GPU"


GPU_DECODERS = ("nvdec", "cuvid", "torchcodec", "pynvvideocodec", "dali", "decord")
READERS = [
    pytest.param(software(), id="lasting"),
    pytest.param(software(lasts=False, silent=True), id="overwritten"),
    pytest.param(driver(), id="driver"),
    *(
        pytest.param(
            of(backends()[name]),
            id=name,
            marks=pytest.mark.skipif(
                bool(present(backends()[name])), reason=f"{name}: {present(backends()[name])}"
            ),
        )
        for name in GPU_DECODERS
    ),
]
# What a decoder may refuse; then the CPU has it.
DECLINED = "unsupported"


def taken(reader: Reader, path: Path | Blob, times_s: object = None, spec: FrameSpec = SPEC) -> tuple:
    """Skips the test where a decoder says that it does not take such a video."""
    try:
        return read(reader, path, times_s, spec)
    except VideoError as error:
        if error.kind == DECLINED:
            pytest.skip(str(error))
        raise


FORMATS = {
    "h264": {},
    "h264-bframes": {"bframes": 3, "gop": 24},
    "h264-open-gop": {"bframes": 3, "gop": 24, "options": {"x264-params": "open-gop=1:scenecut=0"}},
    "h264-10bit": {"pix_fmt": "yuv420p10le"},
    "hevc": {"codec": "hevc", "bframes": 3},
    "hevc-10bit": {"codec": "hevc", "pix_fmt": "yuv420p10le"},
    "vp9": {"codec": "vp9"},
    "av1": {"codec": "av1"},
    "av1-10bit": {"codec": "av1", "pix_fmt": "yuv420p10le"},
}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoded")
    return {
        name: write_video(folder / f"{name}.mp4", n_frames=60, width=480, height=270, **options)
        for name, options in FORMATS.items()
    }


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twelve seconds in several containers and codecs, to seek in."""
    folder = tmp_path_factory.mktemp("long")
    size = {"n_frames": 360, "width": 160, "height": 96}
    open_gop = {"x264-params": "open-gop=1:scenecut=0"}
    found = {
        "mp4": write_video(folder / "a.mp4", bframes=3, gop=36, **size),
        "open.mp4": write_video(folder / "o.mp4", bframes=3, gop=36, options=open_gop, **size),
        "hevc.mp4": write_video(folder / "h.mp4", codec="hevc", bframes=4, gop=48, **size),
        "vp9.webm": write_video(folder / "v.webm", codec="vp9", gop=50, **size),
    }
    found["ts"] = remux(found["open.mp4"], folder / "a.ts")
    found["mkv"] = remux(found["mp4"], folder / "a.mkv")
    found["fragmented.mp4"] = remux(found["mp4"], folder / "f.mp4", {"movflags": "frag_keyframe+empty_moov"})
    return found


# -- the same frames as the CPU -------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("reader", READERS)
def test_frames_times_and_damage_are_those_of_the_cpu(
    reader: Reader, kind: str, encoded: dict[str, Path]
) -> None:
    frames, times, corrupt = taken(reader, encoded[kind])
    expected, expected_times, _ = read(of(PYAV), encoded[kind])
    assert numbers(frames) == numbers(expected) == list(range(0, 60, 5))
    assert times == pytest.approx(expected_times, abs=1e-6)
    assert not corrupt.any()
    assert min(psnr(a, b) for a, b in zip(frames, expected, strict=True)) >= 40


@pytest.mark.parametrize("reader", READERS)
def test_variable_frame_rate_keeps_real_times(reader: Reader, tmp_path: Path) -> None:
    draw = random.Random(3)
    steps = [Fraction(draw.choice([20, 33, 50, 100, 400]), 1000) for _ in range(60)]
    stamps = list(itertools.accumulate(steps, initial=Fraction(0)))[:60]
    path = write_video(tmp_path / "a.mp4", 60, 160, 96, 30, bframes=2, times=stamps)
    due = np.arange(0, float(stamps[-1]), 1 / 6)
    frames, times, corrupt = taken(reader, path, due, SMALL)
    expected = [max(k for k, s in enumerate(stamps) if s <= t + 1e-6) for t in due]
    assert numbers(frames) == expected
    assert times == pytest.approx([float(stamps[k]) for k in expected], abs=2e-5)
    assert not corrupt.any()


@pytest.mark.parametrize("reader", READERS)
def test_frame_rates_below_the_grid_repeat_frames(reader: Reader, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 15, 160, 96, 5)
    frames, times, _ = taken(reader, path, np.arange(18) / 6, SMALL)
    expected = [int(Fraction(i, 6) * 5 + Fraction(1, 1000)) for i in range(18)]
    assert numbers(frames) == expected
    assert times == pytest.approx([k / 5 for k in expected], abs=2e-5)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("reader", READERS)
def test_times_count_from_the_first_frame(reader: Reader, suffix: str, tmp_path: Path) -> None:
    stamps = [5 + Fraction(k, 30) for k in range(60)]
    path = write_video(tmp_path / f"a.{suffix}", 60, 160, 96, 30, bframes=2, times=stamps)
    frames, times, _ = taken(reader, path, np.arange(12) / 6 + 0.002, SMALL)
    assert numbers(frames) == list(range(0, 60, 5))
    assert times == pytest.approx(np.arange(12) / 6, abs=2e-3)


@pytest.mark.parametrize("reader", READERS)
def test_the_last_frame_stays_for_its_duration(reader: Reader, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 12, 160, 96)
    frames, times, _ = taken(reader, path, [0.0, 11 / 30 + 0.02, 0.45, 5.0], SMALL)
    assert numbers(frames) == [0, 11]
    assert times == pytest.approx([0.0, 11 / 30], abs=1e-6)


@pytest.mark.parametrize("clockwise", [90, 180, 270])
@pytest.mark.parametrize("reader", READERS)
def test_rotation_comes_first(reader: Reader, clockwise: int, tmp_path: Path) -> None:
    upright = write_video(tmp_path / "a.mp4", 10, 320, 180)
    path = rotate(upright, tmp_path / "b.mp4", clockwise)
    expected = read(of(PYAV), path, [0.0])[0]
    assert psnr(taken(reader, path, [0.0])[0], expected) >= 40


@pytest.mark.parametrize("reader", READERS)
def test_odd_sizes(reader: Reader, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 12, 321, 243, codec="vp9")
    frames, _, _ = taken(reader, path)
    assert psnr(frames, read(of(PYAV), path)[0]) >= 40


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", [1, 2, 6, 9], ids=["bt709", "untagged", "bt601", "bt2020"])
@pytest.mark.parametrize("reader", READERS)
def test_colours_follow_the_tags(reader: Reader, matrix: int, full: bool, tmp_path: Path) -> None:
    path = write_flat(tmp_path / "a.mp4", (120, 90, 170), matrix, full)
    frames, _, _ = taken(reader, path, [0.0], FrameSpec(96, 128))
    expected = read(of(PYAV), path, [0.0], FrameSpec(96, 128))[0]
    assert np.abs(frames.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("reader", READERS)
def test_letterbox_is_black_and_stretch_is_full(reader: Reader, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 6, 240, 240)
    for spec in (SPEC, FrameSpec(180, 320, "stretch")):
        frames, _, _ = taken(reader, path, [0.0], spec)
        assert psnr(frames, read(of(PYAV), path, [0.0], spec)[0]) >= 40
        assert bool(frames[0][:, :30].any()) == (spec.fit == "stretch")


# -- seeking and byte ranges ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mp4", "open.mp4", "hevc.mp4", "vp9.webm", "ts", "mkv", "fragmented.mp4"])
@pytest.mark.parametrize("reader", READERS)
def test_seeking_finds_the_same_frames(reader: Reader, kind: str, long: dict[str, Path]) -> None:
    every = np.arange(360) / 30 + 0.002  # Matroska rounds to milliseconds
    draw = random.Random(kind)
    for count in (1, 2, 5, 2):
        picked = sorted(draw.sample(range(360), count))
        frames, times, corrupt = taken(reader, long[kind], every[picked], SMALL)
        assert numbers(frames) == picked
        assert times == pytest.approx([k / 30 for k in picked], abs=2e-3)
        assert not corrupt.any()


def test_gaps_are_not_decoded(long: dict[str, Path]) -> None:
    made: list[SoftwareEngine] = []
    frames, _, _ = read(software(made=made), long["mp4"], [0.0, 0.1, 9.7], SMALL)
    assert numbers(frames) == [0, 3, 291]
    assert made[0].packets < 8 + 36 + 8  # a start, and one group of pictures


def test_fast_leaves_out_what_the_cpu_leaves_out(encoded: dict[str, Path]) -> None:
    for kind in ("h264-bframes", "hevc"):
        made: list[SoftwareEngine] = []
        frames, times, _ = read(software(fast=True, made=made), encoded[kind])
        info = probe("a", blob_of(encoded[kind]))
        due = np.arange(0, info.duration_s - 1e-6, 1 / 6)
        expected = list(PYAV.read("a", blob_of(encoded[kind]), info, due, SPEC, "cpu", fast=True))
        assert times == pytest.approx(np.concatenate([batch.times_s for batch in expected]))
        assert made[0].packets < 60
        assert numbers(frames) == [round(30 * t) for t in times]


def test_only_what_is_due_is_read(encoded: dict[str, Path]) -> None:
    for kind in ("h264", "h264-bframes", "hevc", "vp9", "av1"):
        made: list[SoftwareEngine] = []
        frames, _, _ = read(software(lasts=False, made=made), encoded[kind])
        assert made[0].read == len(frames) == 12


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("reader", READERS)
def test_a_byte_range_reads_like_a_file(
    reader: Reader, kind: str, long: dict[str, Path], tmp_path: Path
) -> None:
    data = long[kind].read_bytes()
    tar = tmp_path / "odd, name:1.tar"
    tar.write_bytes(b"\x01" * 1537 + data + long["mp4"].read_bytes())
    blob = Blob(str(tar), 1537, len(data), whole_file=False)
    due = np.array([0, 40, 200, 359]) / 30 + 0.002
    inside, times, _ = taken(reader, blob, due, SMALL)
    alone, alone_times, _ = taken(reader, long[kind], due, SMALL)
    assert numbers(inside) == [0, 40, 200, 359]
    assert np.array_equal(inside, alone)
    assert np.array_equal(times, alone_times)


# -- damage ---------------------------------------------------------------------------------------


def damaged(path: Path, out: Path, first: int, last: int) -> Path:
    """A copy in which the packets ``first`` to ``last`` (in stored order) hold noise."""
    with av.open(str(path)) as source:
        spans = [(p.pos, p.size) for p in source.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    noise = np.random.default_rng(1)
    for at, size in spans[first : last + 1]:
        data[at + 4 : at + size] = noise.integers(0, 255, size - 4, dtype=np.uint8).tobytes()
    out.write_bytes(data)
    return out


@pytest.mark.parametrize("lasts", [True, False])
def test_damage_is_marked_as_on_the_cpu(lasts: bool, long: dict[str, Path], tmp_path: Path) -> None:
    path = damaged(long["mp4"], tmp_path / "a.mp4", 75, 78)
    due = np.arange(72) / 6 + 0.002
    frames, times, corrupt = read(software(lasts=lasts), path, due, SMALL)
    expected, expected_times, expected_corrupt = read(of(PYAV), path, due, SMALL)
    assert corrupt.any()
    assert np.array_equal(corrupt, expected_corrupt)
    good = ~corrupt
    assert np.array_equal(times[good], expected_times[good])
    assert psnr(frames[good], expected[good]) >= 40


def test_pictures_that_are_dropped_without_a_word_are_marked(long: dict[str, Path], tmp_path: Path) -> None:
    path = damaged(long["mp4"], tmp_path / "a.mp4", 75, 78)
    due = np.arange(72) / 6 + 0.002
    _, _, corrupt = read(software(lasts=False, silent=True), path, due, SMALL)
    _, _, expected = read(of(PYAV), path, due, SMALL)
    assert corrupt.any()
    assert not (expected & ~corrupt)[:18].any() or corrupt[expected].any()
    assert not corrupt[:12].any()
    assert not corrupt[24:].any()


def test_what_the_hardware_concealed_is_marked(long: dict[str, Path], tmp_path: Path) -> None:
    made: list[FakeDriver] = []
    path = damaged(long["mp4"], tmp_path / "a.mp4", 75, 78)
    due = np.arange(72) / 6 + 0.002
    frames, times, corrupt = read(driver(made), path, due, SMALL)
    expected, expected_times, expected_corrupt = read(of(PYAV), path, due, SMALL)
    assert corrupt.any()
    assert not (expected_corrupt & ~corrupt).any()
    assert corrupt.sum() <= expected_corrupt.sum() + 2
    good = ~corrupt
    assert np.array_equal(times[good], expected_times[good])
    assert psnr(frames[good], expected[good]) >= 40
    assert made[0].mapped <= len(due) + 2  # what is not due stays where it is


@pytest.mark.parametrize("at", [70, 72, 73, 107, 108])
def test_concealed_damage_lasts_to_the_next_keyframe(at: int, long: dict[str, Path], tmp_path: Path) -> None:
    """Whatever kind of picture it hits; the group before the damage and the one after it are clean."""
    path = damaged(long["mp4"], tmp_path / "a.mp4", at, at)
    due = np.arange(360) / 30 + 0.002
    frames, _, corrupt = read(driver(), path, due, SMALL)
    clean, _, _ = read(of(PYAV), long["mp4"], due, SMALL)
    assert min(psnr(frames[k], clean[k]) for k in np.flatnonzero(~corrupt)) >= 40
    assert not corrupt[: 36 * (at // 36) - 8].any()
    assert not corrupt[36 * (at // 36 + 2) :].any()


def test_structures_are_as_long_as_the_drivers() -> None:
    """Sizes and offsets that a C compiler gives for cuviddec.h and nvcuvid.h on 64-bit Linux."""
    sizes = {
        hardware._Caps: 88,
        cuvid._Packet: 32,
        cuvid._Format: 64,
        cuvid._Create: 176,
        cuvid._Display: 24,
        cuvid._Process: 264,
        cuvid._Status: 192,
        cuvid._Parser: 136,
    }
    assert {kind: ctypes.sizeof(kind) for kind in sizes} == sizes
    assert (cuvid._Format.display.offset, cuvid._Format.min_surfaces.offset) == (24, 15)
    assert (cuvid._Create.target_width.offset, cuvid._Create.lock.offset) == (96, 120)
    assert (cuvid._Process.stream.offset, cuvid._Parser.on_display.offset) == (56, 64)
    assert (hardware._Caps.max_width.offset, cuvid._PictureHead.index.offset) == (28, 8)


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_stream_ends_in_frames_or_in_words(
    reader: Reader, long: dict[str, Path], tmp_path: Path
) -> None:
    path = damaged(long["mp4"], tmp_path / "a.mp4", 75, 110)
    due = np.arange(72) / 6 + 0.002
    frames, _, corrupt = taken(reader, path, due, SMALL)
    good = [k for k in range(len(frames)) if not corrupt[k] and (k < 12 or k > 24)]
    assert [numbers(frames)[k] for k in good] == [5 * k for k in good]


# -- the CPU behind a decoder ---------------------------------------------------------------------


class Failing:
    """A decoder that gives up, or reports damage, after some batches."""

    name, devices, planes = "failing", ("cpu", "cuda"), ("rgb",)

    def __init__(self, after: int, error: Exception | None) -> None:
        self.after, self.error, self.reads = after, error, 0

    def missing(self) -> str | None:
        return None

    def version(self) -> str:
        return "1"

    def refuses(self, info: VideoInfo) -> str | None:
        return None

    def read(self, *args: object) -> Iterator[FrameBatch]:
        self.reads += 1
        for k, batch in enumerate(PYAV.read(*args)):  # type: ignore[arg-type]
            if k == self.after:
                if self.error:
                    raise self.error
                batch.corrupt[:] = True
            yield batch


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize(
    "error", [None, VideoError("v", "no", "", "unsupported"), RuntimeError("CUDA error\nmore")], ids=repr
)
def test_the_cpu_takes_over_in_the_middle(
    error: Exception | None, after: int, long: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    policy.OrCPU._failures.clear()
    policy.OrCPU._told.clear()
    both = policy.OrCPU(Failing(after, error), PYAV)
    due = np.arange(72) / 6 + 0.002
    frames, times, corrupt = read(of_cpu(both), long["mp4"], due, SMALL)
    expected, expected_times, _ = read(of(PYAV), long["mp4"], due, SMALL)
    assert np.array_equal(frames, expected)
    assert np.array_equal(times, expected_times)
    assert not corrupt.any()
    assert len(caplog.messages) == (error is not None)
    assert not any("\n" in message for message in caplog.messages)


def test_past_the_damage_the_decoder_goes_on(long: dict[str, Path], tmp_path: Path) -> None:
    policy.OrCPU._failures.clear()
    path = damaged(long["mp4"], tmp_path / "a.mp4", 75, 78)
    honest = Failing(99, None)
    due = np.arange(340) / 30 + 0.002
    frames, times, corrupt = read(of_cpu(policy.OrCPU(honest, PYAV)), path, due, SMALL)
    expected, expected_times, expected_corrupt = read(of(PYAV), path, due, SMALL)
    assert expected_corrupt.any()
    assert np.array_equal(corrupt, expected_corrupt)
    assert np.array_equal(times, expected_times)
    assert np.array_equal(frames, expected)
    assert honest.reads == 2


def test_clips_across_the_change_have_all_their_greys(long: dict[str, Path]) -> None:
    class Halfway(Failing):
        def read(self, name: str, *args: Any) -> Iterator[FrameBatch]:
            for k, batch in enumerate(software()(*args[:4])):
                if k == 1:
                    raise VideoError(name, "no", "", "unsupported")
                yield batch

    policy.OrCPU._failures.clear()
    info = probe("a", blob_of(long["mp4"]))
    clips = [Clip(f"{k:016x}", "v", 12 * k, 12, 6.0) for k in range(4)]
    both = policy.OrCPU(Halfway(0, None), PYAV)
    found = list(read_clips("a", blob_of(long["mp4"]), info, clips, FrameSpec(), both, "cpu"))
    for frames in found:
        assert isinstance(frames, ClipFrames)
        assert frames.greys_Thw is not None
        assert torch.equal(frames.greys_Thw.long(), small_greys(frames.frames_THWC).long())


def test_a_stream_that_ends_early_ends_early(long: dict[str, Path]) -> None:
    both = policy.OrCPU(Failing(99, None), PYAV)
    frames, _, _ = read(of_cpu(both), long["mp4"], [0.0, 11.9, 12.5, 100.0], SMALL)
    assert numbers(frames) == [0, 357]


def test_a_decoder_that_gives_nothing_is_given_up(long: dict[str, Path]) -> None:
    class Mute(SoftwareEngine):
        def decode(self, packet: av.Packet) -> list[Decoded]:
            return []

    blob = blob_of(long["mp4"])
    info = probe("a", blob)
    with pytest.raises(VideoError, match="no picture comes") as caught:
        list(
            surfaces.read_packets(
                "a", blob, info, np.arange(60) / 6, SMALL, "cpu", lambda s: nullcontext(Mute(s, True, False))
            )
        )
    assert caught.value.kind == "unsupported"


def test_a_decoder_that_always_fails_is_not_asked_again(long: dict[str, Path]) -> None:
    policy.OrCPU._failures.clear()
    failing = Failing(0, VideoError("v", "no", "", "unsupported"))
    both = policy.OrCPU(failing, PYAV)
    for _ in range(policy.MAX_FAILURES + 2):
        assert numbers(read(of_cpu(both), long["mp4"], [0.0], SMALL)[0]) == [0]
    assert failing.reads == policy.MAX_FAILURES
    policy.OrCPU._failures.clear()


def of_cpu(backend: Backend) -> Reader:
    return lambda blob, info, due, spec: backend.read("video", blob, info, due, spec, "cpu")


INFO = VideoInfo(640, 360, 0, 30.0, 10.0, 0.0, 300, "h264", "yuv420p", 8)


def test_a_decoder_for_gpus_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nvdec = backends()["nvdec"]
    monkeypatch.setattr(type(nvdec), "missing", lambda self: None)
    with pytest.raises(UserError, match="device=cuda"):
        policy.pick(INFO, "nvdec", "cpu")
    assert policy.pick(INFO, "auto", "cpu")[0] is PYAV


def test_short_spans_and_what_the_engines_refuse_go_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nvdec = backends()["nvdec"]
    monkeypatch.setattr(type(nvdec), "missing", lambda self: None)
    monkeypatch.setattr(hardware, "caps", lambda *_: hardware.Caps(7, 48, 16, 4096, 4096, 65536))
    assert policy.pick(INFO, "auto", "cuda", 600.0)[0].name == "nvdec"
    assert policy.pick(INFO, "auto", "cuda", 1.0)[0] is PYAV
    for refused in (
        replace(INFO, pix_fmt="yuv422p"),
        replace(INFO, codec="mjpeg"),
        replace(INFO, width=32, height=16),
        replace(INFO, width=8192, height=4320),
    ):
        backend, reason = policy.pick(refused, "nvdec", "cuda")
        assert backend.name != "nvdec"
        assert reason is not None
        assert reason.startswith("nvdec: ")
    monkeypatch.setattr(backends()["torchcodec"], "devices", ("cpu", "cuda"))  # as where there is a GPU
    assert policy.pick(replace(INFO, pix_fmt="yuv422p"), "auto", "cuda")[0] is PYAV
    monkeypatch.setattr(hardware, "caps", lambda *_: None)
    assert "8-bit h264" in str(policy.pick(INFO, "nvdec", "cuda")[1])


# -- bitstreams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["h264", "h264-bframes", "hevc", "hevc-10bit"])
def test_headers_and_start_codes_decode_on_their_own(kind: str, encoded: dict[str, Path]) -> None:
    with av.open(str(encoded[kind])) as container:
        stream = container.streams.video[0]
        name, extradata = stream.codec_context.name, stream.codec_context.extradata
        bare = av.CodecContext.create(name, "r")  # is not told the container's headers
        head = headers(stream.codec_context.codec.canonical_name, extradata)
        assert head.startswith(b"\0\0\0\1")
        start_codes, count = StartCodes(stream), 0
        for packet in container.demux(stream):
            for part in start_codes(packet) if packet.size else ():
                data = head + bytes(part) if count == 0 else bytes(part)
                assert data.startswith((b"\0\0\0\1", b"\0\0\1"))
                count += len(bare.decode(av.Packet(data)))
        count += len(bare.decode(None))
    assert count == 60


@given(st.sampled_from(["h264", "hevc", "av1", "vp9"]), st.binary(max_size=80))
def test_headers_of_noise_stay_within_it(codec: str, noise: bytes) -> None:
    for data in (noise, b"\1" + noise):
        assert len(headers(codec, data)) <= 4 * len(data) + 4


def test_vp9_packets_say_how_many_pictures_they_show(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.webm", 30, 160, 96, codec="vp9")
    with av.open(str(path)) as container:
        packets = [bytes(p) for p in container.demux(video=0) if p.size]
    assert [vp9_shown(p) for p in packets] == [1] * 30
    hidden = bytes([packets[0][0] & ~2]) + packets[0][1:]  # without its show_frame bit
    assert vp9_shown(hidden) == 0
    sizes = b"".join(len(part).to_bytes(2, "little") for part in (hidden, packets[1]))
    marker = bytes([0xC0 | 1 << 3 | 1])  # two frames, their sizes in two bytes
    assert vp9_shown(hidden + packets[1] + marker + sizes + marker) == 1
    assert vp9_shown(b"") == 0


@given(st.binary(max_size=40))
def test_noise_for_vp9_is_counted_too(noise: bytes) -> None:
    assert 0 <= vp9_shown(noise) <= 8


# -- what decoders keep ---------------------------------------------------------------------------


def test_idle_decoders_are_kept_per_thread_and_few() -> None:
    pool = surfaces.EnginePool(keep=2)
    for key in "abc":
        pool.give(key, key.upper())
    assert pool.take("a") is None
    assert pool.take("c") == "C"
    assert pool.take("c") is None
    with ThreadPoolExecutor(1) as other:
        assert other.submit(pool.take, "b").result() is None
    assert pool.take("b") == "B"


@pytest.mark.parametrize(("n", "target"), [(270, 180), (481, 97), (90, 180), (33, 33)])
def test_area_weights_average_boxes(n: int, target: int) -> None:
    weights = surfaces.area_weights(n, target)
    assert weights.shape == (target, n)
    assert weights.sum(1).numpy() == pytest.approx(np.ones(target), abs=1e-6)
    if target <= n:  # every sample counts as much as any other
        assert weights.sum(0).numpy() == pytest.approx(np.full(n, target / n), abs=1e-6)


def test_scaled_pictures_are_those_of_the_cpu(encoded: dict[str, Path]) -> None:
    info = probe("a", blob_of(encoded["h264"]))
    scaled = surfaces.Scaled(info, SPEC, "cpu")
    with av.open(str(encoded["h264"])) as container:
        for frame in itertools.islice(container.decode(video=0), 15, 16):
            scaled.add(torch.from_numpy(frame.to_ndarray(format="rgb24")), 0.5, False)
    batch = scaled.take()
    assert batch is not None
    assert psnr(batch.frames_THWC.numpy(), read(of(PYAV), encoded["h264"], [0.5])[0]) >= 38


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="shared samples are not here")
@pytest.mark.parametrize("reader", READERS)
def test_real_footage(reader: Reader) -> None:
    path = SAMPLES / "two_hands_mixer_20s.mp4"
    due = np.arange(0, 20.2, 1 / 6)
    frames, times, _ = taken(reader, path, due, FrameSpec())
    expected, expected_times, _ = read(of(PYAV), path, due, FrameSpec())
    assert np.array_equal(times, expected_times)
    assert psnr(frames, expected) >= 40


@pytest.mark.parametrize("reader", [r for r in READERS if r.id != "driver"])  # what it patches is shared
def test_many_at_once_give_what_one_gives(reader: Reader, encoded: dict[str, Path]) -> None:
    alone = taken(reader, encoded["h264"])[0]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: read(reader, encoded["h264"])[0], range(6)))
    assert all(np.array_equal(frames, alone) for frames in found)


def test_greys_are_those_of_the_frames(encoded: dict[str, Path]) -> None:
    info = probe("a", blob_of(encoded["h264"]))
    for batch in software()(blob_of(encoded["h264"]), info, np.arange(12) / 6, FrameSpec()):
        assert batch.greys_Thw is not None
        expected = torch.as_tensor(grey_small(batch.frames_THWC))
        assert torch.equal(batch.greys_Thw.long(), expected.long())
