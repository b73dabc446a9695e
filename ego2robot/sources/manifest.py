"""A list of videos in a CSV, Parquet or JSON-lines file, here or at an address.

Columns: ``uri`` (of a video; relative ones lie beside the manifest), ``start`` and ``end`` of a span of it
(seconds, or ``[[hours:]minutes:]seconds``; a lacking start is the video's, a lacking end too), ``task``, and
anything else, which becomes fields of the clip. Several rows of one uri are one video with several spans. A
row without start and end says nothing of spans: its fields are the video's.

The rows are held as columns, not as objects: a million take some hundred MB.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ego2robot import config
from ego2robot.blobs import UNKNOWN, open_blob
from ego2robot.errors import UserError, VideoError
from ego2robot.remote import RemoteError, is_remote, shown
from ego2robot.remote.address import joined, local_path
from ego2robot.sources.base import DEFAULTS, Candidate, Source, storable
from ego2robot.sources.remote import Listed
from ego2robot.types import Blob, Span

BATCH = 8192  # rows
MAX_LINE = 1 << 20  # characters
SCHEMA = pa.schema(
    [("uri", pa.string()), ("start", pa.float64()), ("end", pa.float64()), ("meta", pa.string())]
)


class Manifest(Source):
    def candidates(
        self, path: str, skip: Path | None, options: config.Source = DEFAULTS
    ) -> Iterator[Candidate | VideoError]:
        if not path:
            raise UserError("source.path is not set; add source.path=videos.csv")
        path = path if is_remote(path) else str(Path(local_path(path)).expanduser().absolute())
        bad: list[str] = []
        try:
            table = _read(path, bad)
        except RemoteError as error:
            raise UserError(f"source.path={shown(path)}: {error.cause}; {error.hint}") from None
        except OSError as error:
            raise UserError(f"source.path={path}: {error.strerror or error}; check the path") from None
        if bad:
            count = f"{len(bad)} rows" if len(bad) > 1 else "a row"
            cause = f"{count} of {len(bad) + len(table)} cannot be used, the first: {bad[0]}"
            yield VideoError(shown(path), cause, "mend the manifest", "metadata")
        if not len(table):
            raise UserError(f"source.path={shown(path)}: {'no usable row' if bad else 'no row'} in it")
        yield from _candidates(table, Path(path).parent if not is_remote(path) else None)


def _candidates(table: pa.Table, folder: Path | None) -> Iterator[Candidate | VideoError]:
    """One candidate a uri, in the order in which they first appear."""
    codes = table["uri"].combine_chunks().dictionary_encode()
    order = pc.sort_indices(pa.table({"code": codes.indices}), [("code", "ascending")])  # stable
    ordered = table.take(order)
    uris = codes.dictionary.to_pylist()
    bounds = pc.run_end_encode(codes.indices.take(order)).run_ends.to_pylist()
    begin = 0
    for uri, end in zip(uris, bounds, strict=True):
        rows = ordered.slice(begin, end - begin).to_pylist()
        begin = end
        metas = [json.loads(row["meta"]) for row in rows]
        spanned = [not (math.isnan(row["start"]) and math.isnan(row["end"])) for row in rows]
        about: dict[str, str] = {}
        for meta, has_span in zip(metas, spanned, strict=True):
            about |= {} if has_span else meta
        spans = tuple(
            Span(_or(row["start"], 0.0), _or(row["end"], math.inf), meta)
            for row, meta, has_span in zip(rows, metas, spanned, strict=True)
            if has_span
        )
        listed = Listed(uri, storable(_name(uri, folder)))
        try:
            blob = Blob(uri, 0, UNKNOWN) if is_remote(uri) else listed.blob()
            yield Candidate(listed.name, blob, about, None, spans)
        except VideoError as error:
            yield error


def _name(uri: str, folder: Path | None) -> str:
    if is_remote(uri):
        return shown(uri)
    path = Path(uri)
    return path.relative_to(folder).as_posix() if folder and path.is_relative_to(folder) else uri


def _or(value: float, default: float) -> float:
    return default if math.isnan(value) else value


def _read(path: str, bad: list[str]) -> pa.Table:
    """The usable rows as columns; what is wrong with the others is added to ``bad``.

    Raises:
        OSError: it cannot be read.
        UserError: it has no column ``uri``, or is not of its kind.
    """
    suffix = Path(path.partition("?")[0]).suffix.lower()
    readers = {".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".pq": _parquet}
    readers |= {".jsonl": _json_lines, ".ndjson": _json_lines}
    if suffix not in readers:
        raise UserError(f"source.path={shown(path)}: a manifest ends in .csv, .tsv, .parquet or .jsonl")
    tables = []
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    with open_blob(Blob(path, 0, UNKNOWN)) as file:
        for where, row in readers[suffix](file, path):
            problem = row if isinstance(row, str) else _usable(row, path, columns)
            if problem:
                bad.append(f"{where}: {problem}")
            if len(columns["uri"]) >= BATCH:
                tables.append(pa.table(columns, SCHEMA))
                columns = {name: [] for name in SCHEMA.names}
    return pa.concat_tables([*tables, pa.table(columns, SCHEMA)])


def _usable(row: Mapping[str, Any], manifest: str, columns: dict[str, list[Any]]) -> str | None:
    """Adds a row to ``columns``, or says what is wrong with it."""
    uri = str(row.get("uri") or "").strip()
    if not uri:
        return "no uri"
    try:
        address = _absolute(uri, manifest)
        start, end = (_seconds(row.get(name), name) for name in ("start", "end"))
    except ValueError as error:
        return str(error)
    if not math.isnan(start) and not math.isnan(end) and end <= start:
        return f"end {end:g} is not after start {start:g}"
    meta = {
        storable(str(key)): storable(text)
        for key, value in row.items()
        if key not in ("uri", "start", "end") and value is not None and (text := _text(value)) != ""
    }
    values = (address, start, end, json.dumps(meta, ensure_ascii=False))
    for name, value in zip(SCHEMA.names, values, strict=True):
        columns[name].append(value)
    return None


def _absolute(uri: str, manifest: str) -> str:
    """Where a row's video is. Raises ValueError for an address that this manifest may not give."""
    if storable(uri) != uri or "\0" in uri:
        raise ValueError(f"uri {storable(uri)!r} is no text")
    if is_remote(uri):
        return uri
    if not is_remote(manifest):
        return str((Path(manifest).parent / Path(local_path(uri)).expanduser()).absolute())
    if local_path(uri) != uri or uri.startswith(("/", "~")):  # who wrote it does not know our disks
        raise ValueError(f"uri {uri!r} is a path of this machine, the manifest lies elsewhere")
    address = joined(manifest, uri)
    if address is None:
        raise ValueError(f"uri {uri!r} lies outside the manifest's store")
    return address


def _seconds(value: Any, name: str) -> float:
    """Seconds of ``12.5`` or ``01:02:03.5``, NaN of nothing. Raises ValueError."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return math.nan
    if isinstance(value, float) and math.isnan(value):  # an empty cell, as pandas writes it
        return math.nan
    try:
        if isinstance(value, bool):
            raise ValueError
        parts = [float(part) for part in (value.split(":") if isinstance(value, str) else [value])]
        seconds = sum(part * 60.0**i for i, part in enumerate(reversed(parts)))
        if len(parts) > 3 or not math.isfinite(seconds) or any(part < 0 for part in parts[1:]):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{name} {str(value)[:40]!r} is no time in seconds") from None
    return seconds


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isnan(value):
        return ""
    return json.dumps(value, default=str)


Rows = Iterator[tuple[str, Mapping[str, Any] | str]]  # where it is, and the row or what is wrong with it


def _csv(file: Any, path: str) -> Rows:
    dialect = "excel-tab" if ".tsv" in path.lower() else "excel"
    reader = csv.reader(_bounded(file, path), dialect)
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise UserError(f"source.path={shown(path)}: not CSV ({error})") from None
    _check_columns(header, path)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield f"line {reader.line_num}", f"not CSV ({error})"
            continue
        if row is None:
            return
        where = f"line {reader.line_num}"
        if row and len(row) != len(header):
            yield where, f"{len(row)} columns, the header has {len(header)}"
        elif row:
            yield where, dict(zip(header, row, strict=True))


def _json_lines(file: Any, path: str) -> Rows:
    for number, line in enumerate(_bounded(file, path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"line {number}", f"not JSON ({error})"
            continue
        mapping = isinstance(row, dict)
        yield f"line {number}", row if mapping else f"a mapping was expected, this is a {type(row).__name__}"


def _bounded(file: Any, path: str) -> Iterator[str]:
    """Lines. Raises UserError for one that is no line any more: some other file under this name."""
    with io.TextIOWrapper(io.BufferedReader(file), "utf-8-sig", "backslashreplace", newline="") as text:
        while line := text.readline(MAX_LINE):
            if len(line) == MAX_LINE:
                raise UserError(f"source.path={shown(path)}: a line of more than {MAX_LINE:,} characters")
            yield line


def _parquet(file: Any, path: str) -> Rows:
    try:
        stored = pq.ParquetFile(file)
        _check_columns(stored.schema_arrow.names, path)
        number = 0
        for batch in stored.iter_batches(BATCH):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(
            f"source.path={shown(path)}: not sound Parquet ({str(error).splitlines()[0]})"
        ) from None


def _check_columns(names: Iterable[str], path: str) -> None:
    names = list(names)
    if "uri" not in names:
        have = ", ".join(names[:8]) or "none"
        raise UserError(f"source.path={shown(path)}: no column uri (columns: {have})")
    if len(set(names)) != len(names):
        raise UserError(f"source.path={shown(path)}: two columns have the same name")
