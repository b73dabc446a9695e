"""Clustering out of core: the same from a part of memory, of the files or of the shards."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from ego2robot.errors import UserError
from ego2robot.skills import Shard, assignment, cluster, cluster_shard, duplicates, projection, vectors
from ego2robot.skills.assignment import Fit, Work, assign_rows
from ego2robot.skills.kmeans import kmeans, nearest_by
from ego2robot.skills.vectors import Vectors, hashed, sample
from ego2robot.store.rundir import RunDir
from tests.test_skills import (  # noqa: F401  # one_thread is a fixture
    blobs,
    check_consistent,
    frame,
    ids,
    make_run,
    one_thread,
    skills,
)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "UNIT_ROWS", 64)


def tables(run: RunDir) -> dict[str, pa.Table]:
    return {path.name: pq.read_table(path) for path in sorted((run.path / "skills").glob("*.parquet"))}


def noisy(n: int = 1500, dim: int = 16, seed: int = 0) -> np.ndarray:
    """Groups of unequal size that overlap, with some near-duplicates."""
    rng = np.random.default_rng(seed)
    sizes = rng.multinomial(n, rng.dirichlet(np.full(9, 0.7)))
    centers = rng.normal(size=(9, dim))
    x = np.repeat(centers, sizes, axis=0) + rng.normal(scale=0.6, size=(n, dim))
    x[1::10] = x[::10][: len(x[1::10])] + rng.normal(scale=1e-3, size=x[1::10].shape)
    return x.astype(np.float32)


# -- reading ---------------------------------------------------------------------------------------


def test_units_hold_every_row_once_whatever_the_files(tmp_path: Path, small_units: None) -> None:
    x = noisy(500)
    run = make_run(tmp_path, {"clip": x}, n_parts=13)
    found = Vectors.of_run(run, "clip")
    assert found.rows == 500
    assert all(unit.rows <= 64 for unit in found.units)
    assert len(found.units) > 3
    blocks = list(found.read())
    assert [block.unit.index for block in blocks] == list(range(len(found.units)))
    of = {c: x for block in blocks for c, x in zip(block.clip_ids.to_pylist(), block.x_ND, strict=True)}
    assert len(of) == 500
    for clip, row in zip(ids(500), x, strict=True):
        np.testing.assert_array_equal(of[clip].numpy(), row.astype(np.float16))
    with pytest.raises(KeyError):
        Vectors.of_run(run, "videomae")


def test_large_files_are_read_by_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "FILE_ROWS", 100)
    monkeypatch.setattr(vectors, "UNIT_ROWS", 64)
    x = np.arange(1000, dtype=np.float16).reshape(250, 4)
    column = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 4)
    rows = pa.table({"clip_id": ids(250), "embedding": column})
    pq.write_table(rows, tmp_path / "part-a.parquet", row_group_size=50)
    found = Vectors([(tmp_path / "part-a.parquet", 250, "")])
    assert [unit.rows for unit in found.units] == [50] * 5
    read = torch.cat([block.x_ND for block in found.read()]).numpy()
    np.testing.assert_array_equal(read, x)
    np.testing.assert_array_equal(found.vector(ids(250)[177]).numpy(), x[177])
    assert found.vector("0" * 16) is None


def test_a_sample_is_within_both_budgets_and_the_same_for_every_layout(
    tmp_path: Path, small_units: None
) -> None:
    x = noisy(600)
    runs = [
        make_run(
            tmp_path / str(i),
            {"clip": x},
            n_parts=n,
            order=np.random.default_rng(i).permutation(600).tolist(),
        )
        for i, n in enumerate((1, 7, 20))
    ]
    for max_rows, max_bytes, expected in ((100, 1 << 30, 100), (500, 2 * 16 * 70, 70), (10**6, 1 << 30, 600)):
        drawn = [sample(Vectors.of_run(run, "clip"), max_rows, max_bytes, seed=3) for run in runs]
        assert [len(one.clip_ids) for one in drawn] == [expected] * 3
        assert drawn[0].clip_ids.equals(drawn[1].clip_ids)
        assert drawn[0].clip_ids.equals(drawn[2].clip_ids)
        assert drawn[0].clip_ids.to_pylist() == sorted(drawn[0].clip_ids.to_pylist())
        of = dict(zip(ids(600), x.astype(np.float16), strict=True))
        for one in drawn:
            for clip, row in zip(one.clip_ids.to_pylist(), one.x_ND.numpy(), strict=True):
                np.testing.assert_array_equal(row, of[clip])
        assert drawn[0].whole is (expected == 600)
    again = sample(Vectors.of_run(runs[0], "clip"), 100, 1 << 30, seed=4)
    assert not again.clip_ids.equals(sample(Vectors.of_run(runs[0], "clip"), 100, 1 << 30, seed=3).clip_ids)


def test_hashes_depend_on_each_id_alone_and_are_even() -> None:
    names = pa.array(ids(4000))
    whole = hashed(names, 5)
    np.testing.assert_array_equal(hashed(names[100:200], 5), whole[100:200])
    assert len(np.unique(whole)) == 4000
    assert abs(float((whole < np.uint64(1 << 63)).mean()) - 0.5) < 0.04
    odd = pa.array(["", "a", "b", "ä" * 9, "a" * 40])  # other people's ids, of any length
    assert len(np.unique(hashed(odd, 0))) == 5
    assert (hashed(odd, 0) != hashed(odd, 1)).all()


# -- the same result -------------------------------------------------------------------------------


SETTINGS: dict[str, Any] = {"k": 9, "also_k": [4, 20], "duplicate_cosine": 0.999, "sample_rows": 1000}


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_one_or_eight_shards_or_other_files_give_the_same_tables(
    tmp_path: Path, small_units: None, metric: str
) -> None:
    x, labels = noisy(), [["a", "b", None][i % 3] for i in range(1500)]
    settings = skills(**SETTINGS, metric=metric)
    one = make_run(tmp_path / "one", {"clip": x}, labels, n_parts=40)
    body = cluster(one, settings, seed=3)
    assert body["sample"] == 1000
    assert body["n_clips"] == 1500
    assert [further["k"] for further in body["also"]] == [4, 20]

    eight = make_run(tmp_path / "eight", {"clip": x}, labels, n_parts=40)
    left = [cluster_shard(eight, settings, 3, Shard(i, 8)) for i in (3, 0, 7, 1, 6, 2, 5, 4)]
    assert left == sorted(left, reverse=True)
    assert left[0] > 0
    assert [cluster_shard(eight, settings, 3, Shard(i, 8)) for i in range(8)][-1] == 0  # duplicates too
    work = next((eight.path / "skills").glob("work-*"))
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    assert cluster_shard(eight, settings, 3, Shard(2, 8)) == 0
    assert before == {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    assert cluster(eight, settings, seed=3) == body
    assert tables(eight) == tables(one)
    assert not list((eight.path / "skills").glob("work-*"))

    shuffled = np.random.default_rng(1).permutation(1500).tolist()
    other = make_run(tmp_path / "other", {"clip": x}, labels, n_parts=11, order=shuffled)
    assert cluster(other, settings, seed=3) == body
    assert tables(other) == tables(one)


def test_numbers_of_clusters_found_together_are_those_found_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"clip": noisy()})
    together = cluster(run, skills(**SETTINGS), seed=3)
    wide, small = frame(run, "assignment"), frame(run, "centroids_k20")
    alone = cluster(run, skills(**SETTINGS | {"k": 20, "also_k": []}), seed=3)
    assert not (run.path / "skills" / "centroids_k20.parquet").exists()
    found = frame(run, "assignment")
    assert wide["skill_k20"].tolist() == found["skill"].tolist()
    np.testing.assert_allclose(wide["distance_k20"], found["distance"], rtol=1e-5)
    assert np.stack(small["centroid"]).tolist() == np.stack(frame(run, "centroids")["centroid"]).tolist()
    further = together["also"][1]
    assert (further["k"], further["requested_k"]) == (20, 20)
    assert [further[key] for key in ("inertia", "silhouette", "imbalance")] == pytest.approx(
        [alone[key] for key in ("inertia", "silhouette", "imbalance")], rel=1e-6
    )


def test_distances_are_to_the_nearest_centroid_of_each_number(tmp_path: Path, small_units: None) -> None:
    x = noisy()
    run = make_run(tmp_path, {"clip": x}, n_parts=9)
    cluster(run, skills(**SETTINGS), seed=3)
    found = frame(run, "assignment").set_index("clip_id").loc[ids(1500)]
    stored = x.astype(np.float16).astype(np.float64)
    for suffix in ("", "_k4", "_k20"):
        centroids = np.stack(frame(run, f"centroids{suffix}")["centroid"]).astype(np.float64)
        exact = np.linalg.norm(stored[:, None] - centroids[None], axis=2)
        assert found[f"skill{suffix}"].tolist() == exact.argmin(axis=1).tolist()
        np.testing.assert_allclose(found[f"distance{suffix}"], exact.min(axis=1), rtol=1e-5)


def test_a_sample_finds_nearly_what_all_rows_would(tmp_path: Path, small_units: None) -> None:
    run = make_run(tmp_path, {"clip": noisy(6000)}, n_parts=7)
    part = cluster(run, skills(k=9, restarts=10, sample_rows=2000, duplicate_cosine=None), seed=3)
    whole = cluster(run, skills(k=9, restarts=10, duplicate_cosine=None), seed=3)
    assert (part["sample"], whole["sample"]) == (2000, 6000)
    assert whole["inertia"] <= part["inertia"] <= 1.02 * whole["inertia"]
    assert part["n_clips"] == 6000 == sum(skill["n"] for skill in part["skills"])


def test_spherical_clusters_look_at_directions_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(12, 12)))[0][:4]
    truth = np.arange(400) % 4
    x = (directions[truth] + rng.normal(scale=0.05, size=(400, 12))) * rng.uniform(0.01, 100, size=(400, 1))
    run = make_run(tmp_path, {"clip": x.astype(np.float32)})
    body = cluster(run, skills(k=4, metric="cosine"), seed=1)
    check_consistent(run, body)
    assert body["metric"] == "cosine"
    found = frame(run, "assignment").set_index("clip_id")["skill"].loc[ids(400)]
    assert adjusted_rand_score(truth, found) == 1.0
    centroids = np.stack(frame(run, "centroids")["centroid"])
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1.0, rtol=1e-5)
    stored = x.astype(np.float16).astype(np.float64)
    cosine = (stored / np.linalg.norm(stored, axis=1, keepdims=True) * centroids[found]).sum(axis=1)
    distance = frame(run, "assignment").set_index("clip_id")["distance"].loc[ids(400)]
    np.testing.assert_allclose(distance, np.sqrt(2 - 2 * cosine), atol=1e-3)


def test_equally_near_centroids_give_the_first_for_every_grouping_of_rows() -> None:
    """Rows half way between two centroids far from the origin: float32 products cannot tell, in any order."""
    rng = np.random.default_rng(0)
    middle = rng.normal(size=(200, 64)) + 300
    step = np.zeros(64)
    step[3] = 0.5
    centroids = np.concatenate([middle - step, middle + step]).astype(np.float32)
    x = torch.from_numpy(middle.astype(np.float32))
    fit = Fit("euclidean", (centroids,), {})
    labels, distances = assign_rows(x, fit, "cpu")[0]
    exact = np.linalg.norm(middle.astype(np.float32)[:, None].astype(float) - centroids[None], axis=2)
    np.testing.assert_allclose(exact[np.arange(200), labels], exact.min(axis=1), rtol=1e-4)
    for rows in (1, 7, 64):
        parts = [assign_rows(part, fit, "cpu")[0] for part in x.split(rows)]
        np.testing.assert_array_equal(np.concatenate([a for a, _ in parts]), labels)
        np.testing.assert_array_equal(np.concatenate([b for _, b in parts]), distances)


# -- killed, shared, stale -------------------------------------------------------------------------


def _shard(path: Path, index: int, die_after: int | None) -> None:
    torch.set_num_threads(1)
    vectors.UNIT_ROWS = 64
    if die_after is not None:
        write = assignment.atomic.write
        done = 0

        def dying(target: Path, fill: Any) -> None:
            nonlocal done
            if target.name.startswith("unit-"):
                if done == die_after:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1
            write(target, fill)

        assignment.atomic.write = dying
    cluster_shard(RunDir.open(path), skills(**SETTINGS), 3, Shard(index, 2))


@pytest.mark.slow
def test_shards_that_run_at_once_and_are_killed_end_with_the_same_tables(
    tmp_path: Path, small_units: None
) -> None:
    x = noisy()
    expected = make_run(tmp_path / "a", {"clip": x}, n_parts=40)
    body = cluster(expected, skills(**SETTINGS), seed=3)
    run = make_run(tmp_path / "b", {"clip": x}, n_parts=40)
    context = multiprocessing.get_context("spawn")
    for deaths in ((2, None), (None, None)):
        jobs = [context.Process(target=_shard, args=(run.path, i, death)) for i, death in enumerate(deaths)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(120)
        codes = [job.exitcode for job in jobs]
        assert codes == [-signal.SIGKILL if death is not None else 0 for death in deaths]
    assert cluster(run, skills(**SETTINGS), seed=3) == body
    assert tables(run) == tables(expected)
    assert not list((run.path / "skills").glob("**/.tmp-*"))


def test_the_first_centroids_that_are_published_are_everybodys(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"clip": noisy(200)})
    work = Work(tmp_path / "work", Vectors.of_run(run, "clip"), True, "cpu")
    first = Fit("euclidean", (np.ones((2, 16), np.float32), np.zeros((3, 16), np.float32)), {"x": 1})
    assert work.fit() is None
    assert work.publish(first).about == {"x": 1}
    second = work.publish(Fit("euclidean", (np.full((5, 16), 7, np.float32),), {"x": 2}))
    assert second.about == {"x": 1}
    assert [c.tolist() for c in second.centroids] == [c.tolist() for c in first.centroids]
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["fit.parquet"]


def test_work_for_other_vectors_or_settings_is_not_used(tmp_path: Path, small_units: None) -> None:
    x = noisy(400)
    run = make_run(tmp_path / "a", {"clip": x})
    cluster_shard(run, skills(k=5), 1, Shard(0, 2))
    cluster_shard(run, skills(k=6), 1, Shard(0, 2))
    cluster_shard(run, skills(k=5), 2, Shard(0, 2))
    assert len(list((run.path / "skills").glob("work-*"))) == 3
    later = make_run(tmp_path / "b", {"clip": x[:399]})
    shutil.copytree(run.path / "skills", later.path / "skills")
    assert cluster(later, skills(k=5), seed=1)["n_clips"] == 399
    check_consistent(later, later.skills() or {})


@pytest.mark.parametrize("text", ["8/8", "1", "a/2", "-1/2", "1/0", "1/", "²/3"])
def test_a_wrong_shard_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="should be I/N"):
        Shard.parse(text)
    assert Shard.parse("7/8") == Shard(7, 8)


# -- near-duplicates -------------------------------------------------------------------------------


def greedy(x: np.ndarray, threshold: float) -> list[int]:
    """The definition, one pair at a time."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    unit = np.divide(x, length, out=np.zeros_like(x), where=length > 0)
    group: list[int] = []
    for i in range(len(x)):
        near = [j for j in range(i) if group[j] == j and unit[i] @ unit[j] >= threshold]
        group.append(near[0] if near else i)
    return group


@pytest.mark.parametrize("block", [7, 64, 1000])
@pytest.mark.parametrize("threshold", [0.7, 0.95, 0.999])
def test_blocks_of_any_size_give_the_groups_of_the_definition(
    tmp_path: Path, block: int, threshold: float
) -> None:
    x = noisy(300, dim=96).astype(np.float16)
    x[5] = 0  # no direction: like nothing, not even another
    x[77] = 0
    group, cosine = duplicates.groups(lambda a, b: x[a:b], 300, threshold, scratch=tmp_path, block=block)
    assert group.tolist() == greedy(x.astype(np.float64), threshold)
    own = group == np.arange(300)
    assert cosine[own].tolist() == [1.0] * int(own.sum())
    wide = x.astype(np.float64)
    for i in np.flatnonzero(~own):
        exact = wide[i] @ wide[group[i]] / np.linalg.norm(wide[i]) / np.linalg.norm(wide[group[i]])
        assert cosine[i] == pytest.approx(exact, abs=1e-5)
        assert exact >= threshold - 1e-5
    assert not list(tmp_path.iterdir())


def test_a_chain_of_look_alikes_does_not_join_its_ends() -> None:
    angles = np.radians(np.arange(0, 90, 2.0))
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    group, _ = duplicates.groups(lambda a, b: x[a:b], len(x), float(np.cos(np.radians(5))))
    assert group.tolist() == [i - i % 3 for i in range(len(x))]


def test_the_clip_with_more_hands_then_more_motion_stands_for_its_duplicates(
    tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "BLOCK", 16)
    base = np.eye(8, dtype=np.float32).repeat(30, axis=0)  # 30 clips of each of 8 directions
    rng = np.random.default_rng(0)
    x = base + rng.normal(scale=1e-3, size=base.shape).astype(np.float32)
    hands, motion = rng.integers(3, size=240) / 2, rng.random(240)
    run = make_run(tmp_path, {"clip": x}, n_parts=6)
    for path in (run.path / "clips").glob("*.parquet"):  # as if the gate had measured them
        rows = pq.read_table(path)
        at = [ids(240).index(c) if c in ids(240) else 0 for c in rows["clip_id"].to_pylist()]
        rows = rows.set_column(
            rows.schema.get_field_index("hand_visibility"),
            "hand_visibility",
            pa.array(hands[at], pa.float32()),
        )
        rows = rows.set_column(
            rows.schema.get_field_index("motion"), "motion", pa.array(motion[at], pa.float32())
        )
        pq.write_table(rows, path)
    body = cluster(run, skills(k=3, duplicate_cosine=0.99), seed=1)
    assert body["duplicates"] == {"cosine": 0.99, "groups": 8, "clips": 232}
    found = frame(run, "assignment").set_index("clip_id").loc[ids(240)].reset_index()
    for direction in range(8):
        members = range(30 * direction, 30 * direction + 30)
        best = max(members, key=lambda i: (hands[i], motion[i]))
        rows = found.iloc[list(members)]
        assert set(rows["duplicate_group"]) == {ids(240)[best]}
        assert rows[rows["representative"]]["clip_id"].tolist() == [ids(240)[best]]
        assert rows[rows["representative"]]["duplicate_cosine"].isna().all()
        assert (rows[~rows["representative"]]["duplicate_cosine"] > 0.99).all()


def test_without_a_threshold_no_duplicates_are_looked_for(tmp_path: Path) -> None:
    x = np.repeat(blobs()[0][:50], 2, axis=0)
    run = make_run(tmp_path, {"clip": x})
    body = cluster(run, skills(k=3, duplicate_cosine=None), seed=1)
    assert body["duplicates"] is None
    found = frame(run, "assignment")
    assert found["representative"].all()
    assert found["duplicate_group"].isna().all()
    body = cluster(run, skills(k=3, duplicate_cosine=1.0), seed=1)  # copies alone
    assert body["duplicates"]["clips"] == 50
    pairs = frame(run, "assignment").groupby("duplicate_group")["clip_id"].count()
    assert pairs.tolist() == [2] * 50


# -- joins -----------------------------------------------------------------------------------------


def test_labels_are_found_where_vectors_and_clips_are_not_in_parts_of_one_name(tmp_path: Path) -> None:
    x, truth = blobs((40, 30, 20))
    labels = [["wiping", "packaging", None][t] for t in truth]
    run = make_run(tmp_path, {"clip": x}, labels)
    expected = cluster(run, skills(k=3), seed=1)
    rewritten = make_run(tmp_path / "b", {}, labels, n_kept=len(x), n_parts=2)
    vectors_of = pa.concat_tables([pq.read_table(p) for p in (run.path / "embeddings" / "clip").glob("*")])
    rewritten.commit(["elsewhere"], {"embeddings/clip": vectors_of})
    assert cluster(rewritten, skills(k=3), seed=1) == expected
    assert tables(rewritten) == tables(run)


def test_the_table_is_written_in_ranges_of_ids(
    tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = noisy(900)
    run = make_run(tmp_path, {"clip": x}, n_parts=5)
    expected = cluster(run, skills(k=4, projections=["tsne"]), seed=1)
    whole = frame(run, "assignment")
    monkeypatch.setattr(sys.modules["ego2robot.skills.cluster"], "MERGE_ROWS", 100)
    body = cluster(run, skills(k=4, projections=["tsne"]), seed=1)
    assert pq.ParquetFile(run.path / "skills" / "assignment.parquet").num_row_groups == 9
    pd.testing.assert_frame_equal(frame(run, "assignment"), whole)
    assert body["inertia"] == pytest.approx(expected["inertia"], rel=1e-12)


# -- where there is a GPU --------------------------------------------------------------------------


class FakeManifold:
    """cuML on a machine whose driver is too old: imports, and fails when it is used."""

    def __init__(self, **settings: Any) -> None:
        assert settings["output_type"] == "numpy"

    def fit_transform(self, x: np.ndarray) -> np.ndarray:
        raise RuntimeError("CUDA error: no device\nat line 3")


def test_cuml_that_fails_when_used_costs_a_warning_not_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("cuml.manifold")
    fake.TSNE = fake.UMAP = FakeManifold  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuml", types.ModuleType("cuml"))
    monkeypatch.setitem(sys.modules, "cuml.manifold", fake)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = projection.project(noisy(30), ("tsne",), 0, device="cuda")
    assert np.isfinite(found.points["tsne"]).all()
    assert found.warnings == ["cuML's t-SNE failed (CUDA error: no device); the CPU's was used"]
    here = projection.project(noisy(30), ("tsne",), 0, device="cpu")  # there it is not even asked
    assert here.warnings == []
    np.testing.assert_array_equal(here.points["tsne"], found.points["tsne"])


def test_faiss_without_a_gpu_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="faiss is not installed")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"(without GPUs|sees no GPU); pip install faiss-gpu"):
        nearest_by("faiss", 10, "cuda")
    assert nearest_by("auto", 1000, "cuda")[0] == "torch"
    with pytest.raises(UserError, match="has no metric=cosine"):
        nearest_by("cuml", 10, "cuda", "cosine")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_gpu_gives_the_clusters_and_groups_of_the_cpu(
    tmp_path: Path, small_units: None, metric: str
) -> None:
    x = noisy()
    settings = skills(k=9, restarts=10, metric=metric, duplicate_cosine=0.999)
    bodies, found = [], []
    for device in ("cpu", "cuda"):
        run = make_run(tmp_path / device, {"clip": x}, n_parts=9, settings={"device": device})
        bodies.append(cluster(run, settings, seed=3))
        found.append(frame(run, "assignment"))
    assert bodies[1]["inertia"] == pytest.approx(bodies[0]["inertia"], rel=5e-3)
    assert adjusted_rand_score(found[0]["skill"], found[1]["skill"]) > 0.98
    group = [
        duplicates.groups(lambda a, b: x[a:b], len(x), 0.9, device, tmp_path, 100)[0]
        for device in ("cpu", "cuda")
    ]
    np.testing.assert_array_equal(*group)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_faiss_on_a_gpu_agrees_with_torch(tmp_path: Path) -> None:
    x = noisy(3000)
    try:
        by_faiss = kmeans(x, 20, 1, 2, backend="faiss", device="cuda")
    except UserError as error:
        pytest.skip(str(error))
    by_torch = kmeans(x, 20, 1, 2, backend="torch", device="cuda")
    assert by_faiss.backend == "faiss"
    assert by_faiss.inertia == pytest.approx(by_torch.inertia, rel=5e-3)
