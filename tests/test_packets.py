"""What nothing else is decoded from is told from the packets alone, and leaving it out changes no picture."""

from __future__ import annotations

import random
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ego2robot.decode import probe
from ego2robot.decode.packets import LOOKAHEAD, References, disposable, needed
from ego2robot.decode.policy import backends
from ego2robot.types import Blob, FrameSpec
from tests.footage import frame_number, remux, write_video

SMALL = FrameSpec(90, 160)
PYAV = backends()["pyav"]
FORMATS = {
    "h264": {"bframes": 3, "gop": 24},
    "h264-flat": {"bframes": 2, "gop": 24, "options": {"x264-params": "b-pyramid=none"}},
    "h264-open-gop": {"bframes": 3, "gop": 24, "options": {"x264-params": "open-gop=1:scenecut=0"}},
    "hevc": {"codec": "hevc", "bframes": 4, "gop": 24},
    "hevc-layers": {"codec": "hevc", "bframes": 4, "options": {"x265-params": "bframes=4:temporal-layers=3"}},
    "av1": {"codec": "av1", "gop": 32},
}
LEFT_OUT = {"h264": 30, "h264-flat": 45, "h264-open-gop": 30, "hevc": 30, "av1": 15}


@pytest.fixture(scope="module", params=FORMATS)
def video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packets") / f"{request.param}.mp4"
    return write_video(path, n_frames=96, width=160, height=90, **FORMATS[request.param])


def packets_of(path: Path) -> tuple[str, bytes, list[bytes]]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        found = [bytes(packet) for packet in container.demux(stream) if packet.size]
        context = stream.codec_context
        return context.codec.canonical_name, bytes(context.extradata or b""), found


def decoded(path: Path, leave_out: bool) -> dict[float, np.ndarray]:
    """Every picture that comes, by its time."""
    found = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        context = stream.codec_context
        references = References(context.codec.canonical_name, context.extradata)
        for packet in container.demux(stream):
            if not (leave_out and packet.size and references.disposable(memoryview(packet))):
                found |= {frame.time: frame.to_ndarray(format="gray") for frame in packet.decode()}
    return found


def test_leaving_out_what_is_disposable_changes_no_other_picture(video: Path) -> None:
    every, rest = decoded(video, False), decoded(video, True)
    assert len(every) == 96
    assert rest.keys() <= every.keys()
    assert all(np.array_equal(rest[time], every[time]) for time in rest)
    least = LEFT_OUT.get(video.stem, 0)
    assert len(every) - len(rest) >= least, "nothing was left out"


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_length_prefixes_and_start_codes_say_the_same(codec: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60, 160, 90, codec=codec, bframes=3, gop=24)
    stream = remux(path, tmp_path / "a.ts")
    answers = []
    for file in (path, stream):
        name, extradata, packets = packets_of(file)
        assert (extradata[:1] == b"\x01") == (file is path)
        references = References(name, extradata)
        answers.append([references.disposable(packet) for packet in packets])
        assert answers[-1] == [disposable(name, extradata, packet) for packet in packets]
    assert answers[0] == answers[1]
    assert 15 <= sum(answers[0]) < 60


def test_a_picture_of_a_lower_sub_layer_is_needed_by_those_above() -> None:
    header = bytes([1, *[0] * 20, 3 << 3 | 3, 0, 0])  # three temporal sub-layers, lengths of four bytes
    for temporal, expected in ((1, False), (2, False), (3, True)):
        slice_n = bytes([0 << 1, temporal]) + b"\x80\x00"
        assert disposable("hevc", header, len(slice_n).to_bytes(4, "big") + slice_n) is expected
    unknown = bytes([1, *[0] * 20, 3, 0, 0])
    assert not disposable("hevc", unknown, b"\0\0\0\4\0\1\x80\0")


def test_a_packet_with_a_parameter_set_or_a_referred_slice_is_needed() -> None:
    unit = {
        "slice": b"\x01\x9e\x11",
        "reference": b"\x41\x9a\x11",
        "pps": b"\x68\xee\x11",
        "sei": b"\x06\x05\x11",
    }

    def packet(*names: str) -> bytes:
        return b"".join(len(unit[n]).to_bytes(4, "big") + unit[n] for n in names)

    assert disposable("h264", AVCC, packet("sei", "slice", "slice"))
    for names in (("slice", "reference"), ("pps", "slice"), ("sei",), ()):
        assert not disposable("h264", AVCC, packet(*names))


def test_vp9_is_never_thinned(tmp_path: Path) -> None:
    name, extradata, packets = packets_of(write_video(tmp_path / "a.webm", 12, 160, 90, codec="vp9"))
    assert not any(disposable(name, extradata, packet) for packet in packets)


@settings(max_examples=200, deadline=None)
@given(
    codec=st.sampled_from(["h264", "hevc", "av1", "vp9", "mjpeg"]),
    extradata=st.one_of(st.none(), st.binary(max_size=64), st.binary(max_size=64).map(lambda b: b"\x01" + b)),
    packets=st.lists(st.binary(max_size=96), max_size=4),
)
def test_any_bytes_get_an_answer(codec: str, extradata: bytes | None, packets: list[bytes]) -> None:
    references = References(codec, extradata)
    assert all(references.disposable(packet) in (True, False) for packet in packets)


def test_lengths_that_do_not_fill_the_packet_are_not_believed(video: Path) -> None:
    if not video.stem.startswith("h"):
        pytest.skip("AV1 units may end where a packet was cut")
    name, extradata, packets = packets_of(video)
    references = References(name, extradata)
    cut = [packet[: len(packet) - 1] for packet in packets if references.disposable(packet)]
    assert not any(references.disposable(packet) for packet in cut)


# -- what is due is kept --------------------------------------------------------------------------


def test_frames_are_those_that_decoding_everything_gives(video: Path) -> None:
    """At due times in a rhythm of their own, so that every kind of picture is asked for."""
    blob = Blob(str(video), 0, video.stat().st_size)
    info = probe("a", blob)
    draw = random.Random(4)
    every = list(decoded(video, False))
    for step in (1, 3, 4, 7):
        picked = sorted(set(range(draw.randrange(3), 96, step)) - {draw.randrange(96) for _ in range(6)})
        due = np.array([every[k] - every[0] for k in picked]) + 0.003
        batches = list(PYAV.read("a", blob, info, due, SMALL, "cpu"))
        numbers = [frame_number(frame) for batch in batches for frame in batch.frames_THWC.numpy()]
        assert numbers == picked
        times = np.concatenate([batch.times_s for batch in batches])
        assert times == pytest.approx(due - 0.003, abs=1e-6)


AVCC = bytes([1, 100, 0, 40, 0xFF, 0xE0, 0])


def thin(order: str, due: list[float], damage_at: int | None = None) -> list[int]:
    """Presentation times (units of 1 s) of the needed packets of ``4 2 1b 3b``; nothing refers to a b."""
    packets: list[av.Packet | None] = []
    for word in order.split():
        packet = av.Packet(b"\0\0\0\3" + (b"\x01\x9e\x11" if word.endswith("b") else b"\x41\x9a\x11"))
        packet.pts = int(word.removesuffix("b"))
        packets.append(packet)
    if damage_at is not None:
        packets.insert(damage_at, None)
    kept = needed(iter(packets), References("h264", AVCC), due, 1.0)
    return [packet.pts for packet in kept if packet is not None]


def test_a_picture_is_kept_while_it_is_on_screen() -> None:
    order = "0 4 2 1b 3b 8 6 5b 7b"
    assert thin(order, []) == [0, 4, 2, 8, 6]
    assert thin(order, [1.0]) == [0, 4, 2, 1, 8, 6]
    assert thin(order, [1.9]) == [0, 4, 2, 1, 8, 6]
    assert thin(order, [2.0]) == [0, 4, 2, 8, 6]
    assert thin(order, [0.5, 3.5, 7.2]) == [0, 4, 2, 3, 8, 6, 7]


def test_the_last_picture_is_kept_for_it_may_stay_long() -> None:
    assert thin("0 1b 2b", []) == [0, 2]


def test_a_picture_that_stays_long_is_kept_when_it_is_due_late() -> None:
    assert thin("0 1b 400 401", [399.0]) == [0, 1, 400, 401]


def test_nothing_is_left_out_before_damage() -> None:
    assert thin("0 2 1b 4 3b 6 5b", [], damage_at=5) == [0, 2, 1, 4, 3, 6]


def test_the_next_picture_is_looked_for_far_enough() -> None:
    """H.264 and HEVC may reorder over sixteen pictures."""
    late = " ".join(f"{k}" for k in range(20, 36))
    assert LOOKAHEAD > 16
    assert thin(f"0 18b {late} 19 40", [18.5]) == [0, 18, *range(20, 36), 19, 40]
    assert thin(f"0 18b {late} 19 40", [19.5]) == [0, *range(20, 36), 19, 40]


def test_memory_is_a_few_packets_however_long_the_video_is() -> None:
    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            taken += 1
            packet = av.Packet(b"\0\0\0\3\x41\x9a\x11")
            packet.pts = taken
            yield packet

    source = needed(endless(), References("h264", AVCC), [], 1.0)  # type: ignore[arg-type]
    for k in range(1, 200):
        packet = next(source)
        assert packet is not None
        assert packet.pts == k
        assert taken - k <= LOOKAHEAD
