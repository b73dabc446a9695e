"""Results compare, drops fail by name, and a part of a benchmark that crashes or hangs costs only itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ego2robot import bench, config
from ego2robot.errors import UserError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import bench as parts  # noqa: E402 — of benchmarks/; `ego2robot.bench` has its full name
import common  # noqa: E402

RATIOS_OF_THE_ISSUE = {
    "cpu_end_to_end_vs_staged",
    "cpu_curation_vs_staged",
    "cpu_end_to_end_vs_daft",
    "cpu_end_to_end_vs_ray",
    "cpu_decode_vs_libav",
    "triage_speedup",
    "triage_recall",
    "decisions_agree",
    "gpu_share_of_decode_ceiling",
    "gpu_video_hours_per_hour_hevc",
    "gpu_video_hours_per_hour_h264",
    "gpu_videomae_clips_per_s",
    "gpu_hands_frames_per_s",
}


def write(folder: Path, name: str, ratios: dict[str, float], skipped: dict[str, str] | None = None) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": {"commit": "abc"}, "ratios": ratios, "skipped": skipped or {}}))
    return path


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(
        ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
        check=True,
        capture_output=True,
    )


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ego2robot.cli", "bench", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def part_of(module: str, folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Puts a benchmark beside the others' common code, in a folder of its own."""
    (folder / "common.py").write_text((BENCHMARKS / "common.py").read_text())
    (folder / f"{module}.py").write_text(code)
    monkeypatch.setattr(common, "__file__", str(folder / "common.py"))


# -- results --------------------------------------------------------------------------------------


def test_the_ratios_are_those_that_were_agreed() -> None:
    assert set(bench.RATIOS) >= RATIOS_OF_THE_ISSUE
    assert set(bench.FLOORS) <= RATIOS_OF_THE_ISSUE


def test_a_drop_of_more_than_a_tenth_is_one_and_less_is_noise(tmp_path: Path) -> None:
    before = bench.read(write(tmp_path, "2026-01-01-box", {"triage_speedup": 4.0, "triage_recall": 1.0}))
    after = bench.read(write(tmp_path, "2026-01-02-box", {"triage_speedup": 3.588, "triage_recall": 0.91}))
    speedup, recall = bench.compare(before, after)
    assert speedup.dropped and speedup.share == pytest.approx(-0.103)
    assert not recall.dropped
    assert "DROPPED" in bench.table([speedup, recall])[0]
    assert "-10.3 %" in bench.table([speedup, recall])[0]


def test_a_ratio_that_failed_is_a_drop_and_one_that_is_not_installed_is_not(tmp_path: Path) -> None:
    ratios = {"cpu_end_to_end_vs_daft": 3.0, "cpu_decode_vs_libav": 0.95}
    before = bench.read(write(tmp_path, "2026-01-01-box", ratios))
    reasons = {"cpu_end_to_end_vs_daft": "not installed: daft", "cpu_decode_vs_libav": "failed: exit 1: x"}
    after = bench.read(write(tmp_path, "2026-01-02-box", {}, reasons))
    daft, decode = bench.compare(before, after)
    assert (daft.ratio, daft.dropped) == ("cpu_end_to_end_vs_daft", False)
    assert (decode.ratio, decode.dropped) == ("cpu_decode_vs_libav", True)
    assert decode.text() == "cpu_decode_vs_libav is missing: failed: exit 1: x"


def test_figures_that_are_no_numbers_are_no_ratios(tmp_path: Path) -> None:
    path = tmp_path / "2026-01-01-box.json"
    path.write_text(
        '{"ratios": {"triage_recall": NaN, "triage_speedup": true, "what": 1, "decisions_agree": 1}}'
    )
    assert bench.read(path).ratios == {"decisions_agree": 1}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"ratios": 3}'])
def test_what_is_no_result_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "2026-01-01-box.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        bench.read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_machines_are_compared_with_their_own_kind(tmp_path: Path) -> None:
    write(tmp_path, "2026-01-01-box", {"triage_speedup": 4.0})
    write(tmp_path, "2026-01-02-h200", {"triage_speedup": 9.0})
    write(tmp_path, "2026-01-03-box", {"triage_speedup": 4.1})
    (tmp_path / "2026-01-03-box-hands.json").write_text('{"question": "another benchmark"}')
    (verdict,) = bench.check(tmp_path)
    assert verdict.before is not None and verdict.before.name == "2026-01-01-box.json"
    assert verdict.drops == []


def test_the_result_before_is_the_committed_one_even_of_the_same_day(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    write(tmp_path, "2026-01-01-box", {"triage_speedup": 9.0})
    write(tmp_path, "2026-01-03-box", {"triage_speedup": 4.0})
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "measured")
    write(tmp_path, "2026-01-02-box", {"triage_speedup": 1.0})  # never committed: not what we promised
    (verdict,) = bench.check(tmp_path)
    assert verdict.before is not None and verdict.before.ratios == {"triage_speedup": 9.0}
    write(tmp_path, "2026-01-03-box", {"triage_speedup": 3.9})
    (verdict,) = bench.check(tmp_path)
    assert verdict.before is not None and verdict.before.ratios == {"triage_speedup": 4.0}
    assert verdict.after.ratios == {"triage_speedup": 3.9}


def test_check_exits_1_and_names_what_dropped(tmp_path: Path) -> None:
    write(tmp_path, "2026-01-01-box", {"triage_speedup": 4.0, "decisions_agree": 1.0})
    write(tmp_path, "2026-01-02-box", {"triage_speedup": 3.0, "decisions_agree": 1.0})
    done = cli("check", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "error: 2026-01-02-box.json: triage_speedup changed by -25.0 %, 4.000 to 3.000"
    )
    write(tmp_path, "2026-01-02-box", {"triage_speedup": 3.9, "decisions_agree": 1.0})
    assert cli("check", str(tmp_path)).returncode == 0


def test_compare_shows_changes_in_percent_and_check_needs_results(tmp_path: Path) -> None:
    a = write(tmp_path, "2026-01-01-box", {"triage_speedup": 4.0})
    b = write(tmp_path, "2026-01-02-box", {"triage_speedup": 6.0, "decisions_agree": 1.0})
    done = cli("compare", str(a), str(b))
    assert done.returncode == 0
    assert "triage_speedup       4.000      6.000    +50.0 %" in done.stdout
    assert "decisions_agree          -      1.000    new" in done.stdout
    (tmp_path / "empty").mkdir()
    done = cli("check", str(tmp_path / "empty"))
    assert done.returncode == 2 and done.stderr.startswith("error: ")


def test_what_is_committed_can_be_read() -> None:
    for path in (BENCHMARKS / "results").glob("*.json"):
        if "ratios" in json.loads(path.read_text()):
            assert bench.read(path).ratios


# -- parts ----------------------------------------------------------------------------------------


def test_a_part_that_works_gives_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part_of("good", tmp_path, monkeypatch, "def run(quick): return {'quick': quick, 'deep': {'speed': 2.5}}")
    outcome = common.run_part(common.Part("a", "good", 60), quick=True)
    assert outcome.figures == {"quick": True, "deep": {"speed": 2.5}}
    assert common.figure(outcome.figures, "speed") == 2.5
    assert common.figure(outcome.figures, "quick") is None


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "import os, signal\ndef run(quick): os.kill(os.getpid(), signal.SIGSEGV)",
            "failed: ended by SIGSEGV",
        ),
        ("def run(quick): raise RuntimeError('no luck')", "failed: exit 1: RuntimeError: no luck"),
        ("import nowhere_to_be_found\ndef run(quick): pass", "not installed: nowhere_to_be_found"),
        ("from common import Skip\ndef run(quick): raise Skip('no GPU')", "no GPU"),
        ("", "not there: run() in benchmarks/bad.py"),
        ("def run(quick): return {'a': object()}", "failed: exit 1: TypeError"),
    ],
)
def test_a_part_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    part_of("bad", tmp_path, monkeypatch, code)
    outcome = common.run_part(common.Part("a", "bad", 60), quick=True)
    assert outcome.figures is None and outcome.reason is not None and outcome.reason.startswith(reason)


def test_a_part_that_does_not_exist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part_of("other", tmp_path, monkeypatch, "")
    outcome = common.run_part(common.Part("a", "absent", 60), quick=True)
    assert outcome.reason == "not there: benchmarks/absent.py"


def test_a_part_that_hangs_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys\ndef run(quick):\n"
        "    sleep = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "    child = subprocess.Popen(sleep, start_new_session=True)\n"
        f"    open({str(pid)!r}, 'w').write(str(child.pid))\n    child.wait()"
    )
    part_of("hangs", tmp_path, monkeypatch, code)
    outcome = common.run_part(common.Part("a", "hangs", 4), quick=True)
    assert outcome.reason == "failed: no answer within 4 s"
    child = int(pid.read_text())
    for _ in range(100):
        if not _alive(child):
            break
        time.sleep(0.1)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # An orphan that nobody has reaped yet is as good as gone.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_every_ratio_is_there_or_has_its_reason() -> None:
    outcomes = {
        "triage": common.Outcome(
            "triage", 1.0, {"triage_speedup": 4.2, "more": {"triage_recall": float("nan")}}
        ),
        "decode": common.Outcome("decode", 1.0, None, "not there: benchmarks/decode.py"),
    }
    report = parts.report_of(outcomes, parts.SOURCES)
    assert report["ratios"] == {"triage_speedup": 4.2}
    assert report["skipped"]["triage_recall"] == "failed: triage gave no triage_recall"
    assert report["skipped"]["cpu_decode_vs_libav"] == "not there: benchmarks/decode.py"
    assert report["skipped"]["decisions_agree"] == "end_to_end was not run"
    assert report["skipped"]["gpu_hands_frames_per_s"] == "needs a GPU: make gpu-proof"
    assert set(bench.RATIOS) <= set(report["ratios"]) | set(report["skipped"])
    assert bench.summary(report["ratios"], report["skipped"])[0].endswith("end_to_end was not run")


def test_a_part_for_which_no_time_is_left_is_not_started() -> None:
    outcomes = parts.run_all(parts.PARTS[:2], quick=True, minutes=0.1)
    assert {o.reason for o in outcomes.values()} == {"no time was left for it"}


def test_peers_are_compared_with_our_own_time_and_decisions() -> None:
    mine = {"ours": {"all": {"seconds": 10.0}}, "decisions": {"a": True, "b": False}}
    theirs = {"seconds": 25.0, "decisions": {"a": {"kept": True}, "b": {"kept": True}}}
    outcomes = {
        "end_to_end": common.Outcome("end_to_end", 1.0, mine),
        "daft": common.Outcome("daft", 1.0, theirs),
        "ray": common.Outcome("ray", 1.0, None, "not installed: ray"),
    }
    parts.against_peers(outcomes)
    assert theirs["cpu_end_to_end_vs_daft"] == 2.5
    assert theirs["same_decisions_as_ours"] == 0.5


def test_a_peer_that_did_half_of_the_clips_is_compared_by_the_clip() -> None:
    mine = {
        "ours": {"all": {"seconds": 10.0}},
        "decisions": {"a": True, "b": False, "c": True, "d": False},
    }
    theirs = {"seconds": 15.0, "decisions": {"a": {"kept": True}, "d": {"kept": True}}}
    parts.against_peers(
        {
            "end_to_end": common.Outcome("end_to_end", 1.0, mine),
            "ray": common.Outcome("ray", 1.0, theirs),
        }
    )
    assert theirs["cpu_end_to_end_vs_ray"] == 3.0  # 15 s where we need 5
    assert theirs["same_decisions_as_ours"] == 0.5


def test_peers_get_whole_videos_half_of_every_codec_and_of_the_scenes() -> None:
    pytest.importorskip("cv2")
    import peers_daft

    tasks = [
        {"path": f"/footage/{codec}/ego_{number:03d}.mp4", "first": first}
        for codec in ("h264", "hevc")
        for number in range(4)
        for first in (0, 36)
    ]
    few = peers_daft.share(tasks)
    assert {task["path"] for task in few} == {
        "/footage/h264/ego_000.mp4",
        "/footage/h264/ego_002.mp4",
        "/footage/hevc/ego_001.mp4",
        "/footage/hevc/ego_003.mp4",
    }
    assert len(few) == len(tasks) // 2


def test_the_chart_shows_every_ratio_of_every_machine(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write(tmp_path, "2026-01-01-box", dict.fromkeys(bench.RATIOS, 2.0))
    write(tmp_path, "2026-01-02-h200", dict.fromkeys(bench.RATIOS, 200.0))
    parts.draw(tmp_path, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"
    lines = bench.trend(bench.results(tmp_path))
    assert set(lines) == set(bench.RATIOS)
    assert lines["triage_recall"] == {"box": [("2026-01-01", 2.0)], "h200": [("2026-01-02", 200.0)]}


def test_the_recipe_measures_what_both_ways_can_do() -> None:
    cfg = config.load("bench")
    assert cfg.embed.videomae.weights == cfg.embed.clip.weights == "random"
    assert cfg.embed.clip.n_frames == 1 and not cfg.hands.dense and not cfg.export.enabled
    assert cfg.clips.stride_s == cfg.clips.duration_s  # the peers' clips are made of all frames
