"""Who works on what, among any number of processes on any number of nodes.

A claim is a hint that spares double work; what counts is the ledger alone, so that a claim may be lost, come
late or be overruled and the rows stay the same. There is no server, and no lock that the dead could keep.

- The plan's units lie in one order, the longest first. A claim takes an aligned block of ``2**level`` of
  them by making the file ``<plan>-<level>-<block>``, which one of all succeeds in. Blocks shrink with the
  work that is left for each live worker, down to single units, and to what this worker does in ``claim_s``.
- A worker shows that he lives by counting up in the name of a file: one listing tells of all. Whoever has
  seen a count stand still for ``lease_s`` of his own clock takes that worker for dead. Clocks of different
  machines are never compared.
- Who finds nothing left to claim does what others have held for longer than he would need for it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import re
import secrets
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ego2robot.errors import UserError
from ego2robot.store.ledger import Ledger, Record
from ego2robot.store.shared import Clock, Shared, SystemClock

MAX_LEVEL = 14
ORPHANED = 4  # leases, or seconds for each live worker: a claim so old is looked at though nobody has died
STALE_S = 5.0  # at most so old is what a worker knows of the ledger when he begins a unit


@dataclass(frozen=True)
class Shard:
    """Where a worker begins to look, ``index`` of ``of``. Everybody may do everything."""

    index: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``"3/8"``. Raises UserError for anything else, and for an index that is not below the number."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if not match or int(match[1]) >= int(match[2]):
            raise UserError(f"--shard {text}: give I/N with I from 0 to N-1, such as 0/8")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class Terms:
    """What all workers of a run agree on; differing ones cost work and not rows.

    Attributes:
        lease_s: a worker whose count stands still for so long is taken for dead.
        claim_s: how much of his own work a worker claims at most.
        share: a claim is at most the unclaimed work by ``share`` times the live workers.
        poll_s: how often is looked for work when there was none.
    """

    lease_s: float = 60.0
    claim_s: float = 60.0
    share: float = 3.0
    poll_s: float = 1.0


# -- who lives ------------------------------------------------------------------------------------


def worker_name() -> str:
    """A name that nobody has had: host, boot and process namespace, process, its start, something random."""
    host = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:32] or "host"
    pid = os.getpid()
    return f"{host}-{_place()}-{pid}-{_started(pid) or 0}-{secrets.token_hex(3)}"


@functools.cache
def _place() -> str:
    """Names what process numbers mean something in: this boot of this machine, this namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return hashlib.blake2b((boot + os.readlink("/proc/self/ns/pid")).encode(), digest_size=4).hexdigest()  # noqa: PTH115
    except OSError:
        return secrets.token_hex(4)


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks since the boot; None where it is gone or a zombie (proc(5))."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def locally_gone(worker: str) -> bool:
    """Whether a worker was a process of this machine that has ended; False also where nobody can tell."""
    parts = worker.split("-")
    if len(parts) != 5 or parts[1] != _place() or parts[3] == "0":
        return False
    return str(_started(int(parts[2]))) != parts[3]


class Presence:
    """A worker's own sign of life, and what he sees of the others'.

    Args:
        folder: holds one file a worker, ``<name>.<count>``.
        about: what the file says, for people and ``status``.
    """

    def __init__(
        self,
        folder: Shared,
        me: str,
        clock: Clock,
        lease_s: float,
        about: bytes = b"",
        gone: Callable[[str], bool] = locally_gone,
    ) -> None:
        self.me, self.lease_s = me, lease_s
        self._folder, self._clock, self._about, self._gone = folder, clock, about, gone
        self._count = 0
        self._seen: dict[str, tuple[int, float]] = {}  # worker → count, when it was first seen
        self._there: set[str] = set()
        self.n_alive = 1  # at the last look, this worker included
        self.any_dead = False  # at the last look: somebody left his sign behind

    def beat(self) -> None:
        self._count += 1
        new = f"{self.me}.{self._count}"
        if self._count == 1 or not self._folder.rename(f"{self.me}.{self._count - 1}", new):
            self._folder.create(new, self._about, durable=False)

    def look(self) -> None:
        now = self._clock.monotonic()
        found: dict[str, int] = {}
        for name in self._folder.names():
            worker, _, count = name.rpartition(".")
            if count.isdigit():
                found[worker] = max(found.get(worker, 0), int(count))
        for worker, n in found.items():
            if self._seen.get(worker, (-1, 0.0))[0] != n:
                self._seen[worker] = n, now
        self._there = set(found)
        others = self._there - {self.me}
        living = sum(not self.dead(worker) for worker in others)
        self.n_alive, self.any_dead = 1 + living, living < len(others)

    def dead(self, worker: str) -> bool:
        """Whether a worker is known to have ended, or has stood still for a lease since the first look."""
        if worker == self.me:
            return False
        now = self._clock.monotonic()
        _, at = self._seen.setdefault(worker, (-1, now))
        return now - at > self.lease_s or self._gone(worker)

    def dead_ones(self) -> list[str]:
        """Who had left a sign at the last look, and is dead."""
        return [worker for worker in self._there if self.dead(worker)]

    def first(self) -> bool:
        """Whether this worker is the first by name of those who live: one of them does what one has to do."""
        return all(self.me <= worker or self.dead(worker) for worker in self._there)

    def bury(self, worker: str) -> None:
        """Removes what a dead worker left here."""
        for name in self._folder.names():
            if name.rpartition(".")[0] == worker:
                self._folder.remove(name)

    def leave(self) -> None:
        self.bury(self.me)


# -- who works on what ----------------------------------------------------------------------------


@dataclass
class _Claim:
    """A claim as one worker sees it; ``since`` is when he first saw it."""

    level: int
    block: int
    spare: bool  # beside another's claim
    since: float
    owner: str | None = None  # not read yet

    @property
    def span(self) -> tuple[int, int]:
        return self.block << self.level, (self.block + 1) << self.level


@dataclass
class Board:
    """The units of a plan as one worker sees them: what is done, what is claimed, what he does next.

    Args:
        unit_ids: bytes [N], in the plan's order, the longest first.
        costs_s: float64 [N], estimated seconds.
        kinds: int [N], what the estimates err alike in (codecs).
        ledger: what is done; ``lock`` is held while it is used.
        width: units that this worker does at once.
        open_: bool [N], the units that may be worked on; default: all.
    """

    unit_ids: np.ndarray
    costs_s: np.ndarray
    kinds: np.ndarray
    ledger: Ledger
    claims: Shared
    presence: Presence
    terms: Terms = Terms()
    shard: Shard | None = None
    width: int = 1
    clock: Clock = field(default_factory=SystemClock)
    open_: np.ndarray | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        n = len(self.unit_ids)
        self.plan = hashlib.blake2b(self.unit_ids.tobytes(), digest_size=4).hexdigest()
        self.done = np.zeros(n, bool)
        self.attempts: dict[str, int] = {}  # unit → how often it failed, whoever tried
        self._open = np.ones(n, bool) if self.open_ is None else self.open_
        self._order = np.argsort(self.unit_ids, kind="stable")
        self._sorted = self.unit_ids[self._order]
        self._estimated_s = self.costs_s.astype(np.float64)
        self._costs_s = self._estimated_s.copy()
        self._measured: dict[int, list[float]] = {}  # kind → estimated and measured seconds
        self._random = random.Random(self.presence.me)
        self._seen: dict[str, _Claim] = {}
        self._mine: dict[str, set[int]] = {}
        self._queue: deque[int] = deque()
        self._later: list[tuple[float, int]] = []  # due, unit
        self._active: set[int] = set()
        self._owed = False  # units ended whose commit is still to come
        self._at = 0
        self._left = int(self._open.sum())
        self._known_at = -1e9
        self._look_again = -1e9
        self._born = self._buried_at = self.clock.monotonic()
        self._speed = 1.0  # estimated seconds of work done in a second, by one of ``width``
        self._began = False
        self.claimed = 0  # claims made
        self.starved = False
        with self.lock:
            self.refresh()

    # -- what is done --------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Every open unit is committed, as far as this worker knows."""
        return not self._left

    def refresh(self) -> None:
        """Reads what the ledger has since the last time."""
        with self.lock:
            self.ledger.refresh()
            if self._at < self.ledger.n:
                for record in self.ledger.log[self._at :]:
                    self._replay(record)
                self._at = self.ledger.n
                self._left = int((self._open & ~self.done).sum())
            self._known_at = self.clock.monotonic()

    def keep_up(self) -> None:
        """Reads the ledger where that was long ago: what this worker still does may be done elsewhere."""
        if self.clock.monotonic() - self._known_at > STALE_S:
            self.refresh()

    def _replay(self, record: Record) -> None:
        if record.drops:
            self.done[:] = False
            self.done[self._indices(list(self.ledger.owner))] = True
        self.done[self._indices(record.units)] = True
        for unit, failure in record.info.get("failed", {}).items():
            self.attempts[unit] = max(self.attempts.get(unit, 0), int(failure[0]))
        for kind, (estimated, measured) in record.info.get("measured", {}).items():
            sums = self._measured.setdefault(int(kind), [0.0, 0.0])
            sums[0] += estimated
            sums[1] += measured
        if "measured" in record.info:
            self._correct()

    def _correct(self) -> None:
        """Costs as the run has measured them, relative to each other by kind."""
        for kind, (estimated, measured) in self._measured.items():
            if estimated > 0 and measured > 0:
                chosen = self.kinds == kind
                self._costs_s[chosen] = self._estimated_s[chosen] * measured / estimated

    def _indices(self, units: Sequence[str]) -> np.ndarray:
        """Where units lie in the plan; those of other plans are left out."""
        ids = np.array(units, "S").astype(self._sorted.dtype) if len(units) else self._sorted[:0]
        at = np.minimum(np.searchsorted(self._sorted, ids), max(0, len(self._sorted) - 1))
        if not len(self._sorted):
            return at[:0]
        return self._order[at[self._sorted[at] == ids]]

    # -- what to do next -----------------------------------------------------------------------

    def next(self) -> int | None:
        """A unit to begin now; None: there is none now. ``finished`` tells whether there may be later."""
        with self.lock:
            now = self.clock.monotonic()
            self.keep_up()
            while True:
                for due in [pair for pair in self._later if pair[0] <= now]:
                    self._later.remove(due)
                    self._queue.appendleft(due[1])
                while self._queue:
                    unit = self._queue.popleft()
                    if not self.done[unit]:
                        self._active.add(unit)
                        self.starved = False
                        return unit
                if now < self._look_again or self.finished or not self._claim():
                    break
            self.starved = True
            if now >= self._look_again:
                self._drop_done()
                self._look_again = now + self.terms.poll_s * self._random.uniform(0.5, 1.5)
            return None

    def retry(self, unit: int, after_s: float) -> None:
        """A unit failed and is to be begun again, by this worker if he lives."""
        with self.lock:
            self._active.discard(unit)
            self._later.append((self.clock.monotonic() + after_s, unit))

    def ended(self, unit: int, seconds: float) -> None:
        """A unit was worked on for so long; it waits for its commit."""
        with self.lock:
            self._active.discard(unit)
            self._owed = True
            if seconds > 0:
                self._speed += 0.2 * (float(self._costs_s[unit]) / seconds - self._speed)

    def committed(self) -> None:
        """After a commit: claims that have nothing left are given back."""
        with self.lock:
            self._owed = False
            self.refresh()
            self._drop_done()

    def release(self) -> None:
        """Gives back every claim."""
        with self.lock:
            for name in self._mine:
                self.claims.remove(name)
            self._mine.clear()
            self._queue.clear()
            self._later.clear()

    def _drop_done(self) -> None:
        for name, units in list(self._mine.items()):
            units.difference_update([unit for unit in units if self.done[unit]])
            if not units:
                self.claims.remove(name)
                del self._mine[name]

    def _claim(self) -> bool:
        """Claims some units. First the claims are looked at, then the ledger: a claim that is gone was
        committed before."""
        self._look()
        free = self._free()
        due = self.clock.monotonic() - self._buried_at > self.terms.lease_s / 2
        if (due or not len(free)) and self._bury(all_=not len(free) and self.presence.any_dead):
            free = self._free()
        workers = self.presence.n_alive
        for _ in range(8):
            if not len(free):
                return self._spare()
            at, level = self._pick(free, workers)
            name = f"{self.plan}-{level}-{at >> level}"
            lo, hi = (at >> level) << level, ((at >> level) + 1) << level
            block = free[(free >= lo) & (free < hi)]
            if self.claims.create(name, self._signature(), durable=False):
                self._hold(name, block)
                return bool(self._queue)
            free = free[(free < lo) | (free >= hi)]
        return False

    def _hold(self, name: str, block: np.ndarray) -> None:
        """Queues a block that was just claimed, but for what another claim of another size holds too."""
        self.claimed += 1
        self._note(name)
        if self.presence.n_alive > 1:
            for other in self.claims.names():
                seen = self._seen.get(other) or self._note(other)
                if seen and other not in self._mine and other < name and not seen.spare:
                    lo, hi = seen.span
                    block = block[(block < lo) | (block >= hi)]
        self._mine[name] = set(block.tolist())
        self._queue.extend(block.tolist())
        if not len(block):
            self._drop_done()

    def _pick(self, free: np.ndarray, workers: int) -> tuple[int, int]:
        """Where a block begins, and its level. Workers begin apart, so that they seldom meet."""
        costs = self._costs_s[free]
        guided = float(costs.sum()) / (self.terms.share * workers)
        most = min(guided, self.terms.claim_s * self._speed * self.width)
        size = max(1, int(most / max(float(costs[:64].mean()), 1e-9)))
        rank = self._random.randrange(workers)
        if self.shard and not self._began:
            rank = self.shard.index
        self._began = True
        at = min(rank * size, len(free) - 1)
        return int(free[at]), min(MAX_LEVEL, size.bit_length() - 1)

    def _free(self) -> np.ndarray:
        free = self._open & ~self.done
        for claim in self._seen.values():
            if not claim.spare:
                lo, hi = claim.span
                free[lo:hi] = False
        return np.flatnonzero(free)

    def _look(self) -> None:
        there = self.claims.names()
        for name in self._seen.keys() - set(there) - self._mine.keys():
            del self._seen[name]
        for name in there:
            if name not in self._seen:
                self._note(name)
        self.presence.look()
        self.refresh()

    def _note(self, name: str) -> _Claim | None:
        plan, _, rest = name.partition("-")
        level, _, block = rest.partition("-")
        spare = level.startswith("s")
        if plan != self.plan or not level.removeprefix("s").isdigit() or not block.isdigit():
            return None
        claim = _Claim(int(level.removeprefix("s")), int(block), spare, self.clock.monotonic())
        if claim.level > MAX_LEVEL:
            return None
        self._seen[name] = claim
        return claim

    def _signature(self) -> bytes:
        return json.dumps({"worker": self.presence.me}).encode()

    def _owner(self, name: str, claim: _Claim) -> str:
        if claim.owner is None:
            try:
                claim.owner = str(json.loads(self.claims.read(name) or b"{}")["worker"])
            except (ValueError, KeyError, TypeError):
                claim.owner = f"unknown {name}"  # unreadable: dead after a lease
        return claim.owner

    def _bury(self, all_: bool) -> bool:
        """Removes the claims of the dead, then their signs; says whether there were any claims.

        To know whose a claim is, it must be read, which costs most where workers are many: unless ``all_``,
        only those are that are older than a lease while somebody is dead, and much older else (who died
        before he showed himself, or was buried by somebody who did not see them all).
        """
        now = self._buried_at = self.clock.monotonic()
        dead = self.presence.dead_ones()
        old_s = self.terms.lease_s if dead else ORPHANED * max(self.terms.lease_s, self.presence.n_alive)
        found = False
        for name, claim in list(self._seen.items()):
            if name in self._mine or not (all_ or now - claim.since > old_s):
                continue
            if self.presence.dead(self._owner(name, claim)):
                self.claims.remove(name)
                del self._seen[name]
                found = True
        unread = any(claim.owner is None for name, claim in self._seen.items() if name not in self._mine)
        for worker in dead if all_ or not unread or now - self._born > 2 * self.terms.lease_s else ():
            self.presence.bury(worker)
        return found

    def _spare(self) -> bool:
        """Takes one unit that another has held for longer than this worker would need for it.

        Not before what he himself has done is committed, lest others do it again meanwhile.
        """
        if self._owed:
            return False
        now, speed = self.clock.monotonic(), max(self._speed, 1e-9)
        others = [c for name, c in self._seen.items() if not c.spare and name not in self._mine]
        self._random.shuffle(others)
        for claim in others:
            lo, hi = claim.span
            could = (now - claim.since) * speed  # estimated seconds that he would have done meanwhile
            costs = self._costs_s[lo:hi]
            if could <= costs.min(initial=np.inf):
                continue
            left = np.flatnonzero(self._open[lo:hi] & ~self.done[lo:hi])
            if not len(left) or could <= costs[left[0]]:
                continue
            unit = lo + int(self._random.choice(left))
            name = f"{self.plan}-s0-{unit}"
            if unit in self._active or name in self._seen:
                continue
            if self.claims.create(name, self._signature(), durable=False):
                self._note(name)
                self.claimed += 1
                self._mine[name] = {unit}
                self._queue.append(unit)
                return True
        return False
