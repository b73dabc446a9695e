"""HDF5 files of other people: only what lies in the file itself, and never more than is expected of it.

Links (to elsewhere in the file, or to other files), data kept in other files, virtual datasets and
references are not followed; sizes are checked before anything is read. Filters that HDF5 would load as
plugins come from this machine, never from the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ego2robot.errors import UserError, VideoError
from ego2robot.sources.base import storable

MAX_ARRAY_BYTES = 256 << 20  # of what is read at once
MAX_CHUNK_BYTES = 64 << 20  # of a compressed block, which is unpacked whole
MAX_ATTRIBUTE_BYTES = 1 << 20
MAX_TEXT = 10_000  # characters of an attribute that are kept
REDO = "download it again"
# What h5py raises of a file that is damaged or not what it says.
DAMAGE = (OSError, RuntimeError, ValueError, TypeError, KeyError, OverflowError, MemoryError)


class Hdf5:
    """An open file. Use :func:`open_hdf5`.

    Raises:
        VideoError: from every method, where the file is damaged or holds something else than it should.
    """

    def __init__(self, name: str, file: Any, h5py: Any) -> None:
        self._name, self._file, self._h5py = name, file, h5py

    def names(self, group: str) -> list[str] | None:
        """What a group holds, sorted; None where there is no such group."""
        with self._explained(group):
            found = self._find(group)
            return sorted(found) if isinstance(found, self._h5py.Group) else None

    def shape(self, path: str) -> tuple[int, ...] | None:
        """The shape of a dataset of numbers; None where there is none."""
        with self._explained(path):
            dataset = self._dataset(path)
            return None if dataset is None else tuple(dataset.shape)

    def numbers(self, path: str, tail: tuple[int, ...], rows: slice | None = None) -> np.ndarray | None:
        """A dataset of numbers as float64; None where there is none.

        Args:
            tail: the shape it must have, but for the first axis where ``rows`` is given.
            rows: of the first axis; what lies beyond its end is not there.

        Returns:
            [n, *tail] for ``rows``, else ``tail``.
        """
        with self._explained(path):
            dataset = self._dataset(path)
            if dataset is None:
                return None
            shape = tuple(dataset.shape)
            if shape[0 if rows is None else 1 :] != tail or (rows is not None and not shape):
                wanted = tail if rows is None else ("N", *tail)
                raise self._error(f"{path} has the shape {shape}, not {wanted}")
            n = 1 if rows is None else len(range(*rows.indices(shape[0])))
            if n * math.prod(tail) * 8 > MAX_ARRAY_BYTES:
                raise self._error(f"{path} holds {n} rows: too many to be read at once")
            values = dataset[()] if rows is None else dataset[rows]
            return np.asarray(values, np.float64)

    def texts(self) -> dict[str, str]:
        """The attributes of the file that are text or numbers, as text; lists are joined by commas."""
        found = {}
        with self._explained("attributes"):
            names = list(self._file.attrs)
        for name in names:
            with suppress(*DAMAGE):  # one of no known type costs itself alone
                if (text := self._text(name)) is not None:
                    found[storable(name)] = text
        return found

    def _text(self, name: str) -> str | None:
        kept = self._file.attrs.get_id(name)
        is_text = self._h5py.check_string_dtype(kept.dtype) is not None
        if not is_text and kept.dtype.kind not in "SUbiuf":  # references, records
            return None
        if kept.get_storage_size() > MAX_ATTRIBUTE_BYTES:
            return None
        value = self._file.attrs[name]
        if isinstance(value, self._h5py.Empty):
            return ""
        return storable(", ".join(_words(value)))[:MAX_TEXT]

    def _dataset(self, path: str) -> Any:
        dataset = self._find(path)
        if dataset is None:
            return None
        if not isinstance(dataset, self._h5py.Dataset):
            raise self._error(f"{path} is no dataset")
        if dataset.is_virtual or dataset.external:
            raise self._error(f"{path} is kept in another file")
        if dataset.shape is None or dataset.dtype.kind not in "fiu":
            raise self._error(f"{path} holds no numbers ({dataset.dtype})")
        if dataset.chunks and math.prod(dataset.chunks) * dataset.dtype.itemsize > MAX_CHUNK_BYTES:
            raise self._error(f"{path} is stored in blocks of {dataset.chunks}: too large")
        return dataset

    def _find(self, path: str) -> Any:
        here = self._file
        for part in path.split("/"):
            if not isinstance(here, self._h5py.Group):
                return None
            link = here.get(part, getlink=True)
            if link is None:
                return None
            if not isinstance(link, self._h5py.HardLink):
                raise self._error(f"{path} is a link")
            here = here[part]
        return here

    def _error(self, cause: str) -> VideoError:
        return VideoError(self._name, cause, REDO, "corrupt")

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except DAMAGE as error:
            raise self._error(f"{what} cannot be read ({_line(error)})") from None


@contextmanager
def open_hdf5(name: str, path: Path) -> Iterator[Hdf5]:
    """A file to read from.

    Args:
        name: as the user knows it, for messages.

    Raises:
        VideoError: it is missing, empty, or no HDF5 file.
        UserError: h5py is not installed.
    """
    try:
        import h5py
    except ModuleNotFoundError:
        raise UserError(f"{name}: HDF5 files need h5py; pip install 'ego2robot[egodex]'") from None
    try:
        size = path.stat().st_size
    except OSError as error:
        raise VideoError(name, error.strerror or str(error), "check the path", "missing") from None
    if not size:
        raise VideoError(name, "empty (0 bytes)", REDO, "empty")
    try:
        # Nobody writes these; locks fail on some network and read-only file systems.
        file = h5py.File(path, "r", locking=False)
    except PermissionError as error:
        raise VideoError(name, error.strerror or str(error), "check its permissions", "missing") from None
    except DAMAGE as error:
        truncated = "truncated" in str(error)
        cause = "truncated HDF5 file" if truncated else f"no HDF5 file that can be read ({_line(error)})"
        raise VideoError(name, cause, REDO, "truncated" if truncated else "corrupt") from None
    try:
        yield Hdf5(name, file, h5py)
    finally:
        file.close()


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, np.ndarray):
        for item in value.ravel().tolist():
            yield from _words(item)
    elif isinstance(value, bytes):
        yield value.decode("utf-8", "replace")
    elif isinstance(value, np.generic):
        yield from _words(value.item())
    elif isinstance(value, float) and value.is_integer():
        yield str(int(value))
    else:
        yield str(value)


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
