"""Skills of real run directories: Parquet in, Parquet and JSON out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score, silhouette_score

from ego2robot import config
from ego2robot.errors import UserError
from ego2robot.skills import cluster, projection, table
from ego2robot.skills.cluster import silhouette_of, stability_of
from ego2robot.store import atomic, schema
from ego2robot.store.rundir import RunDir
from ego2robot.types import short_id

NO_PICTURE: dict[str, Any] = {"projections": ()}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ids(n: int) -> list[str]:
    return [short_id("clip", i) for i in range(n)]


def make_run(
    path: Path,
    embeddings: dict[str, np.ndarray],
    labels: Sequence[str | None] = (),
    random: Sequence[str] = (),
    order: Sequence[int] | None = None,
    n_parts: int = 3,
    n_dropped: int = 2,
    n_kept: int | None = None,
    settings: Mapping[str, Any] = {"device": "cpu"},  # read only
    fingerprint: Mapping[str, Any] = {"weights": "test"},
) -> RunDir:
    """A run directory with clips ``ids(n)`` kept, some dropped, committed in several parts."""
    n = n_kept if n_kept is not None else max((len(x) for x in embeddings.values()), default=0)
    run = RunDir.create_or_resume(path, config.build(settings), fingerprint)
    names = [*ids(n), *(short_id("dropped", i) for i in range(n_dropped))]
    order = list(range(n)) if order is None else list(order)
    for part, chunk in enumerate(np.array_split(np.array([*order, *range(n, n + n_dropped)], int), n_parts)):
        rows = [
            {
                "clip_id": names[i],
                "video_id": short_id("video", i),
                "source": "folder",
                "name": "a.mp4",
                "start_s": 0.0,
                "end_s": 6.0,
                "n_frames": 36,
                "fps": 30.0,
                "width": 1920,
                "height": 1080,
                "codec": "h264",
                "motion": 0.2,
                "hand_visibility": 1.0,
                "decision": "kept" if i < n else "dropped",
                "reason": None if i < n else "motion 0.01 < 0.1",
                "label": labels[i] if i < n and len(labels) else None,
                "label_score": None,
                "labels": [],
                "meta": [],
            }
            for i in chunk
        ]
        tables = {"clips": pa.Table.from_pylist(rows, schema=schema.CLIPS)}
        for model, x in embeddings.items():
            has = [i for i in chunk if i < len(x)]
            kind = schema.embedding(x.shape[1], model, f"weights-of-{model}", model in random)
            vectors = pa.FixedSizeListArray.from_arrays(
                pa.array(x[has].astype(np.float16).ravel(), pa.float16()), x.shape[1]
            )
            tables[f"embeddings/{model}"] = pa.Table.from_arrays(
                [pa.array([names[i] for i in has], pa.string()), vectors], schema=kind
            )
        run.commit([f"unit-{part}"], tables)
    return run


def skills(**keys: Any) -> config.Skills:
    return config.build({"skills": {"restarts": 3, **NO_PICTURE, **keys}}).skills


def blobs(sizes: Sequence[int] = (30, 50, 20), dim: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x, truth = make_blobs(list(sizes), dim, cluster_std=0.2, random_state=seed)[:2]
    return x.astype(np.float32), truth


def frame(run: RunDir, name: str) -> pd.DataFrame:
    return pd.read_parquet(run.path / "skills" / f"{name}.parquet")


def check_consistent(run: RunDir, body: dict[str, Any]) -> None:
    """Everything in ``skills/`` agrees with everything else, and other tools read it."""
    folder = run.path / "skills"
    assert sorted(p.name for p in folder.iterdir()) == [
        "assignment.parquet",
        "centroids.parquet",
        "skills.json",
        "table.parquet",
    ]
    assert run.skills() == body == json.loads((folder / "skills.json").read_text())
    a, c, t = (frame(run, name) for name in ("assignment", "centroids", "table"))
    plane = ["tsne_x", "tsne_y", "umap_x", "umap_y"]
    marks = ["duplicate_group", "duplicate_cosine", "representative"]
    assert list(a) == ["clip_id", "skill", "distance", *plane, *marks]
    kinds = pq.read_schema(folder / "assignment.parquet").types
    assert kinds == [pa.string(), pa.int32(), *[pa.float32()] * 5, pa.string(), pa.float32(), pa.bool_()]
    assert a["clip_id"].is_monotonic_increasing
    assert pa.types.is_fixed_size_list(pq.read_schema(folder / "centroids.parquet").field("centroid").type)
    assert len(a) == body["n_clips"] == sum(s["n"] for s in body["skills"]) == t["n"].sum()
    assert len(c) == body["k"] == len(body["skills"])
    assert [s["skill"] for s in body["skills"]] == list(range(body["k"])) == c["skill"].tolist()
    sizes = [s["n"] for s in body["skills"]]
    assert sizes == sorted(sizes, reverse=True)
    assert all(sizes)
    assert len({s["name"] for s in body["skills"]}) == body["k"]
    assert body["inertia"] == pytest.approx(
        float((a["distance"].astype(float) ** 2).sum()), rel=1e-4, abs=1e-9
    )
    for s in body["skills"]:
        members = a[a["skill"] == s["skill"]]
        assert len(members) == s["n"]
        assert s["share"] == pytest.approx(s["n"] / len(a))
        assert s["examples"][0] == s["medoid"]
        assert len(s["examples"]) == min(6, s["n"]) == len(set(s["examples"]))
        nearest = members.sort_values("distance")["distance"].head(6)
        assert members.set_index("clip_id").loc[s["examples"], "distance"].tolist() == nearest.tolist()
        assert t[t["skill"] == s["skill"]]["share_of_skill"].sum() == pytest.approx(1.0)
    for _, rows in t.groupby("label", dropna=False):
        assert rows["share_of_label"].sum() == pytest.approx(1.0)
    counted = duckdb.sql(
        f"""select skill, count(*) n from '{folder}/assignment.parquet' a
            join '{folder}/centroids.parquet' c using (skill) group by skill order by skill"""
    ).fetchall()
    assert [n for _, n in counted] == sizes


def test_separated_groups_become_skills_largest_first(tmp_path: Path) -> None:
    x, truth = blobs((30, 50, 20))
    run = make_run(tmp_path, {"hand_motion": x})
    body = cluster(run, skills(k=3), seed=1)
    check_consistent(run, body)
    assert [s["n"] for s in body["skills"]] == [50, 30, 20]
    found = frame(run, "assignment").set_index("clip_id")["skill"].loc[ids(len(x))]
    assert adjusted_rand_score(truth, found) == 1.0
    assert {
        k: body[k] for k in ("embedding", "weights", "random", "k", "requested_k", "n_clips", "seed")
    } == {
        "embedding": "hand_motion",
        "weights": "weights-of-hand_motion",
        "random": False,
        "k": 3,
        "requested_k": 3,
        "n_clips": 100,
        "seed": 1,
    }
    assert body["silhouette"] > 0.8
    assert body["stability"] == 1.0
    assert body["imbalance"] == pytest.approx(50 / (100 / 3))
    assert body["warnings"] == []
    assert [s["name"] for s in body["skills"]] == ["skill 0", "skill 1", "skill 2"]
    stored = x.astype(np.float16).astype(np.float32)
    for skill, centroid in enumerate(frame(run, "centroids")["centroid"]):
        members = stored[(found == skill).to_numpy()]
        np.testing.assert_allclose(centroid, members.mean(axis=0), rtol=1e-3, atol=1e-3)
        # the medoid is the member with the smallest sum of squared distances to the others
        sums = ((members[:, None] - members[None]) ** 2).sum(axis=(1, 2))
        medoid = np.array(ids(len(x)))[(found == skill).to_numpy()][sums.argmin()]
        assert body["skills"][skill]["medoid"] == medoid


def test_order_and_parts_of_the_run_do_not_matter(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(90, 10)).astype(np.float32)
    labels = [["a", "b", None][i % 3] for i in range(90)]
    bodies, tables = [], []
    for run_index, n_parts in enumerate((1, 4, 7)):
        order = np.random.default_rng(run_index).permutation(90).tolist()
        run = make_run(tmp_path / str(run_index), {"clip": x}, labels, order=order, n_parts=n_parts)
        bodies.append(cluster(run, skills(k=7, projections=["tsne"]), seed=3))
        tables.append([pq.read_table(run.path / "skills" / f"{n}.parquet") for n in ("assignment", "table")])
    assert bodies[0] == bodies[1] == bodies[2]
    assert tables[0] == tables[1] == tables[2]
    other = make_run(tmp_path / "seed", {"clip": x}, labels)
    assert cluster(other, skills(k=7), seed=4)["inertia"] != bodies[0]["inertia"]


def test_a_second_call_replaces_the_first(tmp_path: Path) -> None:
    x, _ = blobs()
    run = make_run(tmp_path, {"clip": x})
    cluster(run, skills(k=5, projections=["tsne"]), seed=1)
    body = cluster(run, skills(k=2), seed=1)
    check_consistent(run, body)
    assert body["k"] == 2
    assert frame(run, "assignment")["tsne_x"].isna().all()


def test_an_interrupted_call_leaves_no_skills_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = blobs()
    run = make_run(tmp_path, {"clip": x})
    cluster(run, skills(k=5), seed=1)
    write = atomic.write_parquet

    def full_disk(path: Path, rows: pa.Table) -> None:
        if path.name == "centroids.parquet":
            raise OSError(28, "No space left on device")
        write(path, rows)

    monkeypatch.setattr(atomic, "write_parquet", full_disk)
    with pytest.raises(OSError, match="No space"):
        cluster(run, skills(k=2), seed=1)
    assert run.skills() is None
    monkeypatch.undo()
    check_consistent(run, cluster(run, skills(k=2), seed=1))


def test_labels_name_the_skills_and_fill_the_table(tmp_path: Path) -> None:
    x, truth = blobs((40, 30, 20, 10))
    kinds = ["wiping", "wiping", "packaging", None]
    labels = [kinds[t] for t in truth]
    of = {t: np.flatnonzero(truth == t) for t in range(4)}
    for i in of[0][:10]:
        labels[i] = "packaging"
    for i in of[2][:8]:
        labels[i] = None
    run = make_run(tmp_path, {"clip": x}, labels)
    body = cluster(run, skills(k=4), seed=1)
    check_consistent(run, body)
    assert [(s["name"], s["n"], s["label"], s["label_share"]) for s in body["skills"]] == [
        ("wiping #1", 40, "wiping", pytest.approx(0.75)),
        ("wiping #2", 30, "wiping", pytest.approx(1.0)),
        ("packaging", 20, "packaging", pytest.approx(0.6)),
        ("skill 3", 10, None, None),
    ]
    rows = pq.read_table(run.path / "skills" / "table.parquet").to_pylist()
    assert [(r["label"], r["skill"], r["n"]) for r in rows] == [
        ("packaging", 0, 10),
        ("packaging", 2, 12),
        ("wiping", 0, 30),
        ("wiping", 1, 30),
        (None, 2, 8),
        (None, 3, 10),
    ]
    assert rows[0]["share_of_label"] == pytest.approx(10 / 22)
    assert rows[0]["share_of_skill"] == pytest.approx(10 / 40)


def test_equally_frequent_labels_go_by_the_alphabet() -> None:
    pairs = table.hierarchy(["b", "a", "b", "a", None], np.zeros(5, np.int64))
    assert table.top_labels(pairs, 1) == [table.SkillLabel("a", 0.4)]


@pytest.mark.parametrize(
    ("present", "random", "chosen", "warned"),
    [
        (["videomae", "clip", "hand_motion"], [], "videomae", False),
        (["videomae", "clip", "hand_motion"], ["videomae"], "clip", False),
        (["videomae", "clip", "hand_motion"], ["videomae", "clip"], "hand_motion", False),
        (["clip", "hand_motion"], ["clip"], "hand_motion", False),
        (["videomae", "clip"], ["videomae", "clip"], "videomae", True),
    ],
)
def test_auto_takes_the_first_embedding_that_is_not_random(
    tmp_path: Path, present: list[str], random: list[str], chosen: str, warned: bool
) -> None:
    x, _ = blobs()
    run = make_run(tmp_path, dict.fromkeys(present, x), random=random)
    body = cluster(run, skills(k=3), seed=1)
    assert body["embedding"] == chosen
    assert body["random"] is warned
    assert any("random weights" in w for w in body["warnings"]) is warned


def test_random_weights_that_were_asked_for_are_called_random(tmp_path: Path) -> None:
    x, _ = blobs()
    labels = ["wiping"] * len(x)
    run = make_run(tmp_path, {"clip": x, "hand_motion": x}, labels, random=["clip"])
    body = cluster(run, skills(k=3, embedding="clip"), seed=1)
    assert body["random"]
    assert any("clip has random weights" in w for w in body["warnings"])
    # labels come from the same weights: they name nothing, by whatever the clips were grouped
    body = cluster(run, skills(k=3, embedding="hand_motion"), seed=1)
    assert not body["random"]
    assert body["labels_random"]
    assert [s["name"] for s in body["skills"]] == ["skill 0", "skill 1", "skill 2"]
    assert any("labels come from random CLIP weights" in w for w in body["warnings"])


def test_an_embedding_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"clip": blobs()[0]})
    with pytest.raises(UserError, match=r"no videomae embeddings \(it has clip\)") as caught:
        cluster(run, skills(embedding="videomae"), seed=1)
    assert "\n" not in str(caught.value)
    assert not (run.path / "skills").exists()


@pytest.mark.parametrize("embedding", ["auto", "videomae"])
def test_nothing_kept_gives_valid_empty_outputs(tmp_path: Path, embedding: str) -> None:
    run = make_run(tmp_path, {}, n_kept=0, n_dropped=3, n_parts=1)
    body = cluster(run, skills(k=4, embedding=embedding, projections=["tsne", "umap"]), seed=1)
    check_consistent(run, body)
    assert (body["k"], body["requested_k"], body["n_clips"], body["skills"]) == (0, 4, 0, [])
    assert body["silhouette"] is None
    assert body["warnings"] == ["no clip was kept: there is nothing to cluster"]


def test_a_run_without_clips_and_one_without_embeddings_are_empty_too(tmp_path: Path) -> None:
    empty = RunDir.create_or_resume(tmp_path / "a", config.build({"device": "cpu"}), {})
    check_consistent(empty, cluster(empty, skills(), seed=1))
    off = make_run(tmp_path / "b", {}, n_kept=5)
    body = cluster(off, skills(), seed=1)
    check_consistent(off, body)
    assert "no embeddings" in body["warnings"][0]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_fewer_clips_than_k(tmp_path: Path, n: int) -> None:
    x = np.random.default_rng(n).normal(size=(n, 6)).astype(np.float32)
    run = make_run(tmp_path, {"clip": x}, n_parts=1)
    body = cluster(run, skills(k=10, projections=["tsne"]), seed=1)
    check_consistent(run, body)
    assert body["k"] == n
    assert body["requested_k"] == 10
    assert any("skills.k=10" in w and f"k={n}" in w for w in body["warnings"])
    assert body["silhouette"] is None
    assert body["stability"] is None
    assert body["projections"] == ["tsne"]
    assert np.isfinite(frame(run, "assignment")[["tsne_x", "tsne_y"]]).all(axis=None)


def test_vectors_that_are_all_the_same_are_one_skill(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"clip": np.full((40, 6), 0.1)})
    body = cluster(run, skills(k=5, projections=["tsne", "umap"]), seed=1)
    check_consistent(run, body)
    assert body["k"] == 1
    assert any("only 1 different vector" in w for w in body["warnings"])
    assert not frame(run, "assignment")[["tsne_x", "tsne_y", "umap_x", "umap_y"]].any(axis=None)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_name_their_clips(tmp_path: Path, bad: float) -> None:
    x, _ = blobs()
    x[[4, 9], 2] = bad
    run = make_run(tmp_path, {"clip": x})
    with pytest.raises(UserError, match="not finite") as caught:
        cluster(run, skills(), seed=1)
    named = {i for i in ids(len(x)) if i in str(caught.value)}
    assert named == {ids(10)[4], ids(10)[9]}
    assert "\n" not in str(caught.value)


def test_a_missing_vector_and_a_clip_that_occurs_twice_are_errors(tmp_path: Path) -> None:
    x, _ = blobs()
    run = make_run(tmp_path, {"clip": x})
    kind = schema.embedding(8, "clip", "w", False)

    def add(unit: str, clip: str, vector: list[float] | None) -> None:
        rows = pa.Table.from_pylist([{"clip_id": clip, "embedding": vector}], schema=kind)
        run.commit([unit], {"embeddings/clip": rows})

    add("again", ids(8)[7], [0.0] * 8)
    with pytest.raises(UserError, match=f"occur twice: {ids(8)[7]}; see `ego2robot verify"):
        cluster(run, skills(), seed=1)
    other = make_run(tmp_path / "b", {"clip": x})
    run = other
    add("null", "0" * 16, None)
    with pytest.raises(UserError, match="clips 0000000000000000"):
        cluster(run, skills(), seed=1)


def test_kept_clips_without_a_vector_are_told(tmp_path: Path) -> None:
    x, _ = blobs()
    run = make_run(tmp_path, {"clip": x, "hand_motion": x[:90]})
    body = cluster(run, skills(k=3, embedding="hand_motion"), seed=1)
    check_consistent(run, body)
    assert body["n_clips"] == 90
    assert "10 of 100 kept clips have no hand_motion embedding" in body["warnings"][0]


def test_progress_tells_what_begins(tmp_path: Path) -> None:
    told: list[str] = []
    cluster(make_run(tmp_path, {"clip": blobs()[0]}), skills(k=3), seed=1, progress=told.append)
    assert told[0] == "k-means of 100 clip embeddings"
    assert told[-3:] == ["quality of the clusters", "projection", "writing"]


# -- quality ---------------------------------------------------------------------------------------


def test_silhouette_is_scikit_learns_and_sampled_beyond_5000_rows() -> None:
    x, truth = blobs()
    assert silhouette_of(x, truth, 0) == pytest.approx(silhouette_score(x, truth))
    many, labels = blobs((3000, 2500, 1500), dim=3)
    sampled = silhouette_of(many, labels, 0)
    assert sampled == silhouette_of(many, labels, 0)
    assert sampled == pytest.approx(silhouette_score(many, labels), abs=0.01)
    assert silhouette_of(x, np.zeros(len(x), int), 0) is None
    assert silhouette_of(x, np.arange(len(x)), 0) is None


def test_stability_separates_structure_from_noise() -> None:
    x, _ = blobs()
    noise = np.random.default_rng(0).normal(size=(400, 16)).astype(np.float32)
    assert stability_of(x, 3, seed=0) == 1.0
    assert 0.0 < stability_of(noise, 12, seed=0) < 0.6


# -- projection ------------------------------------------------------------------------------------


def neighbours_agree(plane: np.ndarray, truth: np.ndarray) -> float:
    """Share of points whose nearest neighbour on the plane is of their own group."""
    distance = np.linalg.norm(plane[:, None] - plane[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    return float((truth[distance.argmin(axis=1)] == truth).mean())


def test_projections_keep_groups_together_and_repeat(tmp_path: Path) -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed")
    x, truth = blobs((40, 40, 40), dim=64)
    run = make_run(tmp_path, {"clip": x})
    body = cluster(run, skills(k=3, projections=["tsne", "umap"]), seed=1)
    check_consistent(run, body)
    assert body["projections"] == ["tsne", "umap"]
    first = frame(run, "assignment")
    found = first.set_index("clip_id").loc[ids(len(x))]
    for method in ("tsne", "umap"):
        plane = found[[f"{method}_x", f"{method}_y"]].to_numpy()
        assert np.isfinite(plane).all()
        assert neighbours_agree(plane, truth) == 1.0
    cluster(run, skills(k=3, projections=["tsne", "umap"]), seed=1)
    pd.testing.assert_frame_equal(first, frame(run, "assignment"))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("dim", [1, 2, 80])
def test_small_and_thin_data_project_to_finite_points(n: int, dim: int) -> None:
    x = np.random.default_rng(n).normal(size=(n, dim)).astype(np.float32)
    found = projection.project(x, ("tsne", "umap"), seed=0)
    assert "tsne" in found.points
    for plane in found.points.values():
        assert plane.shape == (n, 2)
        assert plane.dtype == np.float32
        assert np.isfinite(plane).all()
    if n == 3 and dim == 2:  # by PCA: distances are kept
        plane = found.points["tsne"]
        np.testing.assert_allclose(
            np.linalg.norm(plane[0] - plane[1]), np.linalg.norm(x[0] - x[1]), rtol=1e-4
        )


def test_beyond_the_limit_a_sample_is_projected_and_the_rest_is_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "MAX_POINTS", 60)
    run = make_run(tmp_path, {"clip": blobs()[0]})
    body = cluster(run, skills(k=3, projections=["tsne"]), seed=1)
    check_consistent(run, body)
    assert body["warnings"] == ["the projection shows 60 of 100 clips, drawn with the seed"]
    rows = pq.read_table(run.path / "skills" / "assignment.parquet")
    assert rows["tsne_x"].null_count == rows["tsne_y"].null_count == 40
    assert rows["umap_x"].null_count == 100
    assert not pc.any(pc.is_nan(rows["tsne_x"])).as_py()


def test_without_umap_learn_there_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    run = make_run(tmp_path, {"clip": blobs()[0]})
    body = cluster(run, skills(k=3, projections=["tsne", "umap"]), seed=1)
    check_consistent(run, body)
    assert body["projections"] == ["tsne"]
    assert any("no UMAP" in w and "pip install umap-learn" in w for w in body["warnings"])


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_pca_is_scikit_learns_up_to_sign(shape: tuple[int, int]) -> None:
    from sklearn.decomposition import PCA

    x = np.random.default_rng(0).normal(size=shape).astype(np.float32) + 5
    ours = projection.pca(x, 4)
    theirs = PCA(4, svd_solver="full").fit_transform(x.astype(np.float64))
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-4)
