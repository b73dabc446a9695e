"""k-means against scikit-learn, on data that breaks careless implementations."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, make_blobs
from sklearn.metrics import adjusted_rand_score

from ego2robot.errors import UserError
from ego2robot.skills import kmeans as module
from ego2robot.skills.kmeans import (
    BackendName,
    KMeansResult,
    Rows,
    kmeans,
    lloyd,
    nearest_by,
    plus_plus,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["torch", "faiss"])
def backend(request: pytest.FixtureRequest) -> BackendName:
    if request.param == "faiss":
        pytest.importorskip("faiss", reason="faiss is not installed")
    return request.param


def blobs(n: int = 600, centers: int = 6, dim: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x, truth = make_blobs(n, dim, centers=centers, cluster_std=0.3, random_state=seed)[:2]
    return x.astype(np.float32), truth


def check(x: np.ndarray, result: KMeansResult, k: int) -> None:
    """What holds for every result: k distinct, non-empty clusters, nearest centroids, true figures."""
    assert result.centroids_KD.shape == (k, x.shape[1])
    assert result.centroids_KD.dtype == np.float32
    assert result.assignment.dtype == np.int64
    assert set(result.assignment.tolist()) == set(range(k))
    assert len(np.unique(result.centroids_KD, axis=0)) == k
    exact = np.linalg.norm(x[:, None].astype(np.float64) - result.centroids_KD[None], axis=2)
    chosen = exact[np.arange(len(x)), result.assignment]
    scale = np.abs(x - x.mean(axis=0)).max()
    np.testing.assert_allclose(chosen, exact.min(axis=1), atol=2e-3 * scale)
    np.testing.assert_allclose(result.distances, chosen, atol=1e-4 * max(1.0, float(np.abs(x).max())))
    assert result.inertia == pytest.approx(float((result.distances.astype(np.float64) ** 2).sum()), rel=1e-5)


def test_separated_blobs_are_found_exactly(backend: BackendName) -> None:
    x, truth = blobs()
    result = kmeans(x, 6, seed=3, restarts=4, backend=backend)
    check(x, result, 6)
    assert adjusted_rand_score(truth, result.assignment) == 1.0
    assert result.backend == backend
    for skill in range(6):  # centroids are the means
        np.testing.assert_allclose(
            result.centroids_KD[skill], x[result.assignment == skill].mean(axis=0), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("name", "k"),
    [("digits", 10), ("gauss", 8), ("blobs", 16), ("offset", 12), ("heavy", 5)],
)
def test_inertia_is_within_half_a_percent_of_scikit_learn(name: str, k: int, backend: BackendName) -> None:
    rng = np.random.default_rng(0)
    x = {
        "digits": lambda: load_digits().data,
        "gauss": lambda: rng.normal(size=(1500, 24)),
        "blobs": lambda: make_blobs(1500, 16, centers=16, cluster_std=2.0, random_state=1)[0],
        # float32 keeps 3 digits of these differences; a naive |x|² − 2xc + |c|² keeps none
        "offset": lambda: make_blobs(1500, 8, centers=12, random_state=1)[0] + 1e4,
        "heavy": lambda: rng.standard_t(2.5, (1500, 8)),
    }[name]()
    x = x.astype(np.float32)
    ours = kmeans(x, k, seed=0, restarts=10, backend=backend)
    check(x, ours, k)
    theirs = KMeans(k, n_init=10, random_state=0).fit(x.astype(np.float64)).inertia_
    assert ours.inertia <= 1.005 * theirs


def test_backends_agree() -> None:
    pytest.importorskip("faiss", reason="faiss is not installed")
    x = load_digits().data.astype(np.float32)
    a = kmeans(x, 10, seed=1, restarts=3, backend="torch")
    b = kmeans(x, 10, seed=1, restarts=3, backend="faiss")
    assert a.inertia == pytest.approx(b.inertia, rel=5e-3)
    assert adjusted_rand_score(a.assignment, b.assignment) > 0.99


def test_same_seed_same_result_other_seed_other_start(backend: BackendName) -> None:
    x = np.random.default_rng(5).normal(size=(800, 16)).astype(np.float32)
    a, b = (kmeans(x, 12, seed=7, restarts=2, backend=backend) for _ in range(2))
    np.testing.assert_array_equal(a.assignment, b.assignment)
    np.testing.assert_array_equal(a.centroids_KD, b.centroids_KD)
    assert a.inertia == b.inertia
    c = kmeans(x, 12, seed=8, restarts=1, backend=backend)
    assert adjusted_rand_score(a.assignment, c.assignment) < 1.0  # pure noise: no two starts agree


def test_the_global_random_state_is_neither_used_nor_changed() -> None:
    x, _ = blobs()
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    kmeans(x, 4, seed=1, restarts=2)
    assert (torch.rand(1).item(), np.random.rand()) == expected


def test_more_restarts_never_raise_the_inertia() -> None:
    x = np.random.default_rng(2).normal(size=(600, 6)).astype(np.float32)
    inertias = [kmeans(x, 9, seed=4, restarts=r).inertia for r in (1, 3, 9)]
    assert inertias == sorted(inertias, reverse=True)
    assert inertias[-1] < inertias[0]


def test_every_chunking_gives_the_same_partition(
    monkeypatch: pytest.MonkeyPatch, backend: BackendName
) -> None:
    x, _ = blobs(n=3000, centers=9)
    whole = kmeans(x, 9, seed=1, restarts=2, backend=backend)
    seen: list[int] = []
    accumulate = module.accumulate

    def spy(rows: torch.Tensor, *rest: torch.Tensor) -> None:
        seen.append(len(rows))
        accumulate(rows, *rest)

    monkeypatch.setattr(module, "accumulate", spy)
    monkeypatch.setattr(module, "CHUNK_VALUES", 1)  # the smallest chunk: 256 rows
    chunked = kmeans(x, 9, seed=1, restarts=2, backend=backend)
    assert max(seen) == 256
    assert adjusted_rand_score(whole.assignment, chunked.assignment) == 1.0
    assert chunked.inertia == pytest.approx(whole.inertia, rel=1e-5)


def test_clusters_that_run_empty_are_put_on_the_farthest_rows(backend: BackendName) -> None:
    """All centroids but one start far from every row, so that all but one run empty at once."""
    x, truth = blobs(centers=5)
    rows = torch.from_numpy(x - x.mean(axis=0))
    start = torch.full((5, x.shape[1]), 1e4)
    start += torch.arange(5)[:, None]
    start[0] = 0.0
    _, nearest = nearest_by(backend, 5, "cpu")
    centroids, _ = lloyd(Rows(rows), start, nearest, max_iter=100, min_shift=0.0)
    labels = nearest(rows, centroids)
    assert adjusted_rand_score(truth, labels) == 1.0


def test_a_cluster_emptied_by_the_last_move_is_repaired(backend: BackendName) -> None:
    """With no iteration left, the final assignment still gives every cluster a row."""
    x = np.concatenate([np.zeros((50, 2)), np.full((50, 2), 10.0), [[100.0, 0.0]]]).astype(np.float32)
    _, nearest = nearest_by(backend, 3, "cpu")
    start = torch.tensor([[0.0, 0.0], [500.0, 500.0], [600.0, 600.0]])
    centroids, assignment, squared = module._settle(Rows(torch.from_numpy(x)), start, nearest)
    assert torch.bincount(assignment).tolist() == [50, 50, 1] or torch.bincount(assignment).tolist() == [
        50,
        1,
        50,
    ]
    assert float(squared.sum()) == 0.0
    np.testing.assert_array_equal(centroids[assignment], x)  # each row lies on its own centroid
    assert len(centroids.unique(dim=0)) == 3


@pytest.mark.parametrize("k", [2, 5, 9, 10])
def test_heavy_duplicates_still_give_k_clusters(k: int, backend: BackendName) -> None:
    """1,000 copies of one vector and one copy each of 9 others, near and very far."""
    rng = np.random.default_rng(0)
    others = rng.normal(size=(9, 6)) * np.array([1e-3, 1e-2, 0.1, 1, 1, 10, 100, 1e3, 1e4])[:, None]
    x = np.concatenate([np.zeros((1000, 6)), others]).astype(np.float32)
    result = kmeans(x, k, seed=0, restarts=3, backend=backend)
    assert set(result.assignment.tolist()) == set(range(k))
    assert len(np.unique(result.centroids_KD, axis=0)) == k
    assert len(set(result.assignment[:1000].tolist())) == 1
    if k == 10:
        assert result.inertia < 1e-4  # of 1e8 in all


def test_k_is_reduced_to_the_number_of_different_rows(backend: BackendName) -> None:
    x = np.repeat(np.eye(4, dtype=np.float32), 25, axis=0)
    result = kmeans(x, 10, seed=0, restarts=2, backend=backend)
    check(x, result, 4)
    assert result.inertia == pytest.approx(0.0, abs=1e-9)
    same = kmeans(np.full((30, 5), 0.1, np.float32), 3, seed=0, restarts=2, backend=backend)
    assert same.centroids_KD.shape == (1, 5)
    np.testing.assert_allclose(same.centroids_KD[0], 0.1, rtol=1e-6)
    assert not same.distances.any()


def test_one_row_and_as_many_clusters_as_rows(backend: BackendName) -> None:
    one = kmeans(np.ones((1, 3), np.float32), 5, seed=0, restarts=2, backend=backend)
    assert one.centroids_KD.tolist() == [[1.0, 1.0, 1.0]]
    assert one.assignment.tolist() == [0]
    x = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    every = kmeans(x, 40, seed=0, restarts=1, backend=backend)
    assert sorted(every.assignment.tolist()) == list(range(40))
    assert every.inertia == pytest.approx(0.0, abs=1e-8)


def test_vectors_that_differ_by_one_float16_step_are_different() -> None:
    """A matrix product in float32 cannot tell these distances from zero."""
    x = np.ones((4, 768), np.float16)
    for row in range(1, 4):
        x[row, row] = np.nextafter(np.float16(1), np.float16(2))
    result = kmeans(np.repeat(x, 10, axis=0).astype(np.float32), 4, seed=0, restarts=1)
    assert sorted(np.bincount(result.assignment).tolist()) == [10, 10, 10, 10]


def test_start_tells_rows_apart_that_a_matrix_product_cannot() -> None:
    """Differences of 1e-2 beside a common offset of 100: |x|² − 2xc + |c|² is rounding noise."""
    different = 100 + np.random.default_rng(0).normal(scale=1e-2, size=(60, 16))
    x = torch.from_numpy(np.repeat(different.astype(np.float32), 20, axis=0))
    for k in (60, 80):
        start = plus_plus(Rows(x), k, np.random.default_rng(k)).numpy()
        assert len(start) == len(np.unique(start, axis=0)) == 60


def test_start_is_different_rows_and_finds_small_far_groups() -> None:
    x, truth = blobs(n=1000, centers=10)
    x = np.concatenate([x, x[:200]])  # duplicates must not be drawn twice
    for seed in range(10):
        start = plus_plus(Rows(torch.from_numpy(x)), 10, np.random.default_rng(seed)).numpy()
        found = {int(truth[np.abs(x[:1000] - row).sum(axis=1).argmin()]) for row in start}
        assert len(found) == 10
    start = plus_plus(Rows(torch.from_numpy(x)), 300, np.random.default_rng(0)).numpy()
    assert len(np.unique(start, axis=0)) == 300


def test_iterations_on_growing_parts_end_near_those_on_all_rows(backend: BackendName) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 24))[rng.integers(40, size=12000)] + rng.normal(size=(12000, 24))
    x = x.astype(np.float32)
    whole = kmeans(x, 40, seed=1, restarts=1, max_iter=25, backend=backend)
    nested = kmeans(x, 40, seed=1, restarts=1, max_iter=25, backend=backend, nested=True)
    check(x, nested, 40)
    assert nested.iterations <= 25
    assert nested.inertia <= 1.02 * whole.inertia
    few = kmeans(x[:200], 40, seed=1, restarts=1, backend=backend, nested=True)  # no part is large enough
    check(x[:200], few, 40)
    assert few.inertia == kmeans(x[:200], 40, seed=1, restarts=1, backend=backend).inertia


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e20])
def test_values_without_finite_squares_are_refused(bad: float) -> None:
    x, _ = blobs()
    x[17, 3] = bad
    with pytest.raises(ValueError, match="finite"):
        kmeans(x, 3, seed=0)


@pytest.mark.parametrize(
    ("shape", "k", "restarts"), [((0, 4), 2, 1), ((5, 4), 0, 1), ((5, 4), 2, 0), ((5,), 2, 1)]
)
def test_nonsense_is_refused(shape: tuple[int, ...], k: int, restarts: int) -> None:
    with pytest.raises(ValueError, match="k-means of"):
        kmeans(np.zeros(shape, np.float32), k, seed=0, restarts=restarts)


@pytest.mark.parametrize(
    ("backend", "device"), [("cuml", "cpu"), ("faiss", "cuda"), ("torch", "cuda"), ("cuml", "cuda")]
)
def test_a_backend_that_cannot_run_here_is_one_line(
    backend: BackendName, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"use (backend=torch|device=cpu)") as caught:
        kmeans(blobs()[0], 3, seed=0, backend=backend, device=device)
    assert "\n" not in str(caught.value)


def test_without_faiss_auto_uses_torch_and_faiss_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    x, _ = blobs()
    assert kmeans(x, module.FAISS_FROM_K, seed=0, restarts=1, max_iter=2).backend == "torch"
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        kmeans(x, 3, seed=0, backend="faiss")


def test_auto_uses_faiss_from_a_hundred_clusters() -> None:
    pytest.importorskip("faiss", reason="faiss is not installed")
    x, _ = blobs()
    assert kmeans(x, module.FAISS_FROM_K, seed=0, restarts=1, max_iter=2).backend == "faiss"
    assert kmeans(x, module.FAISS_FROM_K - 1, seed=0, restarts=1, max_iter=2).backend == "torch"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_gives_the_partition_of_the_cpu() -> None:
    x = load_digits().data.astype(np.float32)
    a = kmeans(x, 10, seed=1, restarts=3, backend="torch")
    b = kmeans(x, 10, seed=1, restarts=3, backend="torch", device="cuda")
    assert b.inertia == pytest.approx(a.inertia, rel=5e-3)
    assert adjusted_rand_score(a.assignment, b.assignment) > 0.99
