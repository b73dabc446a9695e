"""What does decoding less gain, and what does it lose?

Triage: footage with a keyframe a second of which a tenth is manipulation is curated (decode, motion, hands,
gate) with and without the first look at packet sizes, through the command line, one process each. Speed is
the ratio of the processor seconds that a clip costs, all processes and the calibration included; recall the
share of the clips kept without triage that are kept with it. The footage's pictures repeat within a scene,
but clips and scenes are not aligned. The short form decodes one of the videos without triage, and compares
on that one. Some of its clips are also curated the staged way, as the reference does it (see staged.py).

Modes: B-frame footage, and the real sample where it is, decoded exactly and fast.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CACHE, RESULTS, write_result
from end_to_end import call, job_for

from ego2robot.decode import ClipFailure, probe, read_clips
from ego2robot.decode.policy import backends
from ego2robot.decode.pyav import open_stream
from ego2robot.sample import load_truths, make_footage, truth_of_clip
from ego2robot.stages.motion import motion_scores
from ego2robot.store.rundir import RunDir
from ego2robot.types import Blob, Clip, FrameSpec

KINDS = ("manipulating", *("walking", "idle") * 4, "idle")  # one span in ten
SAMPLE = Path(__file__).parents[2] / "shared" / "samples" / "two_hands_mixer_20s.mp4"
RECIPE = (
    "clips.duration_s=6",
    "clips.stride_s=6",
    "gate.min_motion=0.02",
    "embed.videomae.weights=none",
    "embed.clip.weights=none",
    "embed.hand_motion=false",
    "hands.dense=false",
    "export.enabled=false",
)
VIDEOS = 5
MINUTES, CALIBRATE = {True: 80.0, False: 200.0}, {True: 80, False: 160}  # of the short and the full form
STAGED_CLIPS = 20
EVERY = 5  # frames compared; no multiple of what B-frames repeat after
THRESHOLDS = (0.02, 0.05, 0.1)  # of motion, that decisions are compared at


def footage(minutes: float) -> Path:
    """Five 720p30 H.264 videos with GOPs of 30, made once."""
    folder = CACHE / f"triage-{minutes:g}min"
    if not folder.is_dir():
        aside = folder.with_name(f".{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        make_footage(
            aside, minutes=minutes, gop=30, seed=7, width=1280, height=720, videos=VIDEOS, kinds=KINDS
        )
        aside.rename(folder)
    return folder


def curate(source: Path, run_dir: Path, *more: str) -> dict[str, Any]:
    """One run from the command line: clips, processor and wall seconds, and its decisions."""
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [sys.executable, "-m", "ego2robot.cli", "run", "folder", *RECIPE, *more]
    began, used = time.monotonic(), _children_s()
    subprocess.run(
        [*command, f"source.path={source}", f"run_dir={run_dir}"], check=True, stdout=subprocess.DEVNULL
    )
    run = RunDir.open(run_dir)
    rows = run.table("clips", ["clip_id", "name", "start_s", "end_s", "decision", "reason"]).to_pylist()
    return {
        "clips": len(rows),
        "kept": sum(row["decision"] == "kept" for row in rows),
        "not_decoded": sum((row["reason"] or "").startswith("triage") for row in rows),
        "processor_s": round(_children_s() - used, 1),
        "wall_s": round(time.monotonic() - began, 1),
        "rows": rows,
        "audit": {k: v for k, v in (run.read_json("plan/triage.json") or {}).items() if k != "calibration"},
    }


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def triage(quick: bool) -> dict[str, Any]:
    """Both runs over the same footage, and what one gains and loses."""
    minutes, calibrate = MINUTES[quick], CALIBRATE[quick]
    folder = footage(minutes)
    scratch = CACHE / "triage-runs"
    full = curate(folder, scratch / "full", *(["source.limit=1"] if quick else []))
    looked = curate(
        folder,
        scratch / "looked",
        "decode.triage.enabled=true",
        f"decode.triage.calibrate_clips={calibrate}",
    )
    few = job_for(RunDir.open(scratch / "full"), scratch, False, 1)
    few["tasks"] = few["tasks"][:: max(1, len(few["tasks"]) // STAGED_CLIPS)]
    staged = call("staged.py", {**few, "as_reference": True}, scratch)
    staged_s = staged["curation"]["seconds"] / len(few["tasks"])
    truths = load_truths(folder)
    rows, sets = looked.pop("rows"), full.pop("rows")
    worth = {row["clip_id"] for row in sets if row["decision"] == "kept"}
    found = {row["clip_id"] for row in rows if row["decision"] == "kept"}
    shares = [
        truth_of_clip(truths[Path(row["name"]).stem], row["start_s"], row["end_s"])["shares"]["manipulating"]
        for row in rows
    ]
    shutil.rmtree(scratch, ignore_errors=True)
    return {
        "footage": {
            "minutes": minutes,
            "kind": "1280x720 30/s h264, GOP 30",
            "manipulation": round(float(np.mean(shares)), 3),
        },
        "recipe": RECIPE,
        "full": full,
        "triage": looked,
        "triage_speedup": round(
            (full["processor_s"] / full["clips"]) / (looked["processor_s"] / looked["clips"]), 3
        ),
        "cpu_curation_with_triage_vs_staged": round(staged_s / (looked["wall_s"] / looked["clips"]), 3),
        "staged": {
            "clips": len(few["tasks"]),
            "seconds_a_clip": round(staged_s, 3),
            "same_decisions": round(
                float(np.mean([(c in found) == one["kept"] for c, one in staged["decisions"].items()])), 4
            ),
        },
        "triage_recall": round(len(worth & found) / len(worth), 4) if worth else None,
        "kept_without_triage": len(worth),
    }


# -- modes ----------------------------------------------------------------------------------------


def decoded(path: Path, fast: bool) -> tuple[float, list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Processor seconds, frames and times of each clip, and their motion."""
    blob = Blob(str(path), 0, path.stat().st_size)
    info = probe(path.name, blob)
    n = int(info.duration_s * 6)
    clips = [Clip(f"{k:016x}", "v", k, min(36, n - k), 6.0) for k in range(0, n - 9, 36)]
    spec, backend = FrameSpec(), backends()["pyav"]
    spent, frames, times, motion = 0.0, [], [], []
    source = read_clips(path.name, blob, info, clips, spec, backend, "cpu", fast)
    while True:
        began = time.process_time()
        clip = next(source, None)
        spent += time.process_time() - began
        if clip is None:
            return spent, frames, times, np.array(motion)
        if isinstance(clip, ClipFailure):
            raise RuntimeError(f"{path.name}: {clip.reason}")
        frames.append(clip.frames_THWC[::EVERY].numpy())
        times.append(clip.times_s)
        motion.append(float(motion_scores([clip])[0]))


def libav_s(path: Path) -> float:
    """Processor seconds of decoding every picture and converting none."""
    blob = Blob(str(path), 0, path.stat().st_size)
    began = time.process_time()
    with open_stream(path.name, blob) as (container, stream):
        for packet in container.demux(stream):
            packet.decode()
    return time.process_time() - began


def modes(quick: bool) -> dict[str, Any]:
    """Exact against fast on B-frame footage, and on the real sample where it is."""
    paths = {}
    for codec in ("h264", "hevc"):
        folder = CACHE / f"modes-{codec}-{'short' if quick else 'long'}"
        if not folder.is_dir():
            aside = folder.with_name(f".{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            make_footage(aside, minutes=0.3 if quick else 1.0, codec=codec, gop=240, bframes=3)
            aside.rename(folder)
        paths[f"generated {codec}, GOP 240, 3 B-frames"] = folder / "ego_000.mp4"
    if SAMPLE.is_file():
        paths["two_hands_mixer_20s"] = SAMPLE
    found = {}
    for name, path in paths.items():
        spent: dict[str, list[float]] = {"exact": [], "fast": [], "libav": []}
        for _ in range(1 if quick else 3):
            spent["libav"].append(libav_s(path))
            seconds, exact, exact_times, exact_motion = decoded(path, False)
            spent["exact"].append(seconds)
            seconds, fast, fast_times, fast_motion = decoded(path, True)
            spent["fast"].append(seconds)
        error = np.concatenate(
            [((a.astype(np.float32) - b) ** 2).mean((1, 2, 3)) for a, b in zip(exact, fast, strict=True)]
        )
        early = np.concatenate(exact_times) - np.concatenate(fast_times)
        same_time = np.concatenate(
            [np.abs(a - b)[::EVERY] < 1e-6 for a, b in zip(exact_times, fast_times, strict=True)]
        )
        psnr = 10 * np.log10(255**2 / np.maximum(error, 1e-3))
        change = (fast_motion - exact_motion) / np.maximum(exact_motion, 1e-6)
        agree = [np.mean((exact_motion >= t) == (fast_motion >= t)) for t in THRESHOLDS]
        found[name] = {
            "clips": len(exact_motion),
            "exact_vs_libav_rate": round(min(spent["libav"]) / min(spent["exact"]), 3),
            "fast_vs_exact_rate": round(min(spent["exact"]) / min(spent["fast"]), 3),
            "frames_at_another_time": round(float(np.mean(early > 1e-6)), 3),
            "earlier_at_most_s": round(float(early.max()), 4),
            "psnr_of_frames_at_the_same_time": _decibels(psnr[same_time]),
            "psnr_of_the_others": _decibels(psnr[~same_time]),
            "motion_change_mean": round(float(change.mean()), 4),
            "motion_change_most": round(float(np.abs(change).max()), 4),
            "motion_decisions_agree": round(float(np.mean(agree)), 4),
        }
    return found


def _decibels(psnr: np.ndarray) -> dict[str, float] | None:
    if not len(psnr):
        return None
    return {"median": round(float(np.median(psnr)), 1), "least": round(float(psnr.min()), 1)}


def run(quick: bool) -> dict[str, Any]:
    """Everything, in the short or the full form."""
    torch.set_num_threads(1)
    CACHE.mkdir(parents=True, exist_ok=True)
    return {**triage(quick), "modes": modes(quick)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--modes", action="store_true", help="only exact against fast")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    CACHE.mkdir(parents=True, exist_ok=True)
    body = {"modes": modes(args.quick)} if args.modes else run(args.quick)
    name = "decode-modes" if args.modes else "triage"
    path = write_result(name, __doc__, {"quick": args.quick, **body}, ("torch", "av", "numpy"), args.out)
    print(path.read_text(encoding="utf-8"), path)


if __name__ == "__main__":
    main()
