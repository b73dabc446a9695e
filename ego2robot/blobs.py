"""Opens a :class:`~ego2robot.types.Blob`, here or far away. Who reads the bytes of a video reads them so."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, cast

from ego2robot.errors import VideoError
from ego2robot.remote import RangedFile, RemoteError, RemoteObject, is_remote
from ego2robot.types import Blob

UNKNOWN = -1  # the size of a remote file that nobody has asked for yet


def open_blob(blob: Blob) -> BinaryIO:
    """The bytes of a blob as a file: 0 is its first byte, its end the blob's end.

    Raises:
        OSError: it cannot be opened; a :class:`RemoteError`, then or when reading, for an address.
    """
    if is_remote(blob.path):
        remote = RemoteObject(blob.path)
        return cast(BinaryIO, RangedFile(remote, blob.offset, None if blob.size == UNKNOWN else blob.size))
    file = Path(blob.path).open("rb")  # noqa: SIM115 — the caller's to close
    return file if blob.whole_file else cast(BinaryIO, _Part(file, blob.offset, blob.size))


def container_size(blob: Blob) -> int:
    """Bytes of the file or object that holds a blob, as it is now. Raises OSError."""
    return RemoteObject(blob.path).size if is_remote(blob.path) else Path(blob.path).stat().st_size


def sized(blob: Blob) -> Blob:
    """A blob whose size is known. Raises OSError."""
    return replace(blob, size=container_size(blob)) if blob.size == UNKNOWN else blob


def local_blob(blob: Blob) -> Blob:
    """The same bytes on a disk of this machine, for readers that only open files: those of a remote blob
    are fetched into the cache first, all of them.

    Raises:
        OSError: it cannot be fetched, or there is no room for it.
    """
    if not is_remote(blob.path):
        return blob
    known = sized(blob)
    return Blob(str(RemoteObject(known.path).local(known.offset, known.size)), 0, known.size)


def read_error(name: str, error: Exception) -> VideoError:
    """What to say, and to count it under, when the bytes of a video cannot be read.

    Args:
        error: an OSError, or one of PyAV's.
    """
    if isinstance(error, RemoteError):
        return VideoError(name, error.cause, error.hint, error.kind)
    cause = f"cannot be read ({getattr(error, 'strerror', None) or error})"
    return VideoError(name, cause, "check or re-download the file")


class _Part(io.RawIOBase):
    """A byte range of a local file."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if self._at < 0:
            raise ValueError("before the start")
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        self._file.seek(self._offset + self._at)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
