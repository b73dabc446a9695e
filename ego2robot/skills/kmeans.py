"""Exact k-means: greedy k-means++ start, Lloyd iterations, several restarts, all seeded.

The backends differ only in who finds the nearest centroid (:data:`Nearest`); start, update, repair of
empty clusters and convergence are the same code for all, and so is the quality of the result. Distances
come from one matrix product per chunk of rows; memory beyond the data itself is bounded by the chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from ego2robot.errors import UserError

BackendName = Literal["auto", "faiss", "torch", "cuml"]
# (rows_ND, centroids_KD) → index of the nearest centroid int64 [N]
Nearest = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# From about so many clusters faiss is 1.15 to 1.4 times as fast as torch on a CPU (it keeps the running
# minimum and never stores the distances); below, k-means takes no time and the gain is less.
# See benchmarks/kmeans.py.
FAISS_FROM_K = 100
CHUNK_VALUES = 1 << 22  # float32 values of the largest array of one chunk: 16 MiB


@dataclass(frozen=True)
class KMeansResult:
    """A partition of N rows.

    Attributes:
        centroids_KD: float32. K is what was asked for, or the number of different rows where that is
            smaller.
        assignment: int64 [N], index of the nearest centroid; every cluster has a member.
        distances: float32 [N], Euclidean (not squared) to that centroid.
        inertia: sum of squared distances.
        iterations: Lloyd iterations of the restart that won.
        backend: ``torch``, ``faiss`` or ``cuml``.
    """

    centroids_KD: np.ndarray
    assignment: np.ndarray
    distances: np.ndarray
    inertia: float
    iterations: int
    backend: str


def kmeans(
    x_ND: np.ndarray | torch.Tensor,
    k: int,
    seed: int,
    restarts: int = 10,
    max_iter: int = 100,
    tol: float = 1e-4,
    backend: BackendName = "auto",
    device: str = "cpu",
) -> KMeansResult:
    """The best of ``restarts`` k-means runs by inertia.

    The same rows in the same order with the same seed give the same result; sort them by an id to be
    independent of where they came from.

    Args:
        x_ND: finite vectors, computed with as float32.
        k: clusters wanted.
        max_iter: Lloyd iterations per restart.
        tol: a restart ends when no row changes its cluster, or when the centroids' summed squared
            shift is at most ``tol`` times the mean variance of a feature (scikit-learn's rule).
        backend: who finds nearest centroids. ``torch`` on the CPU or the GPU; ``faiss`` on the CPU;
            ``cuml`` runs the Lloyd iterations on a GPU. ``auto``: faiss where it is installed, the
            work is on the CPU and ``k`` ≥ 100, else torch.
        device: ``cpu`` or ``cuda``, for the torch backend.

    Raises:
        ValueError: no rows, values that are not finite or beyond 1e15, or ``k`` or ``restarts`` < 1.
        UserError: the backend is not available on this machine.
    """
    x_ND = torch.as_tensor(x_ND).to(torch.float32)
    if x_ND.ndim != 2 or not len(x_ND) or k < 1 or restarts < 1:
        raise ValueError(f"k-means of {tuple(x_ND.shape)} with k={k}, restarts={restarts}")
    name, nearest = _backend(backend, k, device)
    largest = torch.stack([rows.abs().max() for rows in _chunks(x_ND, x_ND[:1])]).max()
    if not bool(largest <= 1e15):
        raise ValueError(f"k-means of values up to {float(largest)}: squares must be finite in float32")
    # Squared distances by |x|² − 2x·c + |c|² lose digits to a common offset; without one they do not.
    mean_D = torch.stack([rows.double().sum(dim=0) for rows in _chunks(x_ND, x_ND[:1])]).sum(dim=0) / len(
        x_ND
    )
    x_ND = _place(x_ND - mean_D.to(torch.float32), device)
    min_shift = tol * float(x_ND.square().mean(dtype=torch.float64))

    best: tuple[float, torch.Tensor, torch.Tensor, torch.Tensor, int] | None = None
    for restart in range(restarts):
        centroids_KD = plus_plus(x_ND, k, np.random.default_rng([seed, restart]), device)
        if name == "cuml":
            centroids_KD, iterations = _cuml_lloyd(x_ND, centroids_KD, max_iter, tol)
        else:
            centroids_KD, iterations = lloyd(x_ND, centroids_KD, nearest, max_iter, min_shift)
        centroids_KD, assignment, squared = _settle(x_ND, centroids_KD, nearest)
        inertia = float(squared.sum(dtype=torch.float64))
        if best is None or inertia < best[0]:
            best = inertia, centroids_KD, assignment, squared, iterations
    assert best is not None
    inertia, centroids_KD, assignment, squared, iterations = best
    return KMeansResult(
        centroids_KD=(centroids_KD.cpu() + mean_D).to(torch.float32).numpy(),
        assignment=assignment.cpu().numpy(),
        distances=squared.sqrt().cpu().numpy(),
        inertia=inertia,
        iterations=iterations,
        backend=name,
    )


def plus_plus(x_ND: torch.Tensor, k: int, rng: np.random.Generator, device: str = "cpu") -> torch.Tensor:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007): of 2 + ln k candidates, each drawn with a
    probability proportional to its squared distance from the centroids so far, the one is taken that
    leaves the smallest sum of squared distances.

    Returns:
        float32 [K, D], different rows of ``x_ND``; K < k when it has fewer than k different rows.
    """
    n_candidates = 2 + int(math.log(k))
    chosen = [int(rng.integers(len(x_ND)))]
    norms_N = torch.cat([_squared_norms(rows_ND) for rows_ND in _chunks(x_ND, x_ND[:1].to(device))])
    closest_N = _to_each(x_ND, norms_N, x_ND[chosen])[0]
    while len(chosen) < k:
        cumulative = closest_N.double().cumsum(0)
        total = float(cumulative[-1])
        if total == 0.0:
            break
        # A draw in (0, total] never falls on a row at distance 0, which is one that was chosen.
        draws = torch.as_tensor((1.0 - rng.random(n_candidates)) * total, device=cumulative.device)
        candidates = torch.searchsorted(cumulative, draws).clamp_(max=len(x_ND) - 1)
        left_LN = torch.minimum(_to_each(x_ND, norms_N, x_ND[candidates]), closest_N)
        winner = int(left_LN.sum(dim=1, dtype=torch.float64).argmin())
        chosen.append(int(candidates[winner]))
        closest_N = left_LN[winner]
    return x_ND[chosen].to(device)


def lloyd(
    x_ND: torch.Tensor, centroids_KD: torch.Tensor, nearest: Nearest, max_iter: int, min_shift: float
) -> tuple[torch.Tensor, int]:
    """Moves centroids to the means of their rows until no row changes its cluster, the summed squared
    shift is at most ``min_shift``, or ``max_iter`` iterations are done.

    A cluster that ran empty is put on the row that is farthest from its centroid.

    Returns:
        float32 [K, D] and the number of iterations.
    """
    before: torch.Tensor | None = None
    for iteration in range(1, max_iter + 1):
        sums_KD, counts_K = _zeros(centroids_KD)
        parts = []
        for rows_ND, labels in assign(_chunks(x_ND, centroids_KD), centroids_KD, nearest):
            accumulate(rows_ND, labels, sums_KD, counts_K)
            parts.append(labels)
        assignment = torch.cat(parts)
        if before is not None and torch.equal(assignment, before):
            return centroids_KD, iteration
        if bool((counts_K == 0).any()):
            centroids_KD, assignment, _ = _settle(x_ND, centroids_KD, nearest)
            sums_KD, counts_K = _zeros(centroids_KD)
            start = 0
            for rows_ND in _chunks(x_ND, centroids_KD):
                accumulate(rows_ND, assignment[start : start + len(rows_ND)], sums_KD, counts_K)
                start += len(rows_ND)
        moved_KD = (sums_KD / counts_K[:, None]).to(torch.float32)
        shift = float((moved_KD - centroids_KD).square().sum(dtype=torch.float64))
        centroids_KD, before = moved_KD, assignment
        if shift <= min_shift:
            return centroids_KD, iteration
    return centroids_KD, max_iter


def assign(
    chunks: Iterable[torch.Tensor], centroids_KD: torch.Tensor, nearest: Nearest
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each chunk of rows (float32 [n, D] on the centroids' device): the chunk and the index of
    each row's nearest centroid, int64 [n]."""
    for rows_ND in chunks:
        yield rows_ND, nearest(rows_ND, centroids_KD)


def accumulate(
    rows_ND: torch.Tensor, labels: torch.Tensor, sums_KD: torch.Tensor, counts_K: torch.Tensor
) -> None:
    """Adds a chunk to the float64 sums and the counts of its clusters, in place.

    The sum per cluster runs over its rows in order (an embedding bag over sorted labels), not by atomic
    additions: the same on every run, also on a GPU.
    """
    order = labels.argsort(stable=True)
    ends_K = torch.bincount(labels, minlength=len(counts_K)).cumsum(0)
    starts_K = torch.cat([ends_K.new_zeros(1), ends_K[:-1]])
    sums_KD += F.embedding_bag(order, rows_ND, starts_K, mode="sum")
    counts_K += ends_K - starts_K


def _settle(
    x_ND: torch.Tensor, centroids_KD: torch.Tensor, nearest: Nearest
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Final centroids, assignment int64 [N] and exact squared distances float32 [N].

    While a cluster is empty, its centroid is put on the row farthest from its own and takes the rows
    that are closer to it. Such a row is at distance 0 and never leaves, so this ends after at most K
    rounds; it stops early when every row lies on a centroid, and then the empty ones are left out.
    """
    labels_parts, squared_parts = [], []
    for rows_ND, labels in assign(_chunks(x_ND, centroids_KD), centroids_KD, nearest):
        labels_parts.append(labels)
        squared_parts.append((rows_ND - centroids_KD[labels]).square().sum(dim=1))
    assignment, squared = torch.cat(labels_parts), torch.cat(squared_parts)
    centroids_KD = centroids_KD.clone()
    while True:
        counts_K = torch.bincount(assignment, minlength=len(centroids_KD))
        empty = (counts_K == 0).nonzero()[:, 0]
        if not len(empty):
            return centroids_KD, assignment, squared
        farthest = int(squared.argmax())
        if float(squared[farthest]) == 0.0:
            used = counts_K > 0
            return centroids_KD[used], (used.cumsum(0) - 1)[assignment], squared
        row_D = x_ND[farthest].to(centroids_KD.device)
        centroids_KD[empty[0]] = row_D
        to_row = torch.cat([(r - row_D).square().sum(dim=1) for r in _chunks(x_ND, centroids_KD)])
        closer = to_row < squared
        assignment = torch.where(closer, empty[0], assignment)
        squared = torch.where(closer, to_row, squared)


def _to_each(x_ND: torch.Tensor, norms_N: torch.Tensor, targets_LD: torch.Tensor) -> torch.Tensor:
    """Squared distances float32 [L, N]; exactly 0 between equal rows and only there.

    The matrix product leaves rounding noise where a distance is tiny beside the norms: those few are
    recomputed as a difference.

    Args:
        norms_N: squared norms of the rows, on the device to compute on.
    """
    targets_LD = targets_LD.to(norms_N.device)
    norms_L = _squared_norms(targets_LD)
    parts = []
    start = 0
    for rows_ND in _chunks(x_ND, targets_LD):
        scale_NL = norms_N[start : start + len(rows_ND), None] + norms_L
        start += len(rows_ND)
        squared_NL = torch.addmm(scale_NL, rows_ND, targets_LD.T, alpha=-2)
        doubtful = (squared_NL < 1e-4 * scale_NL).nonzero()
        for i, j in (pair.unbind(1) for pair in doubtful.split(max(1, CHUNK_VALUES // x_ND.shape[1]))):
            squared_NL[i, j] = (rows_ND[i] - targets_LD[j]).square().sum(dim=1)
        parts.append(squared_NL.T)
    return torch.cat(parts, dim=1)


def _squared_norms(rows_ND: torch.Tensor) -> torch.Tensor:
    """float32 [N], without an array of squares."""
    return torch.linalg.vector_norm(rows_ND, dim=1).square_()


def _chunks(x_ND: torch.Tensor, centroids_KD: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows of ``x_ND`` on the centroids' device, so many that neither they nor their distances to all
    centroids exceed the chunk."""
    rows = max(256, CHUNK_VALUES // max(centroids_KD.shape))
    for chunk in x_ND.split(rows):
        yield chunk.to(centroids_KD.device)


def _zeros(centroids_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums float64 [K, D] and counts int64 [K] for :func:`accumulate`."""
    counts_K = torch.zeros(len(centroids_KD), dtype=torch.int64, device=centroids_KD.device)
    return torch.zeros_like(centroids_KD, dtype=torch.float64), counts_K


def _place(x_ND: torch.Tensor, device: str) -> torch.Tensor:
    """On the GPU when it takes at most half of what is free there, else left where it is."""
    if device == "cpu":
        return x_ND.contiguous()
    free, _ = torch.cuda.mem_get_info(device)
    return x_ND.to(device) if x_ND.nbytes * 2 <= free else x_ND.contiguous()


def _backend(backend: BackendName, k: int, device: str) -> tuple[str, Nearest]:
    """The backend's name and how it finds nearest centroids, see :func:`kmeans`."""
    on_gpu = device != "cpu"
    if on_gpu and not torch.cuda.device_count():
        raise UserError(f"k-means on device={device}: torch sees no GPU here; use device=cpu")
    if (backend == "cuml" and not on_gpu) or (backend == "faiss" and on_gpu):
        raise UserError(f"k-means backend={backend} does not run on device={device}; use backend=torch")
    if backend == "faiss" or (backend == "auto" and not on_gpu and k >= FAISS_FROM_K):
        try:
            return "faiss", _faiss_nearest()
        except ImportError as error:
            if backend == "faiss":
                raise UserError(f"k-means backend=faiss: {error}; pip install faiss-cpu") from None
    return "cuml" if backend == "cuml" else "torch", _nearest_torch


def _nearest_torch(rows_ND: torch.Tensor, centroids_KD: torch.Tensor) -> torch.Tensor:
    norms_K = centroids_KD.square().sum(dim=1)
    # |x|² is the same for all centroids and decides nothing.
    return torch.addmm(norms_K, rows_ND, centroids_KD.T, alpha=-2).min(dim=1).indices


def _faiss_nearest() -> Nearest:
    import faiss

    def nearest(rows_ND: torch.Tensor, centroids_KD: torch.Tensor) -> torch.Tensor:
        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatL2(centroids_KD.shape[1])
        index.add(centroids_KD.numpy())
        return torch.from_numpy(index.search(rows_ND.numpy(), 1)[1][:, 0])

    return nearest


def _cuml_lloyd(
    x_ND: torch.Tensor, centroids_KD: torch.Tensor, max_iter: int, tol: float
) -> tuple[torch.Tensor, int]:
    """cuML's Lloyd iterations from our start."""
    try:
        from cuml.cluster import KMeans
    except ImportError as error:
        raise UserError(f"k-means backend 'cuml': {error}; pip install cuml-cu13, or use 'torch'") from None
    start = centroids_KD.cpu().numpy()
    model = KMeans(
        n_clusters=len(start), init=start, n_init=1, max_iter=max_iter, tol=tol, output_type="numpy"
    )
    model.fit(x_ND.cpu().numpy())
    centers = torch.as_tensor(np.asarray(model.cluster_centers_), dtype=torch.float32)
    return centers.to(centroids_KD.device), int(model.n_iter_)
