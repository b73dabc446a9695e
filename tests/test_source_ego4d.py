import json

import pytest

from ego2robot import config
from ego2robot.errors import UserError, VideoError
from ego2robot.sources import SOURCES
from ego2robot.sources.ego4d import task_of

EGO4D = SOURCES["ego4d"]
A, B = "001e3e4e-2743-47fc-8564-d5efd11f9e90", "grp-cec778f9-9b54-4b67-b013-116378fd7a85"
CLIP = "7d4a0e3b-0c5d-4f7e-9d5b-1f2a3b4c5d6e"


def video(uid, **more):
    meta = {
        "video_uid": uid,
        "duration_sec": 128.03,
        "scenarios": ["Cooking", "Cleaning / laundry"],
        "video_metadata": {"fps": 30.0, "num_frames": 3841, "video_codec": "h264"},
        "s3_path": f"s3://ego4d/{uid}",
        "video_source": "unict",
        "device": "GoPro Hero Black 7",
        "fb_participant_id": 12,
        "is_stereo": False,
        "has_imu": False,
        "physical_setting_name": None,
    }
    return meta | more


def narration(t, text, uid="x"):
    return {"timestamp_sec": t, "timestamp_frame": 1, "narration_text": text, "annotation_uid": uid}


def told(*narrations, name="narration_pass_1"):
    return {"status": "complete", name: {"narrations": list(narrations), "summaries": []}}


NARRATIONS = {
    A: told(
        narration(10.0, "#C C picks a bag of clothes from the floor"),
        narration(12.0, "#C C folds the shirt "),
        narration(12.0, "#O a man X talks"),
        narration(12.4, "#C C drops it\n", "y"),
        narration(60.0, "#Unsure"),
    ),
    B: told(name="narration_pass_1") | told(narration(3.0, "#C C waits"), name="narration_pass_2"),
    "not-here": told(narration(1.0, "#C C runs")),
}


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "v2"
    for name in (f"full_scale/{A}.mp4", f"full_scale/{B}.mp4", f"clips/{CLIP}.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    clip = {"clip_uid": CLIP, "video_uid": A, "video_start_sec": 11.0, "video_end_sec": 20.0}
    manifest = {"date": "220601", "videos": [video(A), video(B), video("gone")], "clips": [clip]}
    (root / "ego4d.json").write_text(json.dumps(manifest))
    (root / "annotations").mkdir()
    (root / "annotations" / "narration.json").write_text(json.dumps(NARRATIONS))
    return root


def listed(path, **options):
    found = list(EGO4D.candidates(str(path), None, config.Source(kind="ego4d", **options)))
    videos = {f.name.rpartition("/")[2][:-4]: f for f in found if not isinstance(f, VideoError)}
    return videos, [f for f in found if isinstance(f, VideoError)]


def spans(candidate):
    return [(round(s.start_s, 3), round(s.end_s, 3), s.meta["task"]) for s in candidate.spans]


def test_narrations_reach_half_way_to_their_neighbours_and_are_the_tasks(root):
    videos, _ = listed(root)
    assert spans(videos[A]) == [
        (7.0, 11.0, "picks a bag of clothes from the floor"),
        (11.0, 12.5, "folds the shirt"),
        (11.9, 15.4, "drops it"),
        (57.0, 63.0, "#Unsure"),
    ]
    meta = videos[A].spans[2].meta
    assert meta["narration"] == "#C C drops it" and meta["annotation_uid"] == "y"
    assert meta["narration_pass"] == "narration_pass_1" and meta["narration_timestamp_s"] == "12.4"
    assert videos[A].meta == {
        "video_uid": A, "device": "GoPro Hero Black 7", "video_source": "unict", "fb_participant_id": "12",
        "is_stereo": "False", "scenarios": "Cooking; Cleaning / laundry", "narrations_of_others": "1",
    }  # fmt: skip
    assert videos[A].problem is None


def test_the_second_annotator_is_used_where_there_is_no_first(root):
    (span,) = listed(root)[0][B].spans
    assert span.meta["narration_pass"] == "narration_pass_2" and span.start_s == 0.0 and span.end_s == 6.0


@pytest.mark.parametrize("source", ["manifest", "clips.csv"])
def test_a_clip_has_the_narrations_of_its_part_in_its_own_time(root, source):
    if source == "clips.csv":
        manifest = json.loads((root / "ego4d.json").read_text()) | {"clips": []}
        (root / "ego4d.json").write_text(json.dumps(manifest))
        (root / "clips.csv").write_text(
            f"exported_clip_uid,parent_video_uid,parent_start_sec,parent_end_sec,s3_path\n{CLIP},{A},11,20,s3://x\n"
        )
    clip = listed(root)[0][CLIP]
    assert spans(clip) == [(0.0, 1.5, "folds the shirt"), (0.9, 4.4, "drops it")]
    assert clip.meta["video_uid"] == A and clip.meta["clip_uid"] == CLIP and clip.meta["device"]
    assert clip.meta["parent_start_s"] == "11"


@pytest.mark.parametrize("form", ["videos", "elsewhere", "file"])
def test_narrations_in_the_newer_form_or_elsewhere_are_found(root, tmp_path, form):
    old = root / "annotations" / "narration.json"
    if form == "videos":
        old.write_text(json.dumps({"version": "v2", "videos": NARRATIONS}))
        videos, _ = listed(root / "full_scale")
    else:
        (tmp_path / "notes").mkdir()
        name = "all_narrations_redacted.json" if form == "elsewhere" else "mine.json"
        new = old.rename(tmp_path / "notes" / name)
        assert f"no {old.name}; set source.annotations" in str(listed(root)[0][A].problem)
        videos, _ = listed(root, annotations=str(new.parent if form == "elsewhere" else new))
    assert len(videos[A].spans) == 4


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("#C C picks a bag", "picks a bag"),
        ("#c C  picks\ta bag\n", "picks a bag"),
        ("# C C picks", "picks"),
        ("#C picks", "picks"),
        ("#C C", "C"),
        ("#Unsure something", "#Unsure something"),
        ("C picks", "C picks"),
    ],
)
def test_a_task_is_a_narration_without_its_tag(text, task):
    assert task_of(text) == task


def test_what_is_not_there_is_said(root):
    (root / "full_scale" / "stray.mp4").write_bytes(b"x")
    (root / "full_scale" / "copy").mkdir()
    (root / "full_scale" / "copy" / f"{B}.mp4").write_bytes(b"x")
    videos, problems = listed(root)
    assert "not in ego4d.json; no narration in narration.json" in str(videos["stray"].problem)
    assert sorted(p.kind for p in problems) == ["duplicate", "missing"]
    assert "1 videos of ego4d.json are not there" in "\n".join(map(str, problems))


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("ego4d.json", b"", "JSON"),
        ("ego4d.json", b'{"videos": [{"video_uid": "a"', "JSON"),
        ("ego4d.json", b'{"videos": 3}', "list was expected"),
        ("ego4d.json", b"\xff\xfe\x00", "UTF-8"),
        ("annotations/narration.json", b"", "JSON"),
        ("annotations/narration.json", b'{"a": {"narration_pass_1": {"narr', "JSON"),
        ("annotations/narration.json", b"[[[", "JSON"),
        ("annotations/narration.json", b'{"\xff": 1}', "UTF-8"),
        ("clips.csv", b"a,b\n1,2\n", "no column"),
    ],
)
def test_a_broken_file_costs_what_it_says_and_no_video(root, name, data, says):
    (root / name).write_bytes(data)
    videos, problems = listed(root)
    assert len(videos) == 3 and any(says in str(p) and name.rpartition("/")[2] in str(p) for p in problems)
    assert all("\n" not in str(p) for p in problems)


def test_entries_that_make_no_sense_are_counted_and_the_others_used(root):
    bad = [narration(t, "#C C x") for t in (-1, "soon", None, float("nan"), 1e9, True)]
    bad += [narration(5.0, text) for text in ("", None, 3)] + [7, None]
    told_a = told(*bad, narration(5.0, "#C C works"))
    text = json.dumps({A: told_a, B: [3], "c": None})
    (root / "annotations" / "narration.json").write_text(text)
    manifest = {
        "videos": [video(A), video(A), {"x": 1}, 3, video(B, scenarios=[3, "x"], duration_sec="long")],
        "clips": [
            {"clip_uid": CLIP},
            5,
            {"clip_uid": CLIP, "video_uid": A, "video_start_sec": 9, "video_end_sec": 3},
        ],
    }
    (root / "ego4d.json").write_text(json.dumps(manifest))
    videos, problems = listed(root)
    assert spans(videos[A]) == [(2.0, 8.0, "works")] and videos[B].spans == ()
    said = "\n".join(str(p) for p in problems)
    for expected in (
        "2 narrations not used: its time is outside",
        "9 narrations not used: no text or no time",
        "2 entries not used: no video_uid",
        "was there before",
        "it ends before it starts",
    ):
        assert expected in said
    assert videos[B].meta["scenarios"] == "x"


def test_ids_never_become_paths_and_a_wrong_folder_is_one_line(root, tmp_path):
    text = json.dumps({"../../etc/passwd": told(narration(1.0, "#C C x"))})
    (root / "annotations" / "narration.json").write_text(text)
    videos, _ = listed(root)
    assert all(str(root) in v.blob.path for v in videos.values())
    with pytest.raises(UserError, match=r"source\.annotations=.*no such"):
        listed(root, annotations=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no videos"):
        listed(root / "annotations")


def test_a_million_narrations_are_not_held_as_objects(root, monkeypatch):
    """What is kept of a video's narrations is smaller than their text."""
    from ego2robot.sources import ego4d

    many = [narration(i * 0.1, f"#C C picks number {i} of the many things on the table") for i in range(1000)]
    (root / "annotations" / "narration.json").write_text(json.dumps({A: told(*many)}))
    known = ego4d._Known({A})
    list(ego4d._read_narrations(root / "annotations" / "narration.json", known))
    assert len(known.narrations[A]) < sum(len(n["narration_text"]) for n in many) / 2
    assert len(listed(root)[0][A].spans) == 1000
