"""How a chunked dataset is cut into files: limits, names, and tables that roll over."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

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

    def next(self, chunk_files: int) -> Place:
        return Place(self.chunk, self.file + 1) if self.file + 1 < chunk_files else Place(self.chunk + 1, 0)

    def __str__(self) -> str:
        return f"chunk-{self.chunk:03d}/file-{self.file:03d}"


class TableFiles:
    """Appends rows to ``chunk-XXX/file-XXX.parquet`` under a folder; memory holds one row group.

    A file that has reached the size limit is followed by the next one. There is always a first file,
    if need be without rows. Use as a context manager; files are complete, and flushed to disk, once it
    is left.

    Attributes:
        paths: the files so far.
    """

    def __init__(self, folder: Path, schema: pa.Schema, limits: Limits, group_rows: int) -> None:
        self._folder, self._schema, self._limits, self._group_rows = folder, schema, limits, group_rows
        self._place = Place(0, 0)
        self._file: BinaryIO | None = None
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []
        self.paths: list[Path] = []

    def __enter__(self) -> TableFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close()
        elif self._file and self._writer:
            # The folder is about to be deleted: no footer for it, not by the writer's destructor either.
            self._writer.is_open = False
            self._file.close()

    def place(self) -> Place:
        """The file that the next rows will be in."""
        if self._file and self._file.tell() + self._waiting_bytes() >= self._limits.data_bytes:
            self._close()
            self._place = self._place.next(self._limits.chunk_files)
        return self._place

    def add(self, table: pa.Table) -> None:
        """Appends rows to the file that :meth:`place` names."""
        if self._file is None:
            self._open()
        self._waiting.append(table.cast(self._schema))
        if sum(t.num_rows for t in self._waiting) >= self._group_rows:
            self._flush()

    def _waiting_bytes(self) -> int:
        return sum(table.nbytes for table in self._waiting)

    def _open(self) -> None:
        path = self._folder / f"{self._place}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self._writer = pq.ParquetWriter(
            self._file, self._schema, compression="zstd", write_page_checksum=True
        )
        self.paths.append(path)

    def _flush(self) -> None:
        assert self._writer is not None
        if self._waiting:
            table = pa.concat_tables(self._waiting).combine_chunks()
            self._writer.write_table(table, row_group_size=max(1, table.num_rows))
            self._waiting = []

    def _close(self) -> None:
        if self._file is None:
            if self.paths:
                return
            self._open()
        assert self._file is not None and self._writer is not None
        self._flush()
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = self._writer = None
