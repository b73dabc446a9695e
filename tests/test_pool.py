import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from ego2robot.errors import UserError
from ego2robot.jobs.pool import Pool
from tests import pool_work


def outcome(events):
    """Task name to its items and how it ended (the last event that is no item)."""
    items, ends = {}, {}
    for event in events:
        name = event.task[0]
        if event.kind == "item":
            items.setdefault((name, event.attempt), []).append(event.value[1])
        else:
            ends[name] = event
    return items, ends


def test_every_task_ends_whatever_its_neighbours_do(tmp_path):
    tasks = [
        ("fine", 3),
        ("segfault", 2),
        ("segfault once", 1),
        ("exit", 1),
        ("bad video", 1),
        ("bug", 0),
        ("empty", 0),
        ("large", 500),
    ]
    items, ends = outcome(Pool(pool_work.counting, (str(tmp_path),), n=2).run(tasks))
    assert items["fine", 1] == [0, 1, 2] and ends["fine"].kind == "done"
    assert items["large", 1] == list(range(500)) and ends["large"].kind == "done"
    assert ends["empty"].kind == "done"
    assert ends["segfault"].kind == "crashed" and "SIGSEGV" in ends["segfault"].value
    assert ends["segfault"].attempt == 2 and items["segfault", 2] == [0, 1]
    assert ends["segfault once"].kind == "done" and items["segfault once", 2] == [0, "second time"]
    assert ends["exit"].kind == "crashed" and "exit code 3" in ends["exit"].value
    assert ends["bad video"].kind == "error" and ends["bad video"].value.kind == "truncated"
    assert ends["bug"].kind == "error" and ends["bug"].value.kind == "internal"
    assert "ZeroDivisionError: by hand" in ends["bug"].value.cause


def test_a_child_that_hangs_is_killed_and_the_rest_goes_on(tmp_path):
    tasks = [("hang", 1), ("fine", 2)]
    items, ends = outcome(Pool(pool_work.counting, (str(tmp_path),), n=1, timeout_s=1.0).run(tasks))
    assert ends["hang"].kind == "timeout" and ends["hang"].attempt == 2
    assert items["fine", 1] == [0, 1] and ends["fine"].kind == "done"


def test_a_slow_consumer_is_no_silence_of_the_child(tmp_path):
    pool = Pool(pool_work.counting, (str(tmp_path),), n=1, timeout_s=1.0, backlog=1)
    ends = []
    for event in pool.run([("fine", 40)]):
        if event.kind != "item":
            ends.append(event.kind)
        elif event.value[1] in (0, 20):
            time.sleep(1.5)
    assert ends == ["done"]


def test_stopping_early_ends_the_children(tmp_path):
    pool = Pool(pool_work.counting, (str(tmp_path),), n=2)
    with closing(pool.run([("large", 10**6), ("hang", 1)])) as events:
        next(events)
        children = psutil.Process().children()
    _, alive = psutil.wait_procs([c for c in children if "spawn_main" in " ".join(_cmdline(c))], timeout=10)
    assert not alive


def _cmdline(process):
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def test_a_users_mistake_in_a_child_reaches_the_consumer():
    with pytest.raises(UserError, match="no models here"):
        list(Pool(pool_work.impossible, (), n=1).run([1]))


def test_children_that_cannot_start_are_an_error_and_no_endless_loop():
    with pytest.raises(UserError, match="could not start"):
        list(Pool(pool_work.broken, (), n=2).run(range(5)))


def test_more_children_than_tasks_and_no_tasks_at_all(tmp_path):
    pool = Pool(pool_work.counting, (str(tmp_path),), n=8)
    assert [e.kind for e in pool.run([("empty", 0)])] == ["done"]
    assert list(Pool(pool_work.counting, (str(tmp_path),), n=2).run([])) == []


def test_a_child_of_several_tasks_works_on_them_at_once(tmp_path):
    tasks = [("meet", 3)] * 3 + [("fine", 2)]
    items, ends = outcome(Pool(pool_work.counting, (str(tmp_path),), n=1, width=4).run(tasks))
    assert ends["meet"].kind == "done" and ends["fine"].kind == "done"
    assert items["meet", 1].count("met") == 3


def test_a_crash_costs_only_the_task_that_crashes_even_among_several(tmp_path):
    tasks = [("slow", 30), ("segfault", 2), ("large", 300), ("bad video", 1), ("hang", 1), ("fine", 5)]
    pool = Pool(pool_work.counting, (str(tmp_path),), n=1, width=4, timeout_s=2.0)
    items, ends = outcome(pool.run(tasks))
    for name, n in (("slow", 30), ("large", 300), ("fine", 5)):
        assert ends[name].kind == "done", name
        assert max((items[name, k] for k in (1, 2) if (name, k) in items), key=len)[-n:] == list(range(n))
    assert ends["segfault"].kind == "crashed" and not ends["segfault"].again
    assert ends["hang"].kind == "timeout" and not ends["hang"].again
    assert ends["bad video"].kind == "error"


def test_each_child_has_arguments_of_its_own(tmp_path):
    pool = Pool(pool_work.named, [("a",), ("b",)], n=2)
    found = {event.value for event in pool.run([1] * 8) if event.kind == "item"}
    assert found == {"a", "b"}


def test_tasks_may_come_later_and_the_consumer_hears_of_the_waiting(tmp_path):
    given = iter([("fine", 1), None, None, None, ("empty", 0)])
    events = list(Pool(pool_work.counting, (str(tmp_path),), n=1, idle_s=0.02).run(given))
    assert [e.task[0] for e in events if e.kind == "done"] == ["fine", "empty"]
    assert any(e.kind == "idle" and e.task is None for e in events)


def in_a_process_of_its_own(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=100, check=True
    )
    return done.stdout.split()


def test_what_was_warmed_is_there_when_a_child_begins():
    script = """
import sys
from ego2robot.jobs import pool
from tests import pool_work

if sys.argv[1] == "warm":
    pool.warm("colorsys")
events = pool.Pool(pool_work.imported, (), n=1).run([("colorsys",), ("ego2robot.jobs.worker",)])
print(*(event.value for event in events if event.kind == "item"))
"""
    assert in_a_process_of_its_own(script, "warm") == ["True", "True"]
    assert in_a_process_of_its_own(script, "cold") == ["False", "True"]


def test_a_process_that_only_warmed_does_not_wait_for_it(tmp_path, monkeypatch):
    (tmp_path / "never_imported.py").write_text("import time\n\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    script = """
from ego2robot.jobs import pool

pool.warm("never_imported")
print("ended")
"""
    assert in_a_process_of_its_own(script) == ["ended"]


def test_ctrl_c_while_it_is_warmed_says_nothing(tmp_path, monkeypatch):
    marker = tmp_path / "importing"
    slow = f"import pathlib, time\n\npathlib.Path({str(marker)!r}).touch()\ntime.sleep(600)\n"
    (tmp_path / "never_imported.py").write_text(slow)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    script = """
import time
from ego2robot.jobs import pool

pool.warm("never_imported")
try:
    time.sleep(100)
except KeyboardInterrupt:
    time.sleep(1)  # for what the other one has to say
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        until = time.monotonic() + 60
        while not marker.exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert marker.exists()
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and said == ""
