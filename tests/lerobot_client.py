"""Opens an export with the real lerobot and holds it against the frames it was made of.

    HF_HUB_OFFLINE=1 .venv-lerobot/bin/python tests/lerobot_client.py DATASET FRAMES

FRAMES holds ``<clip_id>.npy``, uint8 RGB [T, H, W, 3], of every episode. Runs in lerobot's own environment,
so it imports nothing of ours. Frames are decoded by pyav, and by torchcodec where it loads.
Prints one line; a failed check is a traceback and a non-zero exit.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

try:
    from lerobot.datasets.feature_utils import get_hf_features_from_features
    from lerobot.datasets.io_utils import load_info, load_stats, load_tasks
except ImportError:  # up to lerobot 0.4
    from lerobot.datasets.utils import get_hf_features_from_features, load_info, load_stats, load_tasks

LEROBOT = f"lerobot {version('lerobot')}"
PICTURE = "observation.images.top"
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
MIN_PSNR = 30.0


def check(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def decoders() -> list[str]:
    """lerobot's decoders that work here; torchcodec needs an FFmpeg of the system."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        print(f"torchcodec does not load: {str(error).strip().splitlines()[0]}")
        return ["pyav"]
    return ["torchcodec", "pyav"]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return math.inf if error == 0 else float(10 * np.log10(255**2 / error))


def to_uint8(picture_CHW: torch.Tensor) -> np.ndarray:
    """float32 [3, H, W] in [0, 1] to uint8 [H, W, 3]."""
    return (picture_CHW.numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8)


def episodes_of(root: Path) -> list[dict[str, Any]]:
    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def every_frame(dataset: Any, episodes: list[dict[str, Any]], sources: list[np.ndarray]) -> float:
    """Decodes all frames: the right picture at the right time. Returns the lowest PSNR."""
    fps, lowest = dataset.fps, math.inf
    check(len(dataset) == sum(len(s) for s in sources), f"{len(dataset)} frames")
    for number, (episode, source) in enumerate(zip(episodes, sources, strict=True)):
        check(episode["length"] == len(source), f"episode {number}: {episode['length']} frames")
        for k in range(len(source)):
            item = dataset[episode["dataset_from_index"] + k]
            where = f"episode {number}, frame {k}"
            check(item["episode_index"].item() == number, f"{where}: episode {item['episode_index']}")
            check(item["frame_index"].item() == k, f"{where}: frame {item['frame_index']}")
            check(abs(item["timestamp"].item() - k / fps) < 1e-6, f"{where}: time {item['timestamp']}")
            check([item["task"]] == episode["tasks"], f"{where}: task {item['task']!r}")
            picture = to_uint8(item[PICTURE])
            own = psnr(picture, source[k])
            check(own >= MIN_PSNR, f"{where}: PSNR {own:.1f} dB")
            rivals = [source[j] for j in (k - 1, k + 1) if 0 <= j < len(source)]
            rivals += [other[min(k, len(other) - 1)] for other in sources if other is not source]
            best = max((psnr(picture, rival) for rival in rivals), default=-math.inf)
            check(
                own > best - 0.5, f"{where}: closer to another frame ({best:.1f} dB) than its own ({own:.1f})"
            )
            lowest = min(lowest, own)
    return lowest


def across_edges(
    reopen: Callable[..., Any], episodes: list[dict[str, Any]], sources: list[np.ndarray]
) -> None:
    """``delta_timestamps`` that reach over both ends: clamped to the episode, and flagged."""
    steps = [-2, -1, 0, 1, 2]
    times = [step / reopen().fps for step in steps]
    keys = (PICTURE, "observation.state", "action")
    dataset = reopen(delta_timestamps=dict.fromkeys(keys, times))
    plain = dataset.hf_dataset.with_format("numpy")
    for number, (episode, source) in enumerate(zip(episodes, sources, strict=True)):
        first, n = episode["dataset_from_index"], len(source)
        for k in sorted({0, 1, n // 2, n - 2, n - 1} & set(range(n))):
            item = dataset[first + k]
            inside = [min(max(k + step, 0), n - 1) for step in steps]
            padded = [not 0 <= k + step < n for step in steps]
            for key in keys:
                check(item[f"{key}_is_pad"].tolist() == padded, f"episode {number}, frame {k}: {key} padding")
            for picture, j in zip(item[PICTURE], inside, strict=True):
                value = psnr(to_uint8(picture), source[j])
                check(value >= MIN_PSNR, f"episode {number}, frame {k} → {j}: PSNR {value:.1f} dB")
            for key in keys[1:]:
                expected = np.stack([plain[first + j][key] for j in inside])
                check(np.array_equal(item[key].numpy(), expected), f"episode {number}, frame {k}: {key}")


def statistics(values_ND: np.ndarray) -> dict[str, np.ndarray]:
    values = values_ND.astype(np.float64)
    found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    found |= {name: np.quantile(values, q, axis=0) for name, q in QUANTILES.items()}
    return found


def same_statistics(found: dict[str, Any], values_ND: np.ndarray, count: int, what: str) -> None:
    check(np.asarray(found["count"]).tolist() == [count], f"{what}: count {found['count']}")
    for name, expected in statistics(values_ND).items():
        got = np.asarray(found[name], np.float64).reshape(-1)
        check(np.allclose(got, expected, rtol=1e-9, atol=1e-9), f"{what}: {name} {got} is not {expected}")


def all_statistics(dataset: Any, episodes: list[dict[str, Any]], sources: list[np.ndarray]) -> int:
    """Recomputes the statistics of every feature, of each episode and of the whole."""
    table = dataset.hf_dataset.with_format("numpy")
    names = [name for name in dataset.features if name != PICTURE]
    for name in names:
        values = np.asarray(table[:][name]).reshape(len(table), -1)
        same_statistics(dataset.meta.stats[name], values, len(table), name)
        for episode in episodes:
            some = values[episode["dataset_from_index"] : episode["dataset_to_index"]]
            found = {s: episode[f"stats/{name}/{s}"] for s in ("count", *statistics(some))}
            same_statistics(found, some, len(some), f"episode {episode['episode_index']}: {name}")
    check(dataset.meta.stats[PICTURE]["mean"].shape == (3, 1, 1), "shape of the picture's statistics")
    for channel in range(3):
        parts = [source[..., channel].reshape(-1) for source in sources]
        whole = {s: v if s == "count" else v[channel] for s, v in dataset.meta.stats[PICTURE].items()}
        pixels = (np.concatenate(parts) / 255)[:, None]
        same_statistics(whole, pixels, len(table), f"{PICTURE} channel {channel}")
        for episode, part in zip(episodes, parts, strict=True):
            found = {
                s: episode[f"stats/{PICTURE}/{s}"] for s in ("count", *QUANTILES, "min", "max", "mean", "std")
            }
            found = {s: v if s == "count" else v[channel] for s, v in found.items()}
            same_statistics(
                found, (part / 255)[:, None], episode["length"], f"episode {episode['episode_index']}"
            )
    return len(names) + 1


def one_epoch(dataset: Any) -> int:
    """Every frame once, in shuffled batches that are finite. Returns the number of batches."""
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True, num_workers=2)
    seen: list[int] = []
    batches = 0
    for batch in loader:
        batches += 1
        seen += batch["index"].tolist()
        for key in (PICTURE, "observation.state", "action"):
            check(bool(torch.isfinite(batch[key]).all()), f"{key} is not finite")
            check(tuple(batch[key].shape[1:]) == tuple(_shape(dataset, key)), f"{key}: {batch[key].shape}")
    check(sorted(seen) == list(range(len(dataset))), "the epoch did not visit every frame once")
    return batches


def _shape(dataset: Any, key: str) -> tuple[int, ...]:
    shape = dataset.features[key]["shape"]
    return (shape[2], shape[0], shape[1]) if key == PICTURE else shape


def empty(root: Path) -> None:
    """An export without episodes. Neither LeRobotDataset nor its metadata class opens any such dataset
    (``datasets`` refuses tables without rows), so each file is read by lerobot's function for it."""
    info = load_info(root)
    check(info["total_episodes"] == info["total_frames"] == info["total_tasks"] == 0, "not empty")
    check(len(load_tasks(root)) == 0 and load_stats(root) == {}, "tasks or statistics of nothing")
    rows = pq.read_table(root / info["data_path"].format(chunk_index=0, file_index=0))
    check(rows.num_rows == 0, "rows in an empty dataset")
    expected = get_hf_features_from_features(info["features"])
    check(rows.schema.types == expected.arrow_schema.types, f"{rows.schema} is not {expected.arrow_schema}")
    check(rows.schema.names == expected.arrow_schema.names, "names of the columns")
    check(episodes_of(root) == [], "episodes in an empty dataset")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset", type=Path)
    parser.add_argument("frames", type=Path)
    args = parser.parse_args()
    root = args.dataset
    if json.loads((root / "meta" / "info.json").read_text())["total_episodes"] == 0:
        empty(root)
        print(f"{LEROBOT} reads its files: empty, and valid")
        return
    backends = decoders()
    reopen = partial(LeRobotDataset, "local/export", root=root, video_backend=backends[0])
    dataset = reopen()
    # First, while this process has opened no decoder that the loader's processes would inherit.
    batches = one_epoch(dataset)
    episodes = episodes_of(root)
    sources = [np.load(args.frames / f"{episode['clip_id']}.npy") for episode in episodes]
    check(dataset.num_episodes == len(episodes), f"{dataset.num_episodes} episodes")
    lowest = math.inf
    for backend in backends:
        using = partial(reopen, video_backend=backend)
        lowest = min(lowest, every_frame(using(), episodes, sources))
        across_edges(using, episodes, sources)
    features = all_statistics(dataset, episodes, sources)
    last = reopen(episodes=[len(episodes) - 1])
    check(len(last) == len(sources[-1]), "loading the last episode alone")
    check(psnr(to_uint8(last[0][PICTURE]), sources[-1][0]) >= MIN_PSNR, "the last episode's first frame")
    print(
        f"{LEROBOT} opens it: {len(episodes)} episodes, {len(dataset)} frames all decoded "
        f"({' and '.join(backends)}), "
        f"lowest PSNR {lowest:.1f} dB, padding right at {2 * len(episodes)} edges, "
        f"statistics of {features} features equal, {batches} batches in one epoch"
    )


if __name__ == "__main__":
    main()
