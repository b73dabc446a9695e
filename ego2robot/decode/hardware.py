"""What a GPU's video engines can decode, and their surfaces as tensors.

The driver is asked (NVDEC Video Decoder API, cuvidGetDecoderCaps): nothing is known here about models of
GPUs.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import av
import torch

from ego2robot.types import VideoInfo

# cudaVideoCodec of cuviddec.h
CODECS = {"mpeg2video": 1, "mpeg4": 2, "h264": 4, "hevc": 8, "vp8": 9, "vp9": 10, "av1": 11}
CHROMA_420 = 1  # cudaVideoChromaFormat
TYPES = {torch.uint8: "|u1", torch.uint16: "<u2"}
DRIVER_HINT = "expose the driver's video libraries (containers: NVIDIA_DRIVER_CAPABILITIES=all)"


class _Caps(ctypes.Structure):
    """CUVIDDECODECAPS of cuviddec.h (88 bytes)."""

    _fields_ = (
        ("codec", ctypes.c_int),
        ("chroma", ctypes.c_int),
        ("bit_depth_minus_8", ctypes.c_uint),
        ("reserved1", ctypes.c_uint * 3),
        ("supported", ctypes.c_ubyte),
        ("engines", ctypes.c_ubyte),
        ("output_formats", ctypes.c_ushort),
        ("max_width", ctypes.c_uint),
        ("max_height", ctypes.c_uint),
        ("max_macroblocks", ctypes.c_uint),
        ("min_width", ctypes.c_ushort),
        ("min_height", ctypes.c_ushort),
        ("histogram", ctypes.c_ubyte),
        ("counter_bits", ctypes.c_ubyte),
        ("histogram_bins", ctypes.c_ushort),
        ("reserved3", ctypes.c_uint * 10),
    )


@dataclass(frozen=True)
class Caps:
    """What the engines of a GPU take of one codec and bit depth, 4:2:0; sizes in pixels."""

    engines: int
    min_width: int
    min_height: int
    max_width: int
    max_height: int
    max_macroblocks: int  # of 16 x 16 pixels


@cache
def missing() -> str | None:
    """None where there is a GPU whose video engines can be reached, else what is missing."""
    if not torch.cuda.is_available():
        return "no GPU that torch sees: run `ego2robot doctor`"
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        return f"libnvcuvid not found: {DRIVER_HINT}"
    return None


@cache
def caps(codec: str, bit_depth: int, device: int = 0) -> Caps | None:
    """What the engines take of a codec, None where they do not; ``device`` counts as torch does.

    Raises:
        OSError: the driver's video libraries are not there (see :func:`missing`).
    """
    if codec not in CODECS:
        return None
    library = ctypes.CDLL("libnvcuvid.so.1")
    found = _Caps(codec=CODECS[codec], chroma=CHROMA_420, bit_depth_minus_8=bit_depth - 8)
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the device's context current in this thread
        status = library.cuvidGetDecoderCaps(ctypes.byref(found))
    if status or not found.supported:
        return None
    return Caps(
        max(1, found.engines),
        found.min_width,
        found.min_height,
        found.max_width,
        found.max_height,
        found.max_macroblocks,
    )


def refuses(info: VideoInfo) -> str | None:
    """None where the engines of the first GPU take such a video, else why not. Needs a GPU."""
    pixels = av.VideoFormat(info.pix_fmt)
    yuv420 = len(pixels.components) == 3 and pixels.chroma_width(16) == pixels.chroma_height(16) == 8
    if pixels.is_rgb or not yuv420:
        return f"{info.pix_fmt} pictures; the GPU's engines are used for 4:2:0"
    if info.codec not in CODECS:
        return f"the GPU's engines do not decode {info.codec}"
    found = caps(info.codec, info.bit_depth)
    if found is None:
        return f"this GPU's engines do not decode {info.bit_depth}-bit {info.codec}"
    width, height = (
        (info.height, info.width) if info.rotation % 180 else (info.width, info.height)
    )  # as stored
    size = f"{width} x {height} {info.codec}"
    if width < found.min_width or height < found.min_height:
        return f"{size} is below the {found.min_width} x {found.min_height} of this GPU's engines"
    blocks = -(-width // 16) * -(-height // 16)
    if width > found.max_width or height > found.max_height or blocks > found.max_macroblocks:
        return f"{size} is above the {found.max_width} x {found.max_height} of this GPU's engines"
    return None


def device_index(device: str) -> int:
    """``cuda`` or ``cuda:1`` as a number."""
    index = torch.device(device).index
    return torch.cuda.current_device() if index is None else index


class _DeviceArray:
    """Memory of a decoder as torch takes it without a copy (CUDA Array Interface, version 3)."""

    def __init__(
        self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], typestr: str, owner: object
    ) -> None:
        self.owner = owner  # torch holds this object for as long as the tensor lives
        self.__cuda_array_interface__: dict[str, Any] = {
            "version": 3,
            "shape": shape,
            "strides": strides,
            "typestr": typestr,
            "data": (address, False),
            "stream": None,  # whoever reads it is on the right one
        }


def device_planes(
    luma: int,
    chroma: int,
    pitch: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    device: int,
    owner: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A decoder's planes as tensors: luma [H, W] and chroma [ceil(H / 2), ceil(W / 2), 2], no copy.

    Args:
        luma, chroma: addresses on the device.
        pitch: bytes from one row to the next, of both.
        owner: what must live as long as the tensors do.
    """
    size = dtype.itemsize
    half = (-(-height // 2), -(-width // 2), 2)
    y = _DeviceArray(luma, (height, width), (pitch, size), TYPES[dtype], owner)
    uv = _DeviceArray(chroma, half, (pitch, 2 * size, size), TYPES[dtype], owner)
    where = torch.device("cuda", device)
    return torch.as_tensor(y, device=where), torch.as_tensor(uv, device=where)


def context(device: int) -> int:
    """The CUcontext that torch uses on a device (its primary context)."""
    driver = ctypes.CDLL("libcuda.so.1")
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes it current in this thread
        status = driver.cuCtxGetCurrent(ctypes.byref(handle))
    if status or not handle.value:
        raise OSError(f"no CUDA context on device {device} (error {status})")
    return handle.value
