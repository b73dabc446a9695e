"""How near does our decoding come to decoding alone?

On a CPU, on one core: libav decodes every frame and converts none; ours decodes, picks, scales and hands
over the frames of all clips. The ratio of their CPU times is what counts; they take turns.

On a GPU: many decoders at once, for each codec and GOP, that only decode (the ceiling of the engines), and
ours to 640 x 360 frames on the GPU, through each decoder that is there. First, each must give the CPU's
frames. Rates are video-hours per hour at 30 frames/s. Ours leaves out pictures that are neither due nor
needed; where a stream has such, it may pass the ceiling.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from common import CACHE, RESULTS, write_result

from ego2robot.decode import ClipFailure, hardware, policy, probe, read_clips
from ego2robot.decode.base import Backend
from ego2robot.decode.pyav import open_stream
from ego2robot.sample.scene import bench
from ego2robot.types import Blob, Clip, FrameSpec, VideoInfo

HEIGHT, WIDTH, FPS = 1080, 1920, 30
# Bit rates of head-mounted cameras; B-frames come with long groups of pictures.
KINDS: dict[str, tuple[str, int, int, dict[str, str]]] = {
    "h264_gop30": ("libx264", 30, 0, {"preset": "veryfast", "b": "4500k", "maxrate": "6M", "bufsize": "9M"}),
    "h264_gop250": (
        "libx264",
        250,
        3,
        {"preset": "veryfast", "b": "4500k", "maxrate": "6M", "bufsize": "9M"},
    ),
    "hevc_gop30": ("libx265", 30, 0, {"preset": "ultrafast", "b": "3800k"}),
    "hevc_gop250": ("libx265", 250, 3, {"preset": "ultrafast", "b": "3800k"}),
}
SECONDS = 12  # of each video
CLIP_S, SAMPLE_FPS = 6.0, 6.0
SPEC = FrameSpec()
AT_ONCE = (1, 4, 7, 14, 21, 28)  # decoders in parallel
MIN_PSNR = 40.0
TIMED = ("nvdec", "cuvid", "torchcodec", "pynvvideocodec")  # the others open a video anew for every batch


def footage(seconds: int) -> dict[str, Path]:
    """1080p30 videos of every kind: a workbench under a moving head, with a sensor's noise."""
    folder = CACHE / f"decode-{seconds}s"
    folder.mkdir(parents=True, exist_ok=True)
    lacking = [kind for kind in KINDS if not (folder / f"{kind}.mp4").is_file()]
    if lacking:
        margin = 120
        scene_HWC = np.asarray(bench(7, HEIGHT + 2 * margin, WIDTH + 2 * margin), np.int16)
        rng = np.random.default_rng(7)
        noise = [rng.normal(0, 5, (HEIGHT, WIDTH, 1)).astype(np.int16) for _ in range(6)]
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as threads:
            for _ in threads.map(
                lambda kind: _encode(folder, kind, seconds, scene_HWC, margin, noise), lacking
            ):
                pass
    return {kind: folder / f"{kind}.mp4" for kind in KINDS}


def _encode(
    folder: Path, kind: str, seconds: int, scene_HWC: np.ndarray, margin: int, noise: list[np.ndarray]
) -> None:
    encoder, gop, bframes, options = KINDS[kind]
    if encoder == "libx265":
        params = f"log-level=error:keyint={gop}:min-keyint={gop}:bframes={bframes}:pools=1"
        options = options | {"x265-params": params}
    aside = folder / f".{kind}.mp4"
    with av.open(str(aside), "w") as container:
        stream = container.add_stream(encoder, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = gop
        if encoder == "libx264":
            stream.codec_context.max_b_frames = bframes
        for i in range(seconds * FPS):
            t = i / FPS
            top = margin + round(0.8 * margin * np.sin(2 * np.pi * t / 3))
            left = margin + round(0.8 * margin * np.sin(2 * np.pi * t / 4.3))
            seen_HWC = scene_HWC[top : top + HEIGHT, left : left + WIDTH] + noise[i % len(noise)]
            frame = av.VideoFrame.from_ndarray(seen_HWC.clip(0, 255).astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    aside.rename(folder / f"{kind}.mp4")


def _blob(path: Path) -> Blob:
    return Blob(str(path), 0, path.stat().st_size)


def _clips(info: VideoInfo) -> list[Clip]:
    n = int(CLIP_S * SAMPLE_FPS)
    count = int(info.duration_s // CLIP_S)
    return [Clip(f"{i:016x}", "v", i * n, n, SAMPLE_FPS) for i in range(count)]


# -- CPU ------------------------------------------------------------------------------------------


def _libav(path: Path) -> int:
    frames = 0
    with open_stream(path.name, _blob(path)) as (container, stream):
        for packet in container.demux(stream):
            frames += len(packet.decode())
    return frames


def _ours(path: Path, info: VideoInfo, fast: bool) -> int:
    backend, _ = policy.pick(info, "pyav", "cpu")
    found = list(read_clips(path.name, _blob(path), info, _clips(info), SPEC, backend, "cpu", fast))
    if any(isinstance(clip, ClipFailure) for clip in found):
        raise SystemExit(f"{path}: clips failed")
    return len(found)


def cpu(paths: dict[str, Path], rounds: int) -> dict[str, Any]:
    """CPU seconds of both ways, on one core, in turns."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        return {kind: _cpu_one(path, rounds) for kind, path in paths.items()}
    finally:
        os.sched_setaffinity(0, cores)


def _cpu_one(path: Path, rounds: int) -> dict[str, Any]:
    info = probe(path.name, _blob(path))
    ways: dict[str, Callable[[], int]] = {
        "libav": lambda: _libav(path),
        "exact": lambda: _ours(path, info, False),
        "fast": lambda: _ours(path, info, True),
    }
    ways["exact"]()  # warm: libraries, page cache, memory
    used: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.process_time()
            way()
            used[name].append(time.process_time() - began)
    frames = round(info.duration_s * FPS)
    found: dict[str, Any] = {
        f"{name}_frames_per_s": round(frames / statistics.median(seconds), 1)
        for name, seconds in used.items()
    }
    for name in ("exact", "fast"):
        ratios = [a / b for a, b in zip(used["libav"], used[name], strict=True)]
        found[f"{name}_vs_libav"] = round(statistics.median(ratios), 3)
        found[f"{name}_vs_libav_of_each_round"] = [round(r, 3) for r in ratios]
    return found


# -- GPU ------------------------------------------------------------------------------------------


def gpu(paths: dict[str, Path], seconds: float, at_once: tuple[int, ...]) -> dict[str, Any]:
    """Rates of decoding alone and of ours, for each kind of video and number of decoders at once."""
    here = {name: b for name, b in policy.backends().items() if "cuda" in b.devices and not b.missing()}
    absent = {name: b.missing() for name, b in policy.backends().items() if b.missing()}
    found: dict[str, Any] = {"absent": absent, "engines": _engines(), "kinds": {}}
    correct = {}
    for name, backend in here.items():
        correct[name] = _agrees(backend, paths)
    found["psnr_to_cpu_dB"] = correct
    trusted = {name: here[name] for name in TIMED if isinstance(correct.get(name), float)}
    for kind, path in paths.items():
        info = probe(path.name, _blob(path))
        alone: dict[str, float | str] = {}
        ours: dict[str, float | str] = {}
        for n in at_once:
            for name, decode in _alone(path, info).items():
                alone[f"{name} x{n}"] = _rate(decode, n, seconds)
            for name, backend in trusted.items():
                ours[f"{name} x{n}"] = _rate(_reading(backend, path, info), n, seconds)
        ceiling = max((r for r in alone.values() if isinstance(r, float)), default=None)
        best = max((r for r in ours.values() if isinstance(r, float)), default=None)
        found["kinds"][kind] = {
            "decode_only_video_hours_per_hour": alone,
            "ours_video_hours_per_hour": ours,
            "ceiling_video_hours_per_hour": ceiling,
            "best_video_hours_per_hour": best,
            "share_of_ceiling": round(best / ceiling, 3) if best and ceiling else None,
        }
        print(kind, found["kinds"][kind], flush=True)
    return found


def _engines() -> dict[str, int | None]:
    return {
        codec: (c.engines if (c := hardware.caps(codec, 8)) else None) for codec in ("h264", "hevc", "av1")
    }


def _agrees(backend: Backend, paths: dict[str, Path]) -> float | str:
    """The least PSNR to the CPU's frames over all kinds, or why this decoder is not measured."""
    worst = 99.0
    for path in paths.values():
        info = probe(path.name, _blob(path))
        due = np.arange(0, 3, 1 / SAMPLE_FPS)
        try:
            found = list(backend.read(path.name, _blob(path), info, due, SPEC, "cuda"))
        except Exception as error:  # noqa: BLE001 - a finding about one decoder, the others go on
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]
        expected = policy.backends()["pyav"].read(path.name, _blob(path), info, due, SPEC, "cpu")
        frames = torch.cat([b.frames_THWC.cpu() for b in found])
        reference = torch.cat([b.frames_THWC for b in expected])
        if frames.shape != reference.shape:
            return f"{len(frames)} frames of {len(reference)}"
        error_2 = float(((frames.double() - reference.double()) ** 2).mean())
        worst = min(worst, 10 * np.log10(255**2 / error_2) if error_2 else 99.0)
    return round(float(worst), 1) if worst >= MIN_PSNR else f"differs from the CPU: {worst:.1f} dB"


Counting = Callable[[threading.Event], Iterator[int]]


def _rate(decode: Counting, n: int, seconds: float) -> float | str:
    """Video-hours per hour of ``n`` threads that decode until the time is up, all of them warm."""
    stop, started, counts = threading.Event(), threading.Barrier(n + 1), [0] * n
    measuring = threading.Event()

    def work(k: int) -> None:
        try:
            turn(k)
        except BaseException:
            started.abort()  # nobody waits for this one
            raise

    def turn(k: int) -> None:
        first = True
        while not stop.is_set():
            for frames in decode(stop):
                if first:
                    first = False
                    started.wait(60)
                if measuring.is_set():
                    counts[k] += frames
                if stop.is_set():
                    break

    with ThreadPoolExecutor(n) as threads:
        jobs = [threads.submit(work, k) for k in range(n)]
        try:
            started.wait(60)
        except threading.BrokenBarrierError:
            stop.set()
            return _first_error(jobs) or "did not start in 60 s"
        measuring.set()
        began = time.perf_counter()
        time.sleep(seconds)
        measuring.clear()
        elapsed = time.perf_counter() - began
        stop.set()
        if error := _first_error(jobs):
            return error
    return round(sum(counts) / elapsed / FPS, 1)


def _first_error(jobs: list[Future[None]]) -> str | None:
    errors = [e for job in jobs if (e := job.exception())]
    errors.sort(key=lambda e: isinstance(e, threading.BrokenBarrierError))  # the cause first
    return f"{type(errors[0]).__name__}: {errors[0]}".splitlines()[0][:200] if errors else None


def _reading(backend: Backend, path: Path, info: VideoInfo) -> Counting:
    """Ours: frames of the video that a batch of due frames stands for."""
    due = np.arange(0, info.duration_s - 1 / FPS, 1 / SAMPLE_FPS)

    def decode(stop: threading.Event) -> Iterator[int]:
        stream = torch.cuda.Stream()
        with _current(stream):
            for batch in backend.read(path.name, _blob(path), info, due, SPEC, "cuda"):
                stream.synchronize()
                yield round(len(batch.times_s) * FPS / SAMPLE_FPS)

    return decode


@contextmanager
def _current(stream: torch.cuda.Stream) -> Iterator[None]:
    with torch.cuda.stream(stream):
        yield


def _alone(path: Path, info: VideoInfo) -> dict[str, Counting]:
    """Decoding every frame on the engines and doing nothing with it."""
    ways: dict[str, Counting] = {}
    if policy.backends()["nvdec"].missing() is None:
        ways["libav"] = lambda stop: _alone_libav(path, info)
        ways["driver"] = lambda stop: _alone_driver(path, info)
    if policy.backends()["pynvvideocodec"].missing() is None:
        ways["PyNvVideoCodec"] = lambda stop: _alone_pynvvideocodec(path)
    return ways


def _alone_libav(path: Path, info: VideoInfo) -> Iterator[int]:
    from ego2robot.decode.nvdec import PyAVEngine

    with open_stream(path.name, _blob(path)) as (container, stream):
        engine = PyAVEngine(info.codec, stream.codec_context.extradata, 0)
        for packet in container.demux(stream):
            yield len(engine.decode(packet) if packet.size else engine.drain())


def _alone_driver(path: Path, info: VideoInfo) -> Iterator[int]:
    """Not even mapped: the engines and nothing else."""
    from ego2robot.decode.cuvid import DriverEngine

    with open_stream(path.name, _blob(path)) as (container, stream):
        engine = DriverEngine(info.codec, 0)
        try:
            engine.follow(stream)
            for packet in container.demux(stream):
                yield len(engine.decode(packet) if packet.size else engine.drain())
        finally:
            engine.close()


def _alone_pynvvideocodec(path: Path) -> Iterator[int]:
    import PyNvVideoCodec as nvc

    demuxer = nvc.CreateDemuxer(filename=str(path))
    decoder = nvc.CreateDecoder(gpuid=0, codec=demuxer.GetNvCodecId(), usedevicememory=True)
    for packet in demuxer:
        yield len(decoder.Decode(packet))


# -- both -----------------------------------------------------------------------------------------


def run(quick: bool) -> dict[str, Any]:
    """All of it, or less of it in less time. Figures for ``ratios`` are at the top."""
    torch.set_num_threads(1)
    paths = footage(SECONDS)
    body: dict[str, Any] = {"cpu": cpu(paths, 1 if quick else 5)}
    body["cpu_decode_vs_libav"] = min(found["exact_vs_libav"] for found in body["cpu"].values())
    if missing := hardware.missing():
        return body | {"gpu": f"skipped: {missing}"}
    return body | gpu_figures(quick)


def gpu_figures(quick: bool) -> dict[str, Any]:
    """The part that needs a GPU."""
    paths = footage(SECONDS)
    found = gpu(paths, 0.8 if quick else 3.0, (7, 21) if quick else AT_ONCE)
    body: dict[str, Any] = {"gpu": found}
    for codec in ("h264", "hevc"):
        kinds = [found["kinds"][kind] for kind in KINDS if kind.startswith(codec)]
        for key in ("ceiling_video_hours_per_hour", "best_video_hours_per_hour"):
            rates = [kind[key] for kind in kinds if kind[key]]
            if rates:
                body[f"gpu_decode_{key}_{codec}"] = min(rates)
    shares = [kind["share_of_ceiling"] for kind in found["kinds"].values() if kind["share_of_ceiling"]]
    if shares:
        body["gpu_decode_share_of_ceiling"] = min(shares)
    return body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    body = run(args.quick)
    path = write_result("decode", __doc__, body, ("torch", "av", "torchcodec", "PyNvVideoCodec"), args.out)
    for kind, found in body["cpu"].items():
        print(
            f"{kind}: ours at {found['exact_vs_libav']:.2f} of libav alone, fast {found['fast_vs_libav']:.2f}"
        )
    print(path.name)


if __name__ == "__main__":
    main()
