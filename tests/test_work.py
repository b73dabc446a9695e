"""Workers of a run: what fails is tried again or refused, who is asked to stop does, nothing is lost.

Without processes: the pool's work is done in the worker's own thread, and needs no video.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ego2robot import config
from ego2robot.errors import VideoError
from ego2robot.jobs.drain import Drain, Drained
from ego2robot.jobs.plan import clips_of, units_of
from ego2robot.jobs.status import status
from ego2robot.jobs.verify import verify
from ego2robot.jobs.work import Member, settle, work
from ego2robot.jobs.worker import ScoredClip
from ego2robot.store import atomic
from ego2robot.store.rundir import RunDir
from ego2robot.store.units import units_table
from ego2robot.types import Blob, Unit, Video, VideoInfo
from tests.inline_pool import InlinePool

INFO = VideoInfo(640, 360, 0, 30.0, 21.0, 0.0, 630, "h264", "yuv420p", 8)
Score = Callable[[Unit], Iterator[ScoredClip]]


def planned(folder: Path, n: int = 12, *more: str) -> RunDir:
    """A run of ``n`` units; its videos are files that hold no video."""
    settings = ["source.path=x", "clips.stride_s=6", "hands.detector=none", "work.commit_s=0.05"]
    settings += ["work.backoff_s=0.05", "embed.videomae.weights=none", "embed.clip.weights=none", *more]
    run = RunDir.create_or_resume(folder / "r", config.load("folder", settings), {})
    units = []
    for i in range(n):
        path = folder / f"{i}.mp4"
        path.write_bytes(b"no video")
        video = Video(f"{i:016x}", f"{i}.mp4", "folder", Blob(str(path), 0, 8), {}, INFO)
        units += units_of(video, clips_of(video.video_id, INFO, run.config.clips))
    atomic.write_parquet(run.plan_path, units_table(units), 4)
    return run


def score(unit: Unit) -> Iterator[ScoredClip]:
    for clip in unit.clips:
        motion = int(clip.clip_id[:4], 16) / 65535
        yield ScoredClip(clip, "dropped", "by hand", {"motion": motion}, seconds={"decode": 0.01})


def do(run: RunDir, score: Score = score, drain: Drain | None = None) -> list[str]:
    """One worker until the end; what it told."""
    told: list[str] = []
    with Member(run) as member:
        threads = {"decode": 1, "embed": 1}
        pool: Any = InlinePool(score)
        work(run, lambda _: (pool, threads), {}, [], None, lambda _: None, told.append, member, drain=drain)
        settle(run, member)
    return told


def rows(run: RunDir, table: str = "clips") -> list[dict[str, Any]]:
    return sorted(RunDir.open(run.path).table(table).to_pylist(), key=repr)


def complete(run: RunDir) -> None:
    verdict = verify(RunDir.open(run.path))
    assert verdict.ok, verdict.problems
    assert verdict.left == 0
    assert not list((run.path / "claims").glob("*"))
    assert not list((run.path / "workers").glob("*"))
    assert not list(run.path.glob("**/.tmp-*"))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    run = planned(tmp_path_factory.mktemp("clean"))
    do(run)
    complete(run)
    return rows(run)


def test_several_workers_at_once_give_the_rows_of_one(clean: list, tmp_path: Path) -> None:
    run = planned(tmp_path)

    def slowly(unit: Unit) -> Iterator[ScoredClip]:
        for clip in score(unit):
            time.sleep(0.01)
            yield clip

    errors: list[BaseException] = []

    def one() -> None:
        try:
            do(RunDir.open(run.path), slowly)
        except BaseException as error:  # noqa: BLE001 — carried over to the test
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    complete(run)
    assert rows(run) == clean
    assert len({record.info["worker"] for record in run.records()}) > 1


def test_what_another_committed_meanwhile_is_left_out(clean: list, tmp_path: Path) -> None:
    run = planned(tmp_path)
    other = RunDir.open(run.path)
    stolen: list[str] = []

    def overtaken(unit: Unit) -> Iterator[ScoredClip]:
        if len(stolen) < 3:  # somebody else is faster, after this worker has begun
            stolen.append(unit.unit_id)
            from ego2robot.jobs.embedding import PendingUnit, tables

            pending = PendingUnit(unit)
            for clip in score(unit):
                pending.add(clip, ())
            pending.end()
            other.commit([unit.unit_id], tables([pending], {}), {"worker": "other"}, replace=False)
        yield from score(unit)

    do(run, overtaken)
    complete(run)
    assert rows(run) == clean
    assert sum(record.info["worker"] == "other" for record in run.records()) == 3


def test_a_file_that_cannot_be_read_is_tried_again_after_a_while(clean: list, tmp_path: Path) -> None:
    run = planned(tmp_path)
    away = tmp_path / "3.mp4"
    away.unlink()
    tries: list[float] = []

    def missing(unit: Unit) -> Iterator[ScoredClip]:
        if unit.video.name == "3.mp4" and len(tries) == 2:
            away.write_bytes(b"no video")  # its disk is back
        if unit.video.name == "3.mp4" and not away.exists():
            tries.append(time.monotonic())
            raise VideoError("3.mp4", "cannot be decoded", "", "corrupt")
        yield from score(unit)

    told = do(run, missing)
    complete(run)
    assert rows(run) == clean
    assert rows(run, "quarantine") == []
    assert len(tries) == 2
    assert tries[1] - tries[0] >= 0.05
    assert not told
    assert status(run).retried == {"missing": 1}
    kept = [r.info["attempts"] for r in run.records() if r.info.get("attempts")]
    assert [list(each.values()) for each in kept] == [[3]]


@pytest.mark.parametrize(("kind", "attempts"), [("missing", 3), ("memory", 3), ("unsupported", 1)])
def test_what_stays_broken_is_refused_after_its_attempts(kind: str, attempts: int, tmp_path: Path) -> None:
    run = planned(tmp_path, 3)
    tries = 0

    def broken(unit: Unit) -> Iterator[ScoredClip]:
        nonlocal tries
        if unit.video.name == "1.mp4":
            tries += 1
            raise VideoError("1.mp4", "no good", "", kind)
        yield from score(unit)

    told = do(run, broken)
    assert tries == attempts
    (refused,) = rows(run, "quarantine")
    assert (refused["error_class"], refused["attempts"], refused["name"]) == (kind, attempts, "1.mp4")
    assert [row["decision"] for row in rows(run) if row["name"] == "1.mp4"] == ["failed"] * 4
    assert len(told) == 1
    complete(run)


def test_attempts_count_across_workers(tmp_path: Path) -> None:
    run = planned(tmp_path, 2)
    tries = 0
    drain = Drain()

    def broken(unit: Unit) -> Iterator[ScoredClip]:
        nonlocal tries
        tries += 1
        drain.ask()
        raise VideoError(unit.video.name, "no memory", "", "memory")
        yield

    with pytest.raises(Drained):
        do(run, broken, drain)
    assert tries == 1
    do(RunDir.open(run.path), broken)
    assert tries == 6
    assert {row["attempts"] for row in rows(run, "quarantine")} == {3}


def test_who_is_asked_to_stop_commits_what_is_complete_and_gives_back_his_claims(
    clean: list, tmp_path: Path
) -> None:
    run = planned(tmp_path, 12, "work.commit_s=1000")
    drain = Drain()
    seen = 0

    def until_asked(unit: Unit) -> Iterator[ScoredClip]:
        nonlocal seen
        seen += 1
        if seen == 5:
            drain.ask()
        yield from score(unit)

    with pytest.raises(Drained):
        do(run, until_asked, drain)
    assert len(RunDir.open(run.path).committed_units()) >= 4
    assert not list((run.path / "claims").glob("*"))
    assert not list((run.path / "workers").glob("*"))
    assert verify(RunDir.open(run.path)).ok
    do(RunDir.open(run.path))
    complete(run)
    assert rows(run) == clean


def test_a_run_directory_may_be_moved_and_hold_what_others_left_half_written(
    clean: list, tmp_path: Path
) -> None:
    run = planned(tmp_path)
    drain = Drain()

    begun: list[str] = []

    def half(unit: Unit) -> Iterator[ScoredClip]:
        begun.append(unit.unit_id)
        if len(begun) == 5:
            drain.ask()
        yield from score(unit)

    with pytest.raises(Drained):
        do(run, half, drain)
    moved = RunDir(shutil.move(run.path, tmp_path / "elsewhere"))
    n = len(list((moved.path / "ledger").glob("*.json")))
    assert n
    (moved.path / "ledger" / f"{n + 1:08}.json").write_bytes(b'{"part": "00')
    (moved.path / "ledger" / ".tmp-00000009.json.ab").write_bytes(b"{")
    (moved.path / "clips" / "part-0000000000000000.parquet").write_bytes(b"PAR1")
    (moved.path / "claims" / "0000-0-0").write_bytes(b"")
    (moved.path / "metrics" / "gone.jsonl").write_bytes(b'{"clips": 3, "ela')
    do(moved)
    complete(moved)
    assert rows(moved) == clean
    assert status(moved).clips_done == 48


def test_a_clock_that_is_set_back_changes_nothing(
    clean: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned(tmp_path)
    now = [2e9]

    def back() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", back)
    do(run)
    complete(run)
    assert rows(run) == clean


def test_who_works_and_how_far_it_is_is_there_for_people_and_programs(tmp_path: Path) -> None:
    run = planned(tmp_path)
    looks: list[Any] = []

    def looking(unit: Unit) -> Iterator[ScoredClip]:
        looks.append(status(RunDir.open(run.path)))
        yield from score(unit)

    do(run, looking)
    assert any(worker.here for look in looks[1:] for worker in look.workers)
    last = status(run)
    assert (last.units_done, last.clips_done, last.dropped) == (12, 48, 48)
    assert [worker.here for worker in last.workers] == [False]
    text = (run.path / "metrics" / "ego2robot.prom").read_text()
    values = {line.split("{")[0]: line.rsplit(" ", 1)[1] for line in text.splitlines() if line[0] != "#"}
    assert values["ego2robot_units_done"] == "12"
    assert values["ego2robot_clips_done"] == values["ego2robot_clips"] == "48"
    assert all(line.startswith(("#", "ego2robot_")) for line in text.splitlines())
