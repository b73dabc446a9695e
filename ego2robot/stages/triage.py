"""The first look: which clips cannot survive the gate, told from the sizes of their packets.

An encoder spends bytes on what is new in a picture: a turning head, hands at work and a still bench leave
different traces in the sizes of keyframes and of the pictures between them, before anything is decoded.
Which traces mean what differs between cameras, so nothing is known beforehand: some clips of the footage
itself are decoded and gated, and a rule is fitted to them. Groups of pictures are the unit of the look, for
hands may be at work in a part of a clip only, and sizes are measured against those around them, so that
quality settings and scenes matter little.

A rule is only as good as its estimate. It says how many of the kept clips it would have lost among clips
that it was not fitted to, and is off where that is too many or where too few were kept to know. Then a
random share of what it ruled out is decoded anyway: :func:`estimate_recall`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np

from ego2robot.decode.sizes import Sizes, packet_sizes
from ego2robot.types import Blob, Clip, Video, VideoInfo, short_id

CONTEXT_S = 60.0  # sizes are compared with those of so much before and after
NAMES = ("key", "between", "ratio", "change")
WINDOWS = 6  # of a clip, each with the features of its group of pictures
MIN_KEPT, MIN_DROPPED = 12, 12  # calibration clips below which nothing can be said
MIN_RULED_OUT = 0.1  # share below which a first look is not worth its second pass
STRATA = 16
BANDS = (0.5, 0.7, 0.8, 0.86, 0.92, 0.96)  # shares of clips below the edges
FOLDS = 5
RIDGE = 1.0
REFITS = 2
STRANGE = 6.0  # standard deviations; a clip unlike all that was calibrated on is decoded
MARGINS = (1.0, 1.15, 1.3, 1.5, 2.0, 3.0)  # how much further out than a normal tail the threshold is tried
REASON = "triage: packet sizes unlike those of kept clips"


def group_of(video: Video) -> str:
    """The kind of footage that one rule is fitted to: what sizes depend on besides the picture."""
    info = video.info
    assert info is not None
    return f"{video.source} {info.codec} {info.width}x{info.height} {info.fps:.0f}/s"


# -- looking --------------------------------------------------------------------------------------


def features(
    name: str, blob: Blob, info: VideoInfo, clips: Sequence[Clip], max_keyframe_gap_s: float
) -> np.ndarray:
    """What packet sizes say of some clips of one video; decodes nothing.

    Args:
        clips: in ascending order, near each other: the stretch they span is held, with its surroundings.

    Returns:
        float64 [n, WINDOWS, len(NAMES)], see :func:`features_of`.

    Raises:
        VideoError: the file cannot be read.
    """
    begin, end = clips[0].start_s - CONTEXT_S, max(clip.end_s for clip in clips) + CONTEXT_S
    sizes = packet_sizes(name, blob, info, max(0.0, begin), end)
    spans = np.array([(clip.start_s, clip.end_s) for clip in clips])
    return features_of(sizes, spans, max_keyframe_gap_s)


def features_of(sizes: Sizes, spans_s: np.ndarray, max_keyframe_gap_s: float) -> np.ndarray:
    """What packet sizes say of some spans.

    Per group of pictures: the logarithm of its keyframe's bytes and of the mean of the others', both less
    their median over ``CONTEXT_S`` on either side; the difference of the two logarithms; and how unevenly
    the others' bytes are spread over the group.

    Args:
        spans_s: float64 [n, 2], begin and end in seconds after the video's first frame.

    Returns:
        float64 [n, WINDOWS, len(NAMES)]: of the group in the middle of each window. A span is NaN where
        nothing can be said: keyframes further apart than ``max_keyframe_gap_s``, nothing but keyframes, or
        packets that are missing.
    """
    found = np.full((len(spans_s), WINDOWS, len(NAMES)), np.nan)
    at = np.flatnonzero(sizes.key)
    if not len(at) or not len(spans_s):
        return found
    stop = np.append(at[1:], len(sizes.key))
    step = float(np.median(np.diff(sizes.times_s))) if len(sizes.times_s) > 1 else 0.0
    edges = np.append(sizes.times_s[at], sizes.times_s[-1] + step)
    groups = np.full((len(at) + 1, len(NAMES)), np.nan)  # the last: no group
    for g, (first, last) in enumerate(zip(at.tolist(), stop.tolist(), strict=True)):
        between = sizes.bytes[first + 1 : last]
        if len(between) and edges[g + 1] - edges[g] <= max_keyframe_gap_s:
            key, mean = np.log(max(sizes.bytes[first], 1.0)), np.log(max(between.mean(), 1.0))
            groups[g] = key, mean, mean - key, _change(between)
    middles = (edges[1:] + edges[:-1]) / 2
    usual = groups[:-1, :2].copy()
    for g in np.flatnonzero(np.isfinite(usual[:, 0])).tolist():
        near = groups[:-1][np.abs(middles - middles[g]) <= CONTEXT_S, :2]
        usual[g] = np.nanmedian(near, 0)
    groups[:-1, :2] -= usual
    share = (np.arange(WINDOWS) + 0.5) / WINDOWS
    times = spans_s[:, :1] + share * (spans_s[:, 1:] - spans_s[:, :1])
    index = np.searchsorted(edges, times, side="right") - 1
    found[:] = groups[np.where(index < len(at), index, -1)]
    found[~np.isfinite(found).all((1, 2))] = np.nan
    return found


def _change(between: np.ndarray) -> float:
    """How unevenly bytes are spread over a group: log of the fullest third over the emptiest."""
    if len(between) < 6:
        return 0.0
    thirds = [max(part.mean(), 1.0) for part in np.array_split(between, 3)]
    return float(np.log(max(thirds) / min(thirds)))


# -- calibrating ----------------------------------------------------------------------------------


def choose(clip_ids: Sequence[str], looks: np.ndarray, n: int, seed: int) -> dict[str, float]:
    """The first clips to calibrate on, and how many clips each stands for.

    Clips that look alike are put into strata, and each stratum gives equally many, by the lowest hash of
    their ids: what is rare is seen too. Depends on the clips alone, not on their order.

    Args:
        looks: float64 [len(clip_ids), WINDOWS, len(NAMES)]; clips with NaN are not chosen.

    Returns:
        At most ``n`` ids and their weights, each at least 1.
    """
    order = _known(clip_ids, looks)
    if not order:
        return {}
    strata = _strata(looks[order], seed)
    chosen = _evenly([clip_ids[i] for i in order], strata, n, frozenset())
    return _weights([clip_ids[i] for i in order], strata, chosen)


def choose_more(
    clip_ids: Sequence[str], looks: np.ndarray, first: Mapping[str, float], kept: Mapping[str, bool], n: int
) -> dict[str, float]:
    """All clips to calibrate on, when some have been decoded: ``n`` more, and new weights for all.

    A regression on the first ones ranks all clips, and each band of ranks gives equally many: the bands are
    narrow at the top, so that more kept clips are seen, and few clips are decoded that would not be anyway.

    Args:
        first: the clips that :func:`choose` chose, and their weights.
        kept: the decisions on those of them that could be decoded.
    """
    order = _known(clip_ids, looks)
    ids = [clip_ids[i] for i in order]
    seen = [k for k, clip in enumerate(ids) if clip in first and clip in kept]
    decided = np.array([kept[ids[k]] for k in seen], bool)
    bands = np.zeros(len(ids), int)
    if decided.any() and not decided.all():
        weights = np.array([first[ids[k]] for k in seen])
        mean, scale = looks[order].mean((0, 1)), looks[order].std((0, 1))
        design = _design(_scaled(looks[order], mean, scale))
        scores = _pooled(design @ _logistic(design[seen], decided, weights))
        bands = np.searchsorted(np.quantile(scores, BANDS), scores, side="right")
    more = _evenly(ids, bands, n, frozenset(first))
    return _weights(ids, bands, first.keys() | more)


def _known(clip_ids: Sequence[str], looks: np.ndarray) -> list[int]:
    finite = np.flatnonzero(np.isfinite(looks).all((1, 2))).tolist()
    return sorted(finite, key=clip_ids.__getitem__)


def _evenly(ids: Sequence[str], parts: np.ndarray, n: int, without: Set[str]) -> set[str]:
    """``n`` clips, equally many of each part; small parts leave their share to the large."""
    ranked: list[list[str]] = [[] for _ in range(parts.max() + 1)]
    for clip, part in zip(ids, parts.tolist(), strict=True):
        if clip not in without:
            ranked[part].append(clip)
    chosen: set[str] = set()
    for k, part_ids in enumerate(sorted(ranked, key=len)):
        part_ids.sort(key=lambda clip: short_id("triage calibration", clip))
        chosen |= set(part_ids[: (n - len(chosen)) // (len(ranked) - k)])
    return chosen


def _weights(ids: Sequence[str], parts: np.ndarray, chosen: Set[str]) -> dict[str, float]:
    """How many clips of its part each chosen one stands for."""
    inside = np.array([clip in chosen for clip in ids])
    size, taken = np.bincount(parts), np.bincount(parts, inside)
    return {ids[k]: float(size[parts[k]] / taken[parts[k]]) for k in np.flatnonzero(inside).tolist()}


def _strata(looks: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    flat = np.concatenate([looks.mean(1), looks.min(1), looks.max(1)], 1)
    flat = (flat - flat.mean(0)) / np.maximum(flat.std(0), 1e-6)
    n = min(STRATA, len(np.unique(flat, axis=0)))
    return np.asarray(KMeans(n, n_init=4, random_state=seed).fit_predict(flat))


@dataclass(frozen=True)
class Rule:
    """Rules out clips whose score is below a threshold. Plain numbers: it is stored as JSON.

    Attributes:
        off: why it rules out nothing; None where it is in force.
        kept, dropped: clips that it was fitted to.
        recall, recall_low, recall_high: of kept clips, among clips that it was not fitted to, with the
            ends of its 95 % interval.
        ruled_out: the share of all clips that it is expected to rule out.
        mean, scale: of the features, [F].
        weights: of 1, the scaled features and their products in pairs, [1 + F + F (F + 1) / 2].
        threshold: of a clip's score.
    """

    off: str | None
    kept: int = 0
    dropped: int = 0
    recall: float | None = None
    recall_low: float | None = None
    recall_high: float | None = None
    ruled_out: float = 0.0
    mean: list[float] = field(default_factory=list)
    scale: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    threshold: float = 0.0

    def scores(self, looks: np.ndarray) -> np.ndarray:
        """float64 [n]; NaN where the features are."""
        scaled = _scaled(looks, np.array(self.mean), np.array(self.scale))
        return _pooled(_design(scaled) @ np.array(self.weights))

    def rules_out(self, looks: np.ndarray) -> np.ndarray:
        """bool [n]. Never a clip of which nothing could be said, or that is unlike all seen before."""
        if self.off is not None:
            return np.zeros(len(looks), bool)
        with np.errstate(invalid="ignore"):
            known = (np.abs(looks - self.mean) < STRANGE * np.maximum(self.scale, 1e-6)).all((1, 2))
            return known & (self.scores(looks) < self.threshold)


def fit(
    looks: np.ndarray, kept: np.ndarray, weights: np.ndarray, parts: Sequence[str], recall: float
) -> Rule:
    """The rule that would have lost fewer than ``1 - recall`` of the kept clips.

    A logistic regression on the features of windows and their products (a band of sizes can be what
    matters), with a ridge; a clip's score is nearly that of its best window. Scores of clips that a fold was
    not fitted to set the threshold, and those of one fold test the threshold that the others set; it is put
    further out until they agree.

    Args:
        looks: float64 [n, WINDOWS, F], of decoded clips.
        kept: bool [n], their decisions.
        weights: float64 [n], how many clips each stands for.
        parts: what a clip shares a scene with, such as its video: never in two folds, if there are enough.
        recall: of kept clips, wanted.
    """
    known = np.isfinite(looks).all((1, 2))
    looks, kept, weights = looks[known], kept[known], weights[known]
    parts = [part for part, fine in zip(parts, known, strict=True) if fine]
    n_kept, n_dropped = int(kept.sum()), int((~kept).sum())
    if n_kept < MIN_KEPT or n_dropped < MIN_DROPPED:
        text = f"{n_kept} clips were kept and {n_dropped} dropped of those it was to be fitted to"
        return Rule(f"{text}; it takes {MIN_KEPT} of either", n_kept, n_dropped)
    mean = np.average(looks.mean(1), 0, weights)
    scale = np.sqrt(np.average(((looks - mean) ** 2).mean(1), 0, weights))
    design = _design(_scaled(looks, mean, scale))
    folds = _folds(parts)
    scores = np.zeros(len(looks))
    for fold in range(FOLDS):
        here = folds == fold
        if here.any():
            scores[here] = _pooled(design[here] @ _logistic(design[~here], kept[~here], weights[~here]))
    found = None
    for margin in MARGINS:
        lost = np.zeros(len(looks), bool)
        for fold in range(FOLDS):
            here, others = folds == fold, (folds != fold) & kept
            if here.any() and others.any():
                lost[here] = scores[here] < _threshold(scores[others], recall, margin)
        share = float(weights[lost & kept].sum() / weights[kept].sum())
        found = margin, 1 - share, int((lost & kept).sum())
        if 1 - share >= recall:
            break
    assert found is not None
    margin, estimate, losses = found
    threshold = _threshold(scores[kept], recall, margin)
    ruled_out = float(weights[scores < threshold].sum() / weights.sum())
    low, high = (1 - end for end in wilson(losses, n_kept)[::-1])
    off = None
    if estimate < recall:
        off = f"it would have lost {100 * (1 - estimate):.1f} % of the kept clips"
    elif ruled_out < MIN_RULED_OUT:
        off = f"it would only rule out {100 * ruled_out:.0f} % of the clips"
    final = _logistic(design, kept, weights)
    return Rule(
        off, n_kept, n_dropped, estimate, low, high, ruled_out,
        mean.tolist(), scale.tolist(), final.tolist(), threshold,
    )  # fmt: skip


def _threshold(scores: np.ndarray, recall: float, margin: float) -> float:
    """Below this lies less than half of what may be lost of clips with such scores.

    With few of them the tail is taken for a normal one (the one-sided prediction bound, stretched by
    ``margin``), and never to begin above the lowest that was seen.
    """
    from scipy.stats import t

    allowed = (1 - recall) / 2
    n = len(scores)
    k = int(np.floor((n + 1) * allowed))
    lowest = float(np.sort(scores)[max(k - 1, 0)])
    spread = float(scores.std(ddof=1)) if n > 1 else 0.0
    if k >= 2:  # the tail itself is known
        return lowest - (margin - 1) * spread
    reach = float(t.ppf(1 - max(allowed, 1e-6), max(n - 1, 1))) * np.sqrt(1 + 1 / n)
    return min(lowest, float(scores.mean()) - margin * reach * spread)


def _folds(parts: Sequence[str]) -> np.ndarray:
    """int [n] in 0..FOLDS-1: whole parts, those of the lowest hash dealt out in turn."""
    if len(set(parts)) < FOLDS:
        parts = [str(i) for i in range(len(parts))]
    order = sorted(set(parts), key=lambda part: short_id("triage fold", part))
    fold = {part: i % FOLDS for i, part in enumerate(order)}
    return np.array([fold[part] for part in parts])


def _scaled(looks: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.clip((looks - mean) / np.maximum(scale, 1e-6), -STRANGE, STRANGE)


def _design(scaled: np.ndarray) -> np.ndarray:
    """[..., F] to [..., P]: 1, the features, their products in pairs."""
    a, b = np.triu_indices(scaled.shape[-1])
    return np.concatenate(
        [np.ones((*scaled.shape[:-1], 1)), scaled, scaled[..., a] * scaled[..., b]], axis=-1
    )


def _pooled(scores: np.ndarray) -> np.ndarray:
    """[n, WINDOWS] to [n]: the logarithm of the mean odds."""
    most = scores.max(1)
    return np.asarray(most + np.log(np.exp(scores - most[:, None]).mean(1)))


def _logistic(design: np.ndarray, kept: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weights [P] of a ridge logistic regression on all windows [n, WINDOWS, P] of clips, each with its
    clip's decision and weight, both decisions weighing the same.

    A kept clip may be at work in some windows only: after a first fit, half of its weight goes to those of
    its windows that look like it.
    """
    total = np.array([max(weights[~kept].sum(), 1e-9), max(weights[kept].sum(), 1e-9)])
    balance = weights / total[kept.astype(int)] * len(kept) / 2
    rows, wanted = design.reshape(-1, design.shape[-1]), np.repeat(kept, WINDOWS)
    share = np.full((len(kept), WINDOWS), 1 / WINDOWS)
    found = _newton(rows, wanted, (balance[:, None] * share).ravel(), np.zeros(rows.shape[1]))
    for _ in range(REFITS):
        scores = design[kept] @ found
        odds = np.exp(scores - scores.max(1, keepdims=True))
        share[kept] = 0.5 / WINDOWS + 0.5 * odds / odds.sum(1, keepdims=True)
        found = _newton(rows, wanted, (balance[:, None] * share).ravel(), found)
    return found


def _newton(rows: np.ndarray, wanted: np.ndarray, weights: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Ridge logistic regression of ``wanted`` on ``rows``, whose first column is 1; by Newton's steps."""
    ridge = RIDGE * np.eye(rows.shape[1])
    ridge[0, 0] = 1e-6
    found = start.copy()
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(rows @ found, -30, 30)))
        gradient = rows.T @ (weights * (wanted - p)) - ridge @ found
        curvature = (rows.T * (weights * p * (1 - p))) @ rows + ridge
        step = np.linalg.solve(curvature, gradient)
        found += step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-8:
            break
    return found


# -- auditing -------------------------------------------------------------------------------------


def audited(clip_id: str, share: float) -> bool:
    """Whether a clip is among the random ``share`` that is decoded though it was ruled out."""
    return int(short_id("triage audit", clip_id), 16) < share * 2**64


@dataclass(frozen=True)
class Recall:
    """What share of the clips that decoding everything would keep were kept.

    Attributes:
        estimate: None where nothing was audited.
        low, high: ends of its 95 % interval.
        found: kept clips.
        ruled_out: clips that were not decoded.
        audited, audited_kept: of the ruled out, decoded anyway; and kept after all.
    """

    estimate: float | None
    low: float
    high: float
    found: int
    ruled_out: int
    audited: int
    audited_kept: int


def estimate_recall(found: int, ruled_out: int, audited: int, audited_kept: int) -> Recall:
    """The recall of kept clips, from what the audit found.

    Args:
        found: kept clips, those of the audit included.
        ruled_out: clips that were ruled out and not decoded.
        audited: clips that were ruled out and decoded anyway, a random sample of all ruled out.
        audited_kept: how many of those were kept.
    """
    if not ruled_out:
        return Recall(1.0, 1.0, 1.0, found, 0, audited, audited_kept)

    def recall(lost_share: float) -> float:
        return found / total if (total := found + lost_share * ruled_out) else 1.0

    if not audited:
        return Recall(None, recall(1.0), 1.0, found, ruled_out, 0, 0)
    low, high = wilson(audited_kept, audited)
    return Recall(
        recall(audited_kept / audited), recall(high), recall(low), found, ruled_out, audited, audited_kept
    )


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The ends of the 95 % interval of a share, ``successes`` of ``n`` (Wilson 1927)."""
    p = successes / n
    middle = p + z * z / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, float((middle - half) / (1 + z * z / n))), min(
        1.0, float((middle + half) / (1 + z * z / n))
    )
