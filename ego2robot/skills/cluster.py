"""Skills: the clusters of a run's embeddings, how good they are, and what they are called."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ego2robot import config as configuration
from ego2robot.errors import UserError
from ego2robot.skills import table
from ego2robot.skills.kmeans import KMeansResult, kmeans
from ego2robot.skills.projection import project
from ego2robot.store import atomic
from ego2robot.store.rundir import RunDir

PREFERENCE = ("videomae", "clip", "hand_motion")
SILHOUETTE_SAMPLE = 5_000
STABILITY_RUNS = 5
N_EXAMPLES = 6

Progress = Callable[[str], None]  # told what begins


@dataclass(frozen=True)
class Embeddings:
    """One embedding of a run, sorted by clip id.

    Attributes:
        name: folder under ``embeddings/``.
        clip_ids: N strings, ascending, each once.
        x_ND: float32, finite.
        weights: hub id or folder they were made with.
        random: the weights were random.
    """

    name: str
    clip_ids: pa.Array
    x_ND: np.ndarray
    weights: str
    random: bool


def cluster(
    run: RunDir, config: configuration.Skills, seed: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Finds the skills of a run and writes ``skills/`` (``skills.json`` last, so that it stands for
    a complete folder). What an earlier call left is replaced.

    Vectors are clustered as they are stored, by k-means (:func:`ego2robot.skills.kmeans.kmeans`) on the
    run's ``device``. Skills are numbered by size, largest first, ties by their medoid's id. The result
    depends on the clips, not on the order in which they were processed.

    Returns:
        The body of ``skills.json``: ``silhouette`` (on a seeded sample of at most 5,000 clips) and
        ``stability`` (mean adjusted Rand index between 5 runs of other seeds, one start each) are None
        unless 2 ≤ k < clips; ``imbalance`` is the largest skill over the mean size; ``warnings`` are
        lines for a person. A skill's ``medoid`` is the clip nearest to its centroid, which is also the
        one with the smallest sum of squared distances to the others; ``examples`` the nearest six.

    Raises:
        UserError: the embedding that was asked for is not there, or holds vectors that are not finite
            or clips that occur twice.
    """
    tell = progress or (lambda _: None)
    clips = run.table("clips", ["clip_id", "decision", "label"])
    n_kept = pc.sum(pc.equal(clips["decision"], "kept")).as_py() or 0
    name, warnings = choose_embedding(run, config.embedding, n_kept)
    if name is None:
        return _write(run.path / "skills", *_nothing(config, seed, warnings))
    found = read_embeddings(run, name)
    n = len(found.clip_ids)
    if n < n_kept:
        warnings.append(f"{n_kept - n} of {n_kept} kept clips have no {name} embedding and are in no skill")

    tell(f"k-means of {n:,} {name} embeddings")
    device = _device(run.config.device)
    requested, k = config.k, min(config.k, n)
    result = renumber(kmeans(found.x_ND, k, seed, config.restarts, device=device))
    effective = len(result.centroids_KD)
    if effective < requested:
        cause = f"only {n} clip{'s' * (n != 1)}" if effective == n else f"only {effective} different vectors"
        warnings.append(
            f"skills.k={requested}, but there {'is' if effective == 1 else 'are'} {cause}: k={effective}"
        )
    tell("quality of the clusters")
    sizes_K = np.bincount(result.assignment, minlength=effective)
    silhouette = stability = None
    if 2 <= effective < n:
        silhouette = silhouette_of(found.x_ND, result.assignment, seed)
        stability = stability_of(found.x_ND, effective, seed, device)
    tell("projection")
    projection = project(found.x_ND, config.projections, seed, device)
    warnings += projection.warnings

    labels = _labels(clips, found.clip_ids)
    pairs = table.hierarchy(labels, result.assignment)
    tops = table.top_labels(pairs, effective)
    labels_random = _labels_random(run) and any(label is not None for label in labels)
    if labels_random:
        warnings.append(
            "labels come from random CLIP weights and mean nothing: skills are numbered, not named"
        )
    named = table.names([None if labels_random else top.label for top in tops])
    skills = []
    for skill in range(effective):
        members = np.flatnonzero(result.assignment == skill)
        nearest = members[np.argsort(result.distances[members], kind="stable")][:N_EXAMPLES]
        examples = [found.clip_ids[i].as_py() for i in nearest]
        skills.append(
            {
                "skill": skill,
                "name": named[skill],
                "n": int(sizes_K[skill]),
                "share": float(sizes_K[skill] / n),
                "label": tops[skill].label,
                "label_share": tops[skill].share,
                "medoid": examples[0],
                "examples": examples,
            }
        )
    body = {
        "embedding": name,
        "weights": found.weights,
        "random": found.random,
        "labels_random": labels_random,
        "k": effective,
        "requested_k": requested,
        "n_clips": n,
        "seed": seed,
        "restarts": config.restarts,
        "backend": result.backend,
        "inertia": result.inertia,
        "silhouette": silhouette,
        "stability": stability,
        "imbalance": float(sizes_K.max() / sizes_K.mean()),
        "projections": list(projection.points),
        "warnings": warnings,
        "skills": skills,
    }
    return _write(run.path / "skills", body, found.clip_ids, result, projection.points, pairs)


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


def read_embeddings(run: RunDir, name: str) -> Embeddings:
    """All vectors of ``embeddings/<name>``, sorted by clip id.

    Raises:
        UserError: a vector is missing or not finite, or a clip occurs twice.
    """
    where = run.path / "embeddings" / name
    rows = run.table(f"embeddings/{name}", ["clip_id", "embedding"]).sort_by("clip_id").combine_chunks()
    clip_ids = rows["clip_id"].combine_chunks()
    column = rows["embedding"].combine_chunks()
    x_ND = np.full((len(rows), column.type.list_size), np.nan, np.float32)
    x_ND[column.is_valid().to_numpy(zero_copy_only=False)] = (
        column.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
    )
    twice = pc.equal(clip_ids[1:], clip_ids[:-1])
    if pc.any(twice).as_py():
        names = _some(clip_ids[1:].filter(twice))
        raise UserError(f"{where}: clips that occur twice: {names}; see `ego2robot verify {run.path}`")
    broken = ~np.isfinite(x_ND).all(axis=1)
    if broken.any():
        names = _some(clip_ids.filter(pa.array(broken)))
        raise UserError(
            f"{where}: values that are not finite for clips {names}; make them again in a new run"
        )
    metadata = _metadata(run, name)
    return Embeddings(name, clip_ids, x_ND, metadata.get("weights", ""), metadata.get("random") == "true")


def renumber(result: KMeansResult) -> KMeansResult:
    """The same partition with clusters by size, largest first; ties by the position of their medoid."""
    k = len(result.centroids_KD)
    sizes_K = np.bincount(result.assignment, minlength=k)
    by_distance = np.lexsort((np.arange(len(result.assignment)), result.distances, result.assignment))
    medoids_K = by_distance[np.concatenate([[0], np.cumsum(sizes_K)[:-1]])]
    order = np.lexsort((medoids_K, -sizes_K))
    new_number = np.empty(k, np.int64)
    new_number[order] = np.arange(k)
    return KMeansResult(
        centroids_KD=result.centroids_KD[order],
        assignment=new_number[result.assignment],
        distances=result.distances,
        inertia=result.inertia,
        iterations=result.iterations,
        backend=result.backend,
    )


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


def stability_of(x_ND: np.ndarray, k: int, seed: int, device: str = "cpu") -> float:
    """Mean adjusted Rand index (Hubert and Arabie 1985) over the pairs of 5 k-means runs, each with one
    start of its own seed: 1 when the start does not matter, 0 when the runs agree as chance would."""
    from sklearn.metrics import adjusted_rand_score

    runs = [
        kmeans(x_ND, k, seed + 1 + i, restarts=1, device=device).assignment for i in range(STABILITY_RUNS)
    ]
    return float(np.mean([adjusted_rand_score(a, b) for a, b in itertools.combinations(runs, 2)]))


def _nothing(config: configuration.Skills, seed: int, warnings: list[str]) -> tuple[Any, ...]:
    """What :func:`_write` takes when there is nothing to cluster."""
    body = {
        "embedding": None if config.embedding == "auto" else config.embedding,
        "weights": "",
        "random": False,
        "labels_random": False,
        "k": 0,
        "requested_k": config.k,
        "n_clips": 0,
        "seed": seed,
        "restarts": config.restarts,
        "backend": "torch",
        "inertia": 0.0,
        "silhouette": None,
        "stability": None,
        "imbalance": 0.0,
        "projections": [],
        "warnings": warnings,
        "skills": [],
    }
    none = np.zeros(0, np.int64)
    result = KMeansResult(np.zeros((0, 1), np.float32), none, none.astype(np.float32), 0.0, 0, "torch")
    return body, pa.array([], pa.string()), result, {}, table.hierarchy([], none)


def _write(
    folder: Path,
    body: dict[str, Any],
    clip_ids: pa.Array,
    result: KMeansResult,
    points: dict[str, np.ndarray],
    pairs: pa.Table,
) -> dict[str, Any]:
    n, dim = len(clip_ids), result.centroids_KD.shape[1]
    unprojected = np.full((n, 2), np.nan, np.float32)
    plane = {
        f"{method}_{axis}": pa.array(points.get(method, unprojected)[:, i], pa.float32(), from_pandas=True)
        for method in ("tsne", "umap")
        for i, axis in enumerate("xy")
    }
    assignment = {
        "clip_id": clip_ids,
        "skill": pa.array(result.assignment, pa.int32()),
        "distance": pa.array(result.distances, pa.float32()),  # Euclidean, to the skill's centroid
        **plane,
    }
    centroids = {
        "skill": pa.array(range(len(result.centroids_KD)), pa.int32()),
        "centroid": pa.FixedSizeListArray.from_arrays(
            pa.array(result.centroids_KD.ravel(), pa.float32()), dim
        ),
    }
    # Without skills.json the folder is unfinished; no old one may stand beside new tables.
    (folder / "skills.json").unlink(missing_ok=True)
    atomic.write_parquet(folder / "assignment.parquet", pa.table(assignment))
    atomic.write_parquet(folder / "centroids.parquet", pa.table(centroids))
    atomic.write_parquet(folder / "table.parquet", pairs)
    atomic.write_json(folder / "skills.json", body)
    return body


def _labels(clips: pa.Table, clip_ids: pa.Array) -> list[str | None]:
    at = pc.index_in(clip_ids, value_set=clips["clip_id"].combine_chunks())
    return list(clips["label"].take(at).to_pylist())


def _labels_random(run: RunDir) -> bool:
    return "clip" in run.embeddings() and _metadata(run, "clip").get("random") == "true"


def _metadata(run: RunDir, name: str) -> dict[str, str]:
    raw = run.dataset(f"embeddings/{name}").schema.metadata or {}
    return {key.decode(): value.decode() for key, value in raw.items()}


def _device(wanted: str) -> str:
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def _some(values: pa.Array, most: int = 5) -> str:
    shown = ", ".join(values[:most].to_pylist())
    return shown + (f" and {len(values) - most} more" if len(values) > most else "")
