"""A run directory to one page. Reads, computes, and leaves all markup to the template and ``charts``."""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ego2robot import config, remote
from ego2robot.jobs.status import stalls
from ego2robot.report import Funnel, Progress, batches, charts, committed, funnel, thumbnails
from ego2robot.store.rundir import RunDir
from ego2robot.types import FrameSpec

# What the page shows at most: it stays below some megabytes however large the run is.
N_KEPT, N_DROPPED, N_FAILED = 24, 16, 24
N_SKILL_PICTURES, N_EXAMPLES = 120, 5
N_SKILLS, N_TAGS, N_LABELS, N_POINTS, N_QUARANTINE, N_MOMENTS = 200, 24, 40, 4000, 200, 240
FINE = 1 << 13  # bins that scores are counted in, before they are made coarser for display
CAMERA_MOST = 4.0  # picture widths per second; faster cameras are counted as this fast
PROJECTIONS = {"tsne": "t-SNE", "umap": "UMAP"}


def render(run: RunDir, progress: Progress | None = None) -> str:
    """The page as text; see :func:`ego2robot.report.write_report`."""
    counts = funnel(run)
    survey = scan(run)
    gate = thresholds(run)
    skills = Skills.read(run)
    # Where nothing was clustered there are skills, but of no clip.
    kept = (skills.spread(N_KEPT) if skills else []) or survey.kept.keys
    dropped = round_robin([group.keys for _, group in sorted(survey.dropped.items())], N_DROPPED)
    wanted = list(dict.fromkeys([*kept, *dropped, *(skills.examples() if skills else [])]))
    failed = list(survey.failed.keys)
    rows, hands = clip_rows(run, [*wanted, *failed], hands_of=set(wanted))
    wanted = [key for key in wanted if key in rows]
    cfg = run.config
    remote.configure(cfg.source.cache_gib)  # videos may lie afar
    shots = [thumbnails.shot(rows[key], hands.get(key), cfg.clips.sample_fps) for key in wanted]
    sources = thumbnails.videos(run, sorted({one.video_id for one in shots}))
    frames = FrameSpec(cfg.frames.height, cfg.frames.width, cfg.frames.fit)
    pictures = thumbnails.take(shots, sources, frames, progress)
    if skills:
        skills.locate(wanted)

    random = random_embeddings(run)
    ids = {key: f"t{i}" for i, key in enumerate(wanted)}
    cards = {key: card(rows[key], ids[key], pictures[key], skills) for key in wanted}
    videos = source_totals(run)
    work = Work.read(run.metrics())
    refused = quarantine(run)
    episodes = dataset(run)
    environment = Environment(
        loader=PackageLoader("ego2robot.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"n": thousands, "pct": percent, "clock": clock, "hash": csp_hash}
    return environment.get_template("template.html.j2").render(
        name=run.path.resolve().name,
        cfg=cfg,
        funnel=counts,
        funnel_rows=funnel_rows(counts),
        videos=videos,
        kept_s=survey.kept_s,
        work=work,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        notices=notices(run, counts, skills, pictures, refused, gate, random),
        # Random weights are called random wherever their output is shown.
        random_labels=" (random)" if "clip" in random else "",
        random_skills=" (random)" if skills and skills.about.get("random") else "",
        motion=score_chart(
            survey.motion,
            gate["min_motion"],
            1.0,
            "motion, share of full scale",
            "Motion of the judged clips",
        ),
        residual=score_chart(
            survey.residual,
            gate["min_residual_motion"],
            1.0,
            "residual motion, share of full scale",
            "Motion of the judged clips without the camera's",
        ),
        camera=score_chart(
            survey.camera,
            gate["max_camera_motion"],
            CAMERA_MOST,
            "camera motion, picture widths per second",
            "Motion of the camera in the judged clips",
            upper=True,
        ),
        visibility=visibility_chart(survey, gate, cfg),
        gate=gate,
        survey=survey,
        pictures=[picture(ids[key], pictures[key]) for key in wanted],
        kept=[cards[key] for key in kept if key in cards],
        dropped=[cards[key] for key in dropped if key in cards],
        failed=[card(rows[key], None, None, None) for key in failed if key in rows],
        skills=skills,
        skill_rows=skills.table(cards) if skills else [],
        projections=projection_charts(skills, cards) if skills else [],
        hierarchy=hierarchy(run),
        charts=work_charts(work),
        refused=refused,
        episodes=episodes,
        configuration=sorted(config.flatten(config.to_dict(cfg)).items()),
        fingerprint=sorted(config.flatten(run.read_json("fingerprint.json") or {}).items()),
        colour=charts.colour,
        n_points=N_POINTS,
        n_skills=N_SKILLS,
    )


# -- text ------------------------------------------------------------------------------------------


def thousands(value: float, digits: int = 0) -> str:
    """``12345.6`` to ``12,346``; nothing known is a dash."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def percent(part: float | None, whole: float = 1.0, digits: int = 0) -> str:
    if part is None or not whole or not math.isfinite(part):
        return "–"
    return f"{100 * part / whole:.{digits}f} %"


def clock(seconds: float | None) -> str:
    """A duration or a time in a video: ``7.5 s``, ``2:05``, ``1:02:05``."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def csp_hash(script: str) -> str:
    """The source expression that allows exactly this script (CSP level 2)."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() + "'"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


# -- reading ---------------------------------------------------------------------------------------


class Smallest:
    """The ``limit`` smallest ids of a stream. Clip ids are hashes, so this is a fair sample of the
    clips, and the same one however often and in whatever order they come."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.keys: list[str] = []

    def add(self, keys: Iterable[str]) -> None:
        if len(self.keys) == self.limit:
            worst = self.keys[-1]
            keys = [key for key in keys if key < worst]
        self.keys = sorted({*self.keys, *keys})[: self.limit]


@dataclass
class Survey:
    """What one pass over ``clips`` finds.

    Attributes:
        motion, residual, camera, visibility: int64 [FINE + 1] per outcome: clips by score, in steps of
            1 / FINE; the camera's motion in shares of CAMERA_MOST.
        unseen: judged clips in which nobody looked for hands.
        kept_s: seconds of kept clips.
    """

    motion: dict[str, np.ndarray] = field(default_factory=dict)
    residual: dict[str, np.ndarray] = field(default_factory=dict)
    camera: dict[str, np.ndarray] = field(default_factory=dict)
    visibility: dict[str, np.ndarray] = field(default_factory=dict)
    unseen: int = 0
    kept_s: float = 0.0
    kept: Smallest = field(default_factory=lambda: Smallest(N_KEPT))
    dropped: dict[str, Smallest] = field(default_factory=dict)
    failed: Smallest = field(default_factory=lambda: Smallest(N_FAILED))


OUTCOMES = {
    "kept": "kept",
    "motion": "dropped: motion",
    "hands": "dropped: hands",
    "camera": "dropped: camera",
    "other": "dropped: other",
}


def outcome(decision: str, reason: str | None) -> str:
    """``kept``, ``failed``, or which gate dropped a clip: ``motion``, ``hands``, ``camera`` or ``other``."""
    if decision != "dropped":
        return decision
    gate = {"motion": "motion", "hand": "hands", "residual": "camera", "camera": "camera"}
    return gate.get((reason or "").partition(" ")[0], "other")


def scan(run: RunDir) -> Survey:
    """One pass over all clips, in memory that does not depend on their number."""
    found = Survey()
    columns = ["clip_id", "start_s", "end_s", "motion", "residual_motion", "camera_motion"]
    columns += ["hand_visibility", "decision", "reason"]
    for _, batch in committed(run, "clips", columns):
        for decision, reason, chosen in _by_reason(batch):
            keys = chosen["clip_id"].to_pylist()
            if decision == "failed":
                found.failed.add(keys)
                continue
            if decision == "kept":
                found.kept.add(keys)
                found.kept_s += float(pc.sum(pc.subtract(chosen["end_s"], chosen["start_s"])).as_py() or 0)
            elif reason in found.dropped or len(found.dropped) < 4 * N_DROPPED:
                found.dropped.setdefault(reason, Smallest(N_DROPPED)).add(keys)
            kind = outcome(decision, reason)
            _count(found.motion, kind, chosen["motion"])
            _count(found.residual, kind, chosen["residual_motion"])
            _count(found.camera, kind, pc.divide(chosen["camera_motion"], CAMERA_MOST))
            _count(found.visibility, kind, chosen["hand_visibility"])
            found.unseen += chosen["hand_visibility"].null_count
    return found


def _by_reason(batch: pa.RecordBatch) -> Iterator[tuple[str, str, pa.RecordBatch]]:
    """Decision, reason and rows of each group of a batch; the many reasons of failed clips are one."""
    for decision in ("kept", "failed"):
        yield decision, "", batch.filter(pc.equal(batch["decision"], decision))
    dropped = batch.filter(pc.equal(batch["decision"], "dropped"))
    reasons = pc.fill_null(dropped["reason"], "")
    for reason in reasons.unique().to_pylist():
        yield "dropped", reason, dropped.filter(pc.equal(reasons, reason))


def _count(histograms: dict[str, np.ndarray], kind: str, scores: pa.Array) -> None:
    values = scores.drop_null().to_numpy().astype(np.float64)
    values = np.clip(values[np.isfinite(values)], 0, 1)
    if len(values):
        # Scores are float32: the small addition keeps 1/2 and the like in the bin that they open.
        counts = np.bincount(np.floor(values * FINE + 1e-3).astype(np.int64), minlength=FINE + 1)
        histograms[kind] = histograms.get(kind, 0) + counts


def round_robin(groups: Sequence[Sequence[str]], limit: int) -> list[str]:
    """The first of each group, then the second of each …, ``limit`` in all; each group stays in order."""
    taken: list[list[str]] = [[] for _ in groups]
    deepest = max(map(len, groups), default=0)
    left = limit
    for depth in range(deepest):
        for group, into in zip(groups, taken, strict=True):
            if depth < len(group) and left:
                into.append(group[depth])
                left -= 1
    return [key for group in taken for key in group]


def clip_rows(
    run: RunDir, ids: Sequence[str], hands_of: set[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, pa.Table]]:
    """The rows of some clips, and the landmarks of some of these; only their parts are read whole."""
    wanted = pa.array(ids, pa.string())
    parts: dict[str, list[str]] = {}
    for part, batch in committed(run, "clips", ["clip_id"]):
        chosen = batch["clip_id"].filter(pc.is_in(batch["clip_id"], value_set=wanted)).to_pylist()
        if chosen:
            parts.setdefault(part, []).extend(chosen)
    rows: dict[str, dict[str, Any]] = {}
    hands: dict[str, pa.Table] = {}
    columns = ["clip_id", "video_id", "name", "start_s", "end_s", "n_frames", "motion", "hand_visibility"]
    columns += ["decision", "reason", "label", "label_score"]
    for part, keys in parts.items():
        chosen = ds.field("clip_id").isin(keys)
        path = run.path / "clips" / f"part-{part}.parquet"
        for row in pq.read_table(path, columns=columns, filters=chosen).to_pylist():
            rows[row["clip_id"]] = row
        path = run.path / "hands" / f"part-{part}.parquet"
        looked = [key for key in keys if key in hands_of]
        if looked and path.is_file():
            chosen = ds.field("clip_id").isin(looked)
            table = pq.read_table(
                path, columns=["clip_id", "frame", "time_s", "side", "landmarks"], filters=chosen
            )
            for key in looked:
                hands[key] = table.filter(pc.equal(table["clip_id"], key))
    return rows, hands


@dataclass(frozen=True)
class Totals:
    videos: int
    hours: float


def source_totals(run: RunDir) -> Totals:
    path = run.path / "plan" / "units.parquet"
    seconds: dict[str, float] = {}
    for batch in batches(path, ["video_id", "duration_s"]) if path.is_file() else ():
        seconds.update(zip(batch["video_id"].to_pylist(), batch["duration_s"].to_pylist(), strict=True))
    return Totals(len(seconds), sum(seconds.values()) / 3600)


OFF = "off"


@dataclass(frozen=True)
class Threshold:
    """``value`` is None where a quantile was asked for and is not resolved yet."""

    value: float | None
    asked: str


def thresholds(run: RunDir) -> dict[str, Threshold]:
    stored = run.read_json("plan/gate.json") or {}
    found = {}
    for key in ("min_motion", "min_residual_motion", "max_camera_motion", "min_hand_visibility"):
        asked = getattr(run.config.gate, key)
        if isinstance(asked, config.Quantile):
            found[key] = Threshold(stored.get(key), f"quantile {asked.quantile:g} of this run's clips")
        else:
            found[key] = Threshold(stored.get(key, asked), "absolute" if asked else OFF)
    return found


@dataclass(frozen=True)
class Refused:
    total: int
    classes: list[tuple[str, int]]
    rows: list[dict[str, Any]]


def quarantine(run: RunDir) -> Refused:
    classes: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    columns = ["unit_id", "name", "stage", "error_class", "message"]
    for _, batch in committed(run, "quarantine", columns):
        classes.update(batch["error_class"].to_pylist())
        rows += batch.slice(0, N_QUARANTINE - len(rows)).to_pylist()
    return Refused(sum(classes.values()), classes.most_common(12), rows)


def dataset(run: RunDir) -> dict[str, Any] | None:
    """What was exported: the first of the configured path and ``<run>/dataset`` that holds a dataset."""
    folders = [run.path / "dataset"]
    if run.config.export.path:
        folders.insert(0, Path(run.config.export.path))
    for folder in folders:
        # The run's own reader gives None for a missing file; an absolute path stays what it is.
        info = run.read_json(str(folder.resolve() / "meta" / "info.json"))
        if info:
            made = run.read_json(str(folder.resolve() / "meta" / "ego2robot.json")) or {}
            return {"path": str(folder), "covered": made.get("faces_covered_in_frames"), **info}
    return None


# -- skills ----------------------------------------------------------------------------------------


class Skills:
    """``skills/`` for the page: the table, and a bounded look at the assignment."""

    def __init__(self, about: Mapping[str, Any], assignment: Path) -> None:
        self.about = about
        self.rows: list[Mapping[str, Any]] = list(about.get("skills", []))
        self.names = {int(row["skill"]): str(row["name"]) for row in self.rows}
        self.skill_of: dict[str, int] = {}
        self.points: dict[str, charts.Points] = {}
        self._path = assignment if assignment.is_file() else None
        self._members: dict[int, Smallest] = {}
        self._sample = {name: Smallest(N_POINTS) for name in PROJECTIONS}
        for batch in self._batches(["clip_id", "skill", "tsne_x", "umap_x"]):
            skill = batch["skill"].to_numpy(zero_copy_only=False)
            for one in np.unique(skill):
                members = batch["clip_id"].filter(pa.array(skill == one)).to_pylist()
                self._members.setdefault(int(one), Smallest(N_KEPT)).add(members)
            for name, sample in self._sample.items():
                if f"{name}_x" in batch.schema.names:
                    there = pc.is_valid(batch[f"{name}_x"])
                    sample.add(batch["clip_id"].filter(there).to_pylist())

    @classmethod
    def read(cls, run: RunDir) -> Skills | None:
        about = run.skills()
        return cls(about, run.path / "skills" / "assignment.parquet") if about else None

    def _batches(self, columns: Sequence[str]) -> Iterable[pa.RecordBatch]:
        if self._path is None:
            return ()
        there = set(pq.read_schema(self._path).names)
        return batches(self._path, [name for name in columns if name in there])

    def spread(self, limit: int) -> list[str]:
        """Kept clips, as evenly over the skills as there are, skill by skill."""
        return round_robin([self._members[key].keys for key in sorted(self._members)], limit)

    def examples(self) -> list[str]:
        """The clips whose pictures stand for their skills: medoids first, then examples in turn."""
        medoids = [row["medoid"] for row in self.rows[:N_SKILLS] if row.get("medoid")]
        rest = round_robin([self.shown(row)[1:] for row in self.rows[:N_SKILLS]], N_SKILL_PICTURES)
        return list(dict.fromkeys([*medoids, *rest]))[:N_SKILL_PICTURES]

    @staticmethod
    def shown(row: Mapping[str, Any]) -> list[str]:
        """The medoid and the examples of a skill, each once."""
        return list(dict.fromkeys(filter(None, [row.get("medoid"), *row.get("examples", [])])))[:N_EXAMPLES]

    def locate(self, pictured: Sequence[str]) -> None:
        """Reads where the sampled and the pictured clips are in each projection, and their skills."""
        wanted = {name: {*sample.keys, *pictured} for name, sample in self._sample.items()}
        both = pa.array(sorted(set().union(*wanted.values())), pa.string())
        found: dict[str, list[tuple[float, float, int, str]]] = {name: [] for name in PROJECTIONS}
        for batch in self._batches(["clip_id", "skill", "tsne_x", "tsne_y", "umap_x", "umap_y"]):
            for row in batch.filter(pc.is_in(batch["clip_id"], value_set=both)).to_pylist():
                key, skill = row["clip_id"], int(row["skill"])
                self.skill_of[key] = skill
                for name, points in found.items():
                    x, y = row.get(f"{name}_x"), row.get(f"{name}_y")
                    finite = x is not None and y is not None and math.isfinite(x) and math.isfinite(y)
                    if finite and key in wanted[name]:
                        points.append((x, y, skill, key))
        for name, points in found.items():
            if points:
                points.sort(key=lambda point: point[3])
                self.points[name] = charts.Points(
                    np.array([(x, y) for x, y, _, _ in points], np.float64),
                    np.array([skill for _, _, skill, _ in points], np.int64),
                    np.array([key for _, _, _, key in points], object),
                )

    def name(self, skill: int) -> str:
        return self.names.get(skill, f"skill {skill}")

    def table(self, cards: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        largest = max((float(row.get("share") or 0) for row in self.rows), default=0.0) or 1.0
        return [
            {
                **{key: row.get(key) for key in ("skill", "name", "n", "share", "label", "label_share")},
                "bar": 100 * float(row.get("share") or 0) / largest,
                "cards": [cards[key] for key in self.shown(row) if key in cards],
            }
            for row in self.rows[:N_SKILLS]
        ]


@dataclass(frozen=True)
class Hierarchy:
    """Coarse label by fine cluster: clips, and the share of the label that lies in the cluster."""

    labels: list[tuple[str, int]]
    skills: list[int]
    cells: dict[tuple[str, int], tuple[int, float]]
    left_out: int


def hierarchy(run: RunDir) -> Hierarchy | None:
    path = run.path / "skills" / "table.parquet"
    if not path.is_file():
        return None
    labels: Counter[str] = Counter()
    cells: Counter[tuple[str, int]] = Counter()
    for batch in batches(path, ["label", "skill", "n"]):
        for row in batch.to_pylist():
            label = row["label"] if row["label"] is not None else "no label"
            labels[label] += row["n"]
            cells[label, row["skill"]] += row["n"]
    shown = labels.most_common(N_LABELS)
    names = {label for label, _ in shown}
    skills = sorted({skill for _, skill in cells})[:N_LABELS]
    shares = {(a, b): (n, n / labels[a]) for (a, b), n in cells.items() if a in names and b in skills and n}
    return Hierarchy(shown, skills, shares, len(labels) - len(shown)) if shown else None


# -- metrics ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What the starts of a run took together.

    Attributes:
        wall_s: seconds from start to last word, summed over starts.
        at_s, clips_per_s, rss: float64 [N], along the working time.
        stalls: "A waits for B" to the share of A's time in the latest start that measured it.
        peak_rss: the largest measured, bytes; the line of ``rss`` may pass below it.
        began, ended: Unix seconds, None when nothing was measured.
    """

    starts: int
    wall_s: float
    clips: int
    video_s: float
    stages: dict[str, float]
    stalls: dict[str, float]
    at_s: np.ndarray
    clips_per_s: np.ndarray
    rss: np.ndarray
    peak_rss: float
    began: str | None
    ended: str | None

    @property
    def rate(self) -> float | None:
        return self.clips / self.wall_s if self.wall_s else None

    @property
    def video_rate(self) -> float | None:
        """Hours of source video per hour."""
        return self.video_s / self.wall_s if self.wall_s and self.video_s else None

    @classmethod
    def read(cls, lines: Sequence[Mapping[str, Any]]) -> Work:
        """Adds up ``metrics/``; each line counts from its own start, and a run may have had several."""
        starts = split_starts([line for line in lines if _is_number(line.get("elapsed_s"))])
        stages: Counter[str] = Counter()
        at, done, rss, before_s, before_clips = [0.0], [0.0], [math.nan], 0.0, 0.0
        for start in starts:
            last = start[-1]
            for name, seconds in (last.get("stage_seconds") or {}).items():
                stages[str(name)] += float(seconds)  # type: ignore[assignment]
            for line in start:
                at.append(before_s + float(line["elapsed_s"]))
                done.append(before_clips + float(line.get("clips") or 0))
                rss.append(float(line.get("rss_bytes") or math.nan))
            before_s, before_clips = at[-1], done[-1]
        moments, rate, memory = _moments(np.array(at), np.array(done), np.array(rss))
        times = [float(line["time"]) for start in starts for line in start if _is_number(line.get("time"))]
        first = min(times) - float(starts[0][0]["elapsed_s"]) if times else None
        return cls(
            starts=len(starts),
            wall_s=before_s,
            clips=int(before_clips),
            video_s=sum(float(start[-1].get("video_s") or 0) for start in starts),
            stages=dict(stages),
            stalls=next((found for start in reversed(starts) if (found := stalls(start[-1]))), {}),
            at_s=moments,
            clips_per_s=rate,
            rss=memory,
            peak_rss=max((value for value in rss if math.isfinite(value)), default=0.0),
            began=_date(first) if first is not None else None,
            ended=_date(max(times)) if times else None,
        )


def split_starts(lines: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The lines of each start of a run: a new one begins after ``done``, after a ``stopped`` that was
    not the end, and where ``elapsed_s`` falls back (the start before was killed)."""
    starts: list[list[Mapping[str, Any]]] = []
    for line in lines:
        last = starts[-1][-1] if starts else None
        if (
            last is None
            or last.get("event") == "done"
            or (last.get("event") == "stopped" and line.get("event") != "done")
            or float(line["elapsed_s"]) < float(last["elapsed_s"])
        ):
            starts.append([])
        starts[-1].append(line)
    return starts


def _moments(at: np.ndarray, done: np.ndarray, rss: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rate and memory over at most ``N_MOMENTS`` stretches of the working time: float64 [N] each."""
    if len(at) < 2 or at[-1] <= 0:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    # A stretch of twenty clips or so: shorter ones would show how commits fall, not how fast it went.
    n = min(N_MOMENTS, len(at) - 1, max(12, int(done[-1]) // 20))
    edges = np.linspace(0, at[-1], n + 1)
    rate = np.diff(np.interp(edges, at, done)) / np.diff(edges)
    measured = np.isfinite(rss)
    memory = np.interp(edges[1:], at[measured], rss[measured]) if measured.any() else np.zeros(0)
    return edges[1:], np.maximum(rate, 0), memory


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


# -- what is shown ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class FunnelRow:
    name: str
    note: str
    count: int
    bar: Markup
    lost: list[tuple[str, int, str]]  # reason, clips, style


def funnel_rows(counts: Funnel) -> list[FunnelRow]:
    """Planned → decoded → moving → with hands; each row with what was lost on the way to it."""
    gates = ("motion", "hands", "camera", "other")
    by_gate: dict[str, list[tuple[str, int, str]]] = {gate: [] for gate in gates}
    for reason, n in counts.dropped.items():
        kind = outcome("dropped", reason)
        by_gate[kind].append((reason, n, kind))
    failed = [(reason, n, "failed") for reason, n in counts.failed.items()]
    waiting = [("not done yet", counts.pending, "pending")] if counts.pending else []
    steps = [
        ("Planned", "clips on the grid", []),
        ("Decoded", "scored for motion", failed + waiting),
        ("Moving", "passed the motion gate", by_gate["motion"]),
        ("Hands in sight", "passed the hand gate", by_gate["hands"]),
    ]
    if by_gate["camera"]:
        steps.append(("Not the camera", "passed the camera gate", by_gate["camera"]))
    if by_gate["other"]:
        steps.append(("Kept", "", by_gate["other"]))
    rows, left = [], counts.planned
    for name, note, lost in steps:
        left -= sum(n for _, n, _ in lost)
        parts = [(left, "kept"), *((n, style) for _, n, style in lost)]
        shown = lost[:8]
        if lost[8:]:
            shown.append(("other reasons", sum(n for _, n, _ in lost[8:]), lost[8][2]))
        label = f"{name}: {left} of {counts.planned} clips"
        rows.append(FunnelRow(name, note, left, charts.flow(parts, counts.planned, label), shown))
    return rows


def score_chart(
    found: Mapping[str, np.ndarray],
    threshold: Threshold,
    most: float,
    axis: str,
    label: str,
    upper: bool = False,
) -> Markup | None:
    """Up to forty bins as far as the largest score; fewer where there are few clips to fill them.

    Args:
        found: int64 [FINE + 1] per outcome, scores in shares of ``most``.
    """
    if not found:
        return None
    n_clips = sum(int(counts.sum()) for counts in found.values())
    wanted = min(40, max(12, math.ceil(2 * math.sqrt(n_clips))))
    last = max(int(np.flatnonzero(counts)[-1]) for counts in found.values())
    value = threshold.value or None
    last = max(last + 1, math.ceil((value or 0) / most * FINE * 1.1), wanted)
    step = math.ceil(last / wanted)
    n_bins = math.ceil(last / step)
    series = []
    for kind, name in OUTCOMES.items():
        if kind in found:
            padded = np.zeros(max(n_bins * step, FINE + 1), np.int64)
            padded[: FINE + 1] = found[kind]
            series.append(charts.Series(name, kind, padded[: n_bins * step].reshape(n_bins, step).sum(1)))
    edges = np.arange(n_bins + 1) * step / FINE * most
    return charts.histogram(edges, series, value, axis, label, most, upper)


def visibility_chart(survey: Survey, gate: Mapping[str, Threshold], cfg: config.Config) -> Markup | None:
    """One bin per value that a whole clip can have, where these are few."""
    if not survey.visibility:
        return None
    looked = math.ceil(round(cfg.clips.duration_s * cfg.clips.sample_fps) / cfg.hands.every)
    n = looked if 2 <= looked <= 40 else 20
    bin_of = np.floor(np.arange(FINE + 1) / FINE * n + 2 * n / FINE).astype(np.int64).clip(0, n)
    series = [
        charts.Series(name, kind, np.bincount(bin_of, survey.visibility[kind], n + 1).astype(np.int64))
        for kind, name in OUTCOMES.items()
        if kind in survey.visibility
    ]
    value, axis = gate["min_hand_visibility"].value, "share of looked-at frames with a hand"
    label = "Hand visibility of the clips that were looked at"
    return charts.histogram(np.arange(n + 2) / n, series, value, axis, label, 1.0)


def work_charts(work: Work) -> list[tuple[str, str, Markup]]:
    """Title, note and chart of what the work took."""
    found = []
    if work.stages:
        total = sum(work.stages.values()) or 1.0
        rows = [
            (name, seconds, f"{clock(seconds)} · {100 * seconds / total:.0f} %")
            for name, seconds in sorted(work.stages.items(), key=lambda item: -item[1])[:12]
        ]
        note = "Seconds of all processes added up; they can exceed the wall time."
        found.append(("Where the time went", note, charts.bars(rows, "Seconds by stage")))
    if work.stalls:
        shares = [(name, share, f"{100 * share:.0f} %") for name, share in work.stalls.items()]
        note = "Share of the waiting stage's time. Who never waits is what the others wait for."
        found.append(("Who waited for whom", note, charts.bars(shares[:8], "Stalls by stage", 176)))
    if len(work.at_s) >= 2:
        unit, scale = ("min", 60.0) if work.at_s[-1] >= 300 else ("s", 1.0)
        label = f"working time, {unit}"
        found.append(
            ("Clips per second", f"{work.rate or 0:.2f} on average.",
             charts.line(work.at_s / scale, work.clips_per_s, label, "clips/s", "Clips per second over time"))
        )  # fmt: skip
        if len(work.rss):
            note = f"All processes together, {gigabytes(work.peak_rss)} at most."
            chart = charts.line(
                work.at_s / scale, work.rss / 1e9, label, "GB", "Resident memory over time", "hands"
            )
            found.append(("Resident memory", note, chart))
    return found


def picture(name: str, one: thumbnails.Thumbnail) -> Markup:
    """A picture with its hands, as an SVG symbol; the page uses it in several places."""
    if one.uri is None:
        inner = [charts.placeholder(one.width, one.height, one.problem or "no picture")]
    else:
        image = charts.el("image", href=one.uri, width=one.width, height=one.height)
        inner = [image, *(charts.hand(xy, side) for side, xy in one.hands)]
    return charts.el("symbol", *inner, id=name, viewBox=f"0 0 {one.width} {one.height}")


def card(
    row: Mapping[str, Any], picture_id: str | None, shown: thumbnails.Thumbnail | None, skills: Skills | None
) -> dict[str, Any]:
    """What is written beside the picture of a clip."""
    skill = skills.skill_of.get(row["clip_id"]) if skills else None
    return {
        **row,
        "file": row["name"].rsplit("/", 1)[-1].rsplit("::", 1)[-1],
        "picture": picture_id,
        "there": shown is not None and shown.webp is not None,
        "span": f"{clock(row['start_s'])} – {clock(row['end_s'])}",
        "outcome": outcome(row["decision"], row["reason"]),
        "skill": skill,
        "skill_name": skills.name(skill) if skills and skill is not None else None,
    }


def projection_charts(
    skills: Skills, cards: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, str, int, Markup]]:
    """Key, title, number of points drawn and chart of each projection."""
    found = []
    tags = {int(row["skill"]): str(row["skill"]) for row in skills.rows[:N_TAGS]}
    for key, points in skills.points.items():
        pictures = {
            clip: {
                "data_t": cards[clip]["picture"],
                "data_name": cards[clip]["name"],
                "data_note": f"{cards[clip]['span']} · {cards[clip]['skill_name']}",
            }
            for clip in points.clip_id
            if clip in cards and cards[clip]["there"]
        }
        title = PROJECTIONS[key]
        label = f"{title} of {len(points.clip_id)} kept clips, coloured by skill"
        found.append((key, title, len(points.clip_id), charts.scatter(points, pictures, tags, label)))
    return found


def random_embeddings(run: RunDir) -> list[str]:
    """The embeddings of ``run`` that random weights made, as their files say."""
    metadata = {name: run.dataset(f"embeddings/{name}").schema.metadata or {} for name in run.embeddings()}
    return [name for name, about in metadata.items() if about.get(b"random") == b"true"]


@dataclass(frozen=True)
class Notice:
    level: str  # random, warn or info
    title: str
    text: str


def notices(
    run: RunDir,
    counts: Funnel,
    skills: Skills | None,
    pictures: Mapping[str, thumbnails.Thumbnail],
    refused: Refused,
    gate: Mapping[str, Threshold],
    random: Sequence[str],
) -> list[Notice]:
    """What a reader must know before believing the rest: what was random, and what is missing."""
    cfg = run.config
    found: list[Notice] = []

    def add(level: str, title: str, text: str) -> None:
        found.append(Notice(level, title, text))

    for name in random:
        also = " The labels come from it and are random too." if name == "clip" else ""
        add("random", f"{name}: random weights", f"As asked for; its embeddings mean nothing.{also}")
    if skills and skills.about.get("random"):
        on = skills.about.get("embedding")
        add("random", "Skills are random", f"They were clustered on {on} embeddings of random weights.")
    if counts.pending:
        text = f"{counts.pending:,} of {counts.planned:,} planned clips have no result yet"
        add("warn", "The run is not finished", f"{text}; run it again to go on.")
    if not counts.planned:
        add("warn", "Nothing was planned", "No usable video was found, or planning has not run.")
    elif not counts.kept and not counts.pending:
        add("warn", "No clip was kept", "The funnel says why; the thresholds in force are below it.")
    if counts.n_failed:
        text = f"{counts.n_failed:,} of {counts.planned:,} clips could not be decoded or scored."
        add("warn", "Some clips failed", text)
    if refused.total:
        add("warn", "Some input was refused", f"{refused.total:,} rows in quarantine, listed below.")
    for text in (skills.about.get("warnings") or []) if skills else []:
        add("warn", "Skills", str(text))
    for name, weights, lost in (
        ("VideoMAE", cfg.embed.videomae.weights, "no VideoMAE embeddings"),
        ("CLIP", cfg.embed.clip.weights, "no CLIP embeddings and no labels"),
    ):
        if weights == "none":
            add("info", f"{name} was switched off", f"weights: none, so there are {lost}.")
    if cfg.hands.detector == "none":
        text = "detector: none, so hand visibility is unknown and there are no landmarks."
        add("info", "Nobody looked for hands", text)
    if skills is None and counts.kept:
        add("info", "No skills yet", "Run `ego2robot cluster` on this run directory.")
    unresolved = [key for key, one in gate.items() if one.value is None and one.asked != OFF]
    if unresolved and counts.planned:
        add("info", "Thresholds not resolved", f"No value yet for {' and '.join(unresolved)}.")
    problems = Counter(one.problem for one in pictures.values() if one.problem)
    if problems:
        text = "; ".join(f"{n} × {problem}" for problem, n in problems.most_common(4))
        add("info", f"{sum(problems.values())} of {len(pictures)} pictures are missing", text + ".")
    return found
