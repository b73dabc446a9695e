import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ego2robot import config, decode
from ego2robot.decode.pyav import PyAV
from ego2robot.errors import UserError, VideoError
from ego2robot.sources import SOURCES
from ego2robot.types import Clip, FrameSpec, Video
from tests import lerobot_v3
from tests.footage import frame_number
from tests.lerobot_v3 import FPS, NAMES, SIDE, TOP

LEROBOT = SOURCES["lerobot"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return lerobot_v3.write(tmp_path_factory.mktemp("lerobot") / "set")


def listed(path, **options):
    found = list(LEROBOT.candidates(str(path), None, config.Source(kind="lerobot", **options)))
    return [f for f in found if not isinstance(f, VideoError)], [
        f for f in found if isinstance(f, VideoError)
    ]


def video_of(candidate):
    info = decode.probe(candidate.name, candidate.blob)
    return Video("0" * 16, candidate.name, "lerobot", candidate.blob, candidate.meta, info)


def test_a_video_file_is_a_candidate_and_its_episodes_are_its_spans(written):
    videos, problems = listed(written.root)
    assert not problems and [v.name for v in videos] == [
        f"videos/{TOP}/chunk-{c:03d}/file-{f:03d}.mp4" for c, f in ((0, 0), (0, 1), (1, 0))
    ]
    assert [[s.meta["episode_index"] for s in v.spans] for v in videos] == [["0", "1"], ["2"], ["3"]]
    second = videos[0].spans[1]
    assert second.start_s == pytest.approx(20 / 30) and second.end_s == pytest.approx(51 / 30)
    assert second.meta == {"episode_index": "1", "length": "31", "task": "wipe the table"}
    assert videos[0].spans[0].meta["task"] == "put the cup down; wipe the table"
    assert videos[0].meta["robot_type"] == "so100_follower" and videos[0].meta["dataset_fps"] == "30"


def test_another_camera_and_a_folder_of_datasets_can_be_chosen(written, tmp_path):
    videos, _ = listed(written.root, camera=SIDE)
    assert all(SIDE in v.name for v in videos)
    with pytest.raises(UserError, match=r"source\.camera=front: .* has observation\.images\.top"):
        listed(written.root, camera="front")
    (tmp_path / "all").mkdir()
    for name in ("b", "a"):
        (tmp_path / "all" / name).symlink_to(written.root)
    videos, _ = listed(tmp_path / "all")
    assert len(videos) == 6 and videos[0].name.startswith("a/videos/")


@pytest.mark.parametrize("state_type", ["fixed", "list", "double"])
def test_every_stored_value_comes_back_to_the_last_bit(tmp_path, state_type):
    done = lerobot_v3.write(tmp_path / "set", state_type=state_type)
    seen = 0
    for candidate in listed(done.root)[0]:
        video = video_of(candidate)
        for span in candidate.spans:
            e, n = int(span.meta["episode_index"]), int(span.meta["length"])
            times = span.start_s + np.arange(n) / FPS
            assert times[-1] + 1 / FPS == pytest.approx(span.end_s, abs=1e-9)
            found = LEROBOT.trajectory(video, times)
            assert found.state_TD.tobytes() == done.state[e].tobytes()
            assert found.action_TA.tobytes() == done.action[e].tobytes()
            seen += n
    assert seen == sum(map(len, done.state))
    assert found.state_names == tuple(NAMES) and found.action_names == ("left", "right")
    assert "own units" in found.units and "so100_follower" in found.units


def test_times_that_are_off_by_less_than_the_tolerance_hit_the_same_rows(written):
    video = video_of(listed(written.root)[0][0])
    times = np.arange(51) / FPS
    expected = np.concatenate(written.state[:2])
    for off in (-9e-5, 9e-5, -0.45 / FPS, 0.45 / FPS):
        assert (LEROBOT.trajectory(video, times + off).state_TD == expected).all()
    beyond = LEROBOT.trajectory(video, np.array([-0.1, 0.0, 51 / FPS, 99.0]))
    assert np.isnan(beyond.state_TD).all(1).tolist() == [True, False, True, True]


def test_the_frames_of_an_episode_are_those_of_its_rows(written):
    candidate = listed(written.root)[0][0]
    video = video_of(candidate)
    clip = Clip("x", "v", 20, 31, float(FPS))  # the second episode, on the grid of the dataset's own rate
    spec = FrameSpec(height=48, width=64)
    (frames,) = decode.read_clips("x", candidate.blob, video.info, [clip], spec, PyAV(), "cpu")
    assert [frame_number(f) for f in frames.frames_THWC.numpy()] == list(range(20, 51))
    found = LEROBOT.trajectory(video, frames.times_s)
    assert (found.state_TD == written.state[1]).all()


def test_only_the_rows_of_the_episode_are_read(written, monkeypatch):
    video = video_of(listed(written.root)[0][0])
    read = []
    original = pq.ParquetFile.read_row_groups
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_groups", lambda self, g, **k: read.append(list(g)) or original(self, g, **k)
    )
    LEROBOT.trajectory(video, np.array([0.7, 0.8]))
    assert read == [[1]]


# -- other versions, and what is broken -----------------------------------------------------------


def changed(tmp_path, **changes):
    return lerobot_v3.write(tmp_path / "set", pictures=False, **changes).root


@pytest.mark.parametrize("version", ["v2.1", "v2.0"])
def test_an_older_version_is_one_line_that_says_how_to_convert_it(tmp_path, version):
    videos, (problem,) = listed(changed(tmp_path, version=version))
    assert not videos and problem.kind == "unsupported"
    assert f"LeRobot format {version}" in str(problem) and "convert_dataset_v21_to_v30" in str(problem)


def images(info):
    for feature in info["features"].values():
        if feature["dtype"] == "video":
            feature["dtype"] = "image"
    return info | {"video_path": None}


def without(*keys):
    def change(info):
        return {k: v for k, v in info.items() if k not in keys}

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (images, "are images, not video"),
        (without("features"), "no features"),
        (without("video_path"), "no video_path"),
        (without("data_path"), "no data_path"),
        (without("fps"), "fps is None"),
        (lambda i: i | {"fps": "30"}, "fps is 30"),
        (lambda i: i | {"fps": -1}, "fps is -1"),
        (lambda i: i | {"features": {"action": i["features"]["action"]}}, "no camera"),
        (lambda i: i | {"features": {"action": 3}}, "no features"),
        (lambda i: i | {"codebase_version": None}, "LeRobot format"),
        (lambda i: [i], "mapping was expected"),
        (lambda i: i | {"features": {"../../x": {"dtype": "video"}}}, "a camera is called"),
    ],
)
def test_an_info_that_makes_no_sense_is_one_line(tmp_path, change, says):
    videos, problems = listed(changed(tmp_path, change_info=change))
    assert not videos and len(problems) == 1 and says in str(problems[0])
    assert "\n" not in str(problems[0])


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_an_info_that_is_no_json_is_one_line_and_other_datasets_go_on(tmp_path, written, data):
    (tmp_path / "broken" / "meta").mkdir(parents=True)
    (tmp_path / "broken" / "meta" / "info.json").write_bytes(data)
    (tmp_path / "fine").symlink_to(written.root)
    videos, problems = listed(tmp_path)
    assert len(videos) == 3 and len(problems) == 1 and "info.json" in str(problems[0])


@pytest.mark.parametrize(
    "template",
    [
        "../../{video_key}.mp4",
        "/etc/passwd",
        "{video_key.__class__}",
        "{0}",
        "a/{chunk_index:>900000000}",
        "",
        "a\0b",
    ],
)
def test_a_path_that_leaves_the_dataset_is_refused(tmp_path, template):
    videos, problems = listed(changed(tmp_path, change_info=lambda i: i | {"video_path": template}))
    assert not videos and problems and all(p.kind == "metadata" for p in problems)


def test_a_folder_without_a_dataset_is_one_line(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    for path in (tmp_path, tmp_path / "a.json", tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"LeRobot dataset, which has meta/info\.json"):
            listed(path)


def test_a_missing_video_costs_its_episodes_alone(written, tmp_path):
    root = shutil.copytree(written.root, tmp_path / "set")
    (root / "videos" / TOP / "chunk-000" / "file-000.mp4").unlink()
    videos, (problem,) = listed(root)
    assert len(videos) == 2 and problem.kind == "missing" and "of 2 episodes is not there" in str(problem)


def edit(row, **changes):
    return row | {k if k in row else f"videos/{TOP}/{k}": v for k, v in changes.items()}


@pytest.mark.parametrize(
    ("change", "reason", "left"),
    [
        (lambda r: edit(r, from_timestamp=float("nan")), "no times", 3),
        (lambda r: edit(r, to_timestamp=float("inf")), "no times", 3),
        (lambda r: edit(r, from_timestamp=-1.0), "no times", 3),
        (lambda r: edit(r, to_timestamp=0.1), "ends before it starts", 3),
        (lambda r: edit(r, to_timestamp=2000.0), "do not fit its length", 3),
        (lambda r: edit(r, length=3), "do not fit its length", 3),
        (lambda r: edit(r, chunk_index=-1), "missing or absurd", 3),
        (lambda r: edit(r, file_index=10**9), "missing or absurd", 3),
        (lambda r: edit(r, episode_index=0), "was there before", 3),
        (lambda r: edit(r, length=None), "missing or absurd", 3),
    ],
)
def test_an_absurd_episode_is_counted_and_the_others_are_used(tmp_path, change, reason, left):
    root = lerobot_v3.write(
        tmp_path / "set", change_episodes=lambda rows: [rows[0], change(rows[1]), *rows[2:]]
    ).root
    videos, problems = listed(root)
    assert sum(len(v.spans) for v in videos) == left
    assert len(problems) == 1 and reason in str(problems[0]) and "1 episode not used" in str(problems[0])


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no parquet" * 50])
def test_episodes_that_cannot_be_read_are_one_line(written, tmp_path, data):
    root = shutil.copytree(written.root, tmp_path / "set")
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    whole = path.read_bytes()
    for broken in (data, whole[: len(whole) // 2]):
        path.write_bytes(broken)
        videos, (problem,) = listed(root)
        assert not videos and "no Parquet, or damaged" in str(problem) and "\n" not in str(problem)
    pq.write_table(pa.table({"episode_index": [0]}), path)
    assert "no column" in str(listed(root)[1][0])
    shutil.rmtree(root / "meta/episodes")
    assert "no chunk-" in str(listed(root)[1][0])


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (None, "not there"),
        (b"", "damaged"),
        ({"episode_index": [0], "timestamp": [0.0], "action": [[1.0, 2.0]]}, "no column"),
        (
            {
                "episode_index": [9],
                "timestamp": [0.0],
                "action": [[1.0, 2]],
                "observation.state": [[1.0] * 3],
            },
            "no rows",
        ),
        (
            {"episode_index": [0], "timestamp": [0.0], "action": [[1.0]], "observation.state": [[1.0] * 3]},
            "2 values",
        ),
        (
            {"episode_index": [0], "timestamp": [0.0], "action": ["x"], "observation.state": [[1.0] * 3]},
            "of numbers",
        ),
        (
            {"episode_index": [0], "timestamp": [0.0], "action": [None], "observation.state": [[1.0] * 3]},
            "2 values",
        ),
    ],
)
def test_rows_that_do_not_fit_the_dataset_are_one_line(written, tmp_path, table, says):
    root = shutil.copytree(written.root, tmp_path / "set")
    video = video_of(listed(root)[0][0])
    path = root / "data/chunk-000/file-000.parquet"
    path.unlink()
    if isinstance(table, bytes):
        path.write_bytes(table)
    elif table:
        pq.write_table(pa.table(table), path)
    with pytest.raises(VideoError, match=says) as caught:
        LEROBOT.trajectory(video, np.array([0.0]))
    assert "\n" not in str(caught.value)


def test_a_dataset_that_is_gone_or_was_changed_is_noticed(written, tmp_path):
    root = shutil.copytree(written.root, tmp_path / "set")
    video = video_of(listed(root)[0][0])
    LEROBOT.trajectory(video, np.array([0.0]))
    info = json.loads((root / "meta/info.json").read_text())
    del info["features"]["observation.state"], info["features"]["action"]
    (root / "meta/info.json").write_text(json.dumps(info))
    assert LEROBOT.trajectory(video, np.array([0.0])) is None
    (root / "meta/info.json").unlink()
    with pytest.raises(VideoError, match=r"meta/info\.json of its dataset is gone"):
        LEROBOT.trajectory(video, np.array([0.0]))
