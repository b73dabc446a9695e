import json
import math
from pathlib import Path

import pandas as pd
import pytest

from ego2robot.errors import UserError, VideoError
from ego2robot.sources import SOURCES
from ego2robot.types import Span
from tests.store_server import serving

MANIFEST = SOURCES["manifest"]
ROWS = [
    {"uri": "a.mp4", "start": 1.5, "end": 4.0, "task": "open the box", "worker": "w1"},
    {"uri": "sub/b.mp4", "start": None, "end": None, "task": "cook", "worker": None},
    {"uri": "a.mp4", "start": 4.0, "end": None, "task": "close it", "worker": "w1"},
]


@pytest.fixture
def videos(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.mp4", "sub/b.mp4"):
        (tmp_path / name).write_bytes(b"x" * 10)
    return tmp_path


def write(path, rows):
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pd.DataFrame(rows).to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".jsonl"])
def test_rows_of_one_uri_are_one_video_with_spans_whatever_the_format(videos, suffix):
    a, b = MANIFEST.candidates(write(videos / f"list{suffix}", ROWS), None)
    assert (a.name, b.name) == ("a.mp4", "sub/b.mp4")
    assert a.blob.path == str(videos / "a.mp4") and a.blob.size == 10
    first, second = a.spans
    assert first == Span(1.5, 4.0, {"task": "open the box", "worker": "w1"})
    assert (second.start_s, second.end_s, second.meta["task"]) == (4.0, math.inf, "close it")
    assert b.spans == () and b.meta == {"task": "cook"} and a.meta == {}


def test_bad_rows_are_counted_with_the_first_named_and_cost_no_other(videos):
    path = videos / "list.csv"
    path.write_text(
        "uri,start,end,task\n"
        "a.mp4,5,2,reversed\n"
        ",1,2,no uri\n"
        "a.mp4,x,2,no number\n"
        "a.mp4,1,2,too,many\n"
        "a.mp4,nan,inf,endless\n"
        "a.mp4,00:01:02.5,1:03,good\n"
        "gone.mp4,,,missing\n"
    )
    problem, a, gone = MANIFEST.candidates(str(path), None)
    assert problem.kind == "metadata"
    assert "5 rows of 7 cannot be used, the first: line 2: end 2 is not after start 5" in problem.cause
    assert a.spans == (Span(62.5, 63.0, {"task": "good"}),)
    assert isinstance(gone, VideoError) and gone.kind == "missing"


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.csv", b"path,start\nx,1\n", "no column uri"),
        ("a.csv", b"", "no column uri"),
        ("a.csv", b"uri\n", "no row"),
        ("a.csv", b"uri,uri\na,b\n", "same name"),
        ("a.csv", b"uri,start\na.mp4,x\n", None),
        ("a.csv", b"x" * (2 << 20), "line of more than"),
        ("a.parquet", b"PAR1 no parquet", "not sound Parquet"),
        ("a.txt", b"uri\n", "ends in .csv"),
        ("gone.csv", None, "No such file"),
        ("a.jsonl", b"[1]\n{\n", None),
    ],
)
def test_a_file_that_is_no_manifest_is_one_line(tmp_path, name, data, says):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=says or "no usable row") as caught:
        list(MANIFEST.candidates(str(tmp_path / name), None))
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_or_half_a_pair_is_spelled_out(videos):
    path = videos / "list.csv"
    path.write_bytes(b"\xef\xbb\xbfuri,task\na.mp4,caf\xe9\n")
    (a,) = MANIFEST.candidates(str(path), None)
    assert a.meta == {"task": "caf\\xe9"}
    (videos / "list.jsonl").write_text('{"uri": "a.mp4", "task": "half \\ud800"}\n')
    (a,) = MANIFEST.candidates(str(videos / "list.jsonl"), None)
    assert a.meta["task"].encode() == b"half \\ud800"


def test_a_remote_manifest_names_what_lies_beside_it_and_nothing_on_this_machine(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("EGO2ROBOT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    rows = "uri\nv/a.mp4\n../out.mp4\n/etc/passwd\nfile:///etc/passwd\n~/x.mp4\ns3://other/b.mp4\n"
    (tmp_path / "files" / "list.csv").write_text(rows)
    with serving(tmp_path / "files") as store:
        problem, a, b = MANIFEST.candidates(f"{store.url}/list.csv", None)
        assert (a.blob.path, b.blob.path) == (f"{store.url}/v/a.mp4", "s3://other/b.mp4")
        assert "4 rows of 6" in problem.cause
        with pytest.raises(UserError, match="not there"):
            list(MANIFEST.candidates(f"{store.url}/gone.csv?token=hunter2", None))


def test_a_long_manifest_keeps_the_order_of_its_videos(videos):
    path = videos / "long.csv"
    order = [f"{i * 7919 % 3000:05}.mp4" for i in range(20000)]
    path.write_text("uri,start,end\n" + "".join(f"{n},{i},{i + 1}\n" for i, n in enumerate(order)))
    found = list(MANIFEST.candidates(str(path), None))
    assert [Path(f.name).name for f in found] == list(dict.fromkeys(order))


def test_secrets_in_an_address_are_not_shown(videos):
    address = "https://me:hunter2@host/a.mp4?sig=hunter2"
    (found,) = MANIFEST.candidates(write(videos / "list.csv", [{"uri": address}]), None)
    assert found.name == "https://host/a.mp4" and found.blob.path == address
