"""A pool without processes: the same events, the work in the thread of the consumer. What ends it ends us."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ego2robot.errors import VideoError
from ego2robot.jobs.pool import Event


class InlinePool:
    def __init__(self, work: Callable[[Any], Iterator[Any]]) -> None:
        self.idle_s: float | None = None
        self._work = work

    def run(self, tasks: Iterable[Any]) -> Iterator[Event]:
        for task in tasks:
            if task is None:
                time.sleep(0.01)
                yield Event("idle", None)
                continue
            try:
                for item in self._work(task):
                    yield Event("item", task, item)
                yield Event("done", task)
            except VideoError as error:
                yield Event("error", task, error)
