"""Writing so that a reader sees the old file or the new one, never half of one.

Write aside, flush to disk, rename; then flush the folder. It holds on local disks and on NFS.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

TEMPORARY_PREFIX = ".tmp-"


def write(path: Path, fill: Callable[[BinaryIO], None]) -> None:
    """Creates or replaces ``path`` with what ``fill`` writes. Nothing is left behind on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another node may write the same file, and have a process of the same number.
    aside = path.with_name(f"{TEMPORARY_PREFIX}{path.name}.{secrets.token_hex(6)}")
    try:
        with aside.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` durable, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems refuse to sync a folder; their rename is durable
        return
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    def fill(file: BinaryIO) -> None:
        file.write(data)

    write(path, fill)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Readable, key order kept, one trailing newline."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_parquet(path: Path, table: pa.Table, row_group: int = 1 << 16) -> None:
    """zstd, with page checksums, statistics and row groups of at most ``row_group`` rows."""
    write(
        path,
        lambda file: pq.write_table(
            table,
            file,
            compression="zstd",
            row_group_size=row_group,
            write_page_checksum=True,
            # Vectors seldom repeat a value: without a dictionary they are read two to five times as fast.
            use_dictionary="embedding" not in table.column_names,
        ),
    )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settle(aside: Path, path: Path) -> None:
    """Gives the complete file ``aside`` the name ``path`` too, unless there is one: the first of several
    processes wins, and what others may have open is never replaced. The caller removes ``aside``."""
    try:
        os.link(aside, path)  # fails where another process was faster
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            aside.replace(path)
