"""k-means: which is fastest on this machine, and what do a million vectors from Parquet take?

``backends``: ours with torch, ours with faiss finding the nearest centroids, faiss's own ``Clustering`` and
scikit-learn's ``KMeans`` take turns in one process, on one thread by default, from the same start, for the
same iterations; each one's best turn counts. Seconds of different machines do not compare, so the answer is
a ratio to scikit-learn (higher is faster), by the clock and by CPU time (which other work on the machine
disturbs less), beside the inertia each one reached (1 is scikit-learn's).

``scale``: ``ego2robot cluster`` itself on a run directory with so many half-precision vectors, each time in a
process of its own: seconds by the clock and of CPU, the largest resident memory, and the inertia beside what
faiss reaches on all rows where they fit. The run grows from one size to the next, as a real one does.

``gpu``: the same with ten million vectors on a GPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from common import CACHE, RESULTS, Skip, write_result

from ego2robot import config
from ego2robot.skills import cluster
from ego2robot.skills.kmeans import (
    BackendName,
    Rows,
    lloyd,
    nearest_by,
    nearest_exactly,
    plus_plus,
)
from ego2robot.store import schema
from ego2robot.store.rundir import RunDir

Run = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, int]]


def ours(backend: BackendName) -> Run:
    def run(x_ND: np.ndarray, start_KD: np.ndarray, iterations: int) -> tuple[np.ndarray, int]:
        _, nearest = nearest_by(backend, len(start_KD), "cpu")
        rows, start = Rows(torch.from_numpy(x_ND)), torch.from_numpy(start_KD)
        centroids_KD, done = lloyd(rows, start, nearest, iterations, min_shift=-1.0)
        return centroids_KD.numpy(), done

    return run


def faiss_clustering(x_ND: np.ndarray, start_KD: np.ndarray, iterations: int) -> tuple[np.ndarray, int]:
    import faiss

    k, d = start_KD.shape
    model = faiss.Kmeans(
        d, k, niter=iterations, max_points_per_centroid=len(x_ND), min_points_per_centroid=1, seed=1
    )
    model.train(x_ND, init_centroids=start_KD)
    return model.centroids, iterations


def scikit_learn(x_ND: np.ndarray, start_KD: np.ndarray, iterations: int) -> tuple[np.ndarray, int]:
    from sklearn.cluster import KMeans

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
    rows, c_KD = Rows(torch.from_numpy(x_ND)), torch.from_numpy(np.ascontiguousarray(centroids_KD))
    parts = [nearest_exactly(chunk, c_KD)[1].sum(dtype=torch.float64) for chunk in rows.chunks(len(c_KD))]
    return float(torch.stack(parts).sum())


def backends(rows: int, dim: int, k: int, iterations: int, turns: int, threads: int) -> dict[str, Any]:
    """The first question."""
    from threadpoolctl import threadpool_limits

    x_ND = data(rows, dim, k)
    torch.set_num_threads(threads)
    began = time.process_time()
    start_KD = plus_plus(Rows(torch.from_numpy(x_ND)), k, np.random.default_rng(1)).numpy()
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
    with threadpool_limits(threads):
        for _ in range(turns):
            for name, run_one in runs.items():
                began, began_cpu = time.perf_counter(), time.process_time()
                centroids_KD, done = run_one(x_ND, start_KD, iterations)
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - began_cpu)
                found[name] = inertia(x_ND, centroids_KD), done
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
    for name, row in results.items():
        speed = f"{row['speed']:6.2f} x (by CPU time {row['speed_by_cpu_time']:.2f} x)"
        print(f"{name:18} {speed}, inertia {row['inertia']:.5f}, {row['iterations']} iterations", flush=True)
    return {
        "rows": rows,
        "dim": dim,
        "k": k,
        "threads": threads,
        "start_in_iterations_of_torch": round(start_s / (min(cpu["torch"]) / iterations), 2),
        "results": results,
    }


# -- vectors as a run has them --------------------------------------------------------------------

PART_ROWS = 50_000


class Mixture:
    """Vectors with the shape of real embeddings, any block of them without the others.

    Groups of very unequal size (Zipf) whose centres share few directions, noise that has some directions of
    its own beside an even rest, a common offset, 2 % of rows that are alone and 2 % that nearly repeat the
    row before.
    """

    def __init__(self, dim: int = 768, groups: int = 3000, seed: int = 0, device: str = "cpu") -> None:
        rng = np.random.default_rng(seed)
        self.dim, self.seed, self.device = dim, seed, device
        scale_R = (np.arange(1, 129) ** -0.4).astype(np.float32)
        basis_RD = np.linalg.qr(rng.standard_normal((dim, 128)))[0].T.astype(np.float32)
        centres = (rng.standard_normal((groups, 128), np.float32) * scale_R) @ basis_RD
        share = 1.0 / np.arange(1, groups + 1)
        self._share = np.cumsum(share / share.sum())
        self._offset = rng.standard_normal(dim, np.float32) * 0.3
        self._centres = torch.from_numpy(centres + self._offset).to(device)
        self._noise = torch.from_numpy(0.25 * scale_R[:, None] * basis_RD).to(device)

    def block(self, index: int, rows: int) -> np.ndarray:
        """float16 [rows, dim]."""
        rng = np.random.default_rng([self.seed, index])
        of = np.searchsorted(self._share, rng.random(rows)).clip(max=len(self._centres) - 1)
        random = torch.Generator(self.device).manual_seed(int(rng.integers(1 << 62)))
        kind = {"generator": random, "device": self.device}
        x_ND = self._centres[torch.from_numpy(of).to(self.device)]
        x_ND += torch.randn((rows, len(self._noise)), **kind) @ self._noise
        x_ND += 0.06 * torch.randn((rows, self.dim), **kind)
        chance = torch.from_numpy(rng.random(rows)).to(self.device)
        alone = chance < 0.02
        x_ND[alone] += 0.5 * torch.randn((int(alone.sum()), self.dim), **kind)
        again = (chance > 0.98).nonzero()[:, 0]
        again = again[again > 0]
        x_ND[again] = x_ND[again - 1] + 0.005 * torch.randn((len(again), self.dim), **kind)
        return x_ND.to(torch.float16).cpu().numpy()


def clip_ids(first: int, rows: int) -> pa.Array:
    """Ids that look as random as hashes, each once: an odd factor permutes the numbers of 64 bits."""
    with np.errstate(over="ignore"):
        mixed = np.arange(first, first + rows, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return pa.array([f"{value:016x}" for value in mixed.tolist()])


def grow(run: RunDir, mixture: Mixture, rows: int, threads: int) -> float:
    """Commits parts until the run has so many kept clips with vectors. Says how long it took, seconds."""
    began = time.perf_counter()
    there = run.dataset("clips").count_rows()
    kind = schema.embedding(mixture.dim, "videomae", "generated", False)

    def commit(first: int) -> None:
        n = min(PART_ROWS, rows - first)
        ids = clip_ids(first, n)
        rng = np.random.default_rng([1, first])
        constant = {
            "video_id": "0" * 16,
            "source": "generated",
            "name": "generated",
            "start_s": 0.0,
            "end_s": 6.0,
            "n_frames": 36,
            "fps": 30.0,
            "width": 1920,
            "height": 1080,
            "codec": "h264",
            "decision": "kept",
        }
        columns = {
            "clip_id": ids,
            "motion": pa.array(rng.random(n), pa.float32()),
            "hand_visibility": pa.array(rng.integers(13, size=n) / 12, pa.float32()),
            "label": pa.array(np.array(["a", "b", "c"])[rng.integers(3, size=n)]),
        }
        clips = pa.Table.from_arrays(
            [
                columns[field.name]
                if field.name in columns
                else pa.repeat(pa.scalar(constant[field.name], field.type), n)
                if field.name in constant
                else pa.nulls(n, field.type)
                for field in schema.CLIPS
            ],
            schema=pa.schema([field.with_nullable(True) for field in schema.CLIPS]),
        )
        flat = pa.array(mixture.block(first // PART_ROWS, n).ravel(), pa.float16())
        vectors = pa.FixedSizeListArray.from_arrays(flat, mixture.dim)
        rows_ = pa.Table.from_arrays([ids, vectors], schema=kind)
        run.commit([f"generated-{first}"], {"clips": clips, "embeddings/videomae": rows_})

    if there % PART_ROWS:
        raise ValueError(f"{run.path}: grown to {there} rows, in the middle of a part")
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(commit, range(there, rows, PART_ROWS)))
    return time.perf_counter() - began


def settings(k: int, device: str, duplicates: bool = True) -> config.Config:
    skills = {
        "k": k,
        "embedding": "videomae",
        "projections": [],
        "duplicate_cosine": 0.99 if duplicates else None,
    }
    return config.build({"device": device, "skills": skills})


def child(path: Path, k: int, device: str, threads: int, duplicates: bool) -> dict[str, Any]:
    """One clustering of a run, measured from inside its process."""
    if threads:  # faiss takes torch's number
        torch.set_num_threads(threads)
    stages: list[tuple[str, float, float]] = []

    def tell(text: str) -> None:
        name = next((s for s in STAGES if text.startswith(s)), text)
        if not stages or stages[-1][0] != name:
            stages.append((name, time.perf_counter(), time.process_time()))

    before = resident_mib()
    began, began_cpu = time.perf_counter(), time.process_time()
    stages.append(("reading the sample", began, began_cpu))
    cfg = settings(k, device, duplicates)
    body = cluster(RunDir.open(path), cfg.skills, cfg.seed, tell)
    ended, ended_cpu = time.perf_counter(), time.process_time()
    ends = [*stages[1:], ("", ended, ended_cpu)]
    figures = {
        "rows": body["n_clips"],
        "k": body["k"],
        "sample": body["sample"],
        "backend": body["backend"],
        "seconds": round(ended - began, 2),
        "cpu_seconds": round(ended_cpu - began_cpu, 2),
        "stages": {
            name: {"seconds": round(after - at, 2), "cpu_seconds": round(after_cpu - at_cpu, 2)}
            for (name, at, at_cpu), (_, after, after_cpu) in zip(stages, ends, strict=True)
        },
        "peak_resident_MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "resident_before_MiB": before,
        "inertia": body["inertia"],
        "imbalance": round(body["imbalance"], 3),
        "duplicates": body["duplicates"],
    }
    if device != "cpu":
        figures["peak_gpu_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return figures


STAGES = ("k-means", "assign", "near-duplicates", "quality", "projection", "writing")


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 2**20, 1)


def in_a_process(path: Path, k: int, device: str, threads: int, duplicates: bool = True) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(path), "--k", str(k)]
    command += ["--device", device, "--threads", str(threads), *["--no-duplicates"] * (not duplicates)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def faiss_on_all(mixture: Mixture, rows: int, k: int, threads: int) -> dict[str, Any]:
    """faiss's own k-means on every row, its defaults otherwise (25 iterations from random rows)."""
    import faiss

    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    x_ND = np.empty((rows, mixture.dim), np.float32)
    for first in range(0, rows, PART_ROWS):
        n = min(PART_ROWS, rows - first)
        x_ND[first : first + n] = mixture.block(first // PART_ROWS, n)
    began, began_cpu = time.perf_counter(), time.process_time()
    model = faiss.Kmeans(mixture.dim, k, max_points_per_centroid=rows, min_points_per_centroid=1, seed=1)
    model.train(x_ND)
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    return {
        "rows": rows,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "inertia": inertia(x_ND, model.centroids),
    }


def scale(sizes: list[int], k: int, threads: int, scratch: Path | None = None) -> dict[str, Any]:
    """The second question."""
    mixture = Mixture()
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch or CACHE) as folder:
        run = RunDir.create_or_resume(Path(folder) / "run", settings(k, "cpu"), {})
        found: dict[str, Any] = {}
        for rows in sizes:
            grow(run, mixture, rows, threads)
            found[str(rows)] = in_a_process(run.path, k, "cpu", threads)
            print(rows, json.dumps(found[str(rows)]), flush=True)
    first, last = found[str(sizes[0])], found[str(sizes[-1])]
    faiss_all = faiss_on_all(mixture, sizes[0], k, threads)
    print("faiss", json.dumps(faiss_all), flush=True)
    per_row = [
        found[str(rows)]["stages"]["assign"]["cpu_seconds"] / rows * 1e6 for rows in (sizes[0], sizes[-1])
    ]
    return {
        "k": k,
        "dim": mixture.dim,
        "threads": threads,
        "runs": found,
        "faiss_on_all_rows": faiss_all,
        "inertia_vs_faiss": round(first["inertia"] / faiss_all["inertia"], 5),
        "cpu_time_ratio": round(last["cpu_seconds"] / first["cpu_seconds"], 3),
        "rows_ratio": sizes[-1] / sizes[0],
        "assignment_cpu_us_per_row": [round(us, 2) for us in per_row],
        "peak_resident_MiB": last["peak_resident_MiB"],
    }


def bench_10m(
    device: str = "cuda", rows: int = 10_000_000, k: int = 1000, duplicates: bool = False
) -> dict[str, Any]:
    """Ten million vectors from Parquet to skills on a GPU. Making them is not counted.

    The files were just written, so they come from the page cache where memory holds them.
    """
    threads = torch.get_num_threads()
    mixture = Mixture(device=device)
    CACHE.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(CACHE).free
    needed = int((2.2 if duplicates else 1.2) * rows * mixture.dim * 2)  # by cluster, once more
    if free < needed:
        raise Skip(f"{rows:,} vectors need {needed / 1e9:.0f} GB of disk, there are {free / 1e9:.0f}")
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        run = RunDir.create_or_resume(Path(folder) / "run", settings(k, device), {})
        made_s = grow(run, mixture, rows, min(16, threads))
        torch.cuda.empty_cache()
        figures = in_a_process(run.path, k, device, 0, duplicates)
    return {
        **figures,
        "making_them_s": round(made_s, 1),
        "rows_per_s": round(rows / figures["seconds"]),
    }


def run(quick: bool = False) -> dict[str, Any]:
    """Both questions on a CPU."""
    if quick:
        return {
            "backends": backends(10_000, 256, 100, 5, 2, 1),
            "scale": scale([50_000, 100_000], 100, 2),
        }
    return {
        "backends": backends(20_000, 768, 100, 10, 3, 1),
        "scale": scale([100_000, 300_000, 1_000_000], 1000, 2),
    }


def gpu(quick: bool = False) -> dict[str, Any]:
    """The third question; ``quick``: with a million vectors, and their near-duplicates."""
    if not torch.cuda.is_available():
        raise Skip("torch sees no GPU")
    if quick:
        return {"kmeans_1m": bench_10m("cuda", 1_000_000, duplicates=True)}
    return {"kmeans_10m": bench_10m("cuda")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--k", type=int, default=1000, help=argparse.SUPPRESS)
    parser.add_argument("--no-duplicates", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.k, args.device, args.threads, not args.no_duplicates)))
        return
    body = gpu(args.quick) if args.gpu else run(args.quick)
    packages = ("torch", "faiss-cpu", "scikit-learn", "numpy", "pyarrow")
    print(write_result("kmeans-gpu" if args.gpu else "kmeans", __doc__, body, packages, args.out).name)


if __name__ == "__main__":
    main()
