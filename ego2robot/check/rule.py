"""Who predicts better, by how much, and whether that is more than luck.

The rule. On episodes that were held out, a network that sees two pictures is set against the better of two
predictors that see none: zero, and the mean action of the training part. Its *gain* is the share of their
squared error that it takes away, all dimensions in units of their own deviation. The dataset is **learnable**
when all three hold:

1. the mean gain over the seeds is at least ``LEAST_GAIN``;
2. it is larger than the gains' standard deviation over the seeds;
3. its 95 % interval, by a bootstrap that draws held-out episodes (all of a source video together where each
   seed holds out at least ``MANY_GROUPS`` videos) with both errors paired, lies above zero.

The last action is set beside them, but not in the rule: where motion is smooth it wins without having seen
anything. Whether pictures add to it is asked for itself, by the same rule: a line through the last action
against a line through the last action and the network's word, both fitted on the validation part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_GAIN = 0.01
MANY_GROUPS = 8
DRAWS = 2000  # of the bootstrap
RIDGE = 1e-3
BASELINES = ("zero", "mean", "last action")


@dataclass(frozen=True)
class Split:
    """Places of moments: what is trained on, what ends training, what is judged."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Trial:
    """One seed: what was held out, and how everybody did on it.

    Attributes:
        unit_N: int64, episode (or video) of each held-out moment: what the bootstrap draws.
        truth_NA: float64, in deviations from the mean of the training part.
        predictions: by name, float64 [N, A] each: ``network``, the baselines, ``line`` and ``line and
            network``.
    """

    unit_N: np.ndarray
    truth_NA: np.ndarray
    predictions: dict[str, np.ndarray]

    def error(self, name: str) -> np.ndarray:
        """float64 [N]: squared error, summed over dimensions."""
        return ((self.predictions[name] - self.truth_NA) ** 2).sum(1)

    def r2(self, name: str) -> np.ndarray:
        """float64 [A]: 1 - squared error / squared deviation from the held-out part's own mean; NaN where
        that part does not move at all."""
        left = ((self.predictions[name] - self.truth_NA) ** 2).sum(0)
        spread = ((self.truth_NA - self.truth_NA.mean(0)) ** 2).sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(spread > 0, 1 - left / spread, np.nan)


@dataclass(frozen=True)
class Comparison:
    """One predictor against another, over all seeds.

    Attributes:
        gains: share of the other's squared error that it takes away, one a seed.
        low, high: 95 % interval of the mean gain.
        holds: whether it is better by the rule.
    """

    against: str
    gains: tuple[float, ...]
    low: float
    high: float

    @property
    def mean(self) -> float:
        return float(np.mean(self.gains))

    @property
    def spread(self) -> float:
        return float(np.std(self.gains, ddof=1)) if len(self.gains) > 1 else 0.0

    @property
    def holds(self) -> bool:
        return self.mean >= LEAST_GAIN and self.mean > self.spread and self.low > 0


def split(group_N: np.ndarray, episode_N: np.ndarray, seed: int, grouped: bool) -> Split:
    """Holds out about a quarter of the moments, whole groups at a time; other ones for each seed where there
    are enough.

    Args:
        group_N: int64, source video of each moment.
        grouped: hold out videos, not episodes; then the validation part is made of videos too where at
            least five are left to train on.
    """
    unit_N = group_N if grouped else episode_N
    test_units = _share(unit_N, seed, 4)
    test = np.isin(unit_N, test_units)
    rest_N = unit_N if len(np.unique(unit_N[~test])) >= 5 else episode_N
    validation = np.isin(rest_N, _share(rest_N[~test], seed, 5)) & ~test
    return Split(*(np.flatnonzero(part) for part in (~test & ~validation, validation, test)))


def usable(episode_N: np.ndarray, parts: Split) -> bool:
    """Whether enough is left to train on, to end training by, and to judge."""
    learnt_from = len(np.unique(episode_N[np.concatenate((parts.train, parts.validation))]))
    return learnt_from >= 5 and len(parts.train) >= 2 and len(parts.validation) >= 1 and len(parts.test) >= 1


def _share(unit_N: np.ndarray, seed: int, part: int) -> np.ndarray:
    """Units that hold about 1 / part of the moments: never all of them, at least one. Successive seeds take
    the next ones of one order."""
    units, sizes = np.unique(unit_N, return_counts=True)
    order = np.random.default_rng(len(units)).permutation(len(units))
    wanted, taken = sizes.sum() / part, [0]
    begun = 0
    for turn in range(seed + 1):
        taken, held = [], 0
        while len(taken) < len(units) - 1 and (not taken or held < wanted):
            place = order[(begun + len(taken)) % len(units)]
            # The last one is taken only where that brings the share nearer to what is wanted.
            if taken and held + sizes[place] - wanted > wanted - held:
                break
            taken.append(int(place))
            held += sizes[place]
        begun += len(taken)
        if turn == seed:
            break
    return units[taken]


def baselines(truth_NA: np.ndarray, last_NA: np.ndarray, zero_A: np.ndarray) -> dict[str, np.ndarray]:
    """What the predictors without pictures say; everything in deviations from the training part's mean."""
    return {
        "zero": np.broadcast_to(zero_A, truth_NA.shape),
        "mean": np.zeros_like(truth_NA),
        "last action": last_NA,
    }


def lines(
    fitted: tuple[np.ndarray, np.ndarray, np.ndarray], asked: tuple[np.ndarray, np.ndarray]
) -> dict[str, np.ndarray]:
    """A line through the last action, and one through it and the network's word, each dimension for itself.

    Args:
        fitted: truth, last action and the network's word on the moments that the lines are fitted on,
            float64 [N, A] each.
        asked: last action and the network's word where they are asked.
    """
    truth, last, said = fitted
    return {
        "line": _line(truth, (last,), (asked[0],)),
        "line and network": _line(truth, (last, said), asked),
    }


def _line(truth_NA: np.ndarray, inputs: Sequence[np.ndarray], asked: Sequence[np.ndarray]) -> np.ndarray:
    out = np.empty_like(asked[0])
    for d in range(truth_NA.shape[1]):
        x, at = (np.stack([np.ones(len(p[0])), *(v[:, d] for v in p)], 1) for p in (inputs, asked))
        gram = x.T @ x / max(1, len(x)) + RIDGE * np.diag([0.0] + [1.0] * len(inputs))
        out[:, d] = at @ np.linalg.lstsq(gram, x.T @ truth_NA[:, d] / max(1, len(x)), rcond=None)[0]
    return out


def compare(trials: Sequence[Trial], name: str, against: str) -> Comparison:
    """Sets one predictor against another on all that was held out."""
    gains, tables = [], []
    for trial in trials:
        ours, theirs = trial.error(name), trial.error(against)
        gains.append(1 - ours.sum() / max(theirs.sum(), 1e-12))
        units, place = np.unique(trial.unit_N, return_inverse=True)
        tables.append((units, np.bincount(place, ours, len(units)), np.bincount(place, theirs, len(units))))
    everyone = np.unique(np.concatenate([units for units, _, _ in tables]))
    pair = np.zeros((2, len(everyone)))
    for units, ours, theirs in tables:  # held out by several seeds: their sum
        pair[:, np.searchsorted(everyone, units)] += np.stack((ours, theirs))
    draws = np.random.default_rng(0).integers(0, len(everyone), (DRAWS, len(everyone)))
    drawn = pair[:, draws].sum(2)
    low, high = np.quantile(1 - drawn[0] / np.maximum(drawn[1], 1e-12), (0.025, 0.975))
    return Comparison(against, tuple(float(g) for g in gains), float(low), float(high))
