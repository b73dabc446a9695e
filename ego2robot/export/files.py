"""How a chunked dataset is cut into files: limits, names, and tables that are written piece by piece."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Limits:
    """When a new file begins. The defaults are LeRobot v3.0's."""

    chunk_files: int = 1000  # files in a folder
    data_bytes: int = 100 << 20
    video_bytes: int = 200 << 20


@dataclass(frozen=True)
class Place:
    """One file of a chunked table or video."""

    chunk: int
    file: int

    @classmethod
    def of(cls, number: int, chunk_files: int) -> Place:
        """Of the ``number``-th file, counted from 0."""
        return cls(*divmod(number, chunk_files))

    def __str__(self) -> str:
        return f"chunk-{self.chunk:03d}/file-{self.file:03d}"


def cut(sizes: np.ndarray, limit: float) -> np.ndarray:
    """Which file each item goes to when a new one begins before the sum would pass ``limit``.

    Args:
        sizes: [N], not negative.

    Returns:
        int64 [N], ascending without gaps; an item that is too large alone has a file of its own.
    """
    found = np.zeros(len(sizes), np.int64)
    if not len(sizes):
        return found
    ends, file, begin, before = np.cumsum(sizes), 0, 0, 0.0
    while begin < len(sizes):
        end = max(begin + 1, int(np.searchsorted(ends, before + limit, side="right")))
        found[begin:end] = file
        file, before, begin = file + 1, ends[end - 1], end
    return found


class TableFile:
    """One Parquet file that is written piece by piece; memory holds about one row group.

    Use as a context manager; the file is complete, and flushed to disk, once it is left.
    """

    def __init__(self, path: Path, schema: pa.Schema, group_rows: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._schema, self._group_rows = schema, group_rows
        self._file: BinaryIO = path.open("wb")
        self._writer = pq.ParquetWriter(self._file, schema, compression="zstd", write_page_checksum=True)
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> TableFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
        else:
            # The file does not count: no footer for it, not by the writer's destructor either.
            self._writer.is_open = False
        self._file.close()

    def add(self, table: pa.Table) -> None:
        """Appends rows."""
        self._waiting.append(table.cast(self._schema))
        if sum(t.num_rows for t in self._waiting) >= self._group_rows:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            table = pa.concat_tables(self._waiting).combine_chunks()
            self._writer.write_table(table, row_group_size=max(1, table.num_rows))
            self._waiting = []
