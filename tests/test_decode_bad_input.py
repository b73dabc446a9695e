"""What is not a good video is named in one line, and damage costs the clips that it touches."""

from __future__ import annotations

import random
from pathlib import Path

import av
import numpy as np
import pytest

from ego2robot.decode import ClipFailure, probe, read_clips
from ego2robot.decode.policy import backends
from ego2robot.errors import VideoError
from ego2robot.types import Blob, Clip, ClipFrames, FrameSpec
from tests.footage import frame_number, remux, write_audio, write_video

SPEC = FrameSpec(90, 160)
PYAV = backends()["pyav"]


def blob_of(path: Path) -> Blob:
    return Blob(str(path), 0, path.stat().st_size)


def refused(path: Path, blob: Blob | None = None) -> VideoError:
    with pytest.raises(VideoError) as caught:
        probe(path.name, blob or blob_of(path))
    error = caught.value
    assert str(error).startswith(path.name)
    assert "\n" not in str(error)
    assert error.hint
    return error


def clips(n: int, frames: int = 6) -> list[Clip]:
    return [Clip(f"{k:016x}", "v", frames * k, frames, 6.0) for k in range(n)]


def read(path: Path, info_of: Path | None = None) -> list[ClipFrames | ClipFailure]:
    """One-second clips of the whole video, as promised by its headers (or another file's)."""
    info = probe(path.name, blob_of(info_of or path))
    return list(read_clips(path.name, blob_of(path), info, clips(round(info.duration_s)), SPEC, PYAV, "cpu"))


def came_out(found: list[ClipFrames | ClipFailure]) -> list[bool]:
    """Which clips came out; each frame of those is what its own time says, and not from after it was due."""
    for answer in found:
        if isinstance(answer, ClipFrames):
            numbers = [frame_number(frame) for frame in answer.frames_THWC.numpy()]
            assert numbers == np.rint(answer.times_s * 30).tolist()
            assert (answer.times_s <= np.array(answer.clip.grid) / 6 + 1e-6).all()
    return [isinstance(answer, ClipFrames) for answer in found]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight seconds, a keyframe every second."""
    folder = tmp_path_factory.mktemp("good")
    return write_video(folder / "good.mp4", 240, 160, 90, gop=30, bframes=2)


# -- refused before any work ----------------------------------------------------------------------


def test_missing(tmp_path: Path) -> None:
    assert refused(tmp_path / "a.mp4", Blob(str(tmp_path / "a.mp4"), 0, 5)).kind == "missing"
    assert refused(tmp_path, Blob(str(tmp_path), 0, 5)).kind == "missing"


def test_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.touch()
    error = refused(path)
    assert (error.kind, "0 bytes" in error.cause) == ("empty", True)


@pytest.mark.parametrize("text", ["hello\n" * 200, "día", '{"factory_id": 1}', "<html></html>"])
def test_text_renamed(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text(text, encoding="utf-8")
    error = refused(path)
    assert (error.kind, "text" in error.cause) == ("not_a_video", True)


def test_noise_renamed(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(random.Random(1).randbytes(50_000))
    assert refused(path).kind in ("not_a_video", "corrupt")


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_audio_only(suffix: str, tmp_path: Path) -> None:
    error = refused(write_audio(tmp_path / f"a.{suffix}"))
    assert error.kind == "no_video_stream"
    assert "audio only" in error.cause


def test_index_missing(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(good.read_bytes()[:-6000])  # its index is at the end
    error = refused(path)
    assert (error.kind, "moov" in error.cause) == ("truncated", True)


@pytest.mark.parametrize("size", [4, 30, 300])
def test_cut_in_the_headers(size: int, good: Path, tmp_path: Path) -> None:
    front = remux(good, tmp_path / "front.mp4", {"movflags": "faststart"})
    path = tmp_path / "a.mp4"
    path.write_bytes(front.read_bytes()[:size])
    assert refused(path).kind in ("truncated", "not_a_video")


def test_range_past_the_end_of_its_archive(good: Path) -> None:
    size = good.stat().st_size
    error = refused(good, Blob(str(good), 100, size, whole_file=False))
    assert (error.kind, "100 of its" in error.cause) == ("truncated", True)


def test_no_picture_decodes(good: Path, tmp_path: Path) -> None:
    data = bytearray(good.read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[start:end] = random.Random(2).randbytes(end - start)
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    assert refused(path).kind == "corrupt"


def test_errors_travel_between_processes(tmp_path: Path) -> None:
    import pickle

    error = refused(tmp_path / "a.mp4", Blob(str(tmp_path / "a.mp4"), 0, 5))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.kind) == (str(error), error.kind)


# -- damage inside --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_cut_in_the_middle(suffix: str, good: Path, tmp_path: Path) -> None:
    whole = remux(good, tmp_path / f"whole.{suffix}", {"movflags": "faststart"} if suffix == "mp4" else None)
    data = whole.read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(data[: len(data) * 6 // 10])
    # A transport stream does not say how long it should be; the plan was made when it was whole.
    found = read(path, whole if suffix == "ts" else None)
    came = came_out(found)
    assert len(came) == 8
    lost = came.index(False)
    assert 3 <= lost <= 6
    assert not any(came[lost:])
    reasons = [answer.reason for answer in found[lost:] if isinstance(answer, ClipFailure)]
    assert all("the stream ends before" in r or "corrupt frames at" in r for r in reasons)
    assert "the stream ends before" in reasons[-1]


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9", "av1"])
def test_flipped_bytes_cost_only_what_they_touch(codec: str, tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", 240, 160, 90, gop=30, codec=codec)
    with av.open(str(whole)) as container:
        hit = [packet for packet in container.demux(video=0) if packet.pos][123:128]
    data = bytearray(whole.read_bytes())
    draw = random.Random(5)
    for at in range(hit[0].pos, hit[-1].pos + hit[-1].size):
        data[at] = draw.randrange(256)
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    found = read(path)
    assert came_out(found) == [True, True, True, True, False, True, True, True]
    damaged = found[4]
    assert isinstance(damaged, ClipFailure)
    assert damaged.reason.startswith("corrupt frames at 4.")
    for answer, clean in zip(found, read(whole), strict=True):
        if isinstance(answer, ClipFrames) and isinstance(clean, ClipFrames):
            assert np.array_equal(answer.frames_THWC, clean.frames_THWC)


def test_a_damaged_matroska_keeps_real_times(good: Path, tmp_path: Path) -> None:
    """Its demuxer passes over damaged blocks without a word, so that a hole looks like a long frame."""
    whole = remux(good, tmp_path / "whole.mkv")
    data = bytearray(whole.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = bytes(3000)
    path = tmp_path / "a.mkv"
    path.write_bytes(data)
    came = came_out(read(path, whole))
    assert came[0]
    assert came[-1]
