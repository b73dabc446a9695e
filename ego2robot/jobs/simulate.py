"""Many workers on one plan, in one process and without waiting: how evenly do they end, what does it cost?

The code that claims and commits is the real one (``jobs/claims.py``, ``store/ledger.py``); the clock and the
file system are not. A worker is a clock of its own and a number of units that it does at once; what one does
shows to the others after a delay, but that a name is taken is known at once, as on a file server.
"""

from __future__ import annotations

import heapq
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ego2robot.jobs.claims import Board, Presence, Shard, Terms
from ego2robot.jobs.work import CROWD
from ego2robot.store.ledger import AlreadyCommitted, Ledger, Record


@dataclass
class World:
    """Virtual time, and folders that all workers share.

    Attributes:
        now: seconds; the clocks of workers run ahead of it while they wait for the file system.
        delay_s: what others did shows so much later.
        operation_s: what a look or a change costs a worker.
        folders: folder to name to its versions, (time, author, bytes or None for removed), oldest first.
    """

    delay_s: float = 0.0
    operation_s: float = 0.002
    now: float = 0.0
    folders: defaultdict[str, dict[str, list[tuple[float, str, bytes | None]]]] = field(
        default_factory=lambda: defaultdict(dict)
    )


@dataclass
class VirtualClock:
    """One worker's clock. ``ahead``: seconds that it has waited for files since its turn began."""

    world: World
    offset: float = 0.0  # no two machines count from the same moment
    ahead: float = 0.0
    engine_s: float = 0.0  # waited in all

    def monotonic(self) -> float:
        return self.world.now + self.offset + self.ahead

    def sleep(self, seconds: float) -> None:
        self.ahead += seconds
        self.engine_s += seconds

    @property
    def true(self) -> float:
        return self.world.now + self.ahead


@dataclass
class VirtualFolder:
    """A :class:`~ego2robot.store.shared.Shared` as one worker sees it."""

    world: World
    name: str
    viewer: str
    clock: VirtualClock

    def _operate(self) -> dict[str, list[tuple[float, str, bytes | None]]]:
        self.clock.sleep(self.world.operation_s)
        return self.world.folders[self.name]

    def _shown(self, versions: list[tuple[float, str, bytes | None]]) -> bytes | None:
        at = self.clock.true
        while len(versions) > 1 and versions[1][0] + self.world.delay_s <= at:
            del versions[0]  # nobody sees the older one any more
        for when, author, data in reversed(versions):
            if author == self.viewer or when + self.world.delay_s <= at:
                return data
        return None

    def _change(self, name: str, data: bytes | None) -> None:
        folder = self.world.folders[self.name]
        if not self.world.delay_s and data is None:
            del folder[name]
            return
        versions = folder.setdefault(name, [])
        versions.append((self.clock.true, self.viewer, data))

    def create(self, name: str, data: bytes, durable: bool = True) -> bool:
        there = self._operate().get(name)
        if there and there[-1][2] is not None:
            return False
        self._change(name, data)
        return True

    def read(self, name: str) -> bytes | None:
        versions = self._operate().get(name)
        return self._shown(versions) if versions else None

    def names(self) -> list[str]:
        folder = self._operate()
        if not self.world.delay_s:
            return list(folder)
        found = []
        for name, versions in list(folder.items()):
            if self._shown(versions) is not None:
                found.append(name)
            elif len(versions) == 1 and versions[0][0] + self.world.delay_s <= self.clock.true:
                del folder[name]  # removed, and everybody sees it
        return found

    def remove(self, name: str) -> None:
        there = self._operate().get(name)
        if there and there[-1][2] is not None:
            self._change(name, None)

    def rename(self, old: str, new: str) -> bool:
        there = self._operate().get(old)
        if not there or (data := there[-1][2]) is None:
            return False
        self._change(old, None)
        self._change(new, data)
        return True


class OneLedger(Ledger):
    """The ledger of a worker among many, without a copy of his own of all that it holds.

    Without delays everybody sees the same; what it costs to see it is counted for each.
    """

    def __init__(self, shared: Ledger, clock: VirtualClock, world: World) -> None:
        super().__init__(shared.folder, clock, shared.parts, shared.damaged, shared.log)
        self._shared, self._virtual, self._world = shared, clock, world
        self._known = 0

    def refresh(self) -> list[Record]:
        found = self._shared.log[self._known :]
        self._virtual.sleep(self._world.operation_s * (1 + len(found)))
        self._known = self._shared.n
        return found

    def append(self, record: Record) -> Record:
        self._virtual.sleep(4 * self._world.operation_s)  # aside, flush, link, remove
        return self._shared.append(record)


@dataclass(frozen=True)
class Machine:
    """One worker: how fast it is (1: as estimated), when it begins, when it dies."""

    speed: float = 1.0
    width: int = 1
    begins_s: float = 0.0
    dies_s: float = float("inf")


@dataclass(frozen=True)
class Ending:
    """What a simulation found.

    Attributes:
        ended_s: float64 [W], when each worker ended its last unit.
        makespan_s: until the last unit was committed.
        ideal_s: all work by all speeds.
        done_twice_s: seconds of work whose rows were thrown away.
        engine_s: float64 [W], seconds that each worker waited for claims, commits and looks.
        worked_s: float64 [W], seconds that each worked on units, summed over what it did at once.
        cpu_s: real seconds of this process in the engine's code, over all workers.
        claims, records: how many were made.
        committed: unit to how many parts that count hold it.
    """

    ended_s: np.ndarray
    makespan_s: float
    ideal_s: float
    done_twice_s: float
    engine_s: np.ndarray
    worked_s: np.ndarray
    cpu_s: float
    claims: int
    records: int
    committed: dict[str, int]

    @property
    def tail(self) -> float:
        """How much later than the mean the last worker ends, a share."""
        return float(self.ended_s.max() / self.ended_s.mean() - 1)

    @property
    def engine_share(self) -> float:
        return float(self.engine_s.sum() / max(self.worked_s.sum(), 1e-9))


@dataclass
class _Worker:
    machine: Machine
    board: Board
    ledger: Ledger
    clock: VirtualClock
    presence: Presence
    ready: list[int] = field(default_factory=list)  # units that are complete and not committed
    running: int = 0
    committed_at: float = 0.0
    ended_at: float = 0.0
    worked: float = 0.0
    over: bool = False


def simulate(
    costs_s: np.ndarray,
    machines: list[Machine],
    world: World | None = None,
    terms: Terms | None = None,
    errors: np.ndarray | None = None,
    commit_s: float = 30.0,
    sharded: bool = True,
) -> Ending:
    """Has workers do a plan.

    Args:
        costs_s: float64 [N], estimated seconds of each unit at speed 1.
        errors: float64 [N], what they really take, times the estimate.
    """
    world, terms = world or World(), terms or Terms()
    order = np.argsort(-costs_s, kind="stable")
    costs_s = costs_s[order]
    real_s = costs_s * (np.ones(len(costs_s)) if errors is None else errors[order])
    ids = np.array([f"{i:016x}" for i in range(len(costs_s))], "S16")
    common = Ledger(VirtualFolder(world, "ledger", "", VirtualClock(world)))
    workers = []
    for i, machine in enumerate(machines):
        clock = VirtualClock(world, offset=1000.0 * i)
        ledger = OneLedger(common, clock, world)
        if world.delay_s:
            ledger = Ledger(VirtualFolder(world, "ledger", f"w{i}", clock), clock)  # type: ignore[assignment]
        me = f"w{i}"
        presence = Presence(
            VirtualFolder(world, "workers", me, clock), me, clock, terms.lease_s, gone=lambda _: False
        )
        board = Board(
            ids,
            costs_s,
            np.zeros(len(ids), np.int64),
            ledger,
            VirtualFolder(world, "claims", me, clock),
            presence,
            terms,
            Shard(i, len(machines)) if sharded else None,
            machine.width,
            clock,
        )
        workers.append(_Worker(machine, board, ledger, clock, presence))
    return _Run(world, workers, real_s, terms, commit_s).run()


class _Run:
    """The queue of what happens next."""

    def __init__(
        self, world: World, workers: list[_Worker], real_s: np.ndarray, terms: Terms, commit_s: float
    ) -> None:
        self._world, self._workers, self._real_s, self._terms = world, workers, real_s, terms
        self._commit_s = commit_s * max(1.0, len(workers) / CROWD)  # as jobs/work.py does
        self._queue: list[tuple[float, int, int, Callable[[_Worker], None]]] = []
        self._serial = 0
        self._cpu_s = self._twice_s = self._last_s = 0.0
        self._claims = 0

    def run(self) -> Ending:
        for i, worker in enumerate(self._workers):
            self._at(worker.machine.begins_s, i, self._beat)
            for _ in range(worker.machine.width):
                self._at(worker.machine.begins_s, i, self._begin)
        while self._queue:
            when, _, i, action = heapq.heappop(self._queue)
            worker = self._workers[i]
            if worker.over or when >= worker.machine.dies_s:
                worker.over = True
                continue
            self._world.now = when
            worker.clock.ahead = 0.0
            began = time.process_time()
            action(worker)
            self._cpu_s += time.process_time() - began
        return self._ending()

    def _at(self, when: float, i: int, action: Callable[[_Worker], None]) -> None:
        self._serial += 1
        heapq.heappush(self._queue, (when, self._serial, i, action))

    def _index(self, worker: _Worker) -> int:
        return int(worker.presence.me[1:])

    def _beat(self, worker: _Worker) -> None:
        worker.presence.beat()
        self._at(self._world.now + self._terms.lease_s / 6, self._index(worker), self._beat)

    def _begin(self, worker: _Worker) -> None:
        """A child of the worker is idle."""
        unit = worker.board.next()
        if unit is None:
            if worker.board.starved and worker.ready:
                self._commit(worker)
            if worker.board.finished:
                worker.over = True
                return
            self._at(worker.clock.true + self._terms.poll_s, self._index(worker), self._begin)
            return
        seconds = float(self._real_s[unit]) / worker.machine.speed

        def end(worker: _Worker) -> None:
            worker.board.refresh()
            if worker.board.finished:  # it was done elsewhere; the child is ended as soon as that is known
                cut = min(seconds, max(0.0, self._world.now - self._last_s))
                worker.worked += seconds - cut
                self._twice_s += seconds - cut
                worker.ended_at = self._world.now - cut
                worker.over = True
                return
            worker.worked += seconds
            worker.ended_at = self._world.now
            worker.board.ended(unit, seconds)
            worker.ready.append(unit)
            if self._world.now - worker.committed_at >= self._commit_s:
                self._commit(worker)
            self._begin(worker)

        self._at(worker.clock.true + seconds, self._index(worker), end)

    def _commit(self, worker: _Worker) -> None:
        units, worker.ready = worker.ready, []
        worker.committed_at = self._world.now
        while units:
            names = [worker.board.unit_ids[unit].decode() for unit in units]
            part = f"{worker.presence.me}-{self._serial}"
            try:
                worker.ledger.append(Record(part, tuple(names), {}, {}))
                self._last_s = worker.clock.true
                break
            except AlreadyCommitted as error:
                lost = [u for u, name in zip(units, names, strict=True) if name in error.units]
                self._twice_s += float(self._real_s[lost].sum()) / worker.machine.speed
                units = [unit for unit in units if unit not in lost]
        worker.board.committed()

    def _ending(self) -> Ending:
        view = VirtualFolder(self._world, "ledger", "", VirtualClock(self._world, ahead=1e9))
        ledger = Ledger(view)
        ledger.refresh()
        committed: dict[str, int] = {}
        for record in ledger.parts.values():
            for unit in record.units:
                committed[unit] = committed.get(unit, 0) + 1
        alive = [worker for worker in self._workers if worker.machine.dies_s == float("inf")]
        speeds = sum(worker.machine.speed * worker.machine.width for worker in alive)
        return Ending(
            ended_s=np.array([worker.ended_at for worker in alive]),
            makespan_s=self._last_s,
            ideal_s=float(self._real_s.sum()) / speeds,
            done_twice_s=self._twice_s,
            engine_s=np.array([worker.clock.engine_s for worker in self._workers]),
            worked_s=np.array([worker.worked for worker in self._workers]),
            cpu_s=self._cpu_s,
            claims=sum(worker.board.claimed for worker in self._workers),
            records=ledger.n,
            committed=committed,
        )


def fleet(n: int, spread: float = 0.35, seed: int = 0) -> list[Machine]:
    """``n`` machines of unequal speed: lognormal, between a quarter and four times the usual."""
    draw = np.random.default_rng(seed)
    speeds = np.clip(np.exp(spread * draw.standard_normal(n)), 0.25, 4.0)
    return [Machine(float(speed), begins_s=float(draw.uniform(0, 5))) for speed in speeds]


def heavy_tailed(n: int, mean_s: float, bound_s: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Estimated seconds of ``n`` units and what they really take, times that.

    Videos are Pareto (shape 1.2); a plan cuts long ones, so that no unit is above ``bound_s``.
    """
    draw = np.random.default_rng(seed)
    lengths = np.minimum(draw.pareto(1.2, n) + 0.05, bound_s)
    costs = np.minimum(lengths / lengths.mean() * mean_s, bound_s)
    return costs, np.exp(0.25 * draw.standard_normal(n))
