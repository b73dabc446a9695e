"""Skills: the clusters of a run's embeddings, how good they are, and what they are called.

Centroids are found on a sample of stated size; then every vector is assigned, unit by unit, by one process
or by shards. Memory depends on the configuration, not on the number of clips.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ego2robot import config as configuration
from ego2robot.errors import UserError
from ego2robot.memory import return_large_blocks
from ego2robot.skills import table
from ego2robot.skills.assignment import (
    Details,
    Fit,
    Shard,
    Survey,
    Work,
    assign_rows,
    between,
    ranges,
    survey,
    unit_rows,
)
from ego2robot.skills.duplicates import Duplicates
from ego2robot.skills.kmeans import Metric, kmeans
from ego2robot.skills.projection import project
from ego2robot.skills.vectors import Sample, Vectors, require_once, sample
from ego2robot.store import atomic
from ego2robot.store.rundir import RunDir
from ego2robot.types import short_id

PREFERENCE = ("videomae", "clip", "hand_motion")
SILHOUETTE_SAMPLE = 5_000
STABILITY_SAMPLE, STABILITY_ROWS = 5_000, 50  # rows looked at; the least per cluster where they are a part
STABILITY_RUNS = 5
N_EXAMPLES = 6
MERGE_ROWS = 1 << 20  # of the final table, sorted at a time
# Beyond so many row-centroid pairs an iteration takes seconds, and starts hardly differ any more:
# one start and few iterations, most of them on a part of the sample.
LARGE, LARGE_ITERATIONS = 1 << 22, 25

Progress = Callable[[str], None]  # told what begins

PLANE = ("tsne_x", "tsne_y", "umap_x", "umap_y")
DUPLICATE_FIELDS = [
    pa.field(
        "duplicate_group",
        pa.string(),
        metadata={
            "description": "clip that stands for this one's near-duplicates, itself too; null: has none"
        },
    ),
    pa.field("duplicate_cosine", pa.float32(), metadata={"description": "to the clip that stands for it"}),
    pa.field(
        "representative",
        pa.bool_(),
        nullable=False,
        metadata={"description": "false: a near-duplicate of a better clip"},
    ),
]


def cluster(
    run: RunDir, config: configuration.Skills, seed: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Finds the skills of a run and writes ``skills/`` (``skills.json`` last, so that it stands for
    a complete folder). What an earlier call left is replaced; what an interrupted one or
    :func:`cluster_shard` has done with the same vectors and settings is used.

    Vectors are clustered as they are stored (``metric=cosine``: divided by their length), by k-means
    (:func:`ego2robot.skills.kmeans.kmeans`) on the run's ``device``, on a sample of at most
    ``sample_rows`` rows and ``sample_mib``, from one start where they times k exceed 4 million; then each
    is assigned to the nearest centroid. Skills are numbered by size, largest first, ties by their medoid's
    id. The result depends on the clips, not on the order in which they were processed, the files they are
    in or the number of shards.

    Returns:
        The body of ``skills.json``: ``silhouette`` (on a seeded sample of at most 5,000 clips) and
        ``stability`` (mean adjusted Rand index between 5 runs of other seeds, one start each, on at most
        5,000 clips) are None unless 2 ≤ k < clips; ``imbalance`` is the largest skill over the mean size;
        ``warnings`` are lines for a person. A skill's ``medoid`` is the clip nearest to its centroid, which
        is also the one with the smallest sum of squared distances to the others where all clips were in
        the sample; ``examples`` the nearest six. ``also`` has the figures for each ``also_k``, whose
        skills are the columns ``skill_k<K>`` and ``distance_k<K>``.

    Raises:
        UserError: the embedding that was asked for is not there, or holds vectors that are not finite
            or clips that occur twice.
    """
    tell = progress or (lambda _: None)
    n_kept = _n_kept(run)
    name, warnings = choose_embedding(run, config.embedding, n_kept)
    if name is None:
        return _write_nothing(run.path / "skills", config, seed, warnings)
    vectors = Vectors.of_run(run, name)
    if vectors.rows < n_kept:
        missing = n_kept - vectors.rows
        warnings.append(f"{missing} of {n_kept} kept clips have no {name} embedding and are in no skill")
    work = _work(run, config, seed, vectors)
    drawn = _drawn(work, config, seed)
    fit = _fit(work, drawn, config, seed, name, tell)
    if work.left():
        tell(f"assigning {vectors.rows:,} clips")
        work.assign(fit, Details(run), Shard(), tell)
    surveys = [survey(work.parts(), i, len(c), N_EXAMPLES) for i, c in enumerate(fit.centroids)]
    duplicates = _duplicates(work, fit, config)
    if duplicates and duplicates.left():
        duplicates.find(tell=tell)

    tell("quality of the clusters")
    requested = fit.about["requested_k"]
    for wanted, found in zip(requested, surveys, strict=True):
        warnings += _about_k(wanted, len(found.sizes), drawn)
    silhouettes = [_silhouette(drawn, fit, i, len(found.sizes), seed) for i, found in enumerate(surveys)]
    stability = _stability(drawn, len(surveys[0].sizes), seed, config, work.device)
    tell("projection")
    projection = project(
        drawn.x_ND, config.projections, seed, work.device, drawn.rows, config.metric == "cosine"
    )
    warnings += projection.warnings

    main = surveys[0]
    labels_random = _labels_random(run) and any(label is not None for label, _ in main.pairs)
    if labels_random:
        warnings.append(
            "labels come from random CLIP weights and mean nothing: skills are numbered, not named"
        )
    pairs = table.hierarchy_of(main.pairs)
    skills = _skills(main, pairs, vectors.rows, labels_random)
    folder = run.path / "skills"
    # Without skills.json the folder is unfinished; no old one may stand beside new tables.
    (folder / "skills.json").unlink(missing_ok=True)
    tell("writing")
    totals = _write_assignment(
        folder / "assignment.parquet",
        work,
        fit,
        surveys,
        _points(drawn.clip_ids, projection.points),
        drawn,
        duplicates,
    )
    body = {
        "embedding": name,
        "weights": vectors.metadata.get("weights", ""),
        "random": vectors.metadata.get("random") == "true",
        "labels_random": labels_random,
        "k": len(main.sizes),
        "requested_k": requested[0],
        "n_clips": vectors.rows,
        "seed": seed,
        "metric": config.metric,
        "restarts": fit.about["restarts"][0],
        "backend": fit.about["backends"][0],
        "sample": len(drawn.clip_ids),
        "inertia": totals.inertias[0],
        "silhouette": silhouettes[0],
        "stability": stability,
        "imbalance": float(main.sizes.max() / main.sizes.mean()),
        "duplicates": None
        if duplicates is None
        else {"cosine": config.duplicate_cosine, "groups": totals.groups, "clips": totals.duplicates},
        "also": [
            {
                "k": len(surveys[i].sizes),
                "requested_k": requested[i],
                "restarts": fit.about["restarts"][i],
                "backend": fit.about["backends"][i],
                "inertia": totals.inertias[i],
                "silhouette": silhouettes[i],
                "imbalance": float(surveys[i].sizes.max() / surveys[i].sizes.mean()),
            }
            for i in range(1, len(requested))
        ],
        "projections": list(projection.points),
        "warnings": warnings,
        "skills": skills,
    }
    numbered = [
        _centroids(c[np.argsort(s.number)[(s.number < 0).sum() :]])
        for c, s in zip(fit.centroids, surveys, strict=True)
    ]
    _publish(folder, numbered, requested[1:], pairs, body)
    return body


def cluster_shard(
    run: RunDir, config: configuration.Skills, seed: int, shard: Shard, progress: Progress | None = None
) -> int:
    """A shard's share of :func:`cluster`, which ends what shards began and writes the result.

    Any number of shards run at once, on any nodes that see the run: the first to find the centroids
    publishes them, every shard assigns its units and, once all units are assigned, looks for the
    near-duplicates of its clusters. Killed and started again it does what is missing.

    Returns:
        How many units and batches of clusters are left, over all shards; :func:`cluster` does them too.
    """
    tell = progress or (lambda _: None)
    name, _ = choose_embedding(run, config.embedding, _n_kept(run))
    if name is None:
        return 0
    work = _work(run, config, seed, Vectors.of_run(run, name))
    fit = work.fit() or _fit(work, _drawn(work, config, seed), config, seed, name, tell)
    work.assign(fit, Details(run), shard, tell)
    left = len(work.left())
    if left:
        return left
    duplicates = _duplicates(work, fit, config)
    if duplicates is None:
        return 0
    duplicates.find(shard, tell)
    return len(duplicates.left())


def choose_embedding(run: RunDir, wanted: str, n_kept: int) -> tuple[str | None, list[str]]:
    """The embedding to cluster, None when there is none, and warnings.

    ``auto`` takes the first that is not random of videomae, clip, hand_motion and what else there is;
    when all are random, the first of them, and says so.

    Raises:
        UserError: ``wanted`` is not there although clips were kept.
    """
    present = run.embeddings()
    if not n_kept and not present:
        return None, ["no clip was kept: there is nothing to cluster"]
    if wanted != "auto" and wanted not in present:
        there = f"it has {', '.join(present)}" if present else "it has none"
        raise UserError(
            f"{run.path}: no {wanted} embeddings ({there}); set skills.embedding=auto, "
            f"or make them in a new run (embed.{wanted})"
        )
    if not present:
        return None, ["the run has no embeddings (all of embed.* are off): there is nothing to cluster"]
    order: list[str] = [m for m in PREFERENCE if m in present]
    order += [m for m in present if m not in order]
    random = {m: _metadata(run, m).get("random") == "true" for m in order}
    name = next((m for m in order if not random[m]), order[0]) if wanted == "auto" else wanted
    if random[name]:
        return name, [f"{name} has random weights: these skills are groups of noise, not of meaning"]
    return name, []


def silhouette_of(x_ND: np.ndarray, assignment: np.ndarray, seed: int) -> float | None:
    """Mean silhouette (Rousseeuw 1987), −1 to 1, on a seeded sample of at most 5,000 rows; None when
    the sample falls into one cluster or into one cluster a row."""
    from sklearn.metrics import silhouette_score

    if len(x_ND) > SILHOUETTE_SAMPLE:
        rows = np.random.default_rng(seed).choice(len(x_ND), SILHOUETTE_SAMPLE, replace=False)
        x_ND, assignment = x_ND[rows], assignment[rows]
    if not 2 <= len(np.unique(assignment)) < len(assignment):
        return None
    return float(silhouette_score(x_ND, assignment))


def stability_of(
    x_ND: np.ndarray | torch.Tensor, k: int, seed: int, device: str = "cpu", metric: Metric = "euclidean"
) -> float:
    """Mean adjusted Rand index (Hubert and Arabie 1985) over the pairs of 5 k-means runs, each with one
    start of its own seed: 1 when the start does not matter, 0 when the runs agree as chance would."""
    from sklearn.metrics import adjusted_rand_score

    runs = [
        kmeans(x_ND, k, seed + 1 + i, restarts=1, device=device, metric=metric).assignment
        for i in range(STABILITY_RUNS)
    ]
    return float(np.mean([adjusted_rand_score(a, b) for a, b in itertools.combinations(runs, 2)]))


def _n_kept(run: RunDir) -> int:
    return run.dataset("clips").count_rows(filter=pc.field("decision") == "kept")


def _work(run: RunDir, config: configuration.Skills, seed: int, vectors: Vectors) -> Work:
    """The folder of work for these vectors and settings; what others left is no part of it."""
    return_large_blocks()
    keys = sorted(type(config).__annotations__.keys() - {"projections"})  # they only paint the picture
    settings = [(key, getattr(config, key)) for key in keys]
    device = _device(run.config.device)  # no part of the key: a node without a GPU may end what others began
    key = short_id("clustering", vectors.identity, seed, json.dumps(settings))
    return Work(run.path / "skills" / f"work-{key}", vectors, config.duplicate_cosine is not None, device)


def _drawn(work: Work, config: configuration.Skills, seed: int) -> Sample:
    work.vectors.keep_on(work.device)
    return sample(work.vectors, config.sample_rows, config.sample_mib << 20, seed)


def _fit(
    work: Work, drawn: Sample, config: configuration.Skills, seed: int, name: str, tell: Progress
) -> Fit:
    """The published centroids, or those that this call finds on the sample and publishes."""
    published = work.fit()
    if published is not None:
        return published
    n = len(drawn.clip_ids)
    wanted = [config.k, *(k for k in dict.fromkeys(config.also_k) if k != config.k)]
    centroids, backends, restarts = [], [], []
    for k in wanted:
        of = "" if drawn.whole else f" of {drawn.rows:,}"
        tell(f"k-means of {n:,}{of} {name} embeddings" + (f", k={k}" if len(wanted) > 1 else ""))
        large = n * k > LARGE
        result = kmeans(
            drawn.x_ND,
            min(k, n),
            seed,
            restarts=1 if large else config.restarts,
            max_iter=LARGE_ITERATIONS if large else 100,
            backend=config.backend,
            device=work.device,
            metric=config.metric,
            nested=large,
        )
        centroids.append(result.centroids_KD)
        backends.append(result.backend)
        restarts.append(1 if large else config.restarts)
    about = {"requested_k": wanted, "backends": backends, "restarts": restarts, "sample": n}
    return work.publish(Fit(config.metric, tuple(centroids), about))


def _duplicates(work: Work, fit: Fit, config: configuration.Skills) -> Duplicates | None:
    """Looks at whole clusters, so all units must be assigned."""
    if config.duplicate_cosine is None:
        return None
    k = len(fit.centroids[0])
    sizes = [
        np.bincount(pq.read_table(path, columns=["cluster_0"])["cluster_0"].to_numpy(), minlength=k)
        for path in work.parts()
    ]
    return Duplicates(work, np.stack(sizes), config.duplicate_cosine)


def _about_k(requested: int, k: int, drawn: Sample) -> list[str]:
    """A warning when there are fewer clusters than were asked for."""
    if k >= requested:
        return []
    n = drawn.rows
    if k == n:
        cause = f"only {n} clip{'s' * (n != 1)}"
    else:
        cause = f"only {k} different vectors" + ("" if drawn.whole else " in the sample")
    return [f"skills.k={requested}, but there {'is' if k == 1 else 'are'} {cause}: k={k}"]


def _silhouette(drawn: Sample, fit: Fit, model: int, k: int, seed: int) -> float | None:
    if not 2 <= k < drawn.rows:
        return None
    x_ND = drawn.x_ND[_some_rows(drawn, SILHOUETTE_SAMPLE, seed).to(drawn.x_ND.device)]
    labels = assign_rows(x_ND, Fit(fit.metric, (fit.centroids[model],), {}), str(x_ND.device))[0][0]
    rows_ND = unit_rows(x_ND) if fit.metric == "cosine" else x_ND.float()
    return silhouette_of(rows_ND.cpu().numpy(), labels, seed)


def _stability(drawn: Sample, k: int, seed: int, config: configuration.Skills, device: str) -> float | None:
    """None also where the rows that are looked at are too few to tell so many clusters apart."""
    if not 2 <= k < drawn.rows:
        return None
    rows = _some_rows(drawn, STABILITY_SAMPLE, seed)
    if len(rows) < drawn.rows and len(rows) < STABILITY_ROWS * k:
        return None
    x_ND = drawn.x_ND[rows.to(drawn.x_ND.device)]
    return stability_of(x_ND, k, seed, device, config.metric)


def _some_rows(drawn: Sample, most: int, seed: int) -> torch.Tensor:
    """Numbers of at most so many rows of the sample, int64, drawn with the seed."""
    n = len(drawn.clip_ids)
    if n <= most:
        return torch.arange(n)
    return torch.from_numpy(np.random.default_rng(seed).choice(n, most, replace=False))


def _skills(found: Survey, pairs: pa.Table, n_clips: int, labels_random: bool) -> list[dict[str, Any]]:
    """What ``skills.json`` says about each skill."""
    tops = table.top_labels(pairs, len(found.sizes))
    named = table.names([None if labels_random else top.label for top in tops])
    return [
        {
            "skill": skill,
            "name": named[skill],
            "n": int(n),
            "share": float(n / n_clips),
            "label": tops[skill].label,
            "label_share": tops[skill].share,
            "medoid": found.nearest[skill][0],
            "examples": found.nearest[skill],
        }
        for skill, n in enumerate(found.sizes)
    ]


def _centroids(centroids_KD: np.ndarray) -> pa.Table:
    flat = pa.array(centroids_KD.ravel(), pa.float32())
    return pa.table(
        {
            "skill": pa.array(range(len(centroids_KD)), pa.int32()),
            "centroid": pa.FixedSizeListArray.from_arrays(flat, centroids_KD.shape[1]),
        }
    )


@dataclass
class _Totals:
    """What the final table adds up to: an inertia for each number of clusters, groups of near-duplicates
    and the clips in them that a better one stands for."""

    inertias: list[float]
    groups: int = 0
    duplicates: int = 0


def _write_assignment(
    path: Path,
    work: Work,
    fit: Fit,
    surveys: list[Survey],
    points: dict[str, pa.Table],
    cuts: Sample,
    duplicates: Duplicates | None,
) -> _Totals:
    """One row per clip, sorted by id, a range of ids at a time."""
    also = fit.about["requested_k"][1:]
    totals = _Totals([0.0] * len(surveys))

    def tables() -> Iterator[pa.Table]:
        for low, high in ranges(cuts.clip_ids, work.vectors.rows, MERGE_ROWS):
            found = between(work.parts(), low, high)
            clip_ids = found["clip_id"].combine_chunks()
            require_once(clip_ids, work.vectors.where)
            columns = {"clip_id": clip_ids}
            for i, one in enumerate(surveys):
                suffix = "" if i == 0 else f"_k{also[i - 1]}"
                numbers = one.number[found[f"cluster_{i}"].to_numpy()]
                columns[f"skill{suffix}"] = pa.array(numbers, pa.int32())
                # Euclidean, to the skill's centroid
                columns[f"distance{suffix}"] = found[f"distance_{i}"].combine_chunks()
                distances = found[f"distance_{i}"].to_numpy().astype(np.float64)
                totals.inertias[i] += float(np.square(distances).sum())
            columns = {key: columns.pop(key) for key in ("clip_id", "skill", "distance")} | {
                **{name: _looked_up(clip_ids, points.get(name[:4]), name) for name in PLANE},
                **_marked(clip_ids, duplicates, low, high, totals),
                **columns,
            }
            yield pa.Table.from_arrays(list(columns.values()), schema=_schema(also))

    def fill(file: BinaryIO) -> None:
        with pq.ParquetWriter(file, _schema(also), compression="zstd", write_page_checksum=True) as writer:
            for rows in tables():
                writer.write_table(rows, row_group_size=1 << 16)

    atomic.write(path, fill)
    return totals


def _schema(also: list[int]) -> pa.Schema:
    further = [
        pa.field(f"{name}_k{k}", kind)
        for k in also
        for name, kind in (("skill", pa.int32()), ("distance", pa.float32()))
    ]
    return pa.schema(
        [
            pa.field("clip_id", pa.string()),
            pa.field("skill", pa.int32()),
            pa.field("distance", pa.float32()),
            *(pa.field(name, pa.float32()) for name in PLANE),
            *DUPLICATE_FIELDS,
            *further,
        ]
    )


def _points(clip_ids: pa.Array, points: dict[str, np.ndarray]) -> dict[str, pa.Table]:
    """For each projection the clips that are in it and where they are."""
    found = {}
    for method, plane_N2 in points.items():
        there = np.isfinite(plane_N2).all(axis=1)
        found[method] = pa.table(
            {
                "clip_id": clip_ids.filter(pa.array(there)),
                f"{method}_x": pa.array(plane_N2[there, 0], pa.float32()),
                f"{method}_y": pa.array(plane_N2[there, 1], pa.float32()),
            }
        )
    return found


def _looked_up(clip_ids: pa.Array, rows: pa.Table | None, name: str) -> pa.Array:
    """A column of ``rows`` for each id; null where it has none."""
    kind = _schema([]).field(name).type
    if rows is None or not len(rows):
        return pa.nulls(len(clip_ids), kind)
    at = pc.index_in(clip_ids, value_set=rows["clip_id"].combine_chunks())
    return rows[name].combine_chunks().take(at)


def _marked(
    clip_ids: pa.Array, duplicates: Duplicates | None, low: str | None, high: str | None, totals: _Totals
) -> dict[str, pa.Array]:
    rows = between(duplicates.parts(), low, high) if duplicates else None
    group = _looked_up(clip_ids, rows, "duplicate_group")
    own = pc.fill_null(pc.equal(group, clip_ids), fill_value=True)
    totals.duplicates += len(own) - (pc.sum(own).as_py() or 0)
    totals.groups += pc.sum(pc.and_(own, pc.is_valid(group))).as_py() or 0
    return {
        "duplicate_group": group,
        "duplicate_cosine": _looked_up(clip_ids, rows, "duplicate_cosine"),
        "representative": own,
    }


def _write_nothing(
    folder: Path, config: configuration.Skills, seed: int, warnings: list[str]
) -> dict[str, Any]:
    """Valid empty outputs where there is nothing to cluster."""
    body: dict[str, Any] = {
        "embedding": None if config.embedding == "auto" else config.embedding,
        "weights": "",
        "random": False,
        "labels_random": False,
        "k": 0,
        "requested_k": config.k,
        "n_clips": 0,
        "seed": seed,
        "metric": config.metric,
        "restarts": config.restarts,
        "backend": "torch",
        "sample": 0,
        "inertia": 0.0,
        "silhouette": None,
        "stability": None,
        "imbalance": 0.0,
        "duplicates": None,
        "also": [],
        "projections": [],
        "warnings": warnings,
        "skills": [],
    }
    (folder / "skills.json").unlink(missing_ok=True)
    atomic.write_parquet(folder / "assignment.parquet", _schema([]).empty_table())
    _publish(
        folder, [_centroids(np.zeros((0, 1), np.float32))], [], table.hierarchy([], np.zeros(0, int)), body
    )
    return body


def _publish(
    folder: Path, centroids: list[pa.Table], also: list[int], pairs: pa.Table, body: dict[str, Any]
) -> None:
    """The small files beside the assignment, ``skills.json`` last, and away with what is older."""
    names = ["centroids.parquet", *(f"centroids_k{k}.parquet" for k in also)]
    for name, rows in zip(names, centroids, strict=True):
        atomic.write_parquet(folder / name, rows)
    atomic.write_parquet(folder / "table.parquet", pairs)
    for path in folder.glob("centroids*.parquet"):
        if path.name not in names:
            path.unlink()
    atomic.write_json(folder / "skills.json", body)
    for path in folder.glob("work-*"):
        shutil.rmtree(path)


def _labels_random(run: RunDir) -> bool:
    return "clip" in run.embeddings() and _metadata(run, "clip").get("random") == "true"


def _metadata(run: RunDir, name: str) -> dict[str, str]:
    raw = run.dataset(f"embeddings/{name}").schema.metadata or {}
    return {key.decode(): value.decode() for key, value in raw.items()}


def _device(wanted: str) -> str:
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted
