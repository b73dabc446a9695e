"""Which clips of a run are exported, in which order, and what each is called: before anything is decoded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from ego2robot.errors import UserError
from ego2robot.store import schema
from ego2robot.store.rundir import RunDir

UNLABELLED = "unlabelled hand manipulation"
BATCH = 4096  # rows that are Python objects at one time

# A chosen clip. ``unit_id`` and ``hands`` say where the run keeps its plan and its landmarks, so that who
# exports it needs neither the ledger nor the rest of the plan.
CHOSEN = pa.schema(
    [
        ("clip_id", pa.string()),
        ("video_id", pa.string()),
        ("source", pa.string()),
        ("name", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("first", pa.int64()),
        ("n_frames", pa.int32()),
        ("motion", pa.float32()),
        ("hand_visibility", pa.float32()),
        ("label", pa.string()),
        ("label_score", pa.float32()),
        ("labels", schema.LABELS),
        ("meta", schema.META),
        ("task", pa.string()),
        ("skill_id", pa.int64()),
        ("skill", pa.string()),
        ("unit_id", pa.string()),
        ("hands", pa.string()),
    ]
)


@dataclass(frozen=True)
class Choice:
    """The chosen clips.

    Attributes:
        table: rows of ``CHOSEN`` by (video name, video, start, end).
        ranked_by: ``label_score`` or ``hand_visibility``.
        planned, kept: clips of the run; ``kept`` counts those that ``top`` left out too.
    """

    table: pa.Table
    ranked_by: str
    planned: int
    kept: int


def choose(
    run: RunDir, top: int | None, own_task_first: bool = False, only_representatives: bool = False
) -> Choice:
    """The ``top`` best kept clips of a run (None: all) in the order in which they are stored.

    Clips rank by ``label_score`` when they were labelled by real weights, else by ``hand_visibility``;
    ties by ``motion``, then by ``clip_id``.

    Args:
        own_task_first: what the dataset itself says a clip shows goes before what a model says.
        only_representatives: near-duplicates of a better clip, as clustering marked them, are left out.

    Raises:
        UserError: near-duplicates were never looked for.
    """
    clips = run.dataset("clips")
    columns = ["clip_id", "video_id", "source", "name", "start_s", "end_s", "n_frames", "motion"]
    columns += ["hand_visibility", "label", "label_score", "labels", "meta"]
    kept = clips.to_table(columns, filter=ds.field("decision") == "kept")
    n_kept = kept.num_rows
    labelled = pc.count(kept["label_score"]).as_py() > 0 and "clip" not in random_models(run)
    ranked_by = "label_score" if labelled else "hand_visibility"
    if only_representatives:
        alike = pc.is_in(kept["clip_id"], value_set=_duplicates(run))
        kept = kept.filter(pc.invert(alike))
    order = [(ranked_by, "descending"), ("motion", "descending"), ("clip_id", "ascending")]
    best = kept.take(pc.sort_indices(kept, order)[:top])
    storing = [(name, "ascending") for name in ("name", "video_id", "start_s", "end_s", "clip_id")]
    best = best.take(pc.sort_indices(best, storing)).combine_chunks()
    first = pc.round(pc.multiply(best["start_s"], run.config.clips.sample_fps)).cast(pa.int64())
    best = best.append_column("first", first)
    best = best.append_column("unit_id", _unit_ids(run, best))
    best = best.append_column("hands", _hand_files(run, best["unit_id"]))
    for name, values in _named(run, best, labelled, own_task_first).items():
        best = best.append_column(CHOSEN.field(name), values)
    return Choice(best.select(CHOSEN.names).cast(CHOSEN), ranked_by, clips.count_rows(), n_kept)


def random_models(run: RunDir) -> list[str]:
    """The embeddings of a run that were made with random weights."""
    return [
        name
        for name in run.embeddings()
        if (run.dataset(f"embeddings/{name}").schema.metadata or {}).get(b"random") == b"true"
    ]


def counted(column: pa.ChunkedArray) -> Counter[str]:
    """How often each value occurs."""
    return Counter({pair["values"]: pair["counts"] for pair in pc.value_counts(column).to_pylist()})


def licences(chosen: pa.Table) -> set[tuple[str, str | None]]:
    """The sources of chosen clips, each with its clips' own ``license`` field."""
    return {
        (row["source"], dict(row["meta"] or ()).get("license"))
        for batch in chosen.select(["source", "meta"]).to_batches(BATCH)
        for row in batch.to_pylist()
    }


def _duplicates(run: RunDir) -> pa.Array:
    path = run.path / "skills" / "assignment.parquet"
    if not path.is_file() or "representative" not in pq.read_schema(path).names:
        raise UserError(
            f"{run.path}: near-duplicates were not looked for; run `ego2robot cluster {run.path}` with "
            "skills.duplicate_cosine set, or export without --only-representatives"
        )
    alike = ds.dataset(path).to_table(["clip_id"], filter=~ds.field("representative"))
    return alike["clip_id"].combine_chunks()


def _unit_ids(run: RunDir, best: pa.Table) -> pa.ChunkedArray:
    """The unit of the run's plan that each clip is in; null where the plan has no such clip."""
    videos = pc.unique(best["video_id"])
    plan = (
        ds.dataset(run.plan_path).to_table(
            ["unit_id", "video_id", "first", "length"], filter=ds.field("video_id").isin(videos)
        )
        if run.planned
        else run.units().select(["unit_id", "video_id", "first", "length"])
    )
    plan = plan.combine_chunks()
    parents = pc.list_parent_indices(plan["first"])
    clips = pa.table(
        {
            "video_id": plan["video_id"].take(parents),
            "first": pc.list_flatten(plan["first"]),
            "n_frames": pc.list_flatten(plan["length"]),
            "unit_id": plan["unit_id"].take(parents),
        }
    )
    keys = ["video_id", "first", "n_frames"]
    wanted = best.select(keys).append_column("row", pa.array(range(best.num_rows), pa.int64()))
    found = wanted.join(clips, keys, join_type="left outer").sort_by(
        [("row", "ascending"), ("unit_id", "ascending")]
    )
    # A plan has a clip once; should it have it twice, the first counts.
    firsts = found.group_by("row", use_threads=False).aggregate([("unit_id", "first")])
    return firsts.sort_by("row")["unit_id_first"]


def _hand_files(run: RunDir, unit_ids: pa.ChunkedArray) -> pa.Array:
    """The part with each unit's landmarks, relative to the run; null where it has none."""
    wanted = set(pc.unique(unit_ids).to_pylist())
    files = {
        unit: path
        for record in run.records()
        for path in record.files
        if path.startswith("hands/")
        for unit in record.units
        if unit in wanted
    }
    return pa.array((files.get(unit) for unit in unit_ids.to_pylist()), pa.string())


def _named(run: RunDir, best: pa.Table, labelled: bool, own_task_first: bool) -> dict[str, pa.Array]:
    """What the episodes show, in words. A label or a skill by random weights says nothing."""
    found = run.skills()
    skills = _skills(run, best["clip_id"]) if found else pa.nulls(best.num_rows, pa.int64())
    titles = {skill["skill"]: skill["name"] for skill in found["skills"]} if found else {}
    names = [titles[number] if number is not None else None for number in skills.to_pylist()]
    meaningful = found is not None and not found["random"]
    tasks: list[str] = []
    for batch in best.select(["label", "meta"]).to_batches(BATCH):
        for row in batch.to_pylist():
            skill = names[len(tasks)] if meaningful else None
            tasks.append(_task(row, labelled, skill, own_task_first))
    return {
        "task": pa.array(tasks, pa.string()),
        "skill_id": skills,
        "skill": pa.array(names, pa.string()),
    }


def _task(row: dict[str, Any], labelled: bool, skill: str | None, own_first: bool) -> str:
    own, label = dict(row["meta"] or ()).get("task"), row["label"] if labelled else None
    for text in (own, label) if own_first else (label, own):
        if text and text.strip():
            return str(text.strip())
    return f"{UNLABELLED} ({skill})" if skill else UNLABELLED


def _skills(run: RunDir, clip_ids: pa.ChunkedArray) -> pa.Array:
    """The number of each clip's skill, null where it has none."""
    rows = ds.dataset(run.path / "skills" / "assignment.parquet").to_table(
        ["clip_id", "skill"], filter=ds.field("clip_id").isin(clip_ids.combine_chunks())
    )
    at = pc.index_in(clip_ids.combine_chunks(), value_set=rows["clip_id"].combine_chunks())
    return rows["skill"].combine_chunks().take(at).cast(pa.int64())
