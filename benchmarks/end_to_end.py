"""How much faster is our way than the staged way on the same cores, and does it decide the same?

Both ways get the same footage, clips, thresholds, weights and cores, each in processes of its own: curation
(decode, motion, hands, gate), and curation with both embedders. The staged way is measured twice: as the
reference runs it (one process that converts every frame, on a quarter of the clips), which is what the
ratios without a further word are to; and ``parallel``, a process for every core, which nobody ships, as the
most that could be made of it without another design. The clock starts when the models of the parent process
are loaded and stops when the last row is written; the start of our worker processes and the loading of their
hand networks is in our time, but for what they import, which begins with the command. Ours comes before and
after the staged way: with both embedders, then curation alone. Beside the ratios by the clock are those by
CPU time, which other work disturbs less.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from common import CACHE, cpu_seconds, run_group
from memory import proportional_bytes

from ego2robot import config, pipeline
from ego2robot.jobs import pool
from ego2robot.progress import Progress
from ego2robot.sample import make_footage
from ego2robot.stages.inference import compute_dtype
from ego2robot.store.rundir import RunDir
from ego2robot.store.units import units_from_table

# A quarter of the footage is manipulation; no span of it is the whole of a round.
KINDS = ("walking", "manipulating", "idle", "walking")
CODECS = {"h264": {"gop": 30, "bframes": 0}, "hevc": {"gop": 60, "bframes": 2}}
BUDGET_S = 3600.0  # of one way; the part's own budget is what ends it


def footage(quick: bool) -> Path:
    """A folder with 1080p videos of both codecs, made at the first call and kept."""
    minutes = 0.8 if quick else 2.0
    folder = CACHE / f"footage-{minutes:g}min"
    for codec, options in CODECS.items():
        if (folder / codec).is_dir():
            continue
        aside = folder / f".{codec}"
        shutil.rmtree(aside, ignore_errors=True)
        make_footage(aside, minutes=minutes, codec=codec, videos=2, kinds=KINDS, **options)
        aside.rename(folder / codec)
    return folder


# -- our way, in a process of its own -------------------------------------------------------------


def ours(job: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the ``bench`` recipe. The clock runs from the plan to the last committed row."""
    pool.warm()  # as the command does
    overrides = [f"source.path={job['footage']}", f"run_dir={job['run_dir']}", "device=cpu"]
    if not job["embed"]:
        overrides += ["embed.videomae.weights=none", "embed.clip.weights=none"]
    marks: dict[str, tuple[float, float]] = {}

    def show(progress: Progress) -> None:
        stage = progress.stage.partition(":")[0]
        marks.setdefault(stage, (time.perf_counter(), cpu_seconds()))

    outcome = pipeline.run(config.load("bench", [*overrides, *job["overrides"]]), show)
    (began, began_cpu), (ended, ended_cpu) = marks["planning"], marks["clustering"]
    metrics = [line for line in outcome.run.metrics() if "stage_seconds" in line]
    return {
        "seconds": ended - began,
        "cpu_seconds": ended_cpu - began_cpu,
        "stage_seconds": metrics[-1]["stage_seconds"],
        "rss_bytes": max(line["rss_bytes"] for line in metrics),
    }


def decisions(run: RunDir) -> dict[str, dict[str, Any]]:
    columns = ["clip_id", "motion", "hand_visibility", "decision"]
    return {
        row["clip_id"]: {
            "motion": row["motion"],
            "hand_visibility": row["hand_visibility"],
            "kept": row["decision"] == "kept",
        }
        for row in run.table("clips", columns).to_pylist()
    }


def job_for(run: RunDir, folder: Path, embed: bool, processes: int) -> dict[str, Any]:
    """What the others are told: the clips of our plan, our thresholds."""
    gate = run.read_json("plan/gate.json")
    assert gate is not None
    tasks = [
        {
            "clip_id": clip.clip_id,
            "path": unit.video.blob.path,
            "first": clip.first,
            "n_frames": clip.n_frames,
            "sample_fps": clip.sample_fps,
        }
        for unit in units_from_table(run.units())
        for clip in unit.clips
    ]
    return {
        "tasks": sorted(tasks, key=lambda task: (task["path"], task["first"])),
        "min_motion": gate["min_motion"],
        "min_hand_visibility": gate["min_hand_visibility"],
        "hands_every": run.config.hands.every,
        "seed": run.config.seed,
        "processes": processes,
        "folder": str(folder),
        "embed": embed,
    }


# -- both -------------------------------------------------------------------------------


def weights_bytes() -> int:
    """Of both embedders as they run on this CPU, told from their shapes alone."""
    from transformers import CLIPConfig, CLIPModel, VideoMAEConfig, VideoMAEModel

    with torch.device("meta"):
        both = VideoMAEModel(VideoMAEConfig()), CLIPModel(CLIPConfig())
    return sum(p.numel() for model in both for p in model.parameters()) * compute_dtype("cpu").itemsize


class MemoryWatch:
    """Looks at the memory of all our processes once a second: shared pages count once."""

    def __enter__(self) -> MemoryWatch:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(1.0):
            others = sum(proportional_bytes(child) for child in me.children())
            self.peak = max(self.peak, others)


def call(script: str, job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Runs ``benchmarks/<script> JOB ANSWER`` and returns its answer.

    Raises:
        RuntimeError: it failed, or did not answer in time.
    """
    asked, answer = folder / "job.json", folder / "answer.json"
    asked.write_text(json.dumps(job), encoding="utf-8")
    answer.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).parent / script), str(asked), str(answer)]
    status, last = run_group(command, BUDGET_S)
    if status != 0:
        raise RuntimeError(f"{script}: " + (f"no answer within {BUDGET_S:.0f} s" if status is None else last))
    return json.loads(answer.read_text(encoding="utf-8"))


def scratch(name: str) -> Path:
    folder = CACHE / f"scratch-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def run(quick: bool, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Both ways, one after the other; also leaves ``job.json`` in the cache, for the peers to do the same."""
    videos, folder = footage(quick), scratch("end-to-end")
    for path in sorted(videos.glob("*/*.mp4")):  # warm page cache
        path.read_bytes()
    cores = torch.get_num_threads()
    found: dict[str, list[dict[str, Any]]] = {"curation": [], "all": []}
    peaks: dict[str, int] = {}

    def once(name: str) -> None:
        run_dir = folder / f"ours-{name}"
        job = {"footage": str(videos), "run_dir": str(run_dir), "embed": name == "all"}
        with MemoryWatch() as memory:
            found[name].append(call("end_to_end.py", {**job, "overrides": list(overrides)}, folder))
        peaks[name] = max(peaks.get(name, 0), memory.peak)

    once("all")
    planned = job_for(RunDir.open(folder / "ours-all"), folder, True, cores)
    (CACHE / "job.json").write_text(json.dumps(planned), encoding="utf-8")
    staged = call("staged.py", planned, folder)
    once("curation")
    aside = scratch("reference")
    few = {**planned, "tasks": planned["tasks"][:: 1 if quick else 4], "processes": 1, "folder": str(aside)}
    reference = call("staged.py", {**few, "as_reference": True}, aside)
    shutil.rmtree(aside)
    alone = as_reference(reference, few, planned, staged, found)
    last = RunDir.open(folder / "ours-all")
    mine = decisions(last)
    result = {
        "minutes_of_video": round(sum(t["n_frames"] / t["sample_fps"] for t in planned["tasks"]) / 60, 2),
        "overrides": list(overrides),
        "ours": {name: _mean(runs) for name, runs in found.items()},
        "staged": {name: staged[name] for name in ("curation", "all", "stages")},
        "cpu_curation_vs_staged_parallel": _ratio(staged["curation"], found["curation"], "seconds"),
        "cpu_end_to_end_vs_staged_parallel": _ratio(staged["all"], found["all"], "seconds"),
        "parallel_by_cpu_time": {
            "curation": _ratio(staged["curation"], found["curation"], "cpu_seconds"),
            "end_to_end": _ratio(staged["all"], found["all"], "cpu_seconds"),
        },
        "cpu_curation_vs_staged": alone["ratio_to_ours"]["curation"],
        "cpu_end_to_end_vs_staged": alone["ratio_to_ours"]["all"],
        "as_the_reference_runs_it": alone,
        "memory": {
            "peak_curation_MiB": round(peaks["curation"] / 2**20),
            "peak_MiB": round(peaks["all"] / 2**20),
            "peak_besides_weights_MiB": round((peaks["all"] - weights_bytes()) / 2**20),
        },
        **agreement(mine, staged["decisions"]),
        "decisions": {clip: one["kept"] for clip, one in mine.items()},
        "cosine_to_staged": cosines(last, folder / "vectors.npz"),
    }
    shutil.rmtree(folder)
    return result


def _mean(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    stages = {stage for one in runs for stage in one["stage_seconds"]}
    return {
        "seconds": statistics.mean(one["seconds"] for one in runs),
        "cpu_seconds": statistics.mean(one["cpu_seconds"] for one in runs),
        "seconds_of_each": [round(one["seconds"], 2) for one in runs],
        "stage_seconds": {
            stage: round(statistics.mean(one["stage_seconds"].get(stage, 0.0) for one in runs), 2)
            for stage in sorted(stages)
        },
        "peak_rss_MiB": round(max(one["rss_bytes"] for one in runs) / 2**20),
    }


def as_reference(
    reference: Mapping[str, Any],
    few: Mapping[str, Any],
    planned: Mapping[str, Any],
    staged: Mapping[str, Any],
    found: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """What the staged way takes in one process, from some of the clips, and its ratio to ours."""
    clips, kept = len(few["tasks"]), sum(one["kept"] for one in reference["decisions"].values())
    all_clips, all_kept = len(planned["tasks"]), sum(one["kept"] for one in staged["decisions"].values())
    curation = reference["curation"]["seconds"] / clips
    embedding = (reference["all"]["seconds"] - reference["curation"]["seconds"]) / max(kept, 1)
    whole = {"curation": curation * all_clips, "all": curation * all_clips + embedding * all_kept}
    ratios = {
        name: round(whole[name] / statistics.mean(one["seconds"] for one in runs), 3)
        for name, runs in found.items()
    }
    return {
        "clips": clips,
        "kept": kept,
        "curation_seconds_a_clip": round(curation, 3),
        "embedding_seconds_a_kept_clip": round(embedding, 3),
        "stages": reference["stages"],
        "ratio_to_ours": ratios,
    }


def _ratio(theirs: Mapping[str, Any], ours_: Sequence[Mapping[str, Any]], what: str) -> float:
    return round(theirs[what] / statistics.mean(one[what] for one in ours_), 3)


def agreement(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The share of clips with the same decision, and those that differ with both ways' scores."""
    differ = [clip for clip in theirs if mine[clip]["kept"] != theirs[clip]["kept"]]
    return {
        "clips": len(theirs),
        "kept": sum(one["kept"] for one in theirs.values()),
        "decisions_agree": round(1 - len(differ) / len(theirs), 4),
        "differ": {clip: {"ours": mine[clip], "theirs": theirs[clip]} for clip in differ},
    }


def cosines(run: RunDir, path: Path) -> dict[str, float]:
    """The least cosine between our vector of a clip and the staged one, by embedder."""
    found = {}
    with np.load(path) as staged:
        for name in ("videomae", "clip"):
            table = run.table(f"embeddings/{name}")
            rows = zip(table["clip_id"].to_pylist(), table["embedding"].to_pylist(), strict=True)
            own = {clip: np.array(vector, np.float32) for clip, vector in rows}
            pairs = [(own[c], v) for c, v in zip(staged["ids"], staged[name], strict=True) if c in own]
            cosine = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs]
            found[name] = round(min(cosine), 5)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("answer", type=Path)
    args = parser.parse_args()
    answer = ours(json.loads(args.job.read_text(encoding="utf-8")))
    args.answer.write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
