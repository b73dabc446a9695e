import csv

import pytest

from ego2robot import config
from ego2robot.errors import UserError, VideoError
from ego2robot.sources import SOURCES

EPIC = SOURCES["epic_kitchens"]
COLUMNS = [
    "narration_id",
    "participant_id",
    "video_id",
    "narration_timestamp",
    "start_timestamp",
    "stop_timestamp",
    "start_frame",
    "stop_frame",
    "narration",
    "verb",
    "verb_class",
    "noun",
    "noun_class",
    "all_nouns",
    "all_noun_classes",
]
TEST_COLUMNS = COLUMNS[:8]


def action(video="P01_01", n=0, start="00:00:00.14", stop="00:00:03.37", narration="open door", **more):
    row = {
        "narration_id": f"{video}_{n}",
        "participant_id": video[:3],
        "video_id": video,
        "narration_timestamp": "00:00:01.089",
        "start_timestamp": start,
        "stop_timestamp": stop,
        "start_frame": "8",
        "stop_frame": "202",
        "narration": narration,
        "verb": "open",
        "verb_class": "3",
        "noun": "door",
        "noun_class": "3",
        "all_nouns": "['door', 'cup:board']",
        "all_noun_classes": "[3, 4]",
    }
    return row | more


def write_csv(path, rows, columns=COLUMNS):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def root(tmp_path):
    for video in ("P01_01", "P01_11", "P02_103"):
        file = tmp_path / "EPIC-KITCHENS" / video[:3] / "videos" / f"{video}.MP4"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(video.encode())
    notes = tmp_path / "EPIC-KITCHENS" / "annotations"
    write_csv(notes / "EPIC_100_train.csv", [action(n=1, start="01:02:03.5", stop="01:02:04"), action()])
    write_csv(notes / "EPIC_100_validation.csv", [action("P01_11", narration='put "it", then go\n')])
    write_csv(notes / "EPIC_100_test_timestamps.csv", [action("P02_103")], TEST_COLUMNS)
    write_csv(notes / "EPIC_100_noun_classes.csv", [{"id": 0}], ["id", "key"])
    (notes / "EPIC_100_video_info.csv").write_text(
        "video_id,duration,fps,resolution\nP01_01,1652.152817,59.9400599400599,1920x1080\n"
    )
    return tmp_path / "EPIC-KITCHENS"


def listed(path, **options):
    found = list(EPIC.candidates(str(path), None, config.Source(kind="epic_kitchens", **options)))
    return [f for f in found if not isinstance(f, VideoError)], [
        f for f in found if isinstance(f, VideoError)
    ]


def test_actions_become_spans_with_their_narration_and_classes(root):
    videos, problems = listed(root)
    assert [v.name for v in videos] == [
        f"{p}/videos/{v}.MP4" for p, v in (("P01", "P01_01"), ("P01", "P01_11"), ("P02", "P02_103"))
    ]
    assert not problems and all(v.problem is None for v in videos)
    first, second = videos[0].spans
    assert (first.start_s, first.end_s) == (0.14, 3.37)
    assert (second.start_s, second.end_s) == (3723.5, 3724)
    assert first.meta == {
        "task": "open door", "split": "train", "narration_id": "P01_01_0", "participant_id": "P01",
        "narration_timestamp": "00:00:01.089", "verb": "open", "verb_class": "3", "noun": "door",
        "noun_class": "3", "all_nouns": "['door', 'cup:board']", "all_noun_classes": "[3, 4]",
    }  # fmt: skip
    assert videos[0].meta["annotated_resolution"] == "1920x1080"
    assert videos[1].spans[0].meta["task"] == 'put "it", then go\n'


def test_the_test_split_has_times_and_no_task(root):
    span = listed(root)[0][2].spans[0]
    assert span.meta["split"] == "test" and "task" not in span.meta and "verb" not in span.meta


@pytest.mark.parametrize("named", ["annotations", "annotations/EPIC_100_train.csv"])
def test_annotations_may_lie_elsewhere(root, tmp_path, named):
    elsewhere = (root / "annotations").rename(tmp_path / "annotations")
    with pytest.raises(UserError, match=r"set source\.annotations"):
        listed(root)
    videos, _ = listed(root, annotations=str(elsewhere.parent / named))
    assert [len(v.spans) for v in videos] == ([2, 1, 1] if named == "annotations" else [2, 0, 0])
    assert videos[0].meta["annotated_fps"] == "59.9400599400599"
    one, _ = listed(root / "P01/videos/P01_01.MP4", annotations=str(elsewhere))
    assert len(one[0].spans) == 2


def test_videos_without_actions_and_actions_without_videos_are_said(root):
    (root / "P01/videos/P01_99.MP4").write_bytes(b"x")
    (root / "P01/videos/P01_11.MP4").unlink()
    videos, problems = listed(root)
    assert "no action of it in EPIC_100" in videos[1].problem.cause and videos[1].spans == ()
    (lost,) = problems
    assert (
        lost.kind == "missing" and "1 actions not used: their 1 videos" in str(lost) and "P01_11" in str(lost)
    )


def test_rows_that_cannot_be_used_are_counted_by_reason_and_the_others_are_used(root):
    rows = [
        action(n=0),
        action(n=0, start="00:00:05.00", stop="00:00:06.00"),
        action(n=2, start="00:00:09.00", stop="00:00:09.00"),
        action(n=3, start="00:00:09.00", stop="00:00:01.00"),
        action(n=4, start="nan"),
        action(n=5, start="-00:00:01.00"),
        action(n=6, stop="00:99:00.00"),
        action(n=7, stop=""),
        action(n=8, start="00:00:01.00", stop="00:00:02.00"),
    ]
    write_csv(root / "annotations" / "EPIC_100_train.csv", rows)
    videos, problems = listed(root)
    assert [s.meta["narration_id"] for s in videos[0].spans] == ["P01_01_0", "P01_01_8"]
    text = "\n".join(str(p) for p in problems)
    for said in (
        "1 row not used: its narration_id was there before",
        "2 rows not used: it ends before it starts",
        "3 rows not used: its times are not",
        "1 row not used: a field is missing",
    ):
        assert said in text
    assert len(problems) == 4 and all(p.kind == "metadata" for p in problems)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"video_id,start\nP01_01,3\n", "no column 'narration_id'"),
        (",".join(COLUMNS).encode() + b"\nP01_01_0,P01,P01_01,\xff\xfe", "not UTF-8"),
        (b"\x00\x01\x02" * 100, "no column"),
    ],
)
def test_a_broken_file_costs_its_own_actions_alone(root, data, says):
    (root / "annotations" / "EPIC_100_train.csv").write_bytes(data)
    videos, problems = listed(root)
    assert any(says in str(p) and "EPIC_100_train.csv" in str(p) for p in problems)
    assert [len(v.spans) for v in videos] == [0, 1, 1]


def test_a_file_that_breaks_off_gives_what_is_whole(root):
    path = root / "annotations" / "EPIC_100_train.csv"
    write_csv(path, [action(n=i) for i in range(5)])
    path.write_bytes(path.read_bytes()[:-120])
    videos, problems = listed(root)
    assert len(videos[0].spans) == 4 and "a field is missing" in str(problems[0])


def test_the_same_video_twice_is_used_once(root):
    (root / "copy").mkdir()
    (root / "copy" / "P01_01.mp4").write_bytes(b"x")
    videos, problems = listed(root)
    assert len(videos) == 3 and problems[0].kind == "duplicate"


def test_ids_never_become_paths(root):
    write_csv(root / "annotations" / "EPIC_100_train.csv", [action("../../../etc/passwd"), action()])
    videos, problems = listed(root)
    assert all(str(root) in v.blob.path for v in videos) and "../../../etc/passwd" in str(problems[-1])
