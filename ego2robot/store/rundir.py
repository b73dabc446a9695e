"""A run directory: what is in it, who wrote it, and what of it counts.

A table is a folder of ``part-<id>.parquet``; a part counts once ``ledger/<id>.json`` names it with its
rows and checksum. Parts without a record are leftovers of an interrupted commit and are not read.
"""

from __future__ import annotations

import fcntl
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
from ego2robot.types import short_id

SCHEMAS = {"clips": schema.CLIPS, "hands": schema.HANDS, "quarantine": schema.QUARANTINE}


@dataclass(frozen=True)
class Record:
    """One commit: which units it holds and which files, with rows and checksum of each."""

    part: str
    units: tuple[str, ...]
    files: Mapping[str, Mapping[str, Any]]  # relative path → {"rows": int, "sha256": str}
    info: Mapping[str, Any]  # timings, attempts, host


class RunDir:
    """Reads and writes one run directory. Opening one never changes it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

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
        return (self.path / "plan" / "units.parquet").is_file()

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
        self, units: Sequence[str], tables: Mapping[str, pa.Table], info: Mapping[str, Any] | None = None
    ) -> Record:
        """Writes the parts of some units, then the record that makes them count.

        Args:
            units: ids of the units whose rows are complete in ``tables``.
            tables: ``clips``, ``hands``, ``quarantine`` or ``embeddings/<model>`` to its rows; empty
                tables are not written.
            info: what else the record should say.
        """
        part = short_id("part", *sorted(units))
        files = {}
        for name, table in tables.items():
            if table.num_rows:
                relative = f"{name}/part-{part}.parquet"
                atomic.write_parquet(self.path / relative, table)
                files[relative] = {
                    "rows": table.num_rows,
                    "sha256": atomic.sha256(self.path / relative),
                }
        record = Record(part, tuple(units), files, dict(info or {}))
        atomic.write_json(self.path / "ledger" / f"{part}.json", asdict(record))
        return record

    def records(self) -> Iterator[Record]:
        """Every commit, in file order."""
        for path in sorted((self.path / "ledger").glob("[0-9a-f]*.json")):
            body = json.loads(path.read_text(encoding="utf-8"))
            yield Record(body["part"], tuple(body["units"]), body["files"], body["info"])

    def committed_units(self) -> set[str]:
        return {unit for record in self.records() for unit in record.units}

    def remove_leftovers(self) -> list[Path]:
        """Deletes what an interrupted commit left: temporary files and parts that no record names."""
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
        return pq.read_table(self.path / "plan" / "units.parquet")

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

    def add_metrics(self, values: Mapping[str, Any]) -> None:
        """Appends one line to ``metrics/run.jsonl``."""
        path = self.path / "metrics" / "run.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), **values}) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of ``metrics/run.jsonl``; a last line cut by a crash is left out."""
        path = self.path / "metrics" / "run.jsonl"
        found = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
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
