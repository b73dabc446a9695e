"""A bounded cache on disk of what was read from afar, shared by any number of processes without a server.

An entry is a file of its own: written aside and renamed, so that it is whole or absent, with a checksum,
so that a damaged one is not used. Who has written a share of the limit looks at the whole folder and removes
what was used least recently; only one process does at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from ego2robot.store.atomic import TEMPORARY_PREFIX

DIGEST = 16  # bytes of checksum behind each block
TRIM_SHARE, TRIM_TO = 1 / 64, 0.9  # of the limit: written until the folder is looked at, and left then
TOUCH_S = 30.0  # a use is noted on disk at most so often
IN_USE_S = 10.0  # who was given the path of a file may not have opened it yet
STALE_S = 3600.0  # what is written aside by a process that died
log = logging.getLogger(__name__)


class DiskCache:
    """Entries under ``folder``, of at most ``limit`` bytes and what each process may write before it looks:
    a 64th of that.

    Args:
        limit: bytes; 0 keeps nothing.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._unseen = 0  # bytes written since this process looked
        self._broken = False

    def get(self, key: str, part: int) -> bytes | None:
        """The bytes of an entry, None where there is none, or a damaged one (which is removed).

        Args:
            key: hex digits.
        """
        if not self.limit:
            return None
        path = self._path(key, str(part))
        try:
            data = path.read_bytes()
        except OSError:
            return None
        body = data[:-DIGEST]
        if len(data) < DIGEST or _digest(key, part, body) != data[-DIGEST:]:
            with suppress(OSError):
                path.unlink()
            return None
        _touch(path)
        return body

    def put(self, key: str, part: int, data: bytes) -> None:
        """Keeps an entry. A disk that is full or not ours costs the cache, not the run."""
        if self.limit and len(data) <= self.limit:
            self._write(self._path(key, str(part)), (data, _digest(key, part, data)))

    def file(self, key: str, size: int, chunks: Callable[[], Iterable[bytes]]) -> Path:
        """A whole object as a file of exactly its bytes; checked against its checksum, fetched where it is
        not there.

        Raises:
            OSError: it cannot be fetched, or there is no room for it.
        """
        path, told = self._path(key, "whole"), self._path(key, "whole.sum")
        if not (path.is_file() and path.stat().st_size == size and _file_digest(path) == _read(told)):
            digest = hashlib.blake2b(digest_size=DIGEST)

            def hashed() -> Iterable[bytes]:
                for chunk in chunks():
                    digest.update(chunk)
                    yield chunk

            self._write(path, hashed(), must=True)
            self._write(told, (digest.digest(),), must=True)
        _touch(path, always=True)
        return path

    def _path(self, key: str, part: str) -> Path:
        return self.folder / key[:2] / key / part

    def _write(self, path: Path, chunks: Iterable[bytes], must: bool = False) -> None:
        aside = path.with_name(f"{TEMPORARY_PREFIX}{path.name}.{os.urandom(6).hex()}")
        n = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                for chunk in chunks:
                    n += file.write(chunk)
            aside.replace(path)
        except OSError as error:
            with suppress(OSError):
                aside.unlink()
            if must:
                raise
            if not self._broken:
                self._broken = True
                log.warning("%s: not kept there (%s)", self.folder, error.strerror or error)
            return
        self._unseen += n
        if self._unseen >= self.limit * TRIM_SHARE:
            self._unseen = 0
            self.trim()

    def trim(self) -> None:
        """Removes what was used least recently until the folder is below its limit. One process at a time."""
        with suppress(OSError), (self.folder / ".trim").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            now = time.time()
            entries: list[tuple[float, int, str]] = []
            for root, folders, files in os.walk(self.folder):
                for name in files:
                    with suppress(OSError):
                        seen = os.stat(os.path.join(root, name))  # noqa: PTH116, PTH118 — tens of thousands
                        if name.startswith(TEMPORARY_PREFIX) and seen.st_mtime > now - STALE_S:
                            continue
                        entries.append((seen.st_mtime, seen.st_size, os.path.join(root, name)))  # noqa: PTH118
                if not folders and not files and root != str(self.folder):
                    with suppress(OSError):  # another process may be about to use it
                        Path(root).rmdir()
            total = sum(size for _, size, _ in entries)
            for used, size, name in sorted(entries):
                if total <= TRIM_TO * self.limit:
                    break
                if Path(name).name == "whole" and used > now - IN_USE_S:
                    continue
                with suppress(OSError):
                    Path(name).unlink()
                    total -= size


def _digest(key: str, part: int, data: bytes) -> bytes:
    return hashlib.blake2b(
        data, digest_size=DIGEST, salt=f"{part}".encode()[:16], key=key.encode()[:64]
    ).digest()


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST)).digest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _touch(path: Path, always: bool = False) -> None:
    with suppress(OSError):
        if always or time.time() - path.stat().st_mtime > TOUCH_S:
            os.utime(path)
