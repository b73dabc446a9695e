"""The hand networks on a GPU as CUDA graphs: hundreds of small kernels started by one call.

A graph runs on the shapes it was captured with, so batches are filled up with black frames. That also makes
a frame's hands independent of the frames that come with it, to the last bit: the same kernels see it.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

from ego2robot.hands_net.pipeline import FoundHands, HandNet

_WARM_UPS = 3  # before capture, as torch's documentation asks for: libraries set themselves up
_GRAPHS = 4  # sizes of frames that are kept; each has a batch's activations


class Captured:
    """A :class:`HandNet` with ``every_slot`` that answers batches of up to ``n_frames`` without the host.

    Args:
        net: on a GPU, with ``every_slot``.
        n_frames: of a batch; smaller ones are filled up.
    """

    def __init__(self, net: HandNet, n_frames: int) -> None:
        if not net.every_slot:
            raise ValueError("a network that asks the host how many hands there are cannot be captured")
        self._net, self.n_frames = net, n_frames
        self._graphs: OrderedDict[tuple[torch.Size, torch.dtype], _Graph] = OrderedDict()

    def __call__(self, frames_BHWC: torch.Tensor) -> FoundHands:
        """As the network itself. Returns before the device is done; the result is the caller's own.

        Raises:
            ValueError: more frames than a batch holds.
        """
        if len(frames_BHWC) > self.n_frames:
            raise ValueError(f"{len(frames_BHWC)} frames in a batch of {self.n_frames}")
        key = frames_BHWC.shape[1:], frames_BHWC.dtype
        graph = self._graphs.pop(key, None)
        if graph is None:
            while len(self._graphs) >= _GRAPHS:
                self._graphs.popitem(last=False)
            graph = _Graph(self._net, self.n_frames, frames_BHWC)
        self._graphs[key] = graph
        return graph.run(frames_BHWC)


class _Graph:
    def __init__(self, net: HandNet, n_frames: int, like_BHWC: torch.Tensor) -> None:
        with torch.inference_mode():
            self._frames_BHWC = like_BHWC.new_zeros((n_frames, *like_BHWC.shape[1:]))
            # Off the default stream, where a capture is forbidden; and this stream's work goes first.
            aside = torch.cuda.Stream(like_BHWC.device)
            aside.wait_stream(torch.cuda.current_stream(like_BHWC.device))
            with torch.cuda.device(like_BHWC.device), torch.cuda.stream(aside):
                for _ in range(_WARM_UPS):
                    net(self._frames_BHWC).packed()
            torch.cuda.current_stream(like_BHWC.device).wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads, such as a decoder's, may use the device meanwhile.
            with (
                torch.cuda.device(like_BHWC.device),
                torch.cuda.graph(self._graph, capture_error_mode="thread_local"),
            ):
                self._table_BKC = net(self._frames_BHWC).packed()

    def run(self, frames_BHWC: torch.Tensor) -> FoundHands:
        n = len(frames_BHWC)
        with torch.inference_mode(), torch.cuda.device(frames_BHWC.device):
            self._frames_BHWC[:n].copy_(frames_BHWC)
            self._frames_BHWC[n:].zero_()
            self._graph.replay()
            return FoundHands.unpacked(self._table_BKC[:n].clone())
