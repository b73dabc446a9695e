"""One worker of a run: claims units, has them decoded, embeds, commits. Any number may work at once."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import psutil
import pyarrow as pa

from ego2robot import config
from ego2robot.blobs import open_blob, read_error
from ego2robot.errors import UserError, VideoError
from ego2robot.jobs import status
from ego2robot.jobs.claims import Board, Presence, Shard, Terms, worker_name
from ego2robot.jobs.drain import Drain, Drained
from ego2robot.jobs.embedding import Batches, PendingUnit, tables
from ego2robot.jobs.pool import Event, Pool
from ego2robot.jobs.worker import WAITS
from ego2robot.progress import Progress, Show, Tell
from ego2robot.remote import RemoteError
from ego2robot.stages.base import Embedder
from ego2robot.stages.labels import PromptLabels
from ego2robot.store import atomic
from ego2robot.store.ledger import AlreadyCommitted, Record
from ego2robot.store.rundir import RunDir
from ego2robot.store.shared import SharedFolder, SystemClock
from ego2robot.store.units import StoredPlan, units_from_table
from ego2robot.types import Blob, Unit

COMMIT_CLIPS = 512  # a commit is due at so many, or after ``work.commit_s``: bounds loss and number of files
# Everybody reads everybody's records: with many workers each commits less often, so that this stays small.
CROWD = 30  # live workers; where there are more, each commits less often, all together no more often
METRICS_S, PROMETHEUS_S, IDLE_S, POLL_S, SETTLE_S = 2.0, 15.0, 0.5, 0.5, 10.0
# What may be otherwise at the next try. Crashes and timeouts were tried twice by the pool already.
TRANSIENT = frozenset(("missing", "io", "memory"))
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENODEV, errno.ENOTCONN, errno.EHOSTDOWN)

MakePool = Callable[[int], tuple[Pool, dict[str, int]]]  # number of units → pool, threads of each stage


def work(
    run: RunDir,
    make_pool: MakePool,
    schemas: Mapping[str, pa.Schema],
    embedders: Sequence[Embedder],
    labels: PromptLabels | None,
    show: Show,
    tell: Tell,
    member: Member,
    shard: Shard | None = None,
    drain: Drain | None = None,
    only: Iterable[str] | None = None,
) -> None:
    """Works until every unit of the plan is committed, by whomever.

    Args:
        schemas: of the embeddings.
        only: ids of units; default: all of the plan.

    Raises:
        Drained: it was asked to stop before.
        KeyboardInterrupt: after everything that was complete is committed.
    """
    drain = drain or Drain()
    chosen = None if only is None else frozenset(only)
    while True:
        plan = StoredPlan(run.plan_path)
        worker = Worker(run, plan, schemas, embedders, labels, show, tell, member, shard, drain, chosen)
        if not worker.work(make_pool):
            raise Drained
        if not plan.replaced():  # videos may have been added meanwhile
            return


class Member:
    """This process as one of those that share a run: its name, its sign of life, what one does for all."""

    def __init__(self, run: RunDir) -> None:
        self.name = worker_name()
        self.clock = SystemClock()
        self._lease_s = run.config.work.lease_s
        self._claims = SharedFolder(run.path / "claims")
        about = f'{{"host": "{_host()}", "pid": {os.getpid()}}}\n'.encode()
        self.presence = Presence(
            SharedFolder(run.path / "workers"), self.name, self.clock, self._lease_s, about
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Member:
        self.presence.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.presence.leave()

    def _beat(self) -> None:
        """Shows that this process lives, whatever its other threads wait for."""
        while not self._stop.wait(self._lease_s / 6):
            try:
                self.presence.beat()
            except OSError:  # a full disk or a network that is away: the work itself will say so
                continue

    def wait(self) -> None:
        """A moment, while another process has a duty that everybody waits for."""
        self.presence.look()
        self.clock.sleep(POLL_S)

    def require_alone(self, tell: Tell) -> None:
        """Waits until those who have died are known to be dead.

        Raises:
            UserError: somebody lives and works on this run.
        """
        began = self.clock.monotonic()
        self.presence.look()
        if self.presence.n_alive > 1:
            tell("there are signs of other workers; waiting whether they live")
        while self.presence.n_alive > 1 and self.clock.monotonic() - began < 1.5 * self._lease_s:
            self.wait()
        if self.presence.n_alive > 1:
            raise UserError(
                "other processes work on this run; stop them first (`ego2robot status` names them)"
            )

    @contextmanager
    def duty(self, what: str) -> Iterator[bool]:
        """Whether this process has a duty, until the end of the block; a dead one's is taken over."""
        name = f"duty-{what}"
        mine = self._claims.create(name, self.name.encode(), durable=False)
        if not mine and self.presence.dead((self._claims.read(name) or b"?").decode("utf-8", "replace")):
            self._claims.remove(name)
            mine = self._claims.create(name, self.name.encode(), durable=False)
        try:
            yield mine
        finally:
            if mine:
                self._claims.remove(name)


class Worker:
    """See :func:`work`."""

    def __init__(
        self,
        run: RunDir,
        plan: StoredPlan,
        schemas: Mapping[str, pa.Schema],
        embedders: Sequence[Embedder],
        labels: PromptLabels | None,
        show: Show,
        tell: Tell,
        member: Member,
        shard: Shard | None,
        drain: Drain,
        only: frozenset[str] | None,
    ) -> None:
        self._run, self._plan, self._drain, self._tell = run, plan, drain, tell
        self._terms: config.Work = run.config.work
        self._board = Board(
            plan.unit_ids,
            plan.costs_s,
            plan.kinds,
            run.ledger,
            SharedFolder(run.path / "claims"),
            member.presence,
            Terms(lease_s=self._terms.lease_s),
            shard,
            open_=None if only is None else plan.mask(only),
            lock=run.ledger_lock,
        )
        self._meter = Meter(run, plan, self._board, member.presence, show)
        self._committer = Committer(run, plan, schemas, self._meter, self._board, member.presence)
        self._batches = {
            e.name: Batches(e, labels if e.name == "clip" else None, self._meter.seconds) for e in embedders
        }
        self._active: dict[str, PendingUnit] = {}
        self._began: dict[str, float] = {}

    def work(self, make_pool: MakePool) -> bool:
        """False: asked to stop before everything was done."""
        if self._board.finished:
            self._meter.tick(event="done", force=True)
            return True
        pool, self._meter.threads = make_pool(int((~self._board.done).sum()))
        pool.idle_s = IDLE_S
        self._board.width = max(1, self._meter.threads.get("decode", 1))
        self._meter.tick(event="started", force=True)
        try:
            with closing(pool.run(self._tasks())) as events:
                for event in self._meter.timed(events):
                    if event.kind == "idle":
                        self._idle()
                    else:
                        self._take(event)
                    self._board.keep_up()
                    if self._drain.wanted or self._board.finished:
                        break
                    self._committer.tick()
                    self._meter.tick()
        finally:  # also on Ctrl-C: what is complete is kept
            try:
                self._committer.commit()
            finally:
                self._board.release()
                self._meter.tick(event="done" if self._board.finished else "stopped", force=True)
        return self._board.finished

    def _tasks(self) -> Iterator[Unit | None]:
        """Called in the pool's thread, whenever a child has room."""
        while not self._board.finished and not self._drain.wanted:
            index = self._board.next()
            if index is None:
                yield None
                continue
            unit = self._plan.unit(index)
            self._began[unit.unit_id] = time.monotonic()
            yield unit

    def _idle(self) -> None:
        """Where there is nothing new to begin, incomplete batches are embedded and small parts committed."""
        if not self._board.starved:
            return
        for batch in self._batches.values():
            batch.flush()
        self._complete()
        self._committer.commit()

    def _complete(self) -> None:
        for key in [key for key, unit in self._active.items() if unit.complete]:
            self._committer.add(self._active.pop(key))

    def _take(self, event: Event) -> None:
        """One event of the pool into the unit that it is about."""
        key = event.task.unit_id
        unit = self._active.setdefault(key, PendingUnit(event.task))
        unit.attempt = self._board.attempts.get(key, 0) + event.attempt
        if event.kind == "item":
            for stage, seconds in event.value.seconds.items():
                self._meter.seconds[stage] += seconds
                if WAITS not in stage:
                    self._committer.worked[key] += seconds
            clip = unit.add(event.value, list(self._batches))
            self._meter.clip(clip.row)
            for name, prepared in event.value.prepared.items():
                self._batches[name].add(clip, prepared)
            for name, vector in event.value.vectors.items():
                self._batches[name].accept(clip, vector)
        elif event.kind == "done":
            unit.end()
        elif event.kind == "error":
            self._failed(unit, _classified(event.value, event.task.video.blob))
        elif event.again:  # crashed or hung: once more, from its start
            self._forget(unit)
        elif self._drain.wanted:  # who ends this process may have ended its children too
            self._forget(unit)
            del self._active[key]
            self._began.pop(key, None)
            return
        else:
            kind = "crash" if event.kind == "crashed" else "timeout"
            hint = "the rest of the video's clips are given up; check the file with `ffmpeg -v error -i`"
            unit.end("decode", VideoError(unit.unit.video.name, str(event.value), hint, kind))
            self._tell(str(unit.refusals[-1][3]))
        if unit.ended:
            began = self._began.pop(key, time.monotonic())
            self._board.ended(self._plan.index(key), time.monotonic() - began)
        self._complete()

    def _failed(self, unit: PendingUnit, error: VideoError) -> None:
        """Begins a unit again after a while where that may help; else its clips are failed."""
        key, attempt = unit.unit.unit_id, unit.attempt
        if error.kind not in TRANSIENT or attempt >= self._terms.attempts:
            unit.end("decode", error)
            self._tell(str(unit.refusals[-1][3]))
            return
        self._forget(unit)
        del self._active[key]
        self._board.attempts[key] = attempt
        self._committer.failed[key] = (attempt, error.kind, error.cause)
        self._board.retry(self._plan.index(key), self._terms.backoff_s * 2 ** (attempt - 1))

    def _forget(self, unit: PendingUnit) -> None:
        for batch in self._batches.values():
            batch.forget(unit.clips)
        for clip in unit.clips.values():
            self._meter.clip(clip.row, -1)
        unit.clips.clear()
        unit.refusals.clear()


def _classified(error: VideoError, blob: Blob) -> VideoError:
    """A damaged file and one that cannot be read look alike to a decoder: here they are told apart."""
    if error.kind not in ("corrupt", "truncated"):
        return error
    try:
        with open_blob(blob) as file:
            for at in (0, max(0, blob.size - 1)):
                file.seek(at)
                file.read(1)
    except RemoteError as reason:
        return read_error(error.name, reason)
    except OSError as reason:
        kind = "missing" if reason.errno in MISSING else "io"
        cause = f"cannot be read ({reason.strerror or reason})"
        return VideoError(error.name, cause, "check the file and its file system", kind)
    return error


def _host() -> str:
    return "".join(c for c in socket.gethostname() if c.isalnum() or c in "-._")


OPEN = "plan/open.json"  # where one process leads: the step, and the units that all may work on now
Decode = Callable[[Sequence[Unit] | None], None]


def together(
    run: RunDir,
    member: Member,
    lead: Callable[[list[Unit], Decode], object],
    decode: Decode,
    drain: Drain | None = None,
) -> None:
    """Work in steps, each of which decides on the next: one process leads, the others help with what is open.

    A leader who dies is followed by another, who goes on where the files say that the first one was.

    Args:
        lead: called with the units of the plan, and with what decodes some of them, here and by the others.
        decode: works on some units until they are committed.
    """

    def open_and_decode(units: Sequence[Unit] | None) -> None:
        chosen = [unit.unit_id for unit in units or ()]
        if chosen:
            atomic.write_json(run.path / OPEN, {"units": chosen})
            decode(units)

    while not (done := StoredPlan(run.plan_path)).mask(run.committed_units()).all():
        with member.duty("lead") as mine:
            if mine:
                lead(units_from_table(run.units()), open_and_decode)
                return
        ids = (run.read_json(OPEN) or {}).get("units", ())
        left = set(ids) - run.committed_units()
        mask = done.mask(left)
        if mask.any():
            decode([done.unit(int(i)) for i in mask.nonzero()[0]])
        elif drain and drain.wanted:
            raise Drained
        else:
            member.wait()


def settle(run: RunDir, member: Member) -> None:
    """Removes what dead workers left, once every unit is committed: then nobody can commit anything more.

    Others that have just ended are waited for; who still lives after that does it himself when he ends.
    """
    with member.duty("settle") as mine:
        if not mine:
            return
        began = member.clock.monotonic()
        member.presence.look()
        while member.presence.n_alive > 1 and member.clock.monotonic() - began < SETTLE_S:
            member.wait()
        if member.presence.n_alive > 1:
            return
        run.remove_leftovers()
        for path in (run.path / "claims").glob("*"):
            path.unlink(missing_ok=True)
        for path in (run.path / "workers").glob("*"):
            if path.name.rpartition(".")[0] != member.name:
                path.unlink(missing_ok=True)


class Committer:
    """Collects complete units and commits them in parts that are neither tiny nor huge.

    Attributes:
        worked: unit to the seconds that its stages took.
        failed: unit to (attempts, error class, cause), since the last commit.
    """

    def __init__(
        self,
        run: RunDir,
        plan: StoredPlan,
        schemas: Mapping[str, pa.Schema],
        meter: Meter,
        board: Board,
        presence: Presence,
    ) -> None:
        self._run, self._plan, self._schemas = run, plan, schemas
        self._meter, self._board, self._presence = meter, board, presence
        self.worked: defaultdict[str, float] = defaultdict(float)
        self.failed: dict[str, tuple[int, str, str]] = {}
        self._units: list[PendingUnit] = []
        self._since = time.monotonic()

    def add(self, unit: PendingUnit) -> None:
        self._units.append(unit)

    def tick(self) -> None:
        """Commits where it is due."""
        age = time.monotonic() - self._since
        due = self._run.config.work.commit_s * max(1.0, self._presence.n_alive / CROWD)
        if age >= due or sum(len(unit.clips) for unit in self._units) >= COMMIT_CLIPS:
            self.commit()

    def commit(self) -> None:
        """Commits what is complete. Units that somebody else committed first are left out."""
        units, self._units = self._units, []
        failed, self.failed = self.failed, {}
        self._since = time.monotonic()
        began = time.perf_counter()
        while units or failed:
            try:
                self._commit(units, failed)
                break
            except AlreadyCommitted as error:
                for unit in units:
                    if unit.unit.unit_id in error.units:
                        self._meter.settled(unit)
                units = [unit for unit in units if unit.unit.unit_id not in error.units]
        self._board.committed()
        self._meter.seconds["write"] += time.perf_counter() - began

    def _commit(self, units: Sequence[PendingUnit], failed: Mapping[str, tuple[int, str, str]]) -> None:
        measured: dict[str, list[float]] = {}
        for unit in units:
            index = self._plan.index(unit.unit.unit_id)
            sums = measured.setdefault(str(self._plan.kinds[index]), [0.0, 0.0])
            sums[0] += unit.unit.cost_s
            sums[1] += self.worked[unit.unit.unit_id]
        info: dict[str, Any] = {
            "worker": self._presence.me,
            "at": time.time(),
            "clips": sum(len(unit.clips) for unit in units),
            "attempts": {unit.unit.unit_id: unit.attempt for unit in units if unit.attempt > 1},
            "measured": {kind: [round(x, 4) for x in sums] for kind, sums in measured.items()},
        }
        if failed:
            info["failed"] = {unit: list(about) for unit, about in failed.items()}
        if units:
            found = tables(units, self._schemas)
            self._run.commit([unit.unit.unit_id for unit in units], found, info, replace=False)
        else:
            self._run.append(Record("", (), {}, info))
        for unit in units:
            self._meter.settled(unit)
            self.worked.pop(unit.unit.unit_id, None)


class Meter:
    """Counts, rates and stage seconds; writes ``metrics/`` and feeds whoever shows the progress.

    The progress is the run's, by the ledger; the lines of ``metrics/`` are this worker's own.
    """

    def __init__(self, run: RunDir, plan: StoredPlan, board: Board, presence: Presence, show: Show) -> None:
        self._run, self._plan, self._board, self._show = run, plan, board, show
        self._presence, self._worker = presence, presence.me
        self._gpus = status.GpuWatch()
        self.total = int(plan.n_clips.sum())
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.threads: dict[str, int] = {}  # of each stage that may wait
        self._clips = self._kept = 0  # of this start
        self._pending = self._pending_kept = 0  # of those, not in the ledger yet
        self._records = self._kept_recorded = 0
        self._video_s = 0.0
        self._clip_s = plan.clip_s(run.config.clips.stride_s)
        self._before = self._done()
        self._began = self._shown = self._written = time.monotonic()
        self._published = -1e9
        self._process = psutil.Process()

    def clip(self, row: Mapping[str, object], sign: int = 1) -> None:
        kept = sign * (row["decision"] == "kept")
        self._clips += sign
        self._pending += sign
        self._kept += kept
        self._pending_kept += kept
        self._video_s += sign * self._clip_s

    def settled(self, unit: PendingUnit) -> None:
        """A unit is in the ledger, by this worker or another."""
        self._pending = max(0, self._pending - len(unit.clips))
        kept = sum(clip.row["decision"] == "kept" for clip in unit.clips.values())
        self._pending_kept = max(0, self._pending_kept - kept)

    def timed(self, events: Iterable[Event]) -> Iterator[Event]:
        """The events; the time that they let this process wait is measured."""
        waiter = "write" if "write" in self.threads else "embed"
        began = time.perf_counter()
        for event in events:
            self.seconds[f"{waiter}{WAITS}decode"] += time.perf_counter() - began
            yield event
            began = time.perf_counter()

    def _done(self) -> int:
        """Clips that the ledger has."""
        return int(self._plan.n_clips[self._board.done].sum())

    def _kept_so_far(self) -> int:
        log = self._run.ledger.log
        for record in log[self._records :]:
            self._kept_recorded += record.info.get("counts", {}).get("clips", {}).get("kept", 0)
        self._records = len(log)
        return self._kept_recorded + self._pending_kept

    def tick(self, event: str = "progress", force: bool = False) -> None:
        now = time.monotonic()
        elapsed = max(now - self._began, 1e-9)
        if force or now - self._shown >= IDLE_S:
            self._shown = now
            done = min(self.total, self._done() + self._pending)
            rate = (done - self._before) / elapsed
            video_rate = rate * self._clip_s
            eta = (self.total - done) / rate if rate > 0 else None
            self._show(Progress("curating", done, self.total, self._kept_so_far(), rate, video_rate, eta))
        if force or now - self._written >= METRICS_S:
            self._written = now
            self._run.add_metrics(
                {
                    "event": event,
                    "clips": self._clips,
                    "kept": self._kept,
                    "video_s": round(self._video_s, 3),
                    "elapsed_s": round(elapsed, 3),
                    "stage_seconds": self._rounded(waits=False),
                    "stall_seconds": self._rounded(waits=True),
                    "threads": self.threads,
                    "rss_bytes": sum(_resident(self._process)),
                    "gpus": self._gpus.latest,
                },
                self._worker,
            )
        if force or now - self._published >= PROMETHEUS_S:
            self._published = now
            if force or self._presence.first():
                self._publish(self._presence.n_alive, elapsed)

    def _publish(self, workers: int, elapsed: float) -> None:
        done = self._done()
        status.write_prometheus(
            self._run,
            {
                "units": len(self._plan),
                "units_done": int(self._board.done.sum()),
                "clips": self.total,
                "clips_done": done,
                "clips_kept": self._kept_so_far(),
                "clips_per_second": (done - self._before) / elapsed,
                "workers": workers,
                "units_retried": len(self._board.attempts),
            },
            self._gpus.latest,
        )

    def _rounded(self, waits: bool) -> dict[str, float]:
        return {k: round(v, 3) for k, v in sorted(self.seconds.items()) if (WAITS in k) == waits}


def _resident(process: psutil.Process) -> Iterator[int]:
    for one in (process, *process.children(recursive=True)):
        try:
            yield one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
