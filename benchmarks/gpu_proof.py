"""What does one GPU do: decoding, kernels, hands, embedders, and all of it end to end?

One command, no network, ten minutes: ``make gpu-proof``, or this file with any Python that has torch for the
GPU. Every part runs in a process of its own, so that a crash or a hang costs one part; what is not installed
is named and left out. Writes ``results/<date>-<gpu>.json``, of which ``ego2robot bench`` knows the ratios.
Weights are random: they are as fast as trained ones, and what they say means nothing.

What has to be there beside torch can be brought along, in a folder on ``PYTHONPATH`` (av, pydantic, tflite …)
and one that ``EGO2ROBOT_CACHE`` names (the hand networks, from ``ego2robot models pull``).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import CACHE, RESULTS, Part, Skip, machine, write_report

from ego2robot.bench import summary

PACKAGES = (
    "torch", "triton", "torchvision", "torchcodec", "PyNvVideoCodec", "nvidia-dali-cuda130", "av", "decord",
    "transformers", "numpy", "pyarrow", "pydantic", "tflite", "faiss-gpu", "cuml-cu13", "mediapipe",
)  # fmt: skip
# In order of worth: what comes last goes without when the time is up.
PARTS = (
    Part("limits", "gpu_proof", 60, "limits"),
    Part("videomae", "gpu_proof", 120, "videomae"),
    Part("hands", "hands", 120),
    Part("end_to_end_hevc", "gpu_proof", 200, "end_to_end_hevc"),
    Part("end_to_end_h264", "gpu_proof", 160, "end_to_end_h264"),
    Part("kernels", "kernels", 90),
    Part("decode", "decode", 150, "gpu_figures", quick=True),
    Part("clip", "gpu_proof", 60, "clip"),
    Part("kmeans", "kmeans", 120, "gpu", quick=True),
)
SOURCES = {
    "gpu_share_of_decode_ceiling": "end_to_end_hevc",
    "gpu_video_hours_per_hour_hevc": "end_to_end_hevc",
    "gpu_video_hours_per_hour_h264": "end_to_end_h264",
    "gpu_videomae_clips_per_s": "videomae",
    "gpu_hands_frames_per_s": "hands",
}
VIDEOMAE_GFLOP, CLIP_GFLOP = 361.0, 8.8  # a clip of 16 x 224 x 224, a picture of 224 x 224
FRAMES, HEIGHT, WIDTH = 36, 360, 640  # of a clip as the pipeline holds it


def timed(work: Callable[[], Any], seconds: float, warm_up: int = 3) -> float:
    """Median seconds of a call, by the device's own events."""
    import torch

    for _ in range(warm_up):
        work()
    torch.cuda.synchronize()
    samples: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(samples) < 5:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(stop) / 1000)
    return statistics.median(samples)


def matrix_tflops(seconds: float) -> float:
    """The rate of a large bf16 product on random data, TFLOP/s."""
    import torch

    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * n**3 / timed(lambda: a @ b, seconds) / 1e12


def limits(quick: bool) -> dict[str, Any]:
    """What the device can do at best: bytes read plus written a second, and matrix products."""
    import torch

    seconds = 1.0 if quick else 3.0
    size = (1 if quick else 4) << 30
    big = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    other = torch.empty_like(big)
    pinned = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(pinned, device="cuda")
    libraries = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    return {
        "device_copy_GBps": 2 * size / timed(lambda: other.copy_(big), seconds) / 1e9,
        "host_to_device_GBps": pinned.numel() / timed(lambda: there.copy_(pinned, True), seconds) / 1e9,
        "device_to_host_GBps": pinned.numel() / timed(lambda: pinned.copy_(there, True), seconds) / 1e9,
        "bf16_TFLOPs": matrix_tflops(seconds),
        "libnvcuvid": "libnvcuvid" in libraries,
    }


# -- models ---------------------------------------------------------------------------------------


def captured(step: Callable[[], Any]) -> Callable[[], None]:
    """A CUDA graph of ``step``."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


Embed = Callable[[Any], Any]  # model inputs to vectors
Prepare = Callable[[list[Any]], Any]  # frames on the device to model inputs


def swept(
    embed: Embed, prepare: Prepare, clips: Sequence[Any], batches: Sequence[int], seconds: float
) -> dict[str, Any]:
    """Items a second by batch: the model alone, as a graph, and a graph whose inputs are made from frames."""
    import torch

    found: dict[str, Any] = {"eager": {}, "graph": {}, "from_frames": {}, "notes": {}}
    with torch.inference_mode():
        for batch in batches:
            some = [clips[i % len(clips)] for i in range(batch)]
            try:
                for name, rate in _rates(embed, prepare, some, seconds).items():
                    found[name][batch] = rate
            except (RuntimeError, ValueError) as error:
                found["notes"][batch] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:300]
                if isinstance(error, torch.OutOfMemoryError):
                    break
    if not found["from_frames"]:
        raise RuntimeError(f"no batch ran: {found['notes']}")
    found["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def _rates(embed: Embed, prepare: Prepare, some: list[Any], seconds: float) -> dict[str, float]:
    pixels = prepare(some)
    expected = embed(pixels)
    made: dict[str, Any] = {}

    def alone() -> None:
        made["vectors"] = embed(pixels)

    replay = captured(alone)

    def from_frames() -> None:  # where frames lie is told anew each time, so that stays outside the graph
        pixels.copy_(prepare(some))
        replay()

    from_frames()
    apart = float((made["vectors"] - expected).abs().max() / expected.abs().max())
    if not apart < 0.05:
        raise RuntimeError(f"the graph's vectors are apart from the plain ones by {apart:.3g}")
    ways = {"eager": lambda: embed(pixels), "graph": replay, "from_frames": from_frames}
    return {name: round(len(some) / timed(way, seconds), 1) for name, way in ways.items()}


def frames_on_device(n: int) -> list[Any]:
    """Clips as the pipeline holds them: uint8 [36, 360, 640, 3] each, smooth enough to be resized fairly."""
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    coarse = torch.rand((n * FRAMES, 3, 45, 80), device="cuda", generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear")
    return list((255 * fine).to(torch.uint8).permute(0, 2, 3, 1).contiguous().split(FRAMES))


def videomae(quick: bool) -> dict[str, Any]:
    """VideoMAE-B in bf16, clips/s, against the matrix rate measured beside it."""
    import torch
    from ego2robot_kernels.model_input import Picture, model_inputs
    from transformers import VideoMAEConfig, VideoMAEModel

    seconds = 1.0 if quick else 2.5
    torch.manual_seed(42)
    plain = VideoMAEModel._from_config(VideoMAEConfig(), attn_implementation="sdpa").float().eval()
    indices = [int(i * (FRAMES - 1) / 15) for i in range(16)]

    def prepare(clips: list[Any]) -> Any:
        return model_inputs(clips, [indices] * len(clips), Picture()).unflatten(0, (len(clips), 16))

    clips = frames_on_device(16)
    with torch.inference_mode():
        on_cpu = prepare([clips[0].cpu()]).float()
        expected = plain(pixel_values=on_cpu).last_hidden_state.mean(1)[0]
    model = plain.to("cuda", torch.bfloat16)

    def embed(pixels: Any) -> Any:
        return model(pixel_values=pixels).last_hidden_state.float().mean(1)

    with torch.inference_mode():
        got = embed(prepare(clips[:1]))[0].cpu()
    cosine = float(torch.nn.functional.cosine_similarity(got, expected, dim=0))
    if not cosine > 0.99:
        raise RuntimeError(f"bf16 on the GPU is apart from float32 on the CPU: cosine {cosine:.4f}")
    found = swept(embed, prepare, clips, (8, 32, 64, 128) if quick else (1, 8, 32, 64, 128, 256), seconds)
    rate = matrix_tflops(seconds)
    best = max(found["from_frames"].values())
    alone = max(found["graph"].values())
    return {
        **found,
        "cosine_to_float32_on_cpu": round(cosine, 5),
        "bf16_TFLOPs": round(rate, 1),
        "gpu_videomae_clips_per_s": best,
        "share_of_matrix_rate": round(best * VIDEOMAE_GFLOP / 1000 / rate, 3),
        "share_of_matrix_rate_model_alone": round(alone * VIDEOMAE_GFLOP / 1000 / rate, 3),
    }


def clip(quick: bool) -> dict[str, Any]:
    """CLIP B/32's picture tower in bf16, pictures/s, the middle frame of each clip."""
    import torch
    from ego2robot_kernels.model_input import Picture, model_inputs
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    seconds = 1.0 if quick else 2.0
    torch.manual_seed(42)
    settings = CLIPVisionConfig(hidden_size=768, intermediate_size=3072, patch_size=32, projection_dim=512)
    model = CLIPVisionModelWithProjection._from_config(settings).to("cuda", torch.bfloat16).eval()
    picture = Picture(
        resample="bicubic",
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )

    def prepare(clips: list[Any]) -> Any:
        return model_inputs(clips, [[FRAMES // 2]] * len(clips), picture)

    def embed(pixels: Any) -> Any:
        return torch.nn.functional.normalize(model(pixel_values=pixels).image_embeds.float(), dim=-1)

    batches = (64, 256) if quick else (1, 64, 256, 1024)
    found = swept(embed, prepare, frames_on_device(64), batches, seconds)
    rate = matrix_tflops(seconds)
    best = max(found["from_frames"].values())
    share = round(best * CLIP_GFLOP / 1000 / rate, 3)
    return {**found, "pictures_per_s": best, "bf16_TFLOPs": round(rate, 1), "share_of_matrix_rate": share}


# -- end to end -----------------------------------------------------------------------------------


def end_to_end_hevc(quick: bool) -> dict[str, Any]:
    return end_to_end("hevc", quick)


def end_to_end_h264(quick: bool) -> dict[str, Any]:
    return end_to_end("h264", quick)


def end_to_end(codec: str, quick: bool) -> dict[str, Any]:
    """The ``bench`` recipe on the GPU: video-hours per hour of its steady middle, beside decoding alone.

    Rates are taken between a fifth and 19 twentieths of all clips, so that neither starting up nor the last
    incomplete batches count; the whole time, from the plan to the last row, is given too.
    """
    from ego2robot import config, pipeline
    from ego2robot.decode import hardware
    from ego2robot.progress import Progress
    from ego2robot.sample import make_footage

    if missing := hardware.missing():
        raise Skip(missing)
    kinds = ("walking", "manipulating", "idle", "walking")
    minutes = 20 if quick else 90
    videos = CACHE / f"gpu-{codec}-{minutes}min"
    if not videos.is_dir():
        aside = CACHE / f".gpu-{codec}"
        shutil.rmtree(aside, ignore_errors=True)
        # No B-frames: every picture is needed, so that the share of the ceiling is one of full decoding.
        make_footage(aside, minutes=minutes, codec=codec, gop=60, videos=32, video_minutes=3, kinds=kinds)
        aside.rename(videos)
    ceiling = decode_ceiling(sorted(videos.glob("*.mp4"))[0], 1.0 if quick else 3.0)
    run_dir = CACHE / f"gpu-{codec}-run"
    shutil.rmtree(run_dir, ignore_errors=True)
    seen: list[tuple[float, int, int]] = []
    marks: dict[str, float] = {}

    def show(progress: Progress) -> None:
        now = time.perf_counter()
        marks.setdefault(progress.stage.partition(":")[0], now)
        if progress.stage == "curating":
            seen.append((now, progress.done, progress.total))

    overrides = [f"source.path={videos}", f"run_dir={run_dir}", "device=cuda"]
    with Watching() as watching:
        outcome = pipeline.run(config.load("bench", overrides), show)
    stride_s = outcome.run.config.clips.stride_s
    total = seen[-1][2]
    middle = [(at, done) for at, done, _ in seen if 0.2 * total <= done <= 0.95 * total]
    whole = marks["clustering"] - marks["planning"]
    lines = [line for line in outcome.run.metrics() if "elapsed_s" in line]
    shutil.rmtree(run_dir)
    found: dict[str, Any] = {
        "clips": total,
        "kept": lines[-1]["kept"],
        "seconds_with_start": round(whole, 1),
        "video_hours_per_hour_with_start": round(total * stride_s / whole, 1),
        "decode_only": ceiling,
        "last_metrics": lines[-1],
        **watching.figures(),
    }
    if len(middle) < 3:
        raise RuntimeError(f"too few readings for a rate: {len(seen)}; {found}")
    (began, first), (ended, last) = middle[0], middle[-1]
    rate = (last - first) * stride_s / (ended - began)
    found |= {
        f"gpu_video_hours_per_hour_{codec}": round(rate, 1),
        "clips_per_s": round((last - first) / (ended - began), 2),
        "measured_seconds": round(ended - began, 1),
    }
    if isinstance(ceiling["video_hours_per_hour"], float):
        found["gpu_share_of_decode_ceiling"] = round(rate / ceiling["video_hours_per_hour"], 3)
    return found


def decode_ceiling(path: Path, seconds: float) -> dict[str, Any]:
    """Video-hours per hour at 30 frames/s of decoders that do nothing else, as many at once as pays."""
    import decode

    from ego2robot.decode import probe

    info = probe(path.name, decode._blob(path))
    rates = {
        f"{name} x{n}": decode._rate(way, n, seconds)
        for name, way in decode._alone(path, info).items()
        for n in (7, 14, 28)
    }
    best = max((rate for rate in rates.values() if isinstance(rate, float)), default=None)
    return {"video_hours_per_hour": best, "of_each": rates}


class Watching:
    """Asks the driver about memory and load twice a second while something runs."""

    QUERY = "memory.used,utilization.gpu,utilization.decoder"

    def __enter__(self) -> Watching:
        self._readings: list[list[float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _watch(self) -> None:
        command = ["nvidia-smi", f"--query-gpu={self.QUERY}", "--format=csv,noheader,nounits", "-i", "0"]
        while not self._stop.wait(0.5):
            try:
                told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
            except (OSError, subprocess.TimeoutExpired):
                continue  # a reading less; figures() says when there is none
            parts = told.stdout.strip().split(",")
            if told.returncode == 0 and len(parts) == 3:
                numbers = [part.strip() for part in parts]
                self._readings.append([float(n) if n.replace(".", "").isdigit() else 0.0 for n in numbers])

    def figures(self) -> dict[str, Any]:
        if not self._readings:
            return {"readings": "nvidia-smi gave none"}
        memory, load, decoder = zip(*self._readings, strict=True)
        return {
            "peak_device_memory_MiB": max(memory),
            "median_gpu_load_percent": statistics.median(load),
            "median_decoder_load_percent": statistics.median(decoder),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter: to see that it works")
    parser.add_argument("--minutes", type=float, default=10, help="that all parts together may take")
    parser.add_argument("--only", help="parts, separated by commas")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    from bench import report_of, run_all

    about = machine(PACKAGES)
    missing = [name for name in PACKAGES if about[name] == "not installed"]
    print(f"not installed: {', '.join(missing) or 'nothing'}", flush=True)
    check = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    if "gpu" not in about or subprocess.run(check, check=False).returncode:
        print("error: torch sees no GPU here; run this where `nvidia-smi` lists one", file=sys.stderr)
        return 2
    CACHE.mkdir(parents=True, exist_ok=True)
    names = args.only.split(",") if args.only else [part.name for part in PARTS]
    parts = [part for part in PARTS if part.name in names]
    outcomes = run_all(parts, args.quick, args.minutes)
    body = {"quick": args.quick, "not_installed": missing, **report_of(outcomes, SOURCES)}
    path = write_report(__doc__.splitlines()[0], about, body, True, args.out)
    print("\n".join(summary(body["ratios"], body["skipped"])))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
