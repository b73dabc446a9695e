"""Faces are covered where the detector finds them, names leave what describes a dataset."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from typer.testing import CliRunner

from ego2robot import cli, config, models
from ego2robot.errors import UserError
from ego2robot.export import lerobot, privacy, video
from ego2robot.export.clips_parquet import export_parquet
from ego2robot.export.webdataset import export_webdataset
from ego2robot.hands_net import faces as net_faces
from ego2robot.hands_net.faces import FaceNet
from ego2robot.report import html, write_report
from ego2robot.store.rundir import RunDir
from tests import faces, test_export_lerobot
from tests.footage import write_video

HEIGHT, WIDTH = 360, 640
NAMES = ("face_detection_short_range.tflite", "face_detection_full_range_sparse.tflite")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def networks() -> list[Path]:
    try:
        return [models.network_path(name, pull_if_missing=True) for name in NAMES]
    except UserError as error:
        pytest.skip(f"the networks cannot be had: {error}")


@pytest.fixture(scope="module")
def net(networks: list[Path]) -> FaceNet:
    return privacy.face_net()


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes."""
    shared = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return float(shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared))


def detail(picture_HWC: np.ndarray, box: np.ndarray) -> float:
    """Mean difference of neighbouring pixels in a box."""
    x0, y0, x1, y1 = box.round().astype(int)
    part = picture_HWC[max(0, y0) : y1, max(0, x0) : x1].astype(float)
    return float(np.abs(np.diff(part, axis=0)).mean() + np.abs(np.diff(part, axis=1)).mean())


def test_the_detector_agrees_with_mediapipes_own(networks: list[Path]) -> None:
    pytest.importorskip("ai_edge_litert.interpreter")
    try:
        from tests.mediapipe_faces import MediaPipeFaces

        reference = MediaPipeFaces(networks[0])
    except (ImportError, OSError) as error:
        pytest.skip(f"mediapipe does not run here: {error}")
    ours = FaceNet(*networks, looks=("near",))
    compared = 0
    for i, (height, width, size) in enumerate(((360, 640, 300), (480, 360, 200), (200, 200, 190))):
        picture = faces.wall(height, width, i)
        faces.put(picture, 20 + 10 * i, 5, size)
        scores, boxes = reference.detect(picture)
        found = ours(torch.from_numpy(picture)[None])
        n = int((found.score_BK[0] > 0).sum())
        assert n == len(scores) == 1
        np.testing.assert_allclose(found.score_BK[0, :n], scores, atol=1e-3)
        # MediaPipe gives corner and size in whole pixels, each cut off.
        np.testing.assert_allclose(found.box_BK4[0, :n], boxes, atol=2)
        compared += n
    assert compared == 3


@pytest.mark.parametrize("size", [40, 60, 90, 180, 340])
def test_faces_of_any_size_are_found_where_they_are(net: FaceNet, size: int) -> None:
    picture = faces.wall(HEIGHT, WIDTH, size)
    truth = faces.put(picture, 260, 8, size)
    found = net(torch.from_numpy(picture)[None])
    assert found.score_BK[0, 0] >= privacy.MIN_SCORE
    assert overlap(found.box_BK4[0, 0].numpy(), truth) > 0.5


def test_a_wall_has_no_face(net: FaceNet) -> None:
    frames = torch.from_numpy(np.stack([faces.wall(HEIGHT, WIDTH, seed) for seed in range(4)]))
    before = frames.clone()
    same, changed = privacy.blur_faces(frames, net)
    assert changed == 0 and same is frames and torch.equal(frames, before)


def test_several_faces_of_a_frame_are_found_and_a_frame_does_not_depend_on_others(net: FaceNet) -> None:
    pictures = [faces.wall(HEIGHT, WIDTH, seed) for seed in range(3)]
    truth = [faces.put(pictures[1], 20, 40, 150), faces.put(pictures[1], 420, 100, 60)]
    together = net(torch.from_numpy(np.stack(pictures)))
    alone = net(torch.from_numpy(pictures[1])[None])
    sure = together.box_BK4[1][together.score_BK[1] >= privacy.MIN_SCORE].numpy()
    assert len(sure) == 2 and all(max(overlap(box, t) for box in sure) > 0.5 for t in truth)
    torch.testing.assert_close(together.score_BK[1:2], alone.score_BK, atol=1e-4, rtol=0)
    assert not together.score_BK[0].ge(privacy.MIN_SCORE).any()


def test_frames_that_hold_nan_have_no_faces(net: FaceNet) -> None:
    frame = torch.from_numpy(faces.wall(HEIGHT, WIDTH)).float()
    frame[10, 10, 0] = float("nan")
    assert not net(frame[None]).score_BK.ge(privacy.MIN_SCORE).any()


def test_what_is_covered_cannot_be_told_and_the_rest_is_untouched(net: FaceNet) -> None:
    picture = faces.wall(HEIGHT, WIDTH)
    truth = faces.put(picture, 250, 60, 160)
    before = picture.copy()
    frames, changed = privacy.blur_faces(torch.from_numpy(picture)[None], net)
    after = frames[0].numpy()
    assert changed == 1
    x0, y0, x1, y1 = truth.round().astype(int)
    # Four patches across one and a half faces and more: at most five values of a channel along the face.
    colours = np.unique(after[y0:y1, x0:x1].reshape(-1, 3), axis=0)
    assert len(colours) <= privacy.CELLS**2
    assert detail(after, truth) < 0.5 * detail(before, truth)
    touched = np.argwhere((after != before).any(-1))
    assert touched.min(0)[0] > 60 and touched.max(0)[1] < 250 + 160 + 40
    assert not net(frames).score_BK.ge(privacy.MIN_SCORE).any()


def test_a_face_that_is_missed_between_two_frames_is_covered_too(net: FaceNet) -> None:
    pictures, truth = [], []
    for i in range(6):
        pictures.append(faces.wall(HEIGHT, WIDTH, i))
        truth.append(faces.put(pictures[-1], 100 + 25 * i, 80, 120))
    rng = np.random.default_rng(0)
    for i in (2, 3):  # as when the head turns away: what is left is no face for the detector
        x0, y0, x1, y1 = truth[i].round().astype(int)
        pictures[i][y0:y1, x0:x1] = rng.integers(0, 255, (y1 - y0, x1 - x0, 3))
    frames = torch.from_numpy(np.stack(pictures))
    alone = [privacy.blur_faces(frames[i : i + 1].clone(), net)[1] for i in range(6)]
    assert alone == [1, 1, 0, 0, 1, 1]
    before = frames.clone().numpy()
    _, changed = privacy.blur_faces(frames, net)
    assert changed == 6
    for i in (2, 3):
        assert detail(frames[i].numpy(), truth[i]) < 0.6 * detail(before[i], truth[i])


def test_faces_in_letterboxed_frames_are_covered_inside_the_picture(net: FaceNet) -> None:
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    inner = faces.wall(HEIGHT, 480)
    faces.put(inner, 0, 40, 200)
    frame[:, 80:560] = inner
    frames, changed = privacy.blur_faces(torch.from_numpy(frame)[None], net, content=(0, 80, HEIGHT, 480))
    assert changed == 1
    assert not frames[0, :, :80].any() and not frames[0, :, 560:].any()


def test_frames_of_another_kind_are_refused(net: FaceNet) -> None:
    with pytest.raises(ValueError, match=r"float32 \(1, 8, 8, 3\)"):
        privacy.blur_faces(torch.zeros(1, 8, 8, 3), net)


# -- what is followed -----------------------------------------------------------------------------


def boxes(*frames: list[tuple[float, float, float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Of (score, centre x, centre y, size) a frame: scores [T, 4] and boxes [T, 4, 4]."""
    scores, table = np.zeros((len(frames), 4)), np.zeros((len(frames), 4, 4))
    for t, found in enumerate(frames):
        for k, (score, x, y, size) in enumerate(found):
            scores[t, k] = score
            table[t, k] = (x - size / 2, y - size / 2, x + size / 2, y + size / 2)
    return scores, table


def test_a_gap_is_filled_along_the_way_and_both_ends_are_a_frame_longer() -> None:
    followed = privacy.follow(
        *boxes([], [(0.9, 100, 50, 40)], [], [], [(0.55, 130, 50, 40)], [], [], [], [], [])
    )
    assert [frame for frame, _ in followed] == [0, 1, 2, 3, 4, 5]
    assert [float(box[0] + box[2]) / 2 for _, box in followed] == [100, 100, 110, 120, 130, 130]


def test_what_nothing_sure_confirms_is_not_covered() -> None:
    assert privacy.follow(*boxes([(0.69, 100, 50, 40)], [(0.6, 102, 50, 40)])) == []


def test_a_face_is_continued_by_the_nearest_box_and_not_by_a_doubtful_one() -> None:
    followed = privacy.follow(
        *boxes([(0.9, 100, 50, 60), (0.6, 180, 60, 50)], [(0.55, 150, 60, 50)], [(0.9, 110, 50, 60)])
    )
    middle = {frame: (box[0] + box[2]) / 2 for frame, box in followed}
    # The box in the middle is nearer to the doubtful one, which nothing confirms: it goes to the sure face.
    assert middle == {0: 100, 1: 150, 2: 110} and len(followed) == 3


def test_faces_that_are_too_far_apart_or_unlike_in_size_are_two() -> None:
    far = privacy.follow(*boxes([(0.9, 100, 50, 40)], [], [(0.9, 400, 50, 40)]))
    assert sorted(frame for frame, _ in far) == [0, 1, 1, 2]
    sizes = privacy.follow(*boxes([(0.9, 100, 50, 20)], [], [(0.9, 100, 50, 100)]))
    assert {round(float(box[2] - box[0])) for _, box in sizes} == {20, 100}


def test_a_gap_that_is_too_long_is_not_filled() -> None:
    gap: list[list[tuple[float, float, float, float]]] = [[] for _ in range(privacy.MAX_GAP + 1)]
    followed = privacy.follow(*boxes([(0.9, 100, 50, 40)], *gap, [(0.9, 100, 50, 40)]))
    assert [frame for frame, _ in followed] == [0, 1, 4, 5]


@pytest.mark.parametrize(("height", "width"), [(360, 640), (256, 456), (480, 640), (64, 64), (36, 640)])
def test_tiles_reach_over_the_whole_picture_and_overlap(height: int, width: int) -> None:
    seen = np.zeros((height, width), int)
    found = net_faces.tiles(height, width)
    for top, left, rows, columns in found:
        assert rows == columns and 0 <= top <= height - rows and 0 <= left <= width - columns
        seen[top : top + rows, left : left + columns] += 1
    assert seen.min() >= 1 and len(found) <= 2 * (2 + 4 * max(height, width) / min(height, width))


# -- names ----------------------------------------------------------------------------------------


def test_people_and_places_become_pseudonyms_and_what_is_done_stays() -> None:
    strip = privacy.Stripper(b"salt")
    fields = {
        "task": "tighten a screw",
        "worker_id": "worker_017",
        "factory_id": "factory_001",
        "participant": "P01",
        "site_name": "Springfield",
        "gps": "48.1 11.5",
        "license": "apache-2.0",
        "recorded_by": "Ann Other",
        "session_name": "monday at Bob's",
    }
    told = strip.meta(fields)
    assert {key: told[key] for key in ("task", "license")} == {
        "task": "tighten a screw",
        "license": "apache-2.0",
    }
    assert set(told) == {"task", "license", "worker_id", "factory_id", "participant", "session_name"}
    for key in ("worker_id", "factory_id", "participant", "session_name"):
        assert fields[key] not in str(told) and told[key].rpartition("-")[2].isalnum()
    assert strip.meta(fields) == told
    assert privacy.Stripper(b"other").meta(fields)["worker_id"] != told["worker_id"]
    assert strip.meta({"worker_id": "worker_018"})["worker_id"] != told["worker_id"]


def test_a_video_and_a_message_about_it_lose_its_name_and_every_path() -> None:
    strip = privacy.Stripper(b"salt")
    name = "bobs_kitchen/monday.mp4"
    line = strip.line(f"{name}: cannot be read: /home/bob/videos/{name}: No such file", name)
    assert "bob" not in line and "monday" not in line and strip.video(name) in line


def test_the_salt_of_a_run_is_made_once_and_is_nobody_elses(tmp_path: Path) -> None:
    salt = privacy.salt_of(tmp_path)
    assert len(salt) == 16 and privacy.salt_of(tmp_path) == salt
    assert (tmp_path / privacy.SALT_FILE).stat().st_mode & 0o077 == 0
    other = tmp_path / "other"
    other.mkdir()
    assert privacy.salt_of(other) != salt


def test_a_salt_that_another_process_made_meanwhile_counts_and_half_of_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pseudonyms made with an empty salt could be found again by trying names one by one."""
    link, theirs = os.link, "12" * 16

    def meanwhile(aside: Path, path: Path) -> None:
        path.write_text(theirs)
        link(aside, path)

    monkeypatch.setattr(privacy.os, "link", meanwhile)
    assert privacy.salt_of(tmp_path) == bytes.fromhex(theirs)
    assert [path.name for path in tmp_path.iterdir()] == [privacy.SALT_FILE]
    for half in ("", theirs[:-1], theirs[:-2], "no secret"):
        (tmp_path / privacy.SALT_FILE).write_text(half)
        with pytest.raises(UserError, match=r"privacy-salt: not the secret"):
            privacy.salt_of(tmp_path)


def test_a_public_configuration_has_no_folder_of_the_machine() -> None:
    cfg = config.build(
        {
            "run_dir": "/home/bob/runs/mine",
            "source": {"path": "/home/bob/videos", "annotations": "/home/bob/labels.csv"},
            "export": {"path": "/home/bob/out"},
            "embed": {"videomae": {"weights": "/home/bob/weights/videomae"}},
        }
    )
    public = privacy.public_config(config.to_dict(cfg))
    text = json.dumps(public)
    assert "/home" not in text and "bob" not in text and '"videos"' in text
    assert public["embed"]["clip"] == config.to_dict(cfg)["embed"]["clip"]
    assert "videos" not in json.dumps(privacy.public_config(config.to_dict(cfg), strip=True)["source"])


@pytest.mark.parametrize("codec", list(video.CODECS))
def test_encoded_videos_say_neither_when_nor_where_nor_by_whom(codec: str) -> None:
    frames = np.stack([faces.wall(64, 96, i) for i in range(4)])
    mp4 = video.encode_episode(frames, 6, video.CODECS[codec])
    with av.open(io.BytesIO(mp4)) as container:
        tags = {**container.metadata, **container.streams.video[0].metadata}
    said = {key.lower() for key in tags}
    assert not said & {
        "creation_time",
        "location",
        "com.apple.quicktime.location.iso6709",
        "artist",
        "author",
    }
    assert said <= {
        *("major_brand", "minor_version", "compatible_brands", "encoder", "language", "handler_name"),
        "vendor_id",
    }


# -- exports --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, networks: list[Path]) -> RunDir:
    """A run over footage with a face, of which names tell a lot; privacy asked for."""
    folder = tmp_path_factory.mktemp("bobs-kitchen")
    torch.set_num_threads(1)

    def picture(i: int, height: int, width: int) -> np.ndarray:
        drawn = faces.wall(height, width, 3)
        faces.put(drawn, 40 + i, 20, 120)
        return drawn

    video_file = write_video(
        folder / "monday-bob.mp4", 120, 320, 180, picture=lambda i, w, h: picture(i, h, w)
    )
    tree = {
        **test_export_lerobot.CONFIG,
        "source": {"path": str(folder)},
        "export": {"blur_faces": True, "strip_metadata": True},
    }
    meta = [("worker_id", "bob"), ("task", "stir"), ("recorded_by", "alice")]
    found, _ = test_export_lerobot.make_run(
        folder / "run",
        [video_file],
        tree,
        lambda clip, number: {"meta": meta, "label": None, "label_score": None},
    )
    return found


def everything_said(folder: Path) -> str:
    """All names and texts of a dataset: paths, JSON, Markdown, tables and the members of tars."""
    parts = []
    for path in folder.rglob("*"):
        parts.append(path.relative_to(folder).as_posix())
        if path.suffix in (".json", ".md"):
            parts.append(path.read_text())
        elif path.suffix == ".parquet":
            parts.append(str(pq.read_table(path).to_pylist()) + str(pq.read_schema(path).metadata))
        elif path.suffix == ".tar":
            with tarfile.open(path) as tar:
                for member in tar:
                    parts.append(str(member.get_info()))
                    data = tar.extractfile(member)
                    if data and member.name.endswith(".json"):
                        parts.append(data.read().decode())
    return "\n".join(parts)


def check_said(folder: Path, run: RunDir, frames: int) -> None:
    text = everything_said(folder)
    for secret in ("bob", "monday", "alice", "kitchen", str(run.path), privacy.salt_of(run.path).hex()):
        assert secret not in text
    clip_id = run.table("clips")["clip_id"][0].as_py()
    assert clip_id not in text and privacy.Stripper(privacy.salt_of(run.path)).clip(clip_id) in text
    assert f"in {frames} of {frames} frames" in text and "no promise of anonymity" in text


def test_a_lerobot_dataset_has_no_faces_and_no_names_and_says_what_was_done(
    run: RunDir, tmp_path: Path, net: FaceNet
) -> None:
    result = lerobot.export_lerobot(run, tmp_path / "out", 10, codec="h264")
    assert result.episodes == 2 and result.covered == result.frames == 24
    check_said(result.path, run, 24)
    told = json.loads((result.path / "meta/ego2robot.json").read_text())
    assert told["faces_covered_in_frames"] == 24 and told["names_stripped"]
    assert html.dataset(run) is None
    (run.path / "dataset").symlink_to(result.path)
    shown = html.dataset(run)
    assert shown is not None and shown["covered"] == 24
    page = write_report(run, tmp_path / "report.html").read_text()
    assert 'faces covered in <b id="n-covered">24</b> frames' in page
    (mp4,) = result.path.rglob("*.mp4")
    with av.open(str(mp4)) as container:
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert len(frames) == 24
    assert not net(torch.from_numpy(frames[::8])).score_BK.ge(privacy.MIN_SCORE).any()


def test_clips_have_no_faces_and_no_names_either(run: RunDir, tmp_path: Path) -> None:
    shards = export_webdataset(run, tmp_path / "shards", None, codec="h264", hands=True)
    videos = export_parquet(run, tmp_path / "videos", None, codec="h264", hands=True)
    for result in (shards, videos):
        check_said(result.path, run, 24)
        assert json.loads((result.path / "ego2robot.json").read_text())["faces_covered_in_frames"] == 24
    table = pq.read_table(videos.path / "metadata.parquet").to_pylist()
    assert {row["video_name"] for row in table} == {
        privacy.Stripper(privacy.salt_of(run.path)).video("monday-bob.mp4")
    }
    assert all((videos.path / row["file_name"]).is_file() for row in table)
    meta = {item["key"]: item["value"] for item in table[0]["meta"]}
    assert set(meta) == {"task", "worker_id"} and meta["task"] == "stir"
    hands = pq.read_table(videos.path / "hands.parquet")["clip_id"].to_pylist()
    assert set(hands) == {row["clip_id"] for row in table}


def test_flags_ask_for_what_the_recipe_does_not(run: RunDir, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(run.path, plain, ignore=shutil.ignore_patterns("dataset", privacy.SALT_FILE))
    settings = yaml.safe_load((plain / "config.yaml").read_text())
    settings["export"] |= {"blur_faces": False, "strip_metadata": False}
    (plain / "config.yaml").write_text(yaml.safe_dump(settings))
    command = ["export", "parquet", str(plain), str(tmp_path / "out"), "--codec", "h264", "--workers", "0"]
    done = CliRunner().invoke(cli.app, [*command, "--top", "1"])
    assert done.exit_code == 0 and "covered" not in done.stdout and not (plain / privacy.SALT_FILE).exists()
    assert "monday-bob" in everything_said(tmp_path / "out")
    done = CliRunner().invoke(cli.app, [*command, "--top", "1", "--blur-faces", "--strip-metadata"])
    assert done.exit_code == 0 and "faces covered in 12 frames" in done.stdout, done.output
    assert "monday-bob" not in everything_said(tmp_path / "out")
