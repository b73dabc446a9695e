"""Can actions be learnt from pictures? A network is trained, and set against predictors that see none.

See :mod:`ego2robot.check.rule` for what decides.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ego2robot import __version__
from ego2robot.check import data, model, rule
from ego2robot.errors import UserError
from ego2robot.progress import Progress, Show

LEAST_EPISODES, LEAST_MOMENTS = 10, 100
SEEDS = 3
CONSTANT = 1e-6  # of the largest deviation: dimensions that move less do not count


@dataclass(frozen=True)
class Options:
    """How much is looked at, and for how long.

    Attributes:
        size: (height, width) of the pictures that the network sees.
        most_moments: read from the dataset.
        most_steps: batches of 64, of each seed.
    """

    camera: str | None = None
    seeds: int = SEEDS
    size: tuple[int, int] = (64, 112)
    most_moments: int = 20_000
    most_steps: int = 1500
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        learnable: by the rule of :mod:`ego2robot.check.rule`.
        network: pictures against the better of zero and mean.
        beside_last: the last action and pictures against the last action alone.
        r2: by predictor, float64 [seeds, A] of the dimensions that count.
        names: of those dimensions; ``constant``: of the others.
        curves: the looks at the validation part, one tuple a seed.
        warnings: one line each.
    """

    learnable: bool
    network: rule.Comparison
    beside_last: rule.Comparison
    r2: dict[str, np.ndarray]
    names: tuple[str, ...]
    constant: tuple[str, ...]
    curves: tuple[tuple[model.Look, ...], ...]
    held_out: tuple[tuple[int, int], ...]  # (episodes, moments) of each seed
    episodes: int
    videos: int | None
    moments: int
    left_out: tuple[tuple[str, str], ...]
    holes: int
    by_video: bool
    seconds: float
    device: str
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""

        def seen(comparison: rule.Comparison) -> dict[str, Any]:
            return {
                "against": comparison.against,
                "gains": list(comparison.gains),
                "mean": comparison.mean,
                "spread": comparison.spread,
                "interval": [comparison.low, comparison.high],
                "holds": comparison.holds,
            }

        return {
            "made_by": f"ego2robot {__version__}",
            "verdict": "learnable" if self.learnable else "not",
            "rule": {"least_gain": rule.LEAST_GAIN, "interval": 0.95, "draws": rule.DRAWS},
            "pictures_against_none": seen(self.network),
            "pictures_beside_last_action": seen(self.beside_last),
            "split_by": "source video" if self.by_video else "episode",
            "held_out": [{"episodes": e, "moments": n} for e, n in self.held_out],
            "episodes": self.episodes,
            "videos": self.videos,
            "moments": self.moments,
            "left_out": [{"what": what, "why": why} for what, why in self.left_out],
            "moments_with_holes": self.holes,
            "constant_dimensions": list(self.constant),
            "r2": {
                name: {
                    predictor: {"mean": _number(_mean(table[:, d])), "spread": _number(_spread(table[:, d]))}
                    for predictor, table in self.r2.items()
                }
                for d, name in enumerate(self.names)
            },
            "curves": [
                [{"step": k.step, "training": k.training, "validation": k.validation} for k in looks]
                for looks in self.curves
            ],
            "seconds": round(self.seconds, 1),
            "device": self.device,
            "warnings": list(self.warnings),
        }


def check(path: Path, options: Options | None = None, show: Show = lambda _: None) -> Verdict:
    """Trains ``options.seeds`` networks on parts of a LeRobot v3.0 dataset and judges them on the rest.

    Raises:
        UserError: no such dataset, or too little in it to tell.
    """
    began = time.monotonic()
    options = options or Options()
    if options.seeds < 1:
        raise UserError(f"seeds={options.seeds}: at least one network must be trained")
    device = _device(options.device)
    dataset = data.open_dataset(path, options.camera)
    with tempfile.TemporaryDirectory(prefix="ego2robot-check-") as folder:
        moments = data.load(
            dataset,
            Path(folder) / "pictures",
            options.size,
            options.most_moments,
            _timed(show, "reading", "pictures"),
        )
        counts = _enough(path, dataset, moments)
        warnings = list(counts.warnings)
        deviation = moments.action_NA.std(0)
        moves = deviation > CONSTANT * max(float(deviation.max()), 1e-12)
        splits = [
            rule.split(moments.group_N, moments.episode_N, k, counts.by_video) for k in range(options.seeds)
        ]
        if counts.by_video and not all(rule.usable(moments.episode_N, parts) for parts in splits):
            counts = dataclasses.replace(counts, by_video=False)
            warnings.append("one source video is most of the dataset: held out by episode, not by video")
            splits = [rule.split(moments.group_N, moments.episode_N, k, False) for k in range(options.seeds)]
        by_group = counts.by_video and all(
            len(np.unique(moments.group_N[parts.test])) >= rule.MANY_GROUPS for parts in splits
        )
        unit_N = moments.group_N if by_group else moments.episode_N
        tell = _timed(show, "training", "steps", options.seeds * options.most_steps)
        trials, curves = [], []
        for seed, parts in enumerate(splits):
            before = seed * options.most_steps
            told = functools.partial(lambda before, step: tell(before + step), before)
            trial, looks = _trial(moments, moves, unit_N, parts, seed, options, device, told)
            trials.append(trial)
            curves.append(looks)
        held = [(len(np.unique(moments.episode_N[parts.test])), len(parts.test)) for parts in splits]
    totals = {name: sum(t.error(name).sum() for t in trials) for name in ("zero", "mean")}
    network = rule.compare(trials, "network", min(totals, key=lambda name: totals[name]))
    beside = rule.compare(trials, "line and network", "line")
    if options.seeds < SEEDS:
        warnings.append(f"{options.seeds} seeds: their spread says little; {SEEDS} are the least that do")
    return Verdict(
        network.holds,
        network,
        beside,
        {
            name: np.stack([trial.r2(name) for trial in trials])
            for name in ("network", *rule.BASELINES, "line and network")
        },
        tuple(name for name, m in zip(dataset.names, moves, strict=True) if m),
        tuple(name for name, m in zip(dataset.names, moves, strict=True) if not m),
        tuple(curves),
        tuple(held),
        counts.episodes,
        counts.videos,
        len(moments.now_N),
        moments.left_out,
        moments.holes,
        counts.by_video,
        time.monotonic() - began,
        _device_name(device),
        tuple(warnings),
    )


@dataclass(frozen=True)
class _Counts:
    episodes: int
    videos: int | None
    by_video: bool
    warnings: tuple[str, ...]


def _enough(path: Path, dataset: data.Dataset, moments: data.Moments) -> _Counts:
    """Refuses what nothing can be told from, says what makes it hard to tell."""
    episodes, videos = len(np.unique(moments.episode_N)), len(np.unique(moments.group_N))
    why = f"; {moments.left_out[0][0]}: {moments.left_out[0][1]}" if moments.left_out else ""
    total = len(moments.now_N)
    if episodes < LEAST_EPISODES:
        raise UserError(
            f"{path}: cannot tell: {episodes} usable episodes of {len(dataset.episodes)}, at least "
            f"{LEAST_EPISODES} are needed{why}"
        )
    if total < LEAST_MOMENTS:
        raise UserError(
            f"{path}: cannot tell: {total} usable moments, at least {LEAST_MOMENTS} are needed "
            f"({moments.holes} have actions that are not finite){why}"
        )
    if moments.action_NA.std(0).max() < 1e-12:
        raise UserError(f"{path}: cannot tell: no dimension of `{data.ACTION}` ever changes")
    if moments.holes > total:
        raise UserError(
            f"{path}: cannot tell: {moments.holes} of {moments.holes + total} moments have actions that are "
            "not finite"
        )
    warnings = []
    by_video = moments.grouped and videos > 1
    if not moments.grouped:
        warnings.append(
            "the dataset does not say which video an episode was cut from: held out by episode, so that "
            "neighbouring episodes may be on both sides"
        )
    elif videos == 1:
        warnings.append(
            "one source video: held out by episode; whether it holds for other videos is not told by this"
        )
    elif videos < 4:
        warnings.append(f"{videos} source videos: what holds for them may not hold for others")
    if moments.left_out:
        what, cause = moments.left_out[0]
        warnings.append(f"{len(moments.left_out)} episodes left out, such as {what}: {cause}")
    if moments.holes:
        warnings.append(f"{moments.holes} moments left out: an action that is not finite")
    return _Counts(episodes, videos if moments.grouped else None, by_video, tuple(warnings))


def _trial(
    moments: data.Moments,
    moves: np.ndarray,
    unit_N: np.ndarray,
    parts: rule.Split,
    seed: int,
    options: Options,
    device: torch.device,
    told: Callable[[int], None],
) -> tuple[rule.Trial, tuple[model.Look, ...]]:
    train = moments.action_NA[parts.train][:, moves]
    mean, deviation = train.mean(0), train.std(0)
    # A dimension that moves, but not in this training part, is judged in its own units.
    deviation = np.where(deviation > 0, deviation, 1.0)
    truth, last = ((table[:, moves] - mean) / deviation for table in (moments.action_NA, moments.last_NA))
    table = model.Table(moments.pictures, moments.now_N, moments.before_N, truth)
    fitted = model.fit(
        table, parts.train, parts.validation, parts.test, seed, options.most_steps, device, told
    )
    predictions = {
        "network": fitted.test_NA,
        **rule.baselines(truth[parts.test], last[parts.test], -mean / deviation),
        **rule.lines(
            (truth[parts.validation], last[parts.validation], fitted.validation_NA),
            (last[parts.test], fitted.test_NA),
        ),
    }
    return rule.Trial(unit_N[parts.test], truth[parts.test], predictions), fitted.looks


def _device(wanted: str) -> torch.device:
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UserError("device=cuda: torch sees no GPU here; leave --device out, or see `ego2robot doctor`")
    return torch.device("cuda" if there and wanted != "cpu" else "cpu")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _timed(show: Show, stage: str, unit: str, total: int = 0) -> Callable[..., None]:
    """A function of (done, total) that shows them with a rate and an ETA."""
    began = time.monotonic()

    def tell(done: int, total: int = total) -> None:
        rate = done / max(1e-9, time.monotonic() - began)
        eta_s = (total - done) / rate if rate else None
        show(Progress(stage, done, total, rate=rate, eta_s=eta_s, unit=unit))

    return tell


def _mean(values: Sequence[float] | np.ndarray) -> float:
    sound = np.asarray(values)[np.isfinite(values)]
    return float(sound.mean()) if len(sound) else float("nan")


def _spread(values: Sequence[float] | np.ndarray) -> float:
    sound = np.asarray(values)[np.isfinite(values)]
    return float(sound.std(ddof=1)) if len(sound) > 1 else 0.0


def _number(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None
