import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import av
import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

import ego2robot
from ego2robot import cli
from ego2robot import trajectories as made
from ego2robot.errors import UserError
from ego2robot.export import privacy, trajectories_config
from ego2robot.export import trajectories as writer
from ego2robot.export.video import CODECS, encode_episode
from ego2robot.sources import SOURCES
from ego2robot.sources.base import Candidate, Source, file_blob
from ego2robot.types import Span, Trajectory
from tests import faces
from tests.egodex_files import ATTRIBUTES, FPS, write_recording
from tests.footage import frame_number, write_video
from tests.inline_pool import InlinePool
from tests.test_privacy import everything_said

SMALL = {"drawn": False, "width": 160, "height": 90}
GUIDE = ("leftHand", "rightHand", "leftIndexFingerTip", "rightIndexFingerTip", "camera")
LENGTHS = {"cup/0": 70, "cup/1": 20, "stack/0": 33, "stack/1": 50}  # frames of the good recordings


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """Four good recordings, and four of which something is broken."""
    root = tmp_path_factory.mktemp("egodex") / "test"
    for seed, (name, n) in enumerate(LENGTHS.items()):
        folder, _, index = name.partition("/")
        write_recording(root / folder, int(index), n=n, seed=seed, **SMALL)
    write_recording(root / "cup", 2, n=40, seed=9, **SMALL)
    cut = root / "cup" / "2.mp4"
    cut.write_bytes(cut.read_bytes()[:-3000])
    write_recording(root / "cup", 3, n=3, seed=10, **SMALL).data.write_bytes(b"no HDF5")
    write_recording(root / "stack", 2, n=3, seed=11, **SMALL).data.unlink()
    write_recording(root / "stack", 3, n=3, seed=12, **SMALL).video.write_bytes(b"no video")
    return root


BROKEN = {"cup/2.mp4", "cup/3.hdf5", "stack/2.mp4", "stack/3.mp4"}


@pytest.fixture
def inline(monkeypatch):
    """Work in this process: what is tested is what comes out, not that children start."""
    monkeypatch.setattr(writer, "Pool", lambda factory, args, *_, **__: InlinePool(factory(*args)))


def settings(source, out, **more):
    tree = {"dataset.dataset_path": str(source), "output.output_dir": str(out)}
    return trajectories_config.load(None, tree | {key.replace("__", "."): v for key, v in more.items()})


def rows(folder):
    return [row for path in sorted(folder.glob("train-*.parquet")) for row in pq.read_table(path).to_pylist()]


def pictures(data):
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def by_hand(data, kept):
    """The guide's 15 numbers, straight from the file."""
    with h5py.File(data) as file:
        return np.concatenate([file[f"transforms/{name}"][:][kept, :3, 3] for name in GUIDE], 1)


# -- one by one -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 64, 300, 1801])
def test_frames_are_chosen_by_linear_interpolation_of_their_numbers(n):
    expected = sorted({int(k * (n - 1) / 31) for k in range(32)}) if n > 32 else list(range(n))
    assert made.chosen(n, 32).tolist() == expected
    assert made.chosen(n, None).tolist() == list(range(n))


def test_a_trajectory_has_the_frames_the_task_and_the_actions_of_the_file(part):
    refused = []
    found = list(ego2robot.iter_trajectories(str(part), on_error=refused.append))
    assert [t.name for t in found] == [f"{name}.mp4" for name in LENGTHS]
    assert {e.name for e in refused} == BROKEN
    for seed, (t, n) in enumerate(zip(found, LENGTHS.values(), strict=True)):
        kept = made.chosen(n, 32)
        assert t.frames.shape == (len(kept), 256, 256, 3) and t.frames.dtype == np.uint8
        assert [frame_number(frame) for frame in t.frames] == (kept + 128 * seed).tolist()
        np.testing.assert_allclose(t.times_s, kept / FPS, atol=1e-6)
        assert (t.actions == by_hand(part / t.name.replace("mp4", "hdf5"), kept)).all()
        assert t.actions.shape == (len(t.frames), 15) and len(t.action_names) == 15
        assert t["task"] == t.task == ATTRIBUTES["llm_description"] and t.task_name == t.name.split("/")[0]
        assert not t.is_robot and t.quality_label == "successful" and t.fps == 30
    with pytest.raises(KeyError):
        found[0]["nothing"]


def test_actions_in_the_cameras_frame_have_the_hands_there(part):
    t = next(ego2robot.iter_trajectories(str(part), frame="camera"))
    world = next(ego2robot.iter_trajectories(str(part)))
    with h5py.File(part / "cup" / "0.hdf5") as file:
        T = np.linalg.inv(file["transforms/camera"][0].astype(float)) @ file["transforms/leftHand"][0]
    np.testing.assert_allclose(t.actions[0, :3], T[:3, 3], atol=1e-5)
    assert (t.actions[:, 12:] == world.actions[:, 12:]).all()


def test_one_trajectory_is_read_at_a_time_and_no_more_than_wanted(part, monkeypatch):
    read, whole = [], made.read
    monkeypatch.setattr(
        made, "read", lambda episode, *more: read.append(episode.name) or whole(episode, *more)
    )
    iterator = ego2robot.iter_trajectories(str(part), max_trajectories=2)
    assert read == []
    next(iterator)
    assert read == ["cup/0.mp4"]
    assert len(list(iterator)) == 1 and read == ["cup/0.mp4", "cup/1.mp4"]


def test_iterating_goes_on_after_an_id(part, monkeypatch):
    every = [t.id for t in ego2robot.iter_trajectories(str(part), max_frames=2)]
    assert len(set(every)) == 4
    for k in range(4):
        rest = ego2robot.iter_trajectories(str(part), max_frames=2, start_after=every[k])
        assert [t.id for t in rest] == every[k + 1 :]
    with pytest.raises(UserError, match="no trajectory has the id"):
        list(ego2robot.iter_trajectories(str(part), start_after="0" * 16))


def test_frames_without_poses_have_unknown_actions(tmp_path):
    write_recording(tmp_path, 0, n=20, n_poses=12, **SMALL)
    (t,) = ego2robot.iter_trajectories(str(tmp_path))
    assert np.isfinite(t.actions[:12]).all() and np.isnan(t.actions[12:]).all()


def test_damage_in_the_middle_of_a_video_is_named(tmp_path):
    recording = write_recording(tmp_path, 0, n=60, **SMALL)
    data = bytearray(recording.video.read_bytes())
    with av.open(str(recording.video)) as container:
        at, size = [(p.pos, p.size) for p in container.demux(video=0) if p.size][40]
    data[at + 8 : at + size] = bytes(size - 8)
    recording.video.write_bytes(data)
    refused = []
    assert not list(ego2robot.iter_trajectories(str(tmp_path), on_error=refused.append))
    assert refused[0].kind == "corrupt" and "0.mp4: damaged at 1.3 s" in str(refused[0])


class Annotated(Source):
    """Two spans in one video, and actions of the dataset's own."""

    def candidates(self, path, skip, options=None):
        spans = (Span(1.0, 1.5, {"task": "second"}), Span(0.2, 0.6, {"task": "first"}), Span(9, 10, {}))
        yield Candidate("a.mp4", file_blob(Path(path) / "a.mp4"), {"camera": "top"}, spans=spans)

    def trajectory(self, video, times_s, options=None):
        values = times_s[:, None].astype(np.float32)
        return Trajectory(values, np.tile(values, 2), ("t",), ("a", "b"), "seconds")


def test_annotated_spans_are_trajectories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "manifest", Annotated())
    write_video(tmp_path / "a.mp4", 60, 160, 90)
    refused = []
    first, second = ego2robot.iter_trajectories(str(tmp_path), "manifest", 9, 8, on_error=refused.append)
    assert (first.task, second.task) == ("first", "second") and first.meta["camera"] == "top"
    assert [frame_number(f) for f in first.frames] == [6, 7, 9, 10, 12, 13, 15, 17]
    assert [frame_number(f) for f in second.frames] == [30, 32, 34, 36, 38, 40, 42, 44]
    np.testing.assert_allclose(second.actions, np.tile(second.times_s[:, None], 2), atol=1e-6)
    assert first.action_names == ("a", "b") and first.id != second.id
    assert "9.00–10.00 s]: no frame in it" in str(refused[0])


# -- as a dataset ---------------------------------------------------------------------------------


def test_the_command_writes_parts_that_datasets_opens_offline(part, tmp_path, inline):
    """A real child, the real library, no network; what fails is named and costs nothing else."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    command = [sys.executable, "-m", "ego2robot.cli", "export", "trajectories"]
    one = subprocess.run(
        [*command, part, out, "--dataset", "egodex", "--max-frames", "8", "--output.num_workers=1"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert one.returncode == 0, one.stderr
    assert "4 trajectories, 32 frames" in one.stdout and "4 left out" in one.stdout
    for name in BROKEN:
        assert f"left out: {name}: " in one.stderr
    cup = {"dataset__dataset_name": "egodex_cup", "output__max_trajectories": 1}
    writer.export_trajectories(settings(part / "cup", out, **cup))
    script = f"""
        import datasets, json
        print(json.dumps(datasets.get_dataset_config_names({str(out)!r})))
        for name in ("egodex_test", "egodex_cup"):
            rows = datasets.load_dataset({str(out)!r}, name, split="train", cache_dir={str(cache)!r})
            print(json.dumps([[r["id"], r["task"], len(r["frames"]), r["actions"]] for r in rows]))
        print(json.dumps(sorted(rows.features)))
    """
    environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(cache))
    loaded = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert loaded.returncode == 0, loaded.stderr
    names, test, cup, columns = (json.loads(line) for line in loaded.stdout.splitlines())
    assert sorted(names) == ["egodex_cup", "egodex_test"] and len(test) == 4 and len(cup) == 1
    assert {"id", "task", "frames", "actions", "fps", "source", "is_robot", "quality_label"} < set(columns)
    assert {"preference_group_id", "preference_rank", "task_name", "data_source"} < set(columns)
    for (_, task, size, actions), (name, n) in zip(test, LENGTHS.items(), strict=True):
        kept = made.chosen(n, 8)
        assert task == ATTRIBUTES["llm_description"] and size > 1000
        assert (np.float32(actions) == by_hand(part / f"{name}.hdf5", kept)).all()
    head = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert head["license"] == "cc-by-nc-nd-4.0"
    about = json.loads((out / "meta" / "ego2robot.json").read_text())
    assert about["parts"]["egodex_test"]["failed"] == 4
    assert str(tmp_path) not in (out / "README.md").read_text() + json.dumps(about)


def test_the_mp4_of_a_row_holds_its_frames(part, tmp_path, inline):
    result = writer.export_trajectories(settings(part, tmp_path / "out"))
    found = rows(result.path)
    assert [row["video"] for row in found] == [f"{name}.mp4" for name in LENGTHS]
    for seed, (row, n) in enumerate(zip(found, LENGTHS.values(), strict=True)):
        seen = pictures(row["frames"])
        kept = made.chosen(n, 32)
        assert [frame_number(f) for f in seen] == (kept + 128 * seed).tolist()
        assert {f.shape for f in seen} == {(256, 256, 3)}
        assert len(row["actions"]) == len(row["timestamps"]) == len(seen)
        assert row["fps"] == row["source_fps"] == 30 and row["data_source"] == "egodex_test"
    assert dict(result.failed).keys() == BROKEN
    assert result.trajectories == 4 and result.shards == 1


def test_the_form_of_the_picture_can_be_kept(part, tmp_path, inline):
    keep = settings(part, tmp_path / "out", output__shortest_edge_size=100, output__max_trajectories=1)
    (row,) = rows(writer.export_trajectories(keep).path)
    assert {f.shape for f in pictures(row["frames"])} == {(100, 178, 3)}


def test_faces_are_covered_in_the_form_of_the_picture_before_it_is_stretched(tmp_path, inline):
    shown = np.stack([faces.wall(360, 640, 1)] * 8)
    for frame in shown[2:6]:
        x0, y0, x1, y1 = faces.put(frame, 220, 40, 160)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(encode_episode(shown, 30, CODECS["h264"]))
    found = {}
    for blur in (False, True):
        asked = settings(
            tmp_path / "in", tmp_path / f"out{blur}", dataset__kind="folder", output__blur_faces=blur
        )
        result = writer.export_trajectories(asked)
        assert result.covered == (4 if blur else None) or (blur and 4 < result.covered <= 8)
        (row,) = rows(result.path)
        found[blur] = np.stack(pictures(row["frames"])).astype(float)
        high, wide = (slice(int(a * k), int(b * k)) for a, b, k in ((y0, y1, 256 / 360), (x0, x1, 0.4)))
        assert ("covered" in json.loads((result.path / "export.json").read_text())) == blur
    changed = np.abs(found[True] - found[False])
    assert changed[2:6, high, wide].mean() > 8  # eyes and mouth are gone
    rest = np.delete(changed, np.s_[60:180], axis=2)
    assert rest.mean() < 3
    assert "covered" in (tmp_path / "outTrue" / "README.md").read_text()
    again = settings(tmp_path / "in", tmp_path / "outTrue", dataset__kind="folder")
    with pytest.raises(UserError, match="blur_faces"):
        writer.export_trajectories(again)


SECRETS = ("bob", "kitchen", "alice", "monday")


def test_recordings_have_pseudonyms_that_a_second_start_knows_again(tmp_path, inline):
    """Names of a person, a place and a day, in folders, files and messages: the part says none of them."""
    task = tmp_path / "bobs-kitchen" / "alice_cup"
    for i in range(3):
        write_recording(task, i, n=5, seed=i, **SMALL)
    write_recording(task.with_name("monday"), 0, n=5, seed=7, **SMALL)
    (task / "2.hdf5").unlink()
    asked = {"output__strip_metadata": True}
    out = tmp_path / "out"
    first = writer.export_trajectories(
        settings(tmp_path / "bobs-kitchen", out, output__max_trajectories=1, **asked)
    )
    assert first.trajectories == 1
    told = []
    again = writer.export_trajectories(settings(tmp_path / "bobs-kitchen", out, **asked), tell=told.append)
    assert again.path == first.path and again.trajectories == 3 and again.shards == 2
    assert told == ["left out: alice_cup/2.mp4: no poses beside it (2.hdf5); download it again"]
    assert dict(again.failed).keys() == {"alice_cup/2.mp4"}, "the user is told its name"
    salt = tmp_path / "out.privacy-salt"
    made_of = [t.id for t in ego2robot.iter_trajectories(str(tmp_path / "bobs-kitchen"))]
    said = everything_said(out)
    for secret in (*SECRETS, "2.hdf5", str(tmp_path), salt.read_text().strip(), *made_of):
        assert secret not in said
    strip = privacy.Stripper(privacy.salt_at(salt))
    found = rows(again.path)
    names = [f"{name}.mp4" for name in ("alice_cup/0", "alice_cup/1", "monday/0")]
    assert [row["video"] for row in found] == [strip.video(name) for name in names]
    assert [row["id"] for row in found] == [strip.clip(made) for made in made_of]
    assert [row["task_name"] for row in found] == [
        strip.pseudonym("task", name) for name in ("alice_cup", "alice_cup", "monday")
    ]
    assert {row["task"] for row in found} == {ATTRIBUTES["llm_description"]}
    assert {row["data_source"] for row in found} == {again.path.name}
    state = json.loads((again.path / "export.json").read_text())
    assert state["failed"] == {strip.video("alice_cup/2.mp4"): "missing"}
    assert f"In `{again.path.name}` recordings" in (out / "README.md").read_text()
    write_recording(task, 2, n=5, seed=2, **SMALL)
    third = writer.export_trajectories(settings(tmp_path / "bobs-kitchen", out, **asked))
    assert third.trajectories == 4 and not third.failed
    assert not json.loads((again.path / "export.json").read_text())["failed"]


def test_pseudonyms_are_frozen_with_a_part_and_their_secret_is_needed_again(part, tmp_path, inline):
    out = tmp_path / "out"
    plain = {"dataset__dataset_name": "mine", "output__max_trajectories": 1}
    asked = {**plain, "output__strip_metadata": True}
    writer.export_trajectories(settings(part, out, **asked))
    with pytest.raises(UserError, match="strip_metadata: True → None"):
        writer.export_trajectories(settings(part, out, **plain))
    salt = tmp_path / "out.privacy-salt"
    kept = salt.read_text()
    salt.unlink()
    with pytest.raises(UserError, match=r"out\.privacy-salt: gone, .*put it back"):
        writer.export_trajectories(settings(part, out, output__strip_metadata=True))
    assert not salt.exists()
    salt.write_text("ab" * 16)
    with pytest.raises(UserError, match=r"out\.privacy-salt: another one, .*put it back"):
        writer.export_trajectories(settings(part, out, output__strip_metadata=True))
    salt.write_text(kept)
    command = ["export", "trajectories", str(part), str(out), "--strip-metadata", "--max-trajectories=2"]
    done = CliRunner().invoke(cli.app, [*command, "--dataset.dataset_name=mine"])
    assert done.exit_code == 0 and "2 trajectories" in done.output, done.output
    other = writer.export_trajectories(settings(part, tmp_path / "other", **plain))
    assert "pseudonyms" not in (tmp_path / "other" / "README.md").read_text() and other.trajectories == 1
    assert not (tmp_path / "other.privacy-salt").exists()


def test_spans_of_a_video_have_its_pseudonym(tmp_path, monkeypatch, inline):
    monkeypatch.setitem(SOURCES, "manifest", Annotated())
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "a.mp4", 60, 160, 90)
    asked = {"dataset__kind": "manifest", "output__strip_metadata": True}
    result = writer.export_trajectories(settings(tmp_path / "in", tmp_path / "out", **asked))
    video = privacy.Stripper(privacy.salt_at(tmp_path / "out.privacy-salt")).video("a.mp4")
    spans = {row["video"]: row["task_name"] for row in rows(result.path)}
    assert spans == {f"{video} [0.20–0.60 s]": "first", f"{video} [1.00–1.50 s]": "second"}
    again = writer.export_trajectories(settings(tmp_path / "in", tmp_path / "out", **asked))
    assert again.trajectories == 2 and again.shards == 1


def test_an_export_goes_on_after_a_kill_with_the_rows_of_an_undisturbed_one(part, tmp_path, inline):
    script = f"""
        import os, signal
        from ego2robot.export import trajectories as writer, trajectories_config
        from tests.inline_pool import InlinePool
        writer.Pool = lambda factory, args, *_, **__: InlinePool(factory(*args))
        writer.SHARD_BYTES = 1
        tree = {{"dataset.dataset_path": {str(part)!r}, "output.output_dir": {str(tmp_path / "out")!r}}}
        def show(progress):
            if progress.done == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        writer.export_trajectories(trajectories_config.load(None, tree), show)
    """
    code = textwrap.dedent(script)
    killed = subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[1])
    assert killed.returncode == -signal.SIGKILL
    folder = tmp_path / "out" / "egodex_test"
    before = {path.name: path.read_bytes() for path in folder.glob("train-*")}
    assert len(before) >= 2
    (folder / ".tmp-train-00009.parquet.x").write_bytes(b"half")
    again = writer.export_trajectories(settings(part, tmp_path / "out"))
    assert all((folder / name).read_bytes() == data for name, data in before.items())
    assert not list(folder.glob(".tmp-*"))
    other = writer.export_trajectories(settings(part, tmp_path / "other"))
    assert rows(again.path) == rows(other.path)
    assert again.failed == other.failed and again.frames == other.frames


def test_more_is_added_and_what_failed_is_tried_again(tmp_path, inline):
    for i in range(3):
        write_recording(tmp_path / "test" / "cup", i, n=5, seed=i, **SMALL)
    broken = tmp_path / "test" / "cup" / "1.hdf5"
    whole = broken.read_bytes()
    broken.write_bytes(b"x")
    out = tmp_path / "out"
    first = writer.export_trajectories(settings(tmp_path / "test", out, output__max_trajectories=1))
    assert first.trajectories == 1
    second = writer.export_trajectories(settings(tmp_path / "test", out))
    assert second.trajectories == 2 and list(dict(second.failed)) == ["cup/1.hdf5"]
    broken.write_bytes(whole)
    third = writer.export_trajectories(settings(tmp_path / "test", out))
    assert [r["video"] for r in rows(third.path)] == [
        "cup/0.mp4",
        "cup/2.mp4",
        "cup/1.mp4",
    ] and not third.failed


def test_the_same_bytes_twice_are_one_trajectory(tmp_path, inline):
    for name in ("a", "b"):
        write_recording(tmp_path / "test" / name, 0, n=5, **SMALL)
    result = writer.export_trajectories(settings(tmp_path / "test", tmp_path / "out"))
    assert result.trajectories == 1 and "same bytes" in dict(result.failed)["b/0.mp4"]


def test_a_worker_that_dies_costs_its_file_alone(tmp_path, monkeypatch):
    from ego2robot.jobs.pool import Event

    for i in range(3):
        write_recording(tmp_path / "test" / "cup", i, n=5, seed=i, **SMALL)

    class Dying(InlinePool):
        def run(self, tasks):
            for event in super().run(tasks):
                if event.task.name != "cup/1.mp4":
                    yield event
                elif event.kind == "done":
                    yield Event("crashed", event.task, "ended by SIGSEGV", 1, again=True)
                    yield Event("crashed", event.task, "ended by SIGSEGV", 2)

    monkeypatch.setattr(writer, "Pool", lambda factory, args, *_, **__: Dying(factory(*args)))
    result = writer.export_trajectories(settings(tmp_path / "test", tmp_path / "out"))
    assert result.trajectories == 2 and "ended by SIGSEGV" in dict(result.failed)["cup/1.mp4"]


def test_rows_come_in_the_order_of_the_source_whoever_is_done_first(part, tmp_path, monkeypatch):
    class Backwards(InlinePool):
        def run(self, tasks):
            events = list(super().run(tasks))
            kept = [e for e in events if e.kind != "idle"]
            yield from reversed(kept)

    monkeypatch.setattr(writer, "Pool", lambda factory, args, *_, **__: Backwards(factory(*args)))
    result = writer.export_trajectories(settings(part, tmp_path / "out"))
    assert [row["video"] for row in rows(result.path)] == [f"{name}.mp4" for name in LENGTHS]


def test_a_source_without_actions_says_so(tmp_path, inline):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", 10, 160, 90)
    chosen = settings(tmp_path / "videos", tmp_path / "out", dataset__kind="folder")
    result = writer.export_trajectories(chosen)
    (row,) = rows(result.path)
    assert row["actions"] == [] and row["task"] == "" and len(pictures(row["frames"])) == 10
    assert any("no actions: the source folder gives none" in w for w in result.warnings)
    assert any("no task text" in w for w in result.warnings)


# -- what is refused ------------------------------------------------------------------------------


def test_nothing_that_can_be_used_is_an_error_that_names_one_reason(tmp_path, inline):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match=r"1 failed, such as 0\.mp4: no poses beside it"):
        writer.export_trajectories(settings(tmp_path / "test", tmp_path / "out"))
    with pytest.raises(UserError, match="no such file"):
        writer.export_trajectories(settings(tmp_path / "gone", tmp_path / "out2"))


def test_a_part_is_not_mixed_with_other_settings_nor_a_folder_with_other_things(part, tmp_path, inline):
    out = tmp_path / "out"
    writer.export_trajectories(settings(part, out, output__max_trajectories=1))
    with pytest.raises(UserError, match="max_frames: 32 → 16"):
        writer.export_trajectories(settings(part, out, output__max_frames=16))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds something else \(thesis.tex\)"):
        writer.export_trajectories(settings(part, tmp_path / "home"))
    for name in ("../up", "meta", ".hidden", "a b"):
        with pytest.raises(UserError, match="dataset_name"):
            writer.export_trajectories(settings(part, out, dataset__dataset_name=name))
    with writer._alone(out / "egodex_test"), pytest.raises(UserError, match="another process"):
        writer.export_trajectories(settings(part, out))


def test_a_full_disk_is_one_line_and_what_is_complete_stays(part, tmp_path, inline, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 1)
    write, calls = writer.atomic.write, []

    def full(path, fill):
        calls.append(path)
        if path.name == "train-00001.parquet":
            raise OSError(28, "No space left on device", str(path))
        write(path, fill)

    monkeypatch.setattr(writer.atomic, "write", full)
    with pytest.raises(UserError, match="No space left on device"):
        writer.export_trajectories(settings(part, tmp_path / "out"))
    monkeypatch.setattr(writer.atomic, "write", write)
    assert writer.export_trajectories(settings(part, tmp_path / "out")).trajectories == 4


# -- configuration --------------------------------------------------------------------------------


def test_a_file_of_the_guide_is_taken_and_flags_go_first(tmp_path):
    file = tmp_path / "egodex.yaml"
    file.write_text(
        "dataset:\n  dataset_path: /data/egodex/test\n  dataset_name: egodex_test\n"
        "output:\n  output_dir: egodex_dataset\n  max_trajectories: -1\n  max_frames: 16\n"
        "  use_video: true\n  fps: 5\n  shortest_edge_size: 240\n  center_crop: false\n  num_workers: 3\n"
        "hub:\n  push_to_hub: false\n  hub_repo_id: me/egodex_rfm\n"
    )
    found = trajectories_config.load(file)
    assert found.output.max_trajectories is None and found.output.max_frames == 16 and found.workers == 3
    assert found.part_name == "egodex_test" and found.output.fps == 5
    places, keys = trajectories_config.flags(
        ["/a", "--output.max_frames=-1", "--dataset.dataset_name", "Part2", "output.max_trajectories=7", "/b"]
    )
    assert places == ["/a", "/b"]
    found = trajectories_config.load(file, keys)
    assert (
        found.output.max_frames is None and found.part_name == "part2" and found.output.max_trajectories == 7
    )


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"output.max_frame": 3}, "did you mean 'output.max_frames'"),
        ({"output.max_frames": 0}, "greater than or equal to 1"),
        ({"output.use_video": False}, "always the bytes of an mp4"),
        ({"output.center_crop": True}, "not cropped"),
        ({"hub.push_to_hub": True}, "ego2robot push OUT REPO"),
        ({"hub.hub_token": "hf_secret"}, "no token here"),
        ({"dataset.dataset_path": ""}, "give SOURCE"),
        ({"dataset.frame": "map"}, "'world' or 'camera'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(keys, says):
    tree = {"dataset.dataset_path": "/a", "output.output_dir": "/b"} | keys
    with pytest.raises(UserError, match=says) as caught:
        trajectories_config.load(None, tree)
    assert "\n" not in str(caught.value) and "hf_secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["[1]", "training: {}", "output: 3", "a: [", "\xff"])
def test_a_file_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "x.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"x\.yaml"):
        trajectories_config.load(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="No such file"):
        trajectories_config.load(tmp_path / "gone.yaml")


def test_an_unknown_kind_or_option_is_refused(part, tmp_path):
    with pytest.raises(UserError, match="did you mean 'egodex'"):
        next(ego2robot.iter_trajectories(str(part), "egodexx"))
    with pytest.raises(UserError, match="--max-frame"):
        trajectories_config.flags(["--max-frame=3"])
    with pytest.raises(UserError, match="a value is missing"):
        trajectories_config.flags(["--output.fps"])


def test_errors_of_a_source_reach_the_user(tmp_path, inline):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no EgoDex files"):
        writer.export_trajectories(settings(tmp_path / "empty", tmp_path / "out"))
