"""A dataset on its way: a folder beside it that any number of processes fill and that outlives them.

What is to be done is decided before anything is decoded and kept as ``plan.parquet``, one row group a unit of
work. A unit is done once ``units/<number>.json`` is there, which is written last; who is killed before leaves
nothing that counts. The dataset appears under its name in one rename, when it is complete.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from ego2robot import __version__, config
from ego2robot.errors import UserError, VideoError
from ego2robot.jobs.claims import Shard
from ego2robot.jobs.pool import Pool, Work
from ego2robot.store import atomic
from ego2robot.store.rundir import RunDir
from ego2robot.types import short_id

FORMAT = "2"  # of a staging folder; another one is not gone on with
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
CRASHES = 2  # of the decoder on one video, before it is left out
Tell = Callable[[int, int], None]  # clips done, clips to do


@dataclass(frozen=True)
class Task:
    """A unit of work.

    Attributes:
        avoid: (video_id, why) of videos that ended or stopped the process that read them.
    """

    unit: int
    avoid: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Item:
    """What a worker tells of its task: a video is begun, or a clip is done."""

    begun: str | None = None


class Staging:
    """The folder ``<out>.partial-<key>``; ``key`` names everything that decides what comes out."""

    def __init__(self, out: Path, key: str) -> None:
        self.out, self.key = out, key
        self.folder = out.with_name(f"{out.name}.partial-{key}")
        self.dataset = self.folder / "dataset"
        self.units = self.folder / "units"

    # -- the plan ----------------------------------------------------------------------------------

    def plan(self, table: pa.Table, starts: Sequence[int]) -> None:
        """Stores what is to be done, unless it is there; unit i begins at row ``starts[i]``.

        Of several who do so at once one succeeds, and what the others may have open is never replaced: on
        NFS that would be taken away from them.
        """
        path = self.folder / "plan.parquet"
        if path.is_file():
            return

        def fill(file: Any) -> None:
            with pq.ParquetWriter(file, table.schema, compression="zstd") as writer:
                for begin, end in pairwise([*starts, table.num_rows]):
                    writer.write_table(table.slice(begin, end - begin), row_group_size=max(1, end - begin))

        aside = path.with_name(f"plan-{secrets.token_hex(6)}.parquet")
        atomic.write(aside, fill)
        try:
            atomic.settle(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        atomic.sync_folder(self.folder)

    @cached_property
    def _plan(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.folder / "plan.parquet")

    @cached_property
    def starts(self) -> list[int]:
        """Plan rows at which each unit begins, and their number."""
        found = [0]
        for i in range(self._plan.num_row_groups):
            found.append(found[-1] + self._plan.metadata.row_group(i).num_rows)
        return found

    @property
    def n_units(self) -> int:
        return len(self.starts) - 1

    def rows(self, unit: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The plan's rows of one unit."""
        return self._plan.read_row_group(unit, columns=list(columns) if columns else None)

    def table(self, columns: Sequence[str]) -> pa.Table:
        """Some columns of the whole plan."""
        return self._plan.read(list(columns))

    # -- what is done ------------------------------------------------------------------------------

    def path(self, unit: int, suffix: str) -> Path:
        """A file of a unit, in folders of at most a thousand units."""
        return self.units / f"{unit // 1000:04d}" / f"{unit:07d}{suffix}"

    def commit(self, unit: int, record: Mapping[str, Any]) -> None:
        """Says that a unit is done; ``record`` becomes JSON."""
        atomic.write_bytes(self.path(unit, ".json"), json.dumps(record).encode())

    def done(self, unit: int) -> bool:
        return self.path(unit, ".json").is_file()

    @property
    def n_left(self) -> int:
        return sum(not self.done(unit) for unit in range(self.n_units))

    def record(self, unit: int) -> dict[str, Any]:
        return dict(json.loads(self.path(unit, ".json").read_bytes()))

    # -- its life ----------------------------------------------------------------------------------

    @contextmanager
    def held(self, shared: bool = False) -> Iterator[None]:
        """The folder, for this process alone or for all that share the work; errors of the disk in one line.

        It stays when this ends with an error and a unit was complete: the same call goes on with it.

        Raises:
            UserError: somebody else holds it, or it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "lock").open("a+") as lock:
                try:
                    ours = _lock(lock.fileno(), shared)
                except OSError as error:
                    if error.errno not in NO_LOCKS:
                        raise
                    raise UserError(
                        f"{self.out}: this file system has no locks ({error.strerror}); choose another "
                        "folder, or have it mounted with them (Lustre: -o flock)"
                    ) from None
                if not ours:
                    raise UserError(
                        f"{self.out}: another process writes this dataset; wait until it has ended"
                        + ("" if shared else " (those that were started with --shard too)")
                    )
                try:
                    yield
                except BaseException:
                    if not shared and not any(self.units.glob("*/*.json")):
                        shutil.rmtree(self.folder, ignore_errors=True)
                    raise
        except OSError as error:
            raise unwritable(self.out, error) from None

    def published(self, provenance: str) -> bool:
        """Whether the dataset that is in place is this one; ``provenance`` is its file that holds the key."""
        try:
            return bool(json.loads((self.out / provenance).read_bytes())["key"] == self.key)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def publish(self) -> None:
        """Puts the finished dataset in place; an earlier one is there until the new one is."""
        remove_leftovers(self.out)
        for half in self.dataset.rglob(f"{atomic.TEMPORARY_PREFIX}*"):  # of somebody who was killed
            half.unlink()
        old = sibling(self.out, "old") if self.out.exists() else None
        if old:
            self.out.rename(old)
        try:
            self.dataset.rename(self.out)
        except OSError:
            if old:
                old.rename(self.out)
            raise
        atomic.sync_folder(self.out.parent)
        if old:
            shutil.rmtree(old)
        shutil.rmtree(self.folder, ignore_errors=True)
        for other in _others(self.out, ".partial-"):
            _remove_if_free(other)


def key_of(
    run: RunDir, form: str, decides: Mapping[str, Any], chosen: pa.Table, starts: Sequence[int]
) -> str:
    """Names an export by everything that decides what comes out, but for places: 16 hex digits.

    Args:
        decides: what was asked for.
        chosen: the chosen clips.
        starts: rows of them at which a unit of work begins.
    """
    tree = config.to_dict(run.config)
    tree["run_dir"] = tree["export"]["path"] = tree["source"]["path"] = ""
    return short_id(
        form, FORMAT, __version__, av.__version__, decides, run.fingerprint, tree, *starts,
        *chosen["clip_id"].to_pylist(), *chosen["task"].to_pylist(),
    )  # fmt: skip


def check_target(out: Path, own: str) -> None:
    """Refuses a place that holds anything but an earlier export, which has the file ``own``."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: a file is in the way; choose another folder for the dataset")
    if any(out.iterdir()) and not (out / own).is_file():
        raise UserError(f"{out}: not empty and not a dataset made by ego2robot; choose another folder")


def unwritable(out: Path, error: OSError) -> UserError:
    cause = error.strerror or str(error)
    return UserError(f"{out}: the dataset cannot be written ({cause}); make room or choose another folder")


def sibling(out: Path, what: str) -> Path:
    return out.with_name(f"{out.name}.{what}-{socket.gethostname()}-{os.getpid()}")


def remove_leftovers(out: Path) -> None:
    """Puts back, or deletes, what a process of this machine set aside when it was killed while publishing."""
    for path in _others(out, f".old-{socket.gethostname()}-"):
        pid = path.name.rpartition("-")[2]
        if not pid.isdecimal() or (psutil.pid_exists(int(pid)) and int(pid) != os.getpid()):
            continue
        if not out.exists():  # killed between the two renames
            path.rename(out)
        else:
            shutil.rmtree(path)


def _others(out: Path, infix: str) -> list[Path]:
    return sorted(path for path in out.parent.iterdir() if path.name.startswith(out.name + infix))


def _lock(file: int, shared: bool) -> bool:
    """Whether it is ours now. On NFS a file must be open for reading to be shared, else for writing."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _remove_if_free(folder: Path) -> None:
    """Deletes what an export with other settings has left, unless somebody works in it."""
    try:
        with (folder / "lock").open("a+") as lock:
            if _lock(lock.fileno(), shared=False):
                shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return


# -- sharing the work -----------------------------------------------------------------------------


@dataclass
class _Book:
    """Clips done of each unit, and what is still to be done."""

    tell: Tell
    total: int
    clips: Counter[int] = field(default_factory=Counter)

    def add(self, unit: int, n: int = 1) -> None:
        self.clips[unit] += n
        self.tell(self.clips.total(), self.total)


def work_off(
    staging: Staging,
    factory: Callable[..., Work],
    args: tuple[Any, ...],
    workers: int,
    timeout_s: float,
    tell: Tell,
    shard: Shard | None = None,
) -> None:
    """Does every unit that is not done; with ``shard`` only every so many-th.

    Args:
        factory: gives the work of :class:`Pool`: from a :class:`Task` to :class:`Item`s; commits the unit.
        workers: child processes; 0: in this one, where a decoder that crashes takes us along.
        timeout_s: a child that says nothing for so long is given up.
    """
    mine = range(staging.n_units) if shard is None else range(shard.index, staging.n_units, shard.of)
    sizes = {unit: staging.starts[unit + 1] - staging.starts[unit] for unit in mine}
    book = _Book(tell, sum(sizes.values()))
    todo = [unit for unit in mine if not staging.done(unit)]
    if done := sum(sizes.values()) - sum(sizes[unit] for unit in todo):
        book.add(-1, done)
    if not todo:
        return
    if workers < 1:
        work = factory(*args)
        for unit in todo:
            for item in work(Task(unit)):
                if item.begun is None:
                    book.add(unit)
        return
    _in_children(Pool(factory, args, min(workers, len(todo)), timeout_s, attempts=1), todo, book)


def _in_children(pool: Pool, units: Sequence[int], book: _Book) -> None:
    waiting = deque(Task(unit) for unit in units)
    open_units = set(units)
    reading: dict[int, str] = {}  # unit → the video that its child is at
    crashes: Counter[tuple[int, str]] = Counter()

    def tasks() -> Iterator[Task | None]:
        while open_units:
            yield waiting.popleft() if waiting else None

    with closing(pool.run(tasks())) as events:
        for event in events:
            task: Task = event.task
            if event.kind == "item":
                if event.value.begun is None:
                    book.add(task.unit)
                else:
                    reading[task.unit] = event.value.begun
            elif event.kind == "done":
                open_units.discard(task.unit)
            elif event.kind in ("crashed", "timeout"):
                video = reading.pop(task.unit, "")
                crashes[task.unit, video] += 1
                if crashes[task.unit, video] < CRASHES:
                    again = task
                elif video:
                    again = Task(task.unit, (*task.avoid, (video, str(event.value))))
                else:
                    raise UserError(
                        f"unit {task.unit} of the export: {event.value} before it read a video; "
                        "use fewer workers if memory is short, or run `ego2robot doctor`"
                    )
                book.clips.pop(task.unit, None)
                waiting.append(again)
            elif event.kind == "error":
                raise _fatal(event.value)


def _fatal(error: VideoError) -> Exception:
    if error.kind == "memory":
        return UserError(f"{error.cause or 'out of memory'}; {error.hint or 'use fewer workers'}")
    return RuntimeError(str(error))  # a bug; the child has printed its traceback


def each(factory: Callable[..., Work], args: tuple[Any, ...], tasks: Sequence[Any], workers: int) -> None:
    """Does independent tasks that write files of their own; in children where that is worth their start."""
    if workers < 2 or len(tasks) < 3:
        work = factory(*args)
        for task in tasks:
            for _ in work(task):
                pass
        return
    with closing(Pool(factory, args, min(workers, len(tasks)), 3600.0).run(tasks)) as events:
        for event in events:
            if event.kind == "error":
                raise _fatal(event.value)
            if event.kind in ("crashed", "timeout") and not event.again:
                raise UserError(f"{event.value}; use fewer workers if memory is short")
