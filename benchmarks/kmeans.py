"""Which k-means is fastest on this CPU, from the same start, for the same iterations?

Ours with torch, ours with faiss finding the nearest centroids, faiss's own ``Clustering`` and
scikit-learn's ``KMeans`` take turns in one process, on one thread by default; each one's best turn counts.
Seconds of different machines do not compare, so the answer is a ratio to scikit-learn (higher is faster),
by the clock and by CPU time (which other work on the machine disturbs less), beside the inertia each one
reached (1 is scikit-learn's).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch
from common import RESULTS, write_result
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from ego2robot.skills.kmeans import _backend, lloyd, plus_plus

Run = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, int]]


def ours(backend: str) -> Run:
    def run(x_ND: np.ndarray, start_KD: np.ndarray, iterations: int) -> tuple[np.ndarray, int]:
        _, nearest = _backend(backend, len(start_KD), "cpu")
        rows, start = torch.from_numpy(x_ND), torch.from_numpy(start_KD)
        centroids_KD, done = lloyd(rows, start, nearest, iterations, min_shift=-1.0)
        return centroids_KD.numpy(), done

    return run


def faiss_clustering(x_ND: np.ndarray, start_KD: np.ndarray, iterations: int) -> tuple[np.ndarray, int]:
    k, d = start_KD.shape
    model = faiss.Kmeans(
        d, k, niter=iterations, max_points_per_centroid=len(x_ND), min_points_per_centroid=1, seed=1
    )
    model.train(x_ND, init_centroids=start_KD)
    return model.centroids, iterations


def scikit_learn(x_ND: np.ndarray, start_KD: np.ndarray, iterations: int) -> tuple[np.ndarray, int]:
    model = KMeans(len(start_KD), init=start_KD, n_init=1, max_iter=iterations, tol=0.0).fit(x_ND)
    return model.cluster_centers_, model.n_iter_


def data(rows: int, dim: int, k: int) -> np.ndarray:
    """Overlapping groups, float32 [rows, dim], mean 0: such that no run is at rest before its last
    iteration."""
    rng = np.random.default_rng(0)
    centers_KD = rng.normal(scale=0.2, size=(k, dim))
    x_ND = centers_KD[rng.integers(k, size=rows)] + rng.normal(size=(rows, dim))
    return (x_ND - x_ND.mean(axis=0)).astype(np.float32)


def inertia(x_ND: np.ndarray, centroids_KD: np.ndarray) -> float:
    return float(faiss.knn(x_ND, np.ascontiguousarray(centroids_KD), 1)[0].sum(dtype=np.float64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)

    x_ND = data(args.rows, args.dim, args.k)
    began = time.process_time()
    start_KD = plus_plus(torch.from_numpy(x_ND), args.k, np.random.default_rng(1)).numpy()
    start_s = time.process_time() - began
    runs: dict[str, Run] = {
        "torch": ours("torch"),
        "faiss": ours("faiss"),
        "faiss.Clustering": faiss_clustering,
        "scikit-learn": scikit_learn,
    }
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    found: dict[str, tuple[float, int]] = {}
    with threadpool_limits(args.threads):
        for _ in range(args.turns):
            for name, run in runs.items():
                began, began_cpu = time.perf_counter(), time.process_time()
                centroids_KD, iterations = run(x_ND, start_KD, args.iterations)
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - began_cpu)
                found[name] = inertia(x_ND, centroids_KD), iterations
    base = "scikit-learn"
    results = {
        name: {
            "speed": round(min(wall[base]) / min(wall[name]), 3),
            "speed_by_cpu_time": round(min(cpu[base]) / min(cpu[name]), 3),
            "inertia": round(found[name][0] / found[base][0], 6),
            "iterations": int(found[name][1]),
            "seconds": [round(s, 4) for s in wall[name]],
            "cpu_seconds": [round(s, 4) for s in cpu[name]],
        }
        for name in runs
    }
    body = {
        "rows": args.rows,
        "dim": args.dim,
        "k": args.k,
        "start_in_iterations_of_torch": round(start_s / (min(cpu["torch"]) / args.iterations), 2),
        "results": results,
    }
    packages = ("torch", "faiss-cpu", "scikit-learn", "numpy")
    path = write_result("kmeans", __doc__, body, packages, args.out)
    for name, row in results.items():
        speed = f"{row['speed']:6.2f} x (by CPU time {row['speed_by_cpu_time']:.2f} x)"
        print(f"{name:18} {speed}, inertia {row['inertia']:.5f}, {row['iterations']} iterations")
    print(f"k-means++ start: as long as {body['start_in_iterations_of_torch']} iterations; {path.name}")


if __name__ == "__main__":
    main()
