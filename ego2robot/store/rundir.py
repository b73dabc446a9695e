"""A run directory: what is in it, who wrote it, and what of it counts.

A table is a folder of ``part-<id>.parquet``; a part counts once a record of ``ledger/`` names it with its
rows and checksum (see ``store/ledger.py``). Parts without a record are leftovers of an interrupted commit, or
of a unit that somebody else committed first; they are not read.
"""

from __future__ import annotations

import fcntl
import json
import platform
import re
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import yaml

from ego2robot import __version__, config
from ego2robot.errors import UserError
from ego2robot.store import atomic, schema
from ego2robot.store.ledger import AlreadyCommitted, Ledger, Record
from ego2robot.store.shared import SharedFolder
from ego2robot.types import short_id

COUNTED = {"clips": "decision", "quarantine": "error_class"}
SCHEMAS = {"clips": schema.CLIPS, "hands": schema.HANDS, "quarantine": schema.QUARANTINE}


WORKER_NAME = re.compile(r"[\w.-]{1,100}")


class RunDir:
    """Reads and writes one run directory. Opening one never changes it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.ledger = Ledger(SharedFolder(self.path / "ledger"))
        self.ledger_lock = threading.RLock()

    # -- opening ---------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """An existing run. Raises UserError when ``path`` is none."""
        run = cls(path)
        if not (run.path / "config.yaml").is_file():
            raise UserError(f"{path}: not a run directory (no config.yaml); start one with `ego2robot run`")
        return run

    @classmethod
    def create_or_resume(
        cls, path: str | Path, wanted: config.Config, fingerprint: Mapping[str, Any]
    ) -> RunDir:
        """A new run, or the one that is there if it was made by the same configuration and weights.

        A run that has planned nothing yet, say because its source's path was mistyped, takes the new
        configuration.

        Raises:
            UserError: ``path`` holds another run (says what differs) or something else.
        """
        run = cls(path)
        tree = config.to_dict(wanted)
        if (run.path / "config.yaml").is_file():
            differ = config.differences(config.to_dict(run.config), tree)
            run.config = wanted  # the same but for what this start may choose, such as workers
            old = run.fingerprint
            differ += [
                f"{key}: {old.get(key)} → {value}"
                for key, value in fingerprint.items()
                if key != "made_with" and old.get(key) != value
            ]
            if differ and not run.planned:
                with run.alone():
                    run._freeze(tree, fingerprint)
            elif differ:
                raise UserError(
                    f"{path}: made by another configuration ({'; '.join(differ)}); "
                    "use another run_dir, or the configuration it was started with"
                )
            return run
        # `ego2robot slurm submit` puts scripts there before a job plans.
        if run.path.exists() and any(path.name != "slurm" for path in run.path.iterdir()):
            raise UserError(f"{path}: not empty and not a run directory; choose another run_dir")
        run._freeze(tree, fingerprint)
        return run

    def _freeze(self, tree: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
        atomic.write_json(self.path / "fingerprint.json", dict(fingerprint))
        text = yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)
        atomic.write_text(self.path / "config.yaml", text)

    @property
    def planned(self) -> bool:
        """Whether there is a plan; an empty one is never stored."""
        return self.plan_path.is_file()

    @property
    def plan_path(self) -> Path:
        return self.path / "plan" / "units.parquet"

    @cached_property
    def config(self) -> config.Config:
        return config.load(str(self.path / "config.yaml"))

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self.read_json("fingerprint.json") or {}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Holds the run for this process; the system lets go of it however the process ends.

        Raises:
            UserError: another process holds it.
        """
        with (self.path / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self.path}: another process is working on this run; "
                    "wait for it (`ego2robot status` shows how far it is), or use another run_dir"
                ) from None
            yield

    # -- committing ------------------------------------------------------------------------------

    def commit(
        self,
        units: Sequence[str],
        tables: Mapping[str, pa.Table],
        info: Mapping[str, Any] | None = None,
        replace: bool = True,
    ) -> Record:
        """Writes the parts of some units, then the record that makes them count.

        Args:
            units: ids of the units whose rows are complete in ``tables``.
            tables: ``clips``, ``hands``, ``quarantine`` or ``embeddings/<model>`` to its rows; empty
                tables are not written.
            info: what else the record should say.
            replace: earlier parts that hold nothing but these units are dropped for this one.

        Raises:
            AlreadyCommitted: a unit is in a part that is not replaced; nothing is left of this commit.
        """
        part = short_id("part", *sorted(units), secrets.token_hex(8))
        files = {}
        try:
            for name, table in tables.items():
                if table.num_rows:
                    relative = f"{name}/part-{part}.parquet"
                    atomic.write_parquet(self.path / relative, table)
                    files[relative] = {
                        "rows": table.num_rows,
                        "sha256": atomic.sha256(self.path / relative),
                    }
            with self.ledger_lock:
                self.ledger.refresh()
                mine, drops = set(units), []
                if replace and mine:
                    holders = {self.ledger.owner[unit] for unit in mine if unit in self.ledger.owner}
                    drops = sorted(p for p in holders if mine.issuperset(self.ledger.parts[p].units))
                about = {**(info or {}), "counts": counts(tables)}
                return self.append(Record(part, tuple(units), files, about, tuple(drops)))
        except (AlreadyCommitted, OSError):
            for relative in files:
                (self.path / relative).unlink(missing_ok=True)
            raise

    def append(self, record: Record) -> Record:
        """Commits a record whose files are there, then removes those of the parts that it drops.

        Raises:
            AlreadyCommitted: a unit is in a part that is not dropped.
        """
        with self.ledger_lock:
            dropped = [self.ledger.parts[part] for part in record.drops if part in self.ledger.parts]
            made = self.ledger.append(record)
        for old in dropped:
            for relative in old.files:
                (self.path / relative).unlink(missing_ok=True)
        return made

    def records(self) -> list[Record]:
        """Every commit that counts, in the order in which they were made; each unit is in one of them."""
        with self.ledger_lock:
            self.ledger.refresh()
            return list(self.ledger.parts.values())

    def records_and_notes(self) -> list[Record]:
        """Every record that was ever made, also those that hold no part (any more)."""
        with self.ledger_lock:
            self.ledger.refresh()
            return list(self.ledger.log)

    def committed_units(self) -> set[str]:
        with self.ledger_lock:
            self.ledger.refresh()
            return set(self.ledger.owner)

    def remove_leftovers(self) -> list[Path]:
        """Deletes what interrupted commits left: temporary files and parts that no record names.

        Only when nobody works on this run, or once every unit is committed: then who still writes a part
        cannot commit it.
        """
        named = {self.path / file for record in self.records() for file in record.files}
        parts = [p for p in self.path.glob("**/part-*.parquet") if self._is_table_part(p) and p not in named]
        gone = parts + list(self.path.glob(f"**/{atomic.TEMPORARY_PREFIX}*"))
        for path in gone:
            path.unlink(missing_ok=True)
        return gone

    def _is_table_part(self, path: Path) -> bool:
        return path.relative_to(self.path).parts[0] in ("clips", "hands", "quarantine", "embeddings")

    # -- reading ---------------------------------------------------------------------------------

    def dataset(self, name: str) -> ds.Dataset:
        """A table for streaming: ``clips``, ``hands``, ``quarantine`` or ``embeddings/<model>``.

        Raises:
            KeyError: no such embedding.
        """
        prefix = name + "/"
        files = [str(self.path / f) for r in self.records() for f in r.files if f.startswith(prefix)]
        if not files:
            if name not in SCHEMAS:
                raise KeyError(name)
            return ds.dataset(pa.Table.from_pylist([], schema=SCHEMAS[name]))
        return ds.dataset(files, format="parquet", schema=pq.read_schema(files[0]))

    def counts(self, name: str) -> dict[str, int]:
        """``clips``' decisions or ``quarantine``'s error classes to their number of rows, by the ledger."""
        found: dict[str, int] = {}
        for record in self.records():
            part = record.info.get("counts")
            if part is None:
                file = f"{name}/part-{record.part}.parquet"
                there = file in record.files
                part = counts(
                    {name: pq.read_table(self.path / file, columns=[COUNTED[name]])} if there else {}
                )
            for value, n in part.get(name, {}).items():
                found[value] = found.get(value, 0) + n
        return dict(sorted(found.items()))

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A whole table in memory, see :meth:`dataset`."""
        return self.dataset(name).to_table(columns=list(columns) if columns else None)

    def embeddings(self) -> list[str]:
        """The embeddings that have rows, such as ``["clip", "hand_motion", "videomae"]``."""
        found = {f.split("/")[1] for r in self.records() for f in r.files if f.startswith("embeddings/")}
        return sorted(found)

    def units(self) -> pa.Table:
        """The plan: one row per unit of work (``schema.UNITS``); no rows before there is one."""
        if not self.planned:
            return pa.Table.from_pylist([], schema=schema.UNITS)
        return pq.read_table(self.plan_path)

    def read_json(self, relative: str) -> dict[str, Any] | None:
        """A JSON mapping of the run directory, None where there is no such file.

        Raises:
            UserError: the file is damaged.
        """
        path = self.path / relative
        if not path.is_file():
            return None
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}); delete it and run the job again") from None

    def skills(self) -> dict[str, Any] | None:
        """What ``ego2robot cluster`` found (``skills/skills.json``), or None before it ran."""
        return self.read_json("skills/skills.json")

    # -- metrics ---------------------------------------------------------------------------------

    def add_metrics(self, values: Mapping[str, Any], worker: str = "run") -> None:
        """Appends one line to ``metrics/<worker>.jsonl``."""
        if not WORKER_NAME.fullmatch(worker):
            raise ValueError(f"{worker!r} is no name of a worker")
        path = self.path / "metrics" / f"{worker}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), **values}) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines, those of one worker together; a last line cut by a crash is left out."""
        workers = []
        for path in sorted((self.path / "metrics").glob("*.jsonl")):
            lines = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    lines.append({"worker": path.stem, **json.loads(line)})
                except (json.JSONDecodeError, TypeError):
                    continue
            workers.append(lines)
        workers.sort(key=lambda lines: lines[0].get("time", 0.0) if lines else 0.0)
        return [line for lines in workers for line in lines]


def counts(tables: Mapping[str, pa.Table]) -> dict[str, dict[str, int]]:
    """How often each value occurs in the columns of ``COUNTED``, so that nobody has to read the parts."""
    found = {}
    for name, column in COUNTED.items():
        if name in tables and tables[name].num_rows:
            values = tables[name][column].value_counts().to_pylist()
            found[name] = {str(value["values"]): int(value["counts"]) for value in values}
    return found


def code_versions() -> dict[str, str]:
    """What made a run, for ``fingerprint.json``; informative, it does not forbid to resume."""
    import av
    import numpy
    import torch

    return {
        "ego2robot": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "av": av.__version__,
        "numpy": numpy.__version__,
    }
