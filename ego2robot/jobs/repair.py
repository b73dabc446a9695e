"""Takes back what ``verify`` finds broken, so that exactly that is done again."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ego2robot.errors import UserError
from ego2robot.jobs.verify import Verdict
from ego2robot.store import atomic
from ego2robot.store.ledger import Record
from ego2robot.store.rundir import RunDir, counts
from ego2robot.store.units import StoredPlan
from ego2robot.types import short_id


@dataclass(frozen=True)
class Mended:
    """What was taken back. ``units`` are to be done again; ``strays`` were files that nothing named."""

    parts: int
    units: int
    strays: int


def drop_broken(run: RunDir, verdict: Verdict) -> Mended:
    """Drops the units that a verdict calls broken; the rest of their parts is kept, written anew.

    The caller sees to it that nobody works on the run: a part that is being committed is named by no record.

    Raises:
        UserError: there is no plan to do anything again by.
    """
    if not run.planned:
        raise UserError(f"{run.path}: the plan is missing; make it with `ego2robot plan`, then repair")
    plan = StoredPlan(run.plan_path)
    records = {record.part: record for record in run.records()}
    units: set[str] = set()
    for part, broken in verdict.broken.items():
        record = records[part]
        _replace(run, record, broken, plan)
        units |= broken & set(record.units)
    for stray in verdict.strays:
        (run.path / stray).unlink(missing_ok=True)
    return Mended(len(verdict.broken), len(units), len(verdict.strays))


def _replace(run: RunDir, record: Record, broken: frozenset[str], plan: StoredPlan) -> None:
    """Commits a part without its broken units."""
    left = [unit for unit in record.units if unit not in broken]
    info = {"repaired": record.part}
    whole = left and all((run.path / file).is_file() for file in record.files)
    if not whole or any(_changed(run.path / file, about["sha256"]) for file, about in record.files.items()):
        run.append(Record("", (), {}, info, (record.part,)))
        return
    known = plan.mask(left)
    keep = [clip.clip_id for i in known.nonzero()[0] for clip in plan.unit(int(i)).clips]
    part = short_id("part", *sorted(left), secrets.token_hex(8))
    files = {}
    tables = {}
    for file in record.files:
        table = pq.read_table(run.path / file)
        column, values = ("unit_id", left) if file.startswith("quarantine/") else ("clip_id", keep)
        table = table.filter(pc.is_in(table[column], value_set=pa.array(values, pa.string())))
        if table.num_rows:
            name = Path(file).parent.as_posix()
            relative, tables[name] = f"{name}/part-{part}.parquet", table
            atomic.write_parquet(run.path / relative, table)
            sha = atomic.sha256(run.path / relative)
            files[relative] = {"rows": table.num_rows, "sha256": sha}
    about = {**info, "counts": counts(tables)}
    run.append(Record(part, tuple(left), files, about, (record.part,)))


def _changed(path: Path, sha256: object) -> bool:
    return atomic.sha256(path) != sha256
