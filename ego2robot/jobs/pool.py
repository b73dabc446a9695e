"""Child processes that may crash or hang without taking the run along.

Decoders are C libraries fed with hostile bytes: one can end its process, or never return. Each child
works on one task at a time, or on ``width`` of them, and streams what it finds; the parent learns how every
task ended.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from ego2robot.errors import UserError, VideoError

# What a child runs: built once per child from the arguments, then called with each task.
Work = Callable[[Any], Iterator[Any]]
READY = "ready"
# What children need and takes seconds to import: done once, in the process that they are forked from.
PRELOADED = ("ego2robot.jobs.plan", "ego2robot.jobs.triage", "ego2robot.jobs.worker")


@dataclass(frozen=True)
class Event:
    """What became of a task. ``item`` comes any number of times, then one of the others.

    ``idle`` is about none: nothing came for ``Pool.idle_s``.

    Attributes:
        value: the item; the VideoError; for a crash or a hang the words for it.
        again: after a crash or a hang: it is tried once more, from its start.
    """

    kind: Literal["item", "done", "error", "crashed", "timeout", "idle"]
    task: Any
    value: Any = None
    attempt: int = 1
    again: bool = False


class Broken(Exception):
    """The child can work on nothing any more: it ends, and its tasks are tried again in another."""


class Pool:
    """``n`` children, each running ``factory(*args)``.

    Args:
        factory: importable function that returns the work, a function from a task to an iterator.
        args: its arguments; must pickle. A list: one tuple for each child, of which there are so many.
        n: number of children.
        timeout_s: a child that sends nothing about a task for so long is killed.
        attempts: how often a task is tried when its child crashed or hung.
        backlog: items that may wait for the consumer before the children have to.
        width: tasks that a child works on at once, each in a thread of its own. When such a child crashes,
            nobody knows whose fault it was: each of its tasks is tried again alone.
        idle_s: the consumer hears from the pool at least so often; None: only when there is something.
        fresh: children are new interpreters. Else they are forks of a process that has imported everything
            and done nothing else, which spares time and memory; CUDA does not survive that.
    """

    def __init__(
        self,
        factory: Callable[..., Work],
        args: tuple[Any, ...] | list[tuple[Any, ...]],
        n: int,
        timeout_s: float = 600.0,
        attempts: int = 2,
        backlog: int = 16,
        width: int = 1,
        idle_s: float | None = None,
        fresh: bool = False,
    ) -> None:
        self.idle_s = idle_s
        self._context = multiprocessing.get_context("spawn") if fresh else _forkserver()
        self._factory, self._width = factory, max(1, width)
        self._args = args if isinstance(args, list) else [args] * max(1, n)
        self._timeout_s, self._attempts = timeout_s, attempts
        self._events: queue.Queue[Event | BaseException | None] = queue.Queue(maxsize=max(1, backlog))
        self._stop = threading.Event()
        self._blocked_s = 0.0

    @property
    def attempts(self) -> int:
        return self._attempts

    def run(self, tasks: Iterable[Any]) -> Generator[Event, None, None]:
        """Yields the events of all tasks, those of different tasks interleaved.

        ``tasks`` is asked for one whenever a child has room; None from it means that there is none now.

        Closing the iterator, or an exception in its consumer, ends the children at once.
        """
        todo = _Todo(iter(tasks))
        thread = threading.Thread(target=self._drive, args=(todo,), daemon=True)
        thread.start()
        try:
            while True:
                try:
                    event = self._events.get(timeout=self.idle_s)
                except queue.Empty:
                    yield Event("idle", None)
                    continue
                if event is None:
                    break
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

    def _drive(self, todo: _Todo) -> None:
        children: list[_Child] = []
        try:
            while not self._stop.is_set():
                self._feed(children, todo)
                busy = [child for child in children if child.slots]
                if not busy:
                    if todo.exhausted:
                        break
                    self._stop.wait(0.05)  # there may be a task later
                    continue
                for ready in wait([child.connection for child in busy], timeout=0.2):
                    child = next(c for c in busy if c.connection is ready)
                    self._read(child, children, todo)
                for child in busy:
                    oldest = min((slot.heard for slot in child.slots.values()), default=self._now())
                    if child in children and self._now() - oldest > self._timeout_s:
                        text = f"no answer for {self._timeout_s:.0f} s"
                        self._failed(child, children, todo, "timeout", text)
            self._put(None)
        except BaseException as error:  # noqa: BLE001 — carried over to the consumer's thread and raised there
            self._put(error)
        finally:
            for child in children:
                child.kill()

    def _feed(self, children: list[_Child], todo: _Todo) -> None:
        """Gives tasks to children that have room, the emptiest first; starts children for the rest."""
        while True:
            room = [c for c in children if len(c.slots) < self._width and not c.alone]
            idle = [c for c in room if not c.slots]
            missing = sorted(set(range(len(self._args))) - {c.index for c in children})
            candidates = bool(idle or missing)
            task = todo.next(idle=candidates, room=bool(room))
            if task is None:
                return
            if idle:
                child = idle[0]
            elif missing and (task.alone or not room or min(len(c.slots) for c in room) > 0):
                index = missing[0]
                child = _Child(self._context, self._factory, self._args[index], index, self._width)
                children.append(child)
            else:
                child = min(room, key=lambda c: len(c.slots))
            child.give(task, self._now())

    def _now(self) -> float:
        """Seconds; stands still while the consumer makes us wait, which is not the children's silence."""
        return time.monotonic() - self._blocked_s

    def _put(self, event: Event | BaseException | None) -> None:
        began = time.monotonic()
        while not self._stop.is_set():
            try:
                self._events.put(event, timeout=0.1)
                break
            except queue.Full:
                continue
        self._blocked_s += time.monotonic() - began

    def _read(self, child: _Child, children: list[_Child], todo: _Todo) -> None:
        try:
            kind, key, value = child.connection.recv()
        except (EOFError, OSError):
            child.process.join(5)
            self._failed(child, children, todo, "crashed", _words(child.process.exitcode))
            return
        if kind == READY:
            child.ready = True
            for slot in child.slots.values():
                slot.heard = self._now()
        elif kind == "fatal":
            raise value
        else:
            slot = child.slots[key]
            if kind != "item":
                del child.slots[key]
            self._put(Event(kind, slot.task, value, slot.attempt))
            slot.heard = self._now()

    def _failed(
        self,
        child: _Child,
        children: list[_Child],
        todo: _Todo,
        kind: Literal["crashed", "timeout"],
        words: str,
    ) -> None:
        children.remove(child)
        child.kill()
        if not child.ready:
            raise UserError(f"a worker process could not start ({words}); run `ego2robot doctor`")
        slots, several, now = list(child.slots.values()), len(child.slots) > 1, self._now()
        for slot in slots:
            # Of several the silent ones are at fault when one hangs; a crash may be anyone's.
            innocent = kind == "timeout" and now - slot.heard <= self._timeout_s
            again = innocent or slot.attempt < self._attempts
            self._put(Event(kind, slot.task, words, slot.attempt, again))
            if again:
                todo.again.append(_Task(slot.task, slot.attempt + (not innocent), several and not innocent))


@dataclass
class _Task:
    task: Any
    attempt: int = 1
    alone: bool = False  # in a child that works on nothing else
    heard: float = 0.0


class _Todo:
    """Tasks that wait: those that failed first, then the rest."""

    def __init__(self, tasks: Iterator[Any]) -> None:
        self._tasks = tasks
        self._peeked: list[_Task] = []
        self.again: list[_Task] = []
        self._ended = False

    @property
    def exhausted(self) -> bool:
        if not self._peeked and not self._ended:
            self._peek()
        return self._ended and not self._peeked and not self.again

    def next(self, idle: bool, room: bool) -> _Task | None:
        """The next task for which there is a place: ``alone`` ones need an idle child, others only room."""
        for i in reversed(range(len(self.again))):
            if idle or (room and not self.again[i].alone):
                return self.again.pop(i)
        if idle or room:
            if not self._peeked and not self._ended:
                self._peek()
            if self._peeked:
                return self._peeked.pop()
        return None

    def _peek(self) -> None:
        for task in self._tasks:
            if task is not None:
                self._peeked.append(_Task(task))
            return
        self._ended = True


@functools.cache
def warm(*modules: str) -> None:
    """Begins to import what children need, and ``modules``, in the process that they will be forked from.

    Called first thing, that happens on another core while this process imports things of its own.
    """
    _forkserver(*modules)
    # It ignores Ctrl-C once it has imported; until then a traceback would come of it. Starting the tracker,
    # which comes with it, would take the signal's block away.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _forkserver(*modules: str) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, *modules])
    atexit.register(_end_forkserver)
    return context


def _end_forkserver() -> None:
    """It ends with this process, so that its CPU time counts as ours; at once, even while it imports."""
    server = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    pid, stop = getattr(server, "_forkserver_pid", None), getattr(server, "_stop", None)
    if pid and stop:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        stop()


class _Child:
    def __init__(
        self, context: Any, factory: Callable[..., Work], args: tuple[Any, ...], index: int, width: int
    ) -> None:
        self.connection, theirs = context.Pipe()
        given = (theirs, dict(os.environ), factory, args, width)
        self.process = context.Process(target=_main, args=given, daemon=True)
        self.process.start()
        theirs.close()
        self.index = index
        self.slots: dict[int, _Task] = {}
        self.ready = False
        self._keys = itertools.count()

    @property
    def alone(self) -> bool:
        return any(slot.alone for slot in self.slots.values())

    def give(self, task: _Task, now: float) -> None:
        key = next(self._keys)
        task.heard = now
        self.slots[key] = task
        try:
            self.connection.send((key, task.task))
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


def _main(
    connection: Connection,
    environ: dict[str, str],
    factory: Callable[..., Work],
    args: tuple[Any, ...],
    width: int,
) -> None:
    """A child's life. Ctrl-C is the parent's business; a vanished parent ends the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Locks that libraries make here then have no names, which a child that is killed would leave behind.
    multiprocessing.set_start_method("fork", force=True)
    if os.environ != environ:  # the process that we are forked from may be older than a change
        os.environ.clear()
        os.environ.update(environ)
    sending = threading.Lock()

    def send(kind: str, key: int | None, value: Any) -> None:
        with sending:
            connection.send((kind, key, value))

    try:
        try:
            work = factory(*args)
        except UserError as error:
            send("fatal", None, error)
            return
        send(READY, None, None)
        while True:
            key, task = connection.recv()
            if width == 1:
                _one_task(work, key, task, send)
            else:
                threading.Thread(target=_one_task, args=(work, key, task, send), daemon=True).start()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the parent is gone; nobody reads an exit handler's output


def _one_task(work: Work, key: int, task: Any, send: Callable[[str, int, Any], None]) -> None:
    try:
        try:
            for item in work(task):
                send("item", key, item)
            send("done", key, None)
        except VideoError as error:
            send("error", key, error)
        except UserError as error:
            send("fatal", key, error)
        except Broken:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(70)
        except MemoryError:
            send("error", key, VideoError("", "out of memory", "use fewer workers", "memory"))
        except (BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:  # noqa: BLE001 — a bug: recorded with its traceback, one unit lost
            traceback.print_exc()
            cause = f"internal error: {type(error).__name__}: {' '.join(str(error).split())}"
            send("error", key, VideoError("", cause, "please report it", "internal"))
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)
