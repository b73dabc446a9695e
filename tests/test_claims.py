"""Workers share a plan: nothing is lost or recorded twice, nobody waits for the dead, all end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from ego2robot.errors import UserError
from ego2robot.jobs.claims import Board, Presence, Shard, Terms, locally_gone, worker_name
from ego2robot.jobs.simulate import Ending, Machine, World, fleet, heavy_tailed, simulate
from ego2robot.store.ledger import Ledger, Record
from ego2robot.store.shared import SharedFolder


@dataclass
class Clock:
    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def board(folder: Path, me: str, clock: Clock, n: int = 64, **more: object) -> Board:
    presence = Presence(SharedFolder(folder / "workers"), me, clock, 60.0)
    presence.beat()
    ids = np.array([f"{i:016x}" for i in range(n)], "S16")
    made = Board(
        ids, np.full(n, 1.0), np.zeros(n, np.int64), Ledger(SharedFolder(folder / "ledger")),
        SharedFolder(folder / "claims"), presence, clock=clock, **more,  # type: ignore[arg-type]
    )  # fmt: skip
    return made


def commit(b: Board, *units: int) -> None:
    names = tuple(b.unit_ids[unit].decode() for unit in units)
    b.ledger.append(Record(f"{b.presence.me}-{names[0]}", names, {}, {}))
    for unit in units:
        b.ended(unit, 1.0)
    b.committed()


def take(b: Board, n: int) -> list[int]:
    found = [b.next() for _ in range(n)]
    return [unit for unit in found if unit is not None]


def whole(ending: Ending, n: int) -> None:
    assert len(ending.committed) == n
    assert set(ending.committed.values()) == {1}


def test_two_workers_take_different_units_and_the_longest_first(tmp_path: Path) -> None:
    clock = Clock()
    a, b = board(tmp_path, "a", clock), board(tmp_path, "b", clock)
    ours, theirs = take(a, 12), take(b, 12)
    assert len(ours) == len(theirs) == 12
    assert not set(ours) & set(theirs)
    assert min(ours + theirs) == 0


def test_two_workers_with_the_same_shard_do_everything_once(tmp_path: Path) -> None:
    clock = Clock()
    both = [board(tmp_path, name, clock, shard=Shard(1, 4)) for name in "ab"]
    done: list[int] = []
    while not all(b.finished for b in both):
        for b in both:
            unit = b.next()
            if unit is not None:
                done.append(unit)
                commit(b, unit)
        clock.now += 0.5
    assert sorted(done) == list(range(64))
    for b in both:
        b.release()
        b.presence.leave()
    assert not list((tmp_path / "claims").iterdir())
    assert not list((tmp_path / "workers").iterdir())


def test_a_shard_says_where_to_begin_and_not_what_to_leave_out(tmp_path: Path) -> None:
    clock = Clock()
    last = board(tmp_path, "a", clock, shard=Shard(3, 4))
    first = take(last, 1)[0]
    assert first > 16
    commit(last, first)
    while not last.finished:
        unit = last.next()
        assert unit is not None
        commit(last, unit)


def test_units_of_a_worker_that_fell_silent_are_taken_over_after_a_lease(tmp_path: Path) -> None:
    clock = Clock()
    dead = board(tmp_path, "dead", clock, n=8)
    held = take(dead, 8)
    assert held
    living = board(tmp_path, "living", clock, n=8, terms=Terms(poll_s=1.0))
    living.ended(7, 1e6)  # so slow that it does not do beside another what that one holds
    living._speed = 1e-6
    found: list[int] = []
    for _ in range(400):
        living.presence.beat()
        while (unit := living.next()) is not None:
            found.append(unit)
            commit(living, unit)
            assert unit not in held or clock.now > 60
        clock.now += 1
        if living.finished:
            break
    assert sorted(found) == list(range(8))
    assert not [p for p in (tmp_path / "workers").iterdir() if p.name.startswith("dead")]


def test_a_silent_worker_that_comes_back_changes_nothing(tmp_path: Path) -> None:
    clock = Clock()
    paused = board(tmp_path, "paused", clock, n=4)
    held = take(paused, 1)
    other = board(tmp_path, "other", clock, n=4)
    for _ in range(200):
        clock.now += 1
        other.presence.beat()
        unit = other.next()
        if unit is not None:
            commit(other, unit)
    assert other.finished
    paused.presence.beat()
    assert paused.next() is None
    assert paused.finished
    assert held


def test_what_a_slow_worker_holds_is_done_beside_it_and_recorded_once() -> None:
    costs, errors = heavy_tailed(200, 10, 40, 3)
    slow = [Machine(), Machine(), Machine(), Machine(speed=0.02)]
    ending = simulate(costs, slow, errors=errors)
    whole(ending, 200)
    assert ending.makespan_s < 1.15 * ending.ideal_s
    assert ending.done_twice_s < 0.3 * ending.worked_s.sum()


@pytest.mark.parametrize("delay_s", [0.0, 3.0])
def test_workers_that_die_and_a_file_system_that_shows_late_lose_nothing(delay_s: float) -> None:
    costs, errors = heavy_tailed(300, 10, 40, 5)
    machines = [replace(m, dies_s=60.0 * (i + 1) if i < 4 else m.dies_s) for i, m in enumerate(fleet(8))]
    ending = simulate(costs, machines, World(delay_s=delay_s), errors=errors)
    whole(ending, 300)
    assert np.isfinite(ending.makespan_s)


def test_the_last_worker_ends_with_the_others() -> None:
    """64 workers of unequal speed, heavy-tailed units of unknown real cost."""
    costs, errors = heavy_tailed(64 * 25, 10, 40, 1)
    ending = simulate(costs, fleet(64), errors=errors)
    whole(ending, 64 * 25)
    assert ending.tail <= 0.05
    assert ending.makespan_s < 1.3 * ending.ideal_s


def test_where_the_estimates_of_a_codec_are_wrong_they_are_corrected(tmp_path: Path) -> None:
    clock = Clock()
    b = board(tmp_path, "a", clock, n=8)
    b.kinds[4:] = 7
    b.ledger.append(Record("p", (), {}, {"measured": {"7": [10.0, 40.0], "0": [10.0, 10.0]}}))
    b.refresh()
    assert b._costs_s.tolist() == [1.0] * 4 + [4.0] * 4


def test_a_unit_that_failed_is_begun_again_when_its_time_has_come(tmp_path: Path) -> None:
    clock = Clock()
    b = board(tmp_path, "a", clock, n=1)
    assert b.next() == 0
    b.retry(0, 10.0)
    clock.now += 9
    assert b.next() is None
    clock.now += 2
    assert b.next() == 0


def test_attempts_are_known_to_the_next_worker(tmp_path: Path) -> None:
    first = board(tmp_path, "a", Clock(), n=2)
    first.ledger.append(Record("", (), {}, {"failed": {"0" * 16: [2, "missing", "no such file"]}}))
    assert board(tmp_path, "b", Clock(), n=2).attempts == {"0" * 16: 2}


def test_garbage_among_the_claims_is_no_claim(tmp_path: Path) -> None:
    clock = Clock()
    b = board(tmp_path, "a", clock, n=4)
    (tmp_path / "claims").mkdir(exist_ok=True)
    for name in ("x", "-1--2", f"{b.plan}-x-1", f"{b.plan}-99-0", "0000-0-0"):
        (tmp_path / "claims" / name).write_bytes(b"half")
    (tmp_path / "claims" / f"{b.plan}-0-3").write_bytes(b'{"wor')  # nobody knows whose: held for a lease
    found = []
    for _ in range(300):
        clock.now += 1
        b.presence.beat()
        unit = b.next()
        if unit is not None:
            found.append(unit)
            commit(b, unit)
    assert sorted(found) == [0, 1, 2, 3]


def test_a_worker_of_this_machine_that_was_killed_is_known_to_be_gone_at_once() -> None:
    code = (
        "from ego2robot.jobs.claims import worker_name; import time; print(worker_name(), flush=True);"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        assert not locally_gone(name)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert locally_gone(name)
    elsewhere = name.split("-")
    elsewhere[1] = "00000000"
    assert not locally_gone("-".join(elsewhere))
    assert not locally_gone(worker_name())
    assert not locally_gone("anything else")


def test_a_shard_is_written_i_of_n() -> None:
    assert Shard.parse("3/8") == Shard(3, 8)
    for text in ("8/8", "3", "a/b", "-1/4", "1/0"):
        with pytest.raises(UserError, match="I/N"):
            Shard.parse(text)


def test_a_claim_names_its_owner(tmp_path: Path) -> None:
    take(board(tmp_path, "a", Clock()), 1)
    (claim,) = (tmp_path / "claims").iterdir()
    assert json.loads(claim.read_bytes()) == {"worker": "a"}
