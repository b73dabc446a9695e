import numpy as np
import pytest

from ego2robot.decode import probe
from ego2robot.decode.packets import References
from ego2robot.decode.pyav import PyAV, open_stream, packet_times
from ego2robot.types import Blob, FrameSpec
from tests.footage import frame_number, remux, write_video


def blob(path):
    return Blob(str(path), 0, path.stat().st_size)


def frames(path, times):
    info = probe(path.name, blob(path))
    batches = PyAV().read(path.name, blob(path), info, times, FrameSpec(90, 160), "cpu")
    return np.concatenate([b.frames_THWC.numpy() for b in batches])


@pytest.fixture
def decoded(monkeypatch):
    """Counts the packets that reach the decoder."""
    from ego2robot.decode import pyav

    counted = []
    before = pyav.needed

    def counting(*args):
        for packet in before(*args):
            counted.append(packet)
            yield packet

    monkeypatch.setattr(pyav, "needed", counting)
    return counted


CODECS = [
    ("h264", 0, {}),
    ("h264", 3, {}),
    ("hevc", 0, {"x265-params": "log-level=error:keyint=30:min-keyint=30:bframes=0:open-gop=0"}),
    ("hevc", 3, {"x265-params": "log-level=error:keyint=30:min-keyint=30:bframes=3:open-gop=0"}),
    ("hevc", 3, {"x265-params": "log-level=error:keyint=30:min-keyint=30:bframes=3:open-gop=1"}),
    ("vp9", 0, {}),
]


@pytest.mark.parametrize(("codec", "bframes", "options"), CODECS)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_frames_are_those_of_decoding_everything(tmp_path, codec, bframes, options, suffix):
    video = write_video(tmp_path / f"a.{suffix}", 100, 160, 90, codec=codec, bframes=bframes, options=options)
    times = np.sort(packet_times(video.name, blob(video)))
    times -= times[0]
    every = frames(video, times)  # each is due: nothing can be left out
    assert len(every) == 100
    for chosen in (np.linspace(0, 99, 12, dtype=int), np.arange(7, 100, 10), np.array([0, 13, 27, 28, 41])):
        assert (frames(video, times[chosen]) == every[chosen]).all()


def test_the_end_of_a_group_that_nothing_due_needs_is_not_decoded(tmp_path, decoded):
    video = write_video(tmp_path / "a.mp4", 120, 160, 90, gop=30)
    found = frames(video, np.array([0, 10, 20, 33, 44, 50, 62, 76, 80, 90, 95]) / 30)
    assert [frame_number(f) for f in found] == [0, 10, 20, 33, 44, 50, 62, 76, 80, 90, 95]
    shown = [p.pts * float(p.time_base) * 30 for p in decoded if p is not None and p.size]
    left_out = set(range(90)) - {round(t) for t in shown}
    assert left_out == {*range(21, 30), *range(51, 60), *range(81, 90)}


def test_an_open_group_that_nothing_leans_on_is_cut_too(tmp_path, decoded):
    """CRA pictures, of x265's default open groups; where others lead them, frames are compared above."""
    options = {"x265-params": "log-level=error:keyint=30:min-keyint=30:scenecut=0:bframes=0"}
    video = write_video(tmp_path / "a.mp4", 120, 160, 90, codec="hevc", options=options)
    found = frames(video, np.array([0, 10, 20, 33, 44, 50, 62, 76, 80, 90, 95]) / 30)
    assert [frame_number(f) for f in found] == [0, 10, 20, 33, 44, 50, 62, 76, 80, 90, 95]
    assert sum(packet is not None and packet.size > 0 for packet in decoded) <= 120 - 27


def test_far_apart_times_are_still_jumped_to(tmp_path, decoded):
    video = write_video(tmp_path / "a.mp4", 300, 160, 90, gop=30)
    found = frames(video, np.array([0, 150, 290]) / 30)
    assert [frame_number(f) for f in found] == [0, 150, 290]
    assert len(decoded) < 150


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_a_refresh_is_told_with_lengths_and_with_start_codes(tmp_path, codec):
    options = {"x265-params": "log-level=error:keyint=10:min-keyint=10:open-gop=0"} if codec == "hevc" else {}
    video = write_video(tmp_path / "a.mp4", 40, 160, 90, codec=codec, gop=10, options=options)
    for path in (video, remux(video, tmp_path / "a.ts")):
        with open_stream(path.name, blob(path)) as (container, stream):
            references = References(codec, stream.codec_context.extradata)
            for packet in container.demux(stream):
                if packet.size:
                    assert (references.refresh(memoryview(packet)) == "whole") == packet.is_keyframe


def test_what_does_not_parse_starts_nothing():
    references = References("h264", None)
    for data in (b"", b"\0", b"\0\0\1", bytes(100), b"\xff" * 50, b"\0\0\1\x65abc\0\0\1\x61abc"):
        assert references.refresh(data) is None
    assert References("vp9", None).refresh(b"\0\0\1\x65abc") is None
    assert references.refresh(b"\0\0\1\x65abc") == "whole"
    assert references.refresh(b"\0\0\1\x61abc") is None


def test_a_damaged_group_stays_whole_and_says_so(tmp_path):
    video = write_video(tmp_path / "a.mp4", 120, 160, 90, gop=30)
    times = np.arange(0, 120, 9) / 30
    with open_stream(video.name, blob(video)) as (container, stream):
        places = [(p.pos, p.size) for p in container.demux(stream) if p.size]
    data = bytearray(video.read_bytes())
    at, size = places[40]
    data[at + 8 : at + size] = bytes(size - 8)
    video.write_bytes(data)
    info = probe(video.name, blob(video))
    batches = list(PyAV().read(video.name, blob(video), info, times, FrameSpec(90, 160), "cpu"))
    corrupt = np.concatenate([b.corrupt for b in batches])
    assert corrupt[5] and not corrupt[:4].any() and not corrupt[7:].any()
