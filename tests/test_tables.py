import json

import numpy as np
import pytest

from ego2robot.errors import VideoError
from ego2robot.sources import tables


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# -- JSON that is larger than memory should hold --------------------------------------------------

VALUES = {"a": {"x": [1, {"y": "]}"}]}, 'quote"\\': 'b\\"[{', "n": -12.5e3, "none": None, "é": [], "z": {}}


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_members_are_read_one_by_one_wherever_the_pieces_of_the_file_end(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(tables, "CHUNK", chunk)
    text = json.dumps({"skip": [VALUES, "x\\"], "also": 3, "here": {"in": VALUES}, "after": 1}, indent=1)
    path = write(tmp_path / "a.json", text)
    assert dict(tables.json_items(path, "here", "in")) == VALUES
    assert [k for k, _ in tables.json_items(path)] == ["skip", "also", "here", "after"]
    assert list(tables.json_items(path, "skip")) == [("0", VALUES), ("1", "x\\")]
    assert list(tables.json_items(path, "nowhere")) == []


@pytest.mark.parametrize(
    "text", ["", "nothing", "[1, 2", '{"a": 1', '{"a": ', '{"a": tru}', "{1: 2}", '{"here', "3", '{"b": "']
)
def test_what_is_not_json_or_cut_off_is_one_line(tmp_path, text):
    with pytest.raises(VideoError, match="JSON") as caught:
        list(tables.json_items(write(tmp_path / "a.json", text)))
    assert caught.value.kind == "metadata" and "\n" not in str(caught.value)
    with pytest.raises(VideoError, match="JSON"):
        list(tables.json_items(tmp_path / "a.json", "here"))


def test_a_value_without_an_end_is_given_up_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_VALUE", 10_000)
    monkeypatch.setattr(tables, "CHUNK", 1000)
    with pytest.raises(VideoError, match="more than"):
        list(tables.json_items(write(tmp_path / "a.json", '{"a": [' + "1," * 50_000)))
    with pytest.raises(VideoError, match="more than"):
        list(tables.json_items(write(tmp_path / "b.json", '{"a": "' + "x" * 50_000), "b"))


@pytest.mark.parametrize("data", [b'{"a": "\xff\xfe"}', b"\xff\xfe{\x00}\x00"])
def test_bytes_that_are_not_utf8_are_one_line(tmp_path, data):
    path = write(tmp_path / "a.json", data)
    for read in (lambda: list(tables.json_items(path)), lambda: tables.small_json(path)):
        with pytest.raises(VideoError, match="not UTF-8"):
            read()


def test_nesting_without_end_is_one_line(tmp_path):
    path = write(tmp_path / "a.json", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(VideoError, match=r"deep|JSON"):
        list(tables.json_items(path))
    with pytest.raises(VideoError, match="JSON"):
        tables.small_json(path)


# -- tables in order of time ----------------------------------------------------------------------


def trajectory(path, times, extra=""):
    rows = [f"uid,{t},{i}.5,{-i}{extra}" for i, t in enumerate(times)]
    return write(path, "\n".join(["graph_uid,tracking_timestamp_us,tx,ty", *rows]) + "\n")


@pytest.mark.parametrize("near", [1, 100, 1 << 16])
def test_a_stretch_of_a_long_table_is_found_without_reading_the_rest(tmp_path, monkeypatch, near):
    monkeypatch.setattr(tables, "NEAR_ENOUGH", near)
    times = np.cumsum(np.random.default_rng(0).integers(0, 5, 3000)) + 10_000_000
    table = tables.timed_csv(trajectory(tmp_path / "t.csv", times), "tracking_timestamp_us", ["ty"])
    for first, last in [
        (0, 1 << 60),
        (10_000_500, 10_001_000),
        (times[7], times[7]),
        (0, 5),
        (1 << 50, 1 << 51),
    ]:
        found, values = table.between(first, last, ["ty", "tx", "absent"])
        index = np.flatnonzero((times >= first) & (times <= last))
        assert found.tolist() == times[index].tolist()
        assert values[:, 0].tolist() == (-index).tolist() and values[:, 1].tolist() == (index + 0.5).tolist()
        assert np.isnan(values[:, 2]).all()


def test_cells_that_are_no_number_are_unknown_and_lines_without_a_time_are_left_out(tmp_path):
    text = "t,x,y\n1,0.5,nan\n,7,7\nx,7,7\n2,1e999,\n3,hello\n\n4"
    table = tables.timed_csv(write(tmp_path / "t.csv", text), "t", ["x"])
    times, values = table.between(0, 9, ["x", "y"])
    assert (
        times.tolist() == [1, 2, 3, 4] and np.isfinite(values).tolist() == [[True, False]] + [[False] * 2] * 3
    )


def test_times_that_do_not_ascend_are_one_line(tmp_path):
    table = tables.timed_csv(trajectory(tmp_path / "t.csv", [1, 5, 3]), "tracking_timestamp_us", [])
    with pytest.raises(VideoError, match="do not ascend"):
        table.between(0, 9, ["tx"])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"\n\n", "empty"),
        (b"a,b\n1,2\n", "no column 't'"),
        (b"t,x\n", "no rows"),
        (b"t,\xff\n1,2\n", "not UTF-8"),
        (b"\x00" * 5000, "no column"),
    ],
)
def test_a_file_that_is_no_such_table_is_one_line(tmp_path, data, says):
    with pytest.raises(VideoError, match=says) as caught:
        tables.timed_csv(write(tmp_path / "t.csv", data), "t", ["x"])
    assert "\n" not in str(caught.value)
    with pytest.raises(VideoError, match="cannot be read"):
        tables.timed_csv(tmp_path / "gone.csv", "t", [])


def test_json_lines_are_found_by_time_and_broken_ones_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "NEAR_ENOUGH", 1)
    rows = [json.dumps({"timestamp_ns": 10 * i, "v": i}) for i in range(200)]
    rows[50] = rows[50][:-3]  # cut within the line
    rows[51] = "[1]"
    rows[52] = json.dumps({"v": 52, "timestamp_ns": 520})
    path = write(tmp_path / "a.jsonl", "\n".join(rows))
    found = [v["v"] for _, v in tables.jsonl_between(path, "timestamp_ns", 480, 550)]
    assert found == [48, 49, 52, 53, 54, 55]


def test_numbers_are_exactly_as_many_as_asked_for_or_unknown():
    assert tables.numbers([1, 2.5], 2).tolist() == [1, 2.5]
    for value in ([1], [1, "2"], "12", None, [1, [2]], [1, 10**400], {"0": 1}):
        assert np.isnan(tables.numbers(value, 2)).all()


def test_counted_rows_are_one_line_a_reason(tmp_path):
    bad = tables.Counted(tmp_path / "a.csv")
    for i in range(1200):
        bad.add("ends early", f"line {i}")
    bad.add("no time", "line 7")
    first, second = bad.problems()
    assert "1,200 rows not used: ends early" in str(first) and "line 0" in str(first)
    assert "1 row not used: no time" in str(second)
