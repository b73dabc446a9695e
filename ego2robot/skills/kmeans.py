"""Exact k-means, Euclidean or spherical: greedy k-means++ start, Lloyd iterations, restarts, all seeded.

The backends differ only in who finds the nearest centroid (:data:`Nearest`); start, update, repair of
empty clusters and convergence are the same code for all, and so is the quality of the result. Rows stay as
they are stored (half precision, on the host or the GPU) and are widened a chunk at a time: memory beyond
the data itself is bounded by the chunk.
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
Metric = Literal["euclidean", "cosine"]
# (rows_ND, centroids_KD) → index of the nearest centroid int64 [N]
Nearest = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# From about so many clusters faiss is 1.15 to 1.4 times as fast as torch on a CPU (it keeps the running
# minimum and never stores the distances); below, k-means takes no time and the gain is less.
# See benchmarks/kmeans.py.
FAISS_FROM_K = 100
CHUNK_VALUES = 1 << 22  # float32 values of the largest array of one chunk: 16 MiB
GPU_CHUNKS = 32  # a chunk on a GPU is so many times larger: launches cost more there than memory
WIDE_BYTES = 256 << 20  # rows that take no more than this as float32 are widened once, not every iteration
START_BYTES = 64 << 20  # the start is drawn among so many rows as take no more as float32, or 32 a centroid
NESTED = ((1 / 4, 0.6), (1, 0.4))  # parts of the rows and of the iterations
NESTED_ROWS = 64  # a centroid, at least, in a part: among fewer it follows single rows
# A product of float32 matrices leaves noise of about this share of the norms in a squared distance.
NOISE = 2.0**-17


@dataclass(frozen=True)
class KMeansResult:
    """A partition of N rows.

    Attributes:
        centroids_KD: float32. K is what was asked for, or the number of different rows where that is
            smaller.
        assignment: int64 [N], index of the nearest centroid; every cluster has a member.
        distances: float32 [N], Euclidean (not squared) to that centroid; between unit vectors when the
            metric is cosine: sqrt(2 − 2·cos).
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


@dataclass(frozen=True)
class Rows:
    """Vectors as they are stored, widened as they are used.

    Attributes:
        data_ND: any floating type, on the host or on ``device``.
        device: where chunks are wanted.
        shift_D: float32, subtracted from each row; None: nothing is.
        unit: each row is divided by its length (a row of zeros stays one).
    """

    data_ND: torch.Tensor
    device: str = "cpu"
    shift_D: torch.Tensor | None = None
    unit: bool = False

    def __len__(self) -> int:
        return len(self.data_ND)

    @property
    def dim(self) -> int:
        return self.data_ND.shape[1]

    def chunks(self, k: int = 1) -> Iterator[torch.Tensor]:
        """float32 rows in order, so many at once that neither they nor their distances to ``k`` centroids
        exceed the chunk."""
        values = CHUNK_VALUES * (1 if self.device == "cpu" else GPU_CHUNKS)
        for part in self.data_ND.split(max(256, values // max(k, self.dim))):
            yield self._wide(part)

    def take(self, index: torch.Tensor | list[int]) -> torch.Tensor:
        """float32 [len(index), D] on the device."""
        at = torch.as_tensor(index, device=self.data_ND.device)
        return self._wide(self.data_ND[at])

    def widened(self) -> Rows:
        """The same rows, computed once where float32 takes little room."""
        if self.data_ND.dtype == torch.float32 and self.shift_D is None and not self.unit:
            return Rows(self.data_ND.to(self.device).contiguous(), self.device)
        data_ND = torch.empty(self.data_ND.shape, dtype=torch.float32, device=self.device)
        start = 0
        for rows_ND in self.chunks():
            data_ND[start : start + len(rows_ND)] = rows_ND
            start += len(rows_ND)
        return Rows(data_ND, self.device)

    def _wide(self, part: torch.Tensor) -> torch.Tensor:
        rows_ND = part.to(self.device).to(torch.float32)
        if self.shift_D is not None:
            rows_ND = rows_ND - self.shift_D
        return F.normalize(rows_ND, dim=1) if self.unit else rows_ND


def kmeans(
    x_ND: np.ndarray | torch.Tensor,
    k: int,
    seed: int,
    restarts: int = 10,
    max_iter: int = 100,
    tol: float = 1e-4,
    backend: BackendName = "auto",
    device: str = "cpu",
    metric: Metric = "euclidean",
    nested: bool = False,
) -> KMeansResult:
    """The best of ``restarts`` k-means runs by inertia.

    The same rows in the same order with the same seed give the same result; sort them by an id to be
    independent of where they came from.

    Args:
        x_ND: finite vectors of any floating type, computed with as float32.
        k: clusters wanted.
        max_iter: Lloyd iterations per restart.
        tol: a restart ends when no row changes its cluster, or when the centroids' summed squared
            shift is at most ``tol`` times the mean variance of a feature (scikit-learn's rule).
        backend: who finds nearest centroids. ``torch`` and ``faiss`` on the CPU or the GPU; ``cuml`` runs
            the Lloyd iterations on a GPU. ``auto``: faiss where it is installed, the work is on the CPU
            and ``k`` ≥ 100, else torch.
        device: ``cpu`` or ``cuda``.
        metric: ``cosine`` is spherical k-means (Dhillon and Modha 2001): rows and centroids have length 1.
        nested: most of the ``max_iter`` iterations look at a quarter of the rows (``NESTED``), where that is
            64 a centroid: half the time for nearly the same inertia.

    Raises:
        ValueError: no rows, values that are not finite or beyond 1e15, or ``k`` or ``restarts`` < 1.
        UserError: the backend is not available on this machine, or lacks the metric.
    """
    x_ND = torch.as_tensor(x_ND)
    if x_ND.ndim != 2 or not len(x_ND) or k < 1 or restarts < 1:
        raise ValueError(f"k-means of {tuple(x_ND.shape)} with k={k}, restarts={restarts}")
    name, nearest = nearest_by(backend, k, device, metric)
    rows, mean_D, variance = prepare(x_ND, metric, device)
    min_shift = tol * variance

    best: tuple[float, torch.Tensor, torch.Tensor, torch.Tensor, int] | None = None
    for restart in range(restarts):
        parts = list(_nested(rows, k, seed)) if nested else [(rows, 1.0)]
        # Started among the rows that come first: a centroid on a row that is not there would run empty.
        centroids_KD = plus_plus(parts[0][0], k, np.random.default_rng([seed, restart]))
        iterations = 0
        for part, share in parts:
            most = max(1, round(share * max_iter))
            if name == "cuml":
                centroids_KD, done = _cuml_lloyd(part, centroids_KD, most, tol)
            else:
                centroids_KD, done = lloyd(part, centroids_KD, nearest, most, min_shift, metric == "cosine")
            iterations += done
        centroids_KD, assignment, squared = _settle(rows, centroids_KD, nearest)
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


def prepare(x_ND: torch.Tensor, metric: Metric, device: str) -> tuple[Rows, torch.Tensor, float]:
    """Rows ready for :func:`lloyd`, what was subtracted from them (float64 [D], on the CPU) and the mean
    variance of a feature.

    Raises:
        ValueError: values that are not finite or beyond 1e15.
    """
    rows = Rows(_place(x_ND, device), device, unit=metric == "cosine")
    stored = Rows(rows.data_ND, device)
    largest = float(torch.stack([part.abs().max() for part in stored.chunks()]).max())
    if not largest <= 1e15:
        raise ValueError(f"k-means of values up to {largest}: squares must be finite in float32")
    mean_D = torch.stack([part.double().sum(dim=0) for part in rows.chunks()]).sum(dim=0) / len(rows)
    if metric == "euclidean":
        # Squared distances by |x|² − 2x·c + |c|² lose digits to a common offset; without one they do not.
        rows = Rows(rows.data_ND, device, shift_D=mean_D.to(torch.float32))
    wide = 4 * x_ND.numel()
    if wide <= WIDE_BYTES or (device != "cpu" and 2 * wide <= torch.cuda.mem_get_info(device)[0]):
        rows = rows.widened()
    squares = torch.stack([part.square().sum(dtype=torch.float64) for part in rows.chunks()]).sum()
    variance = float(squares) / x_ND.numel()
    if metric == "cosine":
        variance -= float(mean_D.square().mean())
        mean_D = torch.zeros_like(mean_D)
    return rows, mean_D.cpu(), max(0.0, variance)


def _nested(rows: Rows, k: int, seed: int) -> Iterator[tuple[Rows, float]]:
    """Ever more of the rows, each part within the next, and the share of the iterations for it. What a part
    of too few rows leaves out, the next does."""
    order = np.random.default_rng([seed, 1 << 32]).permutation(len(rows))
    owed = 0.0
    for part, share in NESTED:
        n = int(part * len(rows))
        owed += share
        if n < NESTED_ROWS * k and part < 1:
            continue
        if part == 1:
            yield rows, owed
        else:
            chosen = torch.from_numpy(np.sort(order[:n])).to(rows.data_ND.device)
            yield Rows(rows.data_ND[chosen], rows.device, rows.shift_D, rows.unit), owed
        owed = 0.0


def plus_plus(rows: Rows, k: int, rng: np.random.Generator) -> torch.Tensor:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007): of 2 + ln k candidates, each drawn with a
    probability proportional to its squared distance from the centroids so far, the one is taken that
    leaves the smallest sum of squared distances.

    Of many rows it looks at a random part, ``START_BYTES`` or 32 a centroid: on all of them it would take
    longer than the iterations that follow.

    Returns:
        float32 [K, D], different rows; K < k when fewer than k different rows were looked at.
    """
    some = max(START_BYTES // (4 * rows.dim), 32 * k)
    if len(rows) > some:
        part = np.sort(rng.choice(len(rows), some, replace=False))
        rows = Rows(rows.take(torch.from_numpy(part)), rows.device)
    n_candidates = 2 + int(math.log(k))
    chosen = [int(rng.integers(len(rows)))]
    norms_N = torch.cat([_squared_norms(part_ND) for part_ND in rows.chunks()])
    closest_N = _to_each(rows, norms_N, rows.take(chosen))[0]
    while len(chosen) < k:
        # Summed on the CPU: a running sum on a GPU differs from time to time.
        cumulative = closest_N.cpu().double().cumsum(0)
        total = float(cumulative[-1])
        if total == 0.0:
            break
        # A draw in (0, total] never falls on a row at distance 0, which is one that was chosen.
        draws = torch.as_tensor((1.0 - rng.random(n_candidates)) * total)
        candidates = torch.searchsorted(cumulative, draws).clamp_(max=len(rows) - 1)
        left_LN = torch.minimum(_to_each(rows, norms_N, rows.take(candidates)), closest_N)
        winner = int(left_LN.sum(dim=1, dtype=torch.float64).argmin())
        chosen.append(int(candidates[winner]))
        closest_N = left_LN[winner]
    return rows.take(chosen)


def lloyd(
    rows: Rows,
    centroids_KD: torch.Tensor,
    nearest: Nearest,
    max_iter: int,
    min_shift: float,
    spherical: bool = False,
) -> tuple[torch.Tensor, int]:
    """Moves centroids to the means of their rows (of length 1 when ``spherical``) until no row changes its
    cluster, the summed squared shift is at most ``min_shift``, or ``max_iter`` iterations are done.

    A cluster that ran empty is put on the row that is farthest from its centroid.

    Returns:
        float32 [K, D] and the number of iterations.
    """
    before: torch.Tensor | None = None
    for iteration in range(1, max_iter + 1):
        sums_KD, counts_K = _zeros(centroids_KD)
        parts = []
        for rows_ND, labels in assign(rows.chunks(len(centroids_KD)), centroids_KD, nearest):
            accumulate(rows_ND, labels, sums_KD, counts_K)
            parts.append(labels)
        assignment = torch.cat(parts)
        if before is not None and torch.equal(assignment, before):
            return centroids_KD, iteration
        if bool((counts_K == 0).any()):
            centroids_KD, assignment, _ = _settle(rows, centroids_KD, nearest)
            sums_KD, counts_K = _zeros(centroids_KD)
            start = 0
            for rows_ND in rows.chunks(len(centroids_KD)):
                accumulate(rows_ND, assignment[start : start + len(rows_ND)], sums_KD, counts_K)
                start += len(rows_ND)
        moved_KD = (sums_KD / counts_K[:, None]).to(torch.float32)
        if spherical:
            moved_KD = F.normalize(moved_KD, dim=1)
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
    rows: Rows, centroids_KD: torch.Tensor, nearest: Nearest
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Final centroids, assignment int64 [N] and exact squared distances float32 [N].

    While a cluster is empty, its centroid is put on the row farthest from its own and takes the rows
    that are closer to it. Such a row is at distance 0 and never leaves, so this ends after at most K
    rounds; it stops early when every row lies on a centroid, and then the empty ones are left out.
    """
    labels_parts, squared_parts = [], []
    for rows_ND, labels in assign(rows.chunks(len(centroids_KD)), centroids_KD, nearest):
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
        row_D = rows.take([farthest])[0]
        centroids_KD[empty[0]] = row_D
        to_row = torch.cat([(r - row_D).square().sum(dim=1) for r in rows.chunks()])
        closer = to_row < squared
        assignment = torch.where(closer, empty[0], assignment)
        squared = torch.where(closer, to_row, squared)


def nearest_exactly(rows_ND: torch.Tensor, centroids_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest centroid of each row, int64 [N], and the squared distance to it, float32 [N].

    Where the matrix product cannot tell centroids apart they are compared by differences, the first of
    equals taken: the answer for a row does not depend on the rows beside it.
    """
    norms_K = _squared_norms(centroids_KD)
    part_NK = torch.addmm(norms_K, rows_ND, centroids_KD.T, alpha=-2)  # lacks |x|², the same for all
    best_N, labels = part_NK.min(dim=1)
    noise_N = NOISE * (_squared_norms(rows_ND) + norms_K.max())
    close_NK = part_NK <= (best_N + noise_N)[:, None]
    doubtful = (close_NK.sum(dim=1) > 1).nonzero()[:, 0]
    for some in doubtful.split(max(1, CHUNK_VALUES // rows_ND.shape[1] // 16)):
        at, centroid = close_NK[some].nonzero().unbind(1)
        exact_NK = torch.full((len(some), len(centroids_KD)), torch.inf, device=rows_ND.device)
        for i, j in zip(
            *(t.split(max(1, CHUNK_VALUES // rows_ND.shape[1])) for t in (at, centroid)), strict=True
        ):
            exact_NK[i, j] = (rows_ND[some[i]] - centroids_KD[j]).square().sum(dim=1)
        smallest = exact_NK.min(dim=1).values
        labels[some] = (exact_NK == smallest[:, None]).to(torch.uint8).argmax(dim=1)
    return labels, (rows_ND - centroids_KD[labels]).square().sum(dim=1)


def _to_each(rows: Rows, norms_N: torch.Tensor, targets_LD: torch.Tensor) -> torch.Tensor:
    """Squared distances float32 [L, N]; exactly 0 between equal rows and only there.

    The matrix product leaves rounding noise where a distance is tiny beside the norms: those few are
    recomputed as a difference.

    Args:
        norms_N: squared norms of the rows, on the device to compute on.
    """
    norms_L = _squared_norms(targets_LD)
    parts = []
    start = 0
    for rows_ND in rows.chunks(len(targets_LD)):
        scale_NL = norms_N[start : start + len(rows_ND), None] + norms_L
        start += len(rows_ND)
        squared_NL = torch.addmm(scale_NL, rows_ND, targets_LD.T, alpha=-2)
        doubtful = (squared_NL < 1e-4 * scale_NL).nonzero()
        for i, j in (pair.unbind(1) for pair in doubtful.split(max(1, CHUNK_VALUES // rows.dim))):
            squared_NL[i, j] = (rows_ND[i] - targets_LD[j]).square().sum(dim=1)
        parts.append(squared_NL.T)
    return torch.cat(parts, dim=1)


def _squared_norms(rows_ND: torch.Tensor) -> torch.Tensor:
    """float32 [N], without an array of squares."""
    return torch.linalg.vector_norm(rows_ND, dim=1).square_()


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


def nearest_by(
    backend: BackendName, k: int, device: str, metric: Metric = "euclidean"
) -> tuple[str, Nearest]:
    """The backend's name and how it finds nearest centroids, see :func:`kmeans`.

    A package of the GPU counts as there only beside a GPU: importing it proves nothing.
    """
    on_gpu = device != "cpu"
    if on_gpu and not torch.cuda.device_count():
        raise UserError(f"k-means on device={device}: torch sees no GPU here; use device=cpu")
    if backend == "cuml" and not on_gpu:
        raise UserError(f"k-means backend=cuml does not run on device={device}; use backend=torch")
    if backend == "cuml" and metric == "cosine":
        raise UserError("k-means backend=cuml has no metric=cosine; use backend=torch")
    if backend == "faiss" or (backend == "auto" and not on_gpu and k >= FAISS_FROM_K):
        try:
            return "faiss", (_faiss_gpu_nearest(device) if on_gpu else _faiss_nearest())
        except ImportError as error:
            if backend == "faiss":
                package = "faiss-gpu" if on_gpu else "faiss-cpu"
                raise UserError(f"k-means backend=faiss: {error}; pip install {package}") from None
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


def _faiss_gpu_nearest(device: str) -> Nearest:
    """Raises ImportError where faiss is not there, is the CPU's, or sees no GPU."""
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        raise ImportError("this faiss is built without GPUs")
    if not faiss.get_num_gpus():
        raise ImportError("faiss sees no GPU")
    import faiss.contrib.torch_utils  # lets faiss take tensors where they are

    resources = faiss.StandardGpuResources()

    def nearest(rows_ND: torch.Tensor, centroids_KD: torch.Tensor) -> torch.Tensor:
        with torch.cuda.device(device):
            found = faiss.knn_gpu(resources, rows_ND.contiguous(), centroids_KD.contiguous(), 1)
        return found[1][:, 0]

    return nearest


def _cuml_lloyd(
    rows: Rows, centroids_KD: torch.Tensor, max_iter: int, tol: float
) -> tuple[torch.Tensor, int]:
    """cuML's Lloyd iterations from our start."""
    try:
        from cuml.cluster import KMeans
    except ImportError as error:
        raise UserError(
            f"k-means backend=cuml: {error}; pip install cuml-cu13, or use backend=torch"
        ) from None
    start = centroids_KD.cpu().numpy()
    model = KMeans(
        n_clusters=len(start), init=start, n_init=1, max_iter=max_iter, tol=tol, output_type="numpy"
    )
    model.fit(rows.widened().data_ND)  # taken where it is, by its CUDA array interface
    centers = torch.as_tensor(np.asarray(model.cluster_centers_), dtype=torch.float32)
    return centers.to(centroids_KD.device), int(model.n_iter_)
