"""The ledger: one numbered record a commit, in one order that everybody agrees on.

Record ``n + 1`` is made by exclusive creation, and only by who has read all up to ``n``. So nobody commits a
unit that was committed before, whoever claimed it, however late he sees what others did: his record's number
is taken, he reads the record that has it, and leaves out what it holds. A record never changes; what it
added is taken back by a later one that drops it.

Full ``segment-<n>.parquet`` files repeat the records so far, ``SEGMENT`` in each, so that a reader opens few
files. They are made of records alone and nothing depends on them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ego2robot.errors import UserError
from ego2robot.store.shared import Clock, Shared, SystemClock

SEGMENT = 256
UNSEEN_S = 180.0  # a record that is there and does not show: longer than file systems keep what they know
COLUMNS = pa.schema(
    [
        pa.field("n", pa.int64()),
        pa.field("part", pa.string()),
        pa.field("units", pa.list_(pa.string())),
        pa.field("drops", pa.list_(pa.string())),
        pa.field("rest", pa.string()),
    ]
)


@dataclass(frozen=True)
class Record:
    """One commit: which units it holds and which files, with rows and checksum of each.

    Attributes:
        drops: parts of earlier records that do not count any more.
        n: its place in the order, from 1; 0: not committed yet.
    """

    part: str
    units: tuple[str, ...]
    files: Mapping[str, Mapping[str, Any]]  # relative path → {"rows": int, "sha256": str}
    info: Mapping[str, Any]  # timings, attempts, worker
    drops: tuple[str, ...] = ()
    n: int = 0

    def to_bytes(self) -> bytes:
        body = {
            "part": self.part,
            "units": list(self.units),
            "files": {name: dict(about) for name, about in self.files.items()},
            "info": dict(self.info),
            "drops": list(self.drops),
        }
        return (json.dumps(body, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, n: int) -> Record:
        """Raises ValueError for anything but a whole record."""
        try:
            body = json.loads(data)
            return cls(
                str(body["part"]), tuple(body["units"]), dict(body["files"]), dict(body["info"]),
                tuple(body["drops"]), n,
            )  # fmt: skip
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"no ledger record: {error}") from None


class AlreadyCommitted(Exception):
    """Some units were committed by another record; nothing was written. ``units``: which."""

    def __init__(self, units: Sequence[str]) -> None:
        self.units = tuple(units)
        super().__init__(f"{len(self.units)} units are committed already")


@dataclass
class Ledger:
    """All records so far, brought up to date by :meth:`refresh`. Not for several threads at once.

    Attributes:
        parts: the parts that count, in the order of their records.
        damaged: numbers of records that cannot be read; what they held counts as never committed.
        log: every record, in order; the first one's number is 1.
    """

    folder: Shared
    clock: Clock = field(default_factory=SystemClock)
    parts: dict[str, Record] = field(default_factory=dict)
    damaged: list[int] = field(default_factory=list)
    log: list[Record] = field(default_factory=list)
    _segmented: int = 0
    _owner: dict[str, str] = field(default_factory=dict)
    _owned: int = 0  # records that ``_owner`` knows of

    @property
    def n(self) -> int:
        return len(self.log)

    @property
    def owner(self) -> dict[str, str]:
        """Committed unit to its part. Made when it is asked for: who only counts does without."""
        if self._owned < len(self.log):
            by_part = {record.part: record for record in self.log} if self._any_drops() else {}
            for record in self.log[self._owned :]:
                for part in record.drops:
                    for unit in by_part[part].units:
                        if self._owner.get(unit) == part:
                            del self._owner[unit]
                self._owner.update(dict.fromkeys(record.units, record.part))
            self._owned = len(self.log)
        return self._owner

    def _any_drops(self) -> bool:
        return any(record.drops for record in self.log[self._owned :])

    def refresh(self) -> list[Record]:
        """Reads what was committed since the last call. Costs one look where there is nothing new."""
        found = self._segments() if self.n == 0 else []
        while (data := self.folder.read(_name(self.n + 1))) is not None:
            found.append(self._take(self.n + 1, data))
        return found

    def append(self, record: Record) -> Record:
        """Commits a record.

        Raises:
            AlreadyCommitted: some of its units are held by parts that it does not drop.
            ValueError: a part that it drops does not count (any more).
        """
        data = record.to_bytes()
        while True:
            self.refresh()
            gone = set(record.drops)
            if missing := gone - self.parts.keys():
                raise ValueError(f"{', '.join(sorted(missing))}: no such part to drop")
            if clash := [u for u in record.units if u in self.owner and self.owner[u] not in gone]:
                raise AlreadyCommitted(clash)
            n = self.n + 1
            if self.folder.create(_name(n), data):
                made = self._take(n, data)
                self._write_segments()
                return made
            self._await(n)

    def _await(self, n: int) -> None:
        """Waits until a record shows that somebody else has made."""
        began, pause = self.clock.monotonic(), 0.01
        while self.folder.read(_name(n)) is None:
            if self.clock.monotonic() - began > UNSEEN_S:
                raise UserError(
                    f"ledger record {n} exists and cannot be read for {UNSEEN_S:.0f} s; look at the file "
                    "system of the run directory"
                )
            self.clock.sleep(pause)
            pause = min(2.0, 2 * pause)

    def _take(self, n: int, data: bytes) -> Record:
        try:
            record = Record.from_bytes(data, n)
        except ValueError:
            record = Record("", (), {}, {}, (), n)
            self.damaged.append(n)
        self._apply(record)
        return record

    def _apply(self, record: Record) -> None:
        for part in record.drops:
            self.parts.pop(part, None)
        if record.part:
            self.parts[record.part] = record
        self.log.append(record)

    # -- segments --------------------------------------------------------------------------------

    def _segments(self) -> list[Record]:
        """The records of the segments that follow each other from the first one."""
        found: list[Record] = []
        there = {name for name in self.folder.names() if name.startswith("segment-")}
        while (name := _segment(self._segmented + SEGMENT)) in there:
            data = self.folder.read(name)
            records = _from_segment(data, self._segmented) if data is not None else None
            if records is None:
                break
            for record in records:
                self._apply(record)
            found += records
            self._segmented += SEGMENT
        return found

    def _write_segments(self) -> None:
        """Who makes the last record of a segment writes it; who makes a later one, should he have died."""
        first, last = self._segmented, self._segmented + SEGMENT
        if self.n not in (last, last + SEGMENT // 2):
            return
        if not any(first < n <= last for n in self.damaged):
            self.folder.create(_segment(last), _to_segment(self.log[first:last]))
        if self.n > last:
            self._segmented = last


def _name(n: int) -> str:
    return f"{n:08}.json"


def _segment(n: int) -> str:
    return f"segment-{n:08}.parquet"


def _to_segment(records: Sequence[Record]) -> bytes:
    table = pa.table(
        [
            pa.array([record.n for record in records], pa.int64()),
            pa.array([record.part for record in records], pa.string()),
            pa.array([list(record.units) for record in records], pa.list_(pa.string())),
            pa.array([list(record.drops) for record in records], pa.list_(pa.string())),
            pa.array([json.dumps([record.files, record.info]) for record in records], pa.string()),
        ],
        schema=COLUMNS,
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def _from_segment(data: bytes, after: int) -> list[Record] | None:
    """None for anything but the whole segment that follows ``after``: its records are read instead."""
    try:
        table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
        if not table.schema.equals(COLUMNS):
            return None
        columns = [table[name].to_pylist() for name in COLUMNS.names]
        records = []
        for n, part, units, drops, rest in zip(*columns, strict=True):
            files, info = json.loads(rest)
            records.append(Record(part, tuple(units), files, info, tuple(drops), n))
    except (pa.ArrowInvalid, OSError, ValueError, TypeError):
        return None
    ok = [record.n for record in records] == list(range(after + 1, after + SEGMENT + 1))
    return records if ok else None
