"""Trajectories for reward models as a dataset that ``datasets.load_dataset`` opens.

A folder holds any number of parts, each a configuration of its own: ``<name>/train-00000.parquet`` …, listed
in ``README.md``. So several parts of a dataset go into one repository under different names. Columns are the
RFM project's, with the frames as the bytes of an mp4. RFM's ``lang_vector`` is not made (it is an embedding
of ``task`` by a model of the reader's choice).

A shard counts once it is there under its name. Who goes on skips what the shards hold, and tries again what
failed.
"""

from __future__ import annotations

import fcntl
import json
import math
import re
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ego2robot import __version__
from ego2robot.errors import UserError, VideoError
from ego2robot.export import privacy
from ego2robot.export.privacy import Stripper
from ego2robot.export.trajectories_config import Settings
from ego2robot.export.trajectories_folder import (
    NAME,
    RESERVED,
    STATE,
    check_folder,
    mark,
    read_state,
    stripper,
    write_card,
)
from ego2robot.export.video import Codec, encode_episode
from ego2robot.jobs.pool import Pool
from ego2robot.progress import Progress, Show, Tell, paced
from ego2robot.store import atomic
from ego2robot.trajectories import Episode, TaskTrajectory, episodes, read

FORMAT = 1  # of a part; another one is not gone on with
SHARD_BYTES = 64 << 20  # of rows that wait for their shard
GROUP_ROWS = 64
AHEAD = 32  # rows that may be done before one that comes first
TIMEOUT_S = 600.0
# As near to the frames as x264's defaults, at two thirds of their cost (benchmarks/trajectories.py).
CODEC = Codec("h264", "libx264", {"crf": "22.5", "preset": "faster"})
GOP = 250
SHARD = re.compile(r"train-(\d{5,})\.parquet")
NAMED = re.compile(r"(.*?)( \[[\d.]+–[\d.]+ s\])?", re.DOTALL)  # a video, and the span: ``Episode.name``

FLOATS = pa.list_(pa.field("item", pa.float32()))
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("frames", pa.binary()),
        ("actions", pa.list_(pa.field("item", FLOATS))),
        ("fps", pa.float32()),
        ("source", pa.string()),
        ("data_source", pa.string()),
        ("task_name", pa.string()),
        ("is_robot", pa.bool_()),
        ("quality_label", pa.string()),
        ("preference_group_id", pa.string()),
        ("preference_rank", pa.int32()),
        ("partial_success", pa.float32()),
        ("video", pa.string()),
        ("source_fps", pa.float32()),
        ("timestamps", pa.list_(pa.field("item", pa.float64()))),
    ]
)


@dataclass
class Exported:
    """What is in a part after an export.

    Attributes:
        trajectories, frames, shards, bytes: of the part, those of earlier starts too.
        covered: in how many of the frames faces were covered; None: none were looked for.
        failed: name and reason of what could not be used.
        warnings: what a user should know of the rest.
    """

    path: Path
    trajectories: int = 0
    frames: int = 0
    shards: int = 0
    bytes: int = 0
    covered: int | None = None
    failed: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def export_trajectories(settings: Settings, show: Show | None = None, tell: Tell | None = None) -> Exported:
    """Writes a dataset's trajectories as one part of a folder; the same call again goes on.

    With ``output.strip_metadata`` the part says neither how recordings are called nor how their folders are;
    ``tell`` and the result still do.

    Args:
        show: told how far it is. ``tell``: a line for each file that fails, as it does.

    Raises:
        UserError: the source is not there, the folder is something else's, in use, or holds the part made
            by other settings; or there is not one trajectory.
    """
    out = Path(settings.output.output_dir).expanduser()
    check_folder(out)
    try:
        strip = stripper(out) if settings.output.strip_metadata else None
        settings = _without_folder(settings, strip)
        name = settings.part_name
        if not NAME.fullmatch(name) or name in RESERVED:
            letters = "small letters, digits, dots, dashes and underscores"
            raise UserError(f"dataset.dataset_name={name!r}: a name of {letters}")
        if settings.output.blur_faces:
            privacy.require_networks()
        (out / name).mkdir(parents=True, exist_ok=True)
        with _alone(out / name):
            part = _Part(out / name, settings, strip)
            part.fill(show or (lambda _: None), tell or (lambda _: None))
        exported = part.exported()
        if not exported.trajectories:
            first = f", such as {exported.failed[0][1]}" if exported.failed else ""
            raise UserError(
                f"{settings.dataset.dataset_path}: no trajectory could be made; "
                f"{len(exported.failed)} failed{first}"
            )
        with _alone(out):
            write_card(out)
    except OSError as error:
        cause = error.strerror or str(error)
        raise UserError(
            f"{out}: cannot be written ({cause}); make room or choose another folder, then go on"
        ) from None
    return exported


def _without_folder(settings: Settings, strip: Stripper | None) -> Settings:
    """Where a part would be called after the folder of its source, the folder's pseudonym takes its place."""
    if strip is None or settings.dataset.dataset_name:
        return settings
    return settings.called(strip.pseudonym(settings.dataset.kind, settings.part_name))


# -- one part -------------------------------------------------------------------------------------


class _Part:
    """A part that is being filled: rows wait in the order of the source until a shard is full."""

    def __init__(self, folder: Path, settings: Settings, strip: Stripper | None) -> None:
        self.folder, self.settings, self.strip = folder, settings, strip
        self.shards = _shards(folder)
        self.rows = self.frames = 0
        self.actions: Counter[int] = Counter()  # trajectories by number of actions
        self.without_task = 0
        self.with_gaps = 0  # NaN in their actions
        self.done: set[str] = set()
        self.ids: set[str] = set()
        state = read_state(folder) or {}
        self.earlier: dict[str, str] = state.get("failed", {})  # what failed at earlier starts, as written
        self.failed: dict[str, VideoError] = {}  # at this one
        self.covered: int | None = state.get("covered", 0) if settings.output.blur_faces else None
        self._waiting: list[dict[str, Any]] = []
        self._bytes = 0
        self._freeze()
        for leftover in folder.glob(f"{atomic.TEMPORARY_PREFIX}*"):
            leftover.unlink(missing_ok=True)
        for shard in self.shards:
            columns = ["id", "video", "actions", "task", "timestamps"]
            for batch in pq.ParquetFile(shard).iter_batches(GROUP_ROWS, columns=columns):
                for row in batch.to_pylist():
                    self._count(row)

    def fill(self, show: Show, tell: Tell) -> None:
        """Adds what is not there yet, up to the most that is wanted."""
        most = self.settings.output.max_trajectories
        if most is not None and self.rows >= most:
            return
        before, self.earlier = self.earlier, {}  # tried again
        told = _paced(show, most or 0, self.rows)
        with closing(self._results()) as results:
            for found in results:
                if not isinstance(found, VideoError) and found["id"] in self.ids:
                    cause = "has the same bytes as another one"
                    found = VideoError(found["name"], cause, "remove one of them", "duplicate")  # noqa: PLW2901
                if isinstance(found, VideoError):
                    self.failed[found.name] = found
                    tell(f"left out: {found}")
                    continue
                self._add(found)
                told(self.rows)
                if most is not None and self.rows >= most:
                    # Not everything was looked at again.
                    self.earlier = {n: e for n, e in before.items() if n not in self.done}
                    break
        self._flush()
        self._write_state(complete=True)

    def exported(self) -> Exported:
        shards = _shards(self.folder)
        return Exported(
            self.folder,
            self.rows,
            self.frames,
            len(shards),
            sum(shard.stat().st_size for shard in shards),
            self.covered,
            sorted((self.earlier | {name: str(error) for name, error in self.failed.items()}).items()),
            self._warnings(),
        )

    def _warnings(self) -> list[str]:
        found = []
        without = self.actions.get(0, 0)
        if without:
            kind = self.settings.dataset.kind
            found.append(f"{without} trajectories have no actions: the source {kind} gives none for them")
        if self.with_gaps:
            found.append(
                f"{self.with_gaps} trajectories have unknown (NaN) actions: joints or poses that the source "
                "lacks, or more frames than poses"
            )
        if self.without_task:
            found.append(f"{self.without_task} trajectories have no task text")
        return found

    def _results(self) -> Generator[dict[str, Any] | VideoError, None, None]:
        """A row or an error for each episode that is not there yet, in the source's order."""
        choice, path = self.settings.choice, self.settings.dataset.dataset_path
        order: deque[str] = deque()  # names, as the source lists them
        seen = set(self.done)
        ready: dict[str, dict[str, Any] | VideoError] = {}

        def tasks() -> Iterator[Episode | None]:
            for found in episodes(path, choice):
                name = found.name
                if (told := told_name(name, self.strip)) in seen:
                    continue
                seen.add(told)
                if isinstance(found, VideoError):
                    ready[name] = found
                order.append(name)
                if isinstance(found, VideoError):
                    continue
                yield found
                while len(ready) > AHEAD:
                    yield None

        pool = Pool(_reading, (self.settings, self.strip), self.settings.workers, TIMEOUT_S, idle_s=0.5)
        with closing(pool.run(tasks())) as events:
            for event in events:
                if event.kind in ("item", "error"):
                    ready[event.task.name] = event.value
                elif event.kind in ("crashed", "timeout") and not event.again:
                    kind = "crash" if event.kind == "crashed" else "timeout"
                    hint = "check the file; it may be damaged"
                    ready[event.task.name] = VideoError(event.task.name, event.value, hint, kind)
                while order and order[0] in ready:
                    yield ready.pop(order.popleft())
        while order:
            yield ready.pop(order.popleft())

    def _add(self, row: dict[str, Any]) -> None:
        self._count(row)
        self._waiting.append(row)
        self._bytes += len(row["frames"]) + 8 * sum(map(len, row["actions"]))
        if self._bytes >= SHARD_BYTES:
            self._flush()

    def _count(self, row: dict[str, Any]) -> None:
        self.rows += 1
        self.frames += len(row["timestamps"])
        self.done.add(row["video"])
        self.ids.add(row["id"])
        self.actions[len(row["actions"])] += 1
        self.without_task += not row["task"]
        self.with_gaps += any(math.isnan(value) for step in row["actions"] for value in step)

    def _flush(self) -> None:
        if not self._waiting:
            return
        path = self.folder / _shard_name(len(self.shards))
        table = pa.Table.from_pylist(self._waiting, _schema())  # without what SCHEMA does not have

        def fill(file: Any) -> None:
            pq.write_table(
                table,
                file,
                row_group_size=GROUP_ROWS,
                compression={c: "none" if c == "frames" else "zstd" for c in SCHEMA.names},
                use_dictionary=["task", "source", "data_source", "task_name", "quality_label"],
                write_page_checksum=True,
            )

        atomic.write(path, fill)
        self.shards.append(path)
        if self.covered is not None:
            self.covered += sum(row["covered"] for row in self._waiting)
        self._waiting, self._bytes = [], 0
        self._write_state(complete=False)

    def _freeze(self) -> None:
        state = read_state(self.folder)
        if state is None:
            if self.shards:
                raise UserError(f"{self.folder}: has shards but no {STATE}; choose another folder")
            self._write_state(complete=False)
            return
        old, new = state.get("settings", {}), self.settings.frozen()
        differ = [f"{key}: {old.get(key)} → {value}" for key, value in new.items() if old.get(key) != value]
        if state.get("format") != FORMAT:
            differ.append(f"format: {state.get('format')} → {FORMAT}")
        if differ:
            raise UserError(
                f"{self.folder}: made with other settings ({'; '.join(differ)}); use those, another "
                "dataset.dataset_name, or another folder"
            )

    def _write_state(self, complete: bool) -> None:
        waiting = len(self._waiting)
        state = {
            "format": FORMAT,
            "ego2robot": __version__,
            "settings": self.settings.frozen(),
            "complete": complete,
            "trajectories": self.rows - waiting,
            "frames": self.frames - sum(len(row["timestamps"]) for row in self._waiting),
            "without_actions": self.actions.get(0, 0),
            "with_unknown_actions": self.with_gaps,
            **({} if self.covered is None else {"covered": self.covered}),
            **({} if self.strip is None else {"pseudonyms": mark(self.strip)}),
            "failed": self.earlier | dict(self._written(error) for error in self.failed.values()),
        }
        atomic.write_json(self.folder / STATE, state)

    def _written(self, error: VideoError) -> tuple[str, str]:
        """A failure as the part says it; a message may tell of other files, so only its kind is kept."""
        name = told_name(error.name, self.strip)
        return (name, str(error)) if self.strip is None else (name, error.kind)


def told_name(name: str, strip: Stripper | None) -> str:
    """An episode's name as the part says it: of a span, the video's is what becomes a pseudonym."""
    if strip is None:
        return name
    match = NAMED.fullmatch(name)
    assert match is not None
    return strip.video(match[1]) + (match[2] or "")


def _reading(settings: Settings, strip: Stripper | None) -> Callable[[Episode], Iterator[dict[str, Any]]]:
    """The work of a child: an episode to a row."""
    choice, path = settings.choice, settings.dataset.dataset_path

    def work(episode: Episode) -> Iterator[dict[str, Any]]:
        yield row_of(read(episode, path, choice), settings, strip)

    return work


def row_of(t: TaskTrajectory, settings: Settings, strip: Stripper | None = None) -> dict[str, Any]:
    """A trajectory as a row of :data:`SCHEMA`; and its own name, and in how many of its frames faces were
    covered."""
    rate, task_name = settings.output.fps, t.task_name
    if strip and task_name != t.task:  # a folder's name, or a field of the source
        task_name = strip.pseudonym("task", task_name)
    return {
        "id": strip.clip(t.id) if strip else t.id,
        "task": t.task,
        "frames": encode_episode(t.frames, rate, CODEC, GOP),
        "actions": t.actions.tolist() if t.actions.shape[1] else [],
        "fps": float(rate),
        "source": t.source,
        "data_source": settings.part_name,
        "task_name": task_name,
        "is_robot": t.is_robot,
        "quality_label": t.quality_label,
        "preference_group_id": t.preference_group_id,
        "preference_rank": t.preference_rank,
        "partial_success": None,
        "video": told_name(t.name, strip),
        "source_fps": t.fps,
        "timestamps": t.times_s.tolist(),
        "name": t.name,
        "covered": t.covered,
    }


def _schema() -> pa.Schema:
    """:data:`SCHEMA` with the features as ``datasets`` keeps them."""

    def value(kind: pa.DataType) -> dict[str, Any]:
        if pa.types.is_list(kind):
            return {"feature": value(kind.value_type), "_type": "Sequence"}
        named = {pa.float64(): "float64", pa.float32(): "float32"}
        return {"dtype": named.get(kind, str(kind)), "_type": "Value"}

    features = {item.name: value(item.type) for item in SCHEMA}
    return SCHEMA.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _paced(show: Show, total: int, before: int) -> Callable[[int], None]:
    """Shows how many there are; with a total, the rate of this start and what is left."""
    if total:
        tell = paced("exporting", lambda p: show(replace(p, unit="trajectories")))
        tell(before, total)
        return lambda done: tell(done, total)
    return lambda done: show(Progress("exporting trajectories", done))


def _shards(folder: Path) -> list[Path]:
    """The shards of a part in order. Raises UserError where one is missing."""
    found = sorted(path for path in folder.glob("train-*.parquet") if SHARD.fullmatch(path.name))
    for k, path in enumerate(found):
        if path.name != _shard_name(k):
            raise UserError(f"{folder}: {_shard_name(k)} is missing; remove the folder and export it again")
    return found


def _shard_name(k: int) -> str:
    return f"train-{k:05}.parquet"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds a folder for this process; the system lets go of it however the process ends."""
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is exporting there; wait for it") from None
        yield
