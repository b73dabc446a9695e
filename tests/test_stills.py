"""Recordings of single pictures: HOT3D's clips, which the tests make, and VRS, of which there is a sample."""

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ego2robot import decode
from ego2robot.decode import clip_tar, policy, stills, vrs
from ego2robot.decode.sizes import packet_sizes
from ego2robot.errors import VideoError
from ego2robot.fisheye624 import CLOCKWISE, camera_of
from ego2robot.sources.base import file_blob
from ego2robot.types import Clip, FrameSpec
from tests.footage import frame_number
from tests.hot3d_files import HEIGHT, PARAMS, WIDTH, clip_members, write_tar

SAMPLE = Path(__file__).parents[2] / "shared" / "samples" / "aria_8frames.vrs"
needs_sample = pytest.mark.skipif(not SAMPLE.exists(), reason="../shared/samples is not here")
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("projectaria_tools") is None, reason="projectaria-tools is not installed"
)
STEP = 33_333_333
SPEC = FrameSpec(height=WIDTH, width=HEIGHT)


def times(n, start=1_700_000_000_123_456_789):
    return [start + i * STEP for i in range(n)]


def frames_at(blob, due, spec=SPEC):
    info = decode.probe("x", blob)
    backend, why = policy.pick(info, "auto", "cpu")
    assert why is None and backend.name == "stills"
    batches = list(backend.read("x", blob, info, np.array(due), spec, "cpu"))
    return (
        np.concatenate([b.frames_THWC.numpy() for b in batches]),
        np.concatenate([b.times_s for b in batches]),
        np.concatenate([b.corrupt for b in batches]),
        info,
    )


@pytest.fixture
def clip(tmp_path):
    return file_blob(write_tar(tmp_path / "clip-000001.tar", clip_members(times(40))))


def test_a_clip_is_a_video_of_upright_pictures_with_its_own_times(clip):
    due = [0.0, 0.034, 0.5, 0.51, 1.2999, 1.32]
    frames, shown, corrupt, info = frames_at(clip, due)
    assert (info.width, info.height, info.rotation, info.codec) == (HEIGHT, WIDTH, 90, "hot3d-clip")
    assert info.n_frames == 40 and info.fps == pytest.approx(30, abs=1e-3)
    assert info.start_s == pytest.approx(1_700_000_000.123456789) and info.duration_s == pytest.approx(4 / 3)
    expected = [int((d + 1e-6) / (STEP / 1e9)) for d in due]
    assert [frame_number(f) for f in frames] == expected
    assert shown == pytest.approx([i * STEP / 1e9 for i in expected], abs=1e-12)
    assert not corrupt.any()


def test_clips_of_the_job_are_cut_from_it_and_none_is_made_up_after_its_end(clip):
    info = decode.probe("x", clip)
    clips = [Clip(f"{i}", "v", first, 6, 6.0) for i, first in enumerate((0, 1, 3))]
    done = list(decode.read_clips("x", clip, info, clips, SPEC, stills.Stills(), "cpu"))
    assert [frame_number(f) for f in done[0].frames_THWC.numpy()] == [0, 5, 10, 15, 20, 25]
    assert isinstance(done[2], decode.ClipFailure) and "ends" in done[2].reason


def test_a_quest_has_grey_pictures_that_stand_as_they_are(tmp_path):
    blob = file_blob(write_tar(tmp_path / "clip-1.tar", clip_members(times(4), "1201-1")))
    frames, _, _, info = frames_at(blob, [0.0, 0.1], FrameSpec(height=HEIGHT, width=WIDTH))
    assert (info.width, info.height, info.rotation, info.pix_fmt) == (WIDTH, HEIGHT, 0, "gray")
    assert [frame_number(f) for f in frames] == [0, 3]


def test_a_damaged_picture_is_reported_and_the_others_are_used(tmp_path):
    members = clip_members(times(5))
    members = [(n, d[: len(d) // 2] if n == "000002.image_214-1.jpg" else d) for n, d in members]
    members = [(n, b"{" if n == "000003.info.json" else d) for n, d in members]
    blob = file_blob(write_tar(tmp_path / "clip-1.tar", members))
    frames, _, corrupt, info = frames_at(blob, [0.0, 0.034, 0.067, 0.134])
    assert corrupt.tolist() == [False, False, True, False] and info.n_frames == 4
    assert [frame_number(frames[i]) for i in (0, 1, 3)] == [0, 1, 4]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda m: [(n, b"no jpeg" if n.endswith("jpg") else d) for n, d in m], "corrupt"),
        (lambda m: [(n, d) for n, d in m if not n.endswith("jpg")], "no_video_stream"),
        (
            lambda m: [(n, b'{"image_timestamps_ns": 3}' if "info" in n else d) for n, d in m],
            "no_video_stream",
        ),
        (lambda m: [(n, b"[]" if "info" in n else d) for n, d in m], "no_video_stream"),
    ],
)
def test_a_tar_without_usable_pictures_is_one_line(tmp_path, change, kind):
    blob = file_blob(write_tar(tmp_path / "clip-1.tar", change(clip_members(times(3)))))
    with pytest.raises(VideoError) as caught:
        decode.probe("x", blob)
    assert caught.value.kind == kind and "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [600, 5000, 0.5])
def test_a_tar_that_breaks_off_is_refused_alone(clip, tmp_path, cut):
    whole = Path(clip.path).read_bytes()
    short = tmp_path / "short.tar"
    short.write_bytes(whole[: int(cut if cut > 1 else cut * len(whole))])
    with pytest.raises(VideoError) as caught:
        decode.probe("x", file_blob(short))
    assert caught.value.kind in ("truncated", "corrupt", "no_video_stream")


def test_member_names_never_become_paths_and_huge_pictures_are_not_made(tmp_path, monkeypatch):
    members = [*clip_members(times(2)), ("../../evil.info.json", b"{}"), ("/etc/000009.info.json", b"{}")]
    blob = file_blob(write_tar(tmp_path / "clip-1.tar", members))
    with clip_tar_of(blob) as recording:
        assert recording.frames == ["000000", "000001"] and recording.json("../../evil.info.json") == {}
    from PIL import Image

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(VideoError, match="none of its 2 pictures"):
        decode.probe("x", blob)


class clip_tar_of:
    def __init__(self, blob):
        self.recording = clip_tar.open_clip("x", blob)

    def __enter__(self):
        return self.recording

    def __exit__(self, *_):
        self.recording.close()


def test_an_ordinary_tar_or_file_is_no_recording(tmp_path):
    assert stills.kind_of(file_blob(write_tar(tmp_path / "a.tar", [("a.mp4", b"x")]))) is None
    (tmp_path / "b.mp4").write_bytes(b"VisionR")
    assert stills.kind_of(file_blob(tmp_path / "b.mp4")) is None


# -- VRS ------------------------------------------------------------------------------------------

HEADER = struct.Struct("<8sQIIqqqQQQII")


def vrs_bytes(front, compression=0, n_records=300):
    """Records of random sizes with the index before or after them, as the VRS library lays them out."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(40, 400, n_records)
    infos = b"".join(struct.pack("<dIBiH", 0.1 * i, int(n), 3, 214, 1) for i, n in enumerate(sizes))
    if compression:
        infos = pa.compress(infos, {1: "lz4", 2: "zstd"}[compression], asbytes=True)
    payload = struct.pack("<I", 1) + struct.pack("<iH", 214, 1) + struct.pack("<I", n_records) + infos
    index = struct.pack("<IIiIdHBBI", 32 + len(payload), 0, 1, 2, 0.0, 0, 3, compression, 0) + payload
    records = b"".join(struct.pack("<I", int(n)) + bytes(int(n) - 4) for n in sizes)
    first = 80 + (len(index) if front else 0)
    at = 80 if front else 80 + len(records)
    header = HEADER.pack(b"VisionRe", 1, 80, 32, at, 80, first, 0, 0, 0, 7, 1)
    return header + (index + records if front else records + index)


@pytest.mark.parametrize(
    ("front", "compression", "n"), [(True, 0, 300), (True, 1, 300), (True, 2, 70_000), (False, 0, 300)]
)
def test_how_long_a_vrs_should_be_is_known_from_its_index(tmp_path, front, compression, n):
    whole = vrs_bytes(front, compression, n)
    for data, complete in ((whole, True), (whole[:-1], False), (whole[: len(whole) // 2], False),
                           (whole[:200], False), (whole[:30], False)):  # fmt: skip
        (tmp_path / "a.vrs").write_bytes(data)
        with (tmp_path / "a.vrs").open("rb") as file:
            expected = vrs.expected_size(file)
        assert (expected == len(whole)) if complete else (expected > len(data))


def test_an_index_that_makes_no_sense_says_nothing_or_that_bytes_are_missing(tmp_path):
    whole = vrs_bytes(True, 2)
    rng = np.random.default_rng(0)
    damages = [(150, bytes(250)), (80, b"\x10\0\0\0"), (24, b"\xff" * 7 + b"\x7f"), (24, b"\xff" * 8)]
    damages += [(int(rng.integers(8, 300)), rng.bytes(8)) for _ in range(100)]
    for at, data in damages:
        (tmp_path / "a.vrs").write_bytes(whole[:at] + data + whole[at + len(data) :])
        with (tmp_path / "a.vrs").open("rb") as file:
            expected = vrs.expected_size(file)
        assert expected is None or expected > 0


def test_without_the_package_a_recording_is_one_line_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(vrs, "missing", lambda: "projectaria-tools is not installed; pip install …")
    (tmp_path / "a.vrs").write_bytes(vrs_bytes(False))
    with pytest.raises(VideoError, match="is not installed") as caught:
        decode.probe("a.vrs", file_blob(tmp_path / "a.vrs"))
    assert caught.value.kind == "unsupported"


@needs_package
@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (vrs_bytes(False)[:-1], "truncated"),
        (vrs_bytes(True, 2)[:-1], "truncated"),
        (b"VisionRe" + bytes(40), "corrupt"),
        (vrs_bytes(False), "corrupt"),
    ],
)
def test_a_vrs_that_cannot_be_used_is_one_line(tmp_path, data, kind, capfd):
    (tmp_path / "a.vrs").write_bytes(data)
    with pytest.raises(VideoError) as caught:
        decode.probe("a.vrs", file_blob(tmp_path / "a.vrs"))
    assert caught.value.kind in (kind, "not_a_video") and "\n" not in str(caught.value)
    assert "VRS" not in capfd.readouterr().err


@needs_sample
@needs_package
def test_a_real_aria_recording_gives_its_upright_rgb_pictures_at_their_own_times(capfd):
    blob = file_blob(SAMPLE)
    frames, shown, corrupt, info = frames_at(blob, [0, 0.05, 0.1, 0.34, 0.36, 0.39, 0.41], FrameSpec())
    assert (info.width, info.height, info.rotation, info.codec) == (1408, 1408, 90, "vrs")
    assert info.n_frames == 8 and info.start_s == 86.385246037
    assert len(frames) == 6 and not corrupt.any()  # the last is past the end
    assert shown[:3] == pytest.approx([0, 0.049971625, 0.099972825], abs=1e-9)
    recording = vrs.open_vrs("x", blob)
    stored = recording.picture(0)
    upright = np.rot90(stored, -1)[::4, ::4].astype(float)
    assert np.abs(upright.mean() - frames[0][:, 140:500].mean()) < 2
    recording.close()
    assert capfd.readouterr().err == ""


@needs_sample
@needs_package
def test_our_camera_model_is_that_of_the_package_and_so_is_the_turned_one():
    from projectaria_tools.core import calibration

    recording = vrs.open_vrs("x", file_blob(SAMPLE))
    theirs = recording._calibration.get_camera_calib("camera-rgb")
    turned = calibration.rotate_camera_calib_cw90deg(theirs)
    camera = recording.camera()
    ours = camera_of(camera["params"], camera["image_width"], camera["image_height"])
    points = np.random.default_rng(0).normal(size=(200, 3))
    points[:, 2] = np.abs(points[:, 2]) + 0.1
    expected = np.array([turned.project_no_checks(p) for p in points])
    assert ours.project(points) == pytest.approx(expected, abs=1e-6)
    assert np.array(camera["T_device_camera"]) == pytest.approx(
        turned.get_transform_device_camera().to_matrix()
    )


@needs_sample
@needs_package
def test_a_cut_aria_recording_is_said_to_be_cut(tmp_path):
    whole = SAMPLE.read_bytes()
    for keep in (len(whole) - 50, len(whole) // 2, 5000):
        (tmp_path / "a.vrs").write_bytes(whole[:keep])
        with pytest.raises(VideoError) as caught:
            decode.probe("a.vrs", file_blob(tmp_path / "a.vrs"))
        assert caught.value.kind == "truncated"


# -- the camera model -----------------------------------------------------------------------------


def test_turning_a_camera_turns_where_it_sees_a_point():
    camera = camera_of(PARAMS, WIDTH, HEIGHT)
    points = np.random.default_rng(0).normal(size=(100, 3))
    points[:, 2] = np.abs(points[:, 2]) + 0.2
    u, v = camera.project(points).T
    assert camera.clockwise().project(points @ CLOCKWISE.T) == pytest.approx(
        np.stack([HEIGHT - 1 - v, u], -1), abs=1e-9
    )
    wide = camera_of([60.0, 61.0, *PARAMS[1:]], WIDTH, HEIGHT)
    u, v = wide.project(points).T
    assert wide.clockwise().project(points @ CLOCKWISE.T)[:, 1] == pytest.approx(u)


def test_a_point_ahead_is_the_principal_point_and_none_behind_is_seen():
    camera = camera_of(PARAMS, WIDTH, HEIGHT)
    assert camera.project(np.array([0, 0, 2.0])) == pytest.approx(PARAMS[1:3])
    assert np.isnan(camera.project(np.array([0.1, 0, -2.0]))).all()
    with pytest.raises(ValueError, match="15 or 16"):
        camera_of(PARAMS[:9], 10, 10)


def test_packet_sizes_say_nothing_of_single_pictures(clip):
    info = decode.probe("x", clip)
    sizes = packet_sizes("x", clip, info, 0.2, 0.5)
    assert sizes.key.all() and sizes.times_s[0] <= 0.2 and sizes.times_s[-1] <= 0.5 + 1e-9
