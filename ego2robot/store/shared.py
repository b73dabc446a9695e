"""A folder that many processes on many nodes share, without a server and without locks.

Two operations carry everything: a file is made whole or not at all, and of all who make a file of one name
exactly one succeeds. link(2) gives both, on local disks and on NFS. What others did may be seen seconds late.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from pathlib import Path
from typing import Protocol

from ego2robot.errors import UserError
from ego2robot.store.atomic import TEMPORARY_PREFIX, sync_folder

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class Clock(Protocol):
    """Seconds that only ever grow, of this machine alone; they are never compared with another's."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Shared(Protocol):
    """What claims and the ledger need of a folder. Names hold no slash."""

    def create(self, name: str, data: bytes, durable: bool = True) -> bool:
        """Makes a file that is not there yet, whole. False: there is one."""

    def read(self, name: str) -> bytes | None:
        """A file's bytes, None where none is seen (yet)."""

    def names(self) -> list[str]:
        """What is seen in the folder, in any order, temporary files left out."""

    def remove(self, name: str) -> None:
        """Removes a file, or finds it gone."""

    def rename(self, old: str, new: str) -> bool:
        """False: ``old`` is not there any more."""


class SharedFolder:
    """A :class:`Shared` on a file system.

    Raises:
        UserError: the file system has no hard links.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, name: str, data: bytes, durable: bool = True) -> bool:
        target = self.path / name
        self.path.mkdir(parents=True, exist_ok=True)
        aside = self.path / f"{TEMPORARY_PREFIX}{name}.{secrets.token_hex(6)}"
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            made = _link(aside, target)
        finally:
            aside.unlink(missing_ok=True)
        if made and durable:
            sync_folder(self.path)
        return made

    def read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        try:
            found = os.listdir(self.path)  # noqa: PTH208 — names alone; a Path for each costs more than the call
        except FileNotFoundError:
            return []
        return [name for name in found if not name.startswith(TEMPORARY_PREFIX)]

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def rename(self, old: str, new: str) -> bool:
        try:
            (self.path / old).rename(self.path / new)
        except FileNotFoundError:
            return False
        return True


def _link(aside: Path, target: Path) -> bool:
    try:
        target.hardlink_to(aside)
    except FileExistsError:
        # An answer may be lost on the way from a file server and the request sent again, to find our own
        # file: then what we wrote has two names (open(2), O_EXCL).
        return aside.stat().st_nlink == 2
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        raise UserError(
            f"{target.parent}: this file system has no hard links ({error.strerror}), which commits need; "
            "put run_dir on a local disk, NFS, Lustre or another POSIX file system"
        ) from None
    return True
