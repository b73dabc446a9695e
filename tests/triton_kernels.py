"""Kernels without a GPU: run in Triton's interpreter, compiled for one that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase

# An example takes the interpreter seconds: a failing one is shown as it was found.
UNSHRUNK: Any = {"suppress_health_check": list(HealthCheck), "phases": [Phase.generate]}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Tests of a kernel itself carry this: they run where there is a GPU, else in `run_interpreted`'s process.
on_device = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="run in Triton's interpreter, or on a GPU"
)


def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    """A copy on the GPU with the same strides: ``cuda()`` would pack what has margins."""
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    if x.dtype == torch.uint16:  # torch does little with those
        copy.view(torch.int16).copy_(x.view(torch.int16))
        return copy
    return copy.copy_(x)


def run_interpreted(file: str) -> None:
    """The tests of ``file`` named ``…on_device…``, in Triton's interpreter and a process of their own:
    whether a module's kernels are interpreted is settled when it is imported."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "on_device", file]
    run = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout, run.stdout


def compile_for_hopper(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], **options: Any
) -> Any:
    """Compiles for sm_90; arguments that are neither pointers nor constants are int32."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["cubin"]
    return compiled
