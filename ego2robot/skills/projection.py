"""Embeddings as points on a plane, for a person to look at. No number of a run depends on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

MAX_POINTS = 20_000  # more take minutes and cannot be told apart on a page
PCA_DIMS = 50
TITLES = {"tsne": "t-SNE", "umap": "UMAP"}


@dataclass(frozen=True)
class Projection:
    """``points``: method → float32 [N, 2], NaN for rows that were not projected. ``warnings``: what a
    reader of the picture must know."""

    points: dict[str, np.ndarray]
    warnings: list[str]


def project(
    x_ND: np.ndarray | torch.Tensor,
    methods: Sequence[str],
    seed: int,
    device: str = "cpu",
    total: int | None = None,
    unit: bool = False,
) -> Projection:
    """Projects rows onto two dimensions with ``tsne`` and ``umap``, after PCA to 50.

    t-SNE has perplexity min(30, n − 1) (the reference's), UMAP min(15, n − 1) neighbours; both are
    seeded. Up to three points, or points that are all the same, are laid out by PCA instead: their
    neighbourhoods say nothing. Beyond 20,000 rows a seeded sample is projected. On ``cuda`` cuML is
    used where it is installed. Without umap-learn there is no UMAP, only a warning.

    Args:
        x_ND: finite.
        total: clips that the rows are a sample of; None: they are all there are.
        unit: look at directions alone.
    """
    n, warnings = len(x_ND), []
    rows = np.arange(n)
    if n > MAX_POINTS:
        rows = np.sort(np.random.default_rng(seed).choice(n, MAX_POINTS, replace=False))
    total = n if total is None else total
    if methods and len(rows) < total:
        warnings.append(f"the projection shows {len(rows):,} of {total:,} clips, drawn with the seed")
    shown_ND = torch.as_tensor(x_ND)[torch.from_numpy(rows)].to("cpu", torch.float32)
    if unit:
        shown_ND = torch.nn.functional.normalize(shown_ND, dim=1)
    chosen_ND = shown_ND.numpy()
    points: dict[str, np.ndarray] = {}
    use_cuml = device != "cpu" and torch.cuda.device_count() > 0
    reduced = pca(chosen_ND, PCA_DIMS) if methods and n else np.zeros((n, 2), np.float32)
    flat = n <= 3 or bool((chosen_ND == chosen_ND[0]).all())
    for method in dict.fromkeys(methods):
        if flat:
            plane = reduced[:, :2]
        else:
            try:
                plane = _plane(method, reduced, seed, use_cuml, warnings)
            except ImportError as error:
                warnings.append(f"no {TITLES[method]}: {error}; pip install umap-learn")
                continue
        points[method] = np.full((n, 2), math.nan, np.float32)
        points[method][rows] = plane
    return Projection(points, warnings)


def pca(x_ND: np.ndarray, dims: int) -> np.ndarray:
    """The first ``dims`` principal components of each row, float32 [N, max(2, min(dims, N, D))]; an axis
    points where its largest weight is positive. Zeros stand for axes that the data does not have."""
    centred_ND = x_ND.astype(np.float64) - x_ND.mean(axis=0, dtype=np.float64)
    n, d = x_ND.shape
    if n >= d:
        axes_DP = np.linalg.eigh(centred_ND.T @ centred_ND)[1][:, ::-1]
    else:
        axes_DP = np.linalg.svd(centred_ND, full_matrices=False)[2].T
    axes_DP = axes_DP[:, :dims]
    strongest = np.abs(axes_DP).argmax(axis=0)
    reduced_NP = centred_ND @ (axes_DP * np.sign(axes_DP[strongest, np.arange(axes_DP.shape[1])]))
    return np.pad(reduced_NP, ((0, 0), (0, max(0, 2 - reduced_NP.shape[1])))).astype(np.float32)


def _plane(method: str, x_ND: np.ndarray, seed: int, use_cuml: bool, warnings: list[str]) -> np.ndarray:
    """float32 [N, 2] by cuML, where that is wanted and runs, else by the CPU's package."""
    if use_cuml:
        try:
            return (_cuml_tsne if method == "tsne" else _cuml_umap)(x_ND, seed)
        except ImportError:
            pass  # the CPU's give the same kind of picture, more slowly
        except RuntimeError as error:  # a driver that is too old, memory that is taken
            cause = (str(error).strip().splitlines() or [repr(error)])[0][:200]
            warnings.append(f"cuML's {TITLES[method]} failed ({cause}); the CPU's was used")
    return (_tsne if method == "tsne" else _umap)(x_ND, seed)


def _cuml_tsne(x_ND: np.ndarray, seed: int) -> np.ndarray:
    from cuml.manifold import TSNE

    model = TSNE(perplexity=min(30, len(x_ND) - 1), random_state=seed, output_type="numpy")
    return np.asarray(model.fit_transform(x_ND), np.float32)


def _cuml_umap(x_ND: np.ndarray, seed: int) -> np.ndarray:
    from cuml.manifold import UMAP

    model = UMAP(n_neighbors=min(15, len(x_ND) - 1), random_state=seed, output_type="numpy")
    return np.asarray(model.fit_transform(x_ND), np.float32)


def _tsne(x_ND: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.manifold import TSNE

    perplexity = min(30, len(x_ND) - 1)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(x_ND)


def _umap(x_ND: np.ndarray, seed: int) -> np.ndarray:
    from umap import UMAP

    # One thread: with a seed umap-learn cannot use more, and says so when it is not told.
    model = UMAP(n_neighbors=min(15, len(x_ND) - 1), random_state=seed, n_jobs=1)
    return model.fit_transform(x_ND)
