"""Every decoder gives the same frames: the right one at each time, the right way up, in the right colours."""

from __future__ import annotations

import importlib.util
import itertools
import random
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from ego2robot.decode import ClipFailure, probe, read_clips
from ego2robot.decode.base import Backend, FrameBatch
from ego2robot.decode.policy import backends, describe, pick
from ego2robot.errors import UserError, VideoError
from ego2robot.types import Blob, Clip, ClipFrames, FrameSpec, VideoInfo
from tests.footage import frame_number, remux, rotate, write_flat, write_video

SPEC = FrameSpec(180, 320)
SMALL = FrameSpec(90, 160)
PYAV = backends()["pyav"]
PRESENT = [pytest.param(b, id=b.name) for b in backends().values() if not b.missing()]
ABSENT = {b.name: b.missing() for b in backends().values() if b.missing()}
SAMPLES = Path(__file__).parents[1].parent / "shared" / "samples"


def blob_of(path: Path) -> Blob:
    return Blob(str(path), 0, path.stat().st_size)


def read(
    path: Path | Blob, times_s: object = None, backend: Backend = PYAV, spec: FrameSpec = SPEC
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """frames [T, H, W, 3], times [T], corrupt [T] of a whole read."""
    blob = path if isinstance(path, Blob) else blob_of(path)
    info = probe("video", blob)
    due = np.arange(0, info.duration_s - 1e-6, 1 / 6) if times_s is None else np.asarray(times_s, np.float64)
    batches = list(backend.read("video", blob, info, due, spec, "cpu"))
    if not batches:
        return np.zeros((0, spec.height, spec.width, 3), np.uint8), np.zeros(0), np.zeros(0, bool)
    assert [b.first for b in batches] == list(
        itertools.accumulate([len(b.times_s) for b in batches[:-1]], initial=0)
    )
    assert max(len(b.times_s) for b in batches) <= 16
    return (
        torch.cat([b.frames_THWC for b in batches]).numpy(),
        np.concatenate([b.times_s for b in batches]),
        np.concatenate([b.corrupt for b in batches]),
    )


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return 99.0 if error == 0 else 10 * np.log10(255**2 / error)


def numbers(frames_THWC: np.ndarray) -> list[int]:
    return [frame_number(frame) for frame in frames_THWC]


def taking(backend: Backend, path: Path) -> Backend:
    """Skips the test where the backend says that it does not take such a video."""
    if refusal := backend.refuses(probe("video", blob_of(path))):
        pytest.skip(refusal)
    return backend


def refuses_transport_streams(backend: Backend, path: Path) -> None:
    """torchcodec 0.13 and decord 0.6 seek past the start of an MPEG-TS and give later frames."""
    with pytest.raises(VideoError, match="mpegts") as caught:
        read(path, [0.0], backend, SMALL)
    assert caught.value.kind == "unsupported"
    assert "pyav" in caught.value.hint


FORMATS = {
    "h264": {},
    "h264-bframes": {"bframes": 3, "gop": 24},
    "h264-open-gop": {"bframes": 3, "gop": 24, "options": {"x264-params": "open-gop=1:scenecut=0"}},
    "h264-422-10bit": {"pix_fmt": "yuv422p10le"},
    "hevc": {"codec": "hevc", "bframes": 3},
    "hevc-10bit": {"codec": "hevc", "pix_fmt": "yuv420p10le"},
    "vp9": {"codec": "vp9"},
    "av1": {"codec": "av1"},
}


@pytest.fixture(scope="module", params=FORMATS)
def encoded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoded") / f"{request.param}.mp4"
    return write_video(path, n_frames=75, width=480, height=270, **FORMATS[request.param])


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twelve seconds in several containers and codecs, to seek in."""
    folder = tmp_path_factory.mktemp("long")
    size = {"n_frames": 360, "width": 160, "height": 90}
    open_gop = {"x264-params": "open-gop=1:scenecut=0"}
    found = {
        "mp4": write_video(folder / "a.mp4", bframes=3, gop=36, **size),
        "open.mp4": write_video(folder / "o.mp4", bframes=3, gop=36, options=open_gop, **size),
        "hevc.mp4": write_video(folder / "h.mp4", codec="hevc", bframes=4, gop=48, **size),
        "vp9.webm": write_video(folder / "v.webm", codec="vp9", gop=50, **size),
    }
    found["ts"] = remux(found["open.mp4"], folder / "a.ts")
    found["mkv"] = remux(found["mp4"], folder / "a.mkv")
    fragmented = {"movflags": "frag_keyframe+empty_moov"}
    found["fragmented.mp4"] = remux(found["mp4"], folder / "f.mp4", fragmented)
    return found


# -- the right frame ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", PRESENT)
def test_frames_on_the_grid_are_those_on_screen(backend: Backend, encoded: Path) -> None:
    frames, times, corrupt = read(encoded, backend=taking(backend, encoded))
    assert numbers(frames) == list(range(0, 75, 5))
    assert times == pytest.approx(np.arange(15) / 6, abs=1e-6)
    assert not corrupt.any()


def test_every_pair_of_backends_agrees(encoded: Path) -> None:
    info = probe("video", blob_of(encoded))
    takes = [p.values[0] for p in PRESENT if not p.values[0].refuses(info)]
    frames = {backend.name: read(encoded, backend=backend)[0] for backend in takes}
    for a, b in itertools.combinations(frames, 2):
        worst = min(psnr(x, y) for x, y in zip(frames[a], frames[b], strict=True))
        assert worst >= 35, f"{a} and {b} differ: {worst:.1f} dB"
    if len(frames) < 2:
        pytest.skip(f"one decoder takes it here (absent: {ABSENT})")


@pytest.mark.parametrize(("fps", "n_frames"), [(10, 30), (60, 180), (Fraction(30000, 1001), 90), (5, 15)])
@pytest.mark.parametrize("backend", PRESENT)
def test_any_frame_rate_lands_on_the_grid(
    backend: Backend, fps: Fraction, n_frames: int, tmp_path: Path
) -> None:
    path = write_video(tmp_path / "a.mp4", n_frames, 160, 90, fps)
    frames, times, _ = read(path, np.arange(18) / 6, backend, SMALL)
    expected = [int(Fraction(i, 6) * Fraction(fps) + Fraction(1, 1000)) for i in range(18)]
    assert numbers(frames) == expected
    assert times == pytest.approx([float(k / Fraction(fps)) for k in expected], abs=2e-5)
    assert probe("a", blob_of(path)).fps == pytest.approx(float(fps), rel=1e-3)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("backend", PRESENT)
def test_variable_frame_rate_keeps_real_times(backend: Backend, suffix: str, tmp_path: Path) -> None:
    draw = random.Random(3)
    steps = [Fraction(draw.choice([20, 33, 50, 100, 400]), 1000) for _ in range(60)]
    stamps = list(itertools.accumulate(steps, initial=Fraction(0)))[:60]
    path = write_video(tmp_path / f"a.{suffix}", 60, 160, 90, 30, bframes=2, times=stamps)
    due = np.arange(0, float(stamps[-1]), 1 / 6)
    frames, times, _ = read(path, due, backend, SMALL)
    expected = [max(k for k, s in enumerate(stamps) if s <= t + 1e-6) for t in due]
    assert numbers(frames) == expected
    assert times == pytest.approx([float(stamps[k]) for k in expected], abs=2e-3 if suffix == "mkv" else 2e-5)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("backend", PRESENT)
def test_times_count_from_the_first_frame(backend: Backend, suffix: str, tmp_path: Path) -> None:
    stamps = [5 + Fraction(k, 30) for k in range(60)]
    path = write_video(tmp_path / f"a.{suffix}", 60, 160, 90, 30, bframes=2, times=stamps)
    info = probe("a", blob_of(path))
    assert info.start_s >= (5 if suffix != "mp4" else 0)
    assert info.duration_s == pytest.approx(2, abs=0.05)
    if suffix == "ts" and backend is not PYAV:
        return refuses_transport_streams(backend, path)
    frames, times, _ = read(path, np.arange(12) / 6 + 0.002, backend, SMALL)
    assert numbers(frames) == list(range(0, 60, 5))
    assert times == pytest.approx(np.arange(12) / 6, abs=2e-3)


@pytest.mark.parametrize("backend", PRESENT)
def test_a_video_of_one_frame(backend: Backend, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 1, 160, 90)
    info = probe("a", blob_of(path))
    assert (info.n_frames, info.duration_s > 0) == (1, True)
    frames, times, _ = read(path, [0.0, 5.0], backend, SMALL)
    assert numbers(frames) == [0]
    assert times.tolist() == [0.0]


# -- seeking --------------------------------------------------------------------------------------

CONTAINERS = ("mp4", "open.mp4", "hevc.mp4", "vp9.webm", "ts", "mkv", "fragmented.mp4")


@pytest.mark.parametrize("kind", CONTAINERS)
def test_seeking_finds_what_decoding_everything_finds(kind: str, long: dict[str, Path]) -> None:
    path = long[kind]
    every = np.arange(360) / 30 + 0.002  # Matroska rounds to milliseconds
    whole, whole_times, _ = read(path, every, spec=SMALL)
    assert numbers(whole) == list(range(360))
    draw = random.Random(kind)
    for _ in range(12):
        picked = sorted(draw.sample(range(360), draw.choice([1, 2, 5])))
        frames, times, corrupt = read(path, every[picked], spec=SMALL)
        assert numbers(frames) == picked
        assert np.array_equal(times, whole_times[picked])
        assert np.array_equal(frames, whole[picked])
        assert not corrupt.any()


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("backend", [p for p in PRESENT if p.values[0] is not PYAV])
def test_other_backends_seek_to_the_same_frames(backend: Backend, kind: str, long: dict[str, Path]) -> None:
    if kind == "ts":
        return refuses_transport_streams(backend, long[kind])
    picked = [3, 4, 130, 131, 250, 359]
    frames, _, _ = read(long[kind], np.array(picked) / 30 + 0.002, taking(backend, long[kind]), SMALL)
    assert numbers(frames) == picked


def test_gaps_are_not_decoded(long: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from ego2robot.decode import pyav

    decoded = []
    honest = pyav.pictures

    def counted(*args: object) -> Iterator[pyav.Picture]:
        for picture in honest(*args):  # type: ignore[arg-type]
            decoded.append(picture.time_s)
            yield picture

    monkeypatch.setattr(pyav, "pictures", counted)
    frames, _, _ = read(long["mp4"], [0.0, 0.1, 9.7], spec=SMALL)
    assert numbers(frames) == [0, 3, 291]
    assert len(decoded) < 4 + 36 + 1 + 4  # a start, and less than one group of pictures


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
def test_pictures_that_are_neither_due_nor_needed_are_not_decoded(
    codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ego2robot.decode import pyav

    decoded = []
    honest = pyav.pictures

    def counted(*args: object) -> Iterator[pyav.Picture]:
        for picture in honest(*args):  # type: ignore[arg-type]
            decoded.append(picture.time_s)
            yield picture

    monkeypatch.setattr(pyav, "pictures", counted)
    path = write_video(tmp_path / "a.mp4", 120, 160, 90, codec=codec, bframes=3, gop=40)
    frames, times, _ = read(path, spec=SMALL)
    assert numbers(frames) == list(range(0, 120, 5))
    assert times == pytest.approx(np.arange(24) / 6, abs=1e-6)
    assert len(decoded) <= 100


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_fast_gives_the_picture_before_with_its_own_time(codec: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 120, 160, 90, codec=codec, bframes=3, gop=40)
    blob = blob_of(path)
    info, due = probe("a", blob), np.arange(24) / 6
    batches = list(PYAV.read("a", blob, info, due, SMALL, "cpu", fast=True))
    times = np.concatenate([batch.times_s for batch in batches])
    frames = torch.cat([batch.frames_THWC for batch in batches]).numpy()
    assert len(times) == 24
    assert numbers(frames) == np.rint(times * 30).tolist()
    early = due - times
    assert (early > -1e-6).all()
    assert 1 / 60 < early.max() < 2.5 / 30  # of two or three pictures between references
    assert not any(batch.corrupt.any() for batch in batches)
    same = early < 1e-6
    assert min(psnr(a, b) for a, b in zip(frames[same], read(path, spec=SMALL)[0][same], strict=True)) >= 40


def test_fast_is_exact_where_every_picture_is_referred_to(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 90, 160, 90, gop=30)
    info, due = probe("a", blob_of(path)), np.arange(18) / 6
    batches = list(PYAV.read("a", blob_of(path), info, due, SMALL, "cpu", fast=True))
    fast = torch.cat([batch.frames_THWC for batch in batches]).numpy()
    frames, times, _ = read(path, due, spec=SMALL)
    assert np.array_equal(np.concatenate([batch.times_s for batch in batches]), times)
    assert psnr(fast, frames) > 50


# -- the right way up, size and colour ------------------------------------------------------------


@pytest.mark.parametrize("clockwise", [90, 180, 270])
@pytest.mark.parametrize("backend", PRESENT)
def test_rotation_comes_first(backend: Backend, clockwise: int, tmp_path: Path) -> None:
    upright = write_video(tmp_path / "a.mp4", 10, 320, 180)
    path = rotate(upright, tmp_path / "b.mp4", clockwise)
    info = probe("b", blob_of(path))
    assert info.rotation == clockwise
    assert (info.width, info.height) == ((320, 180) if clockwise == 180 else (180, 320))
    spec = FrameSpec(info.height, info.width)
    expected = np.rot90(read(upright, [0.0])[0][0], -clockwise // 90)
    frames, _, _ = read(path, [0.0], taking(backend, path), spec)
    assert psnr(frames[0], expected) >= 35


@pytest.mark.parametrize(("codec", "pix_fmt"), [("vp9", "yuv420p"), ("h264", "yuv444p")])
@pytest.mark.parametrize("backend", PRESENT)
def test_odd_sizes(backend: Backend, codec: str, pix_fmt: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 12, 321, 243, codec=codec, pix_fmt=pix_fmt)
    info = probe("a", blob_of(path))
    assert (info.width, info.height) == (321, 243)
    frames, _, _ = read(path, backend=taking(backend, path))
    top, left, height, width = SPEC.content(321, 243)
    inside = frames[:, top : top + height, left : left + width]
    assert numbers(inside) == [0, 5, 10]
    assert psnr(frames, read(path)[0]) >= 35


def test_letterbox_is_black_and_stretch_is_full(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 6, 240, 240)
    top, left, height, width = SPEC.content(240, 240)
    frames, _, _ = read(path)
    outside = np.ones(frames.shape[1:3], bool)
    outside[top : top + height, left : left + width] = False
    assert not frames[:, outside].any()
    assert (frames[:, ~outside].reshape(len(frames), height, width, 3).mean((1, 2, 3)) > 60).all()
    stretched, _, _ = read(path, spec=FrameSpec(180, 320, "stretch"))
    assert stretched[0][:, :10].any()
    assert stretched[0][:, -10:].any()


def test_scaling_is_an_area_average(tmp_path: Path) -> None:
    def stripes(index: int, width: int, height: int) -> np.ndarray:
        columns = np.where(np.arange(width) // 2 % 2, 200, 40).astype(np.uint8)
        return np.broadcast_to(columns[None, :, None], (height, width, 3)).copy()

    path = write_video(tmp_path / "a.mp4", 2, 640, 360, picture=stripes, crf=1)
    frames, _, _ = read(path, [0.0], spec=FrameSpec(90, 160))  # each pixel covers one whole period
    assert np.abs(frames[0].astype(int) - 120).max() <= 4


# Kr, Kb, and the number of the matrix in ITU-T H.273
MATRICES = {"bt709": (0.2126, 0.0722, 1), "bt601": (0.299, 0.114, 6), "bt2020": (0.2627, 0.0593, 9)}


def rgb_of(yuv: tuple[int, int, int], matrix: str, full: bool) -> np.ndarray:
    """ITU-R BT.601/709/2020: R'G'B' in 0..255 of 8-bit Y'CbCr."""
    kr, kb, _ = MATRICES[matrix]
    y, cb, cr = yuv
    luma = y if full else (y - 16) * 255 / 219
    blue, red = ((c - 128) * (1 if full else 255 / 224) for c in (cb, cr))
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    g = (luma - kr * r - kb * b) / (1 - kr - kb)
    return np.clip([r, g, b], 0, 255)


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", [*MATRICES, ""], ids=[*MATRICES, "untagged"])
@pytest.mark.parametrize("backend", PRESENT)
def test_colours_follow_the_tags(backend: Backend, matrix: str, full: bool, tmp_path: Path) -> None:
    number = MATRICES[matrix][2] if matrix else 2
    for yuv in ((120, 90, 170), (90, 160, 100), (200, 120, 140)):
        path = write_flat(tmp_path / "a.mp4", yuv, number, full)
        frames, _, _ = read(path, [0.0], taking(backend, path), FrameSpec(96, 128))
        expected = rgb_of(yuv, matrix or "bt601", full)
        assert np.abs(frames[0].mean((0, 1)) - expected).max() <= 3


# -- bytes and ranges -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("backend", PRESENT)
def test_a_byte_range_reads_like_a_file(
    backend: Backend, kind: str, long: dict[str, Path], tmp_path: Path
) -> None:
    if kind == "ts" and backend is not PYAV:
        return refuses_transport_streams(backend, long[kind])
    data = long[kind].read_bytes()
    tar = tmp_path / "odd, name:1.tar"
    tar.write_bytes(b"\x01" * 1537 + data + long["mp4"].read_bytes())
    blob = Blob(str(tar), 1537, len(data), whole_file=False)
    due = np.array([0, 40, 200, 359]) / 30 + 0.002
    assert probe("a", blob) == probe("a", blob_of(long[kind]))
    inside, times, _ = read(blob, due, taking(backend, long[kind]), SMALL)
    alone, alone_times, _ = read(long[kind], due, backend, SMALL)
    assert numbers(inside) == [0, 40, 200, 359]
    assert np.array_equal(inside, alone)
    assert np.array_equal(times, alone_times)


def test_file_names_are_not_protocols(long: dict[str, Path], tmp_path: Path, monkeypatch: object) -> None:
    path = tmp_path / "concat:a|b,c.mp4"
    path.write_bytes(long["mp4"].read_bytes())
    assert probe("a", blob_of(path)).width == 160


def test_a_playlist_cannot_open_other_files(long: dict[str, Path], tmp_path: Path) -> None:
    for text in (f"ffconcat version 1.0\nfile {long['ts'].name}\n", f"#EXTM3U\n#EXTINF:1,\n{long['ts']}\n"):
        path = long["ts"].with_name("list.mp4")
        path.write_text(text)
        with pytest.raises(VideoError, match="not a video"):
            probe("list.mp4", blob_of(path))
        path.unlink()


# -- real footage ---------------------------------------------------------------------------------


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="shared samples are not here")
@pytest.mark.parametrize("backend", PRESENT)
def test_real_footage(backend: Backend) -> None:
    path = SAMPLES / "two_hands_mixer_20s.mp4"
    info = probe("mixer", blob_of(path))
    assert (info.width, info.height, info.fps, info.codec) == (680, 468, 10.0, "h264")
    assert info.duration_s == pytest.approx(20.3)
    due = np.arange(0, 20.2, 1 / 6)
    frames, times, _ = read(path, due, backend, FrameSpec())
    assert len(frames) == len(due)
    assert np.abs(times - due).max() < 0.1
    assert psnr(frames, read(path, due, PYAV, FrameSpec())[0]) >= 35


# -- choosing -------------------------------------------------------------------------------------

INFO = VideoInfo(640, 360, 0, 30.0, 10.0, 0.0, 300, "h264", "yuv420p", 8)


def test_auto_is_pyav_on_a_cpu() -> None:
    backend, reason = pick(INFO, "auto", "cpu")
    assert (backend.name, reason) == ("pyav", None)


def test_an_unknown_or_absent_backend_is_refused() -> None:
    with pytest.raises(UserError, match=r"no decoder 'opencv' \(decoders: auto, pyav"):
        pick(INFO, "opencv", "cpu")
    for name, missing in ABSENT.items():
        with pytest.raises(UserError, match=name):
            pick(INFO, name, "cpu")
        assert missing
        assert "\n" not in missing


@pytest.mark.skipif("decord" in ABSENT, reason=f"decord: {ABSENT.get('decord')}")
def test_a_refusal_falls_back_and_says_why(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 12, 160, 90, codec="av1")
    backend, reason = pick(probe("a", blob_of(path)), "decord", "cpu")
    assert backend.name == "pyav"
    assert reason is not None
    assert "av1" in reason
    assert numbers(read(path, [0.0, 1 / 3], backend, SMALL)[0]) == [0, 10]


def test_describe_lists_every_backend() -> None:
    found = describe()
    names = ["pyav", "nvdec", "cuvid", "torchcodec", "pynvvideocodec", "dali", "decord", "vrs"]
    assert [name for name, _, _ in found] == names
    assert all(missing or version for _, missing, version in found)


# -- clips ----------------------------------------------------------------------------------------


def clips_at(*spans: tuple[int, int]) -> list[Clip]:
    return [Clip(f"{first:016x}", "v", first, n, 6.0) for first, n in spans]


class Counting:
    """A backend that counts what is asked of it."""

    name, devices, planes = "counting", ("cpu",), ("rgb",)

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.passes = 0

    def read(self, *args: object) -> Iterator[FrameBatch]:
        self.passes += 1
        self.asked += args[3].tolist()  # type: ignore[attr-defined]
        return PYAV.read(*args)  # type: ignore[arg-type]


def test_clips_share_one_pass_and_their_frames(long: dict[str, Path]) -> None:
    blob = blob_of(long["mp4"])
    info, counting = probe("a", blob), Counting()
    clips = clips_at((0, 18), (6, 6), (12, 18), (60, 12))
    found = list(read_clips("a", blob, info, clips, SMALL, counting, "cpu"))  # type: ignore[arg-type]
    assert counting.passes == 1
    assert len(counting.asked) == len(set(counting.asked)) == 30 + 12
    assert [f.clip for f in found] == clips
    for frames in found:
        assert isinstance(frames, ClipFrames)
        assert frames.frames_THWC.is_contiguous()
        assert numbers(frames.frames_THWC.numpy()) == [5 * i for i in frames.clip.grid]
        assert frames.times_s == pytest.approx([i / 6 for i in frames.clip.grid], abs=1e-6)
        assert frames.content == SMALL.content(160, 90)
    assert found[0].frames_THWC.data_ptr() != found[1].frames_THWC.data_ptr()


def test_clips_come_as_soon_as_they_are_complete(long: dict[str, Path]) -> None:
    blob = blob_of(long["mp4"])
    handed: list[int] = []

    class Slow(Counting):
        def read(self, *args: object) -> Iterator[FrameBatch]:
            for batch in PYAV.read(*args):  # type: ignore[arg-type]
                handed.append(batch.first)
                yield batch

    clips = clips_at(*((6 * k, 6) for k in range(11)))
    found = read_clips("a", blob, probe("a", blob), clips, SMALL, Slow(), "cpu")  # type: ignore[arg-type]
    next(found)
    next(found)
    assert handed == [0]  # two clips of six are in the first batch of sixteen
    assert len(list(found)) == 9


def test_a_clip_past_the_end_says_so(long: dict[str, Path]) -> None:
    blob = blob_of(long["mp4"])
    clips = clips_at((54, 12), (66, 12), (600, 6))
    found = list(read_clips("a", blob, probe("a", blob), clips, SMALL, PYAV, "cpu"))
    assert isinstance(found[0], ClipFrames)
    assert [f.reason for f in found[1:] if isinstance(f, ClipFailure)] == [
        "the stream ends before 12.0 s",
        "the stream ends before 100.0 s",
    ]


def test_clips_out_of_order_are_a_mistake(long: dict[str, Path]) -> None:
    blob = blob_of(long["mp4"])
    with pytest.raises(ValueError, match="ascending"):
        list(read_clips("a", blob, probe("a", blob), clips_at((6, 6), (0, 6)), SMALL, PYAV, "cpu"))


def test_torchcodec_needs_no_ffmpeg_of_the_system(tmp_path: Path) -> None:
    """In a process of its own: beside PyAV's wheel it works, whatever is installed."""
    if importlib.util.find_spec("torchcodec") is None:
        pytest.skip("torchcodec is not installed")
    path = write_video(tmp_path / "a.mp4", 6, 160, 90)
    code = (
        "import sys, av\n"
        "from ego2robot.decode.ffmpeg_names import share_pyav_ffmpeg\n"
        "if not share_pyav_ffmpeg(): sys.exit('no wheel')\n"
        "from torchcodec.decoders import VideoDecoder\n"
        "decoder = VideoDecoder(sys.argv[1])\n"
        "frames = [frame.to_ndarray(format='rgb24') for frame in av.open(sys.argv[1]).decode(video=0)]\n"
        "assert abs(decoder[3].permute(1, 2, 0).numpy().astype(int) - frames[3]).mean() < 5\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    if "no wheel" in done.stderr:
        pytest.skip("PyAV was not installed from a Linux wheel")
    assert done.returncode == 0, done.stderr
