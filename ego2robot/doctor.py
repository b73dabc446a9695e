"""What this machine can do, and what to install for what it cannot."""

from __future__ import annotations

import ctypes.util
import importlib
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ego2robot import models
from ego2robot.decode import policy

PACKAGES = {
    "faiss": ("faster k-means", "pip install faiss-cpu (or faiss-gpu, never both)"),
    "umap": ("UMAP projection", "pip install umap-learn"),
    "cuml": ("k-means and projections on the GPU", "pip install cuml-cu13"),
    "triton": ("kernels on the GPU", "comes with torch's CUDA build"),
}
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


@dataclass(frozen=True)
class Finding:
    """One line: ``ok`` True (there), False (missing and needed for something), None (for information)."""

    group: str
    name: str
    ok: bool | None
    text: str
    hint: str = ""


def doctor(folder: Path) -> list[Finding]:
    """Looks at the machine; imports optional packages to see whether they really load.

    Args:
        folder: where runs will go, for the free disk.
    """
    return [*_machine(folder), *_gpu(), *_decoders(), *_packages(), *_models()]


def _machine(folder: Path) -> Iterator[Finding]:
    yield Finding("machine", "python", None, f"{platform.python_version()} on {platform.machine()}")
    cpuinfo = Path("/proc/cpuinfo")
    flags: set[str] = set()
    model = platform.processor()
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags = set(value.split())
        elif key.strip() == "model name":
            model = value.strip()
    have = [flag for flag in CPU_FLAGS if flag in flags]
    cores = len(os.sched_getaffinity(0))
    yield Finding(
        "machine", "cpu", None, f"{model}, {cores} cores; {' '.join(have) or 'no vector extensions'}"
    )
    import torch

    from ego2robot.stages.inference import compute_dtype

    dtype = str(compute_dtype("cpu")).removeprefix("torch.")
    text = f"{torch.__version__}; models run in {dtype} on this CPU"
    yield Finding("machine", "torch", None, text)
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    text = f"{free / 1e9:.1f} GB free at {existing}"
    yield Finding("machine", "disk", free > 2e9, text, "" if free > 2e9 else "a run wants some GB: free some")


def _gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        hint = (
            "no NVIDIA driver answers: check `nvidia-smi`"
            if built
            else "this torch is a CPU build; see README"
        )
        yield Finding("gpu", "cuda", None, "none: everything runs on the CPU", hint)
        return
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        capability = f"sm_{p.major}{p.minor}"
        yield Finding("gpu", f"cuda:{i}", True, f"{p.name}, {p.total_memory / 2**30:.0f} GiB, {capability}")
    nvdec = ctypes.util.find_library("nvcuvid")
    hint = "" if nvdec else "expose the driver's video libraries (containers: NVIDIA_DRIVER_CAPABILITIES=all)"
    yield Finding("gpu", "nvdec", bool(nvdec), "libnvcuvid found" if nvdec else "libnvcuvid not found", hint)


def _decoders() -> Iterator[Finding]:
    for name, missing, version in policy.describe():
        yield Finding(
            "decoders", name, missing is None, version if missing is None else "not usable", missing or ""
        )


def _packages() -> Iterator[Finding]:
    for name, (purpose, hint) in PACKAGES.items():
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            found = importlib.util.find_spec(name) is not None
            text = f"installed, does not load: {error}" if found else f"not installed ({purpose})"
            yield Finding("packages", name, None, text.splitlines()[0], hint)
        else:
            yield Finding(
                "packages", name, True, f"{getattr(module, '__version__', 'installed')} ({purpose})"
            )


def _models() -> Iterator[Finding]:
    for model in models.installed():
        ok = True if model.state == "ok" else False if model.needed else None
        hint = "" if ok else "ego2robot models pull"
        yield Finding("models", model.name, ok, f"{model.what}: {model.state}", hint)
    hub = Path(
        os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub"
    )
    for name in ("MCG-NJU/videomae-base", "openai/clip-vit-base-patch32"):
        folder = hub.expanduser() / f"models--{name.replace('/', '--')}"
        there = any(folder.glob("snapshots/*/*.safetensors"))
        hint = "" if there else f"fetched on first use, or: hf download {name}"
        yield Finding(
            "models", name, there or None, "in the hub's cache" if there else "not in the hub's cache", hint
        )
