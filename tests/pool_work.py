"""Work for the pool's tests: importable by its child processes."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from ego2robot.errors import UserError, VideoError


def counting(folder):
    """Counts up to the task's number; some tasks end badly instead."""

    together = threading.Barrier(3, timeout=20)

    def work(task):
        name, n = task
        for i in range(n):
            yield name, i
            if name == "slow":
                time.sleep(0.02)
        if name == "meet":
            together.wait()
            yield name, "met"
        if name == "segfault":
            signal.raise_signal(signal.SIGSEGV)
        if name == "segfault once":
            marker = Path(folder) / "crashed"
            if not marker.exists():
                marker.touch()
                signal.raise_signal(signal.SIGSEGV)
            yield name, "second time"
        if name == "exit":
            os._exit(3)
        if name == "hang":
            time.sleep(600)
        if name == "bad video":
            raise VideoError("a.mp4", "cut in the middle", "fetch it again", "truncated")
        if name == "bug":
            raise ZeroDivisionError("by hand")

    return work


def named(name):
    def work(task):
        yield name
        time.sleep(0.2)

    return work


def impossible():
    raise UserError("no models here; pull them")


def broken():
    os._exit(9)


def imported():
    """Yields whether the module of a task's name is there already."""

    def work(task):
        yield task[0] in sys.modules

    return work
