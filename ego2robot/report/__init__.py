"""The page a person looks at, and the counts that it opens with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ego2robot.errors import UserError
from ego2robot.store import atomic
from ego2robot.store.rundir import RunDir

Progress = Callable[[int, int], None]  # (pictures done, pictures wanted)


@dataclass(frozen=True)
class Funnel:
    """What became of the planned clips. Counts are clips; reasons are ordered, most frequent first."""

    planned: int
    kept: int
    dropped: Mapping[str, int]  # reason as stored → clips
    failed: Mapping[str, int]  # reason without its numbers → clips

    @property
    def n_dropped(self) -> int:
        return sum(self.dropped.values())

    @property
    def n_failed(self) -> int:
        return sum(self.failed.values())

    @property
    def scored(self) -> int:
        """Clips that were decoded and judged: kept or dropped."""
        return self.kept + self.n_dropped

    @property
    def pending(self) -> int:
        """Planned clips that have no row yet."""
        return max(0, self.planned - self.scored - self.n_failed)


def funnel(run: RunDir) -> Funnel:
    """Counts the clips of ``run``; streams, so that memory does not depend on their number.

    Raises:
        UserError: a committed part is missing or damaged.
    """
    rows: Counter[tuple[str, str]] = Counter()
    for _, batch in committed(run, "clips", ["decision", "reason"]):
        for decision in ("kept", "dropped", "failed"):
            chosen = batch.filter(pc.equal(batch["decision"], decision))
            if decision == "kept":
                rows["kept", ""] += chosen.num_rows
                continue
            for pair in pc.value_counts(chosen["reason"]).to_pylist():
                rows[decision, reason_group(decision, pair["values"])] += pair["counts"]
    dropped, failed = (
        {reason: n for (kind, reason), n in rows.most_common() if kind == decision}
        for decision in ("dropped", "failed")
    )
    seen = sum(rows.values())
    return Funnel(planned_clips(run) or seen, rows["kept", ""], dropped, failed)


def reason_group(decision: str, reason: str | None) -> str:
    """What a reason is counted under: as it is, and without its numbers where a clip failed.

    ``corrupt frames at 12.3 s`` is ``corrupt frames``; ``frame 7 of 36 is late`` is
    ``frame … of … is late``.
    """
    if not reason:
        return "no reason given"
    if decision != "failed":
        return reason
    number = r"[-+]?\d+(?:[.,:]\d+)*"
    return re.sub(rf"\b{number}\b", "…", re.sub(rf"\s+at\s+{number}(\s*s)?(?=\W|$)", "", reason)).strip()


def planned_clips(run: RunDir) -> int:
    """Clips in the plan; 0 before there is one."""
    path = run.path / "plan" / "units.parquet"
    if not path.is_file():
        return 0
    return sum(
        pc.sum(pc.list_value_length(batch["first"])).as_py() or 0 for batch in batches(path, ["first"])
    )


def committed(run: RunDir, table: str, columns: Sequence[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
    """The rows of ``clips``, ``hands`` or ``quarantine`` in batches, each with the part it is in.

    The parts of one commit have one name in every table: the landmarks of a clip are in
    ``hands/part-P`` when its row is in ``clips/part-P``.
    """
    for record in run.records():
        file = f"{table}/part-{record.part}.parquet"
        if file in record.files:
            for batch in batches(run.path / file, columns):
                yield record.part, batch


def batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of one Parquet file, at most 65,536 at a time.

    Raises:
        UserError: no such file, or damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(1 << 16, columns=list(columns))
    except FileNotFoundError:
        raise UserError(f"{path}: missing, though the run says it is there; see `ego2robot verify`") from None
    except (pa.ArrowInvalid, pa.ArrowIOError) as error:
        cause = " ".join(str(error).split())
        raise UserError(f"{path}: damaged ({cause}); see `ego2robot verify`") from None


def write_report(run: RunDir, out: Path | None = None, progress: Progress | None = None) -> Path:
    """Writes the page about ``run``: one HTML file that needs nothing else, and no network.

    Args:
        out: the file; by default ``<run>/report.html``.
        progress: called with (pictures done, pictures wanted) while source videos are read.

    Returns:
        The file that was written.

    Raises:
        UserError: a file of the run is missing or damaged.
    """
    # Imported late: `status` counts clips and needs neither a template nor a decoder.
    from ego2robot.report.html import render

    path = run.path / "report.html" if out is None else Path(out)
    atomic.write_text(path, render(run, progress))
    return path
