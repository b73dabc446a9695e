"""How a model is run: in which precision, and in batches of one shape."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ego2robot.errors import UserError
from ego2robot.stages.base import Embedder


def compute_dtype(device: str) -> torch.dtype:
    """bfloat16 or float16 where ``device`` computes in it natively, else float32."""
    if torch.device(device).type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16 if major >= 7 else torch.float32
    # Without these instructions bfloat16 on a CPU is slower than float32. torch has no public question
    # for them yet, and not every build has the private ones.
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        supported = getattr(torch.cpu, name, None)
        if supported is not None and supported():
            return torch.bfloat16
    return torch.float32


def batch_shape(device: str, batch_size: int) -> int:
    """Clips to run at a time: ``batch_size`` on a GPU, one on a CPU.

    A CPU gains nothing from batches of such models, and one at a time needs no padding.
    """
    return batch_size if torch.device(device).type == "cuda" else 1


class Graphed:
    """Runs a function of one tensor as a CUDA graph, which leaves out the launching of its many kernels.

    A graph is used only after one replay gave what the plain call gives. On a CPU the plain call is all.

    Attributes:
        most: no more than so many clips at a time fit the memory; None: not known yet.
    """

    TOLERANCE = 2e-2  # of the largest value; half precision may add in another order

    def __init__(self) -> None:
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
        self._refused = False
        self.most: int | None = None

    def __call__(self, run: Callable[[torch.Tensor], torch.Tensor], some: torch.Tensor) -> torch.Tensor:
        """``run(some)``; ``run`` is always the same function, of a shape that seldom changes."""
        if not some.is_cuda or self._refused:
            return run(some)
        shape = tuple(some.shape)
        if shape not in self._graphs:
            plain = run(some)
            self._capture(run, some, plain)
            return plain
        graph, given, made = self._graphs[shape]
        given.copy_(some)
        graph.replay()
        return made.clone()

    def forget(self) -> None:
        """Gives the graphs' memory back."""
        self._graphs.clear()
        torch.cuda.empty_cache()

    def _capture(
        self, run: Callable[[torch.Tensor], torch.Tensor], some: torch.Tensor, plain: torch.Tensor
    ) -> None:
        given = some.clone()
        stream = torch.cuda.Stream(some.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries choose their kernels in the first calls
                run(given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process go on using the device meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            made = run(given)
        graph.replay()
        apart = (made - plain).abs().max()
        # An input that gives no finite vector proves nothing against the graph: the next one is tried.
        if not torch.isfinite(plain).all():
            return
        if not bool(apart <= self.TOLERANCE * plain.abs().max()):
            self._refused = True
            warnings.warn(
                f"a CUDA graph gave other vectors than the plain call (apart by {float(apart):.3g}); "
                "going on without it",
                stacklevel=2,
            )
            return
        self._graphs[tuple(some.shape)] = graph, given, made


def in_batches(
    run: Callable[[torch.Tensor], torch.Tensor],
    prepared_BTHWC: torch.Tensor,
    size: int,
    device: str,
    dim: int,
    name: str,
    graphed: Graphed,
) -> torch.Tensor:
    """``run`` over clips in batches of one shape, so that a vector does not depend on its neighbours.

    Where the device's memory does not suffice, batches are halved, for good.

    Args:
        run: uint8 [b, T, h, w, 3] on ``device`` to float32 [b, dim].
        prepared_BTHWC: uint8 [B, T, h, w, 3], any B.
        size: clips at a time, see :func:`batch_shape`; the last batch is padded with black.

    Returns:
        float32 [B, dim] on the CPU.

    Raises:
        FloatingPointError: a vector is not finite; names the model.
        torch.OutOfMemoryError: not even one clip fits.
    """
    if size == 1 and torch.device(device).type == "cpu":
        return _one_a_thread(run, prepared_BTHWC, dim, name)
    vectors = torch.empty((len(prepared_BTHWC), dim), dtype=torch.float32)
    start = 0
    with torch.inference_mode():
        while start < len(prepared_BTHWC):
            n_most = min(size, graphed.most or size)
            some = prepared_BTHWC[start : start + n_most].to(device, non_blocking=True)
            n = len(some)
            if n < n_most:
                some = torch.cat([some, some.new_zeros((n_most - n, *some.shape[1:]))])
            try:
                found = graphed(run, some)[:n].cpu()
            except RuntimeError as error:
                if not out_of_memory(error) or n_most == 1:
                    raise
                graphed.most = n_most // 2
                graphed.forget()
                continue
            vectors[start : start + n] = _finite(found, name)
            start += n
    return vectors


def _one_a_thread(
    run: Callable[[torch.Tensor], torch.Tensor], prepared_BTHWC: torch.Tensor, dim: int, name: str
) -> torch.Tensor:
    """Clips side by side, each on one thread: beside busy decoders the threads of one clip would wait for
    one another most of the time."""

    def one(clip_THWC: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return run(clip_THWC[None])

    n = min(len(prepared_BTHWC), len(os.sched_getaffinity(0)))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max(1, n)) as pool:
            found = list(pool.map(one, prepared_BTHWC))
    finally:
        torch.set_num_threads(before)
    return _finite(torch.cat(found), name) if found else torch.empty((0, dim))


def _finite(found_BD: torch.Tensor, name: str) -> torch.Tensor:
    bad = int((~torch.isfinite(found_BD)).any(1).sum())
    if bad:
        raise FloatingPointError(f"{name}: {bad} of {len(found_BD)} vectors are not finite")
    return found_BD


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the device's memory does not suffice; less at once may do."""
    return isinstance(error, torch.OutOfMemoryError)


def embed_finite(
    embedder: Embedder, prepared: Sequence[torch.Tensor], proven: bool
) -> list[np.ndarray | None]:
    """Vectors of clips, each on its own merits: one that is not finite costs no other clip.

    Args:
        prepared: uint8 [T, h, w, 3] each, of one shape.
        proven: the embedder has given finite vectors before.

    Returns:
        float32 [dim] each; None where it is not finite.

    Raises:
        UserError: the first vectors ever are none of them finite: the weights are at fault, not the clips.
    """
    try:
        return list(embedder.embed(torch.stack(list(prepared))).numpy())
    except FloatingPointError:
        pass
    found: list[np.ndarray | None] = []
    for one in prepared:
        try:
            found.append(embedder.embed(one[None])[0].numpy())
        except FloatingPointError:
            found.append(None)
    if not proven and all(vector is None for vector in found):
        raise UserError(
            f"{embedder.name}: {embedder.weights} gives vectors that are not finite for every clip; "
            "check the weights, or use others"
        )
    return found
