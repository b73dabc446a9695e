"""Annotation files of datasets, read in bounded memory: CSV and JSON lines in order of time, large JSON.

Everything that a file can get wrong comes out as a VideoError of kind ``metadata`` that names it, or is
left out and counted, as the functions say.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ego2robot.errors import VideoError
from ego2robot.sources.base import storable

MAX_LINE = 1 << 20  # bytes; longer ones are no annotation
CHUNK, MAX_VALUE = 1 << 20, 64 << 20  # characters of a JSON text that are read at once; of one member
NEAR_ENOUGH = 1 << 16  # bytes: a search in a file ends, and reading begins


def broken(path: Path, cause: str, hint: str = "check or re-download the file") -> VideoError:
    """The error of an annotation file."""
    return VideoError(storable(str(path)), cause, hint, "metadata")


def unreadable(path: Path, error: OSError | UnicodeDecodeError) -> VideoError:
    if isinstance(error, UnicodeDecodeError):
        return broken(path, f"not UTF-8 (byte {error.start:,})", "save it as UTF-8")
    return broken(path, f"cannot be read ({error.strerror or error})", "check the file")


@dataclass
class Counted:
    """Rows that could not be used: how many for each reason, and the first of them."""

    path: Path
    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        count, first = self.reasons.get(reason, (0, where))
        self.reasons[reason] = (count + 1, first)

    def problems(self, what: str = "row", kind: str = "metadata") -> Iterator[VideoError]:
        """One line a reason: ``train.csv: 3 rows not used: ends before it starts; the first is line 17``."""
        for reason, (count, first) in self.reasons.items():
            plural = what.removesuffix("y") + "ies" if what.endswith("y") else f"{what}s"
            cause = f"{count:,} {what if count == 1 else plural} not used: {reason}"
            yield VideoError(storable(str(self.path)), cause, f"the first is {storable(first)}", kind)


def csv_rows(path: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV with a header, one at a time: line number and fields by column.

    A row that is shorter than the header lacks its last fields; longer ones lose what has no column.

    Raises:
        VideoError: not UTF-8, not a CSV, empty, or without one of the columns ``needed``.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            header = next(rows, None)
            if header is None:
                raise broken(path, "empty", "fetch it again")
            if lacking := [name for name in needed if name not in header]:
                has = ", ".join(storable(name) for name in header[:20])[:200]
                raise broken(path, f"no column {lacking[0]!r} (there are: {has})", "give the right file")
            for row in rows:
                if row:
                    yield rows.line_num, dict(zip(header, row, strict=False))
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from None
    except csv.Error as error:
        raise broken(path, f"not a CSV: {error}") from None


# -- large JSON -----------------------------------------------------------------------------------

_SPACE = re.compile(r"[\s,:]*")
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*"|["\[\]{}]', re.DOTALL)


class _Text:
    """A growing and shrinking window on a JSON text."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self._file = path, file
        self.text, self.at, self.ended = "", 0, False
        self._decoder = json.JSONDecoder()

    def more(self) -> bool:
        if len(self.text) - self.at > MAX_VALUE:
            raise broken(self.path, f"not JSON, or a value of more than {MAX_VALUE >> 20} MiB")
        data = self._file.read(max(CHUNK, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + data, 0
        self.ended = not data
        return bool(data)

    def peek(self) -> str:
        """The next character that is no space, comma or colon; "" at the end."""
        while True:
            found = _SPACE.match(self.text, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
            except ValueError as error:
                if not self.more():
                    raise broken(self.path, f"not JSON, or cut off: {error}") from None
                continue
            if end < len(self.text) or self.ended:
                self.at = end
                return value
            self.more()  # a number at the end of what was read may go on

    def skip(self) -> None:
        """Passes over the next value without making it."""
        if self.peek() not in ("{", "["):
            self.value()
            return
        depth = 0
        while True:
            found = _STRUCTURE.search(self.text, self.at)
            if found is None or found[0] == '"':  # a string that goes on
                self.at = len(self.text) if found is None else found.start()
                if not self.more():
                    raise broken(self.path, "not JSON, or cut off")
                continue
            self.at = found.end()
            depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(found[0], 0)
            if depth == 0:
                return


def json_items(path: Path, *inside: str) -> Iterator[tuple[str, Any]]:
    """The members of a large JSON object, or the elements of a list, one at a time.

    Memory is that of the largest member. ``inside`` are the keys that lead to the object or list; where
    the first of them is not there, nothing is yielded.

    Yields:
        key (the index as text for a list) and value.

    Raises:
        VideoError: the file cannot be read, is not UTF-8, or is not JSON up to what was looked for.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = _Text(path, file)
            for key in inside:
                if not _find(text, key):
                    return
            opened = text.peek()
            if opened not in ("{", "["):
                raise broken(path, "a JSON object or list was expected", "give the right file")
            text.at += 1
            index = 0
            while (char := text.peek()) not in ("}", "]", ""):
                if opened == "{":
                    if char != '"':
                        raise broken(path, "not JSON, or cut off")
                    name = str(text.value())
                else:
                    name = str(index)
                yield name, text.value()
                index += 1
            if not text.peek():
                raise broken(path, "not JSON, or cut off")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from None
    except RecursionError:
        raise broken(path, "nested too deeply") from None


def _find(text: _Text, key: str) -> bool:
    """Goes to the value of a member; False where the object has none."""
    if text.peek() != "{":
        raise broken(text.path, "a JSON object was expected", "give the right file")
    text.at += 1
    while (char := text.peek()) not in ("}", ""):
        if char != '"':
            raise broken(text.path, "not JSON, or cut off")
        if text.value() == key:
            text.peek()
            return True
        text.skip()
    if not text.peek():
        raise broken(text.path, "not JSON, or cut off")
    return False


# -- tables in order of time ----------------------------------------------------------------------

Key = Callable[[bytes], int]  # the time of a line; ValueError for what is no such line


def lines_between(path: Path, key: Key, first: int, last: int, header: bool) -> Iterator[tuple[int, bytes]]:
    """The lines of a file in ascending order of time whose time is from ``first`` to ``last``.

    Found by bisection: an hour of poses a millisecond apart is not read to use some seconds of it. Lines
    without a time are left out.

    Args:
        key: the time of a line, in the file's own unit.
        header: the first line is not a row.

    Raises:
        VideoError: the file cannot be read, or its times do not ascend.
    """
    try:
        with path.open("rb") as file:
            if header:
                file.readline(MAX_LINE)
            begin = file.tell()
            file.seek(_search(path, file, key, first, begin, file.seek(0, 2)))
            before = None
            while line := file.readline(MAX_LINE):
                time = _time(line, key)
                if time is None:
                    continue
                if before is not None and time < before:
                    cause = f"its times do not ascend ({before} is followed by {time})"
                    raise broken(path, cause, "sort it by time")
                before = time
                if time > last:
                    return
                if time >= first:
                    yield time, line
    except OSError as error:
        raise unreadable(path, error) from None


def _search(path: Path, file: BinaryIO, key: Key, first: int, low: int, high: int) -> int:
    """Where to begin to read: the start of a line that is not after ``first`` (or the first one)."""
    low_time: int | None = None
    while high - low > NEAR_ENOUGH:
        file.seek((low + high) // 2)
        file.readline(MAX_LINE)  # the rest of a line
        at, time = file.tell(), None
        while file.tell() < high and (line := file.readline(MAX_LINE)):
            time = _time(line, key)
            if time is not None:
                break
            at = file.tell()
        if time is None:
            high = (low + high) // 2
        elif low_time is not None and time < low_time:
            raise broken(
                path, f"its times do not ascend ({low_time} is followed by {time})", "sort it by time"
            )
        elif time < first:
            low, low_time = at, time
        else:
            high = (low + high) // 2
    return low


def _time(line: bytes, key: Key) -> int | None:
    try:
        return key(line)
    except (ValueError, IndexError, KeyError, TypeError, RecursionError):
        return None


@dataclass(frozen=True)
class TimedCSV:
    """A CSV of numbers in order of time, such as a trajectory.

    Attributes:
        header: its columns.
        time: the column of the time, whole numbers.
    """

    path: Path
    header: tuple[str, ...]
    time: str

    def has(self, *columns: str) -> bool:
        return all(column in self.header for column in columns)

    def between(self, first: int, last: int, columns: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Times int64 [N] from ``first`` to ``last`` and the columns float64 [N, C], NaN for what is no
        number, too large for one, or is not there.

        Raises:
            VideoError: the file cannot be read, or its times do not ascend.
        """
        times, rows, _ = self.labelled(first, last, columns, None)
        return times, rows

    def labelled(
        self, first: int, last: int, columns: Sequence[str], label: str | None
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """As :meth:`between`, and the text of one column [N] ("" where there is no such column)."""
        at = [self.header.index(column) if column in self.header else None for column in columns]
        when = self.header.index(self.time)
        named = self.header.index(label) if label in self.header else None

        def key(line: bytes) -> int:
            return int(line.split(b",", when + 1)[when])

        times, rows, labels = [], [], []
        for time, line in lines_between(self.path, key, first, last, header=True):
            cells = line.rstrip(b"\r\n").split(b",")
            times.append(time)
            rows.append([_number(cells[i]) if i is not None and i < len(cells) else np.nan for i in at])
            inside = named is not None and named < len(cells)
            labels.append(cells[named or 0].decode("utf-8", "replace") if inside else "")
        return np.array(times, np.int64), np.array(rows, np.float64).reshape(len(times), len(columns)), labels


def timed_csv(path: Path, time: str, needed: Sequence[str]) -> TimedCSV:
    """Opens a :class:`TimedCSV` by its header and its first row.

    Raises:
        VideoError: empty, not text, or without ``time``, one of ``needed``, or any row.
    """
    try:
        with path.open("rb") as file:
            line, row = file.readline(MAX_LINE), file.readline(MAX_LINE)
    except OSError as error:
        raise unreadable(path, error) from None
    if not line.strip():
        raise broken(path, "empty", "fetch it again")
    try:
        header = tuple(name.strip() for name in line.decode("utf-8-sig").split(","))
    except UnicodeDecodeError as error:
        raise unreadable(path, error) from None
    if lacking := [name for name in (time, *needed) if name not in header]:
        has = ", ".join(storable(name) for name in header[:8])[:200]
        raise broken(path, f"no column {lacking[0]!r} (there are: {has} …)", "give the right file")
    if not row.strip():
        raise broken(path, "no rows", "fetch it again")
    return TimedCSV(path, header, time)


def jsonl_between(path: Path, time: str, first: int, last: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The objects of a JSON-lines file in order of time whose ``time`` is from ``first`` to ``last``.

    Lines that are no JSON object with a whole ``time`` are left out.

    Raises:
        VideoError: the file cannot be read, or its times do not ascend.
    """
    head = re.compile(rb'^\s*\{\s*"' + re.escape(time).encode() + rb'"\s*:\s*(\d{1,19})\s*[,}]')

    def key(line: bytes) -> int:
        if found := head.match(line):  # as these files are written; the rest is parsed when it is wanted
            return int(found[1])
        value = json.loads(line)[time]
        if not isinstance(value, int):
            raise ValueError
        return value

    for when, line in lines_between(path, key, first, last, header=False):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield when, value


def _number(cell: bytes) -> float:
    try:
        value = float(cell)
    except ValueError:
        return np.nan
    return value if np.isfinite(value) else np.nan


def numbers(value: Any, n: int) -> np.ndarray:
    """``n`` numbers of a JSON list as float64 [n]; all NaN where it is not exactly that."""
    if isinstance(value, list) and len(value) == n:
        try:
            found = np.array(value, np.float64)
        except (ValueError, TypeError, OverflowError):
            found = np.full(0, np.nan)
        if found.shape == (n,) and not any(isinstance(x, str) for x in value):
            return found
    return np.full(n, np.nan)


def small_json(path: Path, limit: int = 16 << 20) -> Any:
    """The value of a JSON file of at most ``limit`` bytes.

    Raises:
        VideoError: it cannot be read, is larger, or is not JSON.
    """
    try:
        if path.stat().st_size > limit:
            raise broken(path, f"larger than {limit >> 20} MiB", "give the right file")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise broken(path, f"not JSON: {error}") from None
