import io
import json
import tarfile

import pytest

from ego2robot.errors import UserError, VideoError
from ego2robot.sources import SOURCES

FOLDER, E10K = SOURCES["folder"], SOURCES["egocentric10k"]


def names(found):
    return [c.name for c in found]


def test_a_folder_is_listed_recursively_in_order_without_hidden_or_foreign_files(tmp_path):
    for name in ["b.mp4", "a/x.MKV", "a/.hidden.mp4", ".git/c.mp4", "notes.txt", "run/dataset/d.mp4"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = list(FOLDER.candidates(str(tmp_path), tmp_path / "run"))
    assert names(found) == ["a/x.MKV", "b.mp4"]
    assert found[1].blob.size == 1 and found[1].blob.whole_file


def test_a_single_file_is_taken_whatever_its_suffix(tmp_path):
    (tmp_path / "video.bin").write_bytes(b"12")
    assert names(FOLDER.candidates(str(tmp_path / "video.bin"), None)) == ["video.bin"]


def test_a_glob_lists_files_and_folders_below_its_fixed_part(tmp_path):
    for name in ["p1/a.mp4", "p2/sub/b.mp4", "q/c.mp4", "p3.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert names(FOLDER.candidates(f"{tmp_path}/p*", None)) == ["p1/a.mp4", "p2/sub/b.mp4"]
    assert names(FOLDER.candidates(f"{tmp_path}/**/*.mp4", None)) == ["p1/a.mp4", "p2/sub/b.mp4", "q/c.mp4"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path):
    (tmp_path / "take [1].mp4").write_bytes(b"x")
    assert names(FOLDER.candidates(str(tmp_path / "take [1].mp4"), None)) == ["take [1].mp4"]


@pytest.mark.parametrize(
    ("path", "says"),
    [("", "not set"), ("nope", "no such file"), ("nope*/x", "nothing matches"), (".", "no videos")],
)
def test_a_path_with_nothing_to_see_is_one_clear_line(tmp_path, path, says):
    with pytest.raises(UserError, match=says) as caught:
        list(FOLDER.candidates(path and str(tmp_path / path), None))
    assert "\n" not in str(caught.value)


def test_a_dangling_link_is_refused_alone(tmp_path):
    (tmp_path / "a.mp4").symlink_to(tmp_path / "gone")
    (tmp_path / "b.mp4").write_bytes(b"x")
    first, second = FOLDER.candidates(str(tmp_path), None)
    assert isinstance(first, VideoError) and first.kind == "missing"
    assert second.name == "b.mp4"


# -- Egocentric-10K -------------------------------------------------------------------------------

KEY = "factory001_worker001_{:05d}"


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def fields(i):
    return {
        "factory_id": "factory_001",
        "worker_id": "worker_001",
        "video_index": i,
        "fps": 30.0,
        "codec": "hevc",
    }


@pytest.fixture
def worker(tmp_path):
    return tmp_path / "factory_001" / "workers" / "worker_001"


def test_tar_members_are_byte_ranges_with_their_fields_and_intrinsics(tmp_path, worker):
    videos = [bytes([i]) * (1000 + i) for i in range(3)]
    members = []
    for i, data in enumerate(videos):
        members += [(f"{KEY.format(i)}.mp4", data), (f"{KEY.format(i)}.json", json.dumps(fields(i)).encode())]
    tar = write_tar(worker / "factory001_worker001_part00.tar", members)
    (worker / "intrinsics.json").write_text(json.dumps({"model": "fisheye", "fx": 1.5}))
    found = list(E10K.candidates(str(tmp_path), None))
    assert len(found) == 3
    for i, candidate in enumerate(found):
        with tar.open("rb") as raw:
            raw.seek(candidate.blob.offset)
            assert raw.read(candidate.blob.size) == videos[i]
        assert not candidate.blob.whole_file and candidate.problem is None
        assert candidate.meta["factory_id"] == "factory_001" and candidate.meta["video_index"] == str(i)
        assert json.loads(candidate.meta["intrinsics"])["fx"] == 1.5
        assert candidate.name.endswith(f"part00.tar::{KEY.format(i)}.mp4")


def test_a_missing_or_broken_json_costs_the_fields_and_not_the_video(tmp_path, worker):
    write_tar(
        worker / "a.tar",
        [
            (f"{KEY.format(0)}.mp4", b"x"),
            (f"{KEY.format(1)}.mp4", b"y"),
            (f"{KEY.format(1)}.json", b"{not json"),
            (f"{KEY.format(2)}.mp4", b"z"),
            (f"{KEY.format(2)}.json", b"[1]"),
        ],
    )
    found = list(E10K.candidates(str(tmp_path), None))
    assert [c.problem.kind for c in found] == ["metadata"] * 3
    assert "no factory001_worker001_00000.json" in found[0].problem.cause
    assert "not JSON" in found[1].problem.cause and "mapping" in found[2].problem.cause
    assert all(c.meta == {"factory_id": "factory_001", "worker_id": "worker_001"} for c in found)


def test_a_broken_intrinsics_file_is_said_once_and_videos_are_used(tmp_path, worker):
    for part in "ab":
        write_tar(worker / f"{part}.tar", [(f"{part}.mp4", b"x"), (f"{part}.json", b"{}")])
    (worker / "intrinsics.json").write_text("{")
    found = list(E10K.candidates(str(tmp_path), None))
    assert type(found[0]) is VideoError and len(found) == 3


@pytest.mark.parametrize("cut", [700, 512 + 3000, 512 * 14, 512 * 14 + 100, 512 * 28])
def test_a_tar_cut_in_the_middle_yields_what_is_whole_and_one_error(tmp_path, worker, cut):
    tar = write_tar(worker / "a.tar", [(f"{KEY.format(i)}.mp4", bytes([i]) * 3000) for i in range(4)])
    whole = tar.read_bytes()
    tar.write_bytes(whole[:cut])
    found = list(E10K.candidates(str(tmp_path), None))
    videos = [f for f in found if not isinstance(f, VideoError)]
    errors = [f for f in found if isinstance(f, VideoError)]
    assert len(errors) == 1 and errors[0].kind in ("truncated", "not_a_video")
    assert len(videos) == sum(cut >= 512 + 3000 + i * (512 + 3072) for i in range(4))
    assert all(v.blob.offset + v.blob.size <= cut for v in videos)


@pytest.mark.parametrize(
    ("data", "kind"), [(b"", "empty"), (b"this is text, no tar at all" * 50, "not_a_video")]
)
def test_a_file_that_is_no_tar_is_refused_alone(tmp_path, worker, data, kind):
    write_tar(worker / "b.tar", [("b.mp4", b"x"), ("b.json", b"{}")])
    (worker / "a.tar").write_bytes(data)
    first, second = E10K.candidates(str(tmp_path), None)
    assert isinstance(first, VideoError) and first.kind == kind
    assert second.name.endswith("b.tar::b.mp4")


def test_member_names_never_become_paths(tmp_path, worker):
    evil = "../../../etc/passwd.mp4"
    write_tar(worker / "a.tar", [(evil, b"x"), ("/abs.mp4", b"y"), ("../../../etc/passwd.json", b"{}")])
    found = [f for f in E10K.candidates(str(tmp_path), None) if not isinstance(f, VideoError)]
    assert all(c.blob.path == str(worker / "a.tar") for c in found)


def test_names_and_fields_that_utf8_cannot_hold_are_refused_or_spelled_out(tmp_path, worker):
    import os

    (tmp_path / os.fsdecode(b"bad\xff.mp4")).write_bytes(b"x")
    (refused,) = FOLDER.candidates(str(tmp_path), None)
    assert isinstance(refused, VideoError) and "not UTF-8" in refused.cause
    assert "\n" not in str(VideoError("a\nb.mp4", "empty"))
    fields = b'{"task": "half \\ud800 pair"}'
    write_tar(worker / "a.tar", [("\udcff.mp4", b"x"), ("\udcff.json", fields)])
    (found,) = E10K.candidates(str(tmp_path), None)
    for text in (found.name, *found.meta.values()):
        text.encode("utf-8")
    assert found.meta["task"] == "half \\ud800 pair"
