"""Child processes that may crash or hang without taking the run along.

Decoders are C libraries fed with hostile bytes: one can end its process, or never return. Each child
works on one task at a time and streams what it finds; the parent learns how every task ended.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from ego2robot.errors import UserError, VideoError

# What a child runs: built once per child from the arguments, then called with each task.
Work = Callable[[Any], Iterator[Any]]
READY = "ready"


@dataclass(frozen=True)
class Event:
    """What became of a task. ``item`` comes any number of times, then one of the others."""

    kind: Literal["item", "done", "error", "crashed", "timeout"]
    task: Any
    value: Any = None  # the item; the VideoError; for a crash or a hang the words for it
    attempt: int = 1


class Pool:
    """``n`` children, each running ``factory(*args)``.

    Args:
        factory: importable function that returns the work, a function from a task to an iterator.
        args: its arguments; must pickle.
        n: number of children.
        timeout_s: a child that sends nothing for so long is killed.
        attempts: how often a task is tried when its child crashed or hung.
        backlog: items that may wait for the consumer before the children have to.
    """

    def __init__(
        self,
        factory: Callable[..., Work],
        args: tuple[Any, ...],
        n: int,
        timeout_s: float = 600.0,
        attempts: int = 2,
        backlog: int = 16,
    ) -> None:
        self._spawn = multiprocessing.get_context("spawn")
        self._factory, self._args, self._n = factory, args, max(1, n)
        self._timeout_s, self._attempts = timeout_s, attempts
        self._events: queue.Queue[Event | BaseException | None] = queue.Queue(maxsize=max(1, backlog))
        self._stop = threading.Event()

    def run(self, tasks: Iterable[Any]) -> Generator[Event, None, None]:
        """Yields the events of all tasks, those of different tasks interleaved.

        Closing the iterator, or an exception in its consumer, ends the children at once.
        """
        todo = iter(tasks)
        thread = threading.Thread(target=self._drive, args=(todo,), daemon=True)
        thread.start()
        try:
            while (event := self._events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            self._stop.set()
            while thread.is_alive():  # the thread may be waiting to put; let it see that we stopped
                try:
                    self._events.get(timeout=0.05)
                except queue.Empty:
                    continue
            thread.join()

    # -- the thread that feeds and reads the children ---------------------------------------------

    def _drive(self, todo: Iterator[Any]) -> None:
        children: list[_Child] = []
        again: list[tuple[Any, int]] = []
        try:
            exhausted = False
            while not self._stop.is_set():
                # Start or feed children while there is work.
                for child in [c for c in children if c.idle]:
                    task = self._next(todo, again)
                    if task is None:
                        exhausted = True
                        break
                    child.give(*task)
                busy = [c for c in children if not c.idle]
                if not exhausted and len(children) < self._n:
                    task = self._next(todo, again)
                    if task is None:
                        exhausted = True
                    else:
                        child = _Child(self._spawn, self._factory, self._args)
                        children.append(child)
                        child.give(*task)
                        continue
                if not busy:
                    if exhausted and not again:
                        break
                    exhausted = False
                    continue
                for ready in wait([c.connection for c in busy], timeout=0.2):
                    child = next(c for c in busy if c.connection is ready)
                    self._read(child, children, again)
                    exhausted = exhausted and not again
                now = time.monotonic()
                for child in busy:
                    if child in children and not child.idle and now - child.heard > self._timeout_s:
                        child.kill()
                        text = f"no answer for {self._timeout_s:.0f} s"
                        self._failed(child, children, again, "timeout", text)
                        exhausted = exhausted and not again
            self._put(None)
        except BaseException as error:  # noqa: BLE001 — carried over to the consumer's thread and raised there
            self._put(error)
        finally:
            for child in children:
                child.kill()

    def _next(self, todo: Iterator[Any], again: list[tuple[Any, int]]) -> tuple[Any, int] | None:
        if again:
            return again.pop()
        for task in todo:
            return task, 1
        return None

    def _put(self, event: Event | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                self._events.put(event, timeout=0.1)
                return
            except queue.Full:
                continue

    def _read(self, child: _Child, children: list[_Child], again: list[tuple[Any, int]]) -> None:
        try:
            kind, value = child.connection.recv()
        except (EOFError, OSError):
            child.process.join(5)
            self._failed(child, children, again, "crashed", _words(child.process.exitcode))
            return
        child.heard = time.monotonic()
        if kind == READY:
            child.ready = True
        elif kind == "fatal":
            raise value
        else:
            task, attempt = child.task, child.attempt
            if kind != "item":
                child.task = None
            self._put(Event(kind, task, value, attempt))
        child.heard = time.monotonic()  # what the consumer made us wait is not the child's silence

    def _failed(
        self,
        child: _Child,
        children: list[_Child],
        again: list[tuple[Any, int]],
        kind: Literal["crashed", "timeout"],
        words: str,
    ) -> None:
        children.remove(child)
        child.kill()
        if not child.ready:
            raise UserError(f"a worker process could not start ({words}); run `ego2robot doctor`")
        self._put(Event(kind, child.task, words, child.attempt))
        if child.attempt < self._attempts:
            again.append((child.task, child.attempt + 1))

    @property
    def attempts(self) -> int:
        return self._attempts


class _Child:
    def __init__(self, spawn: Any, factory: Callable[..., Work], args: tuple[Any, ...]) -> None:
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_main, args=(theirs, factory, args), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Any = None
        self.attempt = 0
        self.ready = False
        self.heard = time.monotonic()

    @property
    def idle(self) -> bool:
        return self.task is None

    def give(self, task: Any, attempt: int) -> None:
        self.task, self.attempt, self.heard = task, attempt, time.monotonic()
        try:
            self.connection.send(task)
        except OSError:  # it died while idle; reading from it will say so
            return

    def kill(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join(5)
        self.connection.close()


def _words(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"the decoding process was ended by {signal.Signals(-exitcode).name}"
    return f"the decoding process ended with exit code {exitcode}"


def _main(connection: Connection, factory: Callable[..., Work], args: tuple[Any, ...]) -> None:
    """A child's life. Ctrl-C is the parent's business; a vanished parent ends the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        try:
            work = factory(*args)
        except UserError as error:
            connection.send(("fatal", error))
            return
        connection.send((READY, None))
        while True:
            task = connection.recv()
            try:
                for item in work(task):
                    connection.send(("item", item))
                connection.send(("done", None))
            except VideoError as error:
                connection.send(("error", error))
            except MemoryError:
                connection.send(("error", VideoError("", "out of memory", "use fewer workers", "memory")))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:  # noqa: BLE001 — a bug: recorded with its traceback, one unit lost
                traceback.print_exc()
                cause = f"internal error: {type(error).__name__}: {' '.join(str(error).split())}"
                connection.send(("error", VideoError("", cause, "please report it", "internal")))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the parent is gone; nobody reads an exit handler's output
